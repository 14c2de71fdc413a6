package tpm_test

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"math/big"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/tpm"
	"github.com/conclave-kms/conclave/tpm/tpmtest"
)

// onBothCurves runs a test on a fresh TPM for each curve.
func onBothCurves(t *testing.T, test func(t *testing.T, d *tpm.Device)) {
	for name, curve := range map[string]ecdh.Curve{"P-384": ecdh.P384(), "P-256": ecdh.P256()} {
		t.Run(name, func(t *testing.T) {
			p := tpmtest.New(t)
			cfg := p.Config()
			cfg.Curve = curve
			test(t, p.Open(cfg))
		})
	}
}

func TestOperations(t *testing.T) {
	t.Parallel()
	onBothCurves(t, func(t *testing.T, d *tpm.Device) {
		t.Run("ECDH", func(t *testing.T) { testECDH(t, d) })
		t.Run("Sign", func(t *testing.T) { testSign(t, d) })
		t.Run("Wrap", func(t *testing.T) { testWrap(t, d) })
		t.Run("Random", func(t *testing.T) { testRandom(t, d) })
		t.Run("Describe", func(t *testing.T) {
			if s := d.Describe(); !strings.HasPrefix(s, "TPM 2.0 ") {
				t.Errorf("Describe: %q", s)
			}
			if err := d.Check(t.Context()); err != nil {
				t.Error(err)
			}
		})
	})
}

// testECDH compares with the standard library, also where Z begins with a zero
// byte, which a TPM may leave out.
func testECDH(t *testing.T, d *tpm.Device) {
	curve := d.AgreementKey().Curve()
	for _, leadingZero := range []bool{false, true} {
		eph, want := ephemeral(t, d, leadingZero)
		got, err := d.ECDH(t.Context(), eph.PublicKey())
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("Z differs from the standard library's (leading zero: %v)", leadingZero)
		}
	}
	other := ecdh.P256()
	if curve == other {
		other = ecdh.P384()
	}
	wrong, err := other.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, peer := range []*ecdh.PublicKey{nil, wrong.PublicKey()} {
		if _, err := d.ECDH(t.Context(), peer); !errors.Is(err, tpm.ErrInvalid) {
			t.Errorf("peer %v: %v, want ErrInvalid", peer, err)
		}
	}
}

func ephemeral(t *testing.T, d *tpm.Device, leadingZero bool) (*ecdh.PrivateKey, []byte) {
	t.Helper()
	for {
		eph, err := d.AgreementKey().Curve().GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		z, err := eph.ECDH(d.AgreementKey())
		if err != nil {
			t.Fatal(err)
		}
		if !leadingZero || z[0] == 0 {
			return eph, z
		}
	}
}

func testSign(t *testing.T, d *tpm.Device) {
	msg := []byte("message")
	h256, h384, h512 := sha256.Sum256(msg), sha512.Sum384(msg), sha512.Sum512(msg)
	right, wrong := h384[:], h256[:]
	if d.AgreementKey().Curve() == ecdh.P256() {
		right, wrong = wrong, right
	}
	for range 5 {
		sig, err := d.Sign(t.Context(), right)
		if err != nil {
			t.Fatal(err)
		}
		if len(sig) != 2*len(right) {
			t.Fatalf("signature of %d bytes", len(sig))
		}
		n := len(sig) / 2
		r, s := new(big.Int).SetBytes(sig[:n]), new(big.Int).SetBytes(sig[n:])
		if !ecdsa.Verify(d.SigningKey(), right, r, s) {
			t.Error("signature does not verify")
		}
	}
	for _, digest := range [][]byte{nil, wrong, h512[:], right[1:]} {
		if _, err := d.Sign(t.Context(), digest); !errors.Is(err, tpm.ErrInvalid) {
			t.Errorf("digest of %d bytes: %v, want ErrInvalid", len(digest), err)
		}
	}
}

func testWrap(t *testing.T, d *tpm.Device) {
	aad := []byte("context")
	for _, n := range []int{1, 32, 64, 96} {
		key := make([]byte, n)
		rand.Read(key)
		wrapped := mustWrap(t, d, aad, key)
		got, err := d.Unwrap(t.Context(), aad, wrapped)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.Reveal(), key) {
			t.Errorf("%d bytes come back different", n)
		}
		got.Destroy()
		if bytes.Contains(wrapped, key) && n > 4 {
			t.Error("the wrapped key contains the key")
		}
	}
	for _, n := range []int{0, 97, 4096} {
		if _, err := d.Wrap(t.Context(), aad, make([]byte, n)); !errors.Is(err, tpm.ErrInvalid) {
			t.Errorf("wrapping %d bytes: %v, want ErrInvalid", n, err)
		}
	}
}

func mustWrap(t testing.TB, d *tpm.Device, aad, key []byte) []byte {
	t.Helper()
	wrapped, err := d.Wrap(context.Background(), aad, key)
	if err != nil {
		t.Fatal(err)
	}
	return wrapped
}

// refused checks that a wrapped key does not open, with the one error there is.
func refused(t *testing.T, what string, d *tpm.Device, aad, wrapped []byte) {
	t.Helper()
	got, err := d.Unwrap(t.Context(), aad, wrapped)
	if err == nil {
		got.Destroy()
	}
	if !errors.Is(err, tpm.ErrInvalid) || !strings.Contains(err.Error(), "does not open") {
		t.Errorf("%s: %v, want the error for a wrapped key that does not open", what, err)
	}
}

func TestUnwrapRefuses(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	d := p.Open(p.Config())
	aad := []byte("context")
	wrapped := mustWrap(t, d, aad, make([]byte, 32))
	for i := range wrapped {
		b := bytes.Clone(wrapped)
		b[i] ^= 0x40
		refused(t, "altered byte", d, aad, b)
	}
	for _, n := range []int{0, 1, 2, 3, 40, len(wrapped) - 1} {
		refused(t, "cut", d, aad, wrapped[:n])
	}
	refused(t, "trailing byte", d, aad, append(bytes.Clone(wrapped), 0))
	refused(t, "no aad", d, nil, wrapped)
	refused(t, "other aad", d, []byte("Context"), wrapped)

	other := tpmtest.New(t)
	refused(t, "another TPM", other.Open(other.Config()), aad, wrapped)

	sealed, err := tpm.SealForeign(t.Context(), d, []byte("another authorization"), make([]byte, 64))
	if err != nil {
		t.Fatal(err)
	}
	refused(t, "sealed with another authorization value", d, aad, sealed)
	_, _, auth := tpm.AuthValues(d)
	defer auth.Destroy()
	if sealed, err = tpm.SealForeign(t.Context(), d, auth.Reveal(), make([]byte, 20)); err != nil {
		t.Fatal(err)
	}
	refused(t, "sealed data shorter than a hash", d, aad, sealed)
}

func testRandom(t *testing.T, d *tpm.Device) {
	seen := map[string]bool{}
	for _, n := range []int{0, 1, 63, 64, 65, 5000} {
		b := make([]byte, n)
		if err := d.Random(t.Context(), b); err != nil {
			t.Fatal(err)
		}
		for ; len(b) >= 16; b = b[16:] {
			if seen[string(b[:16])] {
				t.Fatal("16 bytes repeat")
			}
			seen[string(b[:16])] = true
		}
	}
}

func BenchmarkDevice(b *testing.B) {
	for name, curve := range map[string]ecdh.Curve{"P-384": ecdh.P384(), "P-256": ecdh.P256()} {
		b.Run(name, func(b *testing.B) {
			p := tpmtest.New(b)
			cfg := p.Config()
			cfg.Curve = curve
			d := p.Open(cfg)
			ctx := context.Background()
			eph, err := curve.GenerateKey(rand.Reader)
			if err != nil {
				b.Fatal(err)
			}
			digest := make([]byte, 48)
			if curve == ecdh.P256() {
				digest = digest[:32]
			}
			key, chunk := make([]byte, 64), make([]byte, 1024)
			wrapped := mustWrap(b, d, nil, key)
			for op, run := range map[string]func() error{
				"ECDH":   func() error { _, err := d.ECDH(ctx, eph.PublicKey()); return err },
				"Sign":   func() error { _, err := d.Sign(ctx, digest); return err },
				"Wrap":   func() error { _, err := d.Wrap(ctx, nil, key); return err },
				"Unwrap": func() error { k, err := d.Unwrap(ctx, nil, wrapped); k.Destroy(); return err },
				"Random": func() error { return d.Random(ctx, chunk) },
			} {
				b.Run(op, func(b *testing.B) {
					for b.Loop() {
						if err := run(); err != nil {
							b.Fatal(err)
						}
					}
				})
			}
		})
	}
}
