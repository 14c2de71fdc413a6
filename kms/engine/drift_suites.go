package engine

import (
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

// algorithmSuites are the suites of the algorithms of sign keys.
var algorithmSuites = map[kms.Algorithm]pqc.SuiteID{
	kms.ECDSAP256: pqc.ECDSAP256SHA256, kms.ECDSAP384: pqc.ECDSAP384SHA384, kms.Ed25519: pqc.Ed25519,
}

// suites reports, once for each suite, who uses one that is ageing.
func (d *drift) suites(rings []state.Keyring) {
	users := map[pqc.SuiteID][]string{}
	use := func(id pqc.SuiteID, who string) {
		if ageing(id) != "" {
			users[id] = append(users[id], who)
		}
	}
	for _, kr := range rings {
		for _, k := range d.st.Keys(kr.Name) {
			if k.Purpose == kms.Sign && k.Primary != 0 {
				use(algorithmSuites[k.Algorithm], "key "+kms.KeyPath(k.Keyring, k.Name))
			}
		}
	}
	for _, n := range d.st.Nodes() {
		if n.Root != 0 {
			use(pqc.SuiteID(n.Suite), "the agreement key of node "+n.ID)
			use(pqc.SuiteID(n.SigningSuite), "the signing key of node "+n.ID)
		}
	}
	for _, c := range d.st.Custodians() {
		if c.Revoked {
			continue
		}
		for _, k := range c.Credentials {
			use(pqc.SuiteID(k.Suite), "a credential of custodian "+c.ID)
		}
	}
	for _, s := range pqc.Suites() {
		if who := users[s.ID]; len(who) > 0 {
			d.find(wire.Finding{Kind: wire.DriftSuite, Subject: "suite/" + s.Name}, "%s: %s; used by %s", ageing(s.ID), s.Strength, some(who))
		}
	}
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
