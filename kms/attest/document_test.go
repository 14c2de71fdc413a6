package attest

import (
	"bytes"
	"crypto/elliptic"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
)

func token(s Subject) PKCS11 {
	facts := []Fact{
		{"CKA_ALWAYS_SENSITIVE", "true"}, {"CKA_EXTRACTABLE", "false"}, {"CKA_LOCAL", "true"}, {"CKA_NEVER_EXTRACTABLE", "true"}, {"CKA_SENSITIVE", "true"}, {"CKA_SIGN", "true"}, {"CKA_WRAP", "false"},
	}
	return PKCS11{Subject: Qualifying(s), Keys: []PKCS11Key{{"agreement", facts}, {"signing", slices.Clone(facts)}, {"wrapping", slices.Clone(facts)}}}
}

var tokenNode = Subject{Node: "fr-1", Site: "fr", SigningSuite: 0xC102, Signing: []byte{4}, Agreement: []byte{1}, ImportKind: "pkcs11-ecdh-kwp", Import: []byte{1}}

func TestNoDocument(t *testing.T) {
	r, err := Verify(nil, tokenNode, Context{})
	if err != nil || r.Attested || r.Kind != "" || len(r.Proven) != 1 || !contains(r.Claimed, "no attestation document") {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestPKCS11(t *testing.T) {
	p := token(tokenNode)
	p.Vendor = []byte("blob")
	r, err := Verify(p.Marshal(), tokenNode, Context{})
	if err != nil || r.Attested || r.Kind != KindPKCS11 || !slices.Equal(r.Proven, []string{possession}) {
		t.Fatalf("%+v, %v", r, err)
	}
	for _, words := range [][]string{
		{"in a PKCS#11 token at all"}, {"agreement key", "CKA_LOCAL true"}, {"signing key", "CKA_NEVER_EXTRACTABLE true", "allowed: CKA_SIGN"}, {"wrapping key", "CKA_SENSITIVE true"},
		{"vendor's attestation, 4 bytes", "fa2c8cc4f28176bbeed4b736df569a34c79cd3723e9ec42f9674b4d46ac6b8b8"},
	} {
		if !contains(r.Claimed, words...) {
			t.Errorf("not claimed: %q in\n%s", words, strings.Join(r.Claimed, "\n"))
		}
	}
	if contains(r.Claimed, "NOT") || contains(r.Claimed, "nothing about") {
		t.Errorf("%q", r.Claimed)
	}
	p.Keys[1].Facts[1].Value = "true"
	p.Keys[2].Facts = p.Keys[2].Facts[1:]
	r, err = Verify(p.Marshal(), tokenNode, Context{})
	if err != nil || !contains(r.Claimed, "signing key", "NOT", "CKA_EXTRACTABLE true") || !contains(r.Claimed, "wrapping key", "nothing about", "CKA_ALWAYS_SENSITIVE") {
		t.Errorf("%+v, %v", r, err)
	}
	other := tokenNode
	other.Node = "fr-2"
	if _, err := Verify(p.Marshal(), other, Context{}); !errors.Is(err, kms.Invalid) || !strings.Contains(err.Error(), "another node") {
		t.Error(err)
	}
}

func TestParseRefuses(t *testing.T) {
	s := newSoft(t, elliptic.P256(), false)
	good := s.document()
	long := make([]byte, maxPart+1)
	tpm := func(f func(*TPM)) []byte {
		d := good
		d.Quote.PCRs = slices.Clone(d.Quote.PCRs)
		f(&d)
		return d.Marshal()
	}
	pkcs := func(f func(*PKCS11)) []byte {
		p := token(tokenNode)
		f(&p)
		return p.Marshal()
	}
	for name, b := range map[string][]byte{
		"garbage":        {1, 2, 3},
		"trailing bytes": append(good.Marshal(), 0),
		"format":         canon.Marshal(Document{Format: 2, Kind: KindTPM, TPM: &good}),
		"kind":           canon.Marshal(Document{Format: 1, Kind: "x", TPM: &good}),
		"nothing":        canon.Marshal(Document{Format: 1, Kind: KindTPM}),
		"another part":   canon.Marshal(Document{Format: 1, Kind: KindPKCS11, TPM: &good}),
		"both parts":     canon.Marshal(Document{Format: 1, Kind: KindTPM, TPM: &good, PKCS11: &PKCS11{}}),
		"unknown field":  canon.Marshal(map[string]any{"format": 1, "kind": KindTPM, "tpm": good, "more": 1}),
		"long chain":     tpm(func(d *TPM) { d.EKChain = make([][]byte, maxChain+1) }),
		"long link":      tpm(func(d *TPM) { d.EKChain = [][]byte{long} }),
		"long part":      tpm(func(d *TPM) { d.Agreement.Signature = long }),
		"PCR 24":         tpm(func(d *TPM) { d.Quote.PCRs[7].Index = 24 }),
		"PCR twice":      tpm(func(d *TPM) { d.Quote.PCRs[7].Index = 6 }),
		"short PCR":      tpm(func(d *TPM) { d.Quote.PCRs[7].Value = []byte{1} }),
		"witness":        tpm(func(d *TPM) { d.Witness = &Witness{Node: "Not a name", Secret: make([]byte, 32)} }),
		"short secret":   tpm(func(d *TPM) { d.Witness = &Witness{Node: "fr-1", Secret: make([]byte, 31)} }),
		"token subject":  pkcs(func(p *PKCS11) { p.Subject = p.Subject[1:] }),
		"token vendor":   pkcs(func(p *PKCS11) { p.Vendor = make([]byte, maxVendor+1) }),
		"token keys":     pkcs(func(p *PKCS11) { p.Keys = make([]PKCS11Key, maxKeys+1) }),
		"key order":      pkcs(func(p *PKCS11) { p.Keys[0], p.Keys[1] = p.Keys[1], p.Keys[0] }),
		"fact order":     pkcs(func(p *PKCS11) { p.Keys[0].Facts[1].Name = "CKA_A" }),
		"fact words":     pkcs(func(p *PKCS11) { p.Keys[0].Facts[1].Value = "\x1b[1A" }),
		"empty fact":     pkcs(func(p *PKCS11) { p.Keys[0].Facts[1].Value = "" }),
		"many facts":     pkcs(func(p *PKCS11) { p.Keys[0].Facts = make([]Fact, maxFacts+1) }),
	} {
		if _, err := Parse(b); !errors.Is(err, kms.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Parse(make([]byte, MaxDocument+1)); !errors.Is(err, kms.TooLarge) {
		t.Error(err)
	}
}

func TestWithWitness(t *testing.T) {
	s := newSoft(t, elliptic.P256(), false)
	d := s.document()
	want := s.witnessed(d)
	got, err := WithWitness(d.Marshal(), *want.Witness)
	if err != nil || !bytes.Equal(got, want.Marshal()) {
		t.Errorf("%v", err)
	}
	for name, f := range map[string]func() error{
		"a token":   func() error { _, err := WithWitness(token(tokenNode).Marshal(), *want.Witness); return err },
		"garbage":   func() error { _, err := WithWitness([]byte{1}, *want.Witness); return err },
		"no secret": func() error { _, err := WithWitness(d.Marshal(), Witness{Node: "fr-1"}); return err },
	} {
		if err := f(); !errors.Is(err, kms.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	d.AK = d.AK[1:]
	if _, err := d.AKName(); !errors.Is(err, kms.Invalid) {
		t.Error(err)
	}
	if _, err := WitnessMessage("fr-1", s.subject, &d, nil); !errors.Is(err, kms.Invalid) {
		t.Error(err)
	}
}

// TestAnswer: an answer is for one secret, challenge and subject.
func TestAnswer(t *testing.T) {
	other := tokenNode
	other.Node = "fr-2"
	seen := map[string]bool{}
	for _, a := range [][]byte{
		Answer([]byte("s"), []byte("c"), tokenNode), Answer([]byte("t"), []byte("c"), tokenNode),
		Answer([]byte("s"), []byte("d"), tokenNode), Answer([]byte("s"), []byte("c"), other),
	} {
		if len(a) != 32 || seen[string(a)] {
			t.Errorf("%x", a)
		}
		seen[string(a)] = true
	}
}

func FuzzVerify(f *testing.F) {
	s := newSoft(f, elliptic.P256(), false)
	good := s.witnessed(s.document())
	f.Add(good.Marshal())
	f.Add(token(s.subject).Marshal())
	f.Add(token(tokenNode).Marshal())
	f.Add(canon.Marshal(Document{}))
	d := good
	d.Storage.Attest = d.Storage.Attest[:20]
	f.Add(d.Marshal())
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := Verify(b, s.subject, s.context())
		if err != nil {
			if r.Attested || len(r.Proven) > 0 {
				t.Errorf("%+v with %v", r, err)
			}
			return
		}
		if len(b) == 0 {
			return
		}
		p, err := Parse(b)
		if err != nil || !bytes.Equal(canon.Marshal(p), b) {
			t.Errorf("another encoding was accepted: %v", err)
		}
		if r.Attested && !bytes.Equal(b, good.Marshal()) {
			t.Errorf("a document that nobody made is attested")
		}
	})
}

// FuzzStructures feeds the decoders of the TPM's structures and of its name in a
// certificate.
func FuzzStructures(f *testing.F) {
	s := newSoft(f, elliptic.P256(), true)
	d := s.document()
	for _, b := range [][]byte{d.EKPublic, d.AK, d.Storage.Public, d.Storage.Attest, d.Storage.Signature, d.Quote.Attest, tpmName(f).Value} {
		f.Add(b)
	}
	ak, err := d.attestationKey()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if k, err := readKey("fuzzed", b); err == nil {
			if len(k.name) < 34 || k.point[0] != 4 || !bytes.Equal(tpm2.Marshal(k.public), b) {
				t.Errorf("name %x, point %x", k.name, k.point)
			}
		}
		if pub, err := decode[tpm2.TPMTPublic](b); err == nil && samePublic(pub, s.ek.Public()) && !bytes.Equal(b, d.EKPublic) {
			// Other attributes or a policy: still the same key.
			if _, err := pub.Unique.RSA(); err != nil {
				t.Error(err)
			}
		}
		if a, err := decode[tpm2.TPMSAttest](b); err == nil && !bytes.Equal(tpm2.Marshal(a), b) {
			t.Error("another encoding was accepted")
		}
		if sig, err := decode[tpm2.TPMTSignature](b); err == nil && ak.checkScheme(sig) == nil {
			if _, err := sig.Signature.ECDSA(); err != nil {
				t.Error(err)
			}
		}
		for _, name := range directoryNames(b) {
			_ = name.Type.String()
		}
	})
}
