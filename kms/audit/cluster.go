package audit

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"os"
	"slices"
	"sync"

	"github.com/conclave-kms/conclave/kms"
)

// ClusterLog keeps the applied commands of the cluster with their leaves, for
// whoever asks later. It is not synced for every record, because after a crash
// the Raft log brings again what was lost; Sync makes it durable before the Raft
// log is cut.
type ClusterLog struct {
	lock      *os.File
	recovered string

	tiles   *tiles
	records records

	mu     sync.Mutex
	writer segmentWriter
	frames uint64     // records in all segments
	parts  []part     // by leaf; the last one grows
	fills  []*gapFill // gaps that are not filled yet, in order
	last   uint64     // Raft index of the last command, or of the last gap's end
	size   uint64     // leaves of the tree, those of gaps included
	merkle *merkle    // nil: there is a gap
	before *merkle    // the tree up to the first gap that is not filled
	gaps   []Gap
	buf    []byte
	failed error
	closed bool

	filling sync.Mutex // held while gaps are filled; mu may be taken within
}

// Gap is a stretch of the cluster log that this node does not hold, because it
// took its state from a snapshot.
type Gap struct {
	From uint64 // first Raft index missing
	To   uint64 // last one, that of the snapshot
	Size uint64 // leaves of the cluster log at To

	Root [sha256.Size]byte // of these leaves; zero if it is not known
}

// Record is an applied command.
type Record struct {
	Index uint64 // Raft index
	Raw   []byte // the signed command
	Leaf  []byte // its leaf in the cluster log
}

// Kinds of a cluster log's records; the payload is
//
//	1 ‖ index 8 ‖ length of raw 4 ‖ raw ‖ leaf
//	2 ‖ from 8 ‖ to 8 ‖ size 8
//	3 ‖ from 8 ‖ to 8 ‖ size 8 ‖ root 32
//
// A gap of kind 2 is one that an earlier release recorded.
const (
	recordCommand = 1
	recordGap     = 2
	recordGapRoot = 3
)

// OpenClusterLog opens the store of the cluster log in dir, making it if it is
// missing, and checks it as Open does.
func OpenClusterLog(dir string) (*ClusterLog, error) {
	return openClusterLog(dir, Options{})
}

func openClusterLog(dir string, o Options) (*ClusterLog, error) {
	if o.SegmentSize == 0 {
		o.SegmentSize = DefaultSegmentSize
	}
	if o.disk == nil {
		o.disk = osDisk{}
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	ts := newTiles(dir)
	m := newMerkle(ts)
	l := &ClusterLog{
		lock:    lock,
		tiles:   ts,
		records: records{kind: clusterKind, dir: dir},
		writer:  segmentWriter{disk: o.disk, dir: dir, kind: clusterKind, limit: o.SegmentSize},
		merkle:  &m,
		before:  &m,
	}
	l.parts = []part{{from: &l.records}}
	t, err := walkCluster(dir, func(r Record) error { l.add(r.Index, r.Leaf); ts.relieve(); return nil },
		func(g Gap) error { l.skip(g); return l.refill() })
	if err == nil {
		err = l.writer.open(t)
	}
	if err != nil {
		ts.close()
		lock.Close()
		return nil, err
	}
	ts.behind()
	if t.torn != nil {
		l.recovered = "the cluster log ended in a record that was cut short, which was removed: " + t.torn.Error()
	}
	return l, nil
}

func (l *ClusterLog) add(index uint64, leaf []byte) {
	l.last = index
	l.size++
	l.frames++
	if l.merkle != nil {
		l.merkle.append(LeafHash(leaf))
	}
}

func (l *ClusterLog) skip(g Gap) {
	dir := fillDir(l.writer.dir, l.size)
	l.fills = append(l.fills, &gapFill{first: l.size, n: g.Size - l.size, from: g.From, to: g.To, root: g.Root, part: len(l.parts), dir: dir,
		writer:  segmentWriter{disk: l.writer.disk, dir: dir, kind: clusterKind, limit: l.writer.limit},
		records: records{kind: clusterKind, dir: dir}})
	l.frames++
	l.parts = append(l.parts, part{leaf: l.size}, part{leaf: g.Size, record: l.frames, from: &l.records})
	l.gaps = append(l.gaps, g)
	l.last, l.size = g.To, g.Size
	l.merkle = nil
}

// refill takes a gap that was just read, if it was filled before, into the tree.
func (l *ClusterLog) refill() error {
	f := l.fills[len(l.fills)-1]
	if _, err := os.Stat(f.dir); len(l.fills) > 1 || f.root == [sha256.Size]byte{} || err != nil {
		return nil
	}
	if f.begin(*l.before) != nil || f.have < f.n {
		return nil // it goes on being filled
	}
	if f.verify() != nil {
		return f.reset()
	}
	return l.join(f)
}

// Recovered says what was removed when the log was opened, or is empty.
func (l *ClusterLog) Recovered() string { return l.recovered }

// Append stores the command applied at a Raft index with its leaf. An index that
// is there already is skipped. Raft's own entries take indexes too, so a jump
// of the index is no gap: a snapshot that was installed is announced with
// Restored. Errors: kms.Invalid for an empty or oversized record, kms.ReadOnly
// after a failed write.
func (l *ClusterLog) Append(index uint64, raw, leaf []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if index <= l.last {
		return nil
	}
	p, err := encodeCommand(l.buf[:0], index, raw, leaf)
	if err != nil {
		return err
	}
	if err := l.put(p); err != nil {
		return err
	}
	l.add(index, leaf)
	return nil
}

// encodeCommand appends a command's record to p.
func encodeCommand(p []byte, index uint64, raw, leaf []byte) ([]byte, error) {
	if len(raw) == 0 || len(leaf) == 0 || 13+len(raw)+len(leaf) > maxRecord {
		return nil, kms.Errorf(kms.Invalid, "command %d has %d bytes and its leaf %d; together 2 to %d fit the cluster log", index, len(raw), len(leaf), maxRecord-13)
	}
	p = append(p, recordCommand)
	p = binary.BigEndian.AppendUint64(p, index)
	p = binary.BigEndian.AppendUint32(p, uint32(len(raw)))
	return append(append(p, raw...), leaf...), nil
}

// Restored announces that the node took over a snapshot of the state at a Raft
// index, where the cluster log had size leaves (State.LogSize) and a root
// (State.LogRoot). What the store lacks up to there is recorded as a gap; nothing is, if
// it has it all. Errors as for Append.
func (l *ClusterLog) Restored(index, size uint64, root []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if index <= l.last || size == l.size {
		return nil
	}
	if size < l.size {
		return kms.Errorf(kms.Invalid, "the snapshot at index %d has %d leaves, fewer than the %d of the cluster log at index %d: it is of another history", index, size, l.size, l.last)
	}
	if len(root) != sha256.Size {
		return kms.Errorf(kms.Invalid, "the root of the snapshot's log has %d bytes", len(root))
	}
	g := Gap{From: l.last + 1, To: index, Size: size, Root: [sha256.Size]byte(root)}
	p := append(l.buf[:0], recordGapRoot)
	p = binary.BigEndian.AppendUint64(p, g.From)
	p = binary.BigEndian.AppendUint64(p, g.To)
	p = binary.BigEndian.AppendUint64(p, g.Size)
	p = append(p, root...)
	if err := l.put(p); err != nil {
		return err
	}
	l.skip(g)
	return nil
}

// put writes one record; p becomes the buffer for the next.
func (l *ClusterLog) put(p []byte) error {
	if l.closed {
		return kms.Errorf(kms.Unavailable, "the cluster log is closed")
	}
	if l.failed != nil {
		return clusterReadOnly(l.failed)
	}
	n := len(p)
	p = appendFrame(p, p, n)
	if err := l.writer.write(p[n:], header{first: l.frames}); err != nil {
		l.failed = err
		return clusterReadOnly(err)
	}
	if cap(p) <= 1<<20 {
		l.buf = p[:0]
	}
	return nil
}

func clusterReadOnly(cause error) error {
	return kms.Wrap(kms.ReadOnly, cause, "the cluster log cannot be written", "free space or repair the disk that holds it, then restart the node")
}

// Sync makes everything appended so far durable. Errors: kms.ReadOnly.
func (l *ClusterLog) Sync() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failed != nil {
		return clusterReadOnly(l.failed)
	}
	if l.closed {
		return kms.Errorf(kms.Unavailable, "the cluster log is closed")
	}
	if err := l.writer.sync(); err != nil {
		l.failed = err
		return clusterReadOnly(err)
	}
	return nil
}

// Size returns the number of leaves of the cluster log's tree, those of gaps
// included: it equals State.LogSize after every command.
func (l *ClusterLog) Size() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.size
}

// Last returns the Raft index of the last command held, or of the last gap's
// end; 0 for an empty log.
func (l *ClusterLog) Last() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

// Root returns the RFC 6962 root of the tree of Size leaves; ok is false where a
// gap makes it impossible to compute.
func (l *ClusterLog) Root() (root []byte, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.merkle == nil {
		return nil, false
	}
	return l.merkle.tree().Root, true
}

// Gaps returns the stretches that the store does not hold, in order.
func (l *ClusterLog) Gaps() []Gap {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.gaps)
}

// Close syncs and closes the log. It may be called more than once.
func (l *ClusterLog) Close() error {
	err := l.Sync()
	l.filling.Lock()
	defer l.filling.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	for _, f := range l.fills {
		err = errors.Join(err, f.writer.close())
	}
	l.tiles.close()
	return errors.Join(err, l.writer.close(), l.lock.Close())
}

// ReadCluster checks the store of a cluster log in dir and calls record with
// every command in order and gap with every gap. Slices are valid only during
// the call. It may run beside the node that writes; a record that is not
// complete ends it. It stops at the first error of a callback and returns it.
func ReadCluster(dir string, record func(Record) error, gap func(Gap) error) error {
	_, err := walkCluster(dir, record, gap)
	return err
}

func walkCluster(dir string, record func(Record) error, gap func(Gap) error) (tail, error) {
	var last, size uint64
	return clusterKind.walk(dir,
		func(h header) error {
			if h.root != [32]byte{} {
				return errors.New("the segment's header has a root")
			}
			return nil
		},
		func(p []byte) error {
			r, g, err := decodeCluster(p)
			if err != nil {
				return &damage{why: err.Error()}
			}
			if r.Index != 0 {
				if r.Index <= last {
					return &damage{why: "the indexes of commands do not ascend"}
				}
				last = r.Index
				size++
				return record(r)
			}
			if g.From != last+1 || g.To < g.From || g.Size <= size {
				return &damage{why: "a gap does not continue the log"}
			}
			last, size = g.To, g.Size
			return gap(g)
		})
}

// decodeCluster returns the command or, if its index is 0, the gap.
func decodeCluster(p []byte) (Record, Gap, error) {
	switch {
	case len(p) > 13 && p[0] == recordCommand:
		n := uint64(binary.BigEndian.Uint32(p[9:]))
		rest := p[13:]
		r := Record{Index: binary.BigEndian.Uint64(p[1:])}
		if r.Index == 0 || n == 0 || n >= uint64(len(rest)) {
			break
		}
		r.Raw, r.Leaf = rest[:n:n], rest[n:]
		return r, Gap{}, nil
	case len(p) == 25 && p[0] == recordGap, len(p) == 25+sha256.Size && p[0] == recordGapRoot:
		g := Gap{From: binary.BigEndian.Uint64(p[1:]), To: binary.BigEndian.Uint64(p[9:]), Size: binary.BigEndian.Uint64(p[17:])}
		copy(g.Root[:], p[25:])
		return Record{}, g, nil
	}
	return Record{}, Gap{}, errors.New("a record of the cluster log has no known form")
}
