package engine

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/pqc"
)

const (
	// maxOpenBatches is how many batches may wait for other nodes' confirmation before
	// no more is rewrapped: what lies in the state beside what is in use is bounded.
	maxOpenBatches = 16
	// rewrapBytes is how much wrapped material a batch carries at most, so that the
	// command stays well below state.MaxCommand.
	rewrapBytes = 512 << 10
)

// kekWork is what an Agent remembers about rotations of KEKs. None of it is needed:
// the state alone says what is left to do.
type kekWork struct {
	live   map[string][]uint32 // KEK versions of rotating keyrings, so that those retired leave memory
	broken map[string]bool     // key versions that do not open here, and so cannot be rewrapped here
	told   map[string]bool     // what is in the log
}

// rotateKEKs does this node's part in the rotations of KEKs that are under way: judge
// what others have rewrapped, rewrap, retire.
func (a *Agent) rotateKEKs(ctx context.Context, st *state.State) time.Duration {
	wait := idleWait
	for _, kr := range st.Keyrings() {
		if kr.KEK == 0 || !st.Resident(kr.Name, a.e.node) {
			continue
		}
		a.forgetRetired(st, kr.Name)
		if !st.Rotating(kr.Name) {
			continue
		}
		a.tellRefusedRewraps(ctx, st, kr)
		open := st.OpenBatches(kr.Name)
		for _, b := range open {
			if b.ConfirmedBy(a.e.node) {
				continue
			}
			name := fmt.Sprintf("confirm/%s/%d/%d", kr.Name, b.KEK, b.Index)
			wait = min(wait, a.attempt(ctx, "confirm", name, 0, func(ctx context.Context) error { return a.judge(ctx, kr.Name, b) }))
		}
		if len(open) < maxOpenBatches {
			wait = min(wait, a.rewrap(ctx, st, kr))
		}
		for _, v := range st.Retirable(kr.Name) {
			name := fmt.Sprintf("retire/%s/%d", kr.Name, v)
			rank, _ := place(st.ResidentNodes(kr.Name), name, a.e.node)
			wait = min(wait, a.attempt(ctx, "retire", name, time.Duration(rank)*a.cfg.RankDelay, func(ctx context.Context) error {
				_, err := a.e.submit(ctx, attempt{}, state.RetireKEK{Keyring: kr.Name, Version: v})
				return err
			}))
		}
	}
	return wait
}

// forgetRetired drops opened KEK versions that were retired.
func (a *Agent) forgetRetired(st *state.State, ring string) {
	was, watched := a.kek.live[ring]
	if !watched && !st.Rotating(ring) {
		return
	}
	var live []uint32
	for _, k := range st.KEKs(ring) {
		if !k.Retired() {
			live = append(live, k.Version)
		}
	}
	for _, v := range was {
		if !slices.Contains(live, v) {
			a.e.cfg.Cache.ForgetKEK(ring, v)
		}
	}
	if len(live) > 1 {
		a.kek.live[ring] = live
	} else {
		delete(a.kek.live, ring)
	}
}

// tellRefusedRewraps logs once what resident nodes have refused, at every node.
func (a *Agent) tellRefusedRewraps(ctx context.Context, st *state.State, kr state.Keyring) {
	for _, x := range st.RefusedRewraps(kr.Name, kr.KEK) {
		if name := fmt.Sprintf("%s/%d/%d", x.Keyring, x.KEK, x.Batch); !a.kek.told[name] {
			a.kek.told[name] = true
			a.e.log.WarnContext(ctx, "a node has refused a batch of rewrapped key versions: one does not open there, or holds another key; the node that rewrapped or the one that refused is at fault; what was in use stays in use",
				"keyring", x.Keyring, "kek", x.KEK, "rewrapped_by", x.By, "refused_by", x.Node, "key", x.Key, "version", x.Version)
		}
	}
}

// rewrap brings the next batch, in turn: a node that stops is replaced by the next one,
// since the first key version to rewrap then stays the same.
func (a *Agent) rewrap(ctx context.Context, st *state.State, kr state.Keyring) time.Duration {
	if !st.MayRewrap(kr.Name, a.e.node) {
		return idleWait
	}
	first := ""
	st.ToRewrap(kr.Name, func(v state.Version) bool {
		if name := versionName(v); !a.kek.broken[name] {
			first = name
		}
		return first == ""
	})
	if first == "" {
		return idleWait
	}
	nodes := slices.DeleteFunc(st.ResidentNodes(kr.Name), func(n state.Node) bool { return !st.MayRewrap(kr.Name, n.ID) })
	rank, _ := place(nodes, fmt.Sprintf("rewrap/%s/%d", kr.Name, kr.KEK), a.e.node)
	return a.attempt(ctx, "rewrap", fmt.Sprintf("rewrap/%s/%d", first, kr.KEK), time.Duration(rank)*a.cfg.RankDelay,
		func(ctx context.Context) error { return a.rewrapBatch(ctx, kr.Name) })
}

func versionName(v state.Version) string {
	return fmt.Sprintf("%s/%d", kms.KeyPath(v.Keyring, v.Key), v.Version)
}

// rewrapBatch rewraps as many key versions as go into one command.
func (a *Agent) rewrapBatch(ctx context.Context, ring string) error {
	st := a.e.cluster.State() // the newest: another node's batch may be in
	kr, ok := st.Keyring(ring)
	if !ok {
		return noKeyring(ring)
	}
	keks := a.openKEKs(st, kr)
	defer keks.release()
	next, err := keks.get(ctx, kr.KEK)
	if err != nil {
		return err
	}
	defer a.e.cfg.Cache.Scrub()
	var items []state.RewrapItem
	var failed error
	size := 0
	st.ToRewrap(ring, func(v state.Version) bool {
		if a.kek.broken[versionName(v)] {
			return true
		}
		var wrapped []byte
		if wrapped, failed = a.rewrapOne(ctx, st, keks, v, next, kr.KEK); failed != nil {
			if !a.skip(ctx, v, failed) {
				return false
			}
			failed = nil
			return true
		}
		items = append(items, state.RewrapItem{Key: v.Key, Version: v.Version, Wrapped: wrapped})
		size += len(wrapped)
		return len(items) < a.cfg.Batch && size < rewrapBytes && ctx.Err() == nil
	})
	if failed != nil || len(items) == 0 {
		return failed
	}
	return a.submitRewrap(ctx, st, kr, items)
}

func (a *Agent) rewrapOne(ctx context.Context, st *state.State, keks *openKEKs, v state.Version, next *secret.Bytes, to uint32) ([]byte, error) {
	b, err := keyBinding(st, v)
	if err != nil {
		return nil, err
	}
	old, err := keks.get(ctx, v.KEK)
	if err != nil {
		return nil, err
	}
	return keyring.Rewrap(old, next, b, to, v.Wrapped)
}

// skip reports whether a rewrap goes on without a key version, which does not open
// here: it stays as it is, and keeps its KEK version from being retired, until another
// node rewraps it or custodians destroy it.
func (a *Agent) skip(ctx context.Context, v state.Version, err error) bool {
	switch kms.KindOf(err) {
	case kms.OpenFailed, kms.NotResident, kms.Invalid:
	default:
		return false
	}
	a.kek.broken[versionName(v)] = true
	a.e.log.ErrorContext(ctx, "a key version does not open at this node and so cannot be rewrapped by it; if no node can, destroy it, or the old KEK version stays",
		"key", kms.KeyPath(v.Keyring, v.Key), "version", v.Version, "kek", v.KEK, "committed_by", v.Origin, "error", err)
	return true
}

func (a *Agent) submitRewrap(ctx context.Context, st *state.State, kr state.Keyring, items []state.RewrapItem) error {
	slices.SortFunc(items, func(x, y state.RewrapItem) int {
		if x.Key != y.Key {
			if x.Key < y.Key {
				return -1
			}
			return 1
		}
		return int(int64(x.Version) - int64(y.Version))
	})
	m := state.RewrapManifest(st.Cluster(), kr.Name, a.e.node, kr.KEK, state.RewrapEntries(items))
	digest, err := pqc.Digest(a.e.signingSuite(st), m, []byte(state.RewrapContext))
	if err != nil {
		return kms.Wrap(kms.Internal, err, "the manifest of rewrapped key versions cannot be signed", "")
	}
	sig, err := a.e.cfg.Signer.Sign(ctx, digest)
	if err != nil {
		return kms.Wrap(kms.Unavailable, err, "the node's device did not sign what it rewrapped", deviceFix)
	}
	_, err = a.e.submit(ctx, attempt{}, state.Rewrap{Keyring: kr.Name, KEK: kr.KEK, Items: items, Signature: sig})
	return err
}

// judge opens what a batch brought and compares it with what is in use: it confirms
// the batch, or refuses it.
func (a *Agent) judge(ctx context.Context, ring string, b state.RewrapBatch) error {
	st := a.e.cluster.State()
	now, ok := st.Batch(ring, b.KEK, b.Index)
	kr, _ := st.Keyring(ring)
	if !ok || now.Done || now.ConfirmedBy(a.e.node) || kr.KEK != b.KEK {
		return kms.Errorf(kms.Exists, "the batch is no longer to be confirmed")
	}
	keks := a.openKEKs(st, kr)
	defer keks.release()
	next, err := keks.get(ctx, kr.KEK)
	if err != nil {
		return err
	}
	defer a.e.cfg.Cache.Scrub()
	for _, x := range now.Entries {
		v, ok := st.Version(ring, x.Key, x.Version)
		if !ok || v.Next == nil || v.Next.Batch != b.Index {
			continue // destroyed since
		}
		switch err := a.judgeOne(ctx, st, keks, v, next); kms.KindOf(err) {
		case 0:
		case kms.OpenFailed:
			return a.refuseRewrap(ctx, b, x)
		default:
			return err
		}
	}
	_, err = a.e.submit(ctx, attempt{}, state.ConfirmRewrap{Keyring: ring, KEK: b.KEK, Batch: b.Index, Digest: b.Digest})
	return err
}

// refuseRewrap says that an entry of a batch is not good.
func (a *Agent) refuseRewrap(ctx context.Context, b state.RewrapBatch, x state.RewrapEntry) error {
	a.e.log.ErrorContext(ctx, "a key version that a node rewrapped does not open here, or holds another key; the batch is refused, and another node has to rewrap",
		"key", kms.KeyPath(b.Keyring, x.Key), "version", x.Version, "kek", b.KEK, "rewrapped_by", b.Origin)
	_, err := a.e.submit(ctx, attempt{}, state.RefuseRewrap{
		Keyring: b.Keyring, KEK: b.KEK, Batch: b.Index, Digest: b.Digest, By: b.Origin, Key: x.Key, Version: x.Version})
	return err
}

// judgeOne compares one key version of a batch with what is in use: kms.OpenFailed
// says that it is not good.
func (a *Agent) judgeOne(ctx context.Context, st *state.State, keks *openKEKs, v state.Version, next *secret.Bytes) error {
	b, err := keyBinding(st, v)
	if err != nil {
		return err
	}
	old, err := keks.get(ctx, v.KEK)
	switch kms.KindOf(err) {
	case 0:
	case kms.OpenFailed, kms.NotResident: // this node has never had the key version
	default:
		return err
	}
	var check []byte
	if i := slices.IndexFunc(v.Checks, func(c state.Check) bool { return c.Node == a.e.node }); i >= 0 {
		check = v.Checks[i].Hash
	}
	return keyring.SameMaterial(b, a.e.node, keyring.Wrapping{KEK: old, Version: v.KEK, Wrapped: v.Wrapped},
		keyring.Wrapping{KEK: next, Version: v.Next.KEK, Wrapped: v.Next.Wrapped}, check, v.PublicKey)
}

// keyBinding is what a key version of protection software is bound to, under the KEK
// version that wraps it in use.
func keyBinding(st *state.State, v state.Version) (keyring.KeyBinding, error) {
	k, ok := st.Key(v.Keyring, v.Key)
	if !ok {
		return keyring.KeyBinding{}, noKey(v.Keyring, v.Key)
	}
	b := keyring.KeyBinding{Cluster: st.Cluster(), Keyring: v.Keyring, KEK: v.KEK, Version: v.Version, Algorithm: k.Algorithm, Purpose: k.Purpose}
	copy(b.KeyID[:], k.ID)
	return b, nil
}

// openKEKs are the KEK versions of a keyring that a task has opened so far.
type openKEKs struct {
	e    *Engine
	st   *state.State
	kr   state.Keyring
	open map[uint32]*secret.Bytes
	free []func()
}

func (a *Agent) openKEKs(st *state.State, kr state.Keyring) *openKEKs {
	return &openKEKs{e: a.e, st: st, kr: kr, open: map[uint32]*secret.Bytes{}}
}

// get opens a KEK version, once.
func (o *openKEKs) get(ctx context.Context, version uint32) (*secret.Bytes, error) {
	if kek, ok := o.open[version]; ok {
		return kek, nil
	}
	b, sealed, err := o.e.sealedKEK(o.st, &o.kr, version)
	if err != nil {
		return nil, err
	}
	kek, release, err := o.e.cfg.Cache.KEK(ctx, b, sealed)
	if err != nil {
		return nil, err
	}
	o.open[version], o.free = kek, append(o.free, release)
	return kek, nil
}

func (o *openKEKs) release() {
	for _, f := range o.free {
		f()
	}
}

// commitKEK carries out an authorised proposal to rotate a keyring's KEK: it makes the
// new version and seals it to every resident node.
func (a *Agent) commitKEK(ctx context.Context, p state.Proposal, ring string) error {
	st := a.e.cluster.State() // the newest: another node's commit may be in
	kr, ok := st.Keyring(ring)
	if !ok {
		return noKeyring(ring)
	}
	if now, ok := st.Proposal(p.ID); !ok || now.Progress != state.Authorised {
		return kms.Errorf(kms.Conflict, "proposal %s is no longer to be carried out", p.ID)
	}
	newest, ok := st.NewestKEK(ring)
	if !ok {
		return kms.Errorf(kms.Internal, "keyring %s has no KEK", ring)
	}
	cmd := state.CommitKEK{Proposal: p.ID, Keyring: ring, Version: newest.Version + 1}
	var err error
	cmd.Copies, cmd.Checks, err = a.e.newKEK(ctx, keyring.KEKBinding{
		Cluster: st.Cluster(), Keyring: ring, Version: cmd.Version, Protection: kr.Protection,
	}, st.ResidentNodes(ring))
	if err != nil {
		return err
	}
	_, err = a.e.submit(ctx, attempt{expect: p.Content.Revision}, cmd)
	return err
}

// keyringTarget returns the keyring of a proposal to rotate a KEK.
func keyringTarget(s string) (ring string, ok bool) {
	kind, name, err := approval.ParseTarget(s)
	return name, err == nil && kind == approval.TargetKeyring
}
