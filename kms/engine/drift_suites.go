package engine

import (
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

// suites reports, once for each suite, who uses one that is ageing, and for each policy
// who uses one that it forbids.
func (d *drift) suites(rings []state.Keyring) {
	users, forbidden := map[pqc.SuiteID][]string{}, map[ban][]string{}
	use := func(policy string, id uint16, who string) {
		if p, ok := d.st.Policy(policy); ok && p.Forbids(id) {
			forbidden[ban{policy, pqc.SuiteID(id)}] = append(forbidden[ban{policy, pqc.SuiteID(id)}], who)
		} else if ageing(pqc.SuiteID(id)) != "" && !slices.Contains(users[pqc.SuiteID(id)], who) {
			users[pqc.SuiteID(id)] = append(users[pqc.SuiteID(id)], who)
		}
	}
	for _, kr := range rings {
		for _, k := range d.st.Keys(kr.Name) {
			if id := state.AlgorithmSuite(k.Algorithm); id != 0 && k.Primary != 0 {
				use(kr.Policy, uint16(id), "key "+kms.KeyPath(k.Keyring, k.Name))
			}
		}
		for _, n := range d.st.ResidentNodes(kr.Name) {
			if p, _ := d.st.Policy(kr.Policy); p.Forbids(n.Suite) {
				use(kr.Policy, n.Suite, "the agreement key of node "+n.ID+" for keyring "+kr.Name)
			}
		}
	}
	for _, n := range d.st.Nodes() {
		if n.Root != 0 {
			use(kms.Governance, n.Suite, "the agreement key of node "+n.ID)
			use(kms.Governance, n.SigningSuite, "the signing key of node "+n.ID)
		}
	}
	for _, c := range d.st.Custodians() {
		if c.Revoked {
			continue
		}
		for _, k := range c.Credentials {
			use(kms.Governance, k.Suite, "a credential of custodian "+c.ID)
		}
	}
	for _, k := range d.st.RecoveryKeys() {
		use(kms.Governance, k.Params.Suite, "recovery key "+k.Name)
	}
	for _, s := range pqc.Suites() {
		for _, p := range d.st.Policies() {
			if who := forbidden[ban{p.Name, s.ID}]; len(who) > 0 {
				d.find(wire.Finding{Kind: wire.DriftForbidden, Act: true, Subject: "suite/" + s.Name}, "policy %s forbids it; still used by %s", p.Name, some(who))
			}
		}
		if who := users[s.ID]; len(who) > 0 {
			d.find(wire.Finding{Kind: wire.DriftSuite, Subject: "suite/" + s.Name}, "%s: %s; used by %s", ageing(s.ID), s.Strength, some(who))
		}
	}
}

// ban is a suite that a policy forbids.
type ban struct {
	policy string
	suite  pqc.SuiteID
}

// ageing says why a suite is no longer what one would choose, "" where it is.
func ageing(id pqc.SuiteID) string {
	s, ok := pqc.Lookup(id)
	switch {
	case !ok:
		return ""
	case !s.PostQuantum:
		return "it does not withstand a quantum adversary"
	case s.ID == pqc.MLKEM768P256:
		return "weaker than MLKEM1024-P384, which a device with P-384 can have"
	}
	return ""
}

// some names the first of many.
func some(who []string) string {
	const most = 5
	if len(who) <= most {
		return strings.Join(who, ", ")
	}
	return strings.Join(slices.Concat(who[:most], []string{count(len(who)-most, "other")}), ", ")
}
