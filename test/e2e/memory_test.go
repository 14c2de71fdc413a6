package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

// memory is a hunt for key material in the memory of the nodes' processes.
type memory struct {
	t *testing.T
	s site

	hardware harness.Scanner // material of protection hardware: never in a node's memory
	software harness.Scanner // material of protection software: there while it is cached
	keys     []used
	cipher   map[string]wire.EncryptResponse
}

// used is a key that the load uses at every node.
type used struct {
	keyring, name string
	purpose       kms.Purpose
}

const (
	mixedRing  = "memory-mixed"  // hardware, at tokens and TPM: keys come into being on a host
	tokensRing = "memory-tokens" // hardware, at tokens alone: keys come into being in one
	softRing   = "memory-soft"
)

var memoryRings = map[string]struct {
	protection kms.Protection
	sites      []string
}{
	mixedRing:  {kms.Hardware, []string{"de", "fr", "jp"}},
	tokensRing: {kms.Hardware, []string{"de", "fr"}},
	softRing:   {kms.Software, []string{"de", "fr", "jp"}},
}

// TestNoKeyInMemory uses keys whose material the test knows, at every node and
// under load, and reads the whole memory of the nodes' processes meanwhile. What
// belongs to a keyring of protection hardware is not in it, whether the key was
// brought in from outside, made on a host for tokens and TPMs together, or made in
// a token. What belongs to one of protection software is found while it is in use,
// which shows that the search works, and no more when its time in the cache has
// passed. The tokens' library runs in a process of its own here: with it inside the
// node, SoftHSM itself would keep keys in the node's memory, as no real token does.
func TestNoKeyInMemory(t *testing.T) {
	m := &memory{t: t, s: site{t, cluster(t)}, cipher: map[string]wire.EncryptResponse{}}
	m.prepare()
	m.plant()
	m.make("de")
	m.encryptAll()

	load := m.load()
	m.clean("under load", &m.hardware)
	m.found("under load")
	m.canary(m.s.c.Nodes["fr"])
	load()

	m.learnMade(m.s.c.Nodes["fr"]) // de made them and has not been restarted since
	m.clean("after it made keys", &m.hardware)
	load = m.load()
	m.clean("under load again", &m.hardware)
	load()
	m.evicted()
	m.clean("after use", &m.hardware)
}

// prepare makes the keyrings, and ends the nodes with a configuration in which
// libraries are isolated and nothing stays in the cache for long.
func (m *memory) prepare() {
	t, c := m.t, m.s.c
	operator := m.s.client("fr", "operator")
	for name, r := range memoryRings {
		_, err := operator.CreateKeyring(t.Context(), wire.CreateKeyringRequest{Name: name, Residency: r.sites, Protection: string(r.protection), Policy: "keys"})
		if err != nil && !errors.Is(err, kms.Exists) {
			t.Fatalf("keyring %s: %v", name, err)
		}
	}
	m.s.settled()
	for _, n := range []*harness.Node{c.Nodes["de"], c.Nodes["jp"], c.Nodes["fr"]} { // fr last: it misses nothing
		changes := map[string]any{"cache.ttl": "4s"}
		if n.Site != "jp" {
			changes["device.isolate"] = true
		}
		restore, err := n.Configure(changes)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := errors.Join(restore(), n.Restart(context.Background())); err != nil {
				t.Error(err)
			}
		})
		if err := n.Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// plant brings in keys that the test has drawn, by commands that it signs with
// fr's own token, and starts the nodes.
func (m *memory) plant() {
	t, c := m.t, m.s.c
	fr := c.Nodes["fr"]
	hw := takeDevice(t, fr)
	st := replay(t, c, fr).state
	var commands []injection
	for i, k := range []struct {
		purpose   kms.Purpose
		algorithm kms.Algorithm
	}{{kms.Encrypt, kms.AES256GCM}, {kms.MAC, kms.HMACSHA256}, {kms.Sign, kms.ECDSAP256}, {kms.Sign, kms.ECDSAP384}} {
		for _, ring := range []string{mixedRing, softRing} {
			name := unique(fmt.Sprintf("planted-%d", i))
			cmd := m.planted(hw, st, ring, name, k.purpose, k.algorithm)
			commands = append(commands, injection{name: name, raw: hw.sign(t, cmd, st.Cluster(), func(e *state.Envelope) {
				e.Principal = "spiffe://fr.example/operator/admin"
			})})
			m.keys = append(m.keys, used{ring, name, k.purpose})
		}
	}
	hw.close()
	inject(t, fr, commands)
	for _, n := range []*harness.Node{fr, c.Nodes["de"]} { // only fr's log is long enough to be elected with
		if err := n.Launch(); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(fr.Ready(t.Context()), c.Ready(t.Context())); err != nil {
		t.Fatal(err)
	}
	m.s.settled()
	r := replayed(t, m.s, "jp")
	for _, i := range commands {
		checkRecorded(t, c.Nodes["jp"], r, i)
	}
}

// replayed reads what a running node has on disk; all its entries are durable.
func replayed(t *testing.T, s site, at string) replica {
	t.Helper()
	return replay(t, s.c, s.c.Nodes[at])
}

// add looks for a secret, also as the words of a number have it in memory.
func (m *memory) add(s *harness.Scanner, name string, b []byte) {
	m.t.Helper()
	if err := s.Add(name, b); err != nil {
		m.t.Fatal(err)
	}
	reversed := bytes.Clone(b)
	slices.Reverse(reversed)
	if err := s.Add(name+", as a number's words", reversed); err != nil {
		m.t.Fatal(err)
	}
}

// make has a node make keys of protection hardware.
func (m *memory) make(at string) {
	t := m.t
	operator := m.s.client(at, "operator")
	for _, ring := range []string{mixedRing, tokensRing} {
		for _, k := range []wire.CreateKeyRequest{
			{Purpose: string(kms.Encrypt)}, {Purpose: string(kms.MAC)},
			{Purpose: string(kms.Sign), Algorithm: string(kms.ECDSAP256)}, {Purpose: string(kms.Sign), Algorithm: string(kms.ECDSAP384)},
		} {
			k.Name = unique("made")
			if _, err := operator.CreateKey(t.Context(), ring, k); err != nil {
				t.Fatalf("%s in %s: %v", k.Purpose, ring, err)
			}
			m.keys = append(m.keys, used{ring, k.Name, kms.Purpose(k.Purpose)})
		}
	}
	m.s.settled()
}

// encryptAll makes a ciphertext under every key that encrypts, for the load.
func (m *memory) encryptAll() {
	for _, k := range m.keys {
		if k.purpose == kms.Encrypt {
			m.cipher[k.name] = m.s.encrypt("fr", k.keyring, k.name, "a plaintext of the load")
		}
	}
}

// load uses every key at every node of its residency until the function returned
// is called, which fails the test if a use failed. It returns when every key has
// been used everywhere.
func (m *memory) load() (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	var failure atomic.Pointer[error]
	rounds := make([]atomic.Int64, 3)
	for i, at := range []string{"fr", "de", "jp"} {
		service := m.s.client(at, "service")
		wg.Go(func() {
			for ctx.Err() == nil {
				for _, k := range m.keys {
					if !slices.Contains(memoryRings[k.keyring].sites, at) {
						continue
					}
					// A node that stands still while its memory is read may find calls overdue.
					if err := m.use(ctx, service, k); err != nil && ctx.Err() == nil && !errors.Is(err, kms.Unavailable) {
						err = fmt.Errorf("%s/%s at %s: %w", k.keyring, k.name, at, err)
						failure.CompareAndSwap(nil, &err)
						return
					}
				}
				rounds[i].Add(1)
			}
		})
	}
	end = sync.OnceFunc(func() {
		cancel()
		wg.Wait()
		if err := failure.Load(); err != nil {
			m.t.Error(*err)
		}
	})
	m.t.Cleanup(end)
	err := harness.Within(m.t.Context(), time.Minute, "every key is used at every node", func(context.Context) error {
		if err := failure.Load(); err != nil {
			return harness.Give(*err)
		}
		for i := range rounds {
			if rounds[i].Load() < 2 {
				return errors.New("not yet")
			}
		}
		return nil
	})
	if err != nil {
		m.t.Fatal(err)
	}
	return end
}

func (m *memory) use(ctx context.Context, service *client.Client, k used) error {
	key := service.Key(k.keyring, k.name)
	message := []byte("a message of the load")
	switch k.purpose {
	case kms.Encrypt:
		if _, err := key.Encrypt(ctx, wire.EncryptRequest{Plaintext: wire.Secret(message)}); err != nil {
			return err
		}
		r, err := key.Decrypt(ctx, wire.DecryptRequest{Ciphertext: m.cipher[k.name].Ciphertext})
		if err == nil && string(r.Plaintext) != "a plaintext of the load" {
			err = errors.New("another plaintext")
		}
		return err
	case kms.MAC:
		_, err := key.MAC(ctx, wire.MACRequest{Message: message})
		return err
	}
	_, err := key.Sign(ctx, wire.SignRequest{Message: message})
	return err
}

// clean wants nothing that the scanner knows in the memory of any running node.
func (m *memory) clean(when string, s *harness.Scanner) {
	m.t.Helper()
	for _, n := range m.s.c.All() {
		found, size := m.scan(n, s)
		for _, f := range found {
			m.t.Errorf("%s %s: %s", n.ID, when, f)
		}
		m.t.Logf("%s %s: looked for %d secrets in %d MiB", n.ID, when, s.Secrets(), size>>20)
	}
}

func (m *memory) scan(n *harness.Node, s *harness.Scanner) ([]harness.Finding, int64) {
	m.t.Helper()
	found, scanned, err := s.Memory(m.t.Context(), n.Process())
	if err != nil {
		m.t.Fatal(err)
	}
	if scanned.Bytes < 20<<20 || s.Secrets() == 0 {
		m.t.Fatalf("%d secrets in %d bytes of %s: that is too little to mean anything", s.Secrets(), scanned.Bytes, n.ID)
	}
	return found, scanned.Bytes
}

// found wants every software key in the memory of every node, while it is in use.
func (m *memory) found(when string) {
	m.t.Helper()
	for _, n := range m.s.c.All() {
		seen := map[string]bool{}
		err := harness.Within(m.t.Context(), 30*time.Second, "keys of protection software are found in "+n.ID, func(context.Context) error {
			found, _ := m.scan(n, &m.software)
			for _, f := range found {
				name, _, _ := strings.Cut(f.What, ",")
				seen[name] = true
			}
			if len(seen) < 5 { // the KEK and four keys
				return fmt.Errorf("only %d are: the search is blind", len(seen))
			}
			return nil
		})
		if err != nil {
			m.t.Errorf("%s: %v", when, err)
		}
	}
}

// evicted waits until no software key is in any node's memory any more.
func (m *memory) evicted() {
	m.t.Helper()
	for _, n := range m.s.c.All() {
		err := harness.Within(m.t.Context(), 30*time.Second, "the cache of "+n.ID+" is empty", func(context.Context) error {
			var errs []error
			found, _ := m.scan(n, &m.software)
			for _, f := range found {
				errs = append(errs, errors.New(f.String()))
			}
			return errors.Join(errs[:min(len(errs), 5)]...)
		})
		if err != nil {
			m.t.Error(err)
		}
	}
}

// canary has a node hold half a request with a known plaintext in it and finds it.
func (m *memory) canary(n *harness.Node) {
	t := m.t
	planted := random(32)
	var s harness.Scanner
	m.add(&s, "planted plaintext", planted)
	if found, _ := m.scan(n, &s); len(found) != 0 {
		t.Fatalf("before it was planted: %v", found)
	}
	cert, key := m.s.c.Certificate(n.Site, "service")
	config, err := client.LoadTLS(m.s.c.Vars["CONCLAVE_CACERT"], cert, key)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{TLSClientConfig: config}
	defer transport.CloseIdleConnections()
	body, in := io.Pipe()
	ctx, cancel := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, n.API+"/v1/keyrings/"+softRing+"/keys/"+m.keys[1].name+"/encrypt", body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	done := make(chan struct{})
	go func() {
		defer close(done)
		if resp, err := transport.RoundTrip(req); err == nil {
			resp.Body.Close()
		}
	}()
	if _, err := fmt.Fprintf(in, `{"plaintext": "%x`, planted); err != nil {
		t.Fatal(err)
	}
	err = harness.Within(t.Context(), 20*time.Second, "the planted plaintext is found", func(context.Context) error {
		if found, _ := m.scan(n, &s); len(found) == 0 {
			return errors.New("it is not there")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	cancel()
	in.Close()
	<-done
}
