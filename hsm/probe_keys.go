package hsm

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1" //nolint:gosec // what a token offers, not what is used
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"fmt"
	"hash"
	"math/big"

	"github.com/miekg/pkcs11"
)

// errNotTried stands for what an earlier trial rules out.
var errNotTried = errors.New("not tried: keys cannot be imported")

// tryKWP imports a known key under one number of AES-KWP, with either KDF.
func (p *prober) tryKWP(mech uint) func(*session) (string, error) {
	return func(s *session) (string, error) {
		if err := s.supports(mech, pkcs11.CKF_UNWRAP); err != nil {
			return "", errors.New("not listed for unwrapping")
		}
		own, _, err := s.peer()
		if err != nil {
			return "", err
		}
		found, last := "", error(nil)
		for _, k := range []struct {
			kdf  kdf
			name string
		}{{kdfSHA256, "CKD_SHA256_KDF"}, {kdfNull, "CKD_NULL"}} {
			err := s.tryImport(recipient{k.kdf, own}, importProfile{mech: mech, kdf: k.kdf, dialect: p.learned().dialect})
			switch {
			case isLost(err):
				return "", err
			case err != nil:
				last = err
			case found == "":
				found = k.name
			default:
				found += ", " + k.name
			}
		}
		if found == "" {
			return "", last
		}
		return "unwraps a known key; KDF " + found, nil
	}
}

// tryImports finds the way in which Open would import keys.
func (p *prober) tryImports(s *session) (string, error) {
	profile, err := s.probeImport()
	if err != nil {
		return "", err
	}
	p.learn(func(l *learned) { l.imports = profile })
	own, _, err := s.peer()
	if err != nil {
		return "", err
	}
	known := knownMACs()[0]
	h, err := s.loadPlain(recipient{profile.kdf, own}, *profile, materialHMAC, known.key)
	if err != nil {
		return "", err
	}
	if v, err := s.attribute(h, pkcs11.CKA_VALUE_LEN); err == nil && string(v) == string(ulong(0)) {
		p.quirk("the length of an unwrapped key reads 0: lengths are checked outside")
	}
	return "MAC of RFC 4231 right, " + profile.describe(), nil
}

func (p importProfile) describe() string {
	kdfs := map[kdf]string{kdfNull: "CKD_NULL", kdfSHA256: "CKD_SHA256_KDF"}
	return fmt.Sprintf("by %#x and %s", p.mech, kdfs[p.kdf])
}

// tryImportSigner imports a known private key and verifies its signature.
func (p *prober) tryImportSigner(m material) func(*session) (string, error) {
	return func(s *session) (string, error) {
		profile := p.learned().imports
		if profile == nil {
			return "", errNotTried
		}
		crv, err := m.curve()
		if err != nil {
			return "", err
		}
		key, err := crv.ecdh.GenerateKey(rand.Reader)
		if err != nil {
			return "", err
		}
		own, _, err := s.peer()
		if err != nil {
			return "", err
		}
		h, err := s.loadPlain(recipient{profile.kdf, own}, *profile, m, key.Bytes())
		if err != nil {
			return "", err
		}
		return s.verifies(crv, h, key.PublicKey().Bytes())
	}
}

// tryBornInside makes a key inside, wraps it inside for a key pair of this process,
// and compares what comes out with what the token has.
func (p *prober) tryBornInside(m material, found string) func(*session) (string, error) {
	return func(s *session) (string, error) {
		profile := p.learned().imports
		if profile == nil {
			return "", errNotTried
		}
		if err := s.supports(profile.mech, pkcs11.CKF_WRAP); err != nil {
			return "", errors.New("AES-KWP is not listed for wrapping")
		}
		to, err := s.curve.ecdh.GenerateKey(rand.Reader)
		if err != nil {
			return "", err
		}
		form := m
		if m == materialHMAC {
			err = s.tryGenerate(m, to, *profile)
		} else {
			form, err = s.findForm(m, to, *profile)
		}
		if err != nil {
			return "", err
		}
		if form != m {
			p.quirk(fmt.Sprintf("C_WrapKey pads an EC private key: %d bytes of PKCS#8 where %d would do; both are taken", form.size(), m.size()))
		}
		return found, nil
	}
}

// tryAttacks runs the attacks of the start-up self test on session keys.
func (p *prober) tryAttacks(s *session) (string, error) {
	imports := p.learned().imports
	if err := s.loadVictims(imports); err != nil {
		return "", err
	}
	all := attacks(imports)
	for _, a := range all {
		worked, err := a.run(s)
		if err != nil {
			return "", fmt.Errorf("inconclusive: %s: %w", a.name, err)
		}
		if worked {
			return "", fmt.Errorf("attack succeeded: %s", a.name)
		}
	}
	return fmt.Sprintf("%d attacks refused", len(all)), nil
}

// tryQuirks looks for what tokens do differently.
func (p *prober) tryQuirks(s *session) (string, error) {
	bare, err := s.p11.GenerateKey(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)},
		[]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false), pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32)})
	if err == nil {
		if v, err := s.attribute(bare, pkcs11.CKA_SENSITIVE); err == nil && len(v) == 1 && v[0] == 0 {
			p.quirk("a template that leaves CKA_SENSITIVE out makes readable keys: every template writes it")
		}
	}
	found := "CKA_EC_POINT in DER"
	if v, err := s.attribute(s.keys.agreementPub, pkcs11.CKA_EC_POINT); err == nil && len(v) == 1+2*s.curve.size {
		found = "CKA_EC_POINT bare"
	}
	_, peer, err := s.peer()
	if err != nil {
		return "", err
	}
	der, err := asn1.Marshal(peer.PublicKey().Bytes())
	if err != nil {
		return "", err
	}
	if h, err := s.derive(s.keys.agreement, der); err == nil {
		s.destroy([]pkcs11.ObjectHandle{h})
		found += ", peer's point bare or in DER"
	} else {
		found += ", peer's point bare"
	}
	return found, nil
}

func tryEd25519(s *session) (string, error) {
	oid, err := asn1.Marshal("edwards25519") // CKA_EC_PARAMS of PKCS#11 3.0: a PrintableString, or an OID
	if err != nil {
		return "", err
	}
	mech := []*pkcs11.Mechanism{pkcs11.NewMechanism(ckmECEdwardsKeyPairGen, nil)}
	private := append(attrs([]flag{{pkcs11.CKA_TOKEN, false}, {pkcs11.CKA_PRIVATE, true}, {pkcs11.CKA_SENSITIVE, true}, {pkcs11.CKA_SIGN, true}}),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, ckkECEdwards))
	var pub, priv pkcs11.ObjectHandle
	for _, params := range [][]byte{oid, {0x06, 0x03, 0x2b, 0x65, 0x70}} {
		pub, priv, err = s.p11.GenerateKeyPair(s.h, mech, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false), pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, params)}, private)
		if err == nil {
			break
		}
	}
	if err != nil {
		return "", fmt.Errorf("C_GenerateKeyPair: %w", err)
	}
	v, err := s.attribute(pub, pkcs11.CKA_EC_POINT)
	if err != nil {
		return "", err
	}
	point := v
	if len(v) == 2+ed25519.PublicKeySize {
		point = v[2:]
	}
	if len(point) != ed25519.PublicKeySize {
		return "", fmt.Errorf("the public key has %d bytes", len(v))
	}
	if err := s.p11.SignInit(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(ckmEdDSA, nil)}, priv); err != nil {
		return "", fmt.Errorf("C_SignInit: %w", err)
	}
	message := []byte("conclave device probe")
	sig, err := s.p11.Sign(s.h, message)
	if err != nil {
		return "", fmt.Errorf("C_Sign: %w", err)
	}
	if !ed25519.Verify(point, message, sig) {
		return "", errors.New("the signature does not verify")
	}
	return "signatures verify in software", nil
}

// tryOAEP decrypts what software encrypted under a fresh RSA-2048 key.
func tryOAEP(hashMech, mgf uint) func(*session) (string, error) {
	return func(s *session) (string, error) {
		pub, priv, err := s.p11.GenerateKeyPair(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, nil)},
			[]*pkcs11.Attribute{
				pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false), pkcs11.NewAttribute(pkcs11.CKA_MODULUS_BITS, 2048),
				pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}),
			},
			attrs([]flag{{pkcs11.CKA_TOKEN, false}, {pkcs11.CKA_PRIVATE, true}, {pkcs11.CKA_SENSITIVE, true}, {pkcs11.CKA_DECRYPT, true}}))
		if err != nil {
			return "", fmt.Errorf("C_GenerateKeyPair: %w", err)
		}
		modulus, err := s.attribute(pub, pkcs11.CKA_MODULUS)
		if err != nil {
			return "", err
		}
		var h hash.Hash = sha256.New()
		if hashMech == pkcs11.CKM_SHA_1 {
			h = sha1.New() //nolint:gosec // see above
		}
		plain := []byte("conclave device probe")
		box, err := rsa.EncryptOAEP(h, rand.Reader, &rsa.PublicKey{N: new(big.Int).SetBytes(modulus), E: 65537}, plain, nil)
		if err != nil {
			return "", err
		}
		params := pkcs11.NewOAEPParams(hashMech, mgf, pkcs11.CKZ_DATA_SPECIFIED, nil)
		if err := s.p11.DecryptInit(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_OAEP, params)}, priv); err != nil {
			return "", fmt.Errorf("C_DecryptInit: %w", err)
		}
		got, err := s.p11.Decrypt(s.h, box)
		if err != nil {
			return "", fmt.Errorf("C_Decrypt: %w", err)
		}
		if string(got) != string(plain) {
			return "", errors.New("decrypts to something else")
		}
		return "decrypts what software encrypted", nil
	}
}
