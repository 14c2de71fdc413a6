package keyring

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func wantKind(t testing.TB, what string, err error, kind kms.Kind) {
	t.Helper()
	if kms.KindOf(err) != kind {
		t.Errorf("%s: got %v (%v), want %v", what, kms.KindOf(err), err, kind)
	}
}

// wantErrOpen wants the one value, not merely the kind.
func wantErrOpen(t testing.TB, what string, err error) {
	t.Helper()
	if err != kms.ErrOpen { // identity on purpose: no wrapping that tells failures apart
		t.Errorf("%s: got %v, want kms.ErrOpen itself", what, err)
	}
}

// hexBytes is a byte string in hexadecimal.
type hexBytes []byte

func (h *hexBytes) UnmarshalText(text []byte) (err error) {
	*h, err = hex.DecodeString(string(text))
	return err
}

func (h hexBytes) secret(t testing.TB) *secret.Bytes {
	t.Helper()
	s := must[*secret.Bytes](t)(secret.Copy(h))
	t.Cleanup(s.Destroy)
	return s
}

func (h hexBytes) keyID(t testing.TB) (id kms.KeyID) {
	t.Helper()
	if copy(id[:], h) != len(h) {
		t.Fatal("key id too long")
	}
	return id
}

// vectors are the known answers of test/vectors/keyring/format1.json.
type vectors struct {
	Note     string
	Messages []struct {
		Name               string
		Key                hexBytes
		KeyID              hexBytes `json:"key_id"`
		Version            uint32
		Context            Context
		Plaintext          hexBytes
		MessageSecretInput hexBytes `json:"message_secret_input"`
		MessageSecret      hexBytes `json:"message_secret"`
		AAD                hexBytes
		MessageKey         hexBytes `json:"message_key"`
		Commitment         hexBytes
		Ciphertext         hexBytes
	}
	Wrapped []struct {
		Algorithm  kms.Algorithm
		Purpose    kms.Purpose
		Cluster    string
		Keyring    string
		KEKVersion uint32   `json:"kek_version"`
		KeyID      hexBytes `json:"key_id"`
		Version    uint32
		KEK        hexBytes
		Material   hexBytes
		AAD        hexBytes
		Wrapped    hexBytes
	}
	Checks []struct {
		Material hexBytes
		Cluster  string
		Keyring  string
		KeyID    hexBytes `json:"key_id"`
		Version  uint32
		Node     string
		KCV      hexBytes
		Hash     hexBytes
	}
	DeviceChecks []struct {
		Material hexBytes
		Cluster  string
		Keyring  string
		KeyID    hexBytes `json:"key_id"`
		Version  uint32
		Node     string
		KCV      hexBytes
		Hash     hexBytes
	} `json:"device_checks"`
	Generated []struct {
		Algorithm kms.Algorithm
		Entropy   hexBytes
		Material  hexBytes
		PublicKey hexBytes `json:"public_key"`
	}
}

func loadVectors(t testing.TB) vectors {
	t.Helper()
	b, err := os.ReadFile("../../test/vectors/keyring/format1.json")
	if err != nil {
		t.Fatal(err)
	}
	var v vectors
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&v); err != nil {
		t.Fatal(err)
	}
	if len(v.Messages) == 0 || len(v.Wrapped) == 0 || len(v.Checks) == 0 || len(v.DeviceChecks) == 0 || len(v.Generated) == 0 {
		t.Fatal("a list of known answers is empty")
	}
	return v
}

var testID = kms.KeyID{0xc0, 0xff, 0xee, 15: 1}

func purposeOf(a kms.Algorithm) kms.Purpose {
	switch a {
	case kms.AES256GCM:
		return kms.Encrypt
	case kms.HMACSHA256:
		return kms.MAC
	}
	return kms.Sign
}

var algorithms = []kms.Algorithm{kms.AES256GCM, kms.HMACSHA256, kms.ECDSAP256, kms.ECDSAP384, kms.Ed25519}

func bindingOf(a kms.Algorithm) KeyBinding {
	return KeyBinding{Cluster: "0123456789abcdef", Keyring: "coalition", KEK: 1, KeyID: testID, Version: 2, Algorithm: a, Purpose: purposeOf(a)}
}

// newKey makes a key of an algorithm from entropy that seed selects.
func newKey(t testing.TB, a kms.Algorithm, seed byte) *Material {
	t.Helper()
	material, _, err := Generate(a, bytes.Repeat([]byte{seed}, EntropySize))
	if err != nil {
		t.Fatal(err)
	}
	m := must[*Material](t)(NewMaterial(bindingOf(a), material))
	t.Cleanup(m.Destroy)
	return m
}

// failingHMAC is a key that cannot be reached.
type failingHMAC struct{ err error }

func (f failingHMAC) HMAC(_ context.Context, dst, _ []byte) ([]byte, error) { return dst, f.err }

var bg = context.Background()

var errBroken = errors.New("broken on purpose")
