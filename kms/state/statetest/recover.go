package statetest

import (
	"slices"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
)

// RecoverStatement returns an unsigned statement by which the cluster is to go on from
// the state, with the voters named or all that vote in it.
func (w *World) RecoverStatement(s *state.State, voters ...string) approval.Proposal {
	w.t.Helper()
	if len(voters) == 0 {
		for _, m := range s.Members() {
			if m.Voter {
				voters = append(voters, m.ID)
			}
		}
	}
	slices.Sort(voters)
	pol, _ := s.Policy(kms.Governance)
	created := max(w.Now(), s.Clock())
	return approval.Proposal{
		Format: approval.ProposalFormat, Cluster: s.Lineage(), Nonce: hash("recover", s.Index(), len(voters))[:16], Action: kms.ActionRecover,
		Target: approval.ClusterTarget(s.Lineage()), Revision: s.Epoch(), Policy: kms.Governance, PolicyRevision: pol.Revision,
		Proposer: w.Operator(w.opts.Sites[0]), Created: created, Expires: created + time.Hour.Milliseconds(), Reason: "test",
		Parameters: canon.Marshal(s.RecoverParams(s.Epoch()+1, voters)),
	}
}

// ApproveRecovery returns the statement with the custodians' approvals.
func (w *World) ApproveRecovery(p approval.Proposal, custodians ...string) []byte {
	w.t.Helper()
	a := approval.Approved{Proposal: p.Marshal(), Statements: []approval.Statement{}}
	for _, id := range custodians {
		key := w.Custodian(id)
		sig, err := key.Sign(approval.Message(approval.Approve, a.Proposal), []byte(approval.Context))
		if err != nil {
			w.t.Fatal(err)
		}
		c := Record(id, "", 0, key)
		a = a.With(approval.Statement{Proposal: approval.ProposalID(a.Proposal), Verdict: approval.Approve, Custodian: id, Credential: c.Credentials[0].ID, Signature: sig})
	}
	return a.Marshal()
}

// Recover begins another epoch with the state, approved by the first custodians of the
// first two sites, and goes on with it.
func (w *World) Recover(s *state.State, voters ...string) []byte {
	w.t.Helper()
	approved := w.ApproveRecovery(w.RecoverStatement(s, voters...), w.opts.Sites[0]+"-1", w.opts.Sites[1]+"-1")
	next, err := s.Recover(approved)
	if err != nil {
		w.t.Fatal(err)
	}
	w.SetState(next)
	return approved
}
