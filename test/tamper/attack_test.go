package tamper

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/transparency-dev/merkle/rfc6962"

	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/note"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/tlog"
)

// logged is a leaf with its command, nil in an access log.
type logged struct{ leaf, command []byte }

// list is a log in memory, as tlog.Export wants it.
type list []logged

func (l list) Size() uint64 { return uint64(len(l)) }

func (l list) Leaves(from uint64, n int) (out [][]byte, err error) {
	for _, x := range l[from : from+uint64(n)] {
		out = append(out, x.leaf)
	}
	return out, nil
}

func (l list) Hashes(level uint, from, n uint64) (out [][]byte, err error) {
	width := uint64(1) << (8 * level)
	for i := from; i < from+n; i++ {
		out = append(out, l[i*width:(i+1)*width].root())
	}
	return out, nil
}

// root is the definition of RFC 6962, section 2.1.
func (l list) root() []byte {
	switch n := len(l); n {
	case 0:
		return rfc6962.DefaultHasher.EmptyRoot()
	case 1:
		return rfc6962.DefaultHasher.HashLeaf(l[0].leaf)
	default:
		k := 1
		for k*2 < n {
			k *= 2
		}
		return rfc6962.DefaultHasher.HashChildren(l[:k].root(), l[k:].root())
	}
}

// readLog reads an exported log.
func readLog(t *testing.T, dir, log string) (list, []byte) {
	t.Helper()
	path := filepath.Join(dir, filepath.FromSlash(log))
	h, err := tlog.ReadHead(path)
	if err != nil {
		t.Fatal(err)
	}
	leaves, err := tlog.Open(path, h.Size).Leaves(0, int(h.Size))
	if err != nil {
		t.Fatal(err)
	}
	l := make(list, len(leaves))
	for i, leaf := range leaves {
		l[i].leaf = leaf
	}
	if log == note.ClusterLog {
		var all []byte
		for first := uint64(0); first < h.Size; first += tlog.TileWidth {
			r, err := tlog.Bundle(path, "commands", first, h.Size)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(r)
			r.Close()
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, b...)
		}
		for i := range l {
			n := 4 + binary.BigEndian.Uint32(all)
			l[i].command, all = all[4:n:n], all[n:]
		}
	}
	return l, h.Note
}

// writeLog puts a log in the place of an exported one, with tiles that belong to it and
// with a checkpoint that need not.
func writeLog(t *testing.T, dir, log string, l list, checkpoint []byte) {
	t.Helper()
	path := filepath.Join(dir, filepath.FromSlash(log))
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	var beside []tlog.Beside
	if log == note.ClusterLog {
		beside = append(beside, tlog.Beside{Name: "commands", Write: func(w io.Writer, from uint64, n int) error {
			for _, x := range l[from : from+uint64(n)] {
				if _, err := w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(x.command))), x.command...)); err != nil {
					return err
				}
			}
			return nil
		}})
	}
	head := fmt.Appendf(nil, "x\n%d\n%s\n\n", len(l), base64.StdEncoding.EncodeToString(l.root()))
	if err := tlog.Export(t.Context(), l, path, head, beside...); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(path, "checkpoint"), checkpoint, 0o600); err != nil {
		t.Fatal(err)
	}
}

// inPlace changes leaves and commands and nothing else: tiles and checkpoint stay.
func inPlace(t *testing.T, dir, log string, l list) {
	t.Helper()
	path := filepath.Join(dir, filepath.FromSlash(log))
	kept := filepath.Join(t.TempDir(), "kept")
	for _, name := range []string{"tile/0", "tile/1", "checkpoint"} {
		to := filepath.Join(kept, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(path, filepath.FromSlash(name)), to); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
	}
	writeLog(t, dir, log, l, nil)
	for _, name := range []string{"tile/0", "tile/1", "checkpoint"} {
		to := filepath.Join(path, filepath.FromSlash(name))
		if err := os.RemoveAll(to); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(kept, filepath.FromSlash(name)), to); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
	}
}

// change is one way to change a log at a place.
type change struct {
	name string
	do   func(c *coalition, l list, at int) list
}

var changes = []change{
	{"drop", func(_ *coalition, l list, at int) list { return slices.Delete(slices.Clone(l), at, at+1) }},
	{"edit", func(c *coalition, l list, at int) list {
		out := slices.Clone(l)
		out[at] = c.other(l, at)
		return out
	}},
	{"insert", func(c *coalition, l list, at int) list { return slices.Insert(slices.Clone(l), at, c.other(l, at)) }},
	{"reorder", func(_ *coalition, l list, at int) list {
		out := slices.Clone(l)
		with := at + 1
		for with < len(l)-1 && bytes.Equal(l[with].leaf, l[at].leaf) {
			with++
		}
		out[at], out[with] = out[with], out[at]
		return out
	}},
	{"truncate", func(_ *coalition, l list, at int) list { return slices.Clone(l[:at]) }},
	{"fork", func(c *coalition, l list, at int) list {
		out := slices.Clone(l[:at])
		for len(out) <= len(l) {
			out = append(out, c.other(l, at))
		}
		return out
	}},
}

// other makes what an attacker with the keys of node-fr-1 could have logged: an entry of
// another principal, or a command of that node.
func (c *coalition) other(l list, at int) logged {
	if l[0].command == nil {
		return logged{leaf: bytes.Replace(l[at].leaf, []byte("/service/"), []byte("/servant/"), 1)}
	}
	c.now++
	raw := c.w.Command(stolen, state.Tick{})
	leaf, err := state.ParseLeaf(l[at].leaf)
	if err != nil {
		c.t.Fatal(err)
	}
	_, r := c.st.Apply(leaf.Index, raw)
	return logged{leaf: r.Leaf, command: raw}
}

// stolen is the node whose keys the attacker has.
const stolen = "node-fr-1"

// resigned returns the checkpoint of a changed log by the stolen keys.
func (c *coalition) resigned(log string, l list, st *state.State) []byte {
	c.t.Helper()
	var hash []byte
	if log == note.ClusterLog {
		sum := st.Hash()
		hash = sum[:]
	}
	head := state.LogHead(c.st.Lineage(), log, 0, l.Size(), l.root(), hash)
	w, ok := c.st.NoteWitness(stolen, c.st.Index())
	if !ok {
		c.t.Fatal("the node has no keys for checkpoints")
	}
	b, err := note.Join(head, note.Signed{Witness: w, Signature: c.w.SignCheckpoint(stolen, head)})
	if err != nil {
		c.t.Fatal(err)
	}
	return b
}

// withOldSignatures returns a checkpoint that says what the log is, under the signatures of
// the one before.
func withOldSignatures(l list, old []byte) []byte {
	text, signatures, _ := strings.Cut(string(old), "\n\n")
	lines := strings.Split(text, "\n")
	lines[1], lines[2] = fmt.Sprint(len(l)), base64.StdEncoding.EncodeToString(l.root())
	return []byte(strings.Join(lines, "\n") + "\n\n" + signatures)
}

// consistent makes a cluster log of commands that is consistent in itself: whatever the
// commands now lead to is what its leaves say.
func (c *coalition) consistent(l list) (list, *state.State) {
	c.t.Helper()
	st, err := state.New(c.w.Signed())
	if err != nil {
		c.t.Fatal(err)
	}
	out, index := slices.Clone(l), uint64(0)
	for i := range out {
		leaf, err := state.ParseLeaf(out[i].leaf)
		if err != nil {
			c.t.Fatal(err)
		}
		index = max(index+1, leaf.Index) // where it was, so that all before the change is as it was
		var r state.Result
		st, r = st.Apply(index, out[i].command)
		out[i].leaf = r.Leaf
	}
	return out, st
}

// without leaves out the cosignatures of other nodes than the stolen one from a place on.
func without(t *testing.T, l list, from int) (out list) {
	for i, x := range l {
		leaf, err := state.ParseLeaf(x.leaf)
		if err != nil {
			t.Fatal(err)
		}
		if i < from || leaf.Type != state.TypeCosign || leaf.Origin == stolen {
			out = append(out, x)
		}
	}
	return out
}

func verify(t *testing.T, c *coalition, dir string, seen []audit.SeenHead) (audit.DirReport, error) {
	t.Helper()
	return audit.VerifyDir(t.Context(), dir, audit.DirOptions{Cluster: c.st.Cluster(), Seen: seen})
}
