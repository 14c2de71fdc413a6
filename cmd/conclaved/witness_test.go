package main

import (
	"bytes"
	"crypto/ecdh"
	"os"
	"path/filepath"
	"testing"

	"github.com/conclave-kms/conclave/test/fakedevice"
)

// TestWitnessKey: the key opens with its device alone, and goes along to the next one.
func TestWitnessKey(t *testing.T) {
	one, err := fakedevice.New(ecdh.P256())
	if err != nil {
		t.Fatal(err)
	}
	two, err := fakedevice.New(ecdh.P256())
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{Node: "fr-1", DataDir: t.TempDir()}
	first, err := openWitness(t.Context(), cfg, one)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Destroy()
	if err := keepWitness(t.Context(), cfg, two, first); err != nil {
		t.Fatal(err)
	}
	for name, dev := range map[string]device{"the device": one, "the next one": two} {
		got, err := openWitness(t.Context(), cfg, dev)
		if err != nil {
			t.Fatal(name, err)
		}
		if !bytes.Equal(got.Reveal(), first.Reveal()) {
			t.Errorf("%s has another key", name)
		}
		got.Destroy()
	}
	signing, err := fingerprint(one)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(witnessPath(cfg.DataDir, signing))
	if err != nil || bytes.Contains(b, first.Reveal()) {
		t.Error("the file shows the key", err)
	}
	other := cfg
	other.Node = "de-1"
	if _, err := openWitness(t.Context(), other, one); err == nil {
		t.Error("another node opens the key")
	}
	if err := os.WriteFile(witnessPath(cfg.DataDir, signing), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openWitness(t.Context(), cfg, one); err == nil {
		t.Error("a damaged file is taken")
	}
}

func TestSeen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "seen.json")
	s, err := openSeen(path)
	if err != nil {
		t.Fatal(err)
	}
	if size, _, err := s.Get("log"); size != 0 || err != nil {
		t.Fatal(size, err)
	}
	for size := range uint64(3) {
		if err := s.Put("log", size+1, []byte{byte(size)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Put("other", 9, []byte{9}); err != nil {
		t.Fatal(err)
	}
	again, err := openSeen(path)
	if err != nil {
		t.Fatal(err)
	}
	if size, root, err := again.Get("log"); size != 3 || !bytes.Equal(root, []byte{2}) || err != nil {
		t.Error(size, root, err)
	}
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openSeen(path); err == nil {
		t.Error("a damaged memory is taken for none")
	}
}

// TestWitnessPath: a fingerprint is base64, and the file is in the directory all the same.
func TestWitnessPath(t *testing.T) {
	const signing = "SHA256:3OXELC3P6shmvLjviw8loXckcS/1F+NrtiXVC6YPICY"
	path := witnessPath("/data", signing)
	if filepath.Dir(path) != witnessDir("/data") || path == witnessPath("/data", "SHA256:3OXELC3P6shmvLjviw8loXckcS/1FxNrtiXVC6YPICY") {
		t.Errorf("path %s", path)
	}
}
