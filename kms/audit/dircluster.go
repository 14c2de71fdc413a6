package audit

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/note"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/tlog"
)

// maxMarks is at how many places at most the state's hash is compared, beside the last one. A state is
// hashed in a time that grows with it; places in between are left out evenly.
const maxMarks = 1024

// marks are the places in the cluster log at which sites have cosigned the state's hash.
type marks struct {
	all  map[uint64][]byte // by size
	step uint64            // of the places, every which one is kept
	seen uint64
	last uint64
}

// add takes a mark into the ones to be compared.
func (m *marks) add(size uint64, hash []byte) {
	if m.all == nil {
		m.all, m.step = map[uint64][]byte{}, 1
	}
	if size == m.last {
		return // by another site; that they agree is seen where the command is carried out
	}
	m.last = size
	if m.seen++; m.seen%m.step != 0 {
		return
	}
	m.all[size] = hash
	if len(m.all) <= maxMarks {
		return
	}
	m.step *= 2
	drop := false
	for _, s := range sorted(m.all) {
		if drop {
			delete(m.all, s)
		}
		drop = !drop
	}
}

// commandReader reads the commands of an exported cluster log in order.
type commandReader struct {
	path string
	size uint64
	next uint64
	file io.ReadCloser
	r    *bufio.Reader
}

func (c *commandReader) close() {
	if c.file != nil {
		_ = c.file.Close() // was only read
	}
}

// read returns the next command, which is the caller's.
func (c *commandReader) read() ([]byte, error) {
	if c.next%tlog.TileWidth == 0 {
		c.close()
		var err error
		if c.file, err = tlog.Bundle(c.path, commandsDir, c.next, c.size); err != nil {
			c.file = nil
			return nil, err
		}
		c.r = bufio.NewReaderSize(c.file, 64<<10)
	}
	var length [4]byte
	if _, err := io.ReadFull(c.r, length[:]); err != nil {
		return nil, c.cut(err)
	}
	n := binary.BigEndian.Uint32(length[:])
	if n == 0 || n > max(state.MaxCommand, state.MaxApproved) {
		return nil, kms.Errorf(kms.Invalid, "the bundle of command %d gives it %d bytes", c.next, n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(c.r, b); err != nil {
		return nil, c.cut(err)
	}
	c.next++
	if c.next%tlog.TileWidth == 0 || c.next == c.size {
		if _, err := c.r.ReadByte(); err != io.EOF {
			return nil, kms.Errorf(kms.Invalid, "the bundle that ends with command %d goes on behind it", c.next-1)
		}
	}
	return b, nil
}

func (c *commandReader) cut(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return kms.Errorf(kms.Invalid, "the bundle of commands ends within command %d", c.next)
	}
	return kms.Wrap(kms.Unavailable, err, "the commands cannot be read", "")
}

// clusterTree reads the whole cluster log once: leaves, tiles and root, and that each command is
// the one that its leaf names. So damage is found before anything is carried out.
func (v *dirVerifier) clusterTree(ctx context.Context) (err error) {
	if v.head, err = tlog.ReadHead(v.clusterPath()); err != nil {
		return err
	}
	c := &commandReader{path: v.clusterPath(), size: v.head.Size}
	defer c.close()
	last := uint64(0)
	return tlog.Check(ctx, v.clusterPath(), v.head, func(i uint64, b []byte) error {
		v.progress("reading the cluster log", i, v.head.Size)
		leaf, err := state.ParseLeaf(b)
		if err != nil {
			return atLeaf(i, err)
		}
		if leaf.Index <= last {
			return kms.Errorf(kms.Invalid, "leaf %d of the cluster log: its index %d does not follow %d", i, leaf.Index, last)
		}
		last = leaf.Index
		raw, err := c.read()
		if err != nil {
			return err
		}
		if sum := sha256.Sum256(raw); !bytes.Equal(sum[:], leaf.Command) {
			return kms.Errorf(kms.Invalid, "command %d is not the one that leaf %d of the cluster log names", i, i)
		}
		if leaf.Type == state.TypeCosign && leaf.Kind == 0 {
			return v.mark(i, raw)
		}
		return nil
	})
}

func atLeaf(i uint64, err error) error {
	return refuse(kms.KindOf(err), err, "leaf %d of the cluster log: %v", i, err)
}

// mark notes where a site has cosigned the state's hash.
func (v *dirVerifier) mark(i uint64, raw []byte) error {
	cmd, err := commandOf(raw)
	if err != nil {
		return atLeaf(i, err)
	}
	if c, ok := cmd.(state.Cosign); ok && c.Log == note.ClusterLog {
		v.marks.add(c.Size, c.State)
	}
	return nil
}

func (v *dirVerifier) progress(doing string, done, of uint64) {
	if done%256 == 0 {
		v.o.Progress(Progress{doing, done, of})
	}
}

// ahead is how many commands are read at once, so that signatures in them are verified
// side by side.
const ahead = 512

// replay carries out every command from the genesis on.
func (v *dirVerifier) replay(ctx context.Context) error {
	c := &commandReader{path: v.clusterPath(), size: v.head.Size}
	defer c.close()
	s := tlog.Open(v.clusterPath(), v.head.Size)
	for first := uint64(0); first < v.head.Size; first += ahead {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(ahead, v.head.Size-first)
		leaves, err := s.Leaves(first, int(n))
		if err != nil {
			return err
		}
		batch := make([]state.Ahead, n)
		for i := range batch {
			raw, err := c.read()
			if err != nil {
				return err
			}
			batch[i] = state.Ahead{Raw: raw}
		}
		before := v.st
		v.o.Spread(len(batch), func(i int) { batch[i] = before.Ahead(batch[i].Raw) })
		for i, leaf := range leaves {
			v.progress("carrying out the commands again", first+uint64(i), v.head.Size)
			if err := v.apply(s, first+uint64(i), leaf, batch[i]); err != nil {
				return atLeaf(first+uint64(i), err)
			}
		}
	}
	v.r.Epoch, v.r.Lineage = v.st.Epoch(), v.st.Lineage()
	return nil
}

// apply carries out one command and compares what comes of it with its leaf.
func (v *dirVerifier) apply(s tlog.Source, number uint64, leaf []byte, c state.Ahead) error {
	next, l, err := carryOut(v.st, leaf, c)
	if err != nil {
		return err
	}
	v.st = next
	v.r.Commands++
	if l.Kind != 0 {
		v.r.Refused++
	}
	if l.Kind == 0 && l.Type == state.TypeCosign {
		if err := v.cosigned(s, c.Raw); err != nil {
			return err
		}
	}
	return v.compareState(number + 1)
}

// Replay carries out a command of the cluster log on the state before it and compares what
// comes of it with its leaf. Errors: kms.Invalid, and those of State.Recover.
func Replay(st *state.State, r Record) (*state.State, error) {
	next, _, err := carryOut(st, r.Leaf, state.Ahead{Raw: r.Raw})
	return next, err
}

func carryOut(st *state.State, leaf []byte, c state.Ahead) (*state.State, state.Leaf, error) {
	l, err := state.ParseLeaf(leaf)
	if err != nil {
		return nil, l, err
	}
	if l.Type == state.TypeRecover && l.Origin == "" {
		next, err := st.Recover(c.Raw)
		if err == nil && !bytes.Equal(state.RecoveryLeaf(next.Index(), next.Clock(), c.Raw), leaf) {
			err = kms.Errorf(kms.Invalid, "the recovery has another leaf")
		}
		return next, l, err
	}
	next, r := st.ApplyAhead(l.Index, c)
	switch {
	case r.Halt:
		return nil, l, kms.Errorf(kms.Invalid, "%s: use the release that the nodes run", r.Message)
	case !bytes.Equal(r.Leaf, leaf):
		return nil, l, kms.Errorf(kms.Invalid, "carrying the command out again has another outcome (%s) than the log says", outcome(r.Kind, l.Kind))
	}
	return next, l, nil
}

func outcome(now, then kms.Kind) string {
	name := func(k kms.Kind) string {
		if k == 0 {
			return "applied"
		}
		return k.String()
	}
	if now == then {
		return "of another form"
	}
	return name(now) + " in place of " + name(then)
}

// cosigned compares what a site has cosigned of the cluster log with the log.
func (v *dirVerifier) cosigned(s tlog.Source, raw []byte) error {
	cmd, err := commandOf(raw)
	if err != nil {
		return err
	}
	c, ok := cmd.(state.Cosign)
	if !ok || c.Log != note.ClusterLog {
		return nil
	}
	v.r.Checkpoints++
	root, err := tlog.Root(s, c.Size)
	if err != nil {
		return err
	}
	if !bytes.Equal(root, c.Root) {
		v.r.find("a site has cosigned %d leaves of another cluster log than this one", c.Size)
	}
	if hash, kept := v.marks.all[c.Size]; kept && !bytes.Equal(hash, c.State) {
		v.r.find("sites have cosigned different states of the cluster log of %d leaves", c.Size)
	}
	return nil
}

// compareState compares the state's hash where sites have cosigned it.
func (v *dirVerifier) compareState(size uint64) error {
	want, ok := v.marks.all[size]
	if !ok {
		return nil
	}
	v.r.States++
	if got := v.st.Hash(); !bytes.Equal(got[:], want) {
		v.r.find("the state after %d leaves of the cluster log is not the one that sites have cosigned", size)
	}
	return nil
}
