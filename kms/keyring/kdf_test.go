package keyring

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
)

// TestHMACKnownAnswers are the test cases 1 to 4, 6 and 7 of RFC 4231, section 4.
func TestHMACKnownAnswers(t *testing.T) {
	rep := func(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }
	count := make([]byte, 25)
	for i := range count {
		count[i] = byte(i + 1)
	}
	for i, v := range []struct {
		key, data []byte
		want      string
	}{
		{rep(0x0b, 20), []byte("Hi There"), "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"},
		{[]byte("Jefe"), []byte("what do ya want for nothing?"), "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"},
		{rep(0xaa, 20), rep(0xdd, 50), "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe"},
		{count, rep(0xcd, 50), "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b"},
		{rep(0xaa, 131), []byte("Test Using Larger Than Block-Size Key - Hash Key First"), "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"},
		{rep(0xaa, 131), []byte("This is a test using a larger than block-size key and a larger than block-size data. The key needs to be hashed before being used by the HMAC algorithm."), "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2"},
	} {
		if sum := hmacSHA256(v.key, v.data); hex.EncodeToString(sum[:]) != v.want {
			t.Errorf("case %d: %x", i, sum)
		}
	}
}

// TestHMACIsTheLibrarys compares every length of key and input about the
// boundaries with crypto/hmac.
func TestHMACIsTheLibrarys(t *testing.T) {
	data := make([]byte, 2*shortInput)
	for i := range data {
		data[i] = byte(i * 7)
	}
	for _, k := range []int{0, 1, 31, 32, 33, 63, 64, 65, 100} {
		for n := 0; n <= len(data); n++ {
			h := hmac.New(sha256.New, data[:k])
			h.Write(data[:n])
			if sum := hmacSHA256(data[:k], data[:n]); !bytes.Equal(sum[:], h.Sum(nil)) {
				t.Fatalf("key of %d and input of %d bytes: another result than crypto/hmac", k, n)
			}
		}
	}
}

func TestCheckValueKnownAnswers(t *testing.T) {
	for _, v := range loadVectors(t).Checks {
		kcv := CheckValue(v.Material.secret(t), v.Cluster, v.Keyring, v.KeyID.keyID(t), v.Version, v.Node)
		if !bytes.Equal(kcv, v.KCV) || !bytes.Equal(CheckHash(kcv), v.Hash) {
			t.Errorf("%x at %s: check value is another", v.KeyID, v.Node)
		}
	}
}

func TestCheckValueIsBound(t *testing.T) {
	s, other := hexBytes(bytes.Repeat([]byte{1}, 32)).secret(t), hexBytes(bytes.Repeat([]byte{2}, 32)).secret(t)
	seen := map[string]bool{}
	for _, kcv := range [][]byte{
		CheckValue(s, "c", "k", testID, 1, "n"),
		CheckValue(other, "c", "k", testID, 1, "n"),
		CheckValue(s, "d", "k", testID, 1, "n"),
		CheckValue(s, "c", "l", testID, 1, "n"),
		CheckValue(s, "ck", "", testID, 1, "n"),
		CheckValue(s, "c", "k", kms.KeyID{}, 1, "n"),
		CheckValue(s, "c", "k", testID, 2, "n"),
		CheckValue(s, "c", "k", testID, 1, "m"),
	} {
		if len(kcv) != 32 {
			t.Errorf("a check value has %d bytes", len(kcv))
		}
		seen[string(kcv)] = true
	}
	if len(seen) != 8 {
		t.Errorf("%d different check values, want 8", len(seen))
	}
	m := newKey(t, kms.ECDSAP384, 1)
	b := m.Binding()
	if !bytes.Equal(must[[]byte](t)(m.CheckValue(bg, "n")), CheckValue(m.bytes, b.Cluster, b.Keyring, b.KeyID, b.Version, "n")) {
		t.Error("Material.CheckValue is another than CheckValue")
	}
}

func TestLabelsArePrefixFree(t *testing.T) {
	labels := []string{labelMessageSecret, labelMessageKeys, labelCheckValue, labelDeviceCheck, labelGenerate}
	for i, a := range labels {
		for j, b := range labels {
			if i != j && strings.HasPrefix(a, b) {
				t.Errorf("%q starts with %q", a, b)
			}
		}
		if !reserved(kdfInput(a, nil, 256)) {
			t.Errorf("an input with the label %q is not reserved", a)
		}
	}
}
