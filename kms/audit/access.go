// Package audit keeps the two logs of a node, each an RFC 6962 Merkle tree, and
// verifies offline what was decided: the access log (one leaf for every data
// operation, durable before the operation's answer leaves), the store of the
// cluster log, and evidence, the proof in one file that a guarded action was
// authorised.
package audit

import (
	"context"
	"crypto/sha256"
	"errors"
	"os"
	"sync"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/tlog"
)

// Entry is one leaf of the access log: one data operation, refused ones
// included. It carries no key material, plaintext or token.
type Entry struct {
	Time      int64             `cbor:"time" json:"time"` // Unix milliseconds
	Node      string            `cbor:"node" json:"node"`
	Principal string            `cbor:"principal" json:"principal"` // SPIFFE ID
	Action    string            `cbor:"action" json:"action"`
	Resource  string            `cbor:"resource" json:"resource"` // "KEYRING/KEY" or what the action is about
	Version   uint32            `cbor:"version" json:"version"`   // key version, 0 where there is none
	Request   string            `cbor:"request" json:"request"`   // request identifier
	Outcome   string            `cbor:"outcome" json:"outcome"`   // "ok" or a kms.Kind's name
	Context   map[string]string `cbor:"context" json:"context"`   // encryption context
	Count     int               `cbor:"count" json:"count"`       // items of a batch
}

// MaxEntry is the longest encoding of an entry, in bytes.
const MaxEntry = tlog.MaxLeaf

// Marshal returns the entry's leaf: its canonical encoding.
func (e Entry) Marshal() []byte { return canon.Marshal(e) }

// ParseEntry decodes exactly what Marshal writes. Errors: kms.Invalid.
func ParseEntry(leaf []byte) (Entry, error) {
	var e Entry
	if len(leaf) > MaxEntry {
		return e, kms.Errorf(kms.Invalid, "the log entry has %d bytes; the limit is %d", len(leaf), MaxEntry)
	}
	if err := canon.Unmarshal(leaf, &e); err != nil {
		return Entry{}, kms.Wrap(kms.Invalid, err, "the log entry is not in canonical form", "")
	}
	return e, nil
}

// gatherTime is how long a batch gathers while callers come in numbers.
const gatherTime = 1 * time.Millisecond

// Options change how a log is kept. The zero value is the usual one.
type Options struct {
	SegmentSize int64 // bytes after which a new file is begun, 0: DefaultSegmentSize

	disk disk
}

// Log is a node's access log. Many goroutines may call Append; one goroutine
// writes what has gathered in one write and one sync.
type Log struct {
	lock      *os.File
	recovered string
	writer    segmentWriter
	tiles     *tiles
	records   records
	wake      chan struct{} // capacity 1
	hurry     chan struct{} // closed by Close: gather no more
	stopped   chan struct{} // closed when the writing goroutine has ended

	mu      sync.Mutex
	batch   *batch // gathering, never nil
	spare   *batch // to be the next one
	merkle  merkle // of durable entries
	failure error  // first write or sync error; nothing is written after it
	closed  bool
}

// batch is what one write carries.
type batch struct {
	frames []byte
	hashes [][sha256.Size]byte // of its leaves; the tree keeps some of them
	done   chan struct{}       // closed when err holds
	err    error
}

func newBatch() *batch { return &batch{done: make(chan struct{})} }

// Open opens the access log in dir, making it if it is missing, reads it through
// and verifies it. A record at the very end that a crash cut short is removed
// and reported by Recovered; any other damage is refused with the file and
// offset. Errors: kms.Invalid for a damaged log or loose file modes,
// kms.Unavailable for a directory that cannot be used or is in use.
func Open(dir string, o Options) (*Log, error) {
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	l, err := open(dir, o)
	if err != nil {
		lock.Close()
		return nil, err
	}
	l.lock = lock
	l.tiles.behind()
	go l.run()
	return l, nil
}

func open(dir string, o Options) (*Log, error) {
	if o.SegmentSize == 0 {
		o.SegmentSize = DefaultSegmentSize
	}
	if o.disk == nil {
		o.disk = osDisk{}
	}
	ts := newTiles(dir)
	l := &Log{
		writer:  segmentWriter{disk: o.disk, dir: dir, kind: accessKind, limit: o.SegmentSize},
		tiles:   ts,
		records: records{kind: accessKind, dir: dir},
		wake:    make(chan struct{}, 1),
		hurry:   make(chan struct{}),
		stopped: make(chan struct{}),
		batch:   newBatch(), spare: newBatch(),
		merkle: newMerkle(ts),
	}
	t, err := walkAccess(dir, l.merkle, func(uint64, []byte) error { ts.relieve(); return nil })
	if err != nil {
		ts.close()
		return nil, err
	}
	if t.torn != nil {
		l.recovered = "the access log ended in a record that was cut short, which was removed: " + t.torn.Error()
	}
	if err := l.writer.open(t); err != nil {
		ts.close()
		return nil, kms.Wrap(kms.Unavailable, err, "the access log cannot be opened for writing", "check the directory's owner and free space")
	}
	return l, nil
}

// Recovered says what was removed when the log was opened, or is empty.
func (l *Log) Recovered() string { return l.recovered }

// Append records an entry and returns when it is durable. An entry is given to
// the log only while ctx is not done. If ctx ends after that, Append returns
// kms.Unavailable although the entry may become durable: whoever appends must
// withhold the operation's answer on every error. After a failed write or sync
// this and every later Append fails with kms.ReadOnly until the log is opened
// anew. Other errors: kms.TooLarge, kms.Unavailable after Close.
func (l *Log) Append(ctx context.Context, e Entry) error {
	leaf := e.Marshal()
	if len(leaf) > MaxEntry {
		return kms.Errorf(kms.TooLarge, "the log entry has %d bytes; the limit is %d: send a shorter context", len(leaf), MaxEntry)
	}
	hash := leafHash(leaf)
	if err := ctx.Err(); err != nil {
		return kms.Wrap(kms.Unavailable, err, "the request ended before it was recorded in the access log", "")
	}
	b, err := l.hand(leaf, hash)
	if err != nil {
		return err
	}
	select {
	case <-b.done:
		return b.err
	case <-ctx.Done():
	}
	select {
	case <-b.done: // both had happened
		return b.err
	default:
		return kms.Wrap(kms.Unavailable, ctx.Err(), "the request ended before its record in the access log was durable", "try again")
	}
}

// hand gives a leaf to the batch that is gathering.
func (l *Log) hand(leaf []byte, hash [sha256.Size]byte) (*batch, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failure != nil {
		return nil, readOnly(l.failure)
	}
	if l.closed {
		return nil, kms.Errorf(kms.Unavailable, "the access log is closed")
	}
	b := l.batch
	b.frames = appendFrame(b.frames, leaf, 0)
	b.hashes = append(b.hashes, hash)
	if len(b.hashes) == 1 {
		l.wake <- struct{}{} // never blocks: one token for each batch, taken before the batch is
	}
	return b, nil
}

func readOnly(cause error) error {
	return kms.Wrap(kms.ReadOnly, cause, "the access log cannot be written, so that no operation may be answered",
		"free space or repair the disk that holds it, then restart the node")
}

// run is the writing goroutine.
func (l *Log) run() {
	defer close(l.stopped)
	last := 0 // entries in the batch before
	for range l.wake {
		if last > 1 {
			l.gather()
		}
		l.mu.Lock()
		b := l.batch
		l.batch, l.spare = l.spare, nil
		head := header{first: l.merkle.r.End()}
		if l.writer.startsSegment(len(b.frames)) {
			copy(head.root[:], l.merkle.tree().Root)
		}
		err := l.failure
		last = len(b.hashes)
		l.mu.Unlock()

		if err == nil {
			err = l.writer.write(b.frames, head)
		}
		if err == nil {
			err = l.writer.sync()
		}
		l.finish(b, err)
	}
}

// gather lets a batch grow before it is written: a sync costs more processor time
// than many entries, so callers that come in numbers share one. A caller that
// comes alone never waits here.
func (l *Log) gather() {
	t := time.NewTimer(gatherTime)
	defer t.Stop()
	select {
	case <-t.C:
	case <-l.hurry:
	}
}

// finish publishes the outcome of a batch and lets its buffers serve again.
func (l *Log) finish(b *batch, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil {
		for i := range b.hashes {
			l.merkle.append(b.hashes[i][:])
		}
	} else {
		if l.failure == nil {
			l.failure = err
		}
		b.err = readOnly(err)
	}
	next := newBatch()
	next.hashes = make([][sha256.Size]byte, 0, len(b.hashes))
	if cap(b.frames) <= 1<<20 { // a rare large batch does not stay in memory
		next.frames = b.frames[:0]
	}
	b.frames, b.hashes = nil, nil
	l.spare = next
	close(b.done)
}

// Tree returns the size and root of the durable log.
func (l *Log) Tree() Tree {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.merkle.tree()
}

// Hashes is that of tlog.Source. Errors: kms.Invalid for hashes that are not there,
// kms.Unavailable.
func (l *Log) Hashes(level uint, from, n uint64) ([][]byte, error) {
	return l.tiles.Hashes(level, from, n)
}

// Leaves is that of tlog.Source. Errors: kms.Invalid for leaves that are not there
// or damaged, kms.Unavailable.
func (l *Log) Leaves(from uint64, n int) ([][]byte, error) {
	return accessLeaves(&l.records, l.Size(), from, n)
}

// Size returns the number of durable entries.
func (l *Log) Size() uint64 { return l.Tree().Size }

// Root returns the RFC 6962 root of the durable log, 32 bytes.
func (l *Log) Root() []byte { return l.Tree().Root }

// Failure returns the error because of which the log refuses entries, or nil.
// Its kind is kms.ReadOnly.
func (l *Log) Failure() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failure == nil {
		return nil
	}
	return readOnly(l.failure)
}

// Close waits for entries already given to the log and closes it. It returns the
// error of the log's failure, if it failed. It may be called more than once.
func (l *Log) Close() error {
	l.mu.Lock()
	first := !l.closed
	l.closed = true
	if first {
		close(l.wake)
		close(l.hurry)
	}
	l.mu.Unlock()
	<-l.stopped
	if !first {
		return nil
	}
	l.tiles.close()
	err := l.writer.close()
	return errors.Join(l.Failure(), err, l.lock.Close())
}
