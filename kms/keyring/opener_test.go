package keyring

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/hpke"
	"crypto/mlkem"
	"errors"
	"fmt"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
	"github.com/conclave-kms/conclave/test/fakedevice"
)

// newRoot makes a node's root on a fake device.
func newRoot(t testing.TB, suite pqc.SuiteID) (*Root, *fakedevice.Device) {
	t.Helper()
	curve := ecdh.P384()
	if suite == pqc.MLKEM768P256 {
		curve = ecdh.P256()
	}
	dev := must[*fakedevice.Device](t)(fakedevice.New(curve))
	t.Cleanup(func() { _ = dev.Close() })
	seed := must[*secret.Bytes](t)(pqc.GenerateSeed(nil))
	defer seed.Destroy()
	return must[*Root](t)(NewRoot(dev, suite, seed)), dev
}

func recipient(node string, r *Root) Recipient {
	return Recipient{Node: node, Suite: uint16(r.PublicKey().Suite()), PublicKey: r.PublicKey().Bytes()}
}

var testKEK = KEKBinding{Cluster: "0123456789abcdef", Keyring: "coalition", Version: 1, Protection: kms.Software}

func at(node string) KEKBinding {
	b := testKEK
	b.Node = node
	return b
}

func newKEK(t testing.TB) *secret.Bytes {
	t.Helper()
	kek := must[*secret.Bytes](t)(GenerateKEK(bytes.Repeat([]byte{0x77}, EntropySize)))
	t.Cleanup(kek.Destroy)
	return kek
}

func TestSealOpenKEK(t *testing.T) {
	ctx := context.Background()
	de, _ := newRoot(t, pqc.MLKEM1024P384)
	fr, _ := newRoot(t, pqc.MLKEM768P256)
	kek := newKEK(t)
	copies := must[[]Sealed](t)(SealKEK([]Recipient{recipient("fr-1", fr), recipient("de-1", de)}, testKEK, kek))
	if len(copies) != 2 || copies[0].Node != "de-1" || copies[1].Node != "fr-1" {
		t.Fatalf("copies are not sorted by node: %d", len(copies))
	}
	for i, r := range []*Root{de, fr} {
		got := must[*secret.Bytes](t)(r.OpenKEK(ctx, at(copies[i].Node), copies[i].Sealed))
		if !got.Equal(kek) {
			t.Error("opened another KEK")
		}
		got.Destroy()
	}
	_, err := fr.OpenKEK(ctx, at("de-1"), copies[0].Sealed)
	wantErrOpen(t, "the copy of another node", err)
}

func TestOpenKEKRefuses(t *testing.T) {
	ctx := context.Background()
	r, dev := newRoot(t, pqc.MLKEM1024P384)
	kek := newKEK(t)
	sealed := must[[]Sealed](t)(SealKEK([]Recipient{recipient("fr-1", r)}, testKEK, kek))[0].Sealed
	for i := 0; i < len(sealed); i += 1 + len(sealed)/61 {
		b := bytes.Clone(sealed)
		b[i] ^= 1
		_, err := r.OpenKEK(ctx, at("fr-1"), b)
		wantErrOpen(t, fmt.Sprint("byte ", i), err)
		_, err = r.OpenKEK(ctx, at("fr-1"), sealed[:i])
		wantErrOpen(t, fmt.Sprint("cut to ", i), err)
	}
	for what, change := range map[string]func(*KEKBinding){
		"cluster": func(b *KEKBinding) { b.Cluster += "0" }, "keyring": func(b *KEKBinding) { b.Keyring = "europe" },
		"version": func(b *KEKBinding) { b.Version++ }, "node": func(b *KEKBinding) { b.Node = "fr-2" },
	} {
		b := at("fr-1")
		change(&b)
		_, err := r.OpenKEK(ctx, b, sealed)
		wantErrOpen(t, "another "+what, err)
	}
	before := dev.Calls(fakedevice.OpECDH)
	for what, change := range map[string]func(*KEKBinding){
		"no cluster": func(b *KEKBinding) { b.Cluster = "" }, "no keyring": func(b *KEKBinding) { b.Keyring = "" },
		"no version": func(b *KEKBinding) { b.Version = 0 }, "no node": func(b *KEKBinding) { b.Node = "" },
		"no protection": func(b *KEKBinding) { b.Protection = "" }, "hardware": func(b *KEKBinding) { b.Protection = kms.Hardware },
	} {
		b := at("fr-1")
		change(&b)
		_, err := r.OpenKEK(ctx, b, sealed)
		wantKind(t, what, err, kms.Invalid)
	}
	if dev.Calls(fakedevice.OpECDH) != before {
		t.Error("the device was asked with an incomplete binding")
	}
	short := must[[]byte](t)(r.PublicKey().Seal(at("fr-1").encode(sealInfo), at("fr-1").encode(sealAAD), make([]byte, 16)))
	_, err := r.OpenKEK(ctx, at("fr-1"), short)
	wantErrOpen(t, "a sealed KEK of another length", err)
}

// TestKEKCopyIsStandardHPKE seals with the standard library alone, from
// the layout in DESIGN.md.
func TestKEKCopyIsStandardHPKE(t *testing.T) {
	r, dev := newRoot(t, pqc.MLKEM1024P384)
	kek := newKEK(t)
	mlkemKey := must[*mlkem.EncapsulationKey1024](t)(mlkem.NewEncapsulationKey1024(r.PublicKey().Bytes()[:1568]))
	pub := must[hpke.PublicKey](t)(hpke.NewHybridPublicKey(mlkemKey, dev.AgreementKey()))
	enc, sender, err := hpke.NewSender(pub, hpke.HKDFSHA384(), hpke.AES256GCM(), at("fr-1").encode(sealInfo))
	if err != nil {
		t.Fatal(err)
	}
	ct := must[[]byte](t)(sender.Seal(at("fr-1").encode(sealAAD), kek.Reveal()))
	got := must[*secret.Bytes](t)(r.OpenKEK(context.Background(), at("fr-1"), append(append([]byte{0x00, 0x51}, enc...), ct...)))
	defer got.Destroy()
	if !got.Equal(kek) {
		t.Error("opened another KEK")
	}
}

func TestOpenKEKDeviceErrors(t *testing.T) {
	r, dev := newRoot(t, pqc.MLKEM1024P384)
	sealed := must[[]Sealed](t)(SealKEK([]Recipient{recipient("fr-1", r)}, testKEK, newKEK(t)))[0].Sealed
	dev.Fail(func(op string) error { return errBroken })
	_, err := r.OpenKEK(context.Background(), at("fr-1"), sealed)
	wantKind(t, "a device that fails", err, kms.Unavailable)
	if !errors.Is(err, errBroken) || !errors.Is(err, pqc.ErrDevice) {
		t.Errorf("the cause is lost: %v", err)
	}
	dev.Fail(nil)
	dev.Hang(func(op string) bool { return true })
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() {
		_, err := r.OpenKEK(ctx, at("fr-1"), sealed)
		done <- err
	}()
	cancel()
	err = <-done
	wantKind(t, "a device that hangs", err, kms.Unavailable)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("the cause is lost: %v", err)
	}
	dev.Hang(nil)
	dev.Corrupt(func(op string, out []byte) { out[0] ^= 1 })
	_, err = r.OpenKEK(context.Background(), at("fr-1"), sealed)
	wantErrOpen(t, "a device that computes wrongly", err)
}

// noKey is a device that was never initialised.
type noKey struct{ Device }

func (noKey) AgreementKey() *ecdh.PublicKey { return nil }

func TestNewRootRefuses(t *testing.T) {
	dev := must[*fakedevice.Device](t)(fakedevice.New(ecdh.P256()))
	defer dev.Close()
	seed := must[*secret.Bytes](t)(pqc.GenerateSeed(nil))
	defer seed.Destroy()
	_, err := NewRoot(dev, pqc.MLKEM1024P384, seed)
	wantKind(t, "another curve", err, kms.Invalid)
	_, err = NewRoot(dev, pqc.Ed25519, seed)
	wantKind(t, "not a KEM", err, kms.Invalid)
	_, err = NewRoot(dev, pqc.MLKEM768P256, nil)
	wantKind(t, "no seed", err, kms.Invalid)
	_, err = NewRoot(noKey{dev}, pqc.MLKEM768P256, seed)
	wantKind(t, "no agreement key", err, kms.Invalid)
}

func TestSealKEKRefuses(t *testing.T) {
	r, _ := newRoot(t, pqc.MLKEM768P256)
	kek := newKEK(t)
	fr := recipient("fr-1", r)
	short := must[*secret.Bytes](t)(secret.New(16))
	defer short.Destroy()
	broken, other := fr, fr
	broken.PublicKey = fr.PublicKey[:100]
	other.Suite = uint16(pqc.MLKEM1024P384)
	for what, f := range map[string]func() ([]Sealed, error){
		"nobody":         func() ([]Sealed, error) { return SealKEK(nil, testKEK, kek) },
		"twice the same": func() ([]Sealed, error) { return SealKEK([]Recipient{fr, fr}, testKEK, kek) },
		"a node named":   func() ([]Sealed, error) { return SealKEK([]Recipient{fr}, at("fr-1"), kek) },
		"short KEK":      func() ([]Sealed, error) { return SealKEK([]Recipient{fr}, testKEK, short) },
		"no KEK":         func() ([]Sealed, error) { return SealKEK([]Recipient{fr}, testKEK, nil) },
		"nameless node":  func() ([]Sealed, error) { return SealKEK([]Recipient{recipient("", r)}, testKEK, kek) },
		"no binding":     func() ([]Sealed, error) { return SealKEK([]Recipient{fr}, KEKBinding{}, kek) },
		"broken key":     func() ([]Sealed, error) { return SealKEK([]Recipient{broken}, testKEK, kek) },
		"another suite":  func() ([]Sealed, error) { return SealKEK([]Recipient{other}, testKEK, kek) },
	} {
		got, err := f()
		wantKind(t, what, err, kms.Invalid)
		if got != nil {
			t.Errorf("%s: copies came with the error", what)
		}
	}
}
