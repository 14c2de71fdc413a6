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

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
	"github.com/conclave-kms/conclave/test/fakedevice"
)

// deviceAlgorithms are those of protection hardware.
var deviceAlgorithms = []kms.Algorithm{kms.AES256GCM, kms.HMACSHA256, kms.ECDSAP256, kms.ECDSAP384}

var importers = map[string]Importer{hsm.ImportKind: {WrapHMAC: hsm.WrapHMAC, WrapSigner: hsm.WrapSigner}}

// deviceBinding is bindingOf for protection hardware.
func deviceBinding(a kms.Algorithm) KeyBinding {
	b := bindingOf(a)
	b.KEK = 0
	return b
}

func resident(node string, r *Root, dev *fakedevice.Device) Resident {
	kind, public := dev.ImportKey()
	return Resident{Recipient: recipient(node, r), ImportKind: kind, Import: public}
}

// pair are two nodes with devices of one kind.
type pair struct {
	fr, de       *Root
	frDev, deDev *fakedevice.Device
}

func newPair(t testing.TB) pair {
	t.Helper()
	var p pair
	p.fr, p.frDev = newRoot(t, pqc.MLKEM768P256)
	p.de, p.deDev = newRoot(t, pqc.MLKEM1024P384)
	return p
}

func (p pair) residents() []Resident {
	return []Resident{resident("fr-1", p.fr, p.frDev), resident("de-1", p.de, p.deDev)}
}

// makeVersion makes a key version at fr.
func (p pair) makeVersion(t testing.TB, a kms.Algorithm) *NewVersion {
	t.Helper()
	v := must[*NewVersion](t)(p.fr.MakeVersion(bg, "fr-1", p.frDev, importers, deviceBinding(a), p.residents()))
	t.Cleanup(v.Material.Destroy)
	if len(v.Copies) != 2 || v.Copies[0].Node != "de-1" || v.Copies[1].Node != "fr-1" {
		t.Fatalf("the copies are not one for each node, sorted: %d", len(v.Copies))
	}
	return v
}

func (p pair) load(t testing.TB, v *NewVersion) (fr, de *Material) {
	t.Helper()
	b := v.Material.Binding()
	de = must[*Material](t)(p.de.LoadVersion(bg, b, "de-1", v.Copies[0].Sealed))
	fr = must[*Material](t)(p.fr.LoadVersion(bg, b, "fr-1", v.Copies[1].Sealed))
	t.Cleanup(de.Destroy)
	t.Cleanup(fr.Destroy)
	return fr, de
}

// TestHardwareVersions makes a key of every algorithm in the device and on the
// host, and uses it at two nodes.
func TestHardwareVersions(t *testing.T) {
	for _, where := range []kms.Generated{kms.InDevice, kms.OnHost} {
		for _, a := range deviceAlgorithms {
			t.Run(string(where)+"/"+string(a), func(t *testing.T) {
				p := newPair(t)
				if where == kms.OnHost {
					p.frDev.NoGeneration()
				}
				v := p.makeVersion(t, a)
				if v.Generated != where {
					t.Errorf("generated %s", v.Generated)
				}
				fr, de := p.load(t, v)
				switch purposeOf(a) {
				case kms.Encrypt:
					ct := must[[]byte](t)(fr.Encrypt(bg, Context{"a": "b"}, []byte("across a border")))
					if got := must[[]byte](t)(de.Decrypt(bg, Context{"a": "b"}, ct)); string(got) != "across a border" {
						t.Errorf("decrypted to %d bytes", len(got))
					}
					_, err := de.Decrypt(bg, Context{"a": "c"}, ct)
					wantErrOpen(t, "another context", err)
				case kms.MAC:
					mac := must[[]byte](t)(fr.MAC(bg, []byte("m")))
					if err := de.VerifyMAC(bg, []byte("m"), mac); err != nil {
						t.Error(err)
					}
					wantErrOpen(t, "another message", de.VerifyMAC(bg, []byte("n"), mac))
				case kms.Sign:
					for _, m := range []*Material{fr, de} {
						if err := Verify(a, v.Public, []byte("m"), must[[]byte](t)(m.Sign(bg, []byte("m")))); err != nil {
							t.Error(err)
						}
						raw := must[[]byte](t)(m.SignReceipt(bg, "fr-1"))
						b := deviceBinding(a)
						message := kms.ReceiptMessage(b.Cluster, b.Keyring, b.KeyID, b.Version, "fr-1")
						if err := kms.VerifyReceipt(a, v.Public, message, raw); err != nil {
							t.Error(err)
						}
						raw[3] ^= 1
						wantKind(t, "an altered receipt", kms.VerifyReceipt(a, v.Public, message, raw), kms.BadSignature)
						wantKind(t, "a short receipt", kms.VerifyReceipt(a, v.Public, message, raw[1:]), kms.BadSignature)
					}
				}
				if purposeOf(a) != kms.Sign {
					want := must[[]byte](t)(v.Material.CheckValue(bg, "de-1"))
					if got := must[[]byte](t)(de.CheckValue(bg, "de-1")); len(got) != 32 || !bytes.Equal(got, want) {
						t.Error("the check value of the loaded key is not that of the new one")
					}
					if bytes.Equal(want, must[[]byte](t)(de.CheckValue(bg, "fr-1"))) {
						t.Error("the check value does not depend on the node")
					}
				}
				for _, m := range []*Material{fr, v.Material} {
					if s, err := m.Export(); kms.KindOf(err) != kms.Invalid || s != nil {
						t.Errorf("exported: %v", err)
					}
				}
			})
		}
	}
}

// TestBothLevelsAreOneFormat holds that a key derives the same bytes in a device
// as in memory: a ciphertext of one level opens under the same key at the other.
func TestBothLevelsAreOneFormat(t *testing.T) {
	p := newPair(t)
	material, _, err := Generate(kms.AES256GCM, bytes.Repeat([]byte{9}, EntropySize))
	if err != nil {
		t.Fatal(err)
	}
	_, public := p.frDev.ImportKey()
	blob := must[[]byte](t)(hsm.WrapHMAC(public, material, nil))
	b := bindingOf(kms.AES256GCM)
	soft := must[*Material](t)(NewMaterial(b, material))
	t.Cleanup(soft.Destroy)
	b.KEK = 0
	hard := must[*Material](t)(loadBlob(bg, p.frDev, b, blob))
	t.Cleanup(hard.Destroy)

	nonce := [nonceSize]byte{1, 2, 3}
	var made [2][]byte
	for i, m := range []*Material{soft, hard} {
		made[i] = must[[]byte](t)(sealNonce(bg, m.source, testID, 2, &nonce, Context{"n": "v"}, []byte("plaintext")))
	}
	if !bytes.Equal(made[0], made[1]) {
		t.Fatalf("the two levels make different ciphertexts of one nonce:\n%x\n%x", made[0], made[1])
	}
	for _, d := range []struct{ from, to *Material }{{soft, hard}, {hard, soft}} {
		ct := must[[]byte](t)(d.from.Encrypt(bg, nil, []byte("x")))
		if got := must[[]byte](t)(d.to.Decrypt(bg, nil, ct)); string(got) != "x" {
			t.Errorf("opened as %d bytes", len(got))
		}
	}
	// The check values differ, as their labels do.
	if bytes.Equal(must[[]byte](t)(soft.CheckValue(bg, "n")), must[[]byte](t)(hard.CheckValue(bg, "n"))) {
		t.Error("one check value for both levels")
	}
}

func TestReservedMessages(t *testing.T) {
	p := newPair(t)
	_, m := p.load(t, p.makeVersion(t, kms.HMACSHA256))
	b := m.Binding()
	for _, message := range [][]byte{deviceCheckInput(b, "de-1"), []byte(reservedPrefix), messageSecretInput(make([]byte, headerSize))} {
		_, err := m.MAC(bg, message)
		wantKind(t, "MAC of a derivation's input", err, kms.Invalid)
		wantKind(t, "its verification", m.VerifyMAC(bg, message, make([]byte, 32)), kms.Invalid)
	}
	must[[]byte](t)(m.MAC(bg, []byte(reservedPrefix[:len(reservedPrefix)-1])))
	must[[]byte](t)(m.MAC(bg, make([]byte, MaxDeviceMAC)))
	_, err := m.MAC(bg, make([]byte, MaxDeviceMAC+1))
	wantKind(t, "a long message", err, kms.TooLarge)
	must[[]byte](t)(newKey(t, kms.HMACSHA256, 1).MAC(bg, []byte(reservedPrefix))) // software has another hash

	_, s := p.load(t, p.makeVersion(t, kms.ECDSAP256))
	_, err = s.Sign(bg, kms.ReceiptMessage(b.Cluster, b.Keyring, b.KeyID, b.Version, "de-1"))
	wantKind(t, "signing a receipt on request", err, kms.Invalid)
	_, err = s.CheckValue(bg, "de-1")
	wantKind(t, "check value of a sign key", err, kms.Invalid)
	_, err = m.SignReceipt(bg, "de-1")
	wantKind(t, "receipt signed by a MAC key", err, kms.Invalid)
}

// TestHardwareBindings alters each part of the binding, and the copy.
func TestHardwareBindings(t *testing.T) {
	p := newPair(t)
	v := p.makeVersion(t, kms.AES256GCM)
	good, sealed := v.Material.Binding(), v.Copies[0].Sealed
	must[[]byte](t)(p.de.OpenVersion(bg, good, "de-1", sealed))
	for what, change := range map[string]func(*KeyBinding){
		"cluster":   func(b *KeyBinding) { b.Cluster += "0" },
		"keyring":   func(b *KeyBinding) { b.Keyring += "0" },
		"key id":    func(b *KeyBinding) { b.KeyID[0]++ },
		"version":   func(b *KeyBinding) { b.Version++ },
		"algorithm": func(b *KeyBinding) { b.Algorithm, b.Purpose = kms.HMACSHA256, kms.MAC },
	} {
		b := good
		change(&b)
		_, err := p.de.LoadVersion(bg, b, "de-1", sealed)
		wantErrOpen(t, "another "+what, err)
	}
	_, err := p.de.LoadVersion(bg, good, "de-2", sealed)
	wantErrOpen(t, "another node", err)
	_, err = p.fr.LoadVersion(bg, good, "de-1", sealed)
	wantErrOpen(t, "another node's root", err)
	for i := 0; i < len(sealed); i += 1 + len(sealed)/41 {
		b := bytes.Clone(sealed)
		b[i] ^= 1
		_, err := p.de.LoadVersion(bg, good, "de-1", b)
		wantErrOpen(t, fmt.Sprintf("byte %d altered", i), err)
	}
	// A KEK copy does not pass for a key version's, nor the other way.
	kek := must[[]Sealed](t)(SealKEK([]Recipient{recipient("de-1", p.de)}, testKEK, newKEK(t)))[0].Sealed
	_, err = p.de.OpenVersion(bg, good, "de-1", kek)
	wantErrOpen(t, "the copy of a KEK", err)
	_, err = p.de.OpenKEK(bg, KEKBinding{Cluster: good.Cluster, Keyring: good.Keyring, Version: 2, Node: "de-1", Protection: kms.Software}, sealed)
	wantErrOpen(t, "opened as a KEK", err)
}

// invalidBlob is what a device says of a blob that does not open.
type invalidBlob struct{ error }

func (invalidBlob) Invalid() bool { return true }

func TestLoadErrors(t *testing.T) {
	p := newPair(t)
	v := p.makeVersion(t, kms.AES256GCM)
	b, sealed := v.Material.Binding(), v.Copies[1].Sealed
	p.frDev.Fail(func(op string) error {
		if op == fakedevice.OpLoad {
			return fmt.Errorf("wrapped: %w", invalidBlob{errBroken})
		}
		return nil
	})
	_, err := p.fr.LoadVersion(bg, b, "fr-1", sealed)
	wantErrOpen(t, "a blob that the device refuses", err)
	p.frDev.Fail(func(string) error { return errBroken })
	_, err = p.fr.LoadVersion(bg, b, "fr-1", sealed)
	wantKind(t, "a broken device", err, kms.Unavailable)
	if !errors.Is(err, errBroken) {
		t.Error("the cause is not wrapped")
	}
	p.frDev.Fail(nil)
	m := must[*Material](t)(p.fr.LoadVersion(bg, b, "fr-1", sealed))
	t.Cleanup(m.Destroy)
	ct := must[[]byte](t)(m.Encrypt(bg, nil, nil))
	p.frDev.Fail(func(string) error { return errBroken })
	for what, f := range map[string]func() error{
		"encrypt": func() error { _, err := m.Encrypt(bg, nil, nil); return err },
		"decrypt": func() error { _, err := m.Decrypt(bg, nil, ct); return err },
		"check":   func() error { _, err := m.CheckValue(bg, "fr-1"); return err },
		"make": func() error {
			_, err := p.fr.MakeVersion(bg, "fr-1", p.frDev, importers, b, p.residents())
			return err
		},
	} {
		if err := f(); kms.KindOf(err) != kms.Unavailable || !errors.Is(err, errBroken) {
			t.Errorf("%s on a broken device: %v", what, err)
		}
	}
	p.frDev.Fail(nil)
	p.frDev.LoseKeys()
	must[[]byte](t)(m.Decrypt(bg, nil, ct)) // loads by itself
	p.frDev.Corrupt(func(op string, out []byte) { out[0] ^= 1 })
	_, err = m.Decrypt(bg, nil, ct)
	wantErrOpen(t, "a device that computes wrongly", err)
}

func TestMakeVersionRefuses(t *testing.T) {
	p := newPair(t)
	b := deviceBinding(kms.AES256GCM)
	without := p.residents()
	without[1].ImportKind, without[1].Import = "", nil
	strange := p.residents()
	strange[1].ImportKind = "strange"
	withKEK := b
	withKEK.KEK = 1
	broken := p.residents()
	broken[1].Import = []byte{1, 2, 3}
	for what, c := range map[string]struct {
		b    KeyBinding
		node string
		to   []Resident
	}{
		"ed25519":                 {deviceBinding(kms.Ed25519), "fr-1", p.residents()},
		"a KEK version":           {withKEK, "fr-1", p.residents()},
		"a node elsewhere":        {b, "jp-1", p.residents()},
		"nobody":                  {b, "fr-1", nil},
		"a node twice":            {b, "fr-1", append(p.residents(), p.residents()...)},
		"no import kind":          {b, "fr-1", without},
		"an unknown import kind":  {b, "fr-1", strange},
		"no agreement key":        {b, "fr-1", []Resident{{Recipient: Recipient{Node: "fr-1"}, ImportKind: without[0].ImportKind, Import: without[0].Import}}},
		"an import key that none": {b, "fr-1", broken},
	} {
		v, err := p.fr.MakeVersion(bg, c.node, p.frDev, importers, c.b, c.to)
		if k := kms.KindOf(err); k != kms.Invalid && what != "an import key that none" || v != nil || err == nil {
			t.Errorf("%s: %v (%v)", what, err, k)
		}
	}
	_, err := p.fr.MakeVersion(bg, "fr-1", p.frDev, importers, b, without)
	if !bytes.Contains([]byte(err.Error()), []byte("de-1")) {
		t.Errorf("%q does not name the node", err)
	}
	p.frDev.Fail(func(op string) error {
		if op == fakedevice.OpGenerate {
			return errBroken
		}
		return nil
	})
	if _, err := p.fr.MakeVersion(bg, "fr-1", p.frDev, importers, b, p.residents()); !errors.Is(err, errBroken) {
		t.Errorf("generation fell back to the host, or: %v", err)
	}
	p.frDev.Fail(func(op string) error {
		if op == fakedevice.OpGenerate {
			return cannotDo{errBroken} // for these recipients
		}
		return nil
	})
	v := p.makeVersion(t, kms.AES256GCM)
	if v.Generated != kms.OnHost {
		t.Errorf("generated %s", v.Generated)
	}
}

// cannotDo is what a device says of what it cannot do at all.
type cannotDo struct{ error }

func (cannotDo) Unsupported() bool { return true }

func TestRewrapVersion(t *testing.T) {
	p := newPair(t)
	next, nextDev := newRoot(t, pqc.MLKEM1024P384)
	_, public := nextDev.ImportKey()
	for _, a := range deviceAlgorithms {
		v := p.makeVersion(t, a)
		b := v.Material.Binding()
		moved := must[[]byte](t)(p.fr.RewrapVersion(bg, b, "fr-1", v.Copies[1].Sealed, recipient("de-1", next), public))
		m := must[*Material](t)(next.LoadVersion(bg, b, "de-1", moved))
		t.Cleanup(m.Destroy)
		if purposeOf(a) == kms.Sign {
			if err := Verify(a, v.Public, []byte("m"), must[[]byte](t)(m.Sign(bg, []byte("m")))); err != nil {
				t.Errorf("%s: %v", a, err)
			}
			continue
		}
		if !bytes.Equal(must[[]byte](t)(m.CheckValue(bg, "de-1")), must[[]byte](t)(v.Material.CheckValue(bg, "de-1"))) {
			t.Errorf("%s: another key arrived", a)
		}
	}
	v := p.makeVersion(t, kms.AES256GCM)
	try := func() error {
		_, err := p.fr.RewrapVersion(bg, v.Material.Binding(), "fr-1", v.Copies[1].Sealed, recipient("de-1", next), public)
		return err
	}
	p.frDev.Fail(func(op string) error {
		if op == fakedevice.OpRewrap {
			return cannotDo{errBroken}
		}
		return nil
	})
	if err := try(); err != ErrCannotRewrap {
		t.Errorf("a device that cannot: %v", err)
	}
	p.frDev.Fail(func(string) error { return errBroken })
	wantKind(t, "a broken device", try(), kms.Unavailable)
}

// plainDevice is a device without keys of protection hardware.
type plainDevice struct{ d *fakedevice.Device }

func (p plainDevice) AgreementKey() *ecdh.PublicKey { return p.d.AgreementKey() }
func (p plainDevice) ECDH(ctx context.Context, peer *ecdh.PublicKey) ([]byte, error) {
	return p.d.ECDH(ctx, peer)
}

func TestDeviceWithoutHardware(t *testing.T) {
	dev := must[*fakedevice.Device](t)(fakedevice.New(ecdh.P256()))
	seed := must[*secret.Bytes](t)(pqc.GenerateSeed(nil))
	defer seed.Destroy()
	r := must[*Root](t)(NewRoot(plainDevice{dev}, pqc.MLKEM768P256, seed))
	b := deviceBinding(kms.AES256GCM)
	// It can make a key for others, and itself, all the same: on the host.
	v := must[*NewVersion](t)(r.MakeVersion(bg, "fr-1", dev, importers, b, []Resident{resident("fr-1", r, dev)}))
	defer v.Material.Destroy()
	if v.Generated != kms.OnHost {
		t.Errorf("generated %s", v.Generated)
	}
	_, err := r.LoadVersion(bg, b, "fr-1", v.Copies[0].Sealed)
	wantKind(t, "load", err, kms.Unavailable)
	if _, err := r.RewrapVersion(bg, b, "fr-1", v.Copies[0].Sealed, recipient("de-1", r), nil); err != ErrCannotRewrap {
		t.Errorf("rewrap: %v", err)
	}
}

func TestDeviceCheckKnownAnswers(t *testing.T) {
	_, dev := newRoot(t, pqc.MLKEM768P256)
	_, public := dev.ImportKey()
	for _, v := range loadVectors(t).DeviceChecks {
		for _, p := range []kms.Purpose{kms.Encrypt, kms.MAC} {
			b := KeyBinding{Cluster: v.Cluster, Keyring: v.Keyring, KeyID: v.KeyID.keyID(t), Version: v.Version, Purpose: p, Algorithm: p.Algorithms()[0]}
			m := must[*Material](t)(loadBlob(bg, dev, b, must[[]byte](t)(hsm.WrapHMAC(public, v.Material.secret(t), nil))))
			t.Cleanup(m.Destroy)
			kcv := must[[]byte](t)(m.CheckValue(bg, v.Node))
			if !bytes.Equal(kcv, v.KCV) || !bytes.Equal(CheckHash(kcv), v.Hash) {
				t.Errorf("%s at %s: check value is another", p, v.Node)
			}
		}
	}
}

// TestVersionCopyIsStandardHPKE seals with the standard library alone, from the
// layout in DESIGN.md.
func TestVersionCopyIsStandardHPKE(t *testing.T) {
	r, dev := newRoot(t, pqc.MLKEM1024P384)
	b := deviceBinding(kms.AES256GCM)
	mlkemKey := must[*mlkem.EncapsulationKey1024](t)(mlkem.NewEncapsulationKey1024(r.PublicKey().Bytes()[:1568]))
	pub := must[hpke.PublicKey](t)(hpke.NewHybridPublicKey(mlkemKey, dev.AgreementKey()))
	enc, sender, err := hpke.NewSender(pub, hpke.HKDFSHA384(), hpke.AES256GCM(), encodeVersion(versionInfo, b, "fr-1"))
	if err != nil {
		t.Fatal(err)
	}
	ct := must[[]byte](t)(sender.Seal(encodeVersion(versionAAD, b, "fr-1"), []byte("the blob")))
	got := must[[]byte](t)(r.OpenVersion(bg, b, "fr-1", append(append([]byte{0x00, 0x51}, enc...), ct...)))
	if string(got) != "the blob" {
		t.Error("opened another blob")
	}
}
