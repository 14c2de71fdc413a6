package cluster

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"testing"

	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/pqc"
)

// TestTrustFollowsDevice holds that hashes of states are signed and verified by the key
// of the node's own device, which after a replacement is not that of the genesis, and
// that what the former device signed is not taken for its.
func TestTrustFollowsDevice(t *testing.T) {
	dir := t.TempDir()
	device := func(genesis state.Node) *trust {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		public, err := key.PublicKey.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		cfg := Config{NodeID: "fr-1", SigningSuite: uint16(pqc.ECDSAP256SHA256), Signing: public, Sign: func(_ context.Context, digest []byte) ([]byte, error) {
			r, s, err := ecdsa.Sign(rand.Reader, key, digest)
			if err != nil {
				return nil, err
			}
			return append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...), nil
		}}
		if genesis.ID != "" { // the root of the founding: the genesis names the key
			genesis.Signing, genesis.SigningSuite = public, uint16(pqc.ECDSAP256SHA256)
			cfg.Signing, cfg.SigningSuite = nil, 0
		}
		tr := newTrust(t.Context(), cfg, genesis, "cluster", dir)
		return tr
	}
	founding, next := device(state.Node{ID: "fr-1"}), device(state.Node{})
	hash := [32]byte{1}
	if err := founding.sign(hash); err != nil {
		t.Fatal(err)
	}
	if !founding.signed(hash) || next.signed(hash) {
		t.Errorf("signed by the founding device: %v by itself, %v by the next", founding.signed(hash), next.signed(hash))
	}
	if err := next.sign(hash); err != nil {
		t.Fatal(err)
	}
	if !next.signed(hash) || founding.signed(hash) {
		t.Errorf("signed by the next device: %v by itself, %v by the former", next.signed(hash), founding.signed(hash))
	}
	next.signing = founding.signing
	if err := next.sign([32]byte{2}); err == nil {
		t.Error("a device with another key than it is said to have has signed")
	}
}
