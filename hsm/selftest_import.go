package hsm

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"

	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/miekg/pkcs11"
)

// knownMAC is an HMAC-SHA-256 case with a 32-byte key.
type knownMAC struct {
	key, message []byte
	mac          string
}

// knownMACs are test cases 1 and 6 of RFC 4231 with the equivalent 32-byte keys
// (RFC 2104 section 2): a short key padded with zeros, a long one hashed.
func knownMACs() []knownMAC {
	long := sha256.Sum256(bytes.Repeat([]byte{0xaa}, 131))
	return []knownMAC{
		{append(bytes.Repeat([]byte{0x0b}, 20), make([]byte, 12)...), []byte("Hi There"),
			"b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"},
		{long[:], []byte("Test Using Larger Than Block-Size Key - Hash Key First"),
			"60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"},
	}
}

// testImport finds out how the token imports keys and shows that it does so
// correctly. A token that cannot does without protection level hardware.
func (d *Device) testImport(ctx context.Context) error {
	p, err := call(ctx, d, callOptions{op: "self test of import"}, func(s *session) (*importProfile, error) { return s.probeImport() })
	if errors.Is(err, ErrUnsupported) {
		d.noImports = err.Error()
		return nil
	}
	if err != nil {
		return err
	}
	d.imports = p
	if err := d.testLoaded(ctx); err != nil {
		return err
	}
	if err := d.testGenerated(ctx); err != nil {
		return err
	}
	return d.testScaling(ctx)
}

// probeImport tries the ways to import a key, best first.
func (s *session) probeImport() (*importProfile, error) {
	point, err := s.point(s.keys.agreementPub)
	if err != nil {
		return nil, err
	}
	key, err := s.curve.ecdh.NewPublicKey(point)
	if err != nil {
		return nil, unsafef("the agreement key's public point is not on %s", s.curve.name)
	}
	if err := s.supports(pkcs11.CKM_SHA256_HMAC, pkcs11.CKF_SIGN); err != nil {
		return nil, err
	}
	last := fmt.Errorf("%w: AES key wrap with padding", ErrUnsupported)
	for _, mech := range []uint{ckmAESKeyWrapKWP, pkcs11.CKM_AES_KEY_WRAP_PAD} {
		if s.supports(mech, pkcs11.CKF_UNWRAP) != nil {
			continue
		}
		for _, k := range []kdf{kdfSHA256, kdfNull} {
			for _, dl := range []dialect{{true, true}, {false, true}, {true, false}, {false, false}} {
				p := importProfile{mech: mech, kdf: k, dialect: dl}
				err := s.tryImport(recipient{k, key}, p)
				if err == nil {
					p.signers = s.trySigner(recipient{k, key}, p) == nil
					if p.generates, err = s.probeGenerate(p); err != nil {
						return nil, err
					}
					return &p, nil
				}
				if isLost(err) || errors.Is(err, ErrUnsafeToken) {
					return nil, err
				}
				last = fmt.Errorf("%w: import: %w", ErrUnsupported, err)
			}
		}
	}
	return nil, last
}

func (s *session) supports(mech, flags uint) error {
	mi, err := s.p11.GetMechanismInfo(s.slot, []*pkcs11.Mechanism{pkcs11.NewMechanism(mech, nil)})
	if err != nil {
		return fmt.Errorf("%w: mechanism %#x: %w", ErrUnsupported, mech, err)
	}
	if mi.Flags&flags != flags {
		return fmt.Errorf("%w: mechanism %#x", ErrUnsupported, mech)
	}
	return nil
}

// tryImport imports a known key and uses it.
func (s *session) tryImport(to recipient, p importProfile) error {
	known := knownMACs()[0]
	h, err := s.loadPlain(to, p, materialHMAC, known.key)
	if err != nil {
		return err
	}
	defer s.destroy([]pkcs11.ObjectHandle{h})
	got, err := s.hmac(h, known.message)
	if err != nil {
		return err
	}
	if hex.EncodeToString(got) != known.mac {
		return unsafef("self test: HMAC with an imported key is not that of RFC 4231")
	}
	return nil
}

// trySigner imports a private key; whether it signs rightly is testLoaded's.
func (s *session) trySigner(to recipient, p importProfile) error {
	key, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	h, err := s.loadPlain(to, p, materialP256, key.Bytes())
	if err == nil {
		s.destroy([]pkcs11.ObjectHandle{h})
	}
	return err
}

// loadPlain wraps test material for the device and loads it.
func (s *session) loadPlain(to recipient, p importProfile, m material, plain []byte) (pkcs11.ObjectHandle, error) {
	held, err := secret.Copy(plain)
	if err != nil {
		return 0, unavailablef("%v", err)
	}
	defer held.Destroy()
	var blob []byte
	if m == materialHMAC {
		blob, err = WrapHMAC(to.bytes(), held, []byte("self test"))
	} else {
		crv, e := m.curve()
		if e != nil {
			return 0, e
		}
		blob, err = WrapSigner(to.bytes(), crv.ecdh, held, []byte("self test"))
	}
	if err != nil {
		return 0, err
	}
	in, err := parseImport(blob, s.curve)
	if err != nil {
		return 0, err
	}
	return s.load(in, p, stays)
}

// testLoaded goes the way of a user: known MACs, signatures verified in Go, an
// altered blob refused.
func (d *Device) testLoaded(ctx context.Context) error {
	_, public := d.ImportKey()
	for _, known := range knownMACs() {
		if err := d.testKnownMAC(ctx, public, known); err != nil {
			return err
		}
	}
	if !d.imports.signers {
		return nil
	}
	for _, c := range []ecdh.Curve{ecdh.P256(), ecdh.P384()} {
		if err := d.testLoadedSigner(ctx, public, c); err != nil {
			return err
		}
	}
	return nil
}

func (d *Device) testKnownMAC(ctx context.Context, public []byte, known knownMAC) error {
	key, err := secret.Copy(known.key)
	if err != nil {
		return unavailablef("%v", err)
	}
	defer key.Destroy()
	blob, err := WrapHMAC(public, key, nil)
	if err != nil {
		return err
	}
	mac, unload, err := d.LoadHMAC(ctx, blob)
	if err != nil {
		return err
	}
	defer unload()
	got, err := mac(ctx, known.message)
	if err != nil {
		return err
	}
	if want, err := hex.DecodeString(known.mac); err != nil || !hmac.Equal(got, want) {
		return unsafef("self test: HMAC with an imported key is not that of RFC 4231")
	}
	blob[len(blob)-1] ^= 1
	if _, unload, err := d.LoadHMAC(ctx, blob); err == nil {
		unload()
		return unsafef("self test: the token imports an altered key blob")
	} else if !errors.Is(err, ErrInvalid) {
		return err
	}
	return nil
}

func (d *Device) testLoadedSigner(ctx context.Context, public []byte, c ecdh.Curve) error {
	crv, err := curveOf(c)
	if err != nil {
		return err
	}
	key, err := c.GenerateKey(rand.Reader)
	if err != nil {
		return unavailablef("%v", err)
	}
	scalar, err := secret.Move(key.Bytes())
	if err != nil {
		return unavailablef("%v", err)
	}
	defer scalar.Destroy()
	blob, err := WrapSigner(public, c, scalar, nil)
	if err != nil {
		return err
	}
	sign, unload, err := d.LoadSigner(ctx, c, blob)
	if err != nil {
		return err
	}
	defer unload()
	digest := bytes.Repeat([]byte{0x5a}, crv.digest)
	sig, err := sign(ctx, digest)
	if err != nil {
		return err
	}
	pub, err := ecdsa.ParseUncompressedPublicKey(crv.ec, key.PublicKey().Bytes())
	if err != nil {
		return unavailablef("%v", err)
	}
	if !ecdsa.Verify(pub, digest, new(big.Int).SetBytes(sig[:crv.size]), new(big.Int).SetBytes(sig[crv.size:])) {
		return unsafef("self test: a signature of an imported key does not verify")
	}
	return nil
}
