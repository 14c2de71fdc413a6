// Package statetest builds clusters in memory for tests: a genesis with sites,
// nodes with software keys, custodians with hybrid keys, and a chain of signed
// commands applied to a state.
package statetest

import (
	"encoding/binary"
	"sync"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/pqc"
)

// Start is when a World is founded unless Options say otherwise, Unix milliseconds.
const Start = int64(1767225600000) // 2026-01-01T00:00:00Z

// World is a cluster and the holders of all its keys. Its methods are safe for
// concurrent use and stop the test on any surprise.
type World struct {
	t          testing.TB
	opts       Options
	genesis    state.Genesis
	signed     state.SignedGenesis
	nodes      map[string][]*Node // every root that a node had, has or may have
	cas        map[string]*CA
	vendor     *CA // of TPMs, nil without Options.Attested
	custodians map[string]*pqc.HybridKey
	witnesses  map[string][]*pqc.MLDSA44Key // keys for checkpoints, nil before the first
	logs       map[string]*AccessLog

	attached *attached // nil: the World itself applies commands

	mu    sync.Mutex
	state *state.State
	now   int64
	count uint64
}

// New builds the genesis and the state after it.
func New(t testing.TB, opts Options) *World {
	t.Helper()
	opts.defaults()
	w := &World{
		t: t, opts: opts, now: opts.Created,
		nodes: make(map[string][]*Node), cas: make(map[string]*CA), custodians: make(map[string]*pqc.HybridKey),
	}
	w.found()
	s, err := state.New(w.signed)
	if err != nil {
		t.Fatalf("genesis: %v", err)
	}
	w.state = s
	return w
}

// Genesis returns the founding document, Signed the same with its signatures.
func (w *World) Genesis() state.Genesis      { return w.genesis }
func (w *World) Signed() state.SignedGenesis { return w.signed }

// Node returns a node with the keys of its present root; nodes are called
// node-SITE-1 and so on.
func (w *World) Node(id string) *Node {
	w.t.Helper()
	w.mu.Lock()
	s, roots := w.state, w.nodes[id]
	w.mu.Unlock()
	if len(roots) == 0 {
		w.t.Fatalf("there is no node %q", id)
	}
	if s == nil {
		return roots[0]
	}
	n, _ := s.Node(id)
	return w.RootWith(id, n.Signing)
}

// NodeIDs returns the names of all nodes that have a hardware root, sorted.
func (w *World) NodeIDs() []string {
	var ids []string
	for _, n := range w.State().Nodes() {
		if n.Root != 0 {
			ids = append(ids, n.ID)
		}
	}
	return ids
}

// CA returns the certificate authority of a site.
func (w *World) CA(site string) *CA { return w.cas[site] }

// Custodian returns the signing key of a custodian; they are called SITE-1 and so on.
func (w *World) Custodian(id string) *pqc.HybridKey {
	w.t.Helper()
	w.mu.Lock()
	k, ok := w.custodians[id]
	w.mu.Unlock()
	if !ok {
		w.t.Fatalf("there is no custodian %q", id)
	}
	return k
}

// AddCustodianKey makes a signing key for a custodian who is not in the genesis,
// or a new one for a custodian who is.
func (w *World) AddCustodianKey(id string) *pqc.HybridKey {
	w.t.Helper()
	k, err := pqc.GenerateHybrid(nil)
	if err != nil {
		w.t.Fatal(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.custodians[id] = k
	return k
}

// Operator, Service and Custody return the SPIFFE ID of somebody at a site.
func (w *World) Operator(site string) string { return w.identity(site, "operator", "alice") }
func (w *World) Service(site string) string  { return w.identity(site, "service", "billing") }
func (w *World) Custody(site, id string) string {
	return w.identity(site, "custodian", id)
}

func (w *World) identity(site, role, name string) string {
	return kms.Identity{TrustDomain: TrustDomain(site), Role: role, Name: name}.String()
}

// State returns the state after the last command.
func (w *World) State() *state.State {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.state
}

// SetState goes on from another state of the same cluster, for example a restored
// one.
func (w *World) SetState(s *state.State) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.state = s
}

// Now returns the time that nodes write into commands, Unix milliseconds.
func (w *World) Now() int64 {
	if w.attached != nil {
		return w.attached.now()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now
}

// Advance lets time pass: every node sends a tick at the later time.
func (w *World) Advance(d time.Duration) {
	w.t.Helper()
	w.mu.Lock()
	w.now += d.Milliseconds()
	w.mu.Unlock()
	for _, id := range w.NodeIDs() {
		w.Do(id, state.Tick{})
	}
}

// Option changes an envelope before it is signed.
type Option func(*state.Envelope)

// As sets the principal, Expect the revision, At the time, Idempotent the
// idempotency key and request hash (32 bytes each).
func As(principal string) Option    { return func(e *state.Envelope) { e.Principal = principal } }
func Expect(revision uint64) Option { return func(e *state.Envelope) { e.Expect = revision } }
func At(ms int64) Option            { return func(e *state.Envelope) { e.Time = ms } }
func Idempotent(key, request []byte) Option {
	return func(e *state.Envelope) { e.Idempotency, e.Request = key, request }
}

// Envelope returns an envelope for the command with all fields set.
func (w *World) Envelope(node string, cmd state.Command, opts ...Option) state.Envelope {
	now := w.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.count++
	e := state.NewEnvelope(cmd)
	e.Cluster, e.Origin, e.Time = kms.ClusterID(w.signed.Genesis), node, now
	if w.state != nil {
		e.Cluster = w.state.Lineage()
	}
	e.Nonce = binary.BigEndian.AppendUint64(make([]byte, 8), w.count)
	for _, o := range opts {
		o(&e)
	}
	return e
}

// Sign signs an envelope with the key of its origin; to adopt a root or to refuse a
// copy for it, with that of the next one.
func (w *World) Sign(e state.Envelope) []byte {
	w.t.Helper()
	if next, pending := w.State().Replacement(e.Origin); pending && (e.Type == state.TypeAdoptRoot || e.Type == state.TypeRefuseCopy) {
		return w.RootWith(e.Origin, next.New.Signing).SignCommand(w.t, e.Marshal())
	}
	return w.Node(e.Origin).SignCommand(w.t, e.Marshal())
}

// Command returns a signed command.
func (w *World) Command(node string, cmd state.Command, opts ...Option) []byte {
	w.t.Helper()
	return w.Sign(w.Envelope(node, cmd, opts...))
}

// Apply applies a signed command to the state.
func (w *World) Apply(raw []byte) state.Result {
	if w.attached != nil {
		next, r := w.attached.propose(raw)
		w.SetState(next)
		return r
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	next, r := w.state.Apply(w.state.Index()+1, raw)
	w.state = next
	return r
}

// Announce has every node that has not yet done so announce what this program knows.
func (w *World) Announce() {
	w.t.Helper()
	for _, n := range w.State().Nodes() {
		if news, any := w.State().News(n.ID, state.Program("test")); any && n.Root > 0 {
			if r := w.Apply(w.Command(n.ID, news)); r.Err() != nil {
				w.t.Fatalf("announcement of %s: %v", n.ID, r.Err())
			}
		}
	}
}

// announced announces where a command is of a kind that not all nodes are known to know.
func (w *World) announced(cmd state.Command) {
	w.t.Helper()
	if len(w.State().Lacking(state.CommandKind{Type: cmd.Type(), Version: state.CommandVersion})) > 0 {
		w.Announce()
	}
}

// Do signs and applies a command, which must be accepted. Announcements that it needs come first.
func (w *World) Do(node string, cmd state.Command, opts ...Option) state.Result {
	w.t.Helper()
	w.announced(cmd)
	r := w.Apply(w.Command(node, cmd, opts...))
	if err := r.Err(); err != nil {
		w.t.Fatalf("%T by %s: %v: %v", cmd, node, r.Kind, err)
	}
	return r
}

// Refuse signs and applies a command, which must be refused with the kind.
func (w *World) Refuse(kind kms.Kind, node string, cmd state.Command, opts ...Option) state.Result {
	w.t.Helper()
	w.announced(cmd)
	r := w.Apply(w.Command(node, cmd, opts...))
	if r.Kind != kind {
		w.t.Fatalf("%T by %s: got kind %v (%q), want %v", cmd, node, r.Kind, r.Message, kind)
	}
	return r
}
