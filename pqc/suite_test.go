package pqc

import (
	"testing"

	"github.com/cloudflare/circl/sign/mldsa/mldsa65"
)

func TestSuiteTable(t *testing.T) {
	all := Suites()
	if len(all) != 9 {
		t.Fatalf("%d suites", len(all))
	}
	names := map[string]bool{}
	ids := map[SuiteID]bool{}
	for _, s := range all {
		if names[s.Name] || ids[s.ID] {
			t.Errorf("%v stands twice in the table", s.ID)
		}
		names[s.Name], ids[s.ID] = true, true
		if got, ok := Lookup(s.ID); !ok || got != s {
			t.Errorf("Lookup(%v) gives another row", s.ID)
		}
		if got, ok := ByName(s.Name); !ok || got != s {
			t.Errorf("ByName(%q) gives another row", s.Name)
		}
		if s.Strength == "" || s.ID.String() != s.Name {
			t.Errorf("%v is incomplete", s.ID)
		}
	}
	all[0].Name = "changed"
	if s, _ := Lookup(all[0].ID); s.Name == "changed" {
		t.Error("the table can be changed from outside")
	}
	if _, ok := Lookup(0); ok {
		t.Error("suite 0 exists")
	}
	if _, ok := ByName(""); ok {
		t.Error("a suite has no name")
	}
	if got := SuiteID(1).String(); got != "suite(0x0001)" {
		t.Error(got)
	}
}

// The numbers stand in stored objects: they never change.
func TestSuiteNumbers(t *testing.T) {
	want := map[SuiteID]struct {
		name string
		kind Kind
	}{
		0x0050: {"MLKEM768-P256", KEM}, 0x0051: {"MLKEM1024-P384", KEM}, 0x647a: {"MLKEM768-X25519", KEM},
		0xC101: {"ECDSA-P256-SHA256", Signature}, 0xC102: {"ECDSA-P384-SHA384", Signature},
		0xC103: {"Ed25519", Signature}, 0xC104: {"MLDSA65-Ed25519-SHA512", Signature},
		0xC105: {"ML-DSA-44", Cosignature},
		0xC201: {"AES-256-GCM-DERIVED-1", AEAD},
	}
	for id, w := range want {
		if s, ok := Lookup(id); !ok || s.Name != w.name || s.Kind != w.kind {
			t.Errorf("0x%04x is %q, a %v", uint16(id), s.Name, s.Kind)
		}
	}
}

func TestTableSizesAreTheLibraries(t *testing.T) {
	for _, id := range kemSuites {
		s := must[*kemSuite](t)(lookupKEM(id))
		kem, kdf := stdlibSuite(id)
		if uint16(id) != kem.ID() || s.kdf.ID() != kdf.ID() {
			t.Errorf("%v has another KEM or KDF id than HPKE", id)
		}
		point := s.EncSize - s.pqCt
		if s.PublicKeySize != s.pq.PublicKeySize()+point || s.pqCt != s.pq.CiphertextSize() || s.Overhead != 2+s.EncSize+16 {
			t.Errorf("%v: sizes", id)
		}
	}
	s, _ := Lookup(MLDSA65Ed25519)
	if s.PublicKeySize != mldsa65.PublicKeySize+32 || s.SignatureSize != mldsa65.SignatureSize+64 || s.SeedSize != HybridSeedSize {
		t.Error("hybrid signature: sizes")
	}
	if s, _ := Lookup(MLDSA44); s.PublicKeySize != MLDSA44PublicKeySize || s.SignatureSize != MLDSA44SignatureSize || s.SeedSize != MLDSA44SeedSize {
		t.Error("cosignature: sizes")
	}
	if KEM.String() != "kem" || Signature.String() != "signature" || AEAD.String() != "aead" || Cosignature.String() != "cosignature" || Kind(9).String() != "kind(9)" {
		t.Error("names of kinds")
	}
}
