package interop

import (
	"cmp"
	"slices"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state/statetest"
	"github.com/conclave-kms/conclave/pqc"
)

// forbid is a history of policies that forbid suites, and of what they do not keep from
// being: custodians, nodes, versions, KEKs; at last a key gets a rotation period.
func forbid(t *testing.T) *statetest.World {
	w := statetest.New(t, statetest.Options{})
	w.Announce()
	w.CreateKeyring("coalition", "de", "fr", "jp")
	w.CreateHardwareKeyring("vault", "de", "fr")
	w.CreateKey("coalition", "orders", kms.Encrypt)
	w.CreateKey("vault", "seal", kms.Sign)
	w.GiveReceipts()
	set := func(name string, suites ...pqc.SuiteID) {
		p, _ := w.State().Policy(name)
		params := approval.PolicyParams{Rules: p.Rules}
		for _, s := range suites {
			params.Forbid = append(params.Forbid, uint16(s))
		}
		w.Carry(kms.ActionPolicy, approval.PolicyTarget(name), params)
	}
	set(kms.Governance, pqc.Ed25519)
	set("standard", pqc.MLKEM1024P384, pqc.Ed25519)
	enrol(w, "fr-3", "fr", "fr-1", "de-1", "jp-1")
	w.Rotate("coalition", "orders")
	w.Rotate("vault", "seal")
	w.RotateKEK("coalition")
	w.Rekey("node-fr-1")
	set(kms.Governance, pqc.MLKEM768P256, pqc.Ed25519, 0xFFFF) // which nodes go on using
	w.SetRecovery("all", w.RecoveryParams([]string{"de", "fr", "jp"}, 3, 2, "de-1", "fr-1", "fr-2", "jp-1"))
	revoke(w, "fr-3")
	set("standard")
	w.Rotate("coalition", "orders")
	p, _ := w.State().Policy("standard")
	rules := append(slices.Clone(p.Rules), approval.Rule{Action: kms.ActionSchedule, Approvals: 2, Sites: 2, Lifetime: p.Rules[0].Lifetime})
	slices.SortFunc(rules, func(a, b approval.Rule) int { return cmp.Compare(a.Action, b.Action) })
	w.Carry(kms.ActionPolicy, approval.PolicyTarget("standard"), approval.PolicyParams{Rules: rules})
	w.Carry(kms.ActionSchedule, "key/coalition/orders", approval.ScheduleParams{RotationPeriod: (24 * time.Hour).Milliseconds()})
	return w
}

// forbade has a decision on a policy forbid suites, which the custodians who took part
// sign once more: later decisions may then be about what is forbidden.
func forbade(ed editor, s, _ sample, e *audit.Evidence) bool {
	for _, d := range decisions(e) {
		p, err := approval.ParseProposal(d.Proposal)
		if err != nil {
			ed.t.Fatal(err)
		}
		if p.Action != kms.ActionPolicy {
			continue
		}
		params, err := p.PolicyParams()
		if err != nil {
			ed.t.Fatal(err)
		}
		params.Forbid = statetest.Pick(ed.r, [][]uint16{
			nil, {0}, {0xC201, 0x0050}, {0xC104, 0xC104}, {uint16(pqc.MLKEM768P256)}, {uint16(pqc.ECDSAP256SHA256)},
			{uint16(pqc.MLDSA65Ed25519)}, {uint16(pqc.CiphertextFormat1)}, {uint16(pqc.MLKEM768P256), uint16(pqc.ECDSAP256SHA256), uint16(pqc.MLDSA65Ed25519), uint16(pqc.CiphertextFormat1)},
		})
		p.Parameters = canon.Marshal(params)
		again, ok := ed.redecided(s.w, *d, p.Marshal())
		*d = again
		return ok
	}
	return false
}
