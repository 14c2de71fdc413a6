package audit

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/transparency-dev/merkle/compact"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
)

// packSize is about how many bytes of records go to another node at once.
const packSize = 1 << 20

// gapFill is a gap of a cluster log that is being filled with records from other nodes.
// They are kept in a directory of their own, in segments as the log's, and count when
// all are there and lead to the root that the log had at the gap's end.
type gapFill struct {
	first, n uint64 // leaves
	from, to uint64 // Raft indexes
	root     [sha256.Size]byte
	part     int // of ClusterLog.parts

	dir     string
	writer  segmentWriter
	records records
	opened  bool
	have    uint64
	last    uint64         // Raft index of the last record
	border  *compact.Range // of everything before and of the records
}

// begin reads what is there already. before is the tree up to the gap.
func (f *gapFill) begin(before merkle) error {
	if f.opened {
		return nil
	}
	f.have, f.last, f.border = 0, f.from-1, before.clone()
	if err := os.MkdirAll(f.dir, 0o700); err != nil {
		return fillFailed(err)
	}
	t, err := walkCluster(f.dir, func(r Record) error { return f.take(r) },
		func(Gap) error { return errors.New("a gap within a gap") })
	if err == nil {
		err = f.writer.open(t)
	}
	if err != nil { // it can be fetched again
		return errors.Join(err, f.reset())
	}
	f.opened = true
	return nil
}

// take adds a record to the tree.
func (f *gapFill) take(r Record) error {
	if err := f.check(r); err != nil {
		return err
	}
	if err := f.border.Append(LeafHash(r.Leaf), nil); err != nil {
		return err
	}
	f.have, f.last = f.have+1, r.Index
	return nil
}

// check says whether a record can be the next.
func (f *gapFill) check(r Record) error {
	leaf, err := state.ParseLeaf(r.Leaf)
	sum := sha256.Sum256(r.Raw)
	switch {
	case err != nil:
		return err
	case f.have == f.n || r.Index <= f.last || r.Index > f.to:
		return kms.Errorf(kms.Invalid, "command %d does not continue the cluster log", r.Index)
	case leaf.Index != r.Index || !bytes.Equal(leaf.Command, sum[:]):
		return kms.Errorf(kms.Invalid, "the leaf of command %d is of another one", r.Index)
	}
	return nil
}

// verify compares the root of a gap that is full.
func (f *gapFill) verify() error {
	root, err := f.border.GetRootHash(nil)
	if err == nil && !bytes.Equal(root, f.root[:]) {
		err = kms.Errorf(kms.Invalid, "the commands %d to %d that other nodes sent do not lead to the root that the cluster log has after them", f.from, f.to)
	}
	if err == nil && f.writer.file != nil {
		err = f.writer.sync()
	}
	return err
}

// reset forgets everything.
func (f *gapFill) reset() error {
	f.opened = false
	return errors.Join(f.writer.close(), os.RemoveAll(f.dir))
}

func fillFailed(err error) error {
	return kms.Wrap(kms.Unavailable, err, "what other nodes sent of the cluster log cannot be kept", "free space or repair the disk that holds it")
}

// clone copies the border of the tree, without tiles.
func (m merkle) clone() *compact.Range {
	hashes := make([][]byte, len(m.r.Hashes()))
	for i, h := range m.r.Hashes() {
		hashes[i] = bytes.Clone(h)
	}
	r, err := m.factory.NewRange(0, m.r.End(), hashes)
	if err != nil {
		panic("audit: a compact range has as many hashes as it has: " + err.Error()) // impossible: they are its own
	}
	return r
}

// Missing returns which leaves have to be fetched next: n of them, beginning with number
// from, none if the store has all, or lacks some that it could not verify: those of a gap
// recorded by a release before gaps had roots.
func (l *ClusterLog) Missing() (from, n uint64) {
	l.filling.Lock()
	defer l.filling.Unlock()
	f, err := l.nextFill()
	if f == nil || err != nil {
		return 0, 0
	}
	return f.first + f.have, f.n - f.have
}

// nextFill returns the first gap that is not full, nil for none. The caller holds filling.
func (l *ClusterLog) nextFill() (*gapFill, error) {
	for {
		l.mu.Lock()
		var f *gapFill
		if len(l.fills) > 0 {
			f = l.fills[0]
		}
		closed := l.closed
		l.mu.Unlock()
		if f == nil || f.root == [sha256.Size]byte{} {
			return nil, nil
		}
		if closed {
			return nil, kms.Errorf(kms.Unavailable, "the cluster log is closed")
		}
		if err := f.begin(*l.before); err != nil || f.have < f.n {
			return f, err
		}
		if err := l.full(f); err != nil {
			return nil, err
		}
	}
}

// full takes a gap that is full into the log, or forgets what was sent.
func (l *ClusterLog) full(f *gapFill) error {
	if err := f.verify(); err != nil {
		return errors.Join(err, f.reset())
	}
	return l.join(f)
}

// Fill adds records that another node sent: the leaves from Missing's number on. When a gap
// is full they are held against the root, and all of the gap is forgotten if they do
// not lead to it. Errors: kms.Invalid for records that are not those of this log, and
// kms.Unavailable.
func (l *ClusterLog) Fill(from uint64, records []Record) error {
	l.filling.Lock()
	defer l.filling.Unlock()
	f, err := l.nextFill()
	if err != nil || f == nil {
		return err
	}
	if from != f.first+f.have {
		return kms.Errorf(kms.Invalid, "leaf %d is not the next that is missing", from)
	}
	for _, r := range records {
		if f.have == f.n {
			break
		}
		if err := f.put(r); err != nil {
			return err
		}
	}
	if f.have < f.n {
		return nil
	}
	return l.full(f)
}

// put checks and writes a record.
func (f *gapFill) put(r Record) error {
	if err := f.check(r); err != nil {
		return err
	}
	p, err := encodeCommand(nil, r.Index, r.Raw, r.Leaf)
	if err != nil {
		return err
	}
	n := len(p)
	p = appendFrame(p, p, n)
	if err := f.writer.write(p[n:], header{first: f.have}); err != nil {
		return errors.Join(fillFailed(err), f.reset())
	}
	return f.take(r)
}

// join takes a gap that is full into the tree, and what the log holds after it.
func (l *ClusterLog) join(f *gapFill) error {
	l.mu.Lock()
	l.parts[f.part].from = &f.records
	l.mu.Unlock()
	for {
		l.mu.Lock()
		end, next := l.size, (*gapFill)(nil)
		if len(l.fills) > 1 {
			next = l.fills[1]
			end = next.first
		}
		at := l.before.r.End()
		if at == end {
			l.fills = l.fills[1:]
			if next == nil {
				l.merkle = l.before
			}
			l.mu.Unlock()
			return f.writer.close()
		}
		last := next == nil && end-at <= 256 // the log must not grow meanwhile
		parts := slices.Clone(l.parts)
		if !last {
			l.mu.Unlock()
		}
		err := clusterRecords(end, parts, at, int(min(end-at, 256)), func(r Record) error {
			l.before.append(LeafHash(r.Leaf))
			return nil
		})
		if last {
			l.mu.Unlock()
		}
		if err != nil {
			return err
		}
		l.tiles.relieve()
	}
}

// packed is a record on its way to another node.
type packed struct {
	Index uint64 `cbor:"index"`
	Raw   []byte `cbor:"raw"`
	Leaf  []byte `cbor:"leaf"`
}

// errPacked ends reading.
var errPacked = errors.New("enough")

// Pack returns the records from a leaf on for another node, at least one and about a
// MiB of them. Errors as for Leaves.
func (l *ClusterLog) Pack(from uint64) ([]byte, error) {
	size := l.Size()
	if from >= size {
		return nil, kms.Errorf(kms.Invalid, "the log has %d leaves, none with number %d", size, from)
	}
	var all []packed
	total := 0
	err := l.Records(from, int(min(size-from, 4096)), func(r Record) error {
		if total += len(r.Raw) + len(r.Leaf) + 64; total > packSize && len(all) > 0 {
			return errPacked
		}
		all = append(all, packed{r.Index, bytes.Clone(r.Raw), bytes.Clone(r.Leaf)})
		return nil
	})
	if err != nil && (len(all) == 0 || !errors.Is(err, errPacked) && kms.KindOf(err) != kms.Unavailable) {
		return nil, err
	}
	return canon.Marshal(all), nil
}

// Unpack decodes what Pack writes. Errors: kms.Invalid.
func Unpack(b []byte) ([]Record, error) {
	var all []packed
	if err := canon.Unmarshal(b, &all); err != nil {
		return nil, kms.Wrap(kms.Invalid, err, "records of the cluster log are not in canonical form", "")
	}
	records := make([]Record, len(all))
	for i, p := range all {
		records[i] = Record(p)
	}
	return records, nil
}

func fillDir(dir string, first uint64) string {
	return filepath.Join(dir, fmt.Sprintf("gap-%020d", first))
}
