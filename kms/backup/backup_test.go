package backup_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/backup"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
	"github.com/conclave-kms/conclave/pqc"
)

var now = time.UnixMilli(statetest.Start).Add(time.Hour)

// world is a small cluster with keys, and its backup.
func world(t testing.TB) (*statetest.World, []byte) {
	t.Helper()
	w := statetest.New(t, statetest.Options{Sites: []string{"de", "fr"}})
	w.CreateKeyring("coalition", "de", "fr")
	w.CreateKey("coalition", "orders", kms.Encrypt)
	w.Rotate("coalition", "orders")
	w.Advance(time.Minute)
	return w, write(t, w, w.State(), "node-fr-1")
}

func write(t testing.TB, w *statetest.World, s *state.State, node string) []byte {
	t.Helper()
	var b bytes.Buffer
	if _, err := backup.Write(t.Context(), &b, s, node, "test", now, w.Node(node).Sign); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestRoundTrip(t *testing.T) {
	w, b := world(t)
	s := w.State()
	for _, signer := range []string{"", fingerprint(w, "node-fr-1")} {
		r, err := backup.Verify(bytes.NewReader(b), backup.Options{Cluster: s.Cluster(), Signer: signer})
		if err != nil {
			t.Fatal(err)
		}
		if r.Hash != s.Hash() || r.State.Hash() != s.Hash() || r.Header.Node != "node-fr-1" || r.Header.Index != s.Index() || r.Full != (signer == "") {
			t.Errorf("signer %q: %+v", signer, r.Header)
		}
	}
	sum, err := backup.Scan(bytes.NewReader(b))
	hash := s.Hash()
	if err != nil || !bytes.Equal(sum.Hash, hash[:]) || sum.Size == 0 {
		t.Errorf("%+v, %v", sum, err)
	}
}

func fingerprint(w *statetest.World, node string) string {
	n, _ := w.State().Node(node)
	return pqc.Fingerprint(n.Signing)
}

// TestEveryByte changes bytes all over a backup: none is accepted, neither in full nor
// with the signer trusted, and Scan accepts none.
func TestEveryByte(t *testing.T) {
	w, b := world(t)
	o := backup.Options{Cluster: w.State().Cluster(), Signer: fingerprint(w, "node-fr-1")}
	// Scan reads all of it; Verify, which restores, takes a part of the places.
	for i := 0; i < len(b); i += 1 + len(b)/2000 {
		x := bytes.Clone(b)
		x[i] ^= 1 << (i % 8)
		if _, err := backup.Scan(bytes.NewReader(x)); err == nil {
			t.Fatalf("Scan accepted byte %d of %d changed", i, len(b))
		}
	}
	for i := 0; i < len(b); i += 1 + len(b)/60 {
		x := bytes.Clone(b)
		x[i] ^= 1 << (i % 8)
		if _, err := backup.Verify(bytes.NewReader(x), o); err == nil {
			t.Fatalf("Verify accepted byte %d of %d changed", i, len(b))
		}
	}
	for _, n := range []int{0, 1, len(b) / 2, len(b) - 1} {
		if _, err := backup.Verify(bytes.NewReader(b[:n]), o); err == nil {
			t.Errorf("accepted the first %d bytes of %d", n, len(b))
		}
	}
	if _, err := backup.Verify(bytes.NewReader(append(bytes.Clone(b), 0)), o); !errors.Is(err, kms.Invalid) {
		t.Errorf("with a byte after the end: %v", err)
	}
}

// TestResigned: a node that lies about the state can sign what it likes; the statements
// in the backup show it. Here it lowers a quorum from two approvals to one.
func TestResigned(t *testing.T) {
	w, _ := world(t)
	var snapshot bytes.Buffer
	if err := w.State().Snapshot(&snapshot); err != nil {
		t.Fatal(err)
	}
	two := []byte("\x69approvals\x02")
	forged := 0
	for from := 0; ; {
		b := bytes.Clone(snapshot.Bytes())
		i := bytes.Index(b[from:], two)
		if i < 0 {
			break
		}
		from += i + len(two)
		b[from-1] = 1
		sum := sha256.Sum256(b[:len(b)-37])
		copy(b[len(b)-32:], sum[:])
		s, err := state.Restore(bytes.NewReader(b), func([32]byte) bool { return true })
		if err != nil {
			continue // in the genesis, which is verified always
		}
		forged++
		if _, err := backup.Verify(bytes.NewReader(write(t, w, s, "node-fr-1")), backup.Options{Cluster: w.State().Cluster()}); err == nil {
			t.Error("a state with a lower quorum was accepted")
		}
	}
	if forged == 0 {
		t.Error("nothing could be forged")
	}
}

func TestRefuses(t *testing.T) {
	w, b := world(t)
	other := statetest.New(t, statetest.Options{Sites: []string{"de", "jp"}})
	for name, c := range map[string]struct {
		o    backup.Options
		kind kms.Kind
	}{
		"another cluster": {backup.Options{Cluster: other.State().Cluster()}, kms.Conflict},
		"no cluster":      {backup.Options{}, kms.Conflict},
		"another signer":  {backup.Options{Cluster: w.State().Cluster(), Signer: fingerprint(w, "node-de-1")}, kms.BadSignature},
	} {
		if _, err := backup.Verify(bytes.NewReader(b), c.o); !errors.Is(err, c.kind) {
			t.Errorf("%s: %v", name, err)
		}
	}
	sign := func(context.Context, []byte) ([]byte, error) { return nil, errors.New("no device") }
	if _, err := backup.Write(t.Context(), &bytes.Buffer{}, w.State(), "node-fr-1", "test", now, sign); err == nil {
		t.Error("written without a signature")
	}
	if _, err := backup.Write(t.Context(), &bytes.Buffer{}, w.State(), "node-fr-1", "test", now, w.Node("node-de-1").Sign); !errors.Is(err, kms.BadSignature) {
		t.Errorf("signed by another device: %v", err)
	}
	if _, err := backup.Write(t.Context(), &bytes.Buffer{}, w.State(), "stranger", "test", now, sign); !errors.Is(err, kms.Invalid) {
		t.Errorf("by a stranger: %v", err)
	}
}

// FuzzVerify: whatever arrives is refused or is the backup, and memory follows what
// arrives, not what lengths claim.
func FuzzVerify(f *testing.F) {
	w, b := world(f)
	f.Add(b)
	f.Add([]byte("conclave-backup/1\n"))
	f.Add(binary.BigEndian.AppendUint32([]byte("conclave-backup/1\nH"), 1<<31))
	o := backup.Options{Cluster: w.State().Cluster(), Signer: fingerprint(w, "node-fr-1")}
	f.Fuzz(func(t *testing.T, x []byte) {
		if _, err := backup.Verify(bytes.NewReader(x), o); err == nil && !bytes.Equal(x, b) {
			t.Error("another file was accepted")
		}
	})
}
