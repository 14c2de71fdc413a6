package approval

import (
	"bytes"
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/pqc"
)

// CredentialContext is the signature context of proofs of possession.
const CredentialContext = "conclave/credential/v1"

// Possession is the proof that a custodian holds the private half of a credential that
// is to be enrolled: its signature over CredentialCard in the context CredentialContext.
type Possession struct {
	Credential string `cbor:"credential" json:"credential"`
	Signature  []byte `cbor:"signature" json:"signature"`
}

// CredentialCard returns what a new credential signs, so that nobody enrols a key that
// is not theirs: "conclave/credential/v1" 0x00 ‖ the canonical encoding of the cluster's
// genesis identity, the custodian's name, the suite and the public key.
func CredentialCard(cluster, custodian string, k Credential) []byte {
	card := struct {
		Cluster   string `cbor:"cluster"`
		Custodian string `cbor:"custodian"`
		Suite     uint16 `cbor:"suite"`
		PublicKey []byte `cbor:"public-key"`
	}{cluster, custodian, k.Suite, k.PublicKey}
	return append([]byte(CredentialContext+"\x00"), canon.Marshal(card)...)
}

// Card is what a custodian hands over to have a credential enrolled: the public key and
// the proof of possession, for one cluster and under one name.
type Card struct {
	Format    uint8  `cbor:"format"` // 1
	Cluster   string `cbor:"cluster"`
	Custodian string `cbor:"custodian"`
	Suite     uint16 `cbor:"suite"`
	PublicKey []byte `cbor:"public-key"`
	Signature []byte `cbor:"signature"`
}

const maxCard = 64 << 10

// Marshal returns the canonical encoding.
func (c Card) Marshal() []byte { return canon.Marshal(c) }

// Credential returns the credential that the card is for.
func (c Card) Credential() Credential {
	return Credential{ID: pqc.Fingerprint(c.PublicKey), Suite: c.Suite, PublicKey: c.PublicKey}
}

// ParseCard decodes what Marshal writes and verifies the proof. Errors: kms.TooLarge,
// kms.Invalid, kms.BadSignature.
func ParseCard(b []byte) (Card, error) {
	if len(b) > maxCard {
		return Card{}, kms.Errorf(kms.TooLarge, "the card has %d bytes; the limit is %d", len(b), maxCard)
	}
	var c Card
	if err := canon.Unmarshal(b, &c); err != nil || c.Format != 1 {
		return Card{}, kms.Wrap(kms.Invalid, err, "this is no credential card", "make one with conclave custodian card")
	}
	k := c.Credential()
	if err := k.Validate(); err != nil {
		return Card{}, err
	}
	return c, verifyPossession(c.Cluster, c.Custodian, k, c.Signature)
}

func verifyPossession(cluster, custodian string, k Credential, signature []byte) error {
	if err := pqc.Verify(pqc.SuiteID(k.Suite), k.PublicKey, CredentialCard(cluster, custodian, k), []byte(CredentialContext), signature); err != nil {
		return kms.Wrap(kms.BadSignature, err, "the proof that custodian "+custodian+" holds credential "+k.ID+" does not verify",
			"make the card again, for this cluster and this custodian: conclave custodian card")
	}
	return nil
}

// validate checks the shape of what is beside the record.
func (p CustodianParams) validate() error {
	for i, k := range p.Custodian.Credentials {
		if k.Suspended {
			return kms.Errorf(kms.Invalid, "credential %d of custodian %s is marked as suspended, which no proposal does", i+1, p.Custodian.ID)
		}
	}
	for i, x := range p.Possession {
		switch {
		case i > 0 && p.Possession[i-1].Credential >= x.Credential:
			return kms.Errorf(kms.Invalid, "the proofs of possession are not sorted or repeat %s", x.Credential)
		case p.Custodian.Revoked || !slices.ContainsFunc(p.Custodian.Credentials, func(k Credential) bool { return k.ID == x.Credential }):
			return kms.Errorf(kms.Invalid, "there is a proof of possession for %s, which custodian %s does not get", x.Credential, p.Custodian.ID)
		case len(x.Signature) == 0 || len(x.Signature) > maxSignature:
			return kms.Errorf(kms.Invalid, "the proof of possession of %s is missing or too long", x.Credential)
		}
	}
	for i, id := range p.Restore {
		switch {
		case i > 0 && p.Restore[i-1] >= id:
			return kms.Errorf(kms.Invalid, "the credentials to restore are not sorted or repeat %s", id)
		case p.Custodian.Revoked || len(p.Possession) > 0 || !slices.ContainsFunc(p.Custodian.Credentials, func(k Credential) bool { return k.ID == id }):
			return kms.Errorf(kms.Invalid, "restoring %s goes with the custodian's record as it is, and nothing else", id)
		}
	}
	return nil
}

// VerifyPossession verifies the proofs; where all is set each credential that old does
// not have needs one. cluster is the genesis identity. Errors: kms.Invalid for one that
// is missing, kms.BadSignature.
func (p CustodianParams) VerifyPossession(cluster string, old Custodian, all bool) error {
	for _, k := range p.Custodian.Credentials {
		i := slices.IndexFunc(p.Possession, func(x Possession) bool { return x.Credential == k.ID })
		if i >= 0 {
			if err := verifyPossession(cluster, p.Custodian.ID, k, p.Possession[i].Signature); err != nil {
				return err
			}
			continue
		}
		had := slices.ContainsFunc(old.Credentials, func(o Credential) bool { return o.ID == k.ID })
		if all && !had && !p.Custodian.Revoked {
			return kms.Errorf(kms.Invalid, "there is no proof that custodian %s holds credential %s; give a card from conclave custodian card", p.Custodian.ID, k.ID)
		}
	}
	return nil
}

// Change returns the record that the change makes of the one in force, where exists.
// What is suspended stays suspended, but for what Restore lists. Errors: kms.Conflict,
// kms.NotFound, kms.Invalid.
func (p CustodianParams) Change(old Custodian, exists bool) (Custodian, error) {
	next := p.Custodian
	switch {
	case exists && old.Revoked:
		return next, kms.Errorf(kms.Conflict, "custodian %s is revoked for good; enrol the person under another name", next.ID)
	case exists && old.Site != next.Site:
		return next, kms.Errorf(kms.Conflict, "custodian %s is of site %s, which cannot change", next.ID, old.Site)
	case !exists && next.Revoked:
		return next, kms.Errorf(kms.NotFound, "there is no custodian %s to revoke", next.ID)
	case !exists && len(p.Restore) > 0:
		return next, kms.Errorf(kms.NotFound, "there is no custodian %s", next.ID)
	}
	if err := next.Validate(); err != nil {
		return next, err
	}
	if err := p.checkRestore(old); err != nil {
		return next, err
	}
	next = next.mark(func(k Credential) bool {
		return slices.ContainsFunc(old.Credentials, func(o Credential) bool { return o.ID == k.ID && o.Suspended }) && !slices.Contains(p.Restore, k.ID)
	})
	next.Revision = old.Revision + 1
	return next, nil
}

// checkRestore: to restore takes less than another change, so it changes nothing else.
func (p CustodianParams) checkRestore(old Custodian) error {
	if len(p.Restore) == 0 {
		return nil
	}
	plain := old.Restored()
	plain.Revision = 0
	if !bytes.Equal(canon.Marshal(plain), canon.Marshal(p.Custodian)) {
		return kms.Errorf(kms.Conflict, "the record of custodian %s is another one than that whose credentials are to be restored", old.ID)
	}
	for _, id := range p.Restore {
		if !slices.ContainsFunc(old.Credentials, func(k Credential) bool { return k.ID == id && k.Suspended }) {
			return kms.Errorf(kms.Conflict, "credential %s of custodian %s is not suspended", id, old.ID)
		}
	}
	return nil
}

// Possessions returns the proofs in the order that a proposal has them in.
func Possessions(l []Possession) []Possession {
	l = slices.Clone(l) // nil stays nil: a proposal without proofs has the encoding that it always had
	slices.SortFunc(l, func(a, b Possession) int { return strings.Compare(a.Credential, b.Credential) })
	return l
}
