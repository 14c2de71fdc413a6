package pqc

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/cloudflare/circl/sign/mldsa/mldsa65"
)

// loadVectors decodes a file of test/vectors/pqc into v.
func loadVectors(t *testing.T, name string, v any) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "test", "vectors", "pqc", name))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatal(err)
	}
}

// The signature that the IETF LAMPS working group publishes with the draft.
func TestCompositeKnownAnswer(t *testing.T) {
	var v struct {
		M        []byte `json:"m"`
		PKPrefix []byte `json:"pkPrefix"`
		SK       []byte `json:"sk"`
		S        []byte `json:"s"`
	}
	loadVectors(t, "composite-mldsa65-ed25519.json", &v)
	if len(v.SK) != HybridSeedSize || len(v.S) == 0 || len(v.PKPrefix) < 64 {
		t.Fatal("the vector is incomplete")
	}
	k := must[*HybridKey](t)(NewHybridKey(mustSecret(t, v.SK)))
	if !bytes.HasPrefix(k.PublicKey(), v.PKPrefix) {
		t.Error("the public key is not the published one")
	}
	if err := VerifyHybrid(k.PublicKey(), v.M, nil, v.S); err != nil {
		t.Error(err)
	}
	// Ed25519 is deterministic, so this half of our signature is the published one.
	sig := must[[]byte](t)(k.Sign(v.M, nil))
	if !bytes.Equal(sig[mldsa65.SignatureSize:], v.S[mldsa65.SignatureSize:]) {
		t.Error("the Ed25519 half differs from the published one")
	}
	if err := VerifyHybrid(k.PublicKey(), v.M, []byte("ctx"), v.S); !errors.Is(err, ErrSignature) {
		t.Error("verified under another context")
	}
}
