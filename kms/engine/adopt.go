package engine

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/pqc"
)

// AdoptionConfig is what an Adoption is made of. The fields of the first group are
// required.
type AdoptionConfig struct {
	Node         string // this node's id
	Cluster      Cluster
	Watch        Watcher
	Root         *keyring.Root // the next hardware root, over the next device
	Signer       Signer        // the next device
	SigningSuite pqc.SuiteID   // of Signer

	Now      func() time.Time       // default time.Now
	After    Timer                  // default: the system's timer
	Logger   *slog.Logger           // default: discards
	Progress func(AdoptionProgress) // called when it has changed, by Run's goroutine; nil: nobody asks
}

// AdoptionProgress is how far an Adoption has come.
type AdoptionProgress struct {
	Node    string
	Root    uint32 // number of the next root, 0 until the custodians have approved it
	Missing int    // copies that other nodes have still to seal to it
	Opened  int    // copies that were opened with it and are right
	Refused int    // copies that it refused, for they do not open or hold another key
	Left    int    // versions that stay behind
	Note    string // what it waits for
}

// Adoption takes a node's next hardware root into use: it waits until custodians
// have approved it and the other nodes have sealed their copies to it, opens and
// checks every copy, and adopts the root with exactly these. A copy that is not good
// it refuses, so that another node seals one. The device of the present root is not
// needed. It needs no Engine.
type Adoption struct {
	cfg    AdoptionConfig
	opened map[string]bool // copies that were opened with root, by key of a nodeCopy
	root   uint32
	logged AdoptionProgress
	told   AdoptionProgress
}

// NewAdoption checks the configuration. Errors: kms.Invalid.
func NewAdoption(cfg AdoptionConfig) (*Adoption, error) {
	if cfg.Node == "" || cfg.Cluster == nil || cfg.Watch == nil || cfg.Root == nil || cfg.Signer == nil || cfg.SigningSuite == 0 {
		return nil, kms.Errorf(kms.Invalid, "adoption: node, cluster, watcher, the next root, its signer and signing suite are required")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.After == nil {
		cfg.After = systemTimer
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Adoption{cfg: cfg, opened: map[string]bool{}}, nil
}

// Adopted reports whether a root is the node's present one, and whether it is the
// one that custodians have approved as its next.
func Adopted(st *state.State, node string, root *keyring.Root) (present, next bool) {
	public := root.PublicKey().Bytes()
	n, _ := st.Node(node)
	r, _ := st.Replacement(node)
	return bytes.Equal(n.Agreement, public), bytes.Equal(r.New.Agreement, public)
}

// Run returns nil when the root is the node's own, as applied here; also when it
// was so before. It tries again for as long as a device or the cluster fails, and
// waits where only people can help: its progress says for what. Errors:
// kms.Unavailable when ctx ends. It may be called once.
func (a *Adoption) Run(ctx context.Context) error {
	back := time.Second
	for {
		changed := a.cfg.Watch.Changed() // before the state is read, so that no change is missed
		done, err := a.step(ctx)
		switch {
		case done:
			return nil
		case ctx.Err() != nil:
			return kms.Wrap(kms.Unavailable, ctx.Err(), "the next hardware root was not yet adopted", "start again; it goes on where it was")
		}
		wait := idleWait
		if err != nil {
			a.cfg.Logger.WarnContext(ctx, "the next hardware root is not yet adopted; trying on", "again_in", back, "error", err)
			wait, back = back, min(2*back, MaxBackoff)
			changed = nil // a failure that each change would repeat waits its time
		} else {
			back = time.Second
		}
		c, stop := a.cfg.After(wait)
		select {
		case <-ctx.Done():
		case <-changed:
		case <-c:
		}
		stop()
	}
}

// step does what can be done now.
func (a *Adoption) step(ctx context.Context) (done bool, err error) {
	st := a.cfg.Cluster.State()
	present, next := Adopted(st, a.cfg.Node, a.cfg.Root)
	if present {
		return true, nil
	}
	p := AdoptionProgress{Node: a.cfg.Node}
	if !next {
		p.Note = "custodians have to approve it: conclave node rekey, or conclave node join for a new node"
		if _, other := st.Replacement(a.cfg.Node); other {
			p.Note = "custodians have approved another root; propose this one to have it instead"
		}
		a.report(p)
		return false, nil
	}
	r, _ := st.Replacement(a.cfg.Node)
	if r.Root != a.root {
		a.root, a.opened = r.Root, map[string]bool{}
	}
	p.Root = r.Root
	p.Refused = len(st.Refused(a.cfg.Node))
	var with []state.AdoptedCopy // what the root is adopted with
	for _, u := range st.Unsealed(a.cfg.Node) {
		if leaves(st, r, u) {
			p.Left++
		} else {
			p.Missing++
		}
		with = append(with, state.AdoptedCopy{Keyring: u.Keyring, Key: u.Key, Version: u.Version, Copy: []byte{}})
	}
	if p.Missing > 0 {
		p.Note = hindrance(st, r)
	}
	refused := false
	for _, c := range copiesFor(st, a.cfg.Node, r.Root) {
		good, err := a.check(ctx, st, r, c)
		if err != nil {
			return false, err
		}
		if refused = refused || !good; !good {
			continue
		}
		with = append(with, c.adopted())
		p.Opened++
		a.tell(p)
	}
	if refused {
		return false, nil // the refusal has changed the state: look again
	}
	a.report(p)
	if p.Missing > 0 {
		return false, nil
	}
	return a.adopt(ctx, st, r, with)
}

// leaveAfter is how long, in milliseconds of the cluster's clock, what other nodes
// can still move is waited for where the custodians let things be left behind.
const leaveAfter = 10 * 60 * 1000

// leaves reports whether a node adopts its next root without this version: the
// custodians let it, and nobody can move it or nobody has in time. A KEK that a node
// holds which has not had its turn, or that a recovery ceremony can bring back, is always waited
// for: the state machine wants it.
func leaves(st *state.State, r state.Replacement, p state.Pending) bool {
	switch nobody := len(resealers(st, r, p)) == 0; {
	case recoverable(st, p):
		return false
	case !r.Leave || nobody:
		return r.Leave
	case p.Key == "" && slices.ContainsFunc(st.ResidentNodes(p.Keyring), func(n state.Node) bool { return n.ID != r.Node }):
		return false
	}
	return st.Clock() >= r.Time+leaveAfter
}

// recoverable reports whether a recovery key opens the version: a KEK.
func recoverable(st *state.State, p state.Pending) bool {
	return p.Key == "" && len(st.RecoveryCopies(p.Keyring, p.Version)) > 0
}

// adopt signs that the node has checked these copies, and lives with what it leaves.
func (a *Adoption) adopt(ctx context.Context, st *state.State, r state.Replacement, with []state.AdoptedCopy) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, taskTimeout)
	defer cancel()
	_, err := a.origin(st).submit(ctx, a.cfg.Cluster, attempt{}, state.AdoptRoot{
		Root: r.Root, Copies: state.AdoptionDigest(st.Cluster(), a.cfg.Node, r.Root, with)})
	present, _ := Adopted(a.cfg.Cluster.State(), a.cfg.Node, a.cfg.Root)
	if present {
		return true, nil
	}
	if kms.KindOf(err) == kms.Conflict {
		// A key or a copy came or went, or the root was withdrawn, since the state was read: look again.
		return false, kms.Wrap(kms.Unavailable, err, "the cluster did not take the root yet: "+err.Error(), "")
	}
	return false, err
}

// origin signs with the next device.
func (a *Adoption) origin(st *state.State) origin {
	return origin{a.cfg.Node, st.Lineage(), a.cfg.SigningSuite, a.cfg.Signer, a.cfg.Now()}
}

// report logs progress, and tells of it.
func (a *Adoption) report(p AdoptionProgress) {
	if p != a.logged {
		a.logged = p
		a.cfg.Logger.Info("next hardware root", "root", p.Root, "opened", p.Opened, "missing", p.Missing, "refused", p.Refused, "left", p.Left, "note", p.Note)
	}
	a.tell(p)
}

func (a *Adoption) tell(p AdoptionProgress) {
	if p != a.told && a.cfg.Progress != nil {
		a.cfg.Progress(p)
	}
	a.told = p
}

// nodeCopy is a copy that is sealed to a root of a node: of a key version, or of a
// KEK.
type nodeCopy struct {
	ring    state.Keyring
	of      *state.Key // nil for a KEK
	version state.Version
	kek     state.KEK
	sealed  []byte
}

func (c nodeCopy) name() string {
	if c.of == nil {
		return fmt.Sprintf("KEK version %d of keyring %s", c.kek.Version, c.ring.Name)
	}
	return fmt.Sprintf("version %d of key %s", c.version.Version, kms.KeyPath(c.ring.Name, c.of.Name))
}

// pending names the version.
func (c nodeCopy) pending() state.Pending {
	if c.of == nil {
		return state.Pending{Keyring: c.ring.Name, Version: c.kek.Version}
	}
	return state.Pending{Keyring: c.ring.Name, Key: c.of.Name, Version: c.version.Version}
}

// adopted names the version and this very copy.
func (c nodeCopy) adopted() state.AdoptedCopy {
	p, sum := c.pending(), sha256.Sum256(c.sealed)
	return state.AdoptedCopy{Keyring: p.Keyring, Key: p.Key, Version: p.Version, Copy: sum[:]}
}

// key is another for every copy.
func (c nodeCopy) key() string {
	x := c.adopted()
	return fmt.Sprintf("%s/%d/%x", kms.KeyPath(x.Keyring, x.Key), x.Version, x.Copy)
}

// copiesFor returns what is sealed to one of a node's roots.
func copiesFor(st *state.State, node string, root uint32) []nodeCopy {
	var out []nodeCopy
	find := func(copies []state.SealedCopy, c nodeCopy) {
		i := slices.IndexFunc(copies, func(s state.SealedCopy) bool { return s.Node == node && s.Root == root })
		if i >= 0 {
			c.sealed = copies[i].Sealed
			out = append(out, c)
		}
	}
	n, _ := st.Node(node)
	for _, kr := range st.Keyrings() {
		if !slices.Contains(kr.Residency, n.Site) { // also of a node that joins
			continue
		}
		for _, k := range st.KEKs(kr.Name) {
			find(k.Copies, nodeCopy{ring: kr, kek: k})
		}
		if kr.Protection != kms.Hardware {
			continue
		}
		for _, k := range st.Keys(kr.Name) {
			for _, v := range st.Versions(kr.Name, k.Name) {
				find(v.Copies, nodeCopy{ring: kr, of: &k, version: v})
			}
		}
	}
	return out
}

// check opens a copy with the next root, once, and compares what it holds with
// what was committed. One that does not open, or holds another key, it refuses.
func (a *Adoption) check(ctx context.Context, st *state.State, r state.Replacement, c nodeCopy) (good bool, err error) {
	if a.opened[c.key()] {
		return true, nil
	}
	ctx, cancel := context.WithTimeout(ctx, taskTimeout)
	defer cancel()
	if c.of == nil {
		err = a.checkKEK(ctx, st, c)
	} else {
		err = a.checkVersion(ctx, st, c)
	}
	switch kms.KindOf(err) {
	case 0:
		a.opened[c.key()] = true
		return true, nil
	case kms.OpenFailed, kms.Invalid:
		return false, a.refuse(ctx, st, r, c, err)
	}
	return false, err
}

// refuse signs that a copy is not good. The node that sealed it does not seal that
// version to this root again, so there are at most as many refusals as other nodes.
func (a *Adoption) refuse(ctx context.Context, st *state.State, r state.Replacement, c nodeCopy, why error) error {
	by, ok := st.ResealedBy(a.cfg.Node, r.Root, c.pending())
	if !ok {
		return kms.Errorf(kms.Internal, "nobody has sealed the copy of %s to root number %d", c.name(), r.Root)
	}
	x := c.adopted()
	_, err := a.origin(st).submit(ctx, a.cfg.Cluster, attempt{}, state.RefuseCopy{
		Root: r.Root, Keyring: x.Keyring, Key: x.Key, Version: x.Version, By: by, Copy: x.Copy})
	if err != nil {
		return kms.Wrap(kms.Unavailable, err, "the cluster did not take the refusal of the copy of "+c.name()+" that node "+by+" sealed: "+err.Error(), "")
	}
	a.cfg.Logger.ErrorContext(ctx, "a copy that another node sealed to the next hardware root does not open with it, or holds another key; it is refused, and another node has to seal one",
		"copy", c.name(), "sealed_by", by, "root", r.Root, "error", why)
	return nil
}

func (a *Adoption) checkKEK(ctx context.Context, st *state.State, c nodeCopy) error {
	b := keyring.KEKBinding{Cluster: st.Cluster(), Keyring: c.ring.Name, Version: c.kek.Version, Node: a.cfg.Node, Protection: c.ring.Protection}
	kek, err := a.cfg.Root.OpenKEK(ctx, b, c.sealed)
	if err != nil {
		return err
	}
	defer kek.Destroy()
	return agrees(c.kek.Checks, c.kek.Receipts, a.cfg.Node, func(node string) ([]byte, error) {
		return keyring.CheckValue(kek, b.Cluster, b.Keyring, kekID, b.Version, node), nil
	})
}

func (a *Adoption) checkVersion(ctx context.Context, st *state.State, c nodeCopy) error {
	b := keyring.KeyBinding{Cluster: st.Cluster(), Keyring: c.ring.Name, Version: c.version.Version, Algorithm: c.of.Algorithm, Purpose: c.of.Purpose}
	copy(b.KeyID[:], c.of.ID)
	m, err := a.cfg.Root.LoadVersion(ctx, b, a.cfg.Node, c.sealed)
	if err != nil {
		return err
	}
	defer m.Destroy()
	kcv, err := proof(ctx, m, c.version, a.cfg.Node)
	if err != nil || b.Purpose == kms.Sign {
		return err
	}
	return agrees(c.version.Checks, c.version.Receipts, a.cfg.Node, func(node string) ([]byte, error) {
		if node == a.cfg.Node {
			return kcv, nil
		}
		return m.CheckValue(ctx, node)
	})
}

// agrees compares check values with what was committed: with the node's own, or where
// it joined after the version came with those of every node that has proven by its
// receipt that the commitment to it is right; where none has, with all. Nothing that
// has no commitment is ever taken.
func agrees(checks []state.Check, receipts []state.Receipt, node string, kcv func(node string) ([]byte, error)) error {
	among := func(l []state.Check, ok func(state.Check) bool) []state.Check {
		return slices.DeleteFunc(slices.Clone(l), func(c state.Check) bool { return !ok(c) })
	}
	held := among(checks, func(c state.Check) bool { return c.Node == node })
	if len(held) == 0 {
		held = among(checks, func(c state.Check) bool {
			return slices.ContainsFunc(receipts, func(r state.Receipt) bool { return r.Node == c.Node })
		})
	}
	if len(held) == 0 {
		held = checks
	}
	if len(held) == 0 {
		return kms.Errorf(kms.Internal, "nobody has committed to the check value of node %s", node)
	}
	for _, c := range held {
		got, err := kcv(c.Node)
		if err != nil {
			return err
		}
		if !bytes.Equal(c.Hash, keyring.CheckHash(got)) {
			return kms.ErrOpen
		}
	}
	return nil
}
