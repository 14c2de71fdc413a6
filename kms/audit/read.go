package audit

import (
	"bytes"
	"errors"
)

// walkAccess walks over the access log in dir, adding every leaf to m, which must
// be empty, and comparing the root in every segment's header with the tree.
func walkAccess(dir string, m merkle, fn func(seq uint64, leaf []byte) error) (tail, error) {
	return accessKind.walk(dir,
		func(h header) error {
			if h.first > 0 && !bytes.Equal(h.root[:], m.tree().Root) {
				return errors.New("the root in the segment's header is not that of the records before it")
			}
			return nil
		},
		func(payload []byte) error {
			seq := m.r.End()
			m.append(LeafHash(payload))
			return fn(seq, payload)
		})
}

// Read verifies the access log in dir and calls fn with every entry in order;
// seq counts from 0. It may run beside the node that writes the log: a record
// that is not complete ends it. It stops at the first error of fn and returns
// it. Errors as for Open.
func Read(dir string, fn func(seq uint64, e Entry) error) error {
	_, err := ReadLeaves(dir, func(seq uint64, leaf []byte) error {
		e, err := ParseEntry(leaf)
		if err != nil {
			return &damage{why: err.Error()}
		}
		return fn(seq, e)
	})
	return err
}

// ReadLeaves is Read for the leaves as hashed, which are valid only during the
// call. It returns the size and root of what was read.
func ReadLeaves(dir string, fn func(seq uint64, leaf []byte) error) (Tree, error) {
	m := newMerkle(nil)
	_, err := walkAccess(dir, m, fn)
	return m.tree(), err
}
