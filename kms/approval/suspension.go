package approval

import (
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
)

// Suspension is the statement by which a custodian suspends a credential of a colleague
// of the same site, or of their own, that was lost. The signature is by the credential
// With over Message in the context SuspensionContext. It is bound to the custodian's
// record as it is, so that it cannot be used again after a quorum has restored the
// credential.
type Suspension struct {
	Cluster    string `cbor:"cluster" json:"cluster"`       // lineage, as a proposal names it
	Custodian  string `cbor:"custodian" json:"custodian"`   // whose credential it is
	Credential string `cbor:"credential" json:"credential"` // that is suspended
	Revision   uint64 `cbor:"revision" json:"revision"`     // of the custodian's record
	By         string `cbor:"by" json:"by"`                 // custodian who signs
	With       string `cbor:"with" json:"with"`             // credential that signs
	Reason     string `cbor:"reason" json:"reason"`         // 1 to 1000 bytes
	Signature  []byte `cbor:"signature" json:"signature"`
}

// SuspensionContext is the signature context of suspensions.
const SuspensionContext = "conclave/suspension/v1"

const suspensionDomain = "conclave/suspension/v1\x00"

// maxSignature is more than any suite's signature has.
const maxSignature = 16 << 10

// Message returns what is signed: "conclave/suspension/v1" 0x00 ‖ the canonical encoding
// of the statement with an empty signature.
func (s Suspension) Message() []byte {
	s.Signature = nil
	return append([]byte(suspensionDomain), canon.Marshal(s)...)
}

// Validate checks the shape. Errors: kms.Invalid.
func (s Suspension) Validate() error {
	if !isHex128(s.Cluster) {
		return kms.Errorf(kms.Invalid, "suspension: the cluster is not 32 hexadecimal digits")
	}
	for _, name := range []string{s.Custodian, s.By} {
		if err := kms.CheckName("custodian", name); err != nil {
			return err
		}
	}
	if s.Credential == "" || s.With == "" || len(s.Credential) > kms.MaxText || len(s.With) > kms.MaxText || s.Revision == 0 {
		return kms.Errorf(kms.Invalid, "suspension: a credential or the revision is missing or too long")
	}
	if len(s.Signature) == 0 || len(s.Signature) > maxSignature {
		return kms.Errorf(kms.Invalid, "suspension: the signature is missing or too long")
	}
	if err := checkReason(s.Reason); err != nil {
		return kms.Errorf(kms.Invalid, "suspension: %v", err)
	}
	return nil
}

// Verify checks the statement against the records in force of the custodian and of the
// colleague: the same site, and a credential of the colleague's that counts. Errors:
// kms.Invalid, kms.Denied, kms.Conflict for another revision, kms.Exists where the
// credential is suspended already, kms.BadSignature.
func (s Suspension) Verify(c, by Custodian) error {
	if err := s.Validate(); err != nil {
		return err
	}
	i := slices.IndexFunc(c.Credentials, func(k Credential) bool { return k.ID == s.Credential })
	switch {
	case c.ID != s.Custodian || by.ID != s.By:
		return kms.Errorf(kms.Invalid, "suspension: it is about other custodians")
	case c.Site != by.Site:
		return kms.Errorf(kms.Denied, "custodian %s is of site %s and cannot suspend a credential of site %s", by.ID, by.Site, c.Site)
	case c.Revoked || i < 0:
		return kms.Errorf(kms.Denied, "custodian %s has no credential %q that counts", c.ID, s.Credential)
	case c.Credentials[i].Suspended:
		return kms.Errorf(kms.Exists, "credential %s of custodian %s is suspended", s.Credential, c.ID)
	case c.Revision != s.Revision:
		return kms.Errorf(kms.Conflict, "the record of custodian %s is at revision %d, the suspension is about revision %d", c.ID, c.Revision, s.Revision)
	}
	return verifyCredential(by, s.With, s.Message(), SuspensionContext, s.Signature, "the suspension", "sign it with a credential that is enrolled and not suspended")
}

// Suspend returns the record with the credential suspended.
func (c Custodian) Suspend(credential string) Custodian {
	return c.mark(func(k Credential) bool { return k.Suspended || k.ID == credential })
}

// Restored returns the record with no credential suspended.
func (c Custodian) Restored() Custodian { return c.mark(func(Credential) bool { return false }) }

// mark returns the record with the credentials suspended for which is says so.
func (c Custodian) mark(is func(Credential) bool) Custodian {
	c.Credentials = slices.Clone(c.Credentials)
	for i, k := range c.Credentials {
		c.Credentials[i].Suspended = is(k)
	}
	return c
}

// Active reports whether what a credential signs counts: the custodian is not revoked and
// has it, and it is not suspended. It is the one place where that is decided.
func (c Custodian) Active(credential string) bool {
	return !c.Revoked && slices.ContainsFunc(c.Credentials, func(k Credential) bool { return k.ID == credential && !k.Suspended })
}

// canVote reports whether the custodian has any credential that counts. (Records made
// for arithmetic alone have none at all and can.)
func (c Custodian) canVote() bool {
	return !c.Revoked && (len(c.Credentials) == 0 || slices.ContainsFunc(c.Credentials, func(k Credential) bool { return c.Active(k.ID) }))
}

// counting returns how many of the custodian's credentials count.
func (c Custodian) counting() (n int) {
	for _, k := range c.Credentials {
		if c.Active(k.ID) {
			n++
		}
	}
	return n
}

// checkActive says why a credential of the custodian does not count.
func (c Custodian) checkActive(credential string) (Credential, error) {
	i := slices.IndexFunc(c.Credentials, func(k Credential) bool { return k.ID == credential })
	switch {
	case c.Revoked:
		return Credential{}, kms.Errorf(kms.Denied, "custodian %s is revoked", c.ID)
	case i < 0:
		return Credential{}, kms.Errorf(kms.Denied, "custodian %s has no credential %q", c.ID, credential)
	case !c.Active(credential):
		return Credential{}, kms.Errorf(kms.Denied, "credential %s of custodian %s is suspended", credential, c.ID)
	}
	return c.Credentials[i], nil
}

// CheckCustodianChange checks the custodians that a change leaves: each policy must be
// possible with everybody who is enrolled, suspended credentials included since a quorum
// can restore them; and where one is suspended, those that count must be able to restore
// it. Errors: kms.Conflict.
func CheckCustodianChange(policies []Policy, all []Custodian) error {
	enrolled := make([]Custodian, len(all))
	for i, c := range all {
		enrolled[i] = c.Restored()
	}
	for _, p := range policies {
		if err := p.Possible(enrolled); err != nil {
			return kms.Errorf(kms.Conflict, "with this change of custodians %v", err)
		}
	}
	return Restorable(policies, all, "")
}

// Restorable checks that a suspended credential can be restored under the governance
// policy by the custodians that count, but for the custodian without. Errors:
// kms.Conflict with the arithmetic in the message.
func Restorable(policies []Policy, all []Custodian, without string) error {
	suspended := slices.ContainsFunc(all, func(c Custodian) bool {
		return !c.Revoked && slices.ContainsFunc(c.Credentials, func(k Credential) bool { return k.Suspended })
	})
	if !suspended {
		return nil
	}
	all = slices.Clone(all)
	for i := range all {
		all[i].Revoked = all[i].Revoked || all[i].ID == without
	}
	for _, p := range policies {
		rule, ok := p.Rule(kms.ActionCustodian)
		if p.Name != kms.Governance || !ok {
			continue
		}
		if err := (Policy{Name: p.Name, Rules: []Rule{rule}}).Possible(all); err != nil {
			return kms.Errorf(kms.Conflict, "then nobody could restore a suspended credential without the one who suspends: %v", err)
		}
	}
	return nil
}
