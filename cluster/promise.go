package cluster

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
)

// promisesFile keeps the latest mark of every node, for the case that the node's own
// disk is put back to an older state.
const promisesFile = "promises"

// maxPromises bounds the nodes of which marks are kept.
const maxPromises = 256

// promises are the marks of other nodes, and those of this node that others showed it.
type promises struct {
	path string // "" in memory only
	log  *slog.Logger

	writing sync.Mutex // one file at a time; taken before mu
	mu      sync.Mutex
	marks   map[string][]byte // by node, as received
	changed bool
}

type storedMark struct {
	Node string `cbor:"node"`
	Mark []byte `cbor:"mark"`
}

// openPromises reads the file. One that is damaged is as good as none, and said so: it
// only keeps what other nodes may have forgotten.
func openPromises(path string, log *slog.Logger) *promises {
	p := &promises{path: path, log: log, marks: map[string][]byte{}}
	if path == "" {
		return p
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return p
	}
	if err == nil {
		err = p.decode(b)
	}
	if err != nil {
		log.Error("what this node knew of the promises of others is lost; it learns them anew", "file", path, "error", err)
		p.marks = map[string][]byte{}
	}
	return p
}

// decode reads what encode writes: SHA-256 of the rest, then the marks sorted by node.
func (p *promises) decode(b []byte) error {
	if len(b) < sha256.Size {
		return kms.Errorf(kms.Invalid, "the file is cut short")
	}
	if sum := sha256.Sum256(b[sha256.Size:]); !bytes.Equal(sum[:], b[:sha256.Size]) {
		return kms.Errorf(kms.Invalid, "the file is damaged")
	}
	var list []storedMark
	if err := canon.Unmarshal(b[sha256.Size:], &list); err != nil {
		return err
	}
	for _, s := range list {
		p.marks[s.Node] = s.Mark
	}
	return nil
}

func (p *promises) encode() []byte {
	var list []storedMark
	for _, node := range slices.Sorted(maps.Keys(p.marks)) {
		list = append(list, storedMark{node, p.marks[node]})
	}
	b := canon.Marshal(list)
	sum := sha256.Sum256(b)
	return append(sum[:], b...)
}

// of returns the mark of a node, nil for none.
func (p *promises) of(node string) []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.marks[node]
}

// note keeps a mark that a node gave of itself, unless what is kept goes further. verify
// says whether it is signed by the node's device: a certificate alone, which lies on the
// node's disk, does not replace what the node had promised. A higher count is on disk when
// note returns: the node's device is about to count so far. Errors: kms.Invalid,
// kms.TooLarge, verify's, save's.
func (p *promises) note(node string, raw []byte, verify func(mark) error) error {
	m, err := parseMark(raw)
	if err != nil {
		return err
	}
	was, err := parseMark(p.of(node))
	if err != nil || !m.follows(was) {
		if err := verify(m); err != nil {
			return err
		}
	}
	if err := p.keep(node, raw, m); err != nil || m.Counter <= was.Counter {
		return err
	}
	return p.save()
}

// keep is note without verification, in memory.
func (p *promises) keep(node string, raw []byte, m mark) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if old, ok := p.marks[node]; ok {
		was, err := parseMark(old)
		if err == nil && m.At.before(was.At) && m.At.Term <= was.At.Term {
			return nil // it arrived late, or the node is catching up
		}
	} else if len(p.marks) >= maxPromises {
		return kms.Errorf(kms.TooLarge, "marks of %d nodes are kept already", maxPromises)
	}
	if !bytes.Equal(p.marks[node], raw) {
		p.marks[node] = bytes.Clone(raw)
		p.changed = true
	}
	return nil
}

// set keeps a mark of this node itself. Errors: kms.Invalid, kms.TooLarge.
func (p *promises) set(node string, raw []byte) error {
	if _, err := parseMark(raw); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.marks[node], p.changed = raw, true
	return nil
}

// save writes what has changed. What was set before is on disk when it returns.
func (p *promises) save() error {
	p.writing.Lock()
	defer p.writing.Unlock()
	p.mu.Lock()
	changed, b := p.changed, p.encode()
	p.changed = false
	p.mu.Unlock()
	if !changed || p.path == "" {
		return nil
	}
	if err := writeFile(p.path, b); err != nil {
		p.mu.Lock()
		p.changed = true
		p.mu.Unlock()
		return err
	}
	return nil
}

// saveEvery is how often marks of others are written to disk.
const saveEvery = time.Second
