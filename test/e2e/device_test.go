package e2e

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/pqc"
	"github.com/conclave-kms/conclave/test/harness"
	"github.com/conclave-kms/conclave/tpm"
)

// nodeConfig is the part of a node's configuration that leads to its device.
type nodeConfig struct {
	Cluster struct {
		Listen string `toml:"listen"`
	} `toml:"cluster"`
	Device struct {
		Type        string `toml:"type"`
		URI         string `toml:"uri"`
		SoftHSMConf string `toml:"softhsm_conf"`
		Path        string `toml:"path"`
		AuthFile    string `toml:"auth_file"`
	} `toml:"device"`
}

func readConfig(t *testing.T, n *harness.Node) nodeConfig {
	t.Helper()
	b, err := os.ReadFile(n.Config)
	if err != nil {
		t.Fatal(err)
	}
	var c nodeConfig
	if err := toml.Unmarshal(b, &c); err != nil {
		t.Fatal(err)
	}
	return c
}

type device interface {
	AgreementKey() *ecdh.PublicKey
	ECDH(ctx context.Context, peer *ecdh.PublicKey) ([]byte, error)
	SigningKey() *ecdsa.PublicKey
	Sign(ctx context.Context, digest []byte) ([]byte, error)
	Unwrap(ctx context.Context, aad, wrapped []byte) (*secret.Bytes, error)
	Close() error
}

// hardware is a node's real hardware root in the hands of the test: what an
// intruder has who took over the node's machine.
type hardware struct {
	node *harness.Node
	dev  device
	root *keyring.Root
	seed *secret.Bytes // of the ML-KEM half
}

// takeDevice opens the device of a node that does not run.
func takeDevice(t *testing.T, n *harness.Node) *hardware {
	t.Helper()
	if n.Running() {
		t.Fatalf("%s still runs", n.ID)
	}
	cfg := readConfig(t, n)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	h := &hardware{node: n}
	var err error
	switch cfg.Device.Type {
	case "pkcs11":
		h.dev, err = hsm.Open(ctx, hsm.Config{URI: privateLibrary(t, cfg.Device.URI), SoftHSMConf: cfg.Device.SoftHSMConf, Curve: ecdh.P384()})
	case "tpm":
		h.dev, err = tpm.Open(ctx, tpm.Config{Path: cfg.Device.Path, AuthFile: cfg.Device.AuthFile, Curve: ecdh.P384()})
	default:
		t.Fatalf("%s has a device of type %q", n.ID, cfg.Device.Type)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.close)
	h.loadRoot(t)
	return h
}

// privateLibrary points a PKCS#11 URI to a copy of the library: one process may
// come to need several tokens, and a library knows one.
func privateLibrary(t *testing.T, uri string) string {
	t.Helper()
	u, err := hsm.ParseURI(uri)
	if err != nil {
		t.Fatal(err)
	}
	if u.ModulePath, err = hsm.CopyLibrary(t.TempDir()); err != nil {
		t.Fatal(err)
	}
	return u.String()
}

func (h *hardware) loadRoot(t *testing.T) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(h.node.Data, "root.json"))
	if err != nil {
		t.Fatal(err)
	}
	var f struct {
		Suite   string
		Wrapped []byte
	}
	if err := json.Unmarshal(b, &f); err != nil {
		t.Fatal(err)
	}
	suite, ok := pqc.ByName(f.Suite)
	if !ok {
		t.Fatalf("suite %q", f.Suite)
	}
	aad := fmt.Appendf(nil, "conclave/root/v1\x00%s\x00%s", h.node.ID, suite.Name)
	if h.seed, err = h.dev.Unwrap(t.Context(), aad, f.Wrapped); err != nil {
		t.Fatal(err)
	}
	if h.root, err = keyring.NewRoot(h.dev, suite.ID, h.seed); err != nil {
		t.Fatal(err)
	}
}

// close gives the device back. It may be called more than once.
func (h *hardware) close() {
	if h.dev != nil {
		_ = h.dev.Close()
		h.seed.Destroy()
		h.dev = nil
	}
}

// sign signs a command as the node.
func (h *hardware) sign(t *testing.T, cmd state.Command, cluster string, change func(*state.Envelope)) []byte {
	t.Helper()
	e := state.NewEnvelope(cmd)
	e.Cluster, e.Origin, e.Time, e.Nonce = cluster, h.node.ID, time.Now().UnixMilli(), random(state.NonceSize)
	if change != nil {
		change(&e)
	}
	b := e.Marshal()
	digest, err := pqc.Digest(pqc.ECDSAP384SHA384, b, []byte(state.CommandContext))
	if err != nil {
		t.Fatal(err)
	}
	sig, err := h.dev.Sign(t.Context(), digest)
	if err != nil {
		t.Fatal(err)
	}
	return state.Join(b, sig)
}

// open opens the sealed copy of a KEK that was made for this node, if there is one.
func (h *hardware) open(ctx context.Context, st *state.State, ring string, k state.KEK) (*secret.Bytes, error) {
	for _, c := range k.Copies {
		if c.Node == h.node.ID {
			return h.root.OpenKEK(ctx, binding(st, ring, k.Version, c.Node), c.Sealed)
		}
	}
	return nil, kms.Errorf(kms.NotResident, "there is no copy of %s for %s", ring, h.node.ID)
}

func binding(st *state.State, ring string, version uint32, node string) keyring.KEKBinding {
	return keyring.KEKBinding{Cluster: st.Cluster(), Keyring: ring, Version: version, Node: node, Protection: kms.Software}
}

func keyBinding(st *state.State, k state.Key, v state.Version) keyring.KeyBinding {
	return keyring.KeyBinding{Cluster: st.Cluster(), Keyring: k.Keyring, KEK: v.KEK, KeyID: kms.KeyID(k.ID), Version: v.Version, Algorithm: k.Algorithm, Purpose: k.Purpose}
}

// replica is the state that a node's own store of the cluster log leads to, and
// what became of every command in it.
type replica struct {
	state   *state.State
	records []audit.Record
	leaves  []state.Leaf
}

// histories are the replicas made so far, by genesis document.
var histories = struct {
	sync.Mutex
	of map[string]replica
}{of: map[string]replica{}}

// replay reads the cluster log that a node has on disk and applies it from the
// genesis document on. What was applied before, entry by entry the same, is not
// applied again: that Apply says the same again is what kms/state tests.
func replay(t *testing.T, c *harness.Cluster, n *harness.Node) replica {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(c.Dir, "genesis.cbor"))
	if err != nil {
		t.Fatal(err)
	}
	histories.Lock()
	defer histories.Unlock()
	known := histories.of[string(b)]
	r, err := known.follow(b, n)
	if errors.Is(err, errOtherHistory) {
		r, err = replica{}.follow(b, n)
	}
	if err != nil {
		t.Fatal(err)
	}
	if len(r.records) >= len(known.records) {
		histories.of[string(b)] = r
	}
	return r
}

// errOtherHistory: a log is shorter than the one applied before, or another one.
var errOtherHistory = errors.New("not what was applied before")

// follow returns the replica after the whole log of a node.
func (r replica) follow(genesis []byte, n *harness.Node) (replica, error) {
	r.records, r.leaves = slices.Clip(r.records), slices.Clip(r.leaves)
	if r.state == nil {
		signed, err := state.ParseSignedGenesis(genesis)
		if err != nil {
			return r, err
		}
		if r.state, err = state.New(signed); err != nil {
			return r, err
		}
	}
	seen := 0
	err := audit.ReadCluster(filepath.Join(n.Data, "cluster-log"), func(rec audit.Record) error {
		seen++
		if seen <= len(r.records) {
			if was := r.records[seen-1]; was.Index != rec.Index || !bytes.Equal(was.Raw, rec.Raw) || !bytes.Equal(was.Leaf, rec.Leaf) {
				return errOtherHistory
			}
			return nil
		}
		var res state.Result
		rec.Raw, rec.Leaf = bytes.Clone(rec.Raw), bytes.Clone(rec.Leaf)
		r.state, res = r.state.Apply(rec.Index, rec.Raw)
		if !bytes.Equal(res.Leaf, rec.Leaf) {
			return fmt.Errorf("entry %d of %s: its leaf is not the one that Apply derives", rec.Index, n.ID)
		}
		l, err := state.ParseLeaf(rec.Leaf)
		r.records, r.leaves = append(r.records, rec), append(r.leaves, l)
		return err
	}, func(g audit.Gap) error { return fmt.Errorf("%s lacks entries %d to %d", n.ID, g.From, g.To) })
	if err == nil && seen < len(r.records) {
		err = errOtherHistory
	}
	return r, err
}
