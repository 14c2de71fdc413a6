package audit

import (
	"encoding/binary"
	"errors"
	"io"
	"slices"

	"github.com/conclave-kms/conclave/kms"
)

// part is a stretch of a cluster log: the number of its first leaf, and which record of
// which segments has it. Without segments, the stretch is missing.
type part struct {
	leaf, record uint64
	from         *records
}

// Hashes is that of tlog.Source. Errors: kms.Invalid for hashes that are not there,
// kms.Unavailable, which they also are after a gap.
func (l *ClusterLog) Hashes(level uint, from, n uint64) ([][]byte, error) {
	h, err := l.tiles.Hashes(level, from, n)
	if _, whole := l.Root(); err != nil && !whole && kms.KindOf(err) == kms.Invalid {
		return nil, notHeld(from)
	}
	return h, err
}

func notHeld(leaf uint64) error {
	return kms.Errorf(kms.Unavailable, "this node does not hold all of the cluster log, from number %d on: it took over a snapshot and has not fetched yet what came before", leaf)
}

// Leaves is that of tlog.Source. Errors: kms.Invalid for leaves that are not there
// or damaged, kms.Unavailable, which they also are in a gap.
func (l *ClusterLog) Leaves(from uint64, n int) ([][]byte, error) {
	leaves := make([][]byte, 0, max(n, 0))
	err := l.Records(from, n, func(r Record) error {
		leaves = append(leaves, slices.Clone(r.Leaf))
		return nil
	})
	return leaves, err
}

// Records calls fn with n commands, beginning with that of leaf number from. What
// they point to is valid only during the call. Errors as for Leaves, and those of fn.
func (l *ClusterLog) Records(from uint64, n int, fn func(Record) error) error {
	l.mu.Lock()
	size, parts := l.size, slices.Clone(l.parts)
	l.mu.Unlock()
	return clusterRecords(size, parts, from, n, fn)
}

// clusterRecords reads records across the parts of a log.
func clusterRecords(size uint64, parts []part, from uint64, n int, fn func(Record) error) error {
	if err := within(size, from, n); err != nil {
		return err
	}
	for i := 0; n > 0; i++ {
		end := size
		if i+1 < len(parts) {
			end = parts[i+1].leaf
		}
		if from >= end {
			continue
		}
		p := parts[i]
		if p.from == nil {
			return notHeld(from)
		}
		k := min(uint64(n), end-from)
		if err := p.from.read(p.record+from-p.leaf, int(k), func(payload []byte) error { return readCommand(payload, fn) }); err != nil {
			return err
		}
		from, n = from+k, n-int(k)
	}
	return nil
}

func readCommand(payload []byte, fn func(Record) error) error {
	r, _, err := decodeCluster(payload)
	if err == nil && r.Index == 0 {
		err = errors.New("a gap is where a command should be")
	}
	if err != nil {
		return kms.Wrap(kms.Invalid, err, "the cluster log is damaged", "")
	}
	return fn(r)
}

// writeCommand writes a command as it stands in a bundle of commands: its length
// in four bytes, big-endian, and the signed command.
func writeCommand(w io.Writer, raw []byte) error {
	if _, err := w.Write(binary.BigEndian.AppendUint32(nil, uint32(len(raw)))); err != nil {
		return err
	}
	_, err := w.Write(raw)
	return err
}
