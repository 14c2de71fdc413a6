package cluster

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"log/slog"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/pqc"
)

// newSigner makes a device's signing key.
func newSigner(t *testing.T) (signingKey, func(context.Context, []byte) ([]byte, error)) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := k.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return signingKey{pqc.ECDSAP256SHA256, public}, func(_ context.Context, digest []byte) ([]byte, error) {
		r, s, err := ecdsa.Sign(rand.Reader, k, digest)
		if err != nil {
			return nil, err
		}
		b := make([]byte, 64)
		r.FillBytes(b[:32])
		s.FillBytes(b[32:])
		return b, nil
	}
}

// What a node has promised is replaced by marks of its own device alone: whoever has its
// certificate, but not the device, cannot have the others forget it.
func TestPromisesAreTheDevices(t *testing.T) {
	const cluster, node = "c", "node-fr-1"
	device, sign := newSigner(t)
	_, other := newSigner(t)
	k, err := newMarker(t.Context(), cluster, node, device, sign)
	if err != nil {
		t.Fatal(err)
	}
	verify := func(m mark) error { return m.verify(cluster, node, []signingKey{device}) }
	p := openPromises("", slog.New(slog.DiscardHandler))
	at := func(i uint64) position { return position{Term: 2, LogTerm: 2, Index: i} }
	good := canon.Marshal(k.at(at(10), 0))
	if err := p.note(node, good, verify); err != nil {
		t.Fatal(err)
	}
	public, own, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sign2 := func(m mark) mark { m.Sig = ed25519.Sign(own, m.body()); return m }
	digest, _ := pqc.Digest(device.suite, canon.Marshal(markRun{cluster, node, public}), []byte(MarkContext))
	forged, err := other(t.Context(), digest)
	if err != nil {
		t.Fatal(err)
	}
	for name, m := range map[string]mark{
		"of a key that no device has signed":      sign2(mark{Run: markRun{cluster, node, public}, Device: k.device, At: at(99)}),
		"of a key that another device has signed": sign2(mark{Run: markRun{cluster, node, public}, Device: forged, At: at(99)}),
		"of the run, signed by another key":       sign2(mark{Run: k.run, Device: k.device, At: at(99)}),
		"of another node":                         sign2(mark{Run: markRun{cluster, "node-de-1", public}, Device: k.device, At: at(99)}),
	} {
		if err := p.note(node, canon.Marshal(m), verify); !errors.Is(err, kms.BadSignature) && !errors.Is(err, kms.Invalid) {
			t.Errorf("a mark %s: %v", name, err)
		}
		if !bytes.Equal(p.of(node), good) {
			t.Fatalf("a mark %s has replaced the node's", name)
		}
	}
	later := canon.Marshal(k.at(at(11), 0))
	if err := p.note(node, later, func(mark) error { t.Error("the device's signature is verified again"); return nil }); err != nil || !bytes.Equal(p.of(node), later) {
		t.Errorf("the next mark of the run: %v", err)
	}
	again, err := newMarker(t.Context(), cluster, node, device, sign)
	if err != nil {
		t.Fatal(err)
	}
	restarted := canon.Marshal(again.at(at(12), 0))
	if err := p.note(node, restarted, verify); err != nil || !bytes.Equal(p.of(node), restarted) {
		t.Errorf("a mark of the next run: %v", err)
	}
}
