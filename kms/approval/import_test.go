package approval

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
)

func sampleImport() ImportParams {
	return ImportParams{Node: "fr-1", Purpose: kms.Sign, Algorithm: kms.ECDSAP256, PublicKey: []byte{4, 1, 2}, Sealed: make([]byte, 32)}
}

func TestImportParams(t *testing.T) {
	if err := sampleImport().Validate(); err != nil {
		t.Error(err)
	}
	for what, change := range map[string]func(*ImportParams){
		"no node":              func(p *ImportParams) { p.Node = "" },
		"another purpose":      func(p *ImportParams) { p.Purpose = kms.MAC },
		"no purpose":           func(p *ImportParams) { p.Purpose = "" },
		"no algorithm":         func(p *ImportParams) { p.Algorithm = "" },
		"no public key":        func(p *ImportParams) { p.PublicKey = nil },
		"a public key":         func(p *ImportParams) { p.Purpose, p.Algorithm = kms.Encrypt, kms.AES256GCM },
		"a long public key":    func(p *ImportParams) { p.PublicKey = make([]byte, MaxRootKey+1) },
		"nothing sealed":       func(p *ImportParams) { p.Sealed = nil },
		"another hash":         func(p *ImportParams) { p.Sealed = make([]byte, 48) },
		"a negative period":    func(p *ImportParams) { p.RotationPeriod = -1 },
		"more than ten years":  func(p *ImportParams) { p.RotationPeriod = MaxImportPeriod + 1 },
		"a name that is none":  func(p *ImportParams) { p.Node = "Fr" },
		"a curve that is none": func(p *ImportParams) { p.Algorithm = "ecdsa-p521" },
	} {
		p := sampleImport()
		change(&p)
		if err := p.Validate(); !errors.Is(err, kms.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	late := sampleProposal(kms.ActionImport)
	late.Revision = 3
	if err := late.Validate(); !errors.Is(err, kms.Invalid) {
		t.Errorf("about a key that is there: %v", err)
	}
}

// TestImportBindingVector holds the bytes under which everybody seals: whatever seals
// elsewhere must agree with it. Info and AAD differ in their domain alone.
func TestImportBindingVector(t *testing.T) {
	info, aad := ImportBinding("00112233445566778899aabbccddeeff", "coalition", "payments", "fr-1", kms.Encrypt, kms.AES256GCM)
	const name = "binding-import.txt"
	if *update {
		var out strings.Builder
		out.WriteString("# HPKE info of the import of coalition/payments, sealed to node fr-1 of cluster 00112233445566778899aabbccddeeff;\n# the AAD has the domain conclave/import/1/aad\n")
		annotate(info, 0, &out)
		store(t, name, out.String())
	}
	golden := load(t, name)
	if !bytes.Equal(info, golden) {
		t.Error("the binding has changed")
	}
	// The domain is a text of 22 bytes, the AAD's of 21: the one head byte differs too.
	want := bytes.Replace(golden, []byte("\x76conclave/import/1/info"), []byte("\x75conclave/import/1/aad"), 1)
	if !bytes.Equal(aad, want) || bytes.Equal(aad, info) {
		t.Errorf("the AAD is %x", aad)
	}
	seen := map[string]bool{string(info): true, string(aad): true}
	for _, x := range [][4]string{{"c", "coalition", "payments", "fr-1"}, {"00112233445566778899aabbccddeeff", "c", "payments", "fr-1"},
		{"00112233445566778899aabbccddeeff", "coalition", "c", "fr-1"}, {"00112233445566778899aabbccddeeff", "coalition", "payments", "c"}} {
		i, _ := ImportBinding(x[0], x[1], x[2], x[3], kms.Encrypt, kms.AES256GCM)
		m, _ := ImportBinding(x[0], x[1], x[2], x[3], kms.MAC, kms.HMACSHA256)
		if seen[string(i)] || seen[string(m)] {
			t.Errorf("%q: the binding is not its own", x)
		}
		seen[string(i)], seen[string(m)] = true, true
	}
}
