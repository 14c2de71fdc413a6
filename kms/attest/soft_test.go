package attest

import (
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
)

// The tests of single conditions need statements that no TPM makes. They come from
// a TPM in software: keys and structures of which a test alters what it likes
// before they are signed.

var now = time.Date(2026, 7, 1, 0, 0, 0, 0, time.UTC)

// soft is a node with such a TPM and what it takes to verify its document.
type soft struct {
	t       testing.TB
	curve   elliptic.Curve
	ek      crypto.Signer
	ak      *ecdsa.PrivateKey
	keys    [3]*ecdsa.PrivateKey // storage, agreement, signing
	publics [3]tpm2.TPMTPublic
	akPub   tpm2.TPMTPublic
	ekPub   tpm2.TPMTPublic

	subject Subject
	vendor  *authority
	middle  *authority
	cert    x509.Certificate // template of the endorsement key's
	pcrs    []PCR
	witness *ecdsa.PrivateKey
	by      Subject

	certify func(i int, a *tpm2.TPMSAttest)
	quote   func(a *tpm2.TPMSAttest)
}

type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newAuthority(t testing.TB, name string, parent *authority) *authority {
	t.Helper()
	a := &authority{key: newKey(t, elliptic.P256())}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: now.AddDate(-1, 0, 0), NotAfter: now.AddDate(9, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	by, signer := tmpl, a.key
	if parent != nil {
		by, signer = parent.cert, parent.key
	}
	a.cert = issue(t, tmpl, by, a.key.Public(), signer)
	return a
}

func issue(t testing.TB, tmpl, parent *x509.Certificate, pub any, signer crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, signer)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// tpmName is a critical subject alternative name as endorsement key certificates
// have it.
func tpmName(t testing.TB) pkix.Extension {
	t.Helper()
	rdn := pkix.RDNSequence{{
		{Type: oidManufacturer, Value: "id:414D4400"}, {Type: oidModel, Value: "soft"}, {Type: oidVersion, Value: "id:00010002"},
	}}
	inner, err := asn1.Marshal(rdn)
	if err != nil {
		t.Fatal(err)
	}
	san, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 4, IsCompound: true, Bytes: inner}})
	if err != nil {
		t.Fatal(err)
	}
	return pkix.Extension{Id: oidSAN, Critical: true, Value: san}
}

func newSoft(t testing.TB, curve elliptic.Curve, rsaEK bool) *soft {
	t.Helper()
	s := &soft{t: t, curve: curve, ak: newKey(t, curve), witness: newKey(t, elliptic.P384())}
	s.vendor = newAuthority(t, "Vendor Root", nil)
	s.middle = newAuthority(t, "Vendor Manufacturing", s.vendor)
	s.akPub = eccArea(s.ak, tpm2.TPMAObject{Restricted: true, SignEncrypt: true}, tpm2.TPMAlgECDSA)
	for i, a := range []tpm2.TPMAObject{{Restricted: true, Decrypt: true}, {Decrypt: true}, {SignEncrypt: true}} {
		s.keys[i] = newKey(t, curve)
		s.publics[i] = eccArea(s.keys[i], a, []tpm2.TPMAlgID{tpm2.TPMAlgNull, tpm2.TPMAlgECDH, tpm2.TPMAlgECDSA}[i])
	}
	if rsaEK {
		k, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			t.Fatal(err)
		}
		s.ek = k
		s.ekPub = tpm2.RSAEKTemplate
		s.ekPub.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: k.N.Bytes()})
	} else {
		k := newKey(t, elliptic.P384())
		s.ek, s.ekPub = k, eccArea(k, tpm2.TPMAObject{Restricted: true, Decrypt: true}, tpm2.TPMAlgNull)
	}
	s.cert = x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: now.AddDate(-1, 0, 0), NotAfter: now.AddDate(1, 0, 0),
		UnknownExtKeyUsage: []asn1.ObjectIdentifier{oidEKUsage}, ExtraExtensions: []pkix.Extension{tpmName(t)},
	}
	for i := range uint8(8) {
		v := sha256.Sum256([]byte{i})
		s.pcrs = append(s.pcrs, PCR{Index: i, Value: v[:]})
	}
	s.setSubjects()
	return s
}

func (s *soft) setSubjects() {
	suite, sig := pqc.MLKEM768P256, pqc.ECDSAP256SHA256
	if s.curve == elliptic.P384() {
		suite, sig = pqc.MLKEM1024P384, pqc.ECDSAP384SHA384
	}
	s.subject = Subject{
		Node: "jp-1", Site: "jp", SigningSuite: uint16(sig), Signing: sec1(s.t, s.keys[2]), Agreement: hybrid(s.t, suite, s.keys[1]),
		ImportKind: kms.ImportTPM, Import: tpm2.Marshal(s.publics[0]),
	}
	s.by = Subject{Node: "fr-1", Site: "fr", SigningSuite: uint16(pqc.ECDSAP384SHA384), Signing: sec1(s.t, s.witness)}
}

func sec1(t testing.TB, k *ecdsa.PrivateKey) []byte {
	t.Helper()
	b, err := k.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// hybrid is the public key of a node whose classical half is k.
func hybrid(t testing.TB, suite pqc.SuiteID, k *ecdsa.PrivateKey) []byte {
	t.Helper()
	half, err := k.ECDH()
	if err != nil {
		t.Fatal(err)
	}
	return hybridOf(t, suite, half)
}

func hybridOf(t testing.TB, suite pqc.SuiteID, half ecdh.KeyExchanger) []byte {
	t.Helper()
	seed, err := secret.New(pqc.MLKEMSeedSize)
	if err != nil {
		t.Fatal(err)
	}
	defer seed.Destroy()
	p, err := pqc.NewPrivateKey(suite, seed, half)
	if err != nil {
		t.Fatal(err)
	}
	return p.PublicKey().Bytes()
}

func hashOf(curve elliptic.Curve) (tpm2.TPMIAlgHash, crypto.Hash, tpm2.TPMECCCurve) {
	if curve == elliptic.P256() {
		return tpm2.TPMAlgSHA256, crypto.SHA256, tpm2.TPMECCNistP256
	}
	return tpm2.TPMAlgSHA384, crypto.SHA384, tpm2.TPMECCNistP384
}

func eccArea(k *ecdsa.PrivateKey, a tpm2.TPMAObject, scheme tpm2.TPMAlgID) tpm2.TPMTPublic {
	alg, _, id := hashOf(k.Curve)
	a.FixedTPM, a.FixedParent, a.SensitiveDataOrigin, a.UserWithAuth = true, true, true, true
	sym := tpm2.TPMTSymDefObject{Algorithm: tpm2.TPMAlgNull}
	if a.Restricted && a.Decrypt {
		sym = tpm2.TPMTSymDefObject{
			Algorithm: tpm2.TPMAlgAES, KeyBits: tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, tpm2.TPMKeyBits(128)),
			Mode: tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
		}
	}
	sch := tpm2.TPMTECCScheme{Scheme: scheme}
	switch scheme {
	case tpm2.TPMAlgECDSA:
		sch.Details = tpm2.NewTPMUAsymScheme(scheme, &tpm2.TPMSSigSchemeECDSA{HashAlg: alg})
	case tpm2.TPMAlgECDH:
		sch.Details = tpm2.NewTPMUAsymScheme(scheme, &tpm2.TPMSKeySchemeECDH{HashAlg: alg})
	}
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: alg, ObjectAttributes: a,
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{Symmetric: sym, Scheme: sch, CurveID: id, KDF: tpm2.TPMTKDFScheme{Scheme: tpm2.TPMAlgNull}}),
		Unique:     tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, point(k)),
	}
}

func point(k *ecdsa.PrivateKey) *tpm2.TPMSECCPoint {
	b, _ := k.PublicKey.Bytes() // of a good key
	n := (len(b) - 1) / 2
	return &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: b[1 : 1+n]}, Y: tpm2.TPM2BECCParameter{Buffer: b[1+n:]}}
}

// sign makes the attestation key's TPMT_SIGNATURE.
func (s *soft) sign(message []byte) []byte {
	s.t.Helper()
	alg, h, _ := hashOf(s.curve)
	d := h.New()
	_, _ = d.Write(message)
	r, x, err := ecdsa.Sign(rand.Reader, s.ak, d.Sum(nil))
	if err != nil {
		s.t.Fatal(err)
	}
	return tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
		Hash: alg, SignatureR: tpm2.TPM2BECCParameter{Buffer: r.Bytes()}, SignatureS: tpm2.TPM2BECCParameter{Buffer: x.Bytes()},
	})})
}

// document makes the document, without a witness.
func (s *soft) document() TPM {
	s.t.Helper()
	cert := issue(s.t, &s.cert, s.middle.cert, s.ek.Public(), s.middle.key)
	d := TPM{EKCertificate: cert.Raw, EKChain: [][]byte{s.middle.cert.Raw}, EKPublic: tpm2.Marshal(s.ekPub), AK: tpm2.Marshal(s.akPub)}
	for i, to := range []*Certified{&d.Storage, &d.Agreement, &d.Signing} {
		name, err := tpm2.ObjectName(&s.publics[i])
		if err != nil {
			s.t.Fatal(err)
		}
		a := tpm2.TPMSAttest{Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestCertify, ExtraData: tpm2.TPM2BData{Buffer: Qualifying(s.subject)},
			Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestCertify, &tpm2.TPMSCertifyInfo{Name: *name})}
		if s.certify != nil {
			s.certify(i, &a)
		}
		*to = Certified{Public: tpm2.Marshal(s.publics[i]), Attest: tpm2.Marshal(a)}
		to.Signature = s.sign(to.Attest)
	}
	_, h, _ := hashOf(s.curve)
	digest, bits := h.New(), make([]byte, 3)
	for _, p := range s.pcrs {
		_, _ = digest.Write(p.Value)
		bits[p.Index/8] |= 1 << (p.Index % 8)
	}
	a := tpm2.TPMSAttest{Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestQuote, ExtraData: tpm2.TPM2BData{Buffer: Qualifying(s.subject)},
		Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{
			PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: bits}}},
			PCRDigest: tpm2.TPM2BDigest{Buffer: digest.Sum(nil)},
		})}
	if s.quote != nil {
		s.quote(&a)
	}
	d.Quote = Quoted{Attest: tpm2.Marshal(a), PCRs: s.pcrs}
	d.Quote.Signature = s.sign(d.Quote.Attest)
	return d
}

// witnessed adds the witness's statement.
func (s *soft) witnessed(d TPM) TPM {
	s.t.Helper()
	hash := sha256.Sum256([]byte("a secret"))
	msg, err := WitnessMessage(s.by.Node, s.subject, &d, hash[:])
	if err != nil {
		return d // a test has spoilt the attestation key
	}
	d.Witness = &Witness{Node: s.by.Node, Secret: hash[:], Signature: signAs(s.t, s.witness, s.by, msg)}
	return d
}

func signAs(t testing.TB, k *ecdsa.PrivateKey, by Subject, msg []byte) []byte {
	t.Helper()
	digest, err := pqc.Digest(pqc.SuiteID(by.SigningSuite), msg, []byte(WitnessContext))
	if err != nil {
		t.Fatal(err)
	}
	r, x, err := ecdsa.Sign(rand.Reader, k, digest)
	if err != nil {
		t.Fatal(err)
	}
	n := (k.Curve.Params().BitSize + 7) / 8
	sig := make([]byte, 2*n)
	r.FillBytes(sig[:n])
	x.FillBytes(sig[n:])
	return sig
}

func (s *soft) context() Context {
	return Context{Time: now, Vendors: [][]byte{s.vendor.cert.Raw}, Witness: func(node string) (Subject, bool) { return s.by, node == s.by.Node }}
}
