package state

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/hashicorp/go-memdb"
	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/rfc6962"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/attest"
	"github.com/conclave-kms/conclave/kms/canon"
)

// State is the cluster's replicated state after a log entry. It never changes:
// Apply returns another one. It is safe for concurrent use. Records that it
// returns must not be written to.
type State struct {
	db      *memdb.MemDB // written to only before the State is handed out
	view    *memdb.Txn   // of db, to read; nil while db is being written to
	signed  SignedGenesis
	genesis Genesis
	cluster string
	index   uint64
	clock   int64 // Unix milliseconds
	log     logRange
	epoch   uint64                   // of the history
	lineage string                   // of the history, "" in epoch 0
	reports map[string]attest.Report // on the nodes' hardware, by node; follows from the rest
}

// logRange is the compact range of the cluster log: what RFC 6962 hashing needs to
// go on.
type logRange struct {
	size   uint64
	hashes [][]byte
}

var ranges = &compact.RangeFactory{Hash: rfc6962.DefaultHasher.HashChildren}

// add returns the range with a leaf more; the receiver stays as it is.
func (l logRange) add(leaf []byte) logRange {
	r, err := ranges.NewRange(0, l.size, slices.Clone(l.hashes))
	if err == nil {
		err = r.Append(rfc6962.DefaultHasher.HashLeaf(leaf), nil)
	}
	if err != nil {
		panic(fmt.Sprintf("state: the log's compact range is inconsistent: %v", err)) // checked when restored
	}
	return logRange{r.End(), r.Hashes()}
}

func (l logRange) root() []byte {
	if l.size == 0 {
		return rfc6962.DefaultHasher.EmptyRoot()
	}
	r, err := ranges.NewRange(0, l.size, l.hashes)
	if err != nil {
		panic(fmt.Sprintf("state: the log's compact range is inconsistent: %v", err)) // checked when restored
	}
	root, err := r.GetRootHash(nil)
	if err != nil {
		panic(fmt.Sprintf("state: the log's compact range is inconsistent: %v", err))
	}
	return root
}

// New returns the state of a cluster that has applied nothing yet. Errors: those
// of SignedGenesis.Verify.
func New(signed SignedGenesis) (*State, error) {
	g, err := signed.Verify()
	if err != nil {
		return nil, err
	}
	return founded(signed, g), nil
}

// founded returns the state at the beginning of a cluster whose genesis is verified.
func founded(signed SignedGenesis, g Genesis) *State {
	s := &State{db: newDB(), signed: signed, genesis: g, cluster: kms.ClusterID(signed.Genesis), clock: g.Created}
	x := s.db.Txn(true)
	for _, n := range g.Nodes {
		insert(x, tableNode, n)
		insert(x, tableStatus, NodeStatus{Node: n.ID, Time: g.Created})
	}
	for _, c := range g.Custodians {
		insert(x, tableCustodian, c)
	}
	for _, p := range g.Policies {
		insert(x, tablePolicy, p)
	}
	x.Commit()
	s.reports = s.reader().reports()
	return s
}

// read returns a transaction to read with. Reading changes nothing in it, so one
// serves everybody.
func (s *State) read() *memdb.Txn {
	if s.view != nil {
		return s.view
	}
	return s.db.Txn(false)
}

// Event is something that a command brought about.
type Event struct {
	Type      string
	Keyring   string
	Key       string
	Proposal  string
	Node      string
	Custodian string
	Site      string
	Version   uint32
}

// The types of events.
const (
	EventKeyringCreated      = "keyring-created"
	EventKeyCreated          = "key-created"
	EventProposalOpened      = "proposal-opened"
	EventVote                = "vote"
	EventProposalAuthorised  = "proposal-authorised"
	EventProposalReopened    = "proposal-reopened" // approvals no longer suffice
	EventProposalRejected    = "proposal-rejected"
	EventProposalVoid        = "proposal-void"
	EventProposalExecuted    = "proposal-executed"
	EventVersionCommitted    = "version-committed"
	EventReceipt             = "receipt"
	EventVersionActivated    = "version-activated"
	EventVersionDeactivated  = "version-deactivated"
	EventVersionCompromised  = "version-compromised"
	EventVersionDestroyed    = "version-destroyed"
	EventKeySuspended        = "key-suspended"
	EventKeyResumed          = "key-resumed"
	EventKeyDestroyed        = "key-destroyed"
	EventKeyRescheduled      = "key-rescheduled"
	EventPolicyChanged       = "policy-changed"
	EventCustodianChanged    = "custodian-changed"
	EventCredentialSuspended = "credential-suspended" // of Custodian
	EventKEKReceiptsComplete = "kek-receipts-complete"
	EventKEKCommitted        = "kek-committed"
	EventKEKActivated        = "kek-activated" // new key versions are wrapped under it
	EventKEKRetired          = "kek-retired"
	EventRewrapped           = "rewrapped"        // by Node, a batch
	EventRewrapConfirmed     = "rewrap-confirmed" // by all; the batch is in use
	EventRewrapRefused       = "rewrap-refused"   // what Node rewrapped
	EventNodeReplacing       = "node-replacing"   // the next root is approved
	EventResealed            = "resealed"         // Node has a copy for its next root
	EventCopyRefused         = "copy-refused"     // the next root of Node does not take a copy
	EventNodeReplaced        = "node-replaced"
	EventReleaseAnnounced    = "release-announced"
	EventNodeJoining         = "node-joining"      // Node may have its first hardware root
	EventNodeJoined          = "node-joined"       // Node has adopted it
	EventNodePromoted        = "node-promoted"     // Node is a voter
	EventNodeRemoved         = "node-removed"      // see State.Removal
	EventMembersConfirmed    = "members-confirmed" // Raft counts with the members of the state
	EventSiteChanged         = "site-changed"
	EventRecoveryKeySet      = "recovery-key-set"
	EventRecoverySealed      = "recovery-sealed" // by Node, a KEK version for the recovery key
	EventRestored            = "restored"        // Node has a copy that came out of a ceremony
)

// Result is what became of a command.
type Result struct {
	Index     uint64   // of the command in the log
	Kind      kms.Kind // 0: applied
	Message   string   // why not, empty when applied
	Duplicate bool     // same idempotency key and request seen before: that outcome again
	Halt      bool     // a member sent a command that this program does not know; the state is unchanged
	Leaf      []byte   // leaf of the cluster log, see Leaf
	Events    []Event
}

// Err returns nil when the command was applied, else a *kms.Error.
func (r Result) Err() error {
	if r.Kind == 0 {
		return nil
	}
	return &kms.Error{Kind: r.Kind, Msg: r.Message}
}

// Leaf is a leaf of the cluster log; its canonical encoding is what RFC 6962
// hashes. Type, Origin and Time are zero where the command's signature did not
// verify.
type Leaf struct {
	Index   uint64   `cbor:"index"`
	Time    int64    `cbor:"time"` // of the envelope
	Type    Type     `cbor:"type"`
	Origin  string   `cbor:"origin"`
	Command []byte   `cbor:"command"` // SHA-256 of the signed command
	Kind    kms.Kind `cbor:"kind"`    // 0: applied
}

// ParseLeaf decodes a leaf. Errors: kms.Invalid.
func ParseLeaf(b []byte) (Leaf, error) {
	var l Leaf
	if err := canon.Unmarshal(b, &l); err != nil {
		return Leaf{}, kms.Wrap(kms.Invalid, err, "not a leaf of the cluster log", "")
	}
	return l, nil
}

// tx is a change in the making: a write transaction over a copy of the state
// before, and the command that asks for it.
type tx struct {
	*memdb.Txn
	store  *memdb.MemDB // where Commit writes
	before *State
	index  uint64
	clock  int64
	env    Envelope
	raw    []byte
	events []Event

	ahead   *Ahead // what of the command is verified already, nil for nothing
	replay  bool   // of a stored statement, see replay
	claimed []byte // replay of an erased command: its hash

	attested  *attestedRoot // what the command did to State.reports
	removed   string        // the node that it removed
	recovered *Recovery     // the epoch that has begun
}

// attestedRoot is what is known of the hardware of a root just adopted.
type attestedRoot struct {
	node   string
	report attest.Report
}

// reader gives tx the read methods of State on the transaction's own view.
func (t *tx) reader() reader { return reader{t.Txn, t.before.genesis} }

func (t *tx) event(e Event) { t.events = append(t.events, e) }

func (s *State) begin(index uint64, e Envelope, raw []byte) *tx {
	store := s.db.Snapshot()
	return &tx{Txn: store.Txn(true), store: store, before: s, index: index, clock: s.clock, env: e, raw: raw}
}

// outcome is how far a command got.
type outcome struct {
	err      error
	env      Envelope
	verified bool // the origin's signature is good
	fresh    bool // and it is neither expired nor replayed
	dup      bool
	halt     bool
	t        *tx // uncommitted, nil unless applied
}

// Apply applies the log entry raw at the given index and returns the state after
// it. It never fails: a command that cannot be carried out gives a Result with a
// Kind, and only the log leaf, the index and, where the signature is good, the
// nonce and the outcome of an idempotency key are recorded. With Result.Halt the
// state is returned unchanged.
func (s *State) Apply(index uint64, raw []byte) (*State, Result) { return s.apply(index, raw, nil) }

// apply is Apply of a command of which signatures may have been verified ahead.
func (s *State) apply(index uint64, raw []byte, ahead *Ahead) (*State, Result) {
	o := s.try(index, raw, ahead)
	if o.halt {
		return s, Result{Index: index, Kind: kms.Internal, Message: message(o.err), Halt: true}
	}
	r := Result{Index: index, Duplicate: o.dup}
	if o.err != nil {
		r.Kind, r.Message = kms.KindOf(o.err), message(o.err)
	}
	t := o.t
	if t != nil {
		r.Events = t.events
	} else {
		t = s.begin(index, o.env, raw)
	}
	if o.fresh {
		t.remember(r, o.dup)
	}
	next := t.done()
	next.view = next.db.Txn(false)
	r.Leaf = leaf(o, index, raw, r)
	next.log = s.log.add(r.Leaf)
	return next, r
}

// done commits the change and returns the state after it, but for its log and view.
func (t *tx) done() *State {
	t.Commit()
	next := *t.before
	next.db, next.view, next.index, next.clock = t.store, nil, t.index, t.clock
	if r := t.recovered; r != nil {
		next.epoch, next.lineage = r.Epoch, r.Lineage(next.cluster)
	}
	if a := t.attested; a != nil {
		next.reports = maps.Clone(next.reports)
		next.reports[a.node] = a.report
	}
	if t.removed != "" {
		next.reports = maps.Clone(next.reports)
		delete(next.reports, t.removed)
	}
	return &next
}

// Check reports whether Apply would apply the command next, without changing
// anything: nil also for a repetition of a remembered one. Errors: as
// Result.Err, and ErrUnknownCommand.
func (s *State) Check(raw []byte) error {
	o := s.try(s.index+1, raw, nil)
	if o.t != nil {
		o.t.Abort()
	}
	if o.dup {
		return nil
	}
	return o.err
}

// try carries a command out as far as it goes. The order matters: nothing of an
// envelope is believed before its signature; the clock and the nonce come before
// the type, so that a program which knows the type decides likewise.
func (s *State) try(index uint64, raw []byte, ahead *Ahead) (o outcome) {
	fail := func(err error) outcome { o.err = err; return o }
	envelope, signature, err := Split(raw)
	if err != nil {
		return fail(err)
	}
	e, err := parseEnvelope(envelope)
	if err != nil {
		return fail(err)
	}
	if err := s.verifyEnvelope(e, envelope, signature, ahead); err != nil {
		return fail(err)
	}
	o.env, o.verified = e, true
	if err := s.checkFresh(e); err != nil {
		return fail(err)
	}
	o.fresh = true
	if old, ok := s.Outcome(e.Idempotency); ok && len(e.Idempotency) > 0 {
		return s.repeat(o, old)
	}
	if err := s.checkKind(e); err != nil {
		return fail(err)
	}
	op, err := parseCommand(e)
	if errors.Is(err, ErrUnknownCommand) {
		o.halt = true
		return fail(err)
	}
	if err != nil {
		return fail(err)
	}
	t := s.begin(index, e, slices.Clone(raw)) // records keep it
	t.ahead = ahead
	if err := run(t, op); err != nil {
		t.Abort()
		return fail(err)
	}
	o.t = t
	return o
}

// run is verify and apply on a transaction.
func run(t *tx, op operation) error {
	if err := op.verify(t); err != nil {
		return err
	}
	return op.apply(t)
}

// verifyEnvelope checks that the command is for this cluster and signed by a
// member.
func (s *State) verifyEnvelope(e Envelope, envelope, signature []byte, ahead *Ahead) error {
	if err := s.inLineage(e); err != nil {
		return err
	}
	return s.verifySignature(e, envelope, signature, ahead)
}

func (s *State) inLineage(e Envelope) error {
	if e.Cluster != s.Lineage() {
		return kms.Errorf(kms.Invalid, "the command is for another cluster, or for a history of this one that was given up")
	}
	return nil
}

// verifySignature checks that the command is signed by a member.
func (s *State) verifySignature(e Envelope, envelope, signature []byte, ahead *Ahead) error {
	suite, signing, err := s.signer(e)
	if err != nil {
		return err
	}
	if ahead.by(suite, signing) {
		return nil
	}
	return wrongSignature(e, verifyBy(suite, signing, envelope, CommandContext, signature))
}

func wrongSignature(e Envelope, err error) error {
	if err == nil {
		return nil
	}
	return kms.Wrap(kms.BadSignature, err, "the command's signature by node "+e.Origin+" does not verify", "")
}

// signer returns the key that a command must be signed by.
func (s *State) signer(e Envelope) (suite uint16, signing []byte, err error) {
	n, ok := s.Node(e.Origin)
	if !ok {
		if s.Removed(e.Origin) {
			return 0, nil, kms.Errorf(kms.Denied, "the command's origin %s was removed from the cluster", e.Origin)
		}
		return 0, nil, kms.Errorf(kms.Denied, "the command's origin %q is no node of the cluster", e.Origin)
	}
	if e.Type == TypeAdoptRoot || e.Type == TypeRefuseCopy {
		// The next root speaks for itself; when it has been adopted it is the node's.
		if next, pending := s.Replacement(n.ID); pending {
			return next.New.SigningSuite, next.New.Signing, nil
		}
	}
	return n.SigningSuite, n.Signing, nil
}

// checkFresh refuses what is too old or has been seen.
func (s *State) checkFresh(e Envelope) error {
	if e.Time < s.clock-Window {
		return kms.Errorf(kms.Expired, "the command was signed more than 10 minutes before the cluster's time; check the clock of node %s", e.Origin)
	}
	x := s.read()
	if _, seen := find[nonce](x, tableNonce, byID, nonceID(&nonce{Origin: e.Origin, Nonce: e.Nonce})); seen {
		return kms.Errorf(kms.Replayed, "the command has been seen before")
	}
	return nil
}

// repeat answers a command whose idempotency key is remembered.
func (s *State) repeat(o outcome, old Outcome) outcome {
	if old.Principal != o.env.Principal || !slices.Equal(old.Request, o.env.Request) {
		o.err = kms.Errorf(kms.Conflict, "the idempotency key was used for another request; use a new key")
		return o
	}
	o.dup = true
	if old.Kind != 0 {
		o.err = old.Result().Err()
	}
	return o
}

// message returns an error's text, bounded and fit for the log.
func message(err error) string {
	m := strings.ToValidUTF8(err.Error(), "?")
	if len(m) > MaxMessage {
		m = strings.ToValidUTF8(m[:MaxMessage], "")
	}
	return m
}

func leaf(o outcome, index uint64, raw []byte, r Result) []byte {
	sum := sha256.Sum256(raw)
	l := Leaf{Index: index, Command: sum[:], Kind: r.Kind}
	if o.verified {
		l.Time, l.Type, l.Origin = o.env.Time, o.env.Type, o.env.Origin
	}
	return canon.Marshal(l)
}
