package tlog

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
)

func head(origin string, size uint64, root []byte) []byte {
	return fmt.Appendf(nil, "%s\n%d\n%s\n", origin, size, base64.StdEncoding.EncodeToString(root))
}

// note is a checkpoint with what would be a signature.
func note(l list, n int) []byte {
	return append(head("example.org/log", uint64(n), rootOf(l[:n])), "\n— someone AAAA\n"...)
}

// files returns the names and contents below dir.
func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		name, _ := filepath.Rel(dir, path)
		all[filepath.ToSlash(name)] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func export(l list, n int, dir string) error {
	return Export(context.Background(), l, dir, note(l, n), doubled(l))
}

// doubled lies beside: every leaf twice.
func doubled(l list) Beside {
	return Beside{"commands", func(w io.Writer, from uint64, n int) error {
		for _, leaf := range l[from : from+uint64(n)] {
			if _, err := w.Write(bytes.Repeat(leaf, 2)); err != nil {
				return err
			}
		}
		return nil
	}}
}

func TestExport(t *testing.T) {
	l := leaves(600)
	path := filepath.Join(t.TempDir(), "log")
	for _, n := range []int{1, 255, 256, 256, 300, 511, 600} {
		if err := export(l, n, path); err != nil {
			t.Fatalf("%d leaves: %v", n, err)
		}
		size, root, err := exported(path)
		if err != nil || size != uint64(n) || !bytes.Equal(root, rootOf(l[:n])) {
			t.Fatalf("the checkpoint says %d, %x: %v", size, root, err)
		}
		d := dir{path, size}
		if got := must[[]byte](t)(Root(d, size)); !bytes.Equal(got, root) {
			t.Errorf("the tiles of %d leaves have the root %x, want %x", n, got, root)
		}
		if got := must[[][]byte](t)(d.Leaves(0, n)); !slices.EqualFunc(got, l[:n], bytes.Equal) {
			t.Errorf("other leaves were exported than the first %d", n)
		}
	}
	got := files(t, path)
	want := []string{"checkpoint",
		"commands/000", "commands/001", "commands/002.p/88",
		"tile/0/000", "tile/0/001", "tile/0/002.p/88", "tile/1/000.p/1", "tile/1/000.p/2",
		"tile/entries/000", "tile/entries/001", "tile/entries/002.p/88"}
	if names := slices.Sorted(maps.Keys(got)); !slices.Equal(names, want) {
		t.Errorf("files %v, want %v", names, want)
	}
	once := filepath.Join(t.TempDir(), "log")
	if err := export(l, 600, once); err != nil {
		t.Fatal(err)
	}
	for name, content := range files(t, once) {
		if got[name] != content {
			t.Errorf("%s depends on how often was exported", name)
		}
	}
}

// TestExportContinues exports again after it was cut short at every file.
func TestExportContinues(t *testing.T) {
	l := leaves(600)
	whole := filepath.Join(t.TempDir(), "log")
	if err := errors.Join(export(l, 200, whole), export(l, 600, whole)); err != nil {
		t.Fatal(err)
	}
	want := files(t, whole)
	for stop := range 20 {
		path := filepath.Join(t.TempDir(), "log")
		if err := export(l, 200, path); err != nil {
			t.Fatal(err)
		}
		cut := &cutShort{list: l, left: stop}
		if err := Export(context.Background(), cut, path, note(l, 600), doubled(l)); err == nil {
			break
		} else if !errors.Is(err, errCut) {
			t.Fatal(err)
		}
		if size, _, err := exported(path); err != nil || size != 200 {
			t.Fatalf("an export that was cut short shows %d leaves: %v", size, err)
		}
		if err := export(l, 600, path); err != nil {
			t.Fatal(err)
		}
		if got := files(t, path); !maps.Equal(got, want) {
			t.Errorf("after a stop at %d the export differs", stop)
		}
	}
}

var errCut = errors.New("cut short")

// cutShort fails after so many calls for leaves or hashes.
type cutShort struct {
	list
	left int
}

func (c *cutShort) Leaves(from uint64, n int) ([][]byte, error) {
	if c.left--; c.left < 0 {
		return nil, errCut
	}
	return c.list.Leaves(from, n)
}

func (c *cutShort) Hashes(level uint, from, n uint64) ([][]byte, error) {
	if c.left--; c.left < 0 {
		return nil, errCut
	}
	return c.list.Hashes(level, from, n)
}

func TestExportRefuses(t *testing.T) {
	l := leaves(600)
	path := filepath.Join(t.TempDir(), "log")
	if err := export(l, 300, path); err != nil {
		t.Fatal(err)
	}
	before := files(t, path)
	forked := slices.Clone(l)
	forked[7] = []byte("another")
	for name, c := range map[string]struct {
		err  error
		want kms.Kind
	}{
		"a shorter log":             {export(l, 299, path), kms.Conflict},
		"another log":               {export(forked, 600, path), kms.Conflict},
		"another log of equal size": {export(forked, 300, path), kms.Conflict},
		"a checkpoint of another":   {Export(context.Background(), l, path, note(forked, 600)), kms.Invalid},
		"more than there is":        {Export(context.Background(), l[:400], path, note(l, 600)), kms.Invalid},
		"no checkpoint":             {Export(context.Background(), l, path, []byte("x\n600\n")), kms.Invalid},
	} {
		if !errors.Is(c.err, c.want) {
			t.Errorf("%s: %v, want %v", name, c.err, c.want)
		}
	}
	if !maps.Equal(files(t, path), before) {
		t.Error("a refused export changed the directory")
	}
	// Another log without a checkpoint yet, of which a tile is there.
	if err := os.Remove(filepath.Join(path, checkpointFile)); err != nil {
		t.Fatal(err)
	}
	if err := export(forked, 600, path); !errors.Is(err, kms.Conflict) || !strings.Contains(err.Error(), "000") {
		t.Errorf("beside tiles of another log: %v", err)
	}
}

func TestParseHead(t *testing.T) {
	l := leaves(3)
	good := string(note(l, 3))
	if _, _, err := parseHead([]byte(good)); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"", "a\n3\n", strings.Replace(good, "\n3\n", "\n03\n", 1), strings.Replace(good, "\n3\n", "\n+3\n", 1),
		strings.Replace(good, "=\n", "\n", 1), strings.Replace(good, "=\n", "=x\n", 1), "\n" + good, strings.Replace(good, "example.org/log", "", 1)} {
		if _, _, err := parseHead([]byte(bad)); !errors.Is(err, kms.Invalid) {
			t.Errorf("%q was taken: %v", bad, err)
		}
	}
}
