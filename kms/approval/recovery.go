package approval

import (
	"bytes"
	"crypto/sha256"
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/pqc"
)

// Limits of a recovery key.
const (
	MaxRecoveryHolders = 16      // custodians with a share
	MinRecoverySites   = 2       // sites whose shares it takes at least
	RecoverySecret     = 32      // bytes of the seed that is shared
	RecoveryShare      = 64      // bytes of a share
	maxSealedShare     = 4 << 10 // bytes of a sealed share
)

// RecoveryContext is the signature context (pqc.Verify) of the signature by which a
// custodian says that a KEM key is theirs.
const RecoveryContext = "conclave/recovery-key/v1"

// RecoveryHolder is a custodian with a share of a recovery key.
type RecoveryHolder struct {
	Custodian  string `cbor:"custodian" json:"custodian"`
	Site       string `cbor:"site" json:"site"`
	Suite      uint16 `cbor:"suite" json:"suite"` // KEM suite
	KEM        []byte `cbor:"kem" json:"kem"`     // pqc.PublicKey.Bytes
	Credential string `cbor:"credential" json:"credential"`
	Possession []byte `cbor:"possession" json:"possession"` // signature by the credential over RecoveryCard
	Sealed     []byte `cbor:"sealed" json:"sealed"`         // the share, sealed to KEM
	Commitment []byte `cbor:"commitment" json:"commitment"` // 32 bytes, see RecoveryParams.Commit
}

// RecoveryParams are the parameters of the action recover on a target "recovery/NAME":
// the public half of a recovery key and who holds shares of the other half. Every KEK
// version of the keyrings with exactly this residency is then sealed to it too.
type RecoveryParams struct {
	Residency []string         `cbor:"residency" json:"residency"` // sites, sorted
	Suite     uint16           `cbor:"suite" json:"suite"`         // KEM suite
	PublicKey []byte           `cbor:"public-key" json:"public_key"`
	Nonce     []byte           `cbor:"nonce" json:"nonce"`         // 16 bytes, of this splitting
	Threshold uint32           `cbor:"threshold" json:"threshold"` // custodians that it takes
	Sites     uint32           `cbor:"sites" json:"sites"`         // sites among them that it takes
	Holders   []RecoveryHolder `cbor:"holders" json:"holders"`     // sorted by custodian
}

// TargetRecovery is the kind of target of a proposal about a recovery key.
const TargetRecovery = "recovery"

// RecoveryTarget returns the target of a proposal about a recovery key.
func RecoveryTarget(name string) string { return TargetRecovery + "/" + name }

// RecoveryRecipient names a recovery key as recipient of a sealed KEK copy. No node
// can have that name.
func RecoveryRecipient(name string) string { return TargetRecovery + "/" + name }

// RecoveryParams decodes the parameters of the action recover.
func (p Proposal) RecoveryParams() (RecoveryParams, error) { return params[RecoveryParams](p) }

// Marshal returns the canonical encoding.
func (r RecoveryParams) Marshal() []byte { return canon.Marshal(r) }

// ParseRecoveryParams decodes exactly what Marshal writes and validates it. Errors:
// kms.Invalid, kms.TooLarge.
func ParseRecoveryParams(b []byte) (r RecoveryParams, err error) {
	if len(b) > MaxProposal {
		return r, kms.Errorf(kms.TooLarge, "a recovery key's description has %d bytes; the limit is %d", len(b), MaxProposal)
	}
	if err := canon.Unmarshal(b, &r); err != nil {
		return RecoveryParams{}, kms.Wrap(kms.Invalid, err, "the description of a recovery key is not in canonical form", "")
	}
	return r, r.Validate()
}

// RecoveryCard returns what a custodian's credential signs in the context
// RecoveryContext to have shares sealed to a KEM key.
func RecoveryCard(cluster, custodian string, suite uint16, kem []byte) []byte {
	return canon.Marshal(struct {
		Cluster   string `cbor:"cluster"`
		Custodian string `cbor:"custodian"`
		Suite     uint16 `cbor:"suite"`
		KEM       []byte `cbor:"kem"`
	}{cluster, custodian, suite, kem})
}

// VerifyCard checks that custodian c, the record in force, has signed that the KEM key
// is theirs. Errors: kms.Denied, kms.Invalid, kms.BadSignature.
func (h RecoveryHolder) VerifyCard(cluster string, c Custodian) error {
	if c.ID != h.Custodian || c.Site != h.Site {
		return kms.Errorf(kms.Invalid, "the share is for custodian %s of site %s, not for %s of %s", h.Custodian, h.Site, c.ID, c.Site)
	}
	return verifyCredential(c, h.Credential, RecoveryCard(cluster, h.Custodian, h.Suite, h.KEM), RecoveryContext, h.Possession,
		"that the KEM key is theirs", "make the card again, for this cluster: conclave recovery card")
}

// verifyCredential checks a signature by one of a custodian's credentials.
func verifyCredential(c Custodian, credential string, message []byte, context string, signature []byte, what, fix string) error {
	k, err := c.checkActive(credential)
	if err != nil {
		return err
	}
	if err := pqc.Verify(pqc.SuiteID(k.Suite), k.PublicKey, message, []byte(context), signature); err != nil {
		return kms.Wrap(kms.BadSignature, err, "custodian "+c.ID+" has not signed "+what, fix)
	}
	return nil
}

// shareBinding is everything that a share is bound to.
type shareBinding struct {
	Domain    string `cbor:"domain"`
	Nonce     []byte `cbor:"nonce"`
	Key       []byte `cbor:"key"` // SHA-256 of the recovery key's public half
	Threshold uint32 `cbor:"threshold"`
	Sites     uint32 `cbor:"sites"`
	Holders   uint32 `cbor:"holders"`
	Holder    string `cbor:"holder"`
}

// ShareBinding returns what the sealed share of a holder is bound to, under a domain
// string: as HPKE info and AAD, and in its commitment.
func (r RecoveryParams) ShareBinding(domain, holder string) []byte {
	key := sha256.Sum256(r.PublicKey)
	return canon.Marshal(shareBinding{domain, r.Nonce, key[:], r.Threshold, r.Sites, uint32(len(r.Holders)), holder})
}

const commitDomain = "conclave/recovery/1/commitment"

// Commit returns the commitment to a holder's share: SHA-256 over the share's binding
// and the share. A share is 64 uniformly random bytes, so its hash hides it.
func (r RecoveryParams) Commit(holder string, share []byte) []byte {
	h := sha256.New()
	h.Write(r.ShareBinding(commitDomain, holder))
	h.Write(share)
	return h.Sum(nil)
}

// Holder returns the place of a custodian among the holders.
func (r RecoveryParams) Holder(custodian string) (int, bool) {
	return slices.BinarySearchFunc(r.Holders, custodian, func(h RecoveryHolder, id string) int { return strings.Compare(h.Custodian, id) })
}

// HolderSites returns the sites of the holders, in their order.
func (r RecoveryParams) HolderSites() []string {
	sites := make([]string, len(r.Holders))
	for i, h := range r.Holders {
		sites[i] = h.Site
	}
	return sites
}

// Validate checks the shape: sorted and distinct names, keys of their suites, and
// thresholds that can be met and that one site alone cannot meet. Errors: kms.Invalid.
func (r RecoveryParams) Validate() error {
	if err := sortedNames("site of the residency", r.Residency); err != nil {
		return err
	}
	if _, err := pqc.ParsePublicKey(pqc.SuiteID(r.Suite), r.PublicKey); err != nil || len(r.PublicKey) > MaxRootKey {
		return kms.Wrap(kms.Invalid, err, "the recovery key is no public key of suite "+pqc.SuiteID(r.Suite).String(), "")
	}
	if len(r.Nonce) != NonceSize {
		return kms.Errorf(kms.Invalid, "the nonce of a recovery key has %d bytes, not %d", len(r.Nonce), NonceSize)
	}
	if len(r.Holders) == 0 || len(r.Holders) > MaxRecoveryHolders {
		return kms.Errorf(kms.Invalid, "there are %d holders of shares; there must be 1 to %d", len(r.Holders), MaxRecoveryHolders)
	}
	for i, h := range r.Holders {
		if i > 0 && r.Holders[i-1].Custodian >= h.Custodian {
			return kms.Errorf(kms.Invalid, "the holders are not sorted or repeat %s", h.Custodian)
		}
		if err := h.validate(); err != nil {
			return err
		}
		if j := slices.IndexFunc(r.Holders[:i], func(o RecoveryHolder) bool { return bytes.Equal(o.KEM, h.KEM) }); j >= 0 {
			return kms.Errorf(kms.Invalid, "custodians %s and %s have the same KEM key", r.Holders[j].Custodian, h.Custodian)
		}
	}
	sites := len(slices.Compact(slices.Sorted(slices.Values(r.HolderSites()))))
	switch {
	case r.Sites < MinRecoverySites || int(r.Sites) > sites:
		return kms.Errorf(kms.Invalid, "shares of %d sites are asked for; it must be at least %d, so that none can recover alone, and no more than the %d sites of the holders", r.Sites, MinRecoverySites, sites)
	case r.Threshold < r.Sites || int(r.Threshold) > len(r.Holders):
		return kms.Errorf(kms.Invalid, "%d shares are asked for; it must be at least %d, one for each site, and no more than the %d holders", r.Threshold, r.Sites, len(r.Holders))
	}
	return nil
}

func (h RecoveryHolder) validate() error {
	if err := kms.CheckName("custodian", h.Custodian); err != nil {
		return err
	}
	if err := kms.CheckName("site", h.Site); err != nil {
		return err
	}
	if _, err := pqc.ParsePublicKey(pqc.SuiteID(h.Suite), h.KEM); err != nil || len(h.KEM) > MaxRootKey {
		return kms.Wrap(kms.Invalid, err, "the KEM key of custodian "+h.Custodian+" is not one of suite "+pqc.SuiteID(h.Suite).String(), "")
	}
	switch {
	case len(h.Credential) > kms.MaxText || len(h.Possession) == 0 || len(h.Possession) > maxSealedShare:
		return kms.Errorf(kms.Invalid, "custodian %s: the signature over the KEM key is missing or too long", h.Custodian)
	case len(h.Sealed) == 0 || len(h.Sealed) > maxSealedShare || len(h.Commitment) != sha256.Size:
		return kms.Errorf(kms.Invalid, "custodian %s: the sealed share or its commitment does not have the right length", h.Custodian)
	}
	return nil
}

func sortedNames(what string, l []string) error {
	if len(l) == 0 || len(l) > 32 {
		return kms.Errorf(kms.Invalid, "there are %d entries of %s; there must be 1 to 32", len(l), what)
	}
	for i, s := range l {
		if err := kms.CheckName(what, s); err != nil {
			return err
		}
		if i > 0 && l[i-1] >= s {
			return kms.Errorf(kms.Invalid, "%s %q: the list is not sorted or repeats it", what, s)
		}
	}
	return nil
}
