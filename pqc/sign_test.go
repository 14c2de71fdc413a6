package pqc

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/cloudflare/circl/sign/mldsa/mldsa65"
)

var signatureSuites = []SuiteID{ECDSAP256SHA256, ECDSAP384SHA384, Ed25519, MLDSA65Ed25519}

// signer makes a key of any signature suite and signs as a device would.
func newSigner(t testing.TB, id SuiteID) (pub []byte, sign func(message, context []byte) []byte) {
	t.Helper()
	switch id {
	case MLDSA65Ed25519:
		k := must[*HybridKey](t)(GenerateHybrid(nil))
		return k.PublicKey(), func(m, c []byte) []byte { return must[[]byte](t)(k.Sign(m, c)) }
	case Ed25519:
		p, k, err := ed25519.GenerateKey(nil)
		if err != nil {
			t.Fatal(err)
		}
		return p, func(m, c []byte) []byte { return ed25519.Sign(k, must[[]byte](t)(ToBeSigned(m, c))) }
	}
	curve := elliptic.P256()
	if id == ECDSAP384SHA384 {
		curve = elliptic.P384()
	}
	k := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(curve, rand.Reader))
	return must[[]byte](t)(k.PublicKey.Bytes()), func(m, c []byte) []byte {
		r, s, err := ecdsa.Sign(rand.Reader, k, must[[]byte](t)(Digest(id, m, c)))
		if err != nil {
			t.Fatal(err)
		}
		n := curve.Params().BitSize / 8
		return append(r.FillBytes(make([]byte, n)), s.FillBytes(make([]byte, n))...)
	}
}

func TestVerifyEverySuite(t *testing.T) {
	for _, id := range signatureSuites {
		t.Run(id.String(), func(t *testing.T) {
			pub, sign := newSigner(t, id)
			s, _ := Lookup(id)
			message, context := []byte("message"), []byte("context")
			sig := sign(message, context)
			if len(pub) != s.PublicKeySize || len(sig) != s.SignatureSize {
				t.Fatalf("%d and %d bytes, the table says %d and %d", len(pub), len(sig), s.PublicKeySize, s.SignatureSize)
			}
			if err := Verify(id, pub, message, context, sig); err != nil {
				t.Fatal(err)
			}
			if err := Verify(id, pub, nil, nil, sign(nil, nil)); err != nil {
				t.Errorf("empty message and context: %v", err)
			}
			refuseVariants(t, id, pub, message, context, sig)
		})
	}
}

func refuseVariants(t *testing.T, id SuiteID, pub, message, context, sig []byte) {
	t.Helper()
	refuse := func(what string, want error, pub, message, context, sig []byte) {
		t.Helper()
		if err := Verify(id, pub, message, context, sig); !errors.Is(err, want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	refuse("other message", ErrSignature, pub, []byte("messagf"), context, sig)
	refuse("other context", ErrSignature, pub, message, []byte("contexu"), sig)
	refuse("no context", ErrSignature, pub, message, nil, sig)
	// The length prefix keeps a byte from moving between context and message.
	refuse("shifted boundary", ErrSignature, pub, []byte("tmessage"), []byte("contex"), sig)
	refuse("long context", ErrContext, pub, message, make([]byte, 256), sig)
	for i := 0; i < len(sig); i += 1 + len(sig)/61 {
		b := bytes.Clone(sig)
		b[i] ^= 0x10
		refuse(fmt.Sprint("bit flipped in byte ", i), ErrSignature, pub, message, context, b)
	}
	refuse("no signature", ErrSignature, pub, message, context, nil)
	refuse("zero signature", ErrSignature, pub, message, context, make([]byte, len(sig)))
	refuse("short signature", ErrSignature, pub, message, context, sig[1:])
	refuse("long signature", ErrSignature, pub, message, context, append(bytes.Clone(sig), 0))
	refuse("no key", ErrPublicKey, nil, message, context, sig)
	refuse("short key", ErrPublicKey, pub[1:], message, context, sig)
	refuse("long key", ErrPublicKey, append(bytes.Clone(pub), 0), message, context, sig)
	stranger, _ := newSigner(t, id)
	refuse("another key", ErrSignature, stranger, message, context, sig)
	for _, other := range signatureSuites {
		if other != id {
			if err := Verify(other, pub, message, context, sig); err == nil {
				t.Errorf("verified as %v", other)
			}
		}
	}
}

func TestVerifyRefusesOtherSuites(t *testing.T) {
	for _, id := range []SuiteID{0, 1, MLKEM768P256, XWing, CiphertextFormat1, 0xC1FF} {
		if err := Verify(id, nil, nil, nil, nil); !errors.Is(err, ErrSuite) {
			t.Errorf("%v: %v", id, err)
		}
	}
}

// Each half is needed, and no half of one signature passes for another.
func TestHybridNeedsBothHalves(t *testing.T) {
	message, context := []byte("message"), []byte("context")
	k := must[*HybridKey](t)(GenerateHybrid(nil))
	pub := k.PublicKey()
	sig := must[[]byte](t)(k.Sign(message, context))
	pq, ed := sig[:mldsa65.SignatureSize], sig[mldsa65.SignatureSize:]
	other := must[[]byte](t)(k.Sign([]byte("other"), context))
	stranger := must[*HybridKey](t)(GenerateHybrid(nil))
	theirs := must[[]byte](t)(stranger.Sign(message, context))

	flip := func(b []byte, i int) []byte {
		c := bytes.Clone(b)
		c[i] ^= 1
		return c
	}
	for name, s := range map[string][]byte{
		"ML-DSA half tampered":         slices.Concat(flip(pq, 100), ed),
		"ML-DSA commitment tampered":   slices.Concat(flip(pq, 0), ed),
		"ML-DSA hint tampered":         slices.Concat(flip(pq, len(pq)-1), ed),
		"Ed25519 half tampered":        slices.Concat(pq, flip(ed, 0)),
		"Ed25519 scalar tampered":      slices.Concat(pq, flip(ed, 63)),
		"ML-DSA half zero":             slices.Concat(make([]byte, len(pq)), ed),
		"Ed25519 half zero":            slices.Concat(pq, make([]byte, len(ed))),
		"ML-DSA of another message":    slices.Concat(other[:len(pq)], ed),
		"Ed25519 of another message":   slices.Concat(pq, other[len(pq):]),
		"ML-DSA of another key":        slices.Concat(theirs[:len(pq)], ed),
		"Ed25519 of another key":       slices.Concat(pq, theirs[len(pq):]),
		"halves in the wrong order":    slices.Concat(ed, pq),
		"ML-DSA half alone":            pq,
		"Ed25519 half alone":           ed,
		"half of the classical suite":  slices.Concat(pq, ed25519.Sign(k.ed, must[[]byte](t)(ToBeSigned(message, context)))),
		"Ed25519 over the bare digest": slices.Concat(pq, ed25519.Sign(k.ed, message)),
	} {
		if err := VerifyHybrid(pub, message, context, s); !errors.Is(err, ErrSignature) {
			t.Errorf("%s: %v", name, err)
		}
	}
	mixed := slices.Concat(pub[:mldsa65.PublicKeySize], stranger.PublicKey()[mldsa65.PublicKeySize:])
	if err := VerifyHybrid(mixed, message, context, sig); !errors.Is(err, ErrSignature) {
		t.Errorf("a key of two custodians: %v", err)
	}
	// Alone, under their own algorithms, the halves verify nothing but M'.
	if ed25519.Verify(pub[mldsa65.PublicKeySize:], message, ed) {
		t.Error("the Ed25519 half verifies as a plain signature")
	}
	if err := Verify(Ed25519, pub[mldsa65.PublicKeySize:], message, context, ed); !errors.Is(err, ErrSignature) {
		t.Errorf("the Ed25519 half verifies as a suite of its own: %v", err)
	}
	var pqPub mldsa65.PublicKey
	pqPub.Unpack((*[mldsa65.PublicKeySize]byte)(pub))
	if mldsa65.Verify(&pqPub, message, context, pq) || mldsa65.Verify(&pqPub, message, nil, pq) {
		t.Error("the ML-DSA half verifies as a plain signature")
	}
}

func TestHybridKey(t *testing.T) {
	seed := bytes.Repeat([]byte{5}, HybridSeedSize)
	a := must[*HybridKey](t)(GenerateHybrid(bytes.NewReader(seed)))
	b := must[*HybridKey](t)(NewHybridKey(mustSecret(t, seed)))
	if !bytes.Equal(a.PublicKey(), b.PublicKey()) {
		t.Error("one seed, two keys")
	}
	clear(a.PublicKey())
	if !bytes.Equal(a.PublicKey(), b.PublicKey()) {
		t.Error("the key's own bytes can be changed from outside")
	}
	if _, err := a.Sign(nil, make([]byte, MaxContext+1)); !errors.Is(err, ErrContext) {
		t.Errorf("long context: %v", err)
	}
	if sig := must[[]byte](t)(a.Sign([]byte("m"), make([]byte, MaxContext))); VerifyHybrid(a.PublicKey(), []byte("m"), make([]byte, MaxContext), sig) != nil {
		t.Error("a context of 255 bytes does not verify")
	}
	for _, n := range []int{0, 32, 63, 65} {
		if _, err := NewHybridKey(mustSecret(t, make([]byte, n))); !errors.Is(err, ErrKey) {
			t.Errorf("seed of %d bytes: %v", n, err)
		}
	}
	if _, err := GenerateHybrid(bytes.NewReader(seed[1:])); err == nil {
		t.Error("accepted a reader that ended early")
	}
	a.Destroy()
	a.Destroy()
	if _, err := a.Sign([]byte("m"), nil); !errors.Is(err, ErrKey) {
		t.Errorf("signed with a destroyed key: %v", err)
	}
}

func TestDigest(t *testing.T) {
	got := must[[]byte](t)(Digest(ECDSAP256SHA256, []byte("message"), []byte("ctx")))
	want := sha256.Sum256([]byte("\x03ctxmessage"))
	if !bytes.Equal(got, want[:]) {
		t.Error("the digest is not SHA-256 of length ‖ context ‖ message")
	}
	if d := must[[]byte](t)(Digest(ECDSAP384SHA384, nil, nil)); len(d) != 48 {
		t.Errorf("%d bytes", len(d))
	}
	for _, id := range []SuiteID{Ed25519, MLDSA65Ed25519, XWing, 0} {
		if _, err := Digest(id, nil, nil); !errors.Is(err, ErrSuite) {
			t.Errorf("%v: %v", id, err)
		}
	}
	if _, err := Digest(ECDSAP256SHA256, nil, make([]byte, 256)); !errors.Is(err, ErrContext) {
		t.Error(err)
	}
	if _, err := ToBeSigned(nil, make([]byte, 256)); !errors.Is(err, ErrContext) {
		t.Error(err)
	}
}

func TestECDSARefusesBadPoints(t *testing.T) {
	pub, sign := newSigner(t, ECDSAP256SHA256)
	sig := sign([]byte("m"), nil)
	off := bytes.Clone(pub)
	off[64] ^= 1
	hybridForm := bytes.Clone(pub)
	hybridForm[0] = 6 | pub[64]&1
	for name, p := range map[string][]byte{"off the curve": off, "hybrid form": hybridForm, "zero": make([]byte, 65)} {
		if err := Verify(ECDSAP256SHA256, p, []byte("m"), nil, sig); !errors.Is(err, ErrPublicKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestConcurrentSign(t *testing.T) {
	k := must[*HybridKey](t)(GenerateHybrid(nil))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			sig, err := k.Sign([]byte("m"), nil)
			if err != nil || VerifyHybrid(k.PublicKey(), []byte("m"), nil, sig) != nil {
				t.Error("a concurrent signature does not verify")
			}
		})
	}
	wg.Wait()
}
