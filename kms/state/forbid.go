package state

import (
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/pqc"
)

// AlgorithmSuite returns the suite of keys of an algorithm, 0 for those that have none.
func AlgorithmSuite(a kms.Algorithm) pqc.SuiteID {
	switch a {
	case kms.AES256GCM:
		return pqc.CiphertextFormat1
	case kms.ECDSAP256:
		return pqc.ECDSAP256SHA256
	case kms.ECDSAP384:
		return pqc.ECDSAP384SHA384
	case kms.Ed25519:
		return pqc.Ed25519
	}
	return 0
}

// allowMaterial refuses a new key version of a suite that the keyring's policy forbids,
// or, of protection hardware, sealed with one.
func (r reader) allowMaterial(k Keyring, alg kms.Algorithm) error {
	p, _ := r.policy(k.Policy)
	if err := p.Allow(uint16(AlgorithmSuite(alg)), "a key of the algorithm "+string(alg)); err != nil {
		return err
	}
	if k.Protection != kms.Hardware {
		return nil
	}
	return allowCopies(p, r.residents(k.Residency))
}

// allowCopies refuses new sealed copies for nodes whose agreement keys are of a suite
// that the policy forbids.
func allowCopies(p approval.Policy, nodes []Node) error {
	for _, n := range nodes {
		if err := p.Allow(n.Suite, "the agreement key of node "+n.ID); err != nil {
			return err
		}
	}
	return nil
}

// governance returns the policy of governance.
func (r reader) governance() approval.Policy {
	p, _ := r.policy(kms.Governance)
	return p
}

// checkForbidden refuses a genesis against its own policy of governance.
func (g Genesis) checkForbidden() error {
	at, _ := search(g.Policies, func(p approval.Policy) bool { return p.Name == kms.Governance })
	for _, n := range g.Nodes {
		if err := at.AllowRoot(n.ID, n.HardwareRoot()); err != nil {
			return kms.Wrap(kms.Invalid, err, "genesis: "+err.Error(), "")
		}
	}
	for _, c := range g.Custodians {
		if err := at.AllowCustodian(approval.Custodian{}, c); err != nil {
			return kms.Wrap(kms.Invalid, err, "genesis: "+err.Error(), "")
		}
	}
	return nil
}
