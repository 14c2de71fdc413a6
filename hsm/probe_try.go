package hsm

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"math/big"

	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/miekg/pkcs11"
)

// Names of trials on which conclusions rest.
const (
	nameImportHMAC     = "import of an HMAC key"
	nameImportP256     = "import of a P-256 key"
	nameImportP384     = "import of a P-384 key"
	nameGenerateHMAC   = "HMAC key born inside"
	nameGenerateSigner = "EC key born inside"
)

// Mechanisms that are only looked at.
const (
	ckmECEdwardsKeyPairGen = 0x1055 // of PKCS#11 3.0
	ckmEdDSA               = 0x1057
	ckkECEdwards           = 0x40
)

// trial is something to be tried on session objects of its own. run returns what
// it found; an error of run is what stood against it.
type trial struct {
	name   string
	mech   uint // 0: none
	use    string
	needed bool
	rw     bool // on a read-write session, see attacks
	bare   bool // without session keys
	run    func(*session) (string, error)
}

// maxHung is after how many trials without an answer the rest is left out.
const maxHung = 2

// functions makes all trials.
func (p *prober) functions(ctx context.Context) error {
	hung := 0
	for _, t := range p.trials() {
		f := ProbeFunction{Name: t.name, Number: t.mech, Use: t.use, Needed: t.needed, Listed: "-"}
		if hung >= maxHung {
			f.Found = "not tried: the device does not answer"
		} else if err := p.try(ctx, t, &f); err != nil {
			if ctx.Err() != nil {
				return err
			}
			f.Found = err.Error()
			hung++
		}
		p.report.Functions = append(p.report.Functions, f)
	}
	return nil
}

// try makes one trial. Its error is the device's failure to answer.
func (p *prober) try(ctx context.Context, t trial, f *ProbeFunction) error {
	type outcome struct {
		listed, found string
		err           error
	}
	o, err := call(ctx, p.d, callOptions{op: t.name, bare: true, rw: t.rw, probe: true}, func(s *session) (o outcome, err error) {
		if t.mech != 0 {
			o.listed = s.listed(t.mech)
		}
		if !t.bare {
			s.keys, o.err = s.temporaryKeys(p.learned().dialect)
		}
		if o.err == nil {
			o.found, o.err = t.run(s)
		}
		if isLost(o.err) {
			return o, o.err // tried once more, on a new session
		}
		return o, nil
	})
	if err != nil {
		return err
	}
	if o.listed != "" {
		f.Listed = o.listed
	}
	f.Works, f.Found = o.err == nil, o.found
	if o.err != nil {
		f.Found = o.err.Error()
	}
	return nil
}

// listed is what C_GetMechanismInfo says of a mechanism.
func (s *session) listed(mech uint) string {
	mi, err := s.p11.GetMechanismInfo(s.slot, []*pkcs11.Mechanism{pkcs11.NewMechanism(mech, nil)})
	switch {
	case isRV(err, pkcs11.CKR_MECHANISM_INVALID):
		return "no"
	case err != nil:
		return err.Error()
	case mi.MinKeySize == 0 && mi.MaxKeySize == 0, mi.MinKeySize > mi.MaxKeySize:
		return "yes"
	}
	return fmt.Sprintf("%d-%d", mi.MinKeySize, mi.MaxKeySize)
}

func (p *prober) trials() []trial {
	return []trial{
		{name: "key generation", mech: pkcs11.CKM_EC_KEY_PAIR_GEN, needed: true, bare: true, use: "the three device keys", run: p.tryGenerate},
		{name: "ECDH, CKD_NULL", mech: mechAgreement, needed: true, use: "opens sealed copies", run: p.tryECDH},
		{name: "ECDH, CKD_SHA256_KDF", mech: mechAgreement, use: "imported keys, before CKD_NULL", run: p.tryKDF},
		{name: "ECDSA", mech: mechSigning, needed: true, use: "signs as the node", run: p.tryECDSA},
		{name: "AES-GCM", mech: mechWrapping, needed: true, use: "keeps the ML-KEM seed", run: p.tryGCM},
		{name: "random numbers", needed: true, bare: true, use: "seeds and keys, XOR the system's", run: p.tryRandom},
		{name: "AES-KWP, PKCS#11 3.0", mech: ckmAESKeyWrapKWP, use: "imported keys, first choice", run: p.tryKWP(ckmAESKeyWrapKWP)},
		{name: "AES-KWP, older number", mech: pkcs11.CKM_AES_KEY_WRAP_PAD, use: "imported keys, second choice", run: p.tryKWP(pkcs11.CKM_AES_KEY_WRAP_PAD)},
		{name: nameImportHMAC, mech: pkcs11.CKM_SHA256_HMAC, use: "encrypt and mac keys, level hardware", run: p.tryImports},
		{name: nameImportP256, mech: pkcs11.CKM_ECDSA, use: "ecdsa-p256 keys, level hardware", run: p.tryImportSigner(materialP256)},
		{name: nameImportP384, mech: pkcs11.CKM_ECDSA, use: "ecdsa-p384 keys, level hardware", run: p.tryImportSigner(materialP384)},
		{name: nameGenerateHMAC, mech: pkcs11.CKM_GENERIC_SECRET_KEY_GEN, use: "new encrypt and mac keys, level hardware", run: p.tryBornInside(materialHMAC, "wrapped inside, software opens the same key")},
		{name: nameGenerateSigner, mech: pkcs11.CKM_EC_KEY_PAIR_GEN, use: "new ecdsa keys, level hardware", run: p.tryBornInside(materialP256, "wrapped inside, software opens the same key")},
		{name: "refusal of known attacks", needed: true, rw: true, use: "start-up self test", run: p.tryAttacks},
		{name: "encodings and defaults", use: "templates", run: p.tryQuirks},
		{name: "Ed25519", mech: ckmEdDSA, bare: true, use: "none: level hardware has ecdsa", run: tryEd25519},
		{name: "RSA-OAEP, SHA-1", mech: pkcs11.CKM_RSA_PKCS_OAEP, bare: true, use: "none", run: tryOAEP(pkcs11.CKM_SHA_1, pkcs11.CKG_MGF1_SHA1)},
		{name: "RSA-OAEP, SHA-256", mech: pkcs11.CKM_RSA_PKCS_OAEP, bare: true, use: "none", run: tryOAEP(pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256)},
	}
}

// probeLabel is the prefix of temporary keys: all sessions of the process see them,
// so it must not be that of device keys, which Config.Label bounds to 20 characters.
const probeLabel = "conclave temporary keys of a probe"

// temporaryKeys makes the three device keys as session objects.
func (s *session) temporaryKeys(dl dialect) (h handles, err error) {
	for _, k := range []struct {
		r         role
		pub, priv *pkcs11.ObjectHandle
	}{{agreementRole, &h.agreementPub, &h.agreement}, {signingRole, &h.signingPub, &h.signing}, {wrappingRole, nil, &h.wrapping}} {
		pub, priv := k.r.templates(probeLabel, s.curve, dl)
		mech := []*pkcs11.Mechanism{pkcs11.NewMechanism(k.r.generate, nil)}
		if k.pub == nil {
			if *k.priv, err = s.p11.GenerateKey(s.h, mech, temporary(priv)); err != nil {
				return h, fmt.Errorf("C_GenerateKey: %w", err)
			}
			continue
		}
		if *k.pub, *k.priv, err = s.p11.GenerateKeyPair(s.h, mech, temporary(pub), temporary(priv)); err != nil {
			return h, fmt.Errorf("C_GenerateKeyPair: %w", err)
		}
	}
	return h, nil
}

func (p *prober) tryGenerate(s *session) (string, error) {
	dl, err := s.rehearse(probeLabel, role.templates)
	if err != nil {
		return "", err
	}
	p.learn(func(l *learned) { l.dialect = dl })
	if s.keys, err = s.temporaryKeys(dl); err != nil {
		return "", err
	}
	for _, k := range []struct {
		r role
		h pkcs11.ObjectHandle
	}{{agreementRole, s.keys.agreement}, {signingRole, s.keys.signing}, {wrappingRole, s.keys.wrapping}} {
		for _, f := range append(k.r.sessionFlags(stays), historyFlags...) {
			v, err := s.attribute(k.h, f.typ)
			if f.typ == pkcs11.CKA_SIGN_RECOVER && isRV(err, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID) {
				continue
			}
			if err != nil {
				return "", err
			}
			if len(v) != 1 || (v[0] != 0) != f.want {
				return "", fmt.Errorf("the %s key comes out with %s other than %v", k.r.name, attributeName(f.typ), f.want)
			}
		}
	}
	found := p.d.set.curve.name + " pairs and AES-256"
	switch {
	case dl.flags && dl.mechanisms:
		return found + ", each tied to one mechanism", nil
	case dl.flags:
		return found + ", without CKA_ALLOWED_MECHANISMS", nil
	case dl.mechanisms:
		return found + ", without CKA_COPYABLE and CKA_DESTROYABLE", nil
	}
	return found + ", without the attributes of PKCS#11 2.40", nil
}

// peer returns the session's agreement key and a fresh key to agree with it.
func (s *session) peer() (own *ecdh.PublicKey, peer *ecdh.PrivateKey, err error) {
	point, err := s.point(s.keys.agreementPub)
	if err != nil {
		return nil, nil, err
	}
	if own, err = s.curve.ecdh.NewPublicKey(point); err != nil {
		return nil, nil, fmt.Errorf("the public key is not on %s", s.curve.name)
	}
	peer, err = s.curve.ecdh.GenerateKey(rand.Reader)
	return own, peer, err
}

func (p *prober) tryECDH(s *session) (string, error) {
	own, peer, err := s.peer()
	if err != nil {
		return "", err
	}
	want, err := peer.ECDH(own)
	if err != nil {
		return "", err
	}
	got, err := s.ecdh(s.keys.agreement, peer.PublicKey().Bytes())
	if err != nil {
		return "", err
	}
	if subtle.ConstantTimeCompare(got, want) != 1 {
		return "", errors.New("the shared secret differs from software's")
	}
	return "agrees with software on " + s.curve.name, nil
}

// tryKDF compares the X9.63 derivation, as a readable key, with software's.
func (p *prober) tryKDF(s *session) (string, error) {
	own, peer, err := s.peer()
	if err != nil {
		return "", err
	}
	z, err := peer.ECDH(own)
	if err != nil {
		return "", err
	}
	in := imported{material: materialHMAC, kdf: kdfSHA256, header: []byte{importVersion, byte(materialHMAC), byte(kdfSHA256), 0}}
	h, err := s.p11.DeriveKey(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDH1_DERIVE,
		pkcs11.NewECDH1DeriveParams(ckdSHA256KDF, in.sharedInfo(), peer.PublicKey().Bytes()))}, s.keys.agreement,
		secretTemplate(pkcs11.CKK_GENERIC_SECRET, flag{pkcs11.CKA_SENSITIVE, false}, flag{pkcs11.CKA_EXTRACTABLE, true}))
	if err != nil {
		return "", fmt.Errorf("C_DeriveKey: %w", err)
	}
	got, err := s.attribute(h, pkcs11.CKA_VALUE)
	if err != nil {
		return "", err
	}
	if !bytes.Equal(got, in.transport(z)) {
		return "", errors.New("derives another key than X9.63 with SHA-256")
	}
	return "derives what X9.63 says", nil
}

// secretTemplate is that of a 32-byte secret session key.
func secretTemplate(keyType uint, flags ...flag) []*pkcs11.Attribute {
	return append([]*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, keyType),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
	}, attrs(flags)...)
}

func (p *prober) tryECDSA(s *session) (string, error) {
	return s.signsWith(s.curve, s.keys.signing, s.keys.signingPub)
}

// signsWith verifies a signature of the token's in software.
func (s *session) signsWith(crv curve, private, public pkcs11.ObjectHandle) (string, error) {
	v, err := s.attribute(public, pkcs11.CKA_EC_POINT)
	if err != nil {
		return "", err
	}
	point, err := decodePoint(v, crv)
	if err != nil {
		return "", err
	}
	return s.verifies(crv, private, point)
}

func (s *session) verifies(crv curve, private pkcs11.ObjectHandle, point []byte) (string, error) {
	key, err := ecdsa.ParseUncompressedPublicKey(crv.ec, point)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256([]byte("conclave device probe"))
	digest := append(sum[:], sum[:]...)[:crv.digest]
	sig, err := s.signOn(crv, private, digest)
	if err != nil {
		return "", err
	}
	a, b := new(big.Int).SetBytes(sig[:crv.size]), new(big.Int).SetBytes(sig[crv.size:])
	if !ecdsa.Verify(key, digest, a, b) {
		return "", errors.New("the signature does not verify")
	}
	return "signatures on " + crv.name + " verify in software", nil
}

func (p *prober) tryGCM(s *session) (string, error) {
	aad, plain := boundAAD([]byte("conclave device probe")), bytes.Repeat([]byte{0xa5}, 64)
	blob, err := s.seal(aad, plain)
	if err != nil {
		return "", err
	}
	got, err := s.open(aad, blob)
	if err != nil {
		return "", err
	}
	if !bytes.Equal(got, plain) {
		return "", errors.New("does not decrypt what it encrypted")
	}
	for _, i := range []int{0, len(blob.box) - 1} {
		bad := sealed{blob.iv, bytes.Clone(blob.box)}
		bad.box[i] ^= 1
		got, err := s.open(aad, bad)
		if err == nil {
			secret.Wipe(got)
			return "", errors.New("opens an altered ciphertext")
		}
		if i > 0 && isRV(err, pkcs11.CKR_GENERAL_ERROR) {
			p.quirk("a wrong AES-GCM tag is reported as CKR_GENERAL_ERROR, as a failing device would be; told apart by a second trial")
		}
	}
	return "round trip, alterations refused", nil
}

func (p *prober) tryRandom(s *session) (string, error) {
	a, err := s.random(64)
	if err != nil {
		return "", err
	}
	b, err := s.random(64)
	if err != nil {
		return "", err
	}
	if bytes.Equal(a, b) || bytes.Count(a, a[:1]) == len(a) {
		return "", errors.New("the generator repeats itself")
	}
	return "changes from call to call", nil
}
