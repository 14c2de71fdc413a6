package engine

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/state"
)

// Watcher tells the agent that the state may have changed: the channel is closed
// when the next log entry has been applied.
type Watcher interface {
	Changed() <-chan struct{}
}

// Timer returns a channel that delivers once after d, and what releases it.
type Timer func(d time.Duration) (<-chan time.Time, func())

// AgentConfig is how an Agent behaves. Only Watch is required.
type AgentConfig struct {
	Watch     Watcher
	Tick      time.Duration // between the times that this node signs; default 5 s
	RankDelay time.Duration // how much longer each next node waits before it executes; default 2 s
	Batch     int           // key versions that it rewraps with one command; default and most state.MaxRewrap
	Backoff   time.Duration // after a first failure, doubled up to MaxBackoff; default 1 s
	After     Timer         // default: the system's timer
}

// MaxBackoff is the longest time between two attempts at a task, so that what
// waits for a device goes on soon after its return.
const MaxBackoff = 15 * time.Second

const (
	taskTimeout = 20 * time.Second // of one task
	idleWait    = 30 * time.Second // between looks at an unchanged state
)

// Agent is what a node does without being asked. It acts on the state alone: all
// that it does is repeatable, and whatever another node did first is refused by
// the state machine without harm.
type Agent struct {
	e     *Engine
	cfg   AgentConfig
	tasks map[string]*task
	pass  uint64

	scheduled time.Time // when keys were last looked through for due rotations

	cannot map[string]bool // replacements to which this device cannot move keys
	told   map[string]bool // refused copies that are in the log
	kek    kekWork

	useReports useReports
	alarms     alarmWatch
	submitted  time.Time // when this node last submitted a checkpoint

	downgraded bool // said that the program is older than the one before
}

// task is what the agent remembers of something to do.
type task struct {
	seen     time.Time // when first seen
	next     time.Time // not before
	failures int
	pass     uint64 // in which it was last seen
}

// NewAgent returns an agent for the engine's node. Errors: kms.Invalid.
func NewAgent(e *Engine, cfg AgentConfig) (*Agent, error) {
	if e == nil || cfg.Watch == nil {
		return nil, kms.Errorf(kms.Invalid, "agent: the engine and what tells it of changes are required")
	}
	if cfg.Tick <= 0 {
		cfg.Tick = 5 * time.Second
	}
	if cfg.RankDelay <= 0 {
		cfg.RankDelay = 2 * time.Second
	}
	if cfg.Backoff <= 0 {
		cfg.Backoff = time.Second
	}
	if cfg.Batch <= 0 || cfg.Batch > state.MaxRewrap {
		cfg.Batch = state.MaxRewrap
	}
	if cfg.After == nil {
		cfg.After = systemTimer
	}
	return &Agent{e: e, cfg: cfg, tasks: map[string]*task{}, cannot: map[string]bool{}, told: map[string]bool{},
		kek: kekWork{live: map[string][]uint32{}, broken: map[string]bool{}, told: map[string]bool{}}}, nil
}

func systemTimer(d time.Duration) (<-chan time.Time, func()) {
	t := time.NewTimer(d)
	return t.C, func() { t.Stop() }
}

// Run works until ctx ends. No failure of a device, of the cluster or of a task
// ends it. It may be called once.
func (a *Agent) Run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { a.tell(ctx) })
	a.serve(ctx)
	wg.Wait()
}

// tell signs the node's time again and again: the cluster's clock is made of it.
func (a *Agent) tell(ctx context.Context) {
	failing := false
	for ctx.Err() == nil {
		tctx, cancel := context.WithTimeout(ctx, taskTimeout)
		_, err := a.e.submit(tctx, attempt{}, state.Tick{})
		cancel()
		if ctx.Err() != nil {
			return
		}
		a.e.metrics.task("tick", err)
		if err != nil && !failing {
			a.e.log.WarnContext(ctx, "this node's time did not reach the cluster; trying on", "error", err)
		}
		failing = err != nil
		if !a.sleep(ctx, nil, a.cfg.Tick) {
			return
		}
	}
}

// serve looks at the state whenever it changes, or a task is due again.
func (a *Agent) serve(ctx context.Context) {
	for ctx.Err() == nil {
		changed := a.cfg.Watch.Changed() // before the state is read, so that no change is missed
		wait := a.work(ctx)
		if !a.sleep(ctx, changed, wait) {
			return
		}
	}
}

// sleep waits for a change or d; it reports false when ctx has ended.
func (a *Agent) sleep(ctx context.Context, changed <-chan struct{}, d time.Duration) bool {
	c, stop := a.cfg.After(d)
	defer stop()
	select {
	case <-ctx.Done():
		return false
	case <-changed:
	case <-c:
	}
	return ctx.Err() == nil
}

// work does what is due and returns how long nothing else will be.
func (a *Agent) work(ctx context.Context) time.Duration {
	a.pass++
	st := a.e.cluster.State()
	a.e.forgetChanged(st)
	wait := a.announce(ctx, st)
	if a.seedMissing(st) {
		wait = min(wait, a.attempt(ctx, "seed", "seed", 0, func(ctx context.Context) error { return a.keepSeed(ctx, st) }))
	}
	for _, p := range st.Pending(a.e.node) {
		name := fmt.Sprintf("receipt/%s/%d", kms.KeyPath(p.Keyring, p.Key), p.Version)
		wait = min(wait, a.attempt(ctx, "receipt", name, 0, func(ctx context.Context) error { return a.receipt(ctx, st, p) }))
	}
	for _, p := range st.ProposalsOpen() {
		if _, progress, ok := st.Decision(p.ID); !ok || progress != string(state.Authorised) {
			continue
		}
		if p.Content.Action == kms.ActionImport {
			continue // whoever has the material hands it in
		}
		rank, eligible := a.rank(st, p)
		if !eligible {
			continue
		}
		wait = min(wait, a.attempt(ctx, "execute", "proposal/"+p.ID, time.Duration(rank)*a.cfg.RankDelay,
			func(ctx context.Context) error { return a.execute(ctx, p) }))
	}
	wait = min(wait, a.reseal(ctx, st), a.rotateKEKs(ctx, st), a.sealRecovery(ctx, st), a.schedule(ctx, st), a.reportUse(ctx, st), a.watchAlarms(ctx, st), a.checkpoints(ctx, st))
	for name, t := range a.tasks {
		if t.pass != a.pass {
			delete(a.tasks, name) // done, by us or by another node
		}
	}
	return wait
}

// attempt does a task that has been known for at least delay and is not backing
// off. It returns when the task is due again.
func (a *Agent) attempt(ctx context.Context, kind, name string, delay time.Duration, f func(context.Context) error) time.Duration {
	now := a.e.now()
	t, ok := a.tasks[name]
	if !ok {
		t = &task{seen: now, next: now.Add(delay)}
		a.tasks[name] = t
	}
	t.pass = a.pass
	if wait := t.next.Sub(now); wait > 0 {
		return wait
	}
	tctx, cancel := context.WithTimeout(ctx, taskTimeout)
	err := f(tctx)
	cancel()
	if ctx.Err() != nil {
		return idleWait
	}
	a.e.metrics.task(kind, err)
	back := min(a.cfg.Backoff<<min(t.failures, 10), MaxBackoff)
	t.next = a.e.now().Add(back)
	if err == nil {
		t.failures = 0
		return idleWait // the change that it made wakes us; should it not, the back-off holds
	}
	t.failures++
	switch kms.KindOf(err) {
	case kms.Exists, kms.Conflict, kms.NotFound, kms.Expired:
		a.e.log.DebugContext(ctx, "a task was done by another node, or is no longer wanted", "task", name, "error", err)
	default:
		a.e.log.WarnContext(ctx, "a task failed and will be tried again", "task", name, "again_in", back, "error", err)
	}
	return back
}

// receipt proves that this node can open a version.
func (a *Agent) receipt(ctx context.Context, st *state.State, p state.Pending) error {
	kcv, err := a.checkValue(ctx, st, p)
	if err != nil {
		return err
	}
	_, err = a.e.submit(ctx, attempt{}, state.GiveReceipt{Keyring: p.Keyring, Key: p.Key, Version: p.Version, KCV: kcv})
	return err
}

// checkValue opens a version with the node's hardware root and returns its check
// value for this node.
func (a *Agent) checkValue(ctx context.Context, st *state.State, p state.Pending) ([]byte, error) {
	if p.Key == "" {
		kr, ok := st.Keyring(p.Keyring)
		if !ok {
			return nil, noKeyring(p.Keyring)
		}
		b, sealed, err := a.e.sealedKEK(st, &kr, p.Version)
		if err != nil {
			return nil, err
		}
		kek, err := a.e.cfg.Root.OpenKEK(ctx, b, sealed)
		if err != nil {
			return nil, err
		}
		defer kek.Destroy()
		return keyring.CheckValue(kek, b.Cluster, b.Keyring, kekID, b.Version, a.e.node), nil
	}
	v, err := a.e.stored(st, p)
	if err != nil {
		return nil, err
	}
	a.e.inUse.add(v.ref.KeyID, &v.key)
	m, release, err := a.e.cfg.Cache.Key(ctx, v.ref, v.sealed)
	if err != nil {
		return nil, err
	}
	defer release()
	return proof(ctx, m, v.version, a.e.node)
}

// proof is the check value of an opened version, or the signature of a receipt by
// a sign key in the device.
func proof(ctx context.Context, m *keyring.Material, v state.Version, node string) ([]byte, error) {
	b := m.Binding()
	// A check value proves the material alone. Whoever committed the version could
	// have published another public key with it, under which nobody can sign.
	another := kms.Errorf(kms.Invalid, "version %d of key %s has another public key than its material: node %s committed it so",
		v.Version, kms.KeyPath(v.Keyring, v.Key), v.Origin)
	if m.Protection() != kms.Hardware || b.Purpose != kms.Sign {
		if !bytes.Equal(m.PublicKey(), v.PublicKey) {
			return nil, another
		}
		return m.CheckValue(ctx, node)
	}
	sig, err := m.SignReceipt(ctx, node)
	if err != nil {
		return nil, err
	}
	message := kms.ReceiptMessage(b.Cluster, b.Keyring, b.KeyID, b.Version, node)
	if kms.VerifyReceipt(b.Algorithm, v.PublicKey, message, sig) != nil {
		return nil, another
	}
	return sig, nil
}

// rank says which place this node has among those that may execute a proposal:
// they are ordered by a hash of the proposal and their id, so that a different
// node goes first each time.
func (a *Agent) rank(st *state.State, p state.Proposal) (int, bool) {
	nodes := slices.DeleteFunc(st.Nodes(), func(n state.Node) bool { return n.Root == 0 })
	if p.Content.Action == kms.ActionRotate {
		ring, _, ok := keyTarget(p.Content.Target)
		if !ok {
			ring, ok = keyringTarget(p.Content.Target)
		}
		if !ok {
			return 0, false
		}
		nodes = st.ResidentNodes(ring)
	}
	return place(nodes, p.ID, a.e.node)
}

// place returns the place of a node among nodes in the order of
// SHA-256(subject ‖ 0 ‖ id).
func place(nodes []state.Node, subject, node string) (int, bool) {
	hash := func(id string) []byte {
		h := sha256.Sum256([]byte(subject + "\x00" + id))
		return h[:]
	}
	own, rank, in := hash(node), 0, false
	for _, n := range nodes {
		if n.ID == node {
			in = true
		} else if bytes.Compare(hash(n.ID), own) < 0 {
			rank++
		}
	}
	return rank, in
}

func keyTarget(s string) (ring, key string, ok bool) {
	kind, name, err := approval.ParseTarget(s)
	if err != nil || kind != approval.TargetKey {
		return "", "", false
	}
	ring, key, err = kms.SplitKeyPath(name)
	return ring, key, err == nil
}

// execute carries out an authorised proposal.
func (a *Agent) execute(ctx context.Context, p state.Proposal) error {
	if p.Content.Action != kms.ActionRotate {
		_, err := a.e.submit(ctx, attempt{expect: p.Content.Revision}, state.Execute{Proposal: p.ID})
		return err
	}
	if ring, ok := keyringTarget(p.Content.Target); ok {
		return a.commitKEK(ctx, p, ring)
	}
	st := a.e.cluster.State() // the newest: another node's commit may be in
	ring, key, ok := keyTarget(p.Content.Target)
	if !ok {
		return kms.Errorf(kms.Internal, "proposal %s has no key as target", p.ID)
	}
	kr, ok := st.Keyring(ring)
	if !ok {
		return noKeyring(ring)
	}
	k, ok := st.Key(ring, key)
	if !ok {
		return noKey(ring, key)
	}
	if now, ok := st.Proposal(p.ID); !ok || now.Progress != state.Authorised {
		return kms.Errorf(kms.Conflict, "proposal %s is no longer to be carried out", p.ID)
	}
	cmd := state.CommitRotation{Proposal: p.ID, Keyring: ring, Key: key, Version: k.Latest + 1, KEK: kr.KEK}
	var id kms.KeyID
	copy(id[:], k.ID)
	v, err := a.e.newVersion(ctx, st, kr, keyring.KeyBinding{
		Cluster: st.Cluster(), Keyring: ring, KEK: kr.KEK, KeyID: id, Version: cmd.Version, Algorithm: k.Algorithm, Purpose: k.Purpose,
	}, st.ResidentNodes(ring))
	if err != nil {
		return err
	}
	cmd.Wrapped, cmd.Copies, cmd.Generated, cmd.PublicKey, cmd.Checks = v.wrapped, v.copies, v.generated, v.public, v.checks
	_, err = a.e.submit(ctx, attempt{expect: p.Content.Revision}, cmd)
	return err
}
