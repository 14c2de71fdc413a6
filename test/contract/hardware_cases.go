package contract

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/conclave-kms/conclave/kms/secret"
)

type macFunc = func(context.Context, []byte) ([]byte, error)

// maxMAC is the longest message in bytes of which every device makes a MAC.
const maxMAC = 64 << 10

func held(t *testing.T, b []byte) *secret.Bytes {
	t.Helper()
	s, err := secret.Copy(b)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Destroy)
	return s
}

func randomKey() []byte {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // crypto/rand.Read never returns an error
	return b
}

func wrappedHMAC(t *testing.T, h Hardware, d HardwareDevice, key []byte) []byte {
	t.Helper()
	_, public := d.ImportKey()
	blob, err := h.WrapHMAC(public, held(t, key), []byte("a label"))
	if err != nil {
		t.Fatal(err)
	}
	return blob
}

// loadHMAC loads a fresh key and returns a check of the closure against Go.
func loadHMAC(t *testing.T, h Hardware, d HardwareDevice) (check func(message []byte) error, mac macFunc, unload func()) {
	t.Helper()
	key := randomKey()
	mac, unload, err := d.LoadHMAC(context.Background(), wrappedHMAC(t, h, d, key))
	if err != nil {
		t.Fatal(err)
	}
	check = func(message []byte) error {
		got, err := mac(context.Background(), message)
		if err != nil {
			return err
		}
		want := hmac.New(sha256.New, key)
		_, _ = want.Write(message)
		if !hmac.Equal(got, want.Sum(nil)) {
			return errors.New("the MAC differs from Go's")
		}
		return nil
	}
	return check, mac, unload
}

func testImportKey(t *testing.T, h Hardware, d HardwareDevice) {
	kind, public := d.ImportKey()
	if kind != h.Kind || len(public) == 0 {
		t.Fatalf("ImportKey: kind %q, %d bytes", kind, len(public))
	}
	if _, again := d.ImportKey(); !bytes.Equal(public, again) {
		t.Fatal("ImportKey changes")
	}
}

func testHMAC(t *testing.T, h Hardware, d HardwareDevice) {
	check, _, unload := loadHMAC(t, h, d)
	defer unload()
	for _, n := range []int{0, 1, 31, 32, 55, 56, 63, 64, 65, 100, 512, 1023, 1024, 1025, 4095, 4096, 65535, maxMAC} {
		if err := check(pattern(n)); err != nil {
			t.Errorf("message of %d bytes: %v", n, err)
		}
	}
}

func testHMACRefuses(t *testing.T, h Hardware, d HardwareDevice) {
	_, mac, unload := loadHMAC(t, h, d)
	defer unload()
	for _, n := range []int{maxMAC + 1, 1 << 20} {
		if _, err := mac(context.Background(), make([]byte, n)); err == nil {
			t.Errorf("a message of %d bytes was taken", n)
		}
	}
}

// signer makes a key pair, loads the private half and returns a check.
func loadSigner(t *testing.T, h Hardware, d HardwareDevice, c ecdh.Curve) (check func(msg string) error, sign macFunc, unload func()) {
	t.Helper()
	blob, pub := wrappedSigner(t, h, d, c)
	sign, unload, err := d.LoadSigner(context.Background(), c, blob)
	if err != nil {
		t.Fatal(err)
	}
	n := (pub.Curve.Params().BitSize + 7) / 8
	return func(msg string) error {
		digest := digestFor(n, msg)
		sig, err := sign(context.Background(), digest)
		if err != nil {
			return err
		}
		if len(sig) != 2*n || !verify(pub, digest, sig) || verify(pub, digestFor(n, msg+"x"), sig) {
			return fmt.Errorf("a signature of %d bytes does not verify as it should", len(sig))
		}
		return nil
	}, sign, unload
}

func digestFor(n int, msg string) []byte {
	sum := sha256.Sum256([]byte(msg))
	return append(sum[:], make([]byte, 16)...)[:n]
}

func wrappedSigner(t *testing.T, h Hardware, d HardwareDevice, c ecdh.Curve) ([]byte, *ecdsa.PublicKey) {
	t.Helper()
	key, err := c.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ec := elliptic.P256()
	if c == ecdh.P384() {
		ec = elliptic.P384()
	}
	pub, err := ecdsa.ParseUncompressedPublicKey(ec, key.PublicKey().Bytes())
	if err != nil {
		t.Fatal(err)
	}
	_, public := d.ImportKey()
	blob, err := h.WrapSigner(public, c, held(t, key.Bytes()), nil)
	if err != nil {
		t.Fatal(err)
	}
	return blob, pub
}

func testSigner(t *testing.T, h Hardware, d HardwareDevice) {
	for c, n := range map[ecdh.Curve]int{ecdh.P256(): 32, ecdh.P384(): 48} {
		check, sign, unload := loadSigner(t, h, d, c)
		for _, msg := range []string{"", "a", "some message"} {
			if err := check(msg); err != nil {
				t.Errorf("%v: %v", c, err)
			}
		}
		for _, bad := range []int{0, 20, 31, 32, 33, 47, 48, 49, 64} {
			if bad == n {
				continue
			}
			if _, err := sign(context.Background(), make([]byte, bad)); err == nil {
				t.Errorf("%v: a digest of %d bytes was signed", c, bad)
			}
		}
		unload()
	}
}

func testWrongCurve(t *testing.T, h Hardware, d HardwareDevice) {
	curves := []ecdh.Curve{ecdh.P256(), ecdh.P384(), ecdh.P521(), ecdh.X25519(), nil}
	for _, made := range curves[:2] {
		blob, _ := wrappedSigner(t, h, d, made)
		for _, c := range curves {
			if c == made {
				continue
			}
			if _, _, err := d.LoadSigner(context.Background(), c, blob); err == nil {
				t.Errorf("a key on %v was loaded as one on %v", made, c)
			}
		}
		if _, _, err := d.LoadHMAC(context.Background(), blob); err == nil {
			t.Errorf("a private key on %v was loaded as an HMAC key", made)
		}
	}
	mac := wrappedHMAC(t, h, d, randomKey())
	for _, c := range curves {
		if _, _, err := d.LoadSigner(context.Background(), c, mac); err == nil {
			t.Errorf("an HMAC key was loaded as a private key on %v", c)
		}
	}
}

func testWrappingRefuses(t *testing.T, h Hardware, d HardwareDevice) {
	_, public := d.ImportKey()
	for _, n := range []int{0, 16, 31, 33, 64} {
		if _, err := h.WrapHMAC(public, held(t, pattern(n)), nil); err == nil {
			t.Errorf("an HMAC key of %d bytes was wrapped", n)
		}
	}
	order := elliptic.P256().Params().N.Bytes()
	for name, scalar := range map[string][]byte{"zero": make([]byte, 32), "order": order, "all ones": bytes.Repeat([]byte{255}, 32),
		"short": pattern(31), "long": pattern(33), "none": nil} {
		if _, err := h.WrapSigner(public, ecdh.P256(), held(t, scalar), nil); err == nil {
			t.Errorf("a private key was wrapped: %s", name)
		}
	}
	for _, c := range []ecdh.Curve{ecdh.P521(), ecdh.X25519(), nil} {
		if _, err := h.WrapSigner(public, c, held(t, pattern(32)), nil); err == nil {
			t.Errorf("a private key on %v was wrapped", c)
		}
	}
	if _, err := h.WrapHMAC(public, held(t, pattern(32)), make([]byte, 65)); err == nil {
		t.Error("a label of 65 bytes was taken")
	}
	if _, err := h.WrapHMAC(public, held(t, pattern(32)), make([]byte, 64)); err != nil {
		t.Errorf("a label of 64 bytes: %v", err)
	}
	for _, bad := range [][]byte{nil, {1}, public[:len(public)-1], append(bytes.Clone(public), 0), make([]byte, len(public))} {
		if _, err := h.WrapHMAC(bad, held(t, pattern(32)), nil); err == nil {
			t.Errorf("wrapped for an import key of %d bytes", len(bad))
		}
	}
}

func testWrappingFresh(t *testing.T, h Hardware, d HardwareDevice) {
	key := pattern(32)
	a, b := wrappedHMAC(t, h, d, key), wrappedHMAC(t, h, d, key)
	if bytes.Equal(a, b) || bytes.Contains(a, key[:8]) {
		t.Fatal("the wrapping repeats itself or shows the key")
	}
}

// testAlteredKeys alters each byte in turn, and the length.
func testAlteredKeys(t *testing.T, h Hardware, d HardwareDevice) {
	signer, _ := wrappedSigner(t, h, d, ecdh.P256())
	for name, c := range map[string]struct {
		blob []byte
		load func([]byte) error
	}{
		"HMAC": {wrappedHMAC(t, h, d, randomKey()), func(b []byte) error {
			_, _, err := d.LoadHMAC(context.Background(), b)
			return err
		}},
		"signer": {signer, func(b []byte) error {
			_, _, err := d.LoadSigner(context.Background(), ecdh.P256(), b)
			return err
		}},
	} {
		refuse := func(what string, b []byte) {
			if c.load(b) == nil {
				t.Errorf("%s: loaded although %s", name, what)
			}
		}
		for i := 0; i < len(c.blob); i += max(1, h.Stride) {
			bad := bytes.Clone(c.blob)
			bad[i] ^= 1 << (i % 8)
			refuse(fmt.Sprintf("byte %d was altered", i), bad)
		}
		for n := 0; n < len(c.blob); n += max(1, h.Stride) {
			refuse(fmt.Sprintf("cut to %d bytes", n), c.blob[:n])
		}
		refuse("a byte was added", append(bytes.Clone(c.blob), 0))
		refuse("eight bytes were added", append(bytes.Clone(c.blob), make([]byte, 8)...))
		refuse("it is huge", make([]byte, 1<<20))
		if err := c.load(c.blob); err != nil {
			t.Errorf("%s: the good blob afterwards: %v", name, err)
		}
	}
}

func testOtherDevice(t *testing.T, h Hardware, d HardwareDevice) {
	other := h.Other(t)
	defer closeDevice(t, other)
	if _, _, err := d.LoadHMAC(context.Background(), wrappedHMAC(t, h, other, randomKey())); err == nil {
		t.Error("an HMAC key for another device was loaded")
	}
	blob, _ := wrappedSigner(t, h, other, ecdh.P256())
	if _, _, err := d.LoadSigner(context.Background(), ecdh.P256(), blob); err == nil {
		t.Error("a private key for another device was loaded")
	}
	check, _, unload := loadHMAC(t, h, d)
	defer unload()
	if err := check([]byte("m")); err != nil {
		t.Error(err)
	}
}

func testUnload(t *testing.T, h Hardware, d HardwareDevice) {
	check, mac, unload := loadHMAC(t, h, d)
	checkSign, sign, unloadSigner := loadSigner(t, h, d, ecdh.P256())
	stays, _, unloadStays := loadHMAC(t, h, d)
	defer unloadStays()
	if err := errors.Join(check([]byte("m")), checkSign("m")); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		unload()
		unloadSigner()
	}
	if _, err := mac(context.Background(), []byte("m")); err == nil {
		t.Error("an unloaded HMAC key was used")
	}
	if _, err := sign(context.Background(), make([]byte, 32)); err == nil {
		t.Error("an unloaded signer was used")
	}
	if err := stays([]byte("m")); err != nil {
		t.Errorf("another key after the unload: %v", err)
	}
}

func testMoreThanFit(t *testing.T, h Hardware, d HardwareDevice) {
	var checks []func([]byte) error
	for range h.Loaded {
		check, _, unload := loadHMAC(t, h, d)
		defer unload()
		checks = append(checks, check)
	}
	for round := range 2 {
		for i, check := range checks {
			if err := check(pattern(20 + i + round)); err != nil {
				t.Fatalf("round %d, key %d: %v", round, i, err)
			}
		}
	}
}

func testCancelledLoad(t *testing.T, h Hardware, d HardwareDevice) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, _, err := d.LoadHMAC(ctx, wrappedHMAC(t, h, d, randomKey())); !errors.Is(err, context.Canceled) {
		t.Errorf("load: %v", err)
	}
	check, mac, unload := loadHMAC(t, h, d)
	defer unload()
	if _, err := mac(ctx, []byte("m")); !errors.Is(err, context.Canceled) {
		t.Errorf("HMAC: %v", err)
	}
	if err := check([]byte("m")); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// testLoadedConcurrent uses, loads and unloads side by side with other calls.
func testLoadedConcurrent(t *testing.T, h Hardware, d HardwareDevice) {
	const goroutines, rounds = 32, 4
	mac, _, unload := loadHMAC(t, h, d)
	defer unload()
	sign, _, unloadSigner := loadSigner(t, h, d, ecdh.P256())
	defer unloadSigner()
	blob := wrappedHMAC(t, h, d, pattern(32))
	var wg sync.WaitGroup
	for g := range goroutines {
		wg.Go(func() {
			for r := range rounds {
				var err error
				switch (g + r) % 4 {
				case 0:
					err = mac(pattern(g))
				case 1:
					err = sign(fmt.Sprint(g, r))
				case 2:
					err = loadUseUnload(d, blob)
				case 3:
					err = d.Random(context.Background(), make([]byte, 8))
				}
				if err != nil {
					t.Errorf("goroutine %d: %v", g, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func loadUseUnload(d HardwareDevice, blob []byte) error {
	mac, unload, err := d.LoadHMAC(context.Background(), blob)
	if err != nil {
		return err
	}
	defer unload()
	got, err := mac(context.Background(), []byte("m"))
	if err != nil {
		return err
	}
	want := hmac.New(sha256.New, pattern(32))
	_, _ = want.Write([]byte("m"))
	if !hmac.Equal(got, want.Sum(nil)) {
		return errors.New("wrong MAC")
	}
	return nil
}

func testLost(t *testing.T, h Hardware, d HardwareDevice) {
	if h.Lose == nil {
		return
	}
	check, _, unload := loadHMAC(t, h, d)
	defer unload()
	checkSign, _, unloadSigner := loadSigner(t, h, d, ecdh.P384())
	for range 3 {
		h.Lose(t, d)
		if err := check([]byte("m")); err != nil {
			t.Errorf("HMAC after the loss: %v", err)
		}
		h.Lose(t, d)
		if err := checkSign("m"); err != nil {
			t.Errorf("signer after the loss: %v", err)
		}
	}
	h.Lose(t, d)
	unloadSigner()
	if err := check([]byte("m")); err != nil {
		t.Errorf("HMAC after the last loss: %v", err)
	}
}

func testLoadedClose(t *testing.T, h Hardware) {
	d := h.Open(t)
	_, mac, unload := loadHMAC(t, h, d)
	blob := wrappedHMAC(t, h, d, randomKey())
	closeDevice(t, d)
	if _, err := mac(context.Background(), []byte("m")); err == nil {
		t.Error("an HMAC was made after Close")
	}
	if _, _, err := d.LoadHMAC(context.Background(), blob); err == nil {
		t.Error("a key was loaded after Close")
	}
	unload()
}
