package e2e

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"slices"
	"testing"

	kwp "github.com/tink-crypto/tink-go/v2/kwp/subtle"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/test/harness"
	"github.com/conclave-kms/conclave/tpm"
)

// Keys of which TestNoKeyInMemory knows the material: planted by commands that the
// test makes itself, or made by a node and opened with its token afterwards.

// planted makes the command that creates a key of material that the test draws.
func (m *memory) planted(hw *hardware, st *state.State, ring, name string, purpose kms.Purpose, algorithm kms.Algorithm) state.CreateKey {
	t := m.t
	material, public, err := keyring.Generate(algorithm, random(keyring.EntropySize))
	if err != nil {
		t.Fatal(err)
	}
	defer material.Destroy()
	cmd := state.CreateKey{Keyring: ring, Name: name, ID: random(16), Purpose: purpose, Algorithm: algorithm, PublicKey: public}
	b := keyring.KeyBinding{Cluster: st.Cluster(), Keyring: ring, KeyID: kms.KeyID(cmd.ID), Version: 1, Algorithm: algorithm, Purpose: purpose}
	scanner := &m.hardware
	if memoryRings[ring].protection == kms.Software {
		scanner = &m.software
		k, ok := st.KEK(ring, 1)
		if !ok {
			t.Fatalf("%s has no KEK", ring)
		}
		kek, err := hw.open(t.Context(), st, ring, k)
		if err != nil {
			t.Fatal(err)
		}
		defer kek.Destroy()
		m.add(scanner, "the KEK of "+ring, kek.Reveal())
		b.KEK, cmd.KEK = 1, 1
		if cmd.Wrapped, err = keyring.WrapMaterial(kek, b, material); err != nil {
			t.Fatal(err)
		}
	} else {
		cmd.Generated = kms.OnHost
		for _, n := range st.ResidentNodes(ring) {
			cmd.Copies = append(cmd.Copies, state.SealedCopy{Node: n.ID, Root: n.Root, Sealed: sealedFor(t, n, b, material)})
			if purpose != kms.Sign {
				cmd.Checks = append(cmd.Checks, state.Check{Node: n.ID, Hash: keyring.CheckHash(deviceCheckValue(b, material, n.ID))})
			}
		}
	}
	m.add(scanner, "planted key "+ring+"/"+name, material.Reveal())
	return cmd
}

// deviceCheckValue is the check value of a key version of protection hardware, as
// kms/keyring/DESIGN.md describes it.
func deviceCheckValue(b keyring.KeyBinding, material *secret.Bytes, node string) []byte {
	h := hmac.New(sha256.New, material.Reveal())
	h.Write([]byte("\x00\x00\x00\x01conclave/check-value/2\x00"))
	h.Write(canon.Marshal(map[string]any{"cluster": b.Cluster, "keyring": b.Keyring, "key-id": b.KeyID[:], "version": b.Version, "node": node}))
	h.Write([]byte{0, 0, 1, 0}) // bits
	return h.Sum(nil)
}

// sealedFor wraps material for a node's device and seals the result to the node.
func sealedFor(t *testing.T, n state.Node, b keyring.KeyBinding, material *secret.Bytes) []byte {
	t.Helper()
	importer := map[string]keyring.Importer{
		hsm.ImportKind: {WrapHMAC: hsm.WrapHMAC, WrapSigner: hsm.WrapSigner},
		tpm.ImportKind: {WrapHMAC: tpm.WrapHMAC, WrapSigner: tpm.WrapSigner},
	}[n.ImportKind]
	var blob []byte
	var err error
	switch b.Algorithm {
	case kms.ECDSAP256:
		blob, err = importer.WrapSigner(n.Import, ecdh.P256(), material, nil)
	case kms.ECDSAP384:
		blob, err = importer.WrapSigner(n.Import, ecdh.P384(), material, nil)
	default:
		blob, err = importer.WrapHMAC(n.Import, material, nil)
	}
	if err != nil {
		t.Fatalf("wrap for %s: %v", n.ID, err)
	}
	sealed, err := keyring.SealVersion(keyring.Recipient{Node: n.ID, Suite: n.Suite, PublicKey: n.Agreement}, b, blob)
	if err != nil {
		t.Fatal(err)
	}
	return sealed
}

// learnMade opens with a node's own token the keys of protection hardware that the
// cluster has made, which only someone can who has the token in his hands and its
// PIN, and starts the node again.
func (m *memory) learnMade(n *harness.Node) {
	t := m.t
	if err := n.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	hw := takeDevice(t, n)
	st := replay(t, m.s.c, n).state
	made := map[kms.Generated]int{}
	for _, ring := range []string{mixedRing, tokensRing} {
		for _, k := range st.Keys(ring) {
			v, _ := st.Version(ring, k.Name, 1)
			i := slices.IndexFunc(v.Copies, func(c state.SealedCopy) bool { return c.Node == n.ID })
			if i < 0 {
				t.Fatalf("%s/%s has no copy for %s", ring, k.Name, n.ID)
			}
			b := keyring.KeyBinding{Cluster: st.Cluster(), Keyring: ring, KeyID: kms.KeyID(k.ID), Version: 1, Algorithm: k.Algorithm, Purpose: k.Purpose}
			blob, err := hw.root.OpenVersion(t.Context(), b, n.ID, v.Copies[i].Sealed)
			if err != nil {
				t.Fatal(err)
			}
			m.add(&m.hardware, "key "+ring+"/"+k.Name, m.unwrapped(hw, k, v, blob))
			made[v.Generated]++
		}
	}
	if made[kms.OnHost] < 4 || made[kms.InDevice] < 4 {
		t.Errorf("keys were made in these places: %v", made)
	}
	hw.close()
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	m.s.settled()
}

// unwrapped opens a key blob of package hsm with the token's ECDH and checks the
// key against what is published.
func (m *memory) unwrapped(hw *hardware, k state.Key, v state.Version, blob []byte) []byte {
	t := m.t
	const header, point = 4, 97 // version, material, KDF, length of the label (0); P-384
	if len(blob) < header+point || blob[2] != 1 || blob[3] != 0 {
		t.Fatalf("the blob of %s begins with %x", k.Name, blob[:header])
	}
	peer, err := ecdh.P384().NewPublicKey(blob[header : header+point])
	if err != nil {
		t.Fatal(err)
	}
	z, err := hw.dev.ECDH(t.Context(), peer)
	if err != nil {
		t.Fatal(err)
	}
	box, err := kwp.NewKWP(z[len(z)-32:])
	if err != nil {
		t.Fatal(err)
	}
	plain, err := box.Unwrap(blob[header+point:])
	if err != nil {
		t.Fatal(err)
	}
	if k.Purpose != kms.Sign {
		return plain
	}
	return scalarOf(t, k, v, plain)
}

// scalarOf returns the private scalar of a PKCS #8 key, behind which SoftHSM may
// leave zeros.
func scalarOf(t *testing.T, k state.Key, v state.Version, der []byte) []byte {
	t.Helper()
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	for n := len(der); err != nil && n > 0 && der[n-1] == 0; {
		n--
		parsed, err = x509.ParsePKCS8PrivateKey(der[:n])
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok {
		t.Fatalf("the key of %s is a %T: %v", k.Name, parsed, err)
	}
	public, err := key.PublicKey.Bytes()
	if err != nil || !bytes.Equal(public, v.PublicKey) {
		t.Fatalf("the key of %s is not that of its public key (%v)", k.Name, err)
	}
	d, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return d
}
