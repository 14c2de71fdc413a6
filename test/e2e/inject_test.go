package e2e

import (
	"bytes"
	"crypto/sha256"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

// injection is a command in the log that no honest leader would have let in.
type injection struct {
	name string
	raw  []byte
	kind kms.Kind // with which every replica must record it; 0: applied
}

// TestHostileLeader plays a leader that checks nothing: with fr's own device it
// signs commands by hand and writes them straight into fr's Raft log, past every
// check of a leader; fr then leads and Raft replicates them. Every replica must
// record each as a no-op, and none may count.
func TestHostileLeader(t *testing.T) {
	s := site{t, cluster(t)}
	name, otherName := unique("hostile"), unique("hostile-other")
	p := s.pending(name)
	s.key("coalition", otherName, kms.Encrypt, "")
	other := s.propose(kms.ActionRotate, "coalition", otherName)
	genuine := s.approve(s.custodian("de-1"), other)
	s.settled()

	fr, de, jp := s.c.Nodes["fr"], s.c.Nodes["de"], s.c.Nodes["jp"]
	for _, n := range []*harness.Node{de, jp, fr} { // fr last: it misses nothing
		if err := n.Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	hw := takeDevice(t, fr)
	before := replay(t, s.c, fr)
	commands := hostileCommands(t, s, hw, before, p, other, genuine)
	hw.close()
	inject(t, fr, commands)

	// fr and de alone: only fr's log is long enough to be elected with.
	for _, n := range []*harness.Node{fr, de} {
		if err := n.Launch(); err != nil {
			t.Fatal(err)
		}
	}
	if err := fr.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.c.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.settled()

	for _, n := range s.c.All() {
		r := replay(t, s.c, n)
		for _, c := range commands {
			checkRecorded(t, n, r, c)
		}
	}
	s.unauthorised(p)
	after := s.approve(s.custodian("jp-1"), p)
	if !after.Met {
		t.Errorf("a genuine approval does not count any more: %s", after.Summary)
	}
	for _, n := range s.c.All() {
		if _, err := s.c.Activated(t.Context(), n.Site, "coalition", name, 2); err != nil {
			t.Error(err)
		}
	}
}

// checkRecorded wants the command on a node's disk, once for every time that it
// was injected, the last time with the kind wanted.
func checkRecorded(t *testing.T, n *harness.Node, r replica, c injection) {
	t.Helper()
	sum := sha256.Sum256(c.raw)
	for i := len(r.leaves) - 1; i >= 0; i-- {
		if !bytes.Equal(r.leaves[i].Command, sum[:]) {
			continue
		}
		if !bytes.Equal(r.records[i].Raw, c.raw) {
			t.Errorf("%s: %s is recorded with other bytes", n.ID, c.name)
		}
		if r.leaves[i].Kind != c.kind {
			t.Errorf("%s: %s is recorded as %v, wanted %v", n.ID, c.name, r.leaves[i].Kind, c.kind)
		}
		return
	}
	t.Errorf("%s: %s is not in the log: the injection did not work", n.ID, c.name)
}

// hostileCommands makes what a member without scruples might try, each signed by
// its device unless it says otherwise.
func hostileCommands(t *testing.T, s site, hw *hardware, before replica, p, other, genuine wire.Proposal) []injection {
	t.Helper()
	st := before.state
	sign := func(cmd state.Command, change func(*state.Envelope)) []byte {
		return hw.sign(t, cmd, st.Cluster(), change)
	}
	vote := func(w wire.Statement) state.Command {
		return state.CastVote{Statement: approval.Statement{Proposal: w.Proposal, Verdict: approval.Verdict(w.Verdict), Custodian: w.Custodian, Credential: w.Credential, Signature: w.Signature}}
	}
	good := vote(statement(t, s.custodian("de-1"), p))
	var out []injection
	add := func(name string, raw []byte, kind kms.Kind) { out = append(out, injection{name, raw, kind}) }

	for _, f := range forgeries(t, s, p, other) {
		add("an approval "+f.name, sign(vote(f.statement), nil), f.kinds[0])
	}
	replayed := genuine.Votes[len(genuine.Votes)-1].Statement
	replayed.Proposal = p.ID
	add("de-1's recorded approval of another proposal", sign(vote(replayed), nil), kms.BadSignature)
	add("fr-1's approval a second time", sign(vote(statement(t, s.custodian("fr-1"), p)), nil), kms.Exists)

	// Good approvals in bad envelopes.
	add("a command of another cluster", sign(good, func(e *state.Envelope) { e.Cluster = "00000000000000000000000000000000" }), kms.Invalid)
	add("a command in de's name", sign(good, func(e *state.Envelope) { e.Origin = "de-1" }), kms.BadSignature)
	add("a command of an unknown node", sign(good, func(e *state.Envelope) { e.Origin = "fr-9" }), kms.Denied)
	add("a command from an hour ago", sign(good, func(e *state.Envelope) { e.Time -= time.Hour.Milliseconds() }), kms.Expired)
	altered := sign(good, nil)
	altered[len(altered)-1] ^= 1
	add("a command with a bit flipped in the node's signature", altered, kms.BadSignature)
	add("bytes that are no command", []byte("approve everything"), kms.Invalid)
	envelope, signature, err := state.Split(sign(good, nil))
	if err != nil {
		t.Fatal(err)
	}
	add("a command with something behind it", append(state.Join(envelope, signature), 0), kms.Invalid)

	// Acts that nobody has approved.
	_, path, _ := strings.Cut(p.Content.Target, "/")
	_, name, _ := strings.Cut(path, "/")
	key, ok := st.Key("coalition", name)
	if !ok {
		t.Fatalf("fr's log has no key %s", name)
	}
	v, _ := st.Version("coalition", name, 1)
	var checks []state.Check
	for _, n := range st.ResidentNodes("coalition") {
		checks = append(checks, state.Check{Node: n.ID, Hash: random(state.HashSize)})
	}
	expect := func(e *state.Envelope) { e.Expect = key.Revision }
	add("a new version that one nation has approved", sign(state.CommitRotation{
		Proposal: p.ID, Keyring: "coalition", Key: name, Version: 2, KEK: v.KEK, Wrapped: v.Wrapped, Checks: checks,
	}, expect), kms.NeedsApproval)
	add("a new version without a proposal", sign(state.CommitRotation{
		Proposal: "00000000000000000000000000000000", Keyring: "coalition", Key: name, Version: 2, KEK: v.KEK, Wrapped: v.Wrapped, Checks: checks,
	}, expect), kms.NotFound)
	add("the execution of what is not authorised", sign(state.Execute{Proposal: p.ID}, expect), kms.NeedsApproval)
	add("a receipt for a version that does not exist", sign(state.GiveReceipt{Keyring: "coalition", Key: name, Version: 2, KCV: random(state.HashSize)}, nil), kms.NotFound)

	// What was applied before, verbatim.
	for i := len(before.records) - 1; i >= 0; i-- {
		if l := before.leaves[i]; l.Type == state.TypeVote && l.Kind == 0 {
			add("an entry of the log a second time", before.records[i].Raw, kms.Replayed)
			break
		}
	}
	// Controls: what is in order is applied, so the way past the leader works.
	add("an honest tick", sign(state.Tick{}, nil), 0)
	return out
}

// inject appends the commands to the Raft log of a node that does not run, of all the last to end,
// in the term in which it will be elected. No entry of another node is of that term, so none is taken for one of these.
func inject(t *testing.T, n *harness.Node, commands []injection) {
	t.Helper()
	store, err := raftboltdb.New(raftboltdb.Options{Path: filepath.Join(n.Data, "raft", "raft.db")})
	if err != nil {
		t.Fatal(err)
	}
	last, err := store.LastIndex()
	if err != nil {
		t.Fatal(err)
	}
	term, err := store.GetUint64([]byte("CurrentTerm")) // of hashicorp/raft
	if err != nil {
		t.Fatal(err)
	}
	var logs []*raft.Log
	for i, c := range commands {
		logs = append(logs, &raft.Log{Index: last + 1 + uint64(i), Term: term + 1, Type: raft.LogCommand, Data: c.raw})
	}
	if err := store.StoreLogs(logs); err != nil {
		t.Fatal(err)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
}
