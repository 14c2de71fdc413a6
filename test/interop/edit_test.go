package interop

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
	"github.com/conclave-kms/conclave/pqc"
)

// editor makes one random change after another, from a seed.
type editor struct {
	t *testing.T
	r *rand.Rand
}

func (ed editor) change(v any) any { return statetest.Editor{R: ed.r}.Change(v) }

// loose decodes canonical CBOR without knowing what it is.
func (ed editor) loose(b []byte) any {
	ed.t.Helper()
	v, err := statetest.Loose(b)
	if err != nil {
		ed.t.Fatal(err)
	}
	return v
}

// envelope edits a command: a field of its envelope or, half of the time, of its
// payload. It returns the bytes to sign.
func (ed editor) envelope(raw []byte) (envelope, signature []byte) {
	ed.t.Helper()
	b, signature, err := state.Split(raw)
	if err != nil {
		ed.t.Fatal(err)
	}
	m := ed.loose(b).(map[string]any)
	if ed.r.IntN(2) == 0 {
		return canon.Marshal(ed.change(m)), signature
	}
	m["payload"] = canon.Marshal(ed.change(ed.loose(m["payload"].([]byte))))
	return canon.Marshal(m), signature
}

// tampered edits a command and leaves its signature.
func (ed editor) tampered(raw []byte) []byte {
	envelope, signature := ed.envelope(raw)
	return state.Join(envelope, signature)
}

// resigned edits a command and signs it again, as a node can that conspires.
func (ed editor) resigned(w *statetest.World, raw []byte) []byte {
	envelope, _ := ed.envelope(raw)
	return ed.signer(w, raw).SignCommand(ed.t, envelope)
}

// signer returns the root that signed a command.
func (ed editor) signer(w *statetest.World, raw []byte) *statetest.Node {
	ed.t.Helper()
	b, signature, err := state.Split(raw)
	if err != nil {
		ed.t.Fatal(err)
	}
	e, _, err := state.ParseEnvelope(b)
	if err != nil {
		ed.t.Fatal(err)
	}
	var keys [][]byte
	if n, ok := w.State().Node(e.Origin); ok {
		keys = append(keys, n.Signing)
	}
	for _, r := range w.State().Removals() {
		if r.Node.ID == e.Origin {
			keys = append(keys, r.Node.Signing)
		}
	}
	for _, f := range w.State().FormerRoots(e.Origin) {
		if len(f.Signing) > 0 {
			keys = append(keys, f.Signing)
		}
	}
	for _, k := range keys {
		n := w.RootWith(e.Origin, k)
		if pqc.Verify(pqc.SuiteID(n.Record.SigningSuite), k, b, []byte(state.CommandContext), signature) == nil {
			return n
		}
	}
	ed.t.Fatalf("no root of %s signed this", e.Origin)
	return nil
}

// rewrite changes a command without signing anything else anew.
func rewrite[T state.Command](ed editor, w *statetest.World, raw []byte, f func(e *state.Envelope, c *T)) []byte {
	ed.t.Helper()
	b, _, err := state.Split(raw)
	if err != nil {
		ed.t.Fatal(err)
	}
	e, cmd, err := state.ParseEnvelope(b)
	if err != nil {
		ed.t.Fatal(err)
	}
	c := cmd.(T)
	f(&e, &c)
	e.Payload = canon.Marshal(c)
	return ed.signer(w, raw).SignCommand(ed.t, e.Marshal())
}

// statement signs a vote on a proposal anew; nil if the credential is not at hand.
func (ed editor) statement(w *statetest.World, s approval.Statement, proposal []byte) *approval.Statement {
	key := w.Custodian(s.Custodian)
	if statetest.Record(s.Custodian, "", 0, key).Credentials[0].ID != s.Credential {
		return nil
	}
	sig, err := key.Sign(approval.Message(s.Verdict, proposal), []byte(approval.Context))
	if err != nil {
		ed.t.Fatal(err)
	}
	s.Proposal, s.Signature = approval.ProposalID(proposal), sig
	return &s
}

// reproposed edits a proposal, and everybody who signed it or a command about it
// signs again: what is left to find is in the proposal itself.
func (ed editor) reproposed(w *statetest.World, d audit.Decision) (audit.Decision, bool) {
	v := ed.loose(d.Proposal).(map[string]any)
	if p, _ := v["parameters"].([]byte); len(p) > 0 && ed.r.IntN(2) == 0 {
		v["parameters"] = canon.Marshal(ed.change(ed.loose(p)))
	} else {
		v = ed.change(v).(map[string]any)
	}
	return ed.redecided(w, d, canon.Marshal(v))
}

// redecided carries a decision over to other bytes of its proposal.
func (ed editor) redecided(w *statetest.World, d audit.Decision, proposal []byte) (audit.Decision, bool) {
	for i, s := range d.Votes {
		again := ed.statement(w, s, proposal)
		if again == nil {
			return d, false
		}
		d.Votes[i] = *again
	}
	id := approval.ProposalID(proposal)
	d.Open = rewrite(ed, w, d.Open, func(_ *state.Envelope, c *state.OpenProposal) { c.Proposal = proposal })
	switch cmd := parsed(ed.t, d.Execution).(type) {
	case state.Execute:
		d.Execution = rewrite(ed, w, d.Execution, func(_ *state.Envelope, c *state.Execute) { c.Proposal = id })
	case state.CommitRotation:
		d.Execution = rewrite(ed, w, d.Execution, func(_ *state.Envelope, c *state.CommitRotation) { c.Proposal = id })
	case state.CommitKEK:
		d.Execution = rewrite(ed, w, d.Execution, func(_ *state.Envelope, c *state.CommitKEK) { c.Proposal = id })
	case state.ImportKey:
		d.Execution = rewrite(ed, w, d.Execution, func(_ *state.Envelope, c *state.ImportKey) { c.Proposal = id })
	default:
		ed.t.Fatalf("%T", cmd)
	}
	d.Proposal = proposal
	return d, true
}

func parsed(t *testing.T, raw []byte) state.Command {
	t.Helper()
	b, _, err := state.Split(raw)
	if err != nil {
		t.Fatal(err)
	}
	_, cmd, err := state.ParseEnvelope(b)
	if err != nil {
		t.Fatal(err)
	}
	return cmd
}

// clone returns a copy that shares nothing.
func clone(t *testing.T, e audit.Evidence) audit.Evidence {
	t.Helper()
	c, err := audit.ParseEvidence(bytes.Clone(e.Marshal()))
	if err != nil {
		t.Fatal(err)
	}
	return c
}
