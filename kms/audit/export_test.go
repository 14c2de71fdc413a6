package audit

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/tlog"
)

func checkpointOf(t *testing.T, s tlog.Source, n uint64) []byte {
	t.Helper()
	root, err := tlog.Root(s, n)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Appendf(nil, "conclave/test\n%d\n%s\n\n— key AAAA\n", n, base64.StdEncoding.EncodeToString(root))
}

func readFile(t *testing.T, elements ...string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(elements...))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestExportAccess(t *testing.T) {
	tmp := t.TempDir()
	l := mustOpen(t, filepath.Join(tmp, "log"), Options{SegmentSize: 20_000})
	out := filepath.Join(tmp, "out")
	for _, n := range []uint64{250, 500} {
		appendMany(t, l, 250)
		note := checkpointOf(t, l, n)
		if err := l.Export(t.Context(), out, "fr-node-1", note); err != nil {
			t.Fatal(err)
		}
		if got := readFile(t, out, "access", "fr-node-1", "checkpoint"); !bytes.Equal(got, note) {
			t.Errorf("checkpoint %q", got)
		}
	}
	var bundle []byte
	for _, leaf := range readAll(t, filepath.Join(tmp, "log"))[:256] {
		bundle = append(binary.BigEndian.AppendUint16(bundle, uint16(len(leaf))), leaf...)
	}
	if got := readFile(t, out, "access", "fr-node-1", "tile", "entries", "000"); !bytes.Equal(got, bundle) {
		t.Error("the bundle does not hold the first 256 leaves")
	}
}

func TestExportCluster(t *testing.T) {
	tmp := t.TempDir()
	l := mustOpenCluster(t, filepath.Join(tmp, "log"), Options{SegmentSize: 3000})
	var commands []byte
	for i := range uint64(300) {
		appendAll(t, l, i+1)
		if i < 256 {
			commands = append(binary.BigEndian.AppendUint32(commands, uint32(len(raw(i+1)))), raw(i+1)...)
		}
	}
	out := filepath.Join(tmp, "out")
	genesis := []byte("signed genesis")
	for range 2 {
		if err := l.Export(t.Context(), out, genesis, checkpointOf(t, l, 300)); err != nil {
			t.Fatal(err)
		}
	}
	if got := readFile(t, out, "genesis.cbor"); !bytes.Equal(got, genesis) {
		t.Errorf("genesis %q", got)
	}
	if got := readFile(t, out, "cluster", "commands", "000"); !bytes.Equal(got, commands) {
		t.Error("the bundle does not hold the first 256 commands")
	}
	if got := readFile(t, out, "cluster", "tile", "0", "000"); !bytes.HasPrefix(got, LeafHash(leaf(1))) {
		t.Error("the tile does not begin with the first leaf's hash")
	}
	readFile(t, out, "cluster", "commands", "001.p", "44")
	if err := l.Export(t.Context(), out, []byte("another"), checkpointOf(t, l, 300)); !errors.Is(err, kms.Conflict) {
		t.Errorf("another genesis: %v", err)
	}
	note := checkpointOf(t, l, 300)
	if err := l.Restored(500, 400, make([]byte, 32)); err != nil {
		t.Fatal(err)
	}
	if err := l.Export(t.Context(), filepath.Join(tmp, "other"), genesis, note); err != nil {
		t.Errorf("what is before a gap: %v", err)
	}
}
