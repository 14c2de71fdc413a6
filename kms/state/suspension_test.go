package state_test

import (
	"bytes"
	"slices"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// suspendable is a world whose nodes know suspensions, with a key.
func suspendable(t testing.TB) *statetest.World {
	w := statetest.New(t, statetest.Options{})
	w.Announce()
	w.CreateKeyring("coalition", "fr", "de", "jp")
	w.CreateKey("coalition", "mail", kms.Encrypt)
	return w
}

// TestSuspendCredential: what a suspended credential has signed counts no more, in live
// proposals too, until a quorum restores it; and what is stored verifies again.
func TestSuspendCredential(t *testing.T) {
	t.Parallel()
	w := suspendable(t)
	id := w.Propose(kms.ActionRotate, target("mail"), nil)
	w.Approve(id, "fr-2", "de-1")
	progress(t, w, id, "authorised")
	w.SuspendCredential("fr-2", "fr-1")
	progress(t, w, id, "open")
	c, _ := w.State().Custodian("fr-2")
	if c.Active(c.Credentials[0].ID) || c.Revision != 2 || len(w.State().Suspensions()) != 1 {
		t.Errorf("%+v", c)
	}
	other := w.Propose(kms.ActionSuspend, target("mail"), nil)
	w.Refuse(kms.Denied, "node-fr-1", state.CastVote{Statement: w.Statement(other, "fr-2", approval.Approve)})
	w.Refuse(kms.Denied, "node-fr-1", state.SuspendCredential{Statement: w.Suspension("fr-1", "fr-2")})

	// It is restored by a quorum, without anybody of the site, and the approval counts again.
	old := w.Suspension("fr-1", "fr-1") // for the record as it is now
	restore := w.Propose(kms.ActionCustodian, "custodian/fr-2", w.RestoreParams("fr-2"))
	w.Approve(restore, "de-2", "jp-1")
	w.Execute(restore)
	if c, _ := w.State().Custodian("fr-2"); !c.Active(c.Credentials[0].ID) || c.Revision != 3 {
		t.Errorf("restored: %+v", c)
	}
	progress(t, w, id, "authorised")

	// The old suspension cannot be used again, nor one of fr-1 for another history.
	first, _, err := state.Split(w.State().Suspensions()[0].Statement)
	if err != nil {
		t.Fatal(err)
	}
	_, cmd, err := state.ParseEnvelope(first)
	if err != nil {
		t.Fatal(err)
	}
	w.Refuse(kms.Conflict, "node-fr-1", cmd)
	old.Cluster = "00112233445566778899aabbccddeeff"
	w.Refuse(kms.Invalid, "node-fr-1", state.SuspendCredential{Statement: w.SignSuspension(old)})

	s, err := state.Restore(bytes.NewReader(snapshot(t, w.State())), no)
	if err != nil || s.Hash() != w.State().Hash() {
		t.Fatalf("restored from a snapshot that nobody vouches for: %v", err)
	}
	if err := s.Extends(w.State()); err != nil {
		t.Error(err)
	}
	refusesAlterations(t, w.State(), "suspension", "custodian")
}

func TestSuspendCredentialRefuses(t *testing.T) {
	t.Parallel()
	w := suspendable(t)
	good := w.Suspension("fr-2", "fr-1")
	with := func(change func(*approval.Suspension)) state.SuspendCredential {
		s := good
		change(&s)
		return state.SuspendCredential{Statement: w.SignSuspension(s)}
	}
	for name, x := range map[string]struct {
		kind kms.Kind
		cmd  state.SuspendCredential
	}{
		"another site":       {kms.Denied, state.SuspendCredential{Statement: w.Suspension("fr-2", "de-1")}},
		"no such custodian":  {kms.NotFound, with(func(s *approval.Suspension) { s.Custodian = "fr-9" })},
		"no such credential": {kms.Denied, with(func(s *approval.Suspension) { s.Credential = "SHA256:x" })},
		"another revision":   {kms.Conflict, with(func(s *approval.Suspension) { s.Revision++ })},
		"no reason":          {kms.Invalid, with(func(s *approval.Suspension) { s.Reason = "" })},
		"another's key":      {kms.Denied, with(func(s *approval.Suspension) { s.With = good.Credential })},
		"a bad signature":    {kms.BadSignature, state.SuspendCredential{Statement: func() approval.Suspension { s := good; s.Reason = "other"; return s }()}},
	} {
		t.Run(name, func(t *testing.T) { w.Refuse(x.kind, "node-fr-1", x.cmd) })
	}
	// One cannot suspend so many that nobody could restore them without the one who does:
	// governance takes two sites, so de and jp suffice; when de is gone too, fr is needed.
	w.SuspendCredential("fr-2", "fr-1")
	w.SuspendCredential("de-2", "de-1")
	w.SuspendCredential("jp-2", "jp-1")
	w.SuspendCredential("jp-1", "jp-1")
	w.Refuse(kms.Conflict, "node-fr-1", state.SuspendCredential{Statement: w.Suspension("de-1", "de-1")})
	w.Refuse(kms.Conflict, "node-fr-1", state.SuspendCredential{Statement: w.Suspension("fr-1", "fr-1")})
	restore := w.Propose(kms.ActionCustodian, "custodian/jp-1", w.RestoreParams("jp-1"))
	w.Approve(restore, "de-1", "fr-1")
	w.Execute(restore)

	// A suspended credential stays so through any change but its restoration, which
	// changes nothing else.
	more := w.RestoreParams("fr-2")
	more.Restore = nil
	plain := w.Propose(kms.ActionCustodian, "custodian/fr-2", more)
	w.Approve(plain, "de-1", "fr-1", "jp-1")
	w.Execute(plain)
	if c, _ := w.State().Custodian("fr-2"); c.Active(c.Credentials[0].ID) {
		t.Error("the record written anew restored a credential")
	}
	smuggled := w.RestoreParams("fr-2")
	k := statetest.Record("fr-2", "fr", 0, w.AddCustodianKey("fr-2")).Credentials[0]
	smuggled.Custodian.Credentials = append(slices.Clone(smuggled.Custodian.Credentials), k)
	slices.SortFunc(smuggled.Custodian.Credentials, func(a, b approval.Credential) int { return bytes.Compare([]byte(a.ID), []byte(b.ID)) })
	p := w.Proposal(kms.ActionCustodian, "custodian/fr-2", smuggled)
	w.Refuse(kms.Invalid, "node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))
	marked := w.RestoreParams("fr-2")
	marked.Custodian.Credentials[0].Suspended = true
	p = w.Proposal(kms.ActionCustodian, "custodian/fr-2", marked)
	w.Refuse(kms.Invalid, "node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))
	w.Refuse(kms.Conflict, "node-fr-1", func() state.Command {
		p := w.Proposal(kms.ActionCustodian, "custodian/de-1", approval.CustodianParams{
			Custodian: statetest.Record("de-1", "de", 0, w.Custodian("de-1")),
			Restore:   []string{statetest.Record("de-1", "de", 0, w.Custodian("de-1")).Credentials[0].ID}})
		return state.OpenProposal{Proposal: p.Marshal()}
	}(), statetest.As(w.Operator("de")))
}

// TestPossession: a new credential needs the proof that its holder has it once all nodes
// know such proofs, and a proof that is given must be right; before, none is taken.
func TestPossession(t *testing.T) {
	t.Parallel()
	w := statetest.New(t, statetest.Options{})
	open := func(params approval.CustodianParams) (state.OpenProposal, statetest.Option) {
		p := w.Proposal(kms.ActionCustodian, "custodian/"+params.Custodian.ID, params)
		return state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer)
	}
	key := w.AddCustodianKey("fr-3")
	bare := approval.CustodianParams{Custodian: statetest.Record("fr-3", "fr", 0, key)}
	proven := bare
	sign := func(cluster, custodian string, k approval.Credential) []byte {
		sig, err := key.Sign(approval.CredentialCard(cluster, custodian, k), []byte(approval.CredentialContext))
		if err != nil {
			t.Fatal(err)
		}
		return sig
	}
	cred := bare.Custodian.Credentials[0]
	proven.Possession = []approval.Possession{{Credential: cred.ID, Signature: sign(w.State().Cluster(), "fr-3", cred)}}
	cmd, as := open(proven)
	w.Refuse(kms.Invalid, "node-fr-1", cmd, as) // before all nodes know it
	w.Announce()

	// bare keeps its lack of a proof: statetest adds one only where it has the key.
	w.AddCustodianKey("fr-3")
	cmd, as = open(bare)
	w.Refuse(kms.Invalid, "node-fr-1", cmd, as)
	for _, sig := range [][]byte{sign(w.State().Cluster(), "fr-4", cred), sign("00112233445566778899aabbccddeeff", "fr-3", cred)} {
		bad := proven
		bad.Possession = []approval.Possession{{Credential: cred.ID, Signature: sig}}
		cmd, as = open(bad)
		w.Refuse(kms.BadSignature, "node-fr-1", cmd, as)
	}
	twice := proven
	twice.Possession = append(slices.Clone(proven.Possession), proven.Possession...)
	cmd, as = open(twice)
	w.Refuse(kms.Invalid, "node-fr-1", cmd, as)
	w.Carry(kms.ActionCustodian, "custodian/fr-3", proven)

	// A second credential needs its own; the first one's is not asked for again.
	second := statetest.Record("fr-3", "fr", 0, w.AddCustodianKey("fr-3"))
	both := approval.CustodianParams{Custodian: approval.Custodian{ID: "fr-3", Site: "fr", Credentials: append(second.Credentials, cred)}}
	slices.SortFunc(both.Custodian.Credentials, func(a, b approval.Credential) int { return bytes.Compare([]byte(a.ID), []byte(b.ID)) })
	w.Carry(kms.ActionCustodian, "custodian/fr-3", both)
	c, _ := w.State().Custodian("fr-3")
	if len(c.Credentials) != 2 || c.Revision != 2 {
		t.Errorf("%+v", c)
	}
	s, err := state.Restore(bytes.NewReader(snapshot(t, w.State())), no)
	if err != nil || s.Hash() != w.State().Hash() {
		t.Fatalf("%v", err)
	}
}
