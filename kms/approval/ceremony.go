package approval

import (
	"crypto/sha256"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/pqc"
)

// Ceremony is what a recovery ceremony is for, exactly as the custodians sign it who
// contribute their shares: which hardware roots are to get the lost KEKs, and the
// coordinator's keys, made for this ceremony alone and wiped after it.
type Ceremony struct {
	Domain     string              `cbor:"domain" json:"domain"`   // CeremonyDomain
	Cluster    string              `cbor:"cluster" json:"cluster"` // kms.ClusterID
	Recovery   string              `cbor:"recovery" json:"recovery"`
	Number     uint64              `cbor:"number" json:"number"` // of the recovery key of that name
	Nonce      []byte              `cbor:"nonce" json:"nonce"`   // 16 bytes
	Created    int64               `cbor:"created" json:"created"`
	Expires    int64               `cbor:"expires" json:"expires"`
	Reason     string              `cbor:"reason" json:"reason"`
	Suite      uint16              `cbor:"suite" json:"suite"`     // KEM suite
	KEM        []byte              `cbor:"kem" json:"kem"`         // to which shares are sealed again
	Signing    []byte              `cbor:"signing" json:"signing"` // hybrid key that signs what came out
	Recipients []CeremonyRecipient `cbor:"recipients" json:"recipients"`
}

// CeremonyRecipient is the next hardware root of a node.
type CeremonyRecipient struct {
	Node      string `cbor:"node" json:"node"`
	Root      uint32 `cbor:"root" json:"root"`
	Agreement []byte `cbor:"agreement" json:"agreement"` // SHA-256 of its agreement key
}

// Contribution is one custodian's share, sealed to the ceremony's key, and the
// signature over ContributionMessage.
type Contribution struct {
	Ceremony   string `cbor:"ceremony" json:"ceremony"` // Ceremony.ID
	Custodian  string `cbor:"custodian" json:"custodian"`
	Credential string `cbor:"credential" json:"credential"`
	Sealed     []byte `cbor:"sealed" json:"sealed"`
	Signature  []byte `cbor:"signature" json:"signature"`
}

// Consent is a contribution without the share: what every replica checks.
type Consent struct {
	Custodian  string `cbor:"custodian" json:"custodian"`
	Credential string `cbor:"credential" json:"credential"`
	Share      []byte `cbor:"share" json:"share"` // SHA-256 of the sealed share
	Signature  []byte `cbor:"signature" json:"signature"`
}

// Domains and signature contexts of ceremonies.
const (
	CeremonyDomain      = "conclave/ceremony/v1"
	ContributionContext = "conclave/contribution/v1"
	RestoredContext     = "conclave/restored/v1"

	MaxCeremony         = 64 << 10                // bytes of its encoding
	MaxCeremonyLifetime = int64(7 * 24 * 3600000) // milliseconds
)

// Marshal returns the bytes that custodians sign.
func (c Ceremony) Marshal() []byte { return canon.Marshal(c) }

// ParseCeremony decodes exactly what Marshal writes and validates it. Errors:
// kms.Invalid, kms.TooLarge.
func ParseCeremony(b []byte) (c Ceremony, err error) {
	if len(b) > MaxCeremony {
		return c, kms.Errorf(kms.TooLarge, "the ceremony has %d bytes; the limit is %d", len(b), MaxCeremony)
	}
	if err := canon.Unmarshal(b, &c); err != nil {
		return Ceremony{}, kms.Wrap(kms.Invalid, err, "the ceremony is not in canonical form", "")
	}
	return c, c.Validate()
}

// Validate checks the shape. Errors: kms.Invalid.
func (c Ceremony) Validate() error {
	bad := func(format string, args ...any) error {
		return kms.Errorf(kms.Invalid, "ceremony: "+format, args...)
	}
	switch {
	case c.Domain != CeremonyDomain || !isHex128(c.Cluster) || len(c.Nonce) != NonceSize || c.Number == 0:
		return bad("the domain, cluster, nonce or number is not right")
	case c.Created <= 0 || c.Expires <= c.Created || c.Expires > maxTime || c.Expires-c.Created > MaxCeremonyLifetime:
		return bad("it must expire after it was created, and within 7 days")
	case len(c.KEM) > MaxRootKey || len(c.Signing) > MaxRootKey:
		return bad("a key is too long")
	case len(c.Recipients) == 0 || len(c.Recipients) > 128:
		return bad("there are %d recipients", len(c.Recipients))
	}
	if err := kms.CheckName("recovery key", c.Recovery); err != nil {
		return bad("%v", err)
	}
	if err := checkReason(c.Reason); err != nil {
		return bad("%v", err)
	}
	if _, err := pqc.ParsePublicKey(pqc.SuiteID(c.Suite), c.KEM); err != nil {
		return kms.Wrap(kms.Invalid, err, "ceremony: its key is not one of suite "+pqc.SuiteID(c.Suite).String(), "")
	}
	if s, _ := pqc.Lookup(pqc.MLDSA65Ed25519); len(c.Signing) != s.PublicKeySize {
		return bad("its signing key has the wrong length")
	}
	for i, r := range c.Recipients {
		if err := kms.CheckName("node", r.Node); err != nil {
			return bad("%v", err)
		}
		if r.Root == 0 || len(r.Agreement) != sha256.Size || i > 0 && c.Recipients[i-1].Node >= r.Node {
			return bad("the recipients are not sorted, repeat a node, or name no root")
		}
	}
	return nil
}

// ID identifies the ceremony: 32 hexadecimal digits from SHA-256 over its bytes.
func (c Ceremony) ID() string { return ProposalID(c.Marshal()) }

// Recipient returns the recipient that is a node.
func (c Ceremony) Recipient(node string) (CeremonyRecipient, bool) {
	for _, r := range c.Recipients {
		if r.Node == node {
			return r, true
		}
	}
	return CeremonyRecipient{}, false
}

// ContributionMessage returns what a custodian signs in the context
// ContributionContext: the ceremony's exact bytes and SHA-256 of the sealed share.
func ContributionMessage(ceremony []byte, custodian string, share []byte) []byte {
	return canon.Marshal(struct {
		Ceremony  []byte `cbor:"ceremony"`
		Custodian string `cbor:"custodian"`
		Share     []byte `cbor:"share"`
	}{ceremony, custodian, share})
}

// Consent returns the contribution without the share.
func (c Contribution) Consent() Consent {
	sum := sha256.Sum256(c.Sealed)
	return Consent{Custodian: c.Custodian, Credential: c.Credential, Share: sum[:], Signature: c.Signature}
}

// Verify checks that custodian c, the record in force, has consented to a ceremony,
// given as its exact bytes. Errors: kms.Denied, kms.Invalid, kms.BadSignature.
func (s Consent) Verify(c Custodian, ceremony []byte) error {
	if s.Custodian == "" || s.Custodian != c.ID || len(s.Share) != sha256.Size {
		return kms.Errorf(kms.Invalid, "the contribution is not one of custodian %q", c.ID)
	}
	return verifyCredential(c, s.Credential, ContributionMessage(ceremony, s.Custodian, s.Share), ContributionContext, s.Signature,
		"this contribution to this ceremony", "contribute to the ceremony's exact bytes: conclave ceremony contribute")
}

// RestoredMessage returns what the ceremony's key signs in the context
// RestoredContext: the ceremony's exact bytes and one copy that came out of it.
func RestoredMessage(ceremony []byte, node string, root uint32, keyring string, version uint32, sealed []byte) []byte {
	return canon.Marshal(struct {
		Ceremony []byte `cbor:"ceremony"`
		Node     string `cbor:"node"`
		Root     uint32 `cbor:"root"`
		Keyring  string `cbor:"keyring"`
		Version  uint32 `cbor:"version"`
		Sealed   []byte `cbor:"sealed"`
	}{ceremony, node, root, keyring, version, sealed})
}
