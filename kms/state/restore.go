package state

import (
	"bytes"
	"crypto/sha256"
	"io"

	"github.com/hashicorp/go-memdb"
	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/rfc6962"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
)

// Restore reads a snapshot up to its end record. If trusted says that the hash
// (State.Hash) is known, the records are taken as they are; else every statement
// in them is verified again and the records must be exactly what the statements
// give, see DESIGN.md for what no statement covers. The genesis is always
// verified; that State.Cluster is the right one is for the caller to check. Memory
// grows with what arrives: bound r where the sender is not trusted. Errors: kms.Invalid, kms.TooLarge, kms.BadSignature and what a
// statement's command would be refused with.
func Restore(r io.Reader, trusted func(hash [32]byte) bool) (*State, error) {
	return RestoreSpread(r, trusted, inOrder)
}

// RestoreSpread is Restore that has its caller spread the work that can be done at once.
func RestoreSpread(r io.Reader, trusted func(hash [32]byte) bool, spread Spread) (*State, error) {
	in := &recordReader{r: r, hash: sha256.New()}
	s, err := readState(in)
	if err != nil {
		return nil, err
	}
	sum := [32]byte(in.hash.Sum(nil))
	if trusted == nil || !trusted(sum) {
		v, err := s.toVerify()
		if err != nil {
			return nil, err
		}
		s = nil // v holds what is needed of it
		if s, err = v.run(spread); err != nil {
			return nil, err
		}
	}
	s.reports = s.reader().reports()
	return s, nil
}

// readState reads all records and checks their form, order and hash.
func readState(in *recordReader) (*State, error) {
	number, b, err := in.next()
	if err != nil {
		return nil, err
	}
	if number != recordHeader {
		return nil, kms.Errorf(kms.Invalid, "snapshot: it does not begin with a header")
	}
	s, err := readHeader(b)
	if err != nil {
		return nil, err
	}
	x := s.db.Txn(true)
	defer x.Abort() // nothing after Commit
	if err := readTables(in, x); err != nil {
		return nil, err
	}
	x.Commit()
	s.setLineage()
	// The same records give the same bytes again only if they stood in order and
	// none was repeated.
	if s.Hash() != [32]byte(in.hash.Sum(nil)) {
		return nil, kms.Errorf(kms.Invalid, "snapshot: its records are not in order or repeat one")
	}
	return s, nil
}

func readTables(in *recordReader, x *memdb.Txn) error {
	for {
		number, b, err := in.next()
		switch {
		case err != nil:
			return err
		case number == recordEnd:
			if !bytes.Equal(b, in.hash.Sum(nil)) {
				return kms.Errorf(kms.Invalid, "snapshot: its hash does not match; it is damaged")
			}
			return nil
		}
		table, known := tableOf(number)
		if !known {
			return kms.Errorf(kms.Invalid, "snapshot: record number %d is not known here", number)
		}
		if err := table.insert(x, b); err != nil {
			return err
		}
	}
}

// readHeader returns a state without records.
func readHeader(b []byte) (*State, error) {
	var h header
	if err := canon.Unmarshal(b, &h); err != nil {
		return nil, kms.Wrap(kms.Invalid, err, "snapshot: the header is not in canonical form", "")
	}
	if h.Format < baseFormat || h.Format > snapshotFormat {
		return nil, kms.Errorf(kms.Invalid, "snapshot: format %d is not known; this program knows %d to %d", h.Format, baseFormat, snapshotFormat)
	}
	g, err := h.Genesis.Verify()
	if err != nil {
		return nil, err
	}
	if h.Cluster != kms.ClusterID(h.Genesis.Genesis) {
		return nil, kms.Errorf(kms.Invalid, "snapshot: the cluster is not that of its genesis")
	}
	if len(h.LogHashes) != compact.RangeSize(0, h.LogSize) {
		return nil, kms.Errorf(kms.Invalid, "snapshot: the log of %d leaves cannot have %d hashes", h.LogSize, len(h.LogHashes))
	}
	for _, sum := range h.LogHashes {
		if len(sum) != rfc6962.DefaultHasher.Size() {
			return nil, kms.Errorf(kms.Invalid, "snapshot: a hash of the log has %d bytes", len(sum))
		}
	}
	if h.LogSize > h.Index || h.Index > maxIndex {
		return nil, kms.Errorf(kms.Invalid, "snapshot: the log has more leaves than entries, or the index is out of range")
	}
	if h.Clock < g.Created || h.Clock > maxTime {
		return nil, kms.Errorf(kms.Invalid, "snapshot: the clock is out of range")
	}
	return &State{
		db: newDB(), signed: h.Genesis, genesis: g, cluster: h.Cluster, index: h.Index, clock: h.Clock,
		log: logRange{h.LogSize, h.LogHashes},
	}, nil
}
