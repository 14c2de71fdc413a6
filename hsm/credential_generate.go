package hsm

import (
	"context"
	"crypto/ecdh"
	"fmt"

	"github.com/miekg/pkcs11"
)

// GenerateCredential makes an EC key in the token for a custodian: sensitive, never
// extractable, for signatures alone; each with the PIN where askEachTime says so. The
// URI names the object and the id that it gets, which no other key may have. curve is
// ecdh.P384() (nil) or ecdh.P256(). Tokens that keep to PIV want their maker's tool
// instead. Errors: as OpenCredential, and ErrProvisioned.
func GenerateCredential(ctx context.Context, cfg CredentialConfig, on ecdh.Curve, askEachTime bool) (*Credential, error) {
	crv, err := curveOf(on)
	if err != nil {
		return nil, err
	}
	return openCredential(ctx, cfg, func(c *Credential, u *CredentialURI) error {
		if u.Object == "" || u.ID == "" {
			return invalidf("PKCS#11 URI names no object and id for the new key")
		}
		same, err := c.s.find([]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_ID, []byte(u.ID))})
		if err != nil {
			return err
		}
		if len(same) > 0 {
			return fmt.Errorf("%w: the token holds %d objects of that id", ErrProvisioned, len(same))
		}
		public := []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true),
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, u.Object), pkcs11.NewAttribute(pkcs11.CKA_ID, []byte(u.ID)),
			pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, crv.oid),
		}
		private := []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
			pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
			pkcs11.NewAttribute(pkcs11.CKA_SIGN, true), pkcs11.NewAttribute(pkcs11.CKA_DERIVE, false),
			pkcs11.NewAttribute(pkcs11.CKA_UNWRAP, false), pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, false),
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, u.Object), pkcs11.NewAttribute(pkcs11.CKA_ID, []byte(u.ID)),
		}
		if askEachTime {
			private = append(private, pkcs11.NewAttribute(pkcs11.CKA_ALWAYS_AUTHENTICATE, true))
		}
		mech := []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)}
		if _, _, err := c.s.p11.GenerateKeyPair(c.s.h, mech, public, private); err != nil {
			return fmt.Errorf("C_GenerateKeyPair: %w", err)
		}
		if err := c.bind(u); err != nil {
			return err
		}
		if i := c.info; !i.Sensitive || !i.NeverExtractable || i.AlwaysAuthenticate != askEachTime {
			return unsafef("the token made the key with other attributes than were asked for")
		}
		return nil
	})
}
