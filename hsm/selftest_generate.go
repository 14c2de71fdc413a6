package hsm

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/miekg/pkcs11"
	kwp "github.com/tink-crypto/tink-go/v2/kwp/subtle"
)

// probeGenerate finds out what the token generates and wraps by itself. Keys made
// here are for a recipient in software, which can look at them, and for nothing else.
func (s *session) probeGenerate(p importProfile) (g generation, err error) {
	if s.supports(p.mech, pkcs11.CKF_WRAP) != nil || s.supports(pkcs11.CKM_EC_KEY_PAIR_GEN, pkcs11.CKF_GENERATE_KEY_PAIR) != nil {
		return g, nil
	}
	to, err := s.curve.ecdh.GenerateKey(rand.Reader)
	if err != nil {
		return g, unavailablef("%v", err)
	}
	if err := s.tryGenerate(materialHMAC, to, p); err != nil {
		return g, inconclusive(err)
	}
	g.hmac = true
	if !p.signers {
		return g, nil
	}
	if g.p256, err = s.findForm(materialP256, to, p); err == nil {
		g.p384, err = s.findForm(materialP384, to, p)
	}
	g.signer = err == nil
	return g, inconclusive(err)
}

// inconclusive returns an error that says nothing about what the token can do, or
// that it does it wrongly.
func inconclusive(err error) error {
	if isLost(err) || errors.Is(err, ErrUnsafeToken) {
		return err
	}
	return nil
}

// findForm finds out how the token writes a private key.
func (s *session) findForm(m material, to *ecdh.PrivateKey, p importProfile) (material, error) {
	for _, form := range m.forms() {
		err := s.tryGenerate(form, to, p)
		if !errors.Is(err, errForm) {
			return form, err
		}
	}
	return 0, errForm
}

// tryGenerate makes a key, wraps it for a software recipient and compares what the
// recipient gets with what the token has.
func (s *session) tryGenerate(form material, to *ecdh.PrivateKey, p importProfile) (err error) {
	h, proof, err := s.generateKey(form, p)
	if err != nil {
		return err
	}
	defer s.discard(&err, h)
	blob, err := s.wrapInside(h, form, recipient{p.kdf, to.PublicKey()}, p)
	if err != nil {
		return err
	}
	in, err := parseImport(blob, s.curve)
	if err != nil {
		return err
	}
	plain, err := in.open(to)
	if err != nil {
		return err
	}
	defer secret.Wipe(plain)
	if form != materialHMAC {
		return checkScalar(plain, form, proof)
	}
	mac := hmac.New(sha256.New, plain)
	_, _ = mac.Write(generatedProbe)
	if !hmac.Equal(mac.Sum(nil), proof) {
		return unsafef("self test: a generated HMAC key is wrapped as another")
	}
	return nil
}

// checkScalar parses the PKCS#8 of a token strictly and compares the public key.
func checkScalar(der []byte, form material, point []byte) error {
	if len(der) != form.size() {
		return fmt.Errorf("%w: %d bytes instead of %d", errForm, len(der), form.size())
	}
	if form == materialP256Padded {
		n := form.bare().size()
		if !bytes.Equal(der[n:], make([]byte, len(der)-n)) {
			return errForm
		}
		der = der[:n]
	}
	k, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return fmt.Errorf("%w: PKCS#8 that does not parse", errForm)
	}
	ec, ok := k.(interface {
		ECDH() (*ecdh.PrivateKey, error)
	})
	if !ok {
		return fmt.Errorf("%w: PKCS#8 of another kind of key", errForm)
	}
	key, err := ec.ECDH()
	if err != nil || !bytes.Equal(key.PublicKey().Bytes(), point) {
		return unsafef("self test: a generated signing key is wrapped as another")
	}
	return nil
}

// open opens the wrapping in software, with the recipient's private key.
func (in imported) open(to *ecdh.PrivateKey) ([]byte, error) {
	peer, err := to.Curve().NewPublicKey(in.point)
	if err != nil {
		return nil, errImport
	}
	z, err := to.ECDH(peer)
	if err != nil {
		return nil, errImport
	}
	defer secret.Wipe(z)
	kek := in.transport(z)
	defer secret.Wipe(kek)
	box, err := kwp.NewKWP(kek)
	if err != nil {
		return nil, fmt.Errorf("%w: KWP: %w", ErrInvalid, err)
	}
	plain, err := box.Unwrap(in.wrapped)
	if err != nil {
		return nil, errImport
	}
	return plain, nil
}

// testGenerated goes the way of a user.
func (d *Device) testGenerated(ctx context.Context) error {
	_, public := d.ImportKey()
	makesHMAC, makesSigner := d.Generates()
	if makesHMAC {
		blobs, _, unload, err := d.GenerateHMAC(ctx, [][]byte{public})
		if err != nil {
			return err
		}
		unload()
		if _, err := d.Rewrap(ctx, blobs[0], public); err != nil {
			return err
		}
	}
	if makesSigner {
		blobs, _, _, unload, err := d.GenerateSigner(ctx, ecdh.P256(), [][]byte{public})
		if err != nil {
			return err
		}
		unload()
		if _, err := d.Rewrap(ctx, blobs[0], public); err != nil {
			return err
		}
	}
	return nil
}
