package approval

import (
	"errors"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/pqc"
)

// MaxCredentials is the largest number of credentials of one custodian.
const MaxCredentials = 8

const messageDomain = "conclave/statement/v1\x00"

// Message returns what a credential signs, in the signature context Context:
//
//	"conclave/statement/v1" 0x00 ‖ verdict ("approve" or "reject") 0x00 ‖ proposal
//
// where proposal is the proposal's exact bytes.
func Message(v Verdict, proposal []byte) []byte {
	m := make([]byte, 0, len(messageDomain)+len(v)+1+len(proposal))
	m = append(m, messageDomain...)
	m = append(m, v...)
	m = append(m, 0)
	return append(m, proposal...)
}

// Verify checks that the statement is custodian c's verdict on the proposal,
// given as its exact bytes, by one of c's credentials. c must be the record in
// force. Errors: kms.Invalid for a statement about something else, kms.Denied
// for a revoked custodian or a credential that is unknown or suspended, kms.BadSignature.
func (s Statement) Verify(c Custodian, proposal []byte) error {
	if s.Verdict != Approve && s.Verdict != Reject {
		return kms.Errorf(kms.Invalid, "statement: verdict %q is neither approve nor reject", s.Verdict)
	}
	if id := ProposalID(proposal); s.Proposal != id {
		return kms.Errorf(kms.Invalid, "statement: it is about another proposal than %s", id)
	}
	if s.Custodian == "" || s.Custodian != c.ID {
		return kms.Errorf(kms.Invalid, "statement: it is by custodian %q, not %q", s.Custodian, c.ID)
	}
	k, err := c.checkActive(s.Credential)
	if err != nil {
		return err
	}
	if err := pqc.Verify(pqc.SuiteID(k.Suite), k.PublicKey, Message(s.Verdict, proposal), []byte(Context), s.Signature); err != nil {
		return kms.Wrap(kms.BadSignature, err, "the signature of custodian "+c.ID+" does not verify",
			"sign the exact bytes of the proposal with the credential named")
	}
	return nil
}

// Validate checks the custodian's names and credentials: 1 to MaxCredentials
// (none only where revoked), sorted by ID, each ID the fingerprint of its key.
// Errors: kms.Invalid.
func (c Custodian) Validate() error {
	if err := kms.CheckName("custodian", c.ID); err != nil {
		return err
	}
	if err := kms.CheckName("site of custodian "+c.ID, c.Site); err != nil {
		return err
	}
	if len(c.Credentials) == 0 && !c.Revoked {
		return kms.Errorf(kms.Invalid, "custodian %s has no credential", c.ID)
	}
	if len(c.Credentials) > MaxCredentials {
		return kms.Errorf(kms.Invalid, "custodian %s has %d credentials; the limit is %d", c.ID, len(c.Credentials), MaxCredentials)
	}
	for i, k := range c.Credentials {
		if err := k.Validate(); err != nil {
			return kms.Errorf(kms.Invalid, "custodian %s: %v", c.ID, err)
		}
		if i > 0 && c.Credentials[i-1].ID >= k.ID {
			return kms.Errorf(kms.Invalid, "custodian %s: credentials are not sorted by id or repeat %s", c.ID, k.ID)
		}
	}
	return nil
}

// Validate checks that the credential is a public key of a signature suite under
// its own fingerprint. Errors: kms.Invalid.
func (k Credential) Validate() error {
	s, ok := pqc.Lookup(pqc.SuiteID(k.Suite))
	if !ok || s.Kind != pqc.Signature {
		return kms.Errorf(kms.Invalid, "credential %q: %v is no signature suite", k.ID, pqc.SuiteID(k.Suite))
	}
	// A signature of the right length brings Verify to look at the key.
	err := pqc.Verify(s.ID, k.PublicKey, nil, nil, make([]byte, s.SignatureSize))
	if errors.Is(err, pqc.ErrPublicKey) {
		return kms.Errorf(kms.Invalid, "credential %q: not a public key of %s", k.ID, s.Name)
	}
	if k.ID != pqc.Fingerprint(k.PublicKey) {
		return kms.Errorf(kms.Invalid, "credential %q is not the fingerprint of its public key", k.ID)
	}
	return nil
}

// CheckCustodians checks that no two custodians share an identifier or a
// credential, so that nobody can count twice. Errors: kms.Invalid.
func CheckCustodians(custodians []Custodian) error {
	owner := make(map[string]string)
	seen := make(map[string]bool, len(custodians))
	for _, c := range custodians {
		if seen[c.ID] {
			return kms.Errorf(kms.Invalid, "custodian %s is listed twice", c.ID)
		}
		seen[c.ID] = true
		for _, k := range c.Credentials {
			if o, ok := owner[string(k.PublicKey)]; ok && o != c.ID {
				return kms.Errorf(kms.Invalid, "custodians %s and %s have the same credential %s", o, c.ID, k.ID)
			}
			owner[string(k.PublicKey)] = c.ID
		}
	}
	return nil
}
