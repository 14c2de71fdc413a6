package contract

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"sync"
	"testing"
)

// generating returns the device as one that generates, nil when it need not.
func generating(t *testing.T, h Hardware, d HardwareDevice) GeneratingDevice {
	t.Helper()
	g, ok := d.(GeneratingDevice)
	if !ok && (h.HMAC || h.Signer) {
		t.Fatal("the device has no methods to generate keys")
	}
	if !h.HMAC && !h.Signer {
		return nil
	}
	return g
}

func testGenerates(t *testing.T, h Hardware, d HardwareDevice) {
	g, ok := d.(GeneratingDevice)
	if !ok {
		if h.HMAC || h.Signer {
			t.Fatal("the device has no methods to generate keys")
		}
		return
	}
	if hmac, signer := g.Generates(); hmac != h.HMAC || signer != h.Signer {
		t.Errorf("it generates HMAC keys: %v, signers: %v; it should: %v, %v", hmac, signer, h.HMAC, h.Signer)
	}
}

func importOf(d HardwareDevice) []byte {
	_, public := d.ImportKey()
	return public
}

// sameMAC holds that the closures have one key.
func sameMAC(t *testing.T, a, b macFunc) {
	t.Helper()
	for _, n := range []int{0, 1, 100, 4096, maxMAC} {
		x, err := a(context.Background(), pattern(n))
		if err != nil {
			t.Fatal(err)
		}
		y, err := b(context.Background(), pattern(n))
		if err != nil {
			t.Fatal(err)
		}
		if len(x) != 32 || !bytes.Equal(x, y) {
			t.Fatalf("MACs of %d bytes differ", n)
		}
	}
}

// testGenerateHMAC generates for two devices, for one of them only the other way
// round and for this device alone.
func testGenerateHMAC(t *testing.T, h Hardware, d HardwareDevice) {
	g := generating(t, h, d)
	if g == nil || !h.HMAC {
		return
	}
	other := h.Other(t)
	defer closeDevice(t, other)
	devices := []HardwareDevice{d, other}
	for name, to := range map[string][]int{"both": {0, 1}, "the other first": {1, 0}, "the other alone": {1}, "itself": {0}, "one twice": {1, 1}} {
		t.Run(name, func(t *testing.T) {
			var recipients [][]byte
			for _, i := range to {
				recipients = append(recipients, importOf(devices[i]))
			}
			blobs, mac, unload, err := g.GenerateHMAC(context.Background(), recipients)
			if err != nil {
				t.Fatal(err)
			}
			defer unload()
			if len(blobs) != len(to) {
				t.Fatalf("%d blobs for %d recipients", len(blobs), len(to))
			}
			for i, at := range to {
				again, end, err := devices[at].LoadHMAC(context.Background(), blobs[i])
				if err != nil {
					t.Fatal(err)
				}
				sameMAC(t, mac, again)
				end()
				if _, _, err := devices[1-at].LoadHMAC(context.Background(), blobs[i]); err == nil {
					t.Error("a blob opens at a device that it is not for")
				}
			}
			unload()
			if _, err := mac(context.Background(), nil); err == nil {
				t.Error("an unloaded key was used")
			}
		})
	}
	a, macA, endA, err := g.GenerateHMAC(context.Background(), [][]byte{importOf(d)})
	if err != nil {
		t.Fatal(err)
	}
	defer endA()
	b, macB, endB, err := g.GenerateHMAC(context.Background(), [][]byte{importOf(d)})
	if err != nil {
		t.Fatal(err)
	}
	defer endB()
	x, errX := macA(context.Background(), nil)
	y, errY := macB(context.Background(), nil)
	if errX != nil || errY != nil || bytes.Equal(x, y) || bytes.Equal(a[0], b[0]) {
		t.Error("two generated keys are one, or their blobs")
	}
}

func digestLength(c ecdh.Curve) int {
	if c == ecdh.P384() {
		return 48
	}
	return 32
}

// signs holds that a closure signs for a public key.
func signs(t *testing.T, c ecdh.Curve, public *ecdsa.PublicKey, sign macFunc) {
	t.Helper()
	digest := digestFor(digestLength(c), "m")
	sig, err := sign(context.Background(), digest)
	if err != nil {
		t.Fatal(err)
	}
	if len(sig) != 2*digestLength(c) || !verify(public, digest, sig) {
		t.Fatal("the signature does not verify")
	}
}

func testGenerateSigner(t *testing.T, h Hardware, d HardwareDevice) {
	g := generating(t, h, d)
	if g == nil || !h.Signer {
		return
	}
	other := h.Other(t)
	defer closeDevice(t, other)
	for _, c := range []ecdh.Curve{ecdh.P256(), ecdh.P384()} {
		// Often enough that scalars with leading zeros are among them now and then.
		for range 4 {
			blobs, public, sign, unload, err := g.GenerateSigner(context.Background(), c, [][]byte{importOf(other), importOf(d)})
			if err != nil {
				t.Fatal(err)
			}
			signs(t, c, public, sign)
			for i, at := range []HardwareDevice{other, d} {
				again, end, err := at.LoadSigner(context.Background(), c, blobs[i])
				if err != nil {
					t.Fatal(err)
				}
				signs(t, c, public, again)
				end()
			}
			if _, _, err := d.LoadSigner(context.Background(), c, blobs[0]); err == nil {
				t.Error("a blob opens at a device that it is not for")
			}
			unload()
			if _, err := sign(context.Background(), digestFor(digestLength(c), "m")); err == nil {
				t.Error("an unloaded key was used")
			}
		}
	}
}

func testGenerateRefuses(t *testing.T, h Hardware, d HardwareDevice) {
	g := generating(t, h, d)
	if g == nil {
		return
	}
	ctx := context.Background()
	own := importOf(d)
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	many := make([][]byte, 257)
	for i := range many {
		many[i] = own
	}
	for name, bad := range map[string][][]byte{
		"nobody": nil, "an empty one": {{}}, "nil": {nil}, "a short one": {own[:len(own)-1]}, "a long one": {append(bytes.Clone(own), 0)},
		"zeros": {make([]byte, len(own))}, "a good and a bad one": {own, own[:3]}, "257": many, "a huge one": {make([]byte, 1<<20)},
	} {
		if _, _, _, err := g.GenerateHMAC(ctx, bad); err == nil {
			t.Errorf("an HMAC key was generated for %s", name)
		}
		if _, _, _, _, err := g.GenerateSigner(ctx, ecdh.P256(), bad); err == nil {
			t.Errorf("a signer was generated for %s", name)
		}
	}
	for _, c := range []ecdh.Curve{ecdh.P521(), ecdh.X25519(), nil} {
		if _, _, _, _, err := g.GenerateSigner(ctx, c, [][]byte{own}); err == nil {
			t.Errorf("a signer on %v was generated", c)
		}
	}
	if h.HMAC {
		if _, _, _, err := g.GenerateHMAC(cancelled, [][]byte{own}); !errors.Is(err, context.Canceled) {
			t.Errorf("HMAC with a cancelled context: %v", err)
		}
	}
}

// testRewrap moves keys that were imported and keys that were generated.
func testRewrap(t *testing.T, h Hardware, d HardwareDevice) {
	g := generating(t, h, d)
	if g == nil {
		return
	}
	ctx := context.Background()
	other := h.Other(t)
	defer closeDevice(t, other)
	if h.HMAC {
		blob := wrappedHMAC(t, h, d, randomKey())
		mac, unload, err := d.LoadHMAC(ctx, blob)
		if err != nil {
			t.Fatal(err)
		}
		defer unload()
		moved, err := g.Rewrap(ctx, blob, importOf(other))
		if err != nil {
			t.Fatal(err)
		}
		again, end, err := other.LoadHMAC(ctx, moved)
		if err != nil {
			t.Fatal(err)
		}
		defer end()
		sameMAC(t, mac, again)
	}
	if h.Signer {
		for _, c := range []ecdh.Curve{ecdh.P256(), ecdh.P384()} {
			imported, public := wrappedSigner(t, h, d, c)
			rewrapSigner(t, g, other, c, imported, public)
			made, public, _, unload, err := g.GenerateSigner(ctx, c, [][]byte{importOf(d)})
			if err != nil {
				t.Fatal(err)
			}
			unload()
			rewrapSigner(t, g, other, c, made[0], public)
		}
	}
}

func rewrapSigner(t *testing.T, g GeneratingDevice, other HardwareDevice, c ecdh.Curve, blob []byte, public *ecdsa.PublicKey) {
	t.Helper()
	moved, err := g.Rewrap(context.Background(), blob, importOf(other))
	if err != nil {
		t.Fatal(err)
	}
	sign, unload, err := other.LoadSigner(context.Background(), c, moved)
	if err != nil {
		t.Fatal(err)
	}
	defer unload()
	signs(t, c, public, sign)
}

func testRewrapRefuses(t *testing.T, h Hardware, d HardwareDevice) {
	g := generating(t, h, d)
	if g == nil || !h.HMAC {
		return
	}
	ctx := context.Background()
	blob, own := wrappedHMAC(t, h, d, randomKey()), importOf(d)
	other := h.Other(t)
	defer closeDevice(t, other)
	for i := 0; i < len(blob); i += max(1, h.Stride) * 5 {
		bad := bytes.Clone(blob)
		bad[i] ^= 1 << (i % 8)
		if _, err := g.Rewrap(ctx, bad, own); err == nil {
			t.Errorf("rewrapped although byte %d was altered", i)
		}
	}
	for name, bad := range map[string][]byte{"nothing": nil, "a cut blob": blob[:len(blob)-1], "zeros": make([]byte, len(blob)), "a huge blob": make([]byte, 1<<20),
		"another device's blob": wrappedHMAC(t, h, other, randomKey())} {
		if _, err := g.Rewrap(ctx, bad, own); err == nil {
			t.Errorf("%s was rewrapped", name)
		}
	}
	for _, bad := range [][]byte{nil, own[:len(own)-1], make([]byte, len(own)), make([]byte, 1<<20)} {
		if _, err := g.Rewrap(ctx, blob, bad); err == nil {
			t.Errorf("rewrapped for a recipient of %d bytes", len(bad))
		}
	}
	if _, err := g.Rewrap(ctx, blob, own); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// testGenerateConcurrent generates, rewraps and uses keys side by side.
func testGenerateConcurrent(t *testing.T, h Hardware, d HardwareDevice) {
	g := generating(t, h, d)
	if g == nil || !h.HMAC {
		return
	}
	const goroutines = 32
	blob := wrappedHMAC(t, h, d, pattern(32))
	var wg sync.WaitGroup
	for i := range goroutines {
		wg.Go(func() {
			if err := generateOrUse(g, blob, i); err != nil {
				t.Errorf("goroutine %d: %v", i, err)
			}
		})
	}
	wg.Wait()
}

func generateOrUse(g GeneratingDevice, blob []byte, i int) error {
	ctx := context.Background()
	switch i % 3 {
	case 0:
		blobs, mac, unload, err := g.GenerateHMAC(ctx, [][]byte{importOf(g)})
		if err != nil {
			return err
		}
		defer unload()
		again, end, err := g.LoadHMAC(ctx, blobs[0])
		if err != nil {
			return err
		}
		defer end()
		x, errX := mac(ctx, pattern(i))
		y, errY := again(ctx, pattern(i))
		if err := errors.Join(errX, errY); err != nil {
			return err
		}
		if !bytes.Equal(x, y) {
			return errors.New("the MACs differ")
		}
		return nil
	case 1:
		moved, err := g.Rewrap(ctx, blob, importOf(g))
		if err != nil {
			return err
		}
		return loadUseUnload(g, moved)
	}
	if err := loadUseUnload(g, blob); err != nil {
		return fmt.Errorf("use: %w", err)
	}
	return nil
}

// testGeneratedLost: what a generated key's closure uses comes back after a loss.
func testGeneratedLost(t *testing.T, h Hardware, d HardwareDevice) {
	g := generating(t, h, d)
	if g == nil || !h.HMAC || h.Lose == nil {
		return
	}
	other := h.Other(t)
	defer closeDevice(t, other)
	blobs, mac, unload, err := g.GenerateHMAC(context.Background(), [][]byte{importOf(other)})
	if err != nil {
		t.Fatal(err)
	}
	defer unload()
	again, end, err := other.LoadHMAC(context.Background(), blobs[0])
	if err != nil {
		t.Fatal(err)
	}
	defer end()
	h.Lose(t, d)
	sameMAC(t, mac, again)
}
