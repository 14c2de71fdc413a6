package fault

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"math/big"
	"testing"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/hsm/hsmtest"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
	"github.com/conclave-kms/conclave/tpm"
	"github.com/conclave-kms/conclave/tpm/tpmtest"
)

// root is what the devices have in common here.
type root interface {
	AgreementKey() *ecdh.PublicKey
	ECDH(ctx context.Context, peer *ecdh.PublicKey) ([]byte, error)
	Check(ctx context.Context) error
	ImportKey() (kind string, public []byte)
	LoadHMAC(ctx context.Context, blob []byte) (mac func(ctx context.Context, message []byte) ([]byte, error), unload func(), err error)
}

// TestPointOffCurve sends devices points that are not on the curve of their
// agreement key, as the invalid curve attack does, where others can send them
// points: in a sealed copy and in a wrapped key. They are refused as invalid, and
// the device stays well.
func TestPointOffCurve(t *testing.T) {
	for name, d := range map[string]struct {
		open    func(t *testing.T) root
		wrap    func(public []byte, key *secret.Bytes, label []byte) ([]byte, error)
		invalid error
		point   func(blob []byte) []byte // the coordinates of the ephemeral point, x and y of 48 bytes
	}{
		"SoftHSM": {
			func(t *testing.T) root { return hsmtest.Device(t) }, hsm.WrapHMAC, hsm.ErrInvalid,
			func(b []byte) []byte { return b[5 : 5+96] },
		},
		"software TPM": {
			func(t *testing.T) root { p := tpmtest.New(t); return p.Open(p.Config()) }, tpm.WrapHMAC, tpm.ErrInvalid,
			func(b []byte) []byte { return b[len(b)-2-2*48:] }, // x, two bytes of length, y
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dev := d.open(t)
			sealedCopies(t, dev)
			wrappedKeys(t, dev, d.wrap, d.invalid, d.point)
			if err := dev.Check(t.Context()); err != nil {
				t.Errorf("the device afterwards: %v", err)
			}
		})
	}
}

// sealedCopies damages the elliptic curve half of a sealed KEK.
func sealedCopies(t *testing.T, dev root) {
	t.Helper()
	ctx := t.Context()
	seed, err := pqc.GenerateSeed(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer seed.Destroy()
	r, err := keyring.NewRoot(dev, pqc.MLKEM1024P384, seed)
	if err != nil {
		t.Fatal(err)
	}
	kek, err := secret.Copy(bytes.Repeat([]byte{7}, keyring.KEKSize))
	if err != nil {
		t.Fatal(err)
	}
	defer kek.Destroy()
	b := keyring.KEKBinding{Cluster: "c", Keyring: "k", Version: 1, Protection: kms.Software}
	copies, err := keyring.SealKEK([]keyring.Recipient{{Node: "n", Suite: uint16(pqc.MLKEM1024P384), PublicKey: r.PublicKey().Bytes()}}, b, kek)
	if err != nil {
		t.Fatal(err)
	}
	b.Node = "n"
	const point = 2 + 1568 // behind the suite's number and the ML-KEM-1024 ciphertext
	if sealed := copies[0].Sealed; sealed[point] != 4 || !onCurve(sealed[point+1:point+97]) {
		t.Fatal("there is no point where the test looks for it")
	}
	for name, bad := range offCurve(copies[0].Sealed, func(b []byte) []byte { return b[point+1 : point+97] }) {
		if _, err := r.OpenKEK(ctx, b, bad); !errors.Is(err, kms.OpenFailed) {
			t.Errorf("a sealed KEK with %s: %v", name, err)
		}
		if err := dev.Check(ctx); err != nil {
			t.Fatalf("the device after %s: %v", name, err)
		}
	}
	again, err := r.OpenKEK(ctx, b, copies[0].Sealed)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Destroy()
	if !again.Equal(kek) {
		t.Error("another KEK was opened")
	}
}

// wrappedKeys damages the point of a key that is wrapped for the device.
func wrappedKeys(t *testing.T, dev root, wrap func([]byte, *secret.Bytes, []byte) ([]byte, error), invalid error, point func([]byte) []byte) {
	t.Helper()
	ctx := t.Context()
	raw := bytes.Repeat([]byte{0x5a}, 32)
	key, err := secret.Copy(raw)
	if err != nil {
		t.Fatal(err)
	}
	defer key.Destroy()
	_, public := dev.ImportKey()
	blob, err := wrap(public, key, nil)
	if err != nil {
		t.Fatal(err)
	}
	coordinates := func(b []byte) []byte { // without the length that may lie between them
		p := point(b)
		return append(bytes.Clone(p[:48]), p[len(p)-48:]...)
	}
	if !onCurve(coordinates(blob)) {
		t.Fatal("there is no point where the test looks for it")
	}
	for name, bad := range offCurve(blob, point) {
		if _, _, err := dev.LoadHMAC(ctx, bad); !errors.Is(err, invalid) {
			t.Errorf("a wrapped key with %s: %v", name, err)
		}
		if err := dev.Check(ctx); err != nil {
			t.Fatalf("the device after %s: %v", name, err)
		}
	}
	mac, unload, err := dev.LoadHMAC(ctx, blob)
	if err != nil {
		t.Fatal(err)
	}
	defer unload()
	got, err := mac(ctx, []byte("m"))
	h := hmac.New(sha256.New, raw)
	h.Write([]byte("m"))
	if err != nil || !bytes.Equal(got, h.Sum(nil)) {
		t.Errorf("the key afterwards: another MAC, or %v", err)
	}
}

// offCurve returns copies of b whose point is not on P-384.
func offCurve(b []byte, point func([]byte) []byte) map[string][]byte {
	p := elliptic.P384().Params().P.Bytes()
	out := map[string][]byte{}
	for name, change := range map[string]func(p []byte){
		"y altered":           func(p []byte) { p[len(p)-1] ^= 1 },
		"x altered":           func(p []byte) { p[47] ^= 1 },
		"the point (0, 0)":    func(p []byte) { clear(p[:48]); clear(p[len(p)-48:]) },
		"a coordinate over p": func(q []byte) { copy(q[:48], p); q[47] |= 1 },
	} {
		c := bytes.Clone(b)
		change(point(c))
		out[name] = c
	}
	return out
}

func onCurve(p []byte) bool {
	_, err := ecdh.P384().NewPublicKey(append([]byte{4}, p...))
	return err == nil && new(big.Int).SetBytes(p).Sign() > 0
}
