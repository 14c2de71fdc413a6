package engine

import (
	"bytes"
	"context"
	"crypto/hmac"
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

	Former   *keyring.Root          // the present root, to compare version 1 of keys with; nil: its device is dead
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
	Left    int    // versions that stay behind
	Note    string // what it waits for
}

// Adoption takes a node's next hardware root into use: it waits until custodians
// have approved it and the other nodes have sealed their copies to it, opens and
// checks every copy, and adopts the root. The device of the present root is not
// needed. It needs no Engine.
type Adoption struct {
	cfg    AdoptionConfig
	opened map[string]bool // copies that were opened with root
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
// was so before. It tries again for as long as a device or the cluster fails.
// Errors: kms.Conflict for a copy that does not open or holds another key, after
// which another root has to be proposed; kms.Unavailable when ctx ends. It may be
// called once.
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
		case kms.KindOf(err) == kms.Conflict:
			return err
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
		p.Note = "custodians have to approve it: conclave node rekey"
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
	for _, u := range st.Unsealed(a.cfg.Node) {
		if leaves(st, r, u) {
			p.Left++
		} else {
			p.Missing++
		}
	}
	if p.Missing > 0 {
		p.Note = "other nodes have to seal their copies to it"
	}
	for _, c := range copiesFor(st, a.cfg.Node, r.Root) {
		if err := a.check(ctx, st, c); err != nil {
			return false, err
		}
		p.Opened = len(a.opened)
		a.tell(p)
	}
	a.report(p)
	if p.Missing > 0 {
		return false, nil
	}
	return a.adopt(ctx, st, r)
}

// leaveAfter is how long, in milliseconds of the cluster's clock, what other nodes
// can still move is waited for where the custodians let things be left behind.
const leaveAfter = 10 * 60 * 1000

// leaves reports whether a node adopts its next root without this version: the
// custodians let it, nobody else holds the KEK, and nobody can move it or nobody
// has in time.
func leaves(st *state.State, r state.Replacement, p state.Pending) bool {
	if !r.Leave || p.Key == "" && len(st.ResidentNodes(p.Keyring)) > 1 {
		return false
	}
	return len(resealers(st, r, p)) == 0 || st.Clock() >= r.Time+leaveAfter
}

func (a *Adoption) adopt(ctx context.Context, st *state.State, r state.Replacement) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, taskTimeout)
	defer cancel()
	o := origin{a.cfg.Node, st.Cluster(), a.cfg.SigningSuite, a.cfg.Signer, a.cfg.Now()}
	_, err := o.submit(ctx, a.cfg.Cluster, attempt{}, state.AdoptRoot{Root: r.Root})
	present, _ := Adopted(a.cfg.Cluster.State(), a.cfg.Node, a.cfg.Root)
	if present {
		return true, nil
	}
	if kms.KindOf(err) == kms.Conflict {
		// A key was made, or the root withdrawn, since the state was read: look again.
		return false, kms.Wrap(kms.Unavailable, err, "the cluster did not take the root yet: "+err.Error(), "")
	}
	return false, err
}

// report logs progress, and tells of it.
func (a *Adoption) report(p AdoptionProgress) {
	if p != a.logged {
		a.logged = p
		a.cfg.Logger.Info("next hardware root", "root", p.Root, "opened", p.Opened, "missing", p.Missing, "left", p.Left, "note", p.Note)
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
	key     *state.Key
	version state.Version
	kek     state.KEK
	sealed  []byte
}

func (c nodeCopy) name() string {
	if c.key == nil {
		return fmt.Sprintf("KEK version %d of keyring %s", c.kek.Version, c.ring.Name)
	}
	return fmt.Sprintf("version %d of key %s", c.version.Version, kms.KeyPath(c.ring.Name, c.key.Name))
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
	for _, kr := range st.Keyrings() {
		if !st.Resident(kr.Name, node) {
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
				find(v.Copies, nodeCopy{ring: kr, key: &k, version: v})
			}
		}
	}
	return out
}

// check opens a copy with the next root, once, and compares what it holds with
// what was committed.
func (a *Adoption) check(ctx context.Context, st *state.State, c nodeCopy) error {
	if a.opened[c.name()] {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, taskTimeout)
	defer cancel()
	var err error
	if c.key == nil {
		err = a.checkKEK(ctx, st, c)
	} else {
		err = a.checkVersion(ctx, st, c)
	}
	switch kms.KindOf(err) {
	case 0:
		a.opened[c.name()] = true
		return nil
	case kms.OpenFailed, kms.Invalid:
		return kms.Wrap(kms.Conflict, err, "the copy of "+c.name()+" that is sealed to the next hardware root does not open with it, or holds another key",
			"prepare the root again and propose it anew; the cluster log names the node that sealed the copy")
	}
	return err
}

func (a *Adoption) checkKEK(ctx context.Context, st *state.State, c nodeCopy) error {
	b := keyring.KEKBinding{Cluster: st.Cluster(), Keyring: c.ring.Name, Version: c.kek.Version, Node: a.cfg.Node, Protection: c.ring.Protection}
	kek, err := a.cfg.Root.OpenKEK(ctx, b, c.sealed)
	if err != nil {
		return err
	}
	defer kek.Destroy()
	return agrees(c.kek.Checks, a.cfg.Node, keyring.CheckValue(kek, b.Cluster, b.Keyring, kekID, b.Version, a.cfg.Node))
}

func (a *Adoption) checkVersion(ctx context.Context, st *state.State, c nodeCopy) error {
	b := keyring.KeyBinding{Cluster: st.Cluster(), Keyring: c.ring.Name, Version: c.version.Version, Algorithm: c.key.Algorithm, Purpose: c.key.Purpose}
	copy(b.KeyID[:], c.key.ID)
	m, err := a.cfg.Root.LoadVersion(ctx, b, a.cfg.Node, c.sealed)
	if err != nil {
		return err
	}
	defer m.Destroy()
	kcv, err := proof(ctx, m, c.version, a.cfg.Node)
	switch {
	case err != nil || b.Purpose == kms.Sign:
		return err
	case len(c.version.Checks) > 0:
		return agrees(c.version.Checks, a.cfg.Node, kcv)
	}
	return a.compare(ctx, st, c, b, kcv)
}

// compare compares a check value that was committed to nowhere with what the device
// of the present root computes, while it does: else whoever sealed the copy could
// have put a key of their own into it.
func (a *Adoption) compare(ctx context.Context, st *state.State, c nodeCopy, b keyring.KeyBinding, kcv []byte) error {
	n, _ := st.Node(a.cfg.Node)
	i := slices.IndexFunc(c.version.Copies, func(s state.SealedCopy) bool { return s.Node == n.ID && s.Root == n.Root })
	if a.cfg.Former == nil || i < 0 {
		return nil
	}
	want, err := formerValue(ctx, a.cfg.Former, b, n.ID, c.version.Copies[i].Sealed)
	if err != nil {
		a.cfg.Logger.WarnContext(ctx, "the device of the present root does not say whether a copy for the next one holds the same key; it is taken as it is", "copy", c.name(), "error", err)
		return nil
	}
	if !hmac.Equal(want, kcv) {
		return kms.ErrOpen
	}
	return nil
}

func formerValue(ctx context.Context, former *keyring.Root, b keyring.KeyBinding, node string, sealed []byte) ([]byte, error) {
	m, err := former.LoadVersion(ctx, b, node, sealed)
	if err != nil {
		return nil, err
	}
	defer m.Destroy()
	return m.CheckValue(ctx, node)
}

// agrees compares a check value with what was committed for the node.
func agrees(checks []state.Check, node string, kcv []byte) error {
	i := slices.IndexFunc(checks, func(c state.Check) bool { return c.Node == node })
	if i >= 0 && !bytes.Equal(checks[i].Hash, keyring.CheckHash(kcv)) {
		return kms.ErrOpen
	}
	return nil
}
