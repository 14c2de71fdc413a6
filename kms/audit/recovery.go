package audit

import (
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
)

// history is where a replay stands among the epochs of the cluster. Commands and
// proposals name the history that they belong to, so the recoveries between are part of
// the evidence for what came after them.
type history struct {
	lineage string
	epoch   uint64
	entered []string // lineages, this one last
	ahead   [][]byte // recoveries that are still to come, approved statements
}

// foundedHistory is the history that begins with the genesis.
func foundedHistory(cluster string) history {
	return history{lineage: cluster, entered: []string{cluster}}
}

// reach goes on to the history that a command or proposal names, through the
// recoveries that come next, and reports whether there is one.
func (w *replay) reach(lineage string) (bool, error) {
	for !slices.Contains(w.history.entered, lineage) {
		if len(w.history.ahead) == 0 {
			return false, nil
		}
		if err := w.recover(); err != nil {
			return false, err
		}
	}
	return true, nil
}

// recover verifies the next recovery under the custodians and policies in force, and
// goes on to the history that it began.
func (w *replay) recover() error {
	b := w.history.ahead[0]
	a, p, err := approval.ParseApproved(b)
	if err != nil {
		return err
	}
	if p.Action != kms.ActionRecover {
		return refuse(kms.Invalid, nil, "a recovery in the evidence is a proposal to %s", p.Action)
	}
	params, err := p.RecoverParams()
	if err != nil {
		return err
	}
	pol := w.policies[kms.Governance]
	rule, ok := pol.Rule(kms.ActionRecover)
	switch {
	case params.Cluster != w.cluster || p.Cluster != w.history.lineage || p.Revision != w.history.epoch:
		return refuse(kms.Invalid, nil, "the recovery to epoch %d does not follow on epoch %d of the cluster", params.Epoch, w.history.epoch)
	case !ok || !rule.Quorum() || p.Policy != kms.Governance || p.PolicyRevision != pol.Revision:
		return refuse(kms.Denied, nil, "the recovery to epoch %d was not decided under the governance policy in force", params.Epoch)
	}
	var ids []string
	for _, s := range a.Statements {
		c, known := w.custodian(s.Custodian)
		if !known {
			return refuse(kms.Denied, nil, "the recovery to epoch %d: there is no custodian %s", params.Epoch, s.Custodian)
		}
		if err := s.Verify(c, a.Proposal); err != nil {
			return err
		}
		ids = append(ids, s.Custodian)
	}
	if d := approval.RecoverRule(rule).Decide(p.Proposer, w.custodian, ids); !d.Met {
		return refuse(kms.NeedsApproval, nil, "the recovery to epoch %d was not approved by its quorum", params.Epoch)
	}
	w.history = history{
		lineage: state.Recovery{Approved: b}.Lineage(w.cluster), epoch: params.Epoch,
		entered: w.history.entered, ahead: w.history.ahead[1:],
	}
	for _, m := range w.nodes {
		m.slack++
	}
	w.history.entered = append(slices.Clone(w.history.entered), w.history.lineage)
	return nil
}

// recoveriesOf returns the approved statements of a state's recoveries.
func recoveriesOf(s *state.State) (l [][]byte) {
	for _, r := range s.Recoveries() {
		l = append(l, r.Approved)
	}
	return l
}

// addRecoveries adds the recoveries that the evidence needs: those before its decisions,
// and before the receipts in it.
func (w *replay) addRecoveries(s *state.State, e *Evidence) error {
	for _, raw := range e.Receipts {
		envelope, _, err := state.Split(raw)
		if err != nil {
			return err
		}
		env, _, err := state.ParseEnvelope(envelope)
		if err != nil {
			return err
		}
		if _, err := w.reach(env.Cluster); err != nil {
			return err
		}
	}
	e.Recoveries = recoveriesOf(s)[:len(w.history.entered)-1]
	if len(e.Recoveries) == 0 {
		e.Recoveries = nil
	}
	return nil
}

// at returns the revision of a node's record, where a proposal names one: a recovery
// may have raised it by one, when the node's vote changed with it.
func (m *member) at(named uint64) uint64 {
	if named > m.revision && named <= m.revision+m.slack {
		m.revision, m.slack = named, 0
	}
	return m.revision
}
