package engine

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// use is a key in use for one request: its records in one state, and the
// versions that the request has opened so far.
type use struct {
	e      *Engine
	ctx    context.Context // of the request that this value lives for
	st     *state.State
	rq     *request
	ring   *state.Keyring
	key    *state.Key
	refs   *references
	id     kms.KeyID
	room   [2]opened
	opened []opened
	hour   int64 // in which the request was made, for the last use of what it opens
}

type opened struct {
	version  uint32
	material *keyring.Material
	release  func()
}

// purposes says what a key must be for so that an action makes sense.
var purposes = map[Action]kms.Purpose{
	ActEncrypt: kms.Encrypt, ActDecrypt: kms.Encrypt, ActRewrap: kms.Encrypt,
	ActDataKey: kms.Encrypt, ActDataKeyWrapped: kms.Encrypt, ActExport: kms.Encrypt,
	ActMAC: kms.MAC, ActVerifyMAC: kms.MAC,
	ActSign: kms.Sign, ActVerify: kms.Sign, ActPublicKey: kms.Sign,
}

// survives are the actions that a cut-off node goes on with where the keyring
// says survive: what only reads what was written before.
func (a Action) survives() bool {
	switch a {
	case ActDecrypt, ActVerify, ActVerifyMAC, ActPublicKey:
		return true
	}
	return false
}

// use resolves the key of a request and checks what does not need its material:
// that it exists, is of the right purpose, is not suspended, and that this node
// is up to date.
func (e *Engine) use(ctx context.Context, st *state.State, rq *request) (*use, error) {
	res, f, act := rq.res, rq.found, rq.act
	if f.ring == nil {
		return nil, noKeyring(res.keyring)
	}
	if f.key == nil {
		return nil, noKey(res.keyring, res.key)
	}
	u := &use{e: e, ctx: ctx, st: st, rq: rq, ring: f.ring, key: f.key, refs: f.refs, hour: hourOf(e.now())}
	u.opened = u.room[:0]
	if copy(u.id[:], u.key.ID) != len(u.id) {
		return nil, kms.Errorf(kms.Internal, "key %s has no valid id", res.name())
	}
	if want, ok := purposes[act]; ok && u.key.Purpose != want {
		return nil, &kms.Error{Kind: kms.Invalid,
			Msg: fmt.Sprintf("key %s is for %s, which does not allow %s", res.name(), u.key.Purpose, act),
			Fix: fmt.Sprintf("use a key whose purpose is %s", want)}
	}
	if u.key.Suspended {
		return nil, &kms.Error{Kind: kms.Conflict,
			Msg: "key " + res.name() + " is suspended, so nothing can be done with it",
			Fix: "custodians can resume it by a proposal"}
	}
	return u, u.fresh()
}

// fresh refuses when this node has been cut off for longer than the keyring
// allows, for then it may not know that a key was suspended or destroyed. It is
// asked before the operation and before its answer: a process can be stopped
// between the two for any time. Keyrings that survive go on with what the node knew when
// it was cut off; a node that has not been up to date since it started has nothing to go on
// with, for its disk may have been put back to any time.
func (u *use) fresh() error {
	age, limit := u.rq.fresh(), time.Duration(u.ring.MaxStaleness)*time.Millisecond
	if age <= limit || u.ring.Survive && u.rq.act.survives() && age < neverFresh {
		return nil
	}
	if age == neverFresh {
		return &kms.Error{Kind: kms.Stale, Msg: "this node has not caught up with the cluster since it started",
			Fix: "use another node, or wait until the connection is back"}
	}
	return &kms.Error{Kind: kms.Stale,
		Msg: fmt.Sprintf("what this node knows of the cluster is %s old; keyring %s allows %s", age.Round(time.Millisecond), u.ring.Name, limit),
		Fix: "use another node, or wait until the connection is back"}
}

// close gives back the material in use.
func (u *use) close() {
	for _, o := range u.opened {
		o.release()
	}
	u.opened = nil
}

// version returns a version that may be used: only active ones may. A
// compromised version refuses everything too: SP 800-57 part 1, section 7.4,
// leaves processing with it to a decision that this system does not know how to
// ask for.
func (u *use) version(n uint32) (state.Version, error) {
	v, ok := u.st.Version(u.key.Keyring, u.key.Name, n)
	if v.State == kms.Active {
		return v, nil
	}
	if n > u.key.Primary {
		if err := u.mayBeNew(n); err != nil {
			return v, err
		}
	}
	if !ok {
		return v, kms.Errorf(kms.NotFound, "key %s has no version %d", kms.KeyPath(u.key.Keyring, u.key.Name), n)
	}
	if !v.State.Gone() { // a consumer that was left behind shows in the last use
		note(u.e.uses.of(u.id, n), u.hour)
	}
	e := &kms.Error{Kind: kms.Conflict, Msg: fmt.Sprintf("version %d of key %s is %s", n, kms.KeyPath(u.key.Keyring, u.key.Name), v.State)}
	switch {
	case v.State == kms.PreActive:
		e.Fix = "it becomes active when the receipts of the resident nodes are in"
	case v.State.Gone():
		e.Fix = "its material no longer exists; what it protected cannot be opened"
	default:
		e.Fix = "only active versions can be used"
	}
	return v, e
}

// mayBeNew is asked before a version beyond the primary one is refused: the caller may
// have it from a node that is ahead of this one, and would take "cannot be opened" or "no
// such version" for final. So this node catches up first; the error says to try again.
func (u *use) mayBeNew(n uint32) error {
	path := kms.KeyPath(u.key.Keyring, u.key.Name)
	const fix = "try again, or use another node"
	if err := u.rq.catchUp(u.ctx, u.e); err != nil {
		return kms.Wrap(kms.Unavailable, err, fmt.Sprintf("version %d of key %s may be one that has not reached this node yet, and no leader can be asked", n, path), fix)
	}
	if v, ok := u.e.cluster.State().Version(u.key.Keyring, u.key.Name, n); ok && v.State == kms.Active {
		return &kms.Error{Kind: kms.Unavailable, Msg: fmt.Sprintf("version %d of key %s has reached this node just now", n, path), Fix: fix}
	}
	return nil
}

// primary returns the version that new operations use.
func (u *use) primary() (uint32, error) {
	if u.key.Primary == 0 {
		return 0, &kms.Error{Kind: kms.Conflict, Msg: "key " + kms.KeyPath(u.key.Keyring, u.key.Name) + " has no primary version left",
			Fix: "propose a rotation"}
	}
	return u.key.Primary, nil
}

// material opens a version, or returns it when this request has it open.
func (u *use) material(n uint32) (*keyring.Material, error) {
	for i := range u.opened {
		if u.opened[i].version == n {
			return u.opened[i].material, nil
		}
	}
	s, ok := u.refs.get(n)
	if !ok {
		v, err := u.version(n)
		if err != nil {
			return nil, err
		}
		if s.ref, s.sealed, err = u.e.reference(u.st, u.ring, u.key, u.id, v); err != nil {
			return nil, err
		}
		s.last = u.e.uses.of(u.id, n)
		u.refs.put(n, s)
	}
	u.e.inUse.add(u.id, u.key)
	h, release, err := u.e.cfg.Cache.Key(u.ctx, s.ref, s.sealed)
	if err != nil {
		return nil, err
	}
	note(s.last, u.hour)
	u.opened = append(u.opened, opened{version: n, material: h, release: release})
	return h, nil
}

// primaryMaterial opens the version that new operations use.
func (u *use) primaryMaterial() (*keyring.Material, uint32, error) {
	n, err := u.primary()
	if err != nil {
		return nil, 0, err
	}
	h, err := u.material(n)
	return h, n, err
}

// reference says where a version's material is and finds the copy that is sealed
// to this node: of its KEK, or with protection hardware of the version itself.
// Without such a copy the answer is kms.NotResident.
func (e *Engine) reference(st *state.State, ring *state.Keyring, key *state.Key, id kms.KeyID, v state.Version) (keyring.KeyRef, []byte, error) {
	ref := keyring.KeyRef{
		KeyBinding: keyring.KeyBinding{
			Cluster: st.Cluster(), Keyring: ring.Name, KEK: v.KEK, KeyID: id, Version: v.Version,
			Algorithm: key.Algorithm, Purpose: key.Purpose,
		},
		Node: e.node, Protection: ring.Protection, Wrapped: v.Wrapped,
	}
	if ring.Protection == kms.Hardware {
		sealed, err := e.ownCopy(st, ring, v.Copies)
		return ref, sealed, err
	}
	_, sealed, err := e.sealedKEK(st, ring, v.KEK)
	return ref, sealed, err
}

// storedVersion is a version as this node can open it.
type storedVersion struct {
	key     state.Key
	version state.Version
	ref     keyring.KeyRef
	sealed  []byte
}

// stored finds a version that is named, and its reference.
func (e *Engine) stored(st *state.State, p state.Pending) (s storedVersion, err error) {
	kr, ok := st.Keyring(p.Keyring)
	if !ok {
		return s, noKeyring(p.Keyring)
	}
	if s.key, ok = st.Key(p.Keyring, p.Key); !ok {
		return s, noKey(p.Keyring, p.Key)
	}
	if s.version, ok = st.Version(p.Keyring, p.Key, p.Version); !ok {
		return s, kms.Errorf(kms.NotFound, "key %s has no version %d", kms.KeyPath(p.Keyring, p.Key), p.Version)
	}
	var id kms.KeyID
	copy(id[:], s.key.ID)
	s.ref, s.sealed, err = e.reference(st, &kr, &s.key, id, s.version)
	return s, err
}

// sealedKEK finds the copy of a KEK that is sealed to this node.
func (e *Engine) sealedKEK(st *state.State, ring *state.Keyring, version uint32) (keyring.KEKBinding, []byte, error) {
	k, ok := st.KEK(ring.Name, version)
	if !ok {
		return keyring.KEKBinding{}, nil, kms.Errorf(kms.Internal, "keyring %s has no KEK version %d", ring.Name, version)
	}
	sealed, err := e.ownCopy(st, ring, k.Copies)
	return keyring.KEKBinding{
		Cluster: st.Cluster(), Keyring: ring.Name, Version: version, Node: e.node, Protection: ring.Protection,
	}, sealed, err
}

// ownCopy finds the copy that is sealed to this node's present hardware root,
// which must be the one in use here.
func (e *Engine) ownCopy(st *state.State, ring *state.Keyring, copies []state.SealedCopy) ([]byte, error) {
	n, _ := st.Node(e.node)
	own := func(c state.SealedCopy) bool { return c.Node == e.node && c.Root == n.Root }
	i := slices.IndexFunc(copies, own)
	switch {
	case i < 0 && st.Resident(ring.Name, e.node):
		return nil, &kms.Error{Kind: kms.NotResident,
			Msg: fmt.Sprintf("node %s has no copy of this version for its present hardware root: the key could not be moved when the root was replaced", e.node),
			Fix: "send the request to another node of keyring " + ring.Name + "; rotate the key so that this node has its next version"}
	case i < 0:
		return nil, e.notResident(st, ring.Name, ring.Residency)
	case !bytes.Equal(n.Agreement, e.agreement):
		return nil, &kms.Error{Kind: kms.Unavailable,
			Msg: fmt.Sprintf("node %s does not run on the hardware root that the cluster knows: the root is being replaced, or this node has not caught up", e.node),
			Fix: "use another node, or try again in a moment"}
	}
	return copies[i].Sealed, nil
}

// notResident says where the thing can be done.
func (e *Engine) notResident(st *state.State, ring string, residency []string) error {
	var apis []string
	for _, site := range residency {
		for _, n := range st.NodesOf(site) {
			apis = append(apis, n.API)
		}
	}
	return &kms.Error{Kind: kms.NotResident,
		Msg: fmt.Sprintf("node %s holds no copy of the keys of keyring %s, which is resident at %s", e.node, ring, strings.Join(residency, ", ")),
		Fix: "send the request to " + strings.Join(apis, " or ")}
}

func noKeyring(name string) error {
	return kms.Errorf(kms.NotFound, "there is no keyring %q", name)
}

func noKey(ring, key string) error {
	return kms.Errorf(kms.NotFound, "there is no key %q in keyring %q", key, ring)
}

// item is what one item of a data operation used, for the access log.
type item struct {
	version uint32
	context map[string]string
}

// checkContext refuses an encryption context that no ciphertext can have, so
// that it reaches no log: kms.Invalid or kms.TooLarge.
func checkContext(c wire.Context) error {
	if len(c) > keyring.MaxContextPairs {
		return kms.Errorf(kms.TooLarge, "the encryption context has %d pairs; the limit is %d", len(c), keyring.MaxContextPairs)
	}
	size := 2
	for k, v := range c {
		if k == "" || !utf8.ValidString(k) || !utf8.ValidString(v) {
			return kms.Errorf(kms.Invalid, "the encryption context has a name that is empty, or text that is not UTF-8")
		}
		size += 4 + len(k) + len(v)
	}
	if size > keyring.MaxContext {
		return kms.Errorf(kms.TooLarge, "the encryption context exceeds %d bytes", keyring.MaxContext)
	}
	return nil
}

// one carries out a data operation on one item.
func one[Q, R any](ctx context.Context, e *Engine, c Caller, act Action, ring, key string, q Q,
	f func(*use, *item, Q) (R, error)) (R, error) {
	rq := &request{caller: c, act: act, res: ofKey(ring, key), count: 1}
	return do(ctx, e, rq, func(st *state.State) (r R, err error) {
		u, err := e.use(ctx, st, rq)
		if err != nil {
			return r, err
		}
		defer u.close()
		var it item
		r, err = f(u, &it, q)
		rq.version, rq.context = it.version, it.context
		if err == nil {
			err = u.fresh()
		}
		return r, err
	})
}

// many carries out a data operation on every item of a batch.
func many[Q, R any](ctx context.Context, e *Engine, c Caller, act Action, ring, key string, b wire.Batch[Q],
	f func(*use, *item, Q) (R, error)) (wire.BatchResult[R], error) {
	rq := &request{caller: c, act: act, res: ofKey(ring, key), count: len(b.Items)}
	return do(ctx, e, rq, func(st *state.State) (wire.BatchResult[R], error) {
		var out wire.BatchResult[R]
		if err := b.Check(); err != nil {
			return out, err
		}
		u, err := e.use(ctx, st, rq)
		if err != nil {
			return out, err
		}
		defer u.close()
		items := make([]item, len(b.Items))
		results := make([]R, len(b.Items))
		out.Items = make([]wire.Item[R], len(b.Items))
		for i, q := range b.Items {
			if err := ctx.Err(); err != nil {
				return wire.BatchResult[R]{}, err
			}
			if results[i], err = f(u, &items[i], q); err != nil {
				p := wire.NewProblem(e.plain(err), c.RequestID)
				out.Items[i].Problem = &p
				rq.failed++
				continue
			}
			out.Items[i].Result = &results[i]
		}
		rq.version, rq.context = summary(items)
		return out, u.fresh()
	})
}

// ContextsDigest is the name under which the access log holds, for a batch whose
// items have different encryption contexts, the SHA-256 of their canonical
// encodings in order, each preceded by its own SHA-256.
const ContextsDigest = "conclave:contexts-sha256"

// summary returns what the items of a batch have in common: the version, 0 when
// it differs, and the context, or a digest over all where they differ.
func summary(items []item) (uint32, map[string]string) {
	version, same := items[0].version, true
	for _, it := range items[1:] {
		if it.version != version {
			version = 0
		}
		same = same && maps.Equal(it.context, items[0].context)
	}
	if same {
		return version, items[0].context
	}
	h := sha256.New()
	var b bytes.Buffer
	for _, it := range items {
		b.Reset()
		if enc, err := keyring.EncodeContext(it.context); err == nil {
			b.Write(enc)
		}
		d := sha256.Sum256(b.Bytes())
		h.Write(d[:])
	}
	return version, map[string]string{ContextsDigest: hex.EncodeToString(h.Sum(nil))}
}
