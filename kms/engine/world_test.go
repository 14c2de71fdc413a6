package engine

import (
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
	"github.com/conclave-kms/conclave/test/fakedevice"
)

// world is a coalition of three sites with a node and two custodians each, on
// software devices, whose nodes share one state directly.
type world struct {
	t       testing.TB
	clock   *fakeClock
	cluster *memoryCluster
	nodes   map[string]*testNode
	keys    map[string]*pqc.HybridKey // of custodians
	cas     map[string]ca             // of sites
}

// ca is a certificate authority.
type ca struct {
	der []byte
	key *ecdsa.PrivateKey
}

type testNode struct {
	id     string
	dev    *fakedevice.Device
	fresh  *time.Duration
	cutOff bool // its barriers fail
	lag    lag
	log    *memoryLog
	cache  *keyring.Cache
	engine *Engine
}

var siteIDs = []string{"de", "fr", "jp"}

func trustDomain(site string) string { return site + ".example" }

// newWorld founds the cluster under the given access policy text, "" for the
// default, and ticks once at every node. All devices are of one import kind.
func newWorld(t testing.TB, access string) *world {
	t.Helper()
	return newWorldOf(t, access, func(*state.Node) {})
}

// otherKind is an import kind of other devices than those of the world. Keys are
// wrapped for them in the same way, so that the fake devices can play them.
const otherKind = "another-kind"

// newWorldOf is newWorld with node records that edit has changed.
func newWorldOf(t testing.TB, access string, edit func(*state.Node)) *world {
	t.Helper()
	if access == "" {
		access = DefaultAccess()
	}
	w := &world{t: t, clock: newFakeClock(), nodes: map[string]*testNode{}, keys: map[string]*pqc.HybridKey{}, cas: map[string]ca{}}
	g := state.Genesis{
		Format: state.GenesisFormat, Name: "test coalition", Nonce: make([]byte, state.GenesisNonce),
		Created: w.clock.Now().UnixMilli(), Policies: testPolicies(), Access: []byte(access),
	}
	roots := map[string]*keyring.Root{}
	for _, site := range siteIDs {
		w.cas[site] = testCA(t, site)
		g.Sites = append(g.Sites, state.Site{ID: site, TrustDomain: trustDomain(site), CAs: [][]byte{w.cas[site].der}})
		n := &testNode{id: site + "-1", log: &memoryLog{}, fresh: new(time.Duration)}
		n.dev = must(fakedevice.New(ecdh.P256()))
		seed := must(pqc.GenerateSeed(nil))
		roots[n.id] = must(keyring.NewRoot(n.dev, pqc.MLKEM768P256, seed))
		seed.Destroy()
		w.nodes[n.id] = n
		kind, public := n.dev.ImportKey()
		g.Nodes = append(g.Nodes, state.Node{
			Root: 1, Revision: 1, ImportKind: kind, Import: public,
			ID: n.id, Site: site, Address: site + ".example:7000", API: "https://" + site + ".example:8443",
			Suite: uint16(pqc.MLKEM768P256), Agreement: roots[n.id].PublicKey().Bytes(),
			SigningSuite: uint16(pqc.ECDSAP256SHA256), Signing: must(n.dev.SigningKey().Bytes()),
			Device: n.dev.Describe(), Voter: true,
		})
		edit(&g.Nodes[len(g.Nodes)-1])
		for _, c := range []string{site + "-a", site + "-b"} {
			k := must(pqc.GenerateHybrid(nil))
			w.keys[c] = k
			g.Custodians = append(g.Custodians, approval.Custodian{ID: c, Site: site, Revision: 1, Credentials: []approval.Credential{{
				ID: pqc.Fingerprint(k.PublicKey()), Suite: uint16(pqc.MLDSA65Ed25519), PublicKey: k.PublicKey(),
			}}})
		}
	}
	signed := state.SignedGenesis{Genesis: g.Marshal()}
	for _, n := range g.Nodes {
		digest := must(pqc.Digest(pqc.ECDSAP256SHA256, signed.Genesis, []byte(state.GenesisContext)))
		sig := must(w.nodes[n.ID].dev.Sign(context.Background(), digest))
		signed.Signatures = append(signed.Signatures, state.NodeSignature{Node: n.ID, Signature: sig})
	}
	w.cluster = &memoryCluster{st: must(state.New(signed)), changed: make(chan struct{})}
	for id, n := range w.nodes {
		n.cache = must(keyring.NewCache(roots[id], keyring.Limits{TTL: time.Hour, MaxKEKs: 100, MaxKeys: 1000}))
		t.Cleanup(n.cache.Purge)
		n.engine = must(New(w.config(n, roots[id])))
	}
	w.tick()
	return w
}

// config is the configuration of a node's engine.
func (w *world) config(n *testNode, root *keyring.Root) Config {
	wrap := keyring.Importer{WrapHMAC: hsm.WrapHMAC, WrapSigner: hsm.WrapSigner}
	return Config{
		Node: n.id, Cluster: nodeCluster{w.cluster, n}, Cache: n.cache, Root: root, Signer: n.dev, Device: n.dev,
		Log: n.log, Now: w.clock.Now, Importers: map[string]keyring.Importer{hsm.ImportKind: wrap, otherKind: wrap},
	}
}

func testPolicies() []approval.Policy {
	const day = int64(24 * time.Hour / time.Millisecond)
	quorum := func(a kms.Action, m, s uint32) approval.Rule {
		return approval.Rule{Action: a, Approvals: m, Sites: s, Lifetime: day}
	}
	destroy := quorum(kms.ActionDestroy, 2, 2)
	destroy.Delay, destroy.Lifetime = 7*day, 30*day
	standard := approval.Policy{Name: "standard", Revision: 1, Rules: []approval.Rule{
		quorum(kms.ActionCompromise, 2, 2),
		{Action: kms.ActionCreate, Direct: []string{"operator"}},
		quorum(kms.ActionDeactivate, 2, 2), destroy, quorum(kms.ActionResume, 2, 2),
		quorum(kms.ActionRotate, 2, 2), quorum(kms.ActionSuspend, 1, 1),
	}}
	governance := approval.Policy{Name: kms.Governance, Revision: 1, Rules: []approval.Rule{
		quorum(kms.ActionCustodian, 3, 2), {Action: kms.ActionKeyring, Direct: []string{"operator"}}, quorum(kms.ActionNode, 2, 2), quorum(kms.ActionPolicy, 3, 2), quorum(kms.ActionRecover, 3, 2),
	}}
	return []approval.Policy{governance, standard}
}

func testCA(t testing.TB, site string) ca {
	t.Helper()
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: site}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<33, 0), KeyUsage: x509.KeyUsageCertSign,
	}
	return ca{must(x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)), key}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// check fails the test on an error.
func check[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// wantKind fails the test unless err is of the kind.
func wantKind(t testing.TB, err error, k kms.Kind) {
	t.Helper()
	if !errors.Is(err, k) {
		t.Fatalf("got %v (%v), want kind %v", err, kms.KindOf(err), k)
	}
}

func (w *world) at(site string) *testNode { return w.nodes[site+"-1"] }

// tick lets every node sign its time.
func (w *world) tick() {
	w.t.Helper()
	for _, site := range siteIDs {
		check[state.Result](w.t)(w.at(site).engine.submit(context.Background(), attempt{}, state.Tick{}))
	}
}

func caller(role, site string) Caller {
	return Caller{Identity: kms.Identity{TrustDomain: trustDomain(site), Role: role, Name: "test"}, RequestID: "r-1"}
}

// keyring and key create through the node of fr.
func (w *world) keyring(name string, residency ...string) wire.Keyring {
	w.t.Helper()
	return check[wire.Keyring](w.t)(w.at("fr").engine.CreateKeyring(context.Background(), caller("operator", "fr"),
		wire.CreateKeyringRequest{Name: name, Residency: residency, Policy: "standard"}))
}

func (w *world) key(ring, name string, p kms.Purpose) wire.Key {
	w.t.Helper()
	return check[wire.Key](w.t)(w.at("fr").engine.CreateKey(context.Background(), caller("operator", "fr"), ring,
		wire.CreateKeyRequest{Name: name, Purpose: string(p)}))
}

// statement is a custodian's signed verdict.
func (w *world) statement(custodian string, v approval.Verdict, p wire.Proposal) wire.Statement {
	w.t.Helper()
	k := w.keys[custodian]
	sig := check[[]byte](w.t)(k.Sign(approval.Message(v, p.Bytes), []byte(approval.Context)))
	return wire.Statement{Proposal: p.ID, Verdict: string(v), Custodian: custodian, Credential: pqc.Fingerprint(k.PublicKey()), Signature: sig}
}

func (w *world) vote(p wire.Proposal, v approval.Verdict, custodians ...string) wire.Proposal {
	w.t.Helper()
	for _, c := range custodians {
		p = check[wire.Proposal](w.t)(w.at("jp").engine.Vote(context.Background(), caller("custodian", "jp"), p.ID,
			wire.VoteRequest{Statement: w.statement(c, v, p)}))
	}
	return p
}

func (w *world) propose(action kms.Action, target string, params wire.ProposalParameters) wire.Proposal {
	w.t.Helper()
	return check[wire.Proposal](w.t)(w.at("de").engine.OpenProposal(context.Background(), caller("operator", "de"), wire.OpenProposalRequest{
		Action: string(action), Target: target, Parameters: params, Reason: "because of the test",
	}))
}

// agents returns agents that are stepped by hand.
func (w *world) agents() map[string]*Agent {
	as := map[string]*Agent{}
	for id, n := range w.nodes {
		as[id] = must(NewAgent(n.engine, AgentConfig{Watch: w.cluster, After: w.clock.After}))
	}
	return as
}

// settle steps the agents until none changes anything.
func (w *world) settle(as map[string]*Agent) {
	for {
		before := w.cluster.State().Index()
		for _, site := range siteIDs {
			if a := as[site+"-1"]; a != nil {
				a.work(context.Background())
			}
		}
		if w.cluster.State().Index() == before {
			return
		}
	}
}

// carry opens, approves and carries out a proposal.
func (w *world) carry(as map[string]*Agent, action kms.Action, target string, params wire.ProposalParameters) wire.Proposal {
	w.t.Helper()
	p := w.propose(action, target, params)
	w.vote(p, approval.Approve, "fr-a", "de-a")
	for range siteIDs { // every rank's turn
		w.settle(as)
		w.clock.Advance(2 * time.Second)
	}
	w.settle(as)
	return check[wire.Proposal](w.t)(w.at("fr").engine.Proposal(context.Background(), caller("auditor", "fr"), p.ID))
}

// memoryCluster applies proposals to the one state of all nodes.
type memoryCluster struct {
	mu      sync.Mutex
	st      *state.State
	changed chan struct{}
	refuse  error               // what Propose answers instead
	lost    bool                // Propose applies and then answers kms.Unknown
	index   uint64              // of the last entry
	log     statetest.AccessLog // leaves of the cluster log
	applied func(*state.State, state.Result)
}

func (c *memoryCluster) State() *state.State {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.st
}

func (c *memoryCluster) Changed() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changed
}

func (c *memoryCluster) Propose(ctx context.Context, raw []byte) (state.Result, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return state.Result{}, kms.Wrap(kms.Unavailable, err, "no time left", "")
	}
	if c.refuse != nil {
		return state.Result{}, c.refuse
	}
	if err := c.st.Check(raw); err != nil {
		return state.Result{}, err
	}
	c.index++
	var r state.Result
	c.st, r = c.st.Apply(c.index, raw)
	c.log.Add(r.Leaf)
	if c.applied != nil {
		c.applied(c.st, r)
	}
	close(c.changed)
	c.changed = make(chan struct{})
	if c.lost {
		return state.Result{}, kms.Errorf(kms.Unknown, "leadership lost")
	}
	return r, nil
}

func (c *memoryCluster) set(f func(*memoryCluster)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f(c)
}

// nodeCluster is the cluster as one node sees it.
type nodeCluster struct {
	*memoryCluster
	n *testNode
}

func (c nodeCluster) Fresh() time.Duration { return *c.n.fresh }

// lag is how far a node is behind the others.
type lag struct {
	mu       sync.Mutex
	state    *state.State  // that it has come to, until it catches up; nil: the present one
	gate     chan struct{} // barriers wait until it is closed; nil: they do not
	barriers int           // calls
}

// stay keeps the node at the state given until its next barrier.
func (n *testNode) stay(st *state.State) {
	n.lag.mu.Lock()
	defer n.lag.mu.Unlock()
	n.lag.state = st
}

func (n *testNode) barriers() int {
	n.lag.mu.Lock()
	defer n.lag.mu.Unlock()
	return n.lag.barriers
}

func (c nodeCluster) State() *state.State {
	c.n.lag.mu.Lock()
	defer c.n.lag.mu.Unlock()
	if c.n.lag.state != nil {
		return c.n.lag.state
	}
	return c.memoryCluster.State()
}

// Barrier fails where the node is cut off.
func (c nodeCluster) Barrier(ctx context.Context) error {
	c.n.lag.mu.Lock()
	defer c.n.lag.mu.Unlock()
	c.n.lag.barriers++
	if gate := c.n.lag.gate; gate != nil {
		c.n.lag.mu.Unlock()
		select {
		case <-gate:
		case <-ctx.Done():
		}
		c.n.lag.mu.Lock()
	}
	if c.n.cutOff {
		return kms.Errorf(kms.Unavailable, "the cluster has no leader that this node can reach")
	}
	if ctx.Err() == nil {
		c.n.lag.state = nil
	}
	return ctx.Err()
}

// memoryLog is an access log in memory.
type memoryLog struct {
	mu      sync.Mutex
	entries []audit.Entry
	fail    error
	discard bool
}

func (l *memoryLog) Append(ctx context.Context, e audit.Entry) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if ctx.Err() != nil {
		return kms.Wrap(kms.Unavailable, ctx.Err(), "context ended", "")
	}
	if l.fail != nil {
		return l.fail
	}
	if !l.discard {
		if _, err := audit.ParseEntry(e.Marshal()); err != nil {
			return err
		}
		l.entries = append(l.entries, e)
	}
	return nil
}

func (l *memoryLog) last() audit.Entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.entries) == 0 {
		return audit.Entry{}
	}
	return l.entries[len(l.entries)-1]
}

func (l *memoryLog) len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.entries)
}

// fakeClock moves when told.
type fakeClock struct {
	mu     sync.Mutex
	now    time.Time
	timers []*fakeTimer
}

type fakeTimer struct {
	at time.Time
	c  chan time.Time
}

func newFakeClock() *fakeClock { return &fakeClock{now: time.UnixMilli(1_900_000_000_000)} }

func (c *fakeClock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *fakeClock) After(d time.Duration) (<-chan time.Time, func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := &fakeTimer{at: c.now.Add(d), c: make(chan time.Time, 1)}
	c.timers = append(c.timers, t)
	return t.c, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.timers = slices.DeleteFunc(c.timers, func(x *fakeTimer) bool { return x == t })
	}
}

func (c *fakeClock) Advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
	c.timers = slices.DeleteFunc(c.timers, func(t *fakeTimer) bool {
		if t.at.After(c.now) {
			return false
		}
		t.c <- c.now
		return true
	})
}
