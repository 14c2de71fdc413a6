package attest

import (
	"bytes"
	"crypto/elliptic"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/kms"
)

func contains(list []string, words ...string) bool {
	return slices.ContainsFunc(list, func(s string) bool {
		return !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(s, w) })
	})
}

func TestAttested(t *testing.T) {
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
		for _, rsaEK := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, RSA endorsement key %v", curve.Params().Name, rsaEK), func(t *testing.T) {
				s := newSoft(t, curve, rsaEK)
				r, err := Verify(s.witnessed(s.document()).Marshal(), s.subject, s.context())
				if err != nil || !r.Attested || r.Kind != KindTPM {
					t.Fatalf("%+v, %v", r, err)
				}
				for _, words := range [][]string{
					{"signing key", "signed the genesis"},
					{"made in one TPM and cannot leave it"},
					{`made by "AMD (id:414D4400)", model "soft", version "id:00010002"`, `"CN=Vendor Manufacturing"`, `"CN=Vendor Root"`},
					{"node fr-1 of site fr"},
					{"PCR 0-7;"},
				} {
					if !contains(r.Proven, words...) {
						t.Errorf("not proven: %q in\n%s", words, strings.Join(r.Proven, "\n"))
					}
				}
				if !contains(r.Claimed, "ML-KEM") || len(r.Claimed) != 1 {
					t.Errorf("claimed: %q", r.Claimed)
				}
			})
		}
	}
}

// TestLowered: what is missing is no mistake, but then nothing but the possession
// of the signing key is proven.
func TestLowered(t *testing.T) {
	for name, x := range map[string]struct {
		change func(*soft, *Context)
		alter  func(*TPM)
		words  []string

		unwitnessed bool
	}{
		"no vendor":        {change: func(_ *soft, c *Context) { c.Vendors = nil }, words: []string{"none of the vendors"}},
		"another vendor":   {change: func(s *soft, c *Context) { c.Vendors = [][]byte{newAuthority(s.t, "Vendor Root", nil).cert.Raw} }, words: []string{"none of the vendors"}},
		"a damaged vendor": {change: func(_ *soft, c *Context) { c.Vendors = [][]byte{{1}} }, words: []string{"none of the vendors", "vendor certificate 1"}},
		"expired":          {change: func(_ *soft, c *Context) { c.Time = now.AddDate(2, 0, 0) }, words: []string{"none of the vendors", "expired"}},
		"no time":          {change: func(_ *soft, c *Context) { c.Time = time.Time{} }, words: []string{"none of the vendors", "no time"}},
		"no chain":         {alter: func(d *TPM) { d.EKChain = nil }, words: []string{"none of the vendors"}},
		"no certificate":   {alter: func(d *TPM) { d.EKCertificate, d.EKChain = nil, nil }, words: []string{"no endorsement key certificate"}},
		"no witness":       {unwitnessed: true, words: []string{"no node of another site"}},
		"an unknown constraint": {change: func(s *soft, _ *Context) {
			s.cert.ExtraExtensions = append(s.cert.ExtraExtensions, pkix.Extension{Id: []int{1, 2, 3}, Critical: true, Value: []byte{5, 0}})
		}, words: []string{"unhandled critical"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSoft(t, elliptic.P256(), false)
			c := s.context()
			if x.change != nil {
				x.change(s, &c)
			}
			d := s.document()
			if x.alter != nil {
				x.alter(&d)
			}
			if !x.unwitnessed {
				d = s.witnessed(d)
			}
			r, err := Verify(d.Marshal(), s.subject, c)
			if err != nil || r.Attested {
				t.Fatalf("%+v, %v", r, err)
			}
			if len(r.Proven) != 1 || r.Proven[0] != possession {
				t.Errorf("proven: %q", r.Proven)
			}
			if !contains(r.Claimed, x.words...) {
				t.Errorf("claimed: %q", r.Claimed)
			}
		})
	}
}

// TestRefused alters what is said before it is signed: every condition by itself.
func TestRefused(t *testing.T) {
	attrs := func(p *tpm2.TPMTPublic, f func(*tpm2.TPMAObject)) { f(&p.ObjectAttributes) }
	for name, x := range map[string]struct {
		change func(*soft, *Context) // before
		alter  func(*soft, *TPM)     // after, before the witness
		after  func(*soft, *TPM)     // after the witness
		says   string
		kind   kms.Kind
	}{
		"storage key not fixed": {change: func(s *soft, _ *Context) {
			attrs(&s.publics[0], func(a *tpm2.TPMAObject) { a.FixedTPM = false })
			s.setSubjects()
		}, says: "storage key is not one that was made"},
		"agreement key under a parent": {change: func(s *soft, _ *Context) { attrs(&s.publics[1], func(a *tpm2.TPMAObject) { a.FixedParent = false }) }, says: "agreement key is not one that was made"},
		"signing key imported": {change: func(s *soft, _ *Context) {
			attrs(&s.publics[2], func(a *tpm2.TPMAObject) { a.SensitiveDataOrigin = false })
		}, says: "signing key is not one that was made"},
		"storage key signs": {change: func(s *soft, _ *Context) {
			attrs(&s.publics[0], func(a *tpm2.TPMAObject) { a.SignEncrypt = true })
			s.setSubjects()
		}, says: "storage key may be used for something else"},
		"agreement key is restricted":    {change: func(s *soft, _ *Context) { attrs(&s.publics[1], func(a *tpm2.TPMAObject) { a.Restricted = true }) }, says: "agreement key may be used for something else"},
		"signing key decrypts":           {change: func(s *soft, _ *Context) { attrs(&s.publics[2], func(a *tpm2.TPMAObject) { a.Decrypt = true }) }, says: "signing key may be used for something else"},
		"attestation key signs anything": {change: func(s *soft, _ *Context) { attrs(&s.akPub, func(a *tpm2.TPMAObject) { a.Restricted = false }) }, says: "attestation key is not a restricted signing key"},
		"attestation key decrypts":       {change: func(s *soft, _ *Context) { attrs(&s.akPub, func(a *tpm2.TPMAObject) { a.Decrypt = true }) }, says: "attestation key is not a restricted signing key"},
		"attestation key not fixed":      {change: func(s *soft, _ *Context) { attrs(&s.akPub, func(a *tpm2.TPMAObject) { a.FixedTPM = false }) }, says: "attestation key is not one that was made"},
		"attestation key under a parent": {change: func(s *soft, _ *Context) { attrs(&s.akPub, func(a *tpm2.TPMAObject) { a.FixedParent = false }) }, says: "attestation key is not one that was made"},
		"attestation key imported":       {change: func(s *soft, _ *Context) { attrs(&s.akPub, func(a *tpm2.TPMAObject) { a.SensitiveDataOrigin = false }) }, says: "attestation key is not one that was made"},
		"attestation key without scheme": {change: func(s *soft, _ *Context) { s.akPub = eccArea(s.ak, s.akPub.ObjectAttributes, tpm2.TPMAlgNull) }, says: "scheme"},
		"endorsement key not fixed":      {change: func(s *soft, _ *Context) { attrs(&s.ekPub, func(a *tpm2.TPMAObject) { a.FixedTPM = false }) }, says: "endorsement key is not a restricted decryption key"},
		"endorsement key signs":          {change: func(s *soft, _ *Context) { attrs(&s.ekPub, func(a *tpm2.TPMAObject) { a.SignEncrypt = true }) }, says: "endorsement key is not a restricted decryption key"},
		"certificate of another key":     {change: func(s *soft, _ *Context) { s.ek = newKey(s.t, elliptic.P384()) }, says: "certificate is of another key"},
		"certificate of a CA":            {change: func(s *soft, _ *Context) { s.cert.IsCA, s.cert.BasicConstraintsValid = true, true }, says: "that of a CA"},
		"certificate for other uses":     {change: func(s *soft, _ *Context) { s.cert.UnknownExtKeyUsage = []asn1.ObjectIdentifier{{2, 23, 133, 8, 3}} }, says: "other uses"},
		"certificate for servers": {change: func(s *soft, _ *Context) {
			s.cert.UnknownExtKeyUsage, s.cert.ExtKeyUsage = nil, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}, says: "other uses"},
		"certificate garbled":        {alter: func(_ *soft, d *TPM) { d.EKCertificate = d.EKCertificate[1:] }, says: "not a DER certificate"},
		"chain garbled":              {alter: func(_ *soft, d *TPM) { d.EKChain = [][]byte{{0x30}} }, says: "certificate 1 of the endorsement key's chain"},
		"chain alone":                {alter: func(_ *soft, d *TPM) { d.EKCertificate = nil }, says: "no endorsement key certificate"},
		"certification not by a TPM": {change: func(s *soft, _ *Context) { s.certify = func(_ int, a *tpm2.TPMSAttest) { a.Magic = 0x12345678 } }, says: "not a TPMS_ATTEST"},
		"certification for another": {change: func(s *soft, _ *Context) {
			s.certify = func(i int, a *tpm2.TPMSAttest) {
				if i == 1 {
					a.ExtraData.Buffer[3] ^= 1
				}
			}
		}, says: "agreement key was made for another node"},
		"certification of another key": {alter: func(_ *soft, d *TPM) {
			d.Signing.Attest, d.Signing.Signature = d.Agreement.Attest, d.Agreement.Signature
		}, says: "certification of the signing key is of another key"},
		"certification by another key":      {alter: func(s *soft, d *TPM) { s.ak = newKey(s.t, s.curve); d.Storage.Signature = s.sign(d.Storage.Attest) }, says: "does not verify", kind: kms.BadSignature},
		"a quote in place of certification": {alter: func(_ *soft, d *TPM) { d.Storage.Attest, d.Storage.Signature = d.Quote.Attest, d.Quote.Signature }, says: "of another type"},
		"certification in place of a quote": {alter: func(_ *soft, d *TPM) { d.Quote.Attest, d.Quote.Signature = d.Storage.Attest, d.Storage.Signature }, says: "of another type"},
		"quote not by a TPM":                {change: func(s *soft, _ *Context) { s.quote = func(a *tpm2.TPMSAttest) { a.Magic = 0 } }, says: "not a TPMS_ATTEST"},
		"quote for another":                 {change: func(s *soft, _ *Context) { s.quote = func(a *tpm2.TPMSAttest) { a.ExtraData.Buffer[3] ^= 1 } }, says: "made for another node"},
		"quote for nobody":                  {change: func(s *soft, _ *Context) { s.quote = func(a *tpm2.TPMSAttest) { a.ExtraData.Buffer = nil } }, says: "made for another node"},
		"another value": {alter: func(_ *soft, d *TPM) {
			d.Quote.PCRs = slices.Clone(d.Quote.PCRs)
			d.Quote.PCRs[1].Value = make([]byte, 32)
		}, says: "other registers or values"},
		"another register": {alter: func(_ *soft, d *TPM) { d.Quote.PCRs = slices.Clone(d.Quote.PCRs); d.Quote.PCRs[7].Index = 23 }, says: "other registers or values"},
		"a value left out": {alter: func(_ *soft, d *TPM) { d.Quote.PCRs = d.Quote.PCRs[1:] }, says: "other registers or values"},
		"values of another bank": {change: func(s *soft, _ *Context) {
			s.quote = func(a *tpm2.TPMSAttest) {
				q, _ := a.Attested.Quote()
				q.PCRSelect.PCRSelections[0].Hash = tpm2.TPMAlgSHA1
			}
		}, says: "other registers or values"},
		"no signature":          {alter: func(_ *soft, d *TPM) { d.Quote.Signature = nil }, says: "not a TPMT_SIGNATURE"},
		"wrapped for a token":   {change: func(s *soft, _ *Context) { s.subject.ImportKind = "pkcs11-ecdh-kwp" }, says: "not for a TPM"},
		"an import key unnamed": {change: func(s *soft, _ *Context) { s.subject.ImportKind = "" }, says: "not for a TPM"},
		"another import key":    {change: func(s *soft, _ *Context) { s.subject.Import = tpm2.Marshal(s.publics[1]) }, says: "not its storage key"},
		"no import key":         {change: func(s *soft, _ *Context) { s.subject.Import = nil }, says: "not its storage key"},
		"other storage": {change: func(s *soft, _ *Context) {
			p := s.publics[0]
			p.ObjectAttributes.NoDA = true
			s.subject.Import = tpm2.Marshal(p)
		}, says: "not its storage key"},
		"another signing key":   {change: func(s *soft, _ *Context) { s.subject.Signing = sec1(s.t, s.ak) }, says: "signing key is not the node's"},
		"another suite":         {change: func(s *soft, _ *Context) { s.subject.SigningSuite++ }, says: "signing key is not the node's"},
		"another agreement key": {change: func(s *soft, _ *Context) { s.subject.Agreement = hybrid(s.t, 0x50, s.ak) }, says: "agreement key is not"},
		"a classical key alone": {change: func(s *soft, _ *Context) { s.subject.Agreement = sec1(s.t, s.keys[1]) }, says: "agreement key is not"},
		"witness of the site":   {change: func(s *soft, _ *Context) { s.by.Site = "jp" }, says: "same site"},
		"unknown witness":       {change: func(s *soft, c *Context) { c.Witness = func(string) (Subject, bool) { return Subject{}, false } }, says: "is not known"},
		"no witnesses":          {change: func(s *soft, c *Context) { c.Witness = nil }, says: "is not known"},
		"another witness":       {change: func(s *soft, _ *Context) { s.by.Signing = sec1(s.t, s.ak); s.by.SigningSuite = s.subject.SigningSuite }, says: "witness fr-1 does not verify", kind: kms.BadSignature},
		"witness of another EK": {after: func(s *soft, d *TPM) { d.Witness = s.witnessed(TPM{AK: d.AK}).Witness }, says: "does not verify", kind: kms.BadSignature},
		"witness of another AK": {after: func(s *soft, d *TPM) {
			e := *d
			e.AK = tpm2.Marshal(eccArea(newKey(s.t, s.curve), s.akPub.ObjectAttributes, tpm2.TPMAlgECDSA))
			d.Witness = s.witnessed(e).Witness
		}, says: "does not verify", kind: kms.BadSignature},
		"witness of another one": {after: func(s *soft, d *TPM) { d.Witness = otherSubject(s).witnessed(*d).Witness }, says: "does not verify", kind: kms.BadSignature},
		"another secret":         {after: func(_ *soft, d *TPM) { d.Witness.Secret[0] ^= 1 }, says: "does not verify", kind: kms.BadSignature},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSoft(t, elliptic.P256(), false)
			c := s.context()
			if x.change != nil {
				x.change(s, &c)
			}
			d := s.document()
			if x.alter != nil {
				x.alter(s, &d)
			}
			d = s.witnessed(d)
			if x.after != nil {
				x.after(s, &d)
			}
			if c.Witness != nil {
				by, _ := c.Witness("fr-1")
				if by.Node != "" {
					c.Witness = s.context().Witness
				}
			}
			kind := x.kind
			if kind == 0 {
				kind = kms.Invalid
			}
			r, err := Verify(d.Marshal(), s.subject, c)
			if err == nil || !strings.Contains(err.Error(), x.says) || !strings.Contains(err.Error(), "jp-1") || !errors.Is(err, kind) {
				t.Fatalf("%v; want %q, %v", err, x.says, kind)
			}
			if !reflect.DeepEqual(r, Report{}) {
				t.Errorf("a report of what does not hold: %+v", r)
			}
		})
	}
}

// otherSubject is the same node as another one would name itself.
func otherSubject(s *soft) *soft {
	o := *s
	o.subject.Node = "jp-2"
	return &o
}

// TestReplay: a document serves no other node, site or set of keys.
func TestReplay(t *testing.T) {
	s := newSoft(t, elliptic.P256(), false)
	doc := s.witnessed(s.document()).Marshal()
	for name, change := range map[string]func(*Subject){
		"node": func(x *Subject) { x.Node = "jp-2" },
		"site": func(x *Subject) { x.Site = "de" },
		"seed": func(x *Subject) {
			x.Agreement = bytes.Clone(x.Agreement)
			x.Agreement[0] ^= 1
		},
		"imports": func(x *Subject) { x.ImportKind, x.Import = "", nil },
	} {
		x := s.subject
		change(&x)
		if r, err := Verify(doc, x, s.context()); err == nil {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

// TestEveryByte alters every field of a good document, byte for byte.
func TestEveryByte(t *testing.T) {
	s := newSoft(t, elliptic.P256(), false)
	s.pcrs = s.pcrs[:2]
	doc := s.witnessed(s.document()).Marshal()
	if r, err := Verify(doc, s.subject, s.context()); err != nil || !r.Attested {
		t.Fatal(r, err)
	}
	n := 0
	everyByte(t, doc, func(field string, bad []byte) {
		n++
		if r, err := Verify(bad, s.subject, s.context()); err == nil && r.Attested {
			t.Errorf("%s can be altered", field)
		}
	})
	if n < 1000 {
		t.Errorf("only %d alterations were tried", n)
	}
}

// everyByte calls try with the document altered in one byte of one field, for the
// bytes of each, and with each optional field or last element of a list left out.
func everyByte(t *testing.T, doc []byte, try func(field string, bad []byte)) {
	t.Helper()
	d, err := Parse(doc)
	if err != nil {
		t.Fatal(err)
	}
	emit := func(field string) { try(field, d.TPM.Marshal()) }
	var walk func(name string, v reflect.Value)
	walk = func(name string, v reflect.Value) {
		switch v.Kind() {
		case reflect.Pointer:
			old := reflect.ValueOf(v.Interface())
			v.SetZero()
			emit(name)
			v.Set(old)
			walk(name, v.Elem())
		case reflect.Struct:
			for i := range v.NumField() {
				walk(name+"."+v.Type().Field(i).Name, v.Field(i))
			}
		case reflect.Slice:
			for i := 0; i < v.Len(); i += 1 + v.Len()/100 { // of a long field a hundred bytes
				walk(fmt.Sprintf("%s[%d]", name, i), v.Index(i))
			}
			if v.Len() > 0 {
				old := v.Interface()
				v.Set(v.Slice(0, v.Len()-1))
				emit(name + " shortened")
				v.Set(reflect.ValueOf(old))
			}
		case reflect.Uint8:
			old := v.Uint()
			v.SetUint(old ^ 1<<(n(name)%8))
			emit(name)
			v.SetUint(old)
		case reflect.String:
			old := v.String()
			v.SetString(old + "x")
			emit(name)
			v.SetString(old)
		default:
			t.Fatalf("%s: nothing alters a %v", name, v.Kind())
		}
	}
	walk("", reflect.ValueOf(d.TPM).Elem())
}

// n spreads the altered bits.
func n(s string) (sum int) {
	for _, c := range s {
		sum += int(c)
	}
	return sum
}

// TestSparse: certificates and quotes that say little are taken, and said to.
func TestSparse(t *testing.T) {
	s := newSoft(t, elliptic.P256(), false)
	s.pcrs, s.cert.ExtraExtensions, s.cert.UnknownExtKeyUsage = nil, nil, nil
	s.cert.Subject = pkix.Name{CommonName: "a TPM"}
	s.publics[2].ObjectAttributes.UserWithAuth = false
	s.publics[2].AuthPolicy = tpm2.TPM2BDigest{Buffer: bytes.Repeat([]byte{7}, 32)}
	c := s.context()
	c.Vendors = [][]byte{s.middle.cert.Raw} // an anchor need not be a root
	d := s.document()
	d.EKChain = nil
	r, err := Verify(s.witnessed(d).Marshal(), s.subject, c)
	if err != nil || !r.Attested {
		t.Fatalf("%+v, %v", r, err)
	}
	for _, words := range []string{"does not name", "no platform register", "its signing key can be used only under the TPM's authorization policy 0707"} {
		if !contains(r.Proven, words) {
			t.Errorf("not proven: %q in %q", words, r.Proven)
		}
	}
	if contains(r.Proven, "agreement key can be used only") {
		t.Errorf("%q", r.Proven)
	}
}

// TestMaker reads names of makers as certificates have them, and what is none.
func TestMaker(t *testing.T) {
	s := newSoft(t, elliptic.P256(), false)
	cert := issue(t, &s.cert, s.middle.cert, s.ek.Public(), s.middle.key)
	if got := maker(cert); got != `made by "AMD (id:414D4400)", model "soft", version "id:00010002"` {
		t.Error(got)
	}
	for _, value := range [][]byte{nil, {1}, {0x30, 0}, {0x30, 2, 0x82, 0}, {0x30, 3, 0xa4, 1, 5}} {
		c := &x509.Certificate{Extensions: []pkix.Extension{{Id: oidSAN, Value: value}}}
		if got := maker(c); got != "of a maker that the certificate does not name" {
			t.Errorf("%x: %s", value, got)
		}
	}
}

// TestSchemes: a signature is of the one scheme that the attestation key is bound to.
func TestSchemes(t *testing.T) {
	s := newSoft(t, elliptic.P256(), false)
	d := s.document()
	ak, err := d.attestationKey()
	if err != nil {
		t.Fatal(err)
	}
	good, err := decode[tpm2.TPMTSignature](d.Quote.Signature)
	if err != nil {
		t.Fatal(err)
	}
	ecc, err := good.Signature.ECDSA()
	if err != nil {
		t.Fatal(err)
	}
	sha384 := *ecc
	sha384.Hash = tpm2.TPMAlgSHA384
	rsa := tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgRSASSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgRSASSA, &tpm2.TPMSSignatureRSA{Hash: tpm2.TPMAlgSHA256, Sig: tpm2.TPM2BPublicKeyRSA{Buffer: make([]byte, 256)}})}
	for name, sig := range map[string][]byte{
		"another hash": tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &sha384)}),
		"RSA":          tpm2.Marshal(rsa),
	} {
		if _, err := ak.statement("quote", d.Quote.Attest, sig); !errors.Is(err, kms.Invalid) || !strings.Contains(err.Error(), "scheme") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ak.statement("quote", d.Quote.Attest, d.Quote.Signature); err != nil {
		t.Error(err)
	}
}
