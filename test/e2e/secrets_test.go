package e2e

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/age"
	"filippo.io/age/armor"

	raftnode "github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
	"github.com/conclave-kms/conclave/test/harness"
)

// hunt collects the secrets that must not be on any disk.
type hunt struct {
	t      *testing.T
	s      site
	prefix string // of the names of the keys
	harness.Scanner
}

func (h *hunt) add(name string, b []byte) {
	h.t.Helper()
	if err := h.Add(name, b); err != nil {
		h.t.Fatal(err)
	}
}

// TestNoSecretOnDisk makes the nodes handle secrets of every kind, has one take
// a snapshot, and then reads every byte that the three nodes have written: none
// of the secrets is there as it is, in hexadecimal or in base64. The values looked
// for are the real ones: what was opened from the disk decrypts what was encrypted.
func TestNoSecretOnDisk(t *testing.T) {
	s := site{t, cluster(t)}
	h := &hunt{t: t, s: s, prefix: unique("scan")}
	h.useKeys()
	h.fromFiles()

	fr := s.c.Nodes["fr"]
	s.settled()
	if err := fr.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	hw := takeDevice(t, fr)
	h.fromState(hw, replay(t, s.c, fr).state)
	h.takeSnapshot(hw)
	hw.close()

	var paths []string
	for _, n := range s.c.All() {
		paths = append(paths, n.Data, n.Log)
	}
	paths = append(paths, s.c.Dir+".log")
	found, scanned, err := h.Trees(paths...)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range found {
		t.Error(f)
	}
	t.Logf("looked for %d secrets in %d files with %d bytes", h.Secrets(), scanned.Files, scanned.Bytes)
	if scanned.Files < 15 || scanned.Bytes < 100_000 || h.Secrets() < 40 {
		t.Errorf("that is too little to mean anything")
	}
	h.canary(fr, paths)

	// The node comes back from the snapshot with its keys.
	if err := fr.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.settled()
	s.decrypts("fr", "coalition", h.prefix, s.encrypt("jp", "coalition", h.prefix, "after the snapshot"), "after the snapshot")
}

// useKeys has the nodes make and use keys of every kind, and collects what the
// API gives out, and what goes in.
func (h *hunt) useKeys() {
	t, s := h.t, h.s
	for name, k := range map[string]struct {
		purpose kms.Purpose
		alg     kms.Algorithm
	}{
		"": {kms.Encrypt, kms.AES256GCM}, "-mac": {kms.MAC, kms.HMACSHA256},
		"-p256": {kms.Sign, kms.ECDSAP256}, "-p384": {kms.Sign, kms.ECDSAP384}, "-ed": {kms.Sign, kms.Ed25519},
	} {
		s.key("coalition", h.prefix+name, k.purpose, k.alg)
	}
	s.key("europe", h.prefix, kms.Encrypt, "")
	h.imported("fr", h.prefix+"-brought")
	h.imported("jp", h.prefix+"-carried")
	plaintext := []byte("a plaintext of the secrets scan that nobody may find")
	message := []byte("a message of the secrets scan that is signed and authenticated")
	h.add("plaintext", plaintext)
	h.add("message", message)
	for _, at := range []string{"fr", "jp"} {
		service := s.client(at, "service")
		key := service.Key("coalition", h.prefix)
		for i := range 3 {
			dk, err := key.DataKey(t.Context(), wire.DataKeyRequest{Bytes: 32, Context: wire.Context{"file": "a"}})
			if err != nil {
				t.Fatal(err)
			}
			h.add(fmt.Sprintf("data key %d of %s", i, at), dk.Plaintext)
			if _, err := key.Decrypt(t.Context(), wire.DecryptRequest{Ciphertext: dk.Wrapped, Context: wire.Context{"file": "a"}}); err != nil {
				t.Fatal(err)
			}
		}
		c, err := key.Encrypt(t.Context(), wire.EncryptRequest{Plaintext: plaintext})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := key.Rewrap(t.Context(), wire.RewrapRequest{Ciphertext: c.Ciphertext}); err != nil {
			t.Fatal(err)
		}
		if _, err := service.Key("coalition", h.prefix+"-mac").MAC(t.Context(), wire.MACRequest{Message: message}); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"-p256", "-p384", "-ed"} {
			if _, err := service.Key("coalition", h.prefix+name).Sign(t.Context(), wire.SignRequest{Message: message}); err != nil {
				t.Fatal(err)
			}
		}
		// Requests that fail must leave no trace of what they carried either.
		_, err = key.Decrypt(t.Context(), wire.DecryptRequest{Ciphertext: plaintext})
		refused(t, "a plaintext in place of a ciphertext", err, kms.OpenFailed)
		_, err = service.Key("coalition", h.prefix+"-mac").Encrypt(t.Context(), wire.EncryptRequest{Plaintext: plaintext})
		if err == nil {
			t.Error("a MAC key encrypted")
		}
	}
	s.rotate("coalition", h.prefix, 2)
}

// fromFiles collects the secrets that lie in files beside the data directories.
func (h *hunt) fromFiles() {
	t, c := h.t, h.s.c
	read := func(path string) []byte {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return bytes.TrimRight(b, "\r\n")
	}
	for _, site := range []string{"fr", "de"} {
		h.add("PIN of "+site, read(filepath.Join(c.Dir, site, "pin")))
	}
	auth := read(filepath.Join(c.Dir, "jp", "auth"))
	h.add("TPM authorisation secret", auth)
	for _, what := range []string{"owner", "lockout", "key"} {
		raw, err := hkdf.Key(sha256.New, auth, nil, "conclave tpm v1 "+what+" auth", 24)
		if err != nil {
			t.Fatal(err)
		}
		h.add("TPM "+what+" authorisation", raw)
	}
	for _, id := range []string{"fr-1", "fr-2", "de-1", "de-2", "jp-1", "jp-2"} {
		keyFile, passFile := c.CustodianFiles(id)
		pass := read(passFile)
		h.add("passphrase of custodian "+id, pass)
		_, public, err := pqc.ParsePublic(append(read(keyFile+".pub"), '\n'))
		if err != nil {
			t.Fatal(err)
		}
		seed := custodianSeed(t, read(keyFile), public, string(pass))
		h.add("ML-DSA seed of custodian "+id, seed[:32])
		h.add("Ed25519 seed of custodian "+id, seed[32:])
	}
	for _, n := range c.All() {
		h.addKey("TLS key of "+n.ID, filepath.Join(n.Dir, "node.crt"), filepath.Join(n.Dir, "node.key"))
		for _, role := range []string{"operator", "service", "auditor", "custodian"} {
			cert, key := c.Certificate(n.Site, role)
			h.addKey("TLS key of "+n.Site+"'s "+role, cert, key)
		}
		h.addKey("CA key of "+n.Site, filepath.Join(c.Dir, "ca", n.Site+".pem"), filepath.Join(c.Dir, "ca", n.Site+".key"))
	}
}

func (h *hunt) addKey(name, certFile, keyFile string) {
	h.t.Helper()
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		h.t.Fatal(err)
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		h.t.Fatalf("%s is a %T", name, pair.PrivateKey)
	}
	d, err := key.Bytes()
	if err != nil {
		h.t.Fatal(err)
	}
	h.add(name, d)
}

// custodianSeed decrypts a custodian's key file (age) down to its 64-byte seed and
// checks that it is the one.
func custodianSeed(t *testing.T, file, public []byte, pass string) []byte {
	t.Helper()
	id, err := age.NewScryptIdentity(pass)
	if err != nil {
		t.Fatal(err)
	}
	r, err := age.Decrypt(armor.NewReader(bytes.NewReader(file)), id)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if len(b) < pqc.HybridSeedSize {
		t.Fatalf("a custodian's key file holds %d bytes", len(b))
	}
	raw := b[len(b)-pqc.HybridSeedSize:]
	seed, err := secret.Copy(raw)
	if err != nil {
		t.Fatal(err)
	}
	defer seed.Destroy()
	key, err := pqc.NewHybridKey(seed)
	if err != nil {
		t.Fatal(err)
	}
	defer key.Destroy()
	if !bytes.Equal(key.PublicKey(), public) {
		t.Fatal("the seed in a custodian's key file is not that of the public key")
	}
	return raw
}

// fromState opens with fr's own device what fr holds: every KEK and every key
// version, and the ML-KEM half of the hardware root.
func (h *hunt) fromState(hw *hardware, st *state.State) {
	t := h.t
	h.add("ML-KEM seed of "+hw.node.ID, hw.seed.Reveal())
	keys := 0
	for _, kr := range st.Keyrings() {
		for _, k := range st.KEKs(kr.Name) {
			if k.Retired() { // nobody has a copy any more, and nothing is under it
				continue
			}
			kek, err := hw.open(t.Context(), st, kr.Name, k)
			if err != nil {
				t.Fatalf("KEK %d of %s: %v", k.Version, kr.Name, err)
			}
			defer kek.Destroy()
			h.add(fmt.Sprintf("KEK %d of %s", k.Version, kr.Name), kek.Reveal())
			for _, key := range st.Keys(kr.Name) {
				for _, v := range st.Versions(kr.Name, key.Name) {
					if v.KEK != k.Version || v.State.Gone() {
						continue
					}
					material, err := keyring.UnwrapMaterial(kek, keyBinding(st, key, v), v.Wrapped)
					if err != nil {
						t.Fatalf("version %d of %s/%s: %v", v.Version, kr.Name, key.Name, err)
					}
					h.add(fmt.Sprintf("version %d of %s/%s", v.Version, kr.Name, key.Name), material.Reveal())
					m, err := keyring.NewMaterial(keyBinding(st, key, v), material)
					if err != nil {
						t.Fatal(err)
					}
					h.genuine(m, key, v)
					m.Destroy()
					keys++
				}
			}
		}
	}
	if keys < 7 {
		t.Fatalf("only %d key versions were opened", keys)
	}
}

// genuine checks that opened material is that of the key: it makes what the
// service decrypts.
func (h *hunt) genuine(m *keyring.Material, key state.Key, v state.Version) {
	if key.Purpose != kms.Encrypt || key.Keyring != "coalition" {
		return
	}
	c, err := m.Encrypt(h.t.Context(), nil, []byte("control"))
	if err != nil {
		h.t.Fatal(err)
	}
	h.s.decrypts("de", key.Keyring, key.Name, wire.EncryptResponse{Ciphertext: c, KeyVersion: v.Version}, "control")
}

// takeSnapshot runs fr's part of the cluster in this process, with fr's device and
// on fr's data, and with a threshold at which a snapshot is due at once.
func (h *hunt) takeSnapshot(hw *hardware) {
	t, n := h.t, hw.node
	b, err := os.ReadFile(filepath.Join(h.s.c.Dir, "genesis.cbor"))
	if err != nil {
		t.Fatal(err)
	}
	signed, err := state.ParseSignedGenesis(b)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(n.Dir, "node.crt"), filepath.Join(n.Dir, "node.key"))
	if err != nil {
		t.Fatal(err)
	}
	log, err := audit.OpenClusterLog(filepath.Join(n.Data, "cluster-log"))
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(n.Data, "raft")
	node, err := raftnode.Open(t.Context(), raftnode.Config{
		NodeID: n.ID, DataDir: dir, Listen: readConfig(t, n).Cluster.Listen, Genesis: signed, Certificate: cert, Sign: hw.dev.Sign,
		Logger: slog.New(slog.DiscardHandler),
		OnApply: func(_ *state.State, raw []byte, r state.Result) { // as the daemon does
			if err := log.Append(r.Index, raw, r.Leaf); err != nil {
				t.Error(err)
			}
		},
		Timing: raftnode.Timing{SnapshotInterval: 50 * time.Millisecond, SnapshotThreshold: 1},
	})
	if err != nil {
		t.Fatal(err)
	}
	err = harness.Within(t.Context(), time.Minute, "a snapshot with a signed hash", func(context.Context) error {
		states, err := filepath.Glob(filepath.Join(dir, "snapshots", "*", "state.bin"))
		if err != nil {
			return harness.Give(err)
		}
		hashes, err := os.ReadDir(filepath.Join(dir, "trust"))
		if err != nil {
			return harness.Give(err)
		}
		for _, s := range states {
			info, err := os.Stat(s)
			if err == nil && info.Size() > 10_000 && len(hashes) > 0 && !strings.Contains(s, ".tmp") {
				return nil
			}
		}
		return fmt.Errorf("there are %d snapshots and %d signed hashes", len(states), len(hashes))
	})
	if err := errors.Join(err, node.Close(), log.Close()); err != nil {
		t.Fatal(err)
	}
}

// canary plants a secret in a data directory and wants the scan to find it: else
// its silence would mean nothing.
func (h *hunt) canary(n *harness.Node, paths []string) {
	t := h.t
	planted := random(32)
	h.add("planted secret", planted)
	file := filepath.Join(n.Data, "canary")
	text := "key=" + base64.StdEncoding.EncodeToString(append([]byte("a"), planted...)) + "\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	found, _, err := h.Trees(paths...)
	if err := errors.Join(err, os.Remove(file)); err != nil {
		t.Fatal(err)
	}
	if len(found) != 1 || found[0].File != file {
		t.Errorf("the planted secret: found %v", found)
	}
}
