package keyring

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/test/fakedevice"
)

func TestGenerateKnownAnswers(t *testing.T) {
	for _, v := range loadVectors(t).Generated {
		if v.Algorithm == "kek" {
			kek := must[*secret.Bytes](t)(GenerateKEK(v.Entropy))
			if !bytes.Equal(kek.Reveal(), v.Material) {
				t.Error("KEK is another")
			}
			kek.Destroy()
			continue
		}
		material, public, err := Generate(v.Algorithm, v.Entropy)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(material.Reveal(), v.Material) || !bytes.Equal(public, v.PublicKey) {
			t.Errorf("%s: material or public key is another", v.Algorithm)
		}
		material.Destroy()
	}
}

func TestGenerateRefuses(t *testing.T) {
	_, _, err := Generate("rot13", make([]byte, EntropySize))
	wantKind(t, "unknown algorithm", err, kms.Invalid)
	for _, n := range []int{0, 32, EntropySize - 1, EntropySize + 1} {
		_, err := GenerateKEK(make([]byte, n))
		wantKind(t, "KEK", err, kms.Invalid)
		_, _, err = Generate(kms.AES256GCM, make([]byte, n))
		wantKind(t, "key", err, kms.Invalid)
	}
	for _, a := range []kms.Algorithm{kms.ECDSAP256, kms.ECDSAP384} {
		n := curveOf(a).Params().N.FillBytes(make([]byte, materialSize(a)))
		for what, scalar := range map[string]hexBytes{"zero": make([]byte, len(n)), "n": n, "all ones": bytes.Repeat([]byte{0xff}, len(n)), "short": n[1:]} {
			if _, err := publicKeyOf(a, scalar.secret(t)); err == nil {
				t.Errorf("%s: the scalar %s makes a key", a, what)
			}
			s := must[*secret.Bytes](t)(secret.Copy(scalar))
			_, err := NewMaterial(bindingOf(a), s)
			wantKind(t, what, err, kms.Invalid)
			if s.Len() != 0 {
				t.Error("NewMaterial failed and left the secret alive")
			}
		}
	}
}

func TestEntropy(t *testing.T) {
	dev := must[*fakedevice.Device](t)(fakedevice.New(nil))
	defer dev.Close()
	ctx := context.Background()
	// A device that always says the same must not matter, nor one that repeats.
	dev.Corrupt(func(op string, out []byte) { clear(out) })
	a, b := must[*secret.Bytes](t)(Entropy(ctx, dev)), must[*secret.Bytes](t)(Entropy(ctx, dev))
	defer a.Destroy()
	defer b.Destroy()
	if a.Len() != EntropySize || a.Equal(b) || bytes.Equal(a.Reveal(), make([]byte, EntropySize)) {
		t.Error("the system's generator does not take part")
	}
	dev.Fail(func(string) error { return errBroken })
	_, err := Entropy(ctx, dev)
	wantKind(t, "a device that fails", err, kms.Unavailable)
}

func TestMaterialPurposes(t *testing.T) {
	for _, a := range algorithms {
		m, p := newKey(t, a, 1), purposeOf(a)
		for what, v := range map[kms.Purpose]func() error{
			kms.Encrypt: func() error { _, err := m.Encrypt(bg, nil, nil); return err },
			kms.MAC:     func() error { _, err := m.MAC(bg, nil); return err },
			kms.Sign:    func() error { _, err := m.Sign(bg, nil); return err },
		} {
			if want := p == what; (v() == nil) != want {
				t.Errorf("%s used to %s: %v", a, what, v())
			} else if !want {
				wantKind(t, fmt.Sprintf("%s used to %s", a, what), v(), kms.Invalid)
			}
		}
		if p != kms.MAC {
			wantErrOpen(t, "VerifyMAC", m.VerifyMAC(bg, nil, make([]byte, 32)))
		}
		if (m.PublicKey() != nil) != (p == kms.Sign) {
			t.Errorf("%s: public key of %d bytes", a, len(m.PublicKey()))
		}
		e := must[*secret.Bytes](t)(m.Export())
		if !e.Equal(m.bytes) || e == m.bytes {
			t.Errorf("%s: Export is not a copy", a)
		}
		e.Destroy()
	}
	_, err := NewMaterial(bindingOf(kms.AES256GCM), nil)
	wantKind(t, "no material", err, kms.Invalid)
	_, err = NewMaterial(KeyBinding{}, hexBytes(make([]byte, 32)).secret(t))
	wantKind(t, "no binding", err, kms.Invalid)
}

func TestMAC(t *testing.T) {
	m := newKey(t, kms.HMACSHA256, 1)
	for _, n := range []int{0, 1, shortInput, shortInput + 1, 100_000} {
		message := bytes.Repeat([]byte{7}, n)
		mac := must[[]byte](t)(m.MAC(bg, message))
		h := hmac.New(sha256.New, m.bytes.Reveal())
		h.Write(message)
		if !bytes.Equal(mac, h.Sum(nil)) {
			t.Fatal("not the HMAC-SHA-256 of the message")
		}
		if err := m.VerifyMAC(bg, message, mac); err != nil {
			t.Fatal(err)
		}
		for i := range mac {
			b := bytes.Clone(mac)
			b[i] ^= 0x10
			wantErrOpen(t, "flipped", m.VerifyMAC(bg, message, b))
			wantErrOpen(t, "truncated", m.VerifyMAC(bg, message, mac[:i]))
		}
		wantErrOpen(t, "extended", m.VerifyMAC(bg, message, append(bytes.Clone(mac), 0)))
		wantErrOpen(t, "another message", m.VerifyMAC(bg, append(message, 0), mac))
		wantErrOpen(t, "another key", newKey(t, kms.HMACSHA256, 2).VerifyMAC(bg, message, mac))
	}
}

func TestSignVerify(t *testing.T) {
	message := []byte("it is agreed")
	for _, a := range []kms.Algorithm{kms.ECDSAP256, kms.ECDSAP384, kms.Ed25519} {
		m := newKey(t, a, 1)
		sig := must[[]byte](t)(m.Sign(bg, message))
		if err := Verify(a, m.PublicKey(), message, sig); err != nil {
			t.Fatalf("%s: %v", a, err)
		}
		for i := range sig {
			b := bytes.Clone(sig)
			b[i] ^= 1
			wantKind(t, fmt.Sprintf("%s: byte %d", a, i), Verify(a, m.PublicKey(), message, b), kms.BadSignature)
			wantKind(t, fmt.Sprintf("%s: cut to %d", a, i), Verify(a, m.PublicKey(), message, sig[:i]), kms.BadSignature)
		}
		wantKind(t, "extended", Verify(a, m.PublicKey(), message, append(bytes.Clone(sig), 0)), kms.BadSignature)
		wantKind(t, "another message", Verify(a, m.PublicKey(), message[1:], sig), kms.BadSignature)
		wantKind(t, "another key", Verify(a, newKey(t, a, 2).PublicKey(), message, sig), kms.BadSignature)
		for n := range m.PublicKey() {
			wantKind(t, "public key cut", Verify(a, m.PublicKey()[:n], message, sig), kms.Invalid)
		}
	}
	for _, a := range []kms.Algorithm{"", kms.AES256GCM, kms.HMACSHA256} {
		wantKind(t, "no signatures", Verify(a, make([]byte, 32), message, make([]byte, 64)), kms.Invalid)
	}
	point := newKey(t, kms.ECDSAP256, 1).PublicKey()
	point[40] ^= 1
	wantKind(t, "off the curve", Verify(kms.ECDSAP256, point, message, nil), kms.Invalid)
}

// TestECDSAIsInterchangeable checks a signature with the hash named in kms, and
// verifies one that the library made.
func TestECDSAIsInterchangeable(t *testing.T) {
	message := []byte("it is agreed")
	d256, d384 := sha256.Sum256(message), sha512.Sum384(message)
	for a, d := range map[kms.Algorithm][]byte{kms.ECDSAP256: d256[:], kms.ECDSAP384: d384[:]} {
		key := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(curveOf(a), rand.Reader))
		sig := must[[]byte](t)(ecdsa.SignASN1(rand.Reader, key, d))
		if err := Verify(a, must[[]byte](t)(key.PublicKey.Bytes()), message, sig); err != nil {
			t.Errorf("%s: a signature of the library: %v", a, err)
		}
		m := newKey(t, a, 5)
		pub := must[*ecdsa.PublicKey](t)(ecdsa.ParseUncompressedPublicKey(curveOf(a), m.PublicKey()))
		if !ecdsa.VerifyASN1(pub, d, must[[]byte](t)(m.Sign(bg, message))) {
			t.Errorf("%s: the library does not verify ours", a)
		}
	}
	if curveOf(kms.ECDSAP256) != elliptic.P256() || curveOf(kms.ECDSAP384) != elliptic.P384() {
		t.Error("an algorithm on another curve")
	}
}

// TestEd25519KnownAnswer is TEST 3 of RFC 8032, section 7.1.
func TestEd25519KnownAnswer(t *testing.T) {
	unhex := func(s string) hexBytes { return must[[]byte](t)(hex.DecodeString(s)) }
	seed := unhex("c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7")
	b := bindingOf(kms.Ed25519)
	m := must[*Material](t)(NewMaterial(b, must[*secret.Bytes](t)(secret.Copy(seed))))
	defer m.Destroy()
	if !bytes.Equal(m.PublicKey(), unhex("fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025")) {
		t.Error("public key is another")
	}
	want := unhex("6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a")
	if sig := must[[]byte](t)(m.Sign(bg, []byte{0xaf, 0x82})); !bytes.Equal(sig, want) {
		t.Error("signature is another")
	}
}

func TestDestroyWipes(t *testing.T) {
	for _, a := range algorithms {
		material, _, err := Generate(a, bytes.Repeat([]byte{1}, EntropySize))
		if err != nil {
			t.Fatal(err)
		}
		m := must[*Material](t)(NewMaterial(bindingOf(a), material))
		mem := material.Reveal()
		m.Destroy()
		m.Destroy()
		if !bytes.Equal(mem, make([]byte, len(mem))) {
			t.Errorf("%s: the material survived Destroy", a)
		}
		if m.signer != nil && !bytes.Equal(m.signer.ed25519, make([]byte, len(m.signer.ed25519))) {
			t.Errorf("%s: the expanded key survived Destroy", a)
		}
		for what, f := range map[string]func() ([]byte, error){
			"encrypt": func() ([]byte, error) { return m.Encrypt(bg, nil, nil) },
			"MAC":     func() ([]byte, error) { return m.MAC(bg, nil) },
			"sign":    func() ([]byte, error) { return m.Sign(bg, nil) },
			"export":  func() ([]byte, error) { s, err := m.Export(); return s.Reveal(), err },
		} {
			if b, err := f(); err == nil || b != nil {
				t.Errorf("%s: %s works after Destroy", a, what)
			}
		}
		if kcv, err := m.CheckValue(bg, "n"); err == nil || kcv != nil {
			t.Errorf("%s: check value after Destroy", a)
		}
	}
}
