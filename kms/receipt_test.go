package kms

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"math/big"
	"strings"
	"testing"
)

// TestReceiptMessage pins the signed bytes.
func TestReceiptMessage(t *testing.T) {
	m := ReceiptMessage("c1", "vault", KeyID{15: 0xff}, 2, "node-fr-1")
	want := hex.EncodeToString([]byte("conclave/receipt/1\x00")) +
		"00000002" + "6331" + "00000005" + "7661756c74" + "00000010" + "000000000000000000000000000000ff" +
		"00000002" + "00000009" + "6e6f64652d66722d31"
	if got := hex.EncodeToString(m); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if !ReservedMessage(m) || !ReservedMessage([]byte(ReceiptPrefix)) || ReservedMessage([]byte(ReceiptPrefix[:18])) || ReservedMessage(nil) {
		t.Error("which messages are reserved")
	}
	if bytes.Equal(ReceiptMessage("c", "1vault", KeyID{}, 2, "n"), ReceiptMessage("c1", "vault", KeyID{}, 2, "n")) {
		t.Error("two subjects have the same message")
	}
}

func TestVerifyReceipt(t *testing.T) {
	message := ReceiptMessage("c1", "vault", KeyID{1}, 2, "node-fr-1")
	for alg, curve := range map[Algorithm]elliptic.Curve{ECDSAP256: elliptic.P256(), ECDSAP384: elliptic.P384()} {
		key, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		public, err := key.PublicKey.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		sum256, sum384 := sha256.Sum256(message), sha512.Sum384(message)
		digest := sum256[:]
		if alg == ECDSAP384 {
			digest = sum384[:]
		}
		r, s, err := ecdsa.Sign(rand.Reader, key, digest)
		if err != nil {
			t.Fatal(err)
		}
		size := len(public) / 2
		raw := func(r, s *big.Int) []byte {
			return append(r.FillBytes(make([]byte, size)), s.FillBytes(make([]byte, size))...)
		}
		good := raw(r, s)
		if err := VerifyReceipt(alg, public, message, good); err != nil {
			t.Errorf("%s: %v", alg, err)
		}
		n := curve.Params().N
		bad := map[string][]byte{
			"none": nil, "short": good[1:], "long": append(bytes.Clone(good), 0), "r is 0": raw(new(big.Int), s), "s is 0": raw(r, new(big.Int)),
			"r is the order": raw(n, s), "s is the order": raw(r, n), "swapped": raw(s, r), "all ones": bytes.Repeat([]byte{0xff}, 2*size),
		}
		if sum := new(big.Int).Add(r, n); sum.BitLen() <= 8*size {
			bad["r beyond the order"] = raw(sum, s)
		}
		for i := range good {
			flipped := bytes.Clone(good)
			flipped[i] ^= 0x40
			bad["flipped "+hex.EncodeToString([]byte{byte(i)})] = flipped
		}
		for name, sig := range bad {
			if err := VerifyReceipt(alg, public, message, sig); !errors.Is(err, BadSignature) {
				t.Errorf("%s %s: %v", alg, name, err)
			}
		}
		if err := VerifyReceipt(alg, public, append(message, 0), good); !errors.Is(err, BadSignature) {
			t.Errorf("%s: another message: %v", alg, err)
		}
		for name, key := range map[string][]byte{"none": nil, "short": public[1:], "infinity": {0}, "no point": append(bytes.Clone(public[:len(public)-1]), public[len(public)-1]^1)} {
			if err := VerifyReceipt(alg, key, message, good); !errors.Is(err, Invalid) {
				t.Errorf("%s public key, %s: %v", alg, name, err)
			}
		}
	}
	for _, alg := range []Algorithm{Ed25519, AES256GCM, HMACSHA256, ""} {
		if err := VerifyReceipt(alg, make([]byte, 32), message, make([]byte, 64)); !errors.Is(err, Invalid) {
			t.Errorf("%q: %v", alg, err)
		}
	}
}

func TestCheckText(t *testing.T) {
	for _, s := range []string{"", "SoftHSM 2.6.1", "Nitrokey HSM 2, Zürich", strings.Repeat("x", MaxText)} {
		if err := CheckText("device", s); err != nil {
			t.Errorf("%q: %v", s, err)
		}
	}
	for _, s := range []string{"a\nb", "a\x00", "\x1b[2K", "\u202e", "\xff", "\u200b", strings.Repeat("x", MaxText+1)} {
		if err := CheckText("device", s); !errors.Is(err, Invalid) || !strings.HasPrefix(err.Error(), "device ") {
			t.Errorf("%q: %v", s, err)
		}
	}
}
