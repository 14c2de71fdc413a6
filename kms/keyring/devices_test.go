package keyring

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"testing"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/hsm/hsmtest"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
	"github.com/conclave-kms/conclave/tpm"
	"github.com/conclave-kms/conclave/tpm/tpmtest"
)

// realDevice is a device that others wrap keys for.
type realDevice interface {
	Device
	Hardware
	Random(ctx context.Context, b []byte) error
	ImportKey() (kind string, public []byte)
}

// realNode is a node on a SoftHSM token or a software TPM.
type realNode struct {
	Resident
	dev  realDevice
	root *Root
}

func newRealNode(t *testing.T, name string, dev realDevice) realNode {
	t.Helper()
	suite := pqc.MLKEM768P256
	if dev.AgreementKey().Curve() == ecdh.P384() {
		suite = pqc.MLKEM1024P384
	}
	seed := must[*secret.Bytes](t)(pqc.GenerateSeed(nil))
	defer seed.Destroy()
	root := must[*Root](t)(NewRoot(dev, suite, seed))
	kind, public := dev.ImportKey()
	return realNode{Resident: Resident{Recipient: recipient(name, root), ImportKind: kind, Import: public}, dev: dev, root: root}
}

// TestRealDevices makes a key of every algorithm for two SoftHSM tokens, which
// generate it, and for a token and a TPM, for which it is made on the host; both
// use it alike.
func TestRealDevices(t *testing.T) {
	all := map[string]Importer{
		hsm.ImportKind: {WrapHMAC: hsm.WrapHMAC, WrapSigner: hsm.WrapSigner},
		tpm.ImportKind: {WrapHMAC: tpm.WrapHMAC, WrapSigner: tpm.WrapSigner},
	}
	fr := newRealNode(t, "fr-1", hsmtest.Device(t))
	de := newRealNode(t, "de-1", hsmtest.Device(t))
	chip := tpmtest.New(t)
	jp := newRealNode(t, "jp-1", chip.Open(chip.Config()))
	for other, want := range map[*realNode]kms.Generated{&de: kms.InDevice, &jp: kms.OnHost} {
		for _, a := range deviceAlgorithms {
			t.Run(other.Node+"/"+string(a), func(t *testing.T) {
				b := deviceBinding(a)
				v := must[*NewVersion](t)(fr.root.MakeVersion(bg, "fr-1", fr.dev, all, b, []Resident{fr.Resident, other.Resident}))
				defer v.Material.Destroy()
				if v.Generated != want {
					t.Errorf("generated %s, want %s", v.Generated, want)
				}
				var ms []*Material
				for i, n := range []*realNode{other, &fr} { // the copies are sorted by node
					sealed := v.Copies[i].Sealed
					if v.Copies[i].Node != n.Node {
						sealed = v.Copies[1-i].Sealed
					}
					m := must[*Material](t)(n.root.LoadVersion(bg, b, n.Node, sealed))
					defer m.Destroy()
					ms = append(ms, m)
				}
				alike(t, v, ms[0], ms[1])
			})
		}
	}
}

// alike uses two materials of one key version.
func alike(t *testing.T, v *NewVersion, x, y *Material) {
	t.Helper()
	b := v.Material.Binding()
	switch b.Purpose {
	case kms.Encrypt:
		nonce := [nonceSize]byte{7}
		var made [3][]byte
		for i, m := range []*Material{x, y, v.Material} {
			made[i] = must[[]byte](t)(sealNonce(bg, m.source, b.KeyID, b.Version, &nonce, Context{"n": "v"}, []byte("plaintext")))
		}
		if !bytes.Equal(made[0], made[1]) || !bytes.Equal(made[0], made[2]) {
			t.Error("the devices make different ciphertexts of one nonce")
		}
	case kms.MAC:
		for _, n := range []int{0, 1, 1024, 1025, MaxDeviceMAC} {
			message := bytes.Repeat([]byte{3}, n)
			if err := y.VerifyMAC(bg, message, must[[]byte](t)(x.MAC(bg, message))); err != nil {
				t.Errorf("%d bytes: %v", n, err)
			}
		}
	case kms.Sign:
		for _, m := range []*Material{x, y} {
			if err := Verify(b.Algorithm, v.Public, []byte("m"), must[[]byte](t)(m.Sign(bg, []byte("m")))); err != nil {
				t.Error(err)
			}
			message := kms.ReceiptMessage(b.Cluster, b.Keyring, b.KeyID, b.Version, "n")
			if err := kms.VerifyReceipt(b.Algorithm, v.Public, message, must[[]byte](t)(m.SignReceipt(bg, "n"))); err != nil {
				t.Error(err)
			}
		}
		return
	}
	if !bytes.Equal(must[[]byte](t)(x.CheckValue(bg, "n")), must[[]byte](t)(y.CheckValue(bg, "n"))) {
		t.Error("the check values differ")
	}
}
