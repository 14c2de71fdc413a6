package contract

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"math/big"
	"strings"
	"sync"
	"testing"
)

// digestOf returns the digest that the device signs: SHA-384 or SHA-256.
func digestOf(d Device, msg string) []byte {
	if d.SigningKey().Curve.Params().BitSize == 256 {
		h := sha256.Sum256([]byte(msg))
		return h[:]
	}
	h := sha512.Sum384([]byte(msg))
	return h[:]
}

func testShapes(t *testing.T, d Device) {
	a, s := d.AgreementKey(), d.SigningKey()
	if a == nil || s == nil {
		t.Fatal("a public key is missing")
	}
	sp, err := s.ECDH()
	if err != nil {
		t.Fatal(err)
	}
	if a.Curve() != sp.Curve() || a.Curve() != ecdh.P384() && a.Curve() != ecdh.P256() {
		t.Fatalf("agreement key on %v, signing key on %v", a.Curve(), sp.Curve())
	}
	if a.Equal(sp) {
		t.Fatal("agreement and signing key are one key")
	}
	if d.Describe() == "" {
		t.Fatal("no description")
	}
}

func testECDH(t *testing.T, d Device) {
	curve := d.AgreementKey().Curve()
	for range 8 {
		eph, err := curve.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		want, err := eph.ECDH(d.AgreementKey())
		if err != nil {
			t.Fatal(err)
		}
		got, err := d.ECDH(context.Background(), eph.PublicKey())
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Fatal("device and software disagree")
		}
	}
}

func testECDHRefuses(t *testing.T, d Device) {
	for _, c := range []ecdh.Curve{ecdh.P256(), ecdh.P384(), ecdh.P521(), ecdh.X25519()} {
		if c == d.AgreementKey().Curve() {
			continue
		}
		k, err := c.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if z, err := d.ECDH(context.Background(), k.PublicKey()); err == nil || z != nil {
			t.Errorf("a peer on %v was taken", c)
		}
	}
	if _, err := d.ECDH(context.Background(), nil); err == nil {
		t.Error("a nil peer was taken")
	}
}

func testSign(t *testing.T, d Device) {
	n := (d.SigningKey().Curve.Params().BitSize + 7) / 8
	for _, msg := range []string{"", "a", "some message"} {
		sig, err := d.Sign(context.Background(), digestOf(d, msg))
		if err != nil {
			t.Fatal(err)
		}
		if len(sig) != 2*n {
			t.Fatalf("signature of %d bytes, want %d", len(sig), 2*n)
		}
		if !verify(d.SigningKey(), digestOf(d, msg), sig) {
			t.Fatal("signature does not verify")
		}
		if verify(d.SigningKey(), digestOf(d, msg+"x"), sig) {
			t.Fatal("signature verifies for another message")
		}
	}
}

func verify(pub *ecdsa.PublicKey, digest, sig []byte) bool {
	n := len(sig) / 2
	return ecdsa.Verify(pub, digest, new(big.Int).SetBytes(sig[:n]), new(big.Int).SetBytes(sig[n:]))
}

func testSignRefuses(t *testing.T, d Device) {
	good := len(digestOf(d, ""))
	for _, n := range []int{0, 1, 20, 28, 31, 32, 33, 47, 48, 49, 64, 128} {
		if n == good {
			continue
		}
		if _, err := d.Sign(context.Background(), make([]byte, n)); err == nil {
			t.Errorf("a digest of %d bytes was signed", n)
		}
	}
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i + 1)
	}
	return b
}

func mustWrap(t *testing.T, d Device, aad, key []byte) []byte {
	t.Helper()
	blob, err := d.Wrap(context.Background(), aad, key)
	if err != nil {
		t.Fatalf("Wrap of %d bytes: %v", len(key), err)
	}
	return blob
}

func mustUnwrap(t *testing.T, d Device, aad, blob, want []byte) {
	t.Helper()
	got, err := d.Unwrap(context.Background(), aad, blob)
	if err != nil {
		t.Fatalf("Unwrap of %d bytes: %v", len(want), err)
	}
	defer got.Destroy()
	if !bytes.Equal(got.Reveal(), want) {
		t.Fatalf("Unwrap of %d bytes returned another key", len(want))
	}
}

func mustRefuse(t *testing.T, d Device, what string, aad, blob []byte) {
	t.Helper()
	got, err := d.Unwrap(context.Background(), aad, blob)
	if err == nil {
		got.Destroy()
		t.Errorf("%s was opened", what)
	}
}

func testWrapSizes(t *testing.T, d Device) {
	aad := []byte("context")
	for n := 1; n <= 96; n++ {
		key := pattern(n)
		blob := mustWrap(t, d, aad, key)
		if n >= 8 && bytes.Contains(blob, key) {
			t.Fatalf("the wrapping of %d bytes shows them", n)
		}
		mustUnwrap(t, d, aad, blob, key)
	}
}

func testWrapRefuses(t *testing.T, d Device) {
	for _, n := range []int{0, 97, 128, 4096} {
		if _, err := d.Wrap(context.Background(), nil, make([]byte, n)); err == nil {
			t.Errorf("a key of %d bytes was wrapped", n)
		}
	}
}

func testWrapFresh(t *testing.T, d Device) {
	seen := map[string]bool{}
	for range 16 {
		blob := string(mustWrap(t, d, nil, pattern(32)))
		if seen[blob] {
			t.Fatal("two wrappings are equal")
		}
		seen[blob] = true
	}
}

func testAAD(t *testing.T, d Device) {
	key := pattern(32)
	aads := [][]byte{nil, {0}, {0, 0}, []byte("a"), []byte("ab"), []byte("b"), bytes.Repeat([]byte{7}, 1024)}
	for i, aad := range aads {
		blob := mustWrap(t, d, aad, key)
		for j, other := range aads {
			if i == j {
				mustUnwrap(t, d, other, blob, key)
			} else {
				mustRefuse(t, d, "a blob under other AAD", other, blob)
			}
		}
	}
	mustUnwrap(t, d, []byte{}, mustWrap(t, d, nil, key), key) // nil and empty are the same
}

func testAltered(t *testing.T, d Device) {
	key := pattern(32)
	blob := mustWrap(t, d, nil, key)
	for i := range blob {
		bad := bytes.Clone(blob)
		bad[i] ^= 1 << (i % 8)
		mustRefuse(t, d, "an altered blob", nil, bad)
	}
	mustUnwrap(t, d, nil, blob, key)
}

func testTruncated(t *testing.T, d Device) {
	blob := mustWrap(t, d, nil, pattern(32))
	for n := range blob {
		mustRefuse(t, d, "a truncated blob", nil, blob[:n])
	}
	mustRefuse(t, d, "a lengthened blob", nil, append(bytes.Clone(blob), 0))
	mustRefuse(t, d, "a nil blob", nil, nil)
	mustRefuse(t, d, "a huge blob", nil, make([]byte, 1<<20))
}

func testRandom(t *testing.T, d Device) {
	for _, n := range []int{0, 1, 31, 32, 33, 64, 65, 128, 4096, 4097} {
		b := make([]byte, n)
		if err := d.Random(context.Background(), b); err != nil {
			t.Fatalf("Random of %d bytes: %v", n, err)
		}
		if n >= 31 && bytes.Count(b, []byte{0}) > n/4+8 {
			t.Fatalf("Random of %d bytes left zeros", n)
		}
		if n >= 64 && bytes.Equal(b[:n/2], b[n-n/2:]) {
			t.Fatalf("Random of %d bytes repeats itself", n)
		}
	}
	if err := d.Random(context.Background(), nil); err != nil {
		t.Fatal(err)
	}
}

func testCheck(t *testing.T, d Device) {
	for range 3 {
		if err := d.Check(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
}

// operations are all calls that go to the device, with fit arguments.
func operations(d Device, blob []byte) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"ECDH": func(ctx context.Context) error {
			_, err := d.ECDH(ctx, d.AgreementKey())
			return err
		},
		"Sign": func(ctx context.Context) error {
			_, err := d.Sign(ctx, digestOf(d, "m"))
			return err
		},
		"Wrap": func(ctx context.Context) error {
			_, err := d.Wrap(ctx, nil, pattern(32))
			return err
		},
		"Unwrap": func(ctx context.Context) error {
			got, err := d.Unwrap(ctx, nil, blob)
			got.Destroy()
			return err
		},
		"Random": func(ctx context.Context) error { return d.Random(ctx, make([]byte, 32)) },
		"Check":  func(ctx context.Context) error { return d.Check(ctx) },
	}
}

func testCancelled(t *testing.T, d Device) {
	blob := mustWrap(t, d, nil, pattern(32))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	for name, op := range operations(d, blob) {
		if err := op(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("%s with a cancelled context: %v", name, err)
		}
		if err := op(context.Background()); err != nil {
			t.Errorf("%s afterwards: %v", name, err)
		}
	}
}

// testInputs: a device changes none of its arguments.
func testInputs(t *testing.T, d Device) {
	aad, key, digest := pattern(16), pattern(32), digestOf(d, "m")
	blob := mustWrap(t, d, aad, key)
	kept := bytes.Clone(blob)
	mustUnwrap(t, d, aad, blob, key)
	if _, err := d.Sign(context.Background(), digest); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(aad, pattern(16)) || !bytes.Equal(key, pattern(32)) ||
		!bytes.Equal(blob, kept) || !bytes.Equal(digest, digestOf(d, "m")) {
		t.Fatal("an argument was changed")
	}
}

// testErrors: what is refused says why without showing keys.
func testErrors(t *testing.T, d Device) {
	ctx := context.Background()
	long := []byte(strings.Repeat("KEYMATERIAL!", 9))
	blob := mustWrap(t, d, nil, long[:32])
	bad := bytes.Clone(blob)
	bad[len(bad)-1] ^= 1
	_, tooLong := d.Wrap(ctx, nil, long)
	_, altered := d.Unwrap(ctx, nil, bad)
	_, otherAAD := d.Unwrap(ctx, long[:32], blob)
	_, digest := d.Sign(ctx, long[:20])
	for _, err := range []error{tooLong, altered, otherAAD, digest} {
		if err == nil {
			t.Fatal("something was not refused")
		}
		for _, shown := range []string{"KEYMATERIAL", hex.EncodeToString(long[:4]), base64.StdEncoding.EncodeToString(long[:6]), hex.EncodeToString(blob[len(blob)-8:])} {
			if strings.Contains(err.Error(), shown) {
				t.Fatal("an error shows input bytes")
			}
		}
	}
}

func testConcurrent(t *testing.T, d Device) {
	const goroutines, rounds = 32, 4
	eph, err := d.AgreementKey().Curve().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	z, err := eph.ECDH(d.AgreementKey())
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for g := range goroutines {
		wg.Go(func() {
			for r := range rounds {
				if err := mixed(d, eph.PublicKey(), z, g+r); err != nil {
					t.Errorf("goroutine %d: %v", g, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// mixed makes the call number i and checks its result.
func mixed(d Device, peer *ecdh.PublicKey, z []byte, i int) error {
	ctx := context.Background()
	wrong := errors.New("wrong result")
	switch i % 5 {
	case 0:
		got, err := d.ECDH(ctx, peer)
		if err == nil && !bytes.Equal(got, z) {
			err = wrong
		}
		return err
	case 1:
		sig, err := d.Sign(ctx, digestOf(d, "m"))
		if err == nil && !verify(d.SigningKey(), digestOf(d, "m"), sig) {
			err = wrong
		}
		return err
	case 2:
		key, aad := pattern(1+i%96), []byte{byte(i)}
		blob, err := d.Wrap(ctx, aad, key)
		if err != nil {
			return err
		}
		got, err := d.Unwrap(ctx, aad, blob)
		defer got.Destroy()
		if err == nil && !bytes.Equal(got.Reveal(), key) {
			err = wrong
		}
		return err
	case 3:
		return d.Random(ctx, make([]byte, 65))
	}
	return d.Check(ctx)
}

func testClose(t *testing.T, d Device) {
	ops := operations(d, mustWrap(t, d, nil, pattern(32)))
	for range 3 {
		closeDevice(t, d)
	}
	for name, op := range ops {
		if op(context.Background()) == nil {
			t.Errorf("%s after Close was not refused", name)
		}
	}
	if d.AgreementKey() == nil || d.SigningKey() == nil {
		t.Error("the public keys are gone after Close")
	}
	closeDevice(t, d)
}

func testReopen(t *testing.T, open func(*testing.T) Device) {
	key, aad := pattern(64), []byte("context")
	first := open(t)
	blob := mustWrap(t, first, aad, key)
	agreement, signing := first.AgreementKey(), first.SigningKey()
	closeDevice(t, first)

	second := open(t)
	defer closeDevice(t, second)
	if !second.AgreementKey().Equal(agreement) || !second.SigningKey().Equal(signing) {
		t.Fatal("other public keys after opening again")
	}
	mustUnwrap(t, second, aad, blob, key)
	testECDH(t, second)
	testSign(t, second)
}
