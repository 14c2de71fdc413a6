package backup

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"io"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/parallel"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/pqc"
)

// Options say what to believe.
type Options struct {
	Cluster string // the identity that the backup must be of; required
	// Signer, optional, is the fingerprint (pqc.Fingerprint) of a node's signing key
	// that is trusted to have signed nothing but states that it had applied: the
	// statements in the backup are then not verified again.
	Signer string
}

// Result is what was verified.
type Result struct {
	Header Header
	Hash   [32]byte     // of the state
	State  *state.State // restored from the backup
	Full   bool         // every statement in it was verified from the genesis on
}

// Verify restores the backup into a state of its own and checks everything that can
// be checked without a cluster: the node's signature over the file, the genesis, and
// each signed statement from the genesis on (see Options.Signer). Errors:
// kms.Invalid, kms.BadSignature, kms.Conflict for another cluster's backup, and what
// state.Restore returns.
func Verify(r io.Reader, o Options) (Result, error) {
	f := &frameReader{r: r, hash: sha512.New()}
	h, err := f.begin()
	if err != nil {
		return Result{}, err
	}
	if h.Cluster != o.Cluster {
		return Result{}, kms.Errorf(kms.Conflict, "the backup is of cluster %q, not of %s", h.Cluster, o.Cluster)
	}
	genesis, err := f.genesis()
	if err != nil {
		return Result{}, err
	}
	res := Result{Header: h, Full: true}
	in := &stateReader{f: f}
	var closed error
	st, err := state.RestoreSpread(in, func(hash [32]byte) bool {
		// The records are read, nothing of them is believed yet: what the node signed
		// comes first.
		res.Hash = hash
		if _, closed = in.trailer(h, hash[:]); closed != nil {
			return true // refused below
		}
		res.Full = o.Signer == "" || o.Signer != pqc.Fingerprint(h.Signing)
		return !res.Full
	}, parallel.Do)
	switch {
	case closed != nil:
		return Result{}, closed
	case in.err != nil: // its words rather than the snapshot's
		return Result{}, in.err
	case err != nil:
		return Result{}, err
	}
	if o.Signer != "" && res.Full {
		return Result{}, kms.Errorf(kms.BadSignature, "the backup is signed by node %s with key %s, not with %s", h.Node, pqc.Fingerprint(h.Signing), o.Signer)
	}
	res.State = st
	return res, res.fits(genesis)
}

// fits compares the header and the genesis with the state.
func (r Result) fits(genesis []byte) error {
	want, err := describe(r.State, r.Header.Node)
	if err != nil {
		return err
	}
	want.Created, want.Program = r.Header.Created, r.Header.Program
	switch {
	case !want.equal(r.Header):
		return kms.Errorf(kms.Invalid, "the backup's header does not fit its state")
	case !bytes.Equal(genesis, r.State.SignedGenesis().Marshal()):
		return kms.Errorf(kms.Invalid, "the backup's genesis document is not that of its state")
	}
	return nil
}

func (h Header) equal(o Header) bool {
	same := bytes.Equal(h.LogRoot, o.LogRoot) && bytes.Equal(h.Signing, o.Signing)
	return same && h.Format == o.Format && h.Cluster == o.Cluster && h.Lineage == o.Lineage && h.Epoch == o.Epoch && h.Index == o.Index &&
		h.Clock == o.Clock && h.LogSize == o.LogSize && h.Node == o.Node && h.Root == o.Root && h.Suite == o.Suite
}

// Summary is what Scan has found.
type Summary struct {
	Header Header
	Hash   []byte // of the state, as the trailer says
	Size   uint64 // bytes of the snapshot
}

// Scan reads a backup to its end in constant memory and checks that it is whole:
// its form and the signature with the key that it names itself. It does not say
// whether the backup is true; Verify does.
func Scan(r io.Reader) (Summary, error) {
	f := &frameReader{r: r, hash: sha512.New()}
	h, err := f.begin()
	if err != nil {
		return Summary{}, err
	}
	if _, err := f.genesis(); err != nil {
		return Summary{}, err
	}
	in := &stateReader{f: f}
	sum := &tailHash{}
	if _, err := io.Copy(sum, in); err != nil {
		return Summary{}, err
	}
	t, err := in.trailer(h, sum.end())
	if err != nil {
		return Summary{}, err
	}
	return Summary{Header: h, Hash: t.State, Size: t.Size}, nil
}

// tailHash keeps the last bytes written: a snapshot ends with the hash of its state.
type tailHash struct{ tail []byte }

// Write implements io.Writer.
func (t *tailHash) Write(b []byte) (int, error) {
	keep := b[max(0, len(b)-sha256.Size):]
	t.tail = append(t.tail, keep...)
	t.tail = t.tail[max(0, len(t.tail)-sha256.Size):]
	return len(b), nil
}

func (t *tailHash) end() []byte { return t.tail }
