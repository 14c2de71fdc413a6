package hsm

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"math/big"

	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/miekg/pkcs11"
)

// MaxRecipients bounds the devices that a key is wrapped for in one call.
const MaxRecipients = 256

// generation is what a token makes and wraps by itself, found out at Open.
type generation struct {
	hmac, signer bool
	p256, p384   material // the forms that the token writes
}

// form is how the token writes a key of this kind.
func (g generation) form(m material) material {
	switch m.bare() {
	case materialP256:
		return g.p256
	case materialP384:
		return g.p384
	}
	return m
}

// Roles of the session objects that generation needs besides the key itself.
var (
	wrapperRole   = role{"wrapping transport", 0, pkcs11.CKO_SECRET_KEY, pkcs11.CKK_AES, 0, []uint{pkcs11.CKA_WRAP}, nil}
	ephemeralRole = role{"ephemeral", pkcs11.CKM_ECDH1_DERIVE, pkcs11.CKO_PRIVATE_KEY, pkcs11.CKK_EC, 0, []uint{pkcs11.CKA_DERIVE}, nil}
)

// Generates says which keys this token generates and wraps for devices of its own
// import kind without the key ever being outside of it. For a recipient that asks for
// a key derivation function that this token has not, GenerateHMAC, GenerateSigner and
// Rewrap return ErrUnsupported all the same.
func (d *Device) Generates() (hmac, signer bool) {
	if d.imports == nil {
		return false, false
	}
	return d.imports.generates.hmac, d.imports.generates.signer
}

// GenerateHMAC makes a 32-byte HMAC-SHA-256 key in the token and wraps it there for
// every recipient, 1 to MaxRecipients public keys of ImportKey of this kind; blobs
// are in their order, each what LoadHMAC of that device opens. mac and unload are
// those of LoadHMAC. The object that could be wrapped is destroyed before the call
// returns, or goes with its session; what mac uses cannot leave the token. Errors:
// ErrInvalid for a recipient, ErrUnsupported, ErrUnavailable, ErrUnsafeToken.
func (d *Device) GenerateHMAC(ctx context.Context, recipients [][]byte) (blobs [][]byte, mac func(ctx context.Context, message []byte) ([]byte, error), unload func(), err error) {
	if hmac, _ := d.Generates(); !hmac {
		return nil, nil, nil, fmt.Errorf("%w: this token does not wrap HMAC keys that it generated", ErrUnsupported)
	}
	made, err := d.generate(ctx, materialHMAC, recipients)
	if err != nil {
		return nil, nil, nil, err
	}
	defer secret.Wipe(made.proof)
	mac, unload, err = d.LoadHMAC(ctx, made.own)
	if err != nil {
		return nil, nil, nil, err
	}
	again, err := mac(ctx, generatedProbe)
	if err == nil && !bytes.Equal(again, made.proof) {
		err = unsafef("a generated HMAC key comes back from its wrapping as another")
	}
	if err != nil {
		unload()
		return nil, nil, nil, err
	}
	return made.blobs, mac, unload, nil
}

// GenerateSigner is GenerateHMAC for an ECDSA key on ecdh.P256() or ecdh.P384(): its
// blobs are for LoadSigner, sign is that of LoadSigner, public its public key.
func (d *Device) GenerateSigner(ctx context.Context, c ecdh.Curve, recipients [][]byte) (blobs [][]byte, public *ecdsa.PublicKey, sign func(ctx context.Context, digest []byte) ([]byte, error), unload func(), err error) {
	m, _, err := signerOf(c)
	if err != nil {
		return nil, nil, nil, nil, err
	}
	if _, signer := d.Generates(); !signer {
		return nil, nil, nil, nil, fmt.Errorf("%w: this token does not wrap EC private keys that it generated", ErrUnsupported)
	}
	crv, err := m.curve()
	if err != nil {
		return nil, nil, nil, nil, err
	}
	made, err := d.generate(ctx, m, recipients)
	if err != nil {
		return nil, nil, nil, nil, err
	}
	if public, err = ecdsa.ParseUncompressedPublicKey(crv.ec, made.proof); err != nil {
		return nil, nil, nil, nil, unsafef("the public key of a generated key is not on %s", crv.name)
	}
	sign, unload, err = d.LoadSigner(ctx, c, made.own)
	if err != nil {
		return nil, nil, nil, nil, err
	}
	digest := bytes.Repeat([]byte{0x5a}, crv.digest)
	sig, err := sign(ctx, digest)
	if err == nil && !ecdsa.Verify(public, digest, new(big.Int).SetBytes(sig[:crv.size]), new(big.Int).SetBytes(sig[crv.size:])) {
		err = unsafef("a generated signing key comes back from its wrapping as another")
	}
	if err != nil {
		unload()
		return nil, nil, nil, nil, err
	}
	return made.blobs, public, sign, unload, nil
}

// Rewrap opens a blob of this device inside the token and wraps the key there for
// another device of the same kind, whose ImportKey returned recipient. The key is in
// the token only, as an object that goes with the call. Errors: ErrInvalid for a blob
// that does not open or a recipient of another kind, ErrUnsupported, ErrUnavailable.
func (d *Device) Rewrap(ctx context.Context, blob []byte, recipient []byte) ([]byte, error) {
	in, err := d.checkImport(blob)
	if err != nil {
		return nil, err
	}
	to, err := d.recipients([][]byte{recipient})
	if err != nil {
		return nil, err
	}
	if g := d.imports.generates; in.material == materialHMAC && !g.hmac || in.material != materialHMAC && !g.signer {
		return nil, fmt.Errorf("%w: this token does not wrap again what it has unwrapped", ErrUnsupported)
	}
	return call(ctx, d, callOptions{op: "rewrap", own: true}, func(s *session) (out []byte, err error) {
		h, err := s.load(in, *d.imports, wraps)
		if err != nil {
			return nil, d.importError(err)
		}
		defer s.discard(&err, h)
		if in.material == materialHMAC { // a short key shows itself here, as in LoadHMAC
			got, err := s.hmac(h, nil)
			if isRV(err, pkcs11.CKR_KEY_SIZE_RANGE) {
				return nil, errImport
			}
			if err != nil {
				return nil, err
			}
			secret.Wipe(got)
		}
		return s.wrapInside(h, d.imports.generates.form(in.material), to[0], *d.imports)
	})
}

// recipients parses the import keys and refuses a derivation that the token lacks.
func (d *Device) recipients(public [][]byte) ([]recipient, error) {
	if len(public) == 0 || len(public) > MaxRecipients {
		return nil, invalidf("a key is wrapped for 1 to %d devices, not for %d", MaxRecipients, len(public))
	}
	var all []recipient
	for _, b := range public {
		r, err := parseRecipient(b)
		if err != nil {
			return nil, err
		}
		if r.kdf != kdfNull && r.kdf != d.imports.kdf {
			return nil, fmt.Errorf("%w: a recipient takes keys by CKD_SHA256_KDF, which this token has not", ErrUnsupported)
		}
		all = append(all, r)
	}
	return all, nil
}

// generated is a new key, wrapped.
type generated struct {
	blobs [][]byte
	own   []byte // for this device
	proof []byte // MAC of generatedProbe, or the public point
}

var generatedProbe = []byte("conclave hsm generated key")

// generate makes a key and wraps it for all and for this device.
func (d *Device) generate(ctx context.Context, m material, public [][]byte) (generated, error) {
	to, err := d.recipients(public)
	if err != nil {
		return generated{}, err
	}
	_, own := d.ImportKey()
	form := d.imports.generates.form(m)
	return call(ctx, d, callOptions{op: "generate", own: true}, func(s *session) (g generated, err error) {
		h, proof, err := s.generateKey(m, *d.imports)
		if err != nil {
			return g, err
		}
		defer s.discard(&err, h)
		g.proof = proof
		for i, r := range to {
			blob, err := s.wrapInside(h, form, r, *d.imports)
			if err != nil {
				return generated{}, err
			}
			g.blobs = append(g.blobs, blob)
			if bytes.Equal(public[i], own) {
				g.own = blob
			}
		}
		if g.own == nil {
			g.own, err = s.wrapInside(h, form, recipient{d.imports.kdf, d.agreement}, *d.imports)
		}
		return g, err
	})
}

// generateKey makes the object that leaves the token wrapped, and what proves that
// it is the same key later.
func (s *session) generateKey(m material, p importProfile) (h pkcs11.ObjectHandle, proof []byte, err error) {
	if m != materialHMAC {
		return s.generatePair(m, p)
	}
	h, err = s.p11.GenerateKey(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_GENERIC_SECRET_KEY_GEN, nil)},
		hmacRole.sessionTemplate(p.dialect, wraps, pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, HMACKey)))
	if err != nil {
		return 0, nil, fmt.Errorf("C_GenerateKey: %w", err)
	}
	if err = s.checkLoaded(m, h, p.dialect, wraps); err == nil {
		proof, err = s.hmac(h, generatedProbe)
	}
	if err != nil {
		s.discard(&err, h)
		return 0, nil, err
	}
	return h, proof, nil
}

func (s *session) generatePair(m material, p importProfile) (h pkcs11.ObjectHandle, point []byte, err error) {
	crv, err := m.curve()
	if err != nil {
		return 0, nil, err
	}
	h, point, err = s.pair(signerRole, crv, p.dialect, wraps)
	if err != nil {
		return 0, nil, err
	}
	if err = s.checkLoaded(m, h, p.dialect, wraps); err != nil {
		s.discard(&err, h)
		return 0, nil, err
	}
	return h, point, nil
}

// pair makes a session key pair and destroys its public object.
func (s *session) pair(r role, crv curve, dl dialect, leaves exit) (h pkcs11.ObjectHandle, point []byte, err error) {
	pubT := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, r.keyType),
		pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, crv.oid),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false),
	}
	for _, u := range publicUses {
		pubT = append(pubT, pkcs11.NewAttribute(u, u == pkcs11.CKA_VERIFY && contains(r.may, pkcs11.CKA_SIGN)))
	}
	pub, h, err := s.p11.GenerateKeyPair(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)},
		pubT, r.sessionTemplate(dl, leaves))
	if err != nil {
		return 0, nil, fmt.Errorf("C_GenerateKeyPair: %w", err)
	}
	v, err := s.attribute(pub, pkcs11.CKA_EC_POINT)
	if err == nil {
		point, err = decodePoint(v, crv)
	}
	s.discard(&err, pub)
	if err != nil {
		s.discard(&err, h)
		return 0, nil, err
	}
	return h, point, nil
}

// discard destroys session objects on the way out. One that stays is an error:
// the session is then closed, and takes it along.
func (s *session) discard(err *error, handles ...pkcs11.ObjectHandle) {
	for _, h := range handles {
		if e := s.p11.DestroyObject(s.h, h); e != nil {
			*err = errors.Join(*err, fmt.Errorf("C_DestroyObject: %w", e))
		}
	}
}

// wrapInside wraps an object for a device, all of it in the token: an ephemeral key
// pair, the AES key from it that may wrap and nothing else, C_WrapKey. What the
// token writes must have the length of the form.
func (s *session) wrapInside(key pkcs11.ObjectHandle, form material, to recipient, p importProfile) (blob []byte, err error) {
	crv, err := curveOf(to.key.Curve())
	if err == nil && s.hook != nil {
		err = s.hook("wrap inside")
	}
	if err != nil {
		return nil, err
	}
	eph, point, err := s.pair(ephemeralRole, crv, p.dialect, stays)
	if err != nil {
		return nil, err
	}
	in := imported{material: form, kdf: to.kdf, point: point, header: []byte{importVersion, byte(form), byte(to.kdf), 0}}
	aes, err := s.deriveWrapper(eph, in, to.key, p)
	s.discard(&err, eph)
	if err != nil {
		return nil, err
	}
	defer s.discard(&err, aes)
	if in.wrapped, err = s.p11.WrapKey(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(p.mech, nil)}, aes, key); err != nil {
		return nil, fmt.Errorf("C_WrapKey: %w", err)
	}
	if len(in.wrapped) != form.wrappedSize() {
		return nil, fmt.Errorf("%w: C_WrapKey returned %d bytes instead of %d", errForm, len(in.wrapped), form.wrappedSize())
	}
	return in.bytes(), nil
}

// errForm marks a token that writes a key in another form than was expected.
var errForm = fmt.Errorf("%w: the token writes a key in a form that is not known here", ErrUnsupported)

// deriveWrapper derives the AES-256 key that may wrap and nothing else.
func (s *session) deriveWrapper(eph pkcs11.ObjectHandle, in imported, to *ecdh.PublicKey, p importProfile) (pkcs11.ObjectHandle, error) {
	ckd := uint(pkcs11.CKD_NULL)
	if in.kdf == kdfSHA256 {
		ckd = ckdSHA256KDF
	}
	r := wrapperRole
	r.mech = p.mech
	h, err := s.p11.DeriveKey(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDH1_DERIVE,
		pkcs11.NewECDH1DeriveParams(ckd, in.sharedInfo(), to.Bytes()))}, eph,
		r.sessionTemplate(p.dialect, stays, pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, kekSize)))
	if err != nil {
		return 0, fmt.Errorf("C_DeriveKey: %w", err)
	}
	return h, nil
}
