package audit

import (
	"encoding/binary"
	"errors"
	"io"
	"slices"

	"github.com/conclave-kms/conclave/kms"
)

// part is a stretch of a cluster log without gaps: where it begins.
type part struct{ leaf, record uint64 }

// Hashes is that of tlog.Source. Errors: kms.Invalid for hashes that are not there,
// kms.Unavailable, which they also are after a gap.
func (l *ClusterLog) Hashes(level uint, from, n uint64) ([][]byte, error) {
	return l.tiles.Hashes(level, from, n)
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
	return clusterRecords(&l.records, size, parts, from, n, fn)
}

func clusterRecords(r *records, size uint64, parts []part, from uint64, n int, fn func(Record) error) error {
	if err := within(size, from, n); err != nil {
		return err
	}
	i, exact := slices.BinarySearchFunc(parts, from, func(p part, leaf uint64) int {
		switch {
		case p.leaf < leaf:
			return -1
		case p.leaf > leaf:
			return 1
		}
		return 0
	})
	if !exact {
		i--
	}
	if i+1 < len(parts) && parts[i].record+from-parts[i].leaf+uint64(n) >= parts[i+1].record {
		return kms.Errorf(kms.Unavailable, "this node does not hold the cluster log from leaf %d to %d: it took over a snapshot", from, from+uint64(n))
	}
	return r.read(parts[i].record+from-parts[i].leaf, n, func(payload []byte) error {
		c, _, err := decodeCluster(payload)
		if err == nil && c.Index == 0 {
			err = errors.New("a gap is where a command should be")
		}
		if err != nil {
			return kms.Wrap(kms.Invalid, err, "the cluster log is damaged", "")
		}
		return fn(c)
	})
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
