package statetest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/attest"
	"github.com/conclave-kms/conclave/kms/state"
)

// Attest gives a root with keys on P-256 the document of a TPM that never was: of
// the World's vendor, who is in its genesis if Options.Attested is set, witnessed
// by the present root of a node, by none if witness is empty.
func (w *World) Attest(n *Node, witness string) {
	w.t.Helper()
	storage := w.tpmKey()
	publics := []tpm2.TPMTPublic{
		area(w.point(storage), tpm2.TPMAObject{Restricted: true, Decrypt: true}, tpm2.TPMAlgNull),
		area(n.Agreement.PublicKey().Bytes(), tpm2.TPMAObject{Decrypt: true}, tpm2.TPMAlgECDH),
		area(n.Record.Signing, tpm2.TPMAObject{SignEncrypt: true}, tpm2.TPMAlgECDSA),
	}
	n.Record.ImportKind, n.Record.Import = kms.ImportTPM, tpm2.Marshal(publics[0])
	subject := state.NodeSubject(n.Record)
	ek, ak := w.tpmKey(), w.tpmKey()
	doc := attest.TPM{
		EKCertificate: w.endorse(ek),
		EKPublic:      tpm2.Marshal(area(w.point(ek), tpm2.TPMAObject{Restricted: true, Decrypt: true}, tpm2.TPMAlgNull)),
		AK:            tpm2.Marshal(area(w.point(ak), tpm2.TPMAObject{Restricted: true, SignEncrypt: true}, tpm2.TPMAlgECDSA)),
	}
	for i, to := range []*attest.Certified{&doc.Storage, &doc.Agreement, &doc.Signing} {
		name, err := tpm2.ObjectName(&publics[i])
		if err != nil {
			w.t.Fatal(err)
		}
		statement := w.statement(subject, tpm2.TPMSTAttestCertify, tpm2.NewTPMUAttest(tpm2.TPMSTAttestCertify, &tpm2.TPMSCertifyInfo{Name: *name}))
		*to = attest.Certified{Public: tpm2.Marshal(publics[i]), Attest: statement, Signature: w.tpmSign(ak, statement)}
	}
	value := sha256.Sum256([]byte("boot"))
	digest := sha256.Sum256(value[:])
	doc.Quote.PCRs = []attest.PCR{{Index: 0, Value: value[:]}}
	doc.Quote.Attest = w.statement(subject, tpm2.TPMSTAttestQuote, tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{
		PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: []byte{1, 0, 0}}}},
		PCRDigest: tpm2.TPM2BDigest{Buffer: digest[:]},
	}))
	doc.Quote.Signature = w.tpmSign(ak, doc.Quote.Attest)
	if witness != "" {
		doc.Witness = w.witness(witness, subject, &doc)
	}
	n.Record.Attestation = doc.Marshal()
}

// witness signs that it has challenged the TPM.
func (w *World) witness(id string, s attest.Subject, doc *attest.TPM) *attest.Witness {
	w.t.Helper()
	secret := sha256.Sum256([]byte("a secret"))
	m, err := attest.WitnessMessage(id, s, doc, secret[:])
	if err != nil {
		w.t.Fatal(err)
	}
	return &attest.Witness{Node: id, Secret: secret[:], Signature: w.Node(id).signature(w.t, m, attest.WitnessContext)}
}

func (w *World) tpmKey() *ecdsa.PrivateKey {
	w.t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	return k
}

func (w *World) point(k *ecdsa.PrivateKey) []byte {
	w.t.Helper()
	b, err := k.PublicKey.Bytes()
	if err != nil {
		w.t.Fatal(err)
	}
	return b
}

// area is the public area of a key that is fixed to its TPM.
func area(point []byte, a tpm2.TPMAObject, scheme tpm2.TPMAlgID) tpm2.TPMTPublic {
	a.FixedTPM, a.FixedParent, a.SensitiveDataOrigin, a.UserWithAuth = true, true, true, true
	symmetric := tpm2.TPMTSymDefObject{Algorithm: tpm2.TPMAlgNull}
	if a.Restricted && a.Decrypt {
		symmetric = tpm2.TPMTSymDefObject{
			Algorithm: tpm2.TPMAlgAES, KeyBits: tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, tpm2.TPMKeyBits(128)),
			Mode: tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
		}
	}
	s := tpm2.TPMTECCScheme{Scheme: scheme}
	switch scheme {
	case tpm2.TPMAlgECDSA:
		s.Details = tpm2.NewTPMUAsymScheme(scheme, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256})
	case tpm2.TPMAlgECDH:
		s.Details = tpm2.NewTPMUAsymScheme(scheme, &tpm2.TPMSKeySchemeECDH{HashAlg: tpm2.TPMAlgSHA256})
	}
	x, y := point[1:33], point[33:]
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256, ObjectAttributes: a,
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Symmetric: symmetric, Scheme: s, CurveID: tpm2.TPMECCNistP256, KDF: tpm2.TPMTKDFScheme{Scheme: tpm2.TPMAlgNull},
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: x}, Y: tpm2.TPM2BECCParameter{Buffer: y}}),
	}
}

// statement is a TPMS_ATTEST that names the subject.
func (w *World) statement(s attest.Subject, kind tpm2.TPMST, attested tpm2.TPMUAttest) []byte {
	return tpm2.Marshal(tpm2.TPMSAttest{
		Magic: tpm2.TPMGeneratedValue, Type: kind, ExtraData: tpm2.TPM2BData{Buffer: attest.Qualifying(s)}, Attested: attested,
	})
}

func (w *World) tpmSign(k *ecdsa.PrivateKey, message []byte) []byte {
	w.t.Helper()
	digest := sha256.Sum256(message)
	r, s, err := ecdsa.Sign(rand.Reader, k, digest[:])
	if err != nil {
		w.t.Fatal(err)
	}
	return tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
		Hash: tpm2.TPMAlgSHA256, SignatureR: tpm2.TPM2BECCParameter{Buffer: r.Bytes()}, SignatureS: tpm2.TPM2BECCParameter{Buffer: s.Bytes()},
	})})
}

// endorse issues the endorsement key certificate of the World's vendor, valid for
// a year from the founding.
func (w *World) endorse(k *ecdsa.PrivateKey) []byte {
	w.t.Helper()
	// Names of the TCG EK credential profile, section 3.1.
	rdn, err := asn1.Marshal(pkix.RDNSequence{{{Type: asn1.ObjectIdentifier{2, 23, 133, 2, 1}, Value: "id:54455354"}}})
	if err != nil {
		w.t.Fatal(err)
	}
	san, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 4, IsCompound: true, Bytes: rdn}})
	if err != nil {
		w.t.Fatal(err)
	}
	from := time.UnixMilli(w.opts.Created).Add(-time.Hour)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: from, NotAfter: from.AddDate(1, 0, 0),
		UnknownExtKeyUsage: []asn1.ObjectIdentifier{{2, 23, 133, 8, 1}},
		ExtraExtensions:    []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: san}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, w.vendor.Certificate, &k.PublicKey, w.vendor.Key)
	if err != nil {
		w.t.Fatal(err)
	}
	return der
}
