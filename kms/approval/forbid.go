package approval

import (
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/pqc"
)

const maxForbidden = 64

// validateForbid checks the list's form. It may name suites that this program does not
// know, for a policy must mean the same to every release: whoever writes one is told so
// where names become numbers.
func (p Policy) validateForbid() error {
	if len(p.Forbid) > maxForbidden {
		return kms.Errorf(kms.Invalid, "policy %s forbids %d suites; the limit is %d", p.Name, len(p.Forbid), maxForbidden)
	}
	for i, id := range p.Forbid {
		if id == 0 || i > 0 && p.Forbid[i-1] >= id {
			return kms.Errorf(kms.Invalid, "policy %s: the forbidden suites are not sorted, repeat one or have the number 0", p.Name)
		}
	}
	return nil
}

// Forbids reports whether the policy forbids a suite for what is new.
func (p Policy) Forbids(suite uint16) bool {
	_, found := slices.BinarySearch(p.Forbid, suite)
	return found
}

// Allow refuses something new, called what, of a suite that the policy forbids. Errors:
// kms.Conflict.
func (p Policy) Allow(suite uint16, what string) error {
	if !p.Forbids(suite) {
		return nil
	}
	return &kms.Error{Kind: kms.Conflict, Msg: "policy " + p.Name + " forbids the suite " + pqc.SuiteID(suite).String() + " of " + what,
		Fix: "take another suite, or change the policy"}
}

// AllowRoot refuses a hardware root of which a key is of a forbidden suite.
func (p Policy) AllowRoot(node string, root NodeRoot) error {
	if err := p.Allow(root.Suite, "the agreement key of node "+node); err != nil {
		return err
	}
	return p.Allow(root.SigningSuite, "the signing key of node "+node)
}

// AllowCustodian refuses a record with a credential of a forbidden suite that old, the
// custodian's record until then, has not.
func (p Policy) AllowCustodian(old, next Custodian) error {
	for _, k := range next.Credentials {
		if slices.ContainsFunc(old.Credentials, func(o Credential) bool { return o.ID == k.ID }) {
			continue
		}
		if err := p.Allow(k.Suite, "a credential of custodian "+next.ID); err != nil {
			return err
		}
	}
	return nil
}
