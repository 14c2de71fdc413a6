package cluster

import (
	"os"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// A snapshot that was received and refused goes; one that was there before stays.
func TestRefusedSnapshot(t *testing.T) {
	dir := t.TempDir()
	open := func() *snapshotStore {
		s, err := newSnapshotStore(dir, hclog.NewNullLogger())
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	receive := func(s *snapshotStore, index uint64) string {
		_, transport := raft.NewInmemTransport("x")
		sink, err := s.Create(1, index, 1, raft.Configuration{}, 1, transport)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := sink.Write([]byte("content")); err != nil {
			t.Fatal(err)
		}
		if err := sink.Close(); err != nil {
			t.Fatal(err)
		}
		return sink.ID()
	}
	count := func(s *snapshotStore) int {
		l, err := s.List()
		if err != nil {
			t.Fatal(err)
		}
		return len(l)
	}
	s := open()
	kept := receive(s, 1)
	s = open() // another run
	bad := receive(s, 2)
	for _, id := range []string{bad, kept} {
		_, r, err := s.Open(id)
		if err != nil {
			t.Fatal(err)
		}
		_ = r.Close()
		s.refused()
	}
	l, err := s.List()
	if err != nil || count(s) != 1 || l[0].ID != kept {
		t.Errorf("left are %v (%v), want %s", l, err, kept)
	}
}

// Only the newest signatures over states stay, and a damaged one is none.
func TestTrustFiles(t *testing.T) {
	if err := checkModes(t.TempDir() + "/missing"); err != nil {
		t.Errorf("what does not exist has a bad mode: %v", err)
	}
	tr := &trust{dir: t.TempDir()}
	for i := range keepSignatures + 3 {
		if err := writeFile(tr.path([32]byte{byte(i)}), []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	if err := tr.prune(); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(tr.dir)
	if err != nil || len(left) != keepSignatures {
		t.Errorf("%d signatures are left (%v)", len(left), err)
	}
	if tr.signed([32]byte{keepSignatures + 2}) || tr.signed([32]byte{0xff}) {
		t.Error("a damaged or missing signature counts")
	}
}
