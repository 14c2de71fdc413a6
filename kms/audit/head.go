package audit

import (
	"bytes"
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/note"
	"github.com/conclave-kms/conclave/kms/state"
)

// Head is the head of a log as nodes have signed it.
type Head struct {
	Log     string // note.ClusterLog or note.AccessLog
	Restart uint32 // how often the log has begun anew
	Size    uint64
	Root    []byte
	State   []byte // hash of the state, for the cluster log
}

// Equal reports whether two heads are the same.
func (h Head) Equal(o Head) bool {
	return h.Log == o.Log && h.Restart == o.Restart && h.Size == o.Size && bytes.Equal(h.Root, o.Root) && bytes.Equal(h.State, o.State)
}

// OwnerOf returns the node whose access log a log is.
func OwnerOf(log string) (node string, access bool) {
	return strings.CutPrefix(log, note.AccessLog(""))
}

func headOf(c state.Cosignature) Head { return Head{c.Log, c.Restart, c.Size, c.Root, c.State} }

// LatestHead returns the head of a log that was signed last: of an access log, its node's;
// of the cluster log, the one that most sites have cosigned, the longest among such.
func LatestHead(st *state.State, log string) (h Head, ok bool) {
	if node, access := OwnerOf(log); access {
		cp, ok := st.Checkpoint(node)
		return Head{Log: log, Restart: cp.Restart, Size: cp.Size, Root: cp.Root}, ok
	}
	best, all := 0, st.Cosignatures(log)
	for _, c := range all {
		n := 0
		for _, o := range all {
			if headOf(o).Equal(headOf(c)) {
				n++
			}
		}
		if n > best || n == best && c.Size > h.Size {
			best, h = n, headOf(c)
		}
	}
	return h, best > 0
}

// CosignedSize returns the size of a log up to which a majority of the sites have cosigned it.
func CosignedSize(st *state.State, log string, restart uint32) uint64 {
	need := Majority(st)
	if node, access := OwnerOf(log); access {
		if need--; need == 0 { // one site alone: there is nobody else
			cp, _ := st.Checkpoint(node)
			return cp.Size
		}
	}
	var sizes []uint64
	for _, c := range st.Cosignatures(log) {
		if c.Restart == restart {
			sizes = append(sizes, c.Size)
		}
	}
	if len(sizes) < need {
		return 0
	}
	slices.Sort(sizes)
	return sizes[len(sizes)-need]
}

// SitesOf returns the sites of whom the state has a signature of a head, sorted.
func SitesOf(st *state.State, h Head) []string {
	var sites []string
	if node, access := OwnerOf(h.Log); access {
		last, _ := LatestHead(st, h.Log)
		if n, ok := st.Node(node); ok && last.Equal(h) {
			sites = append(sites, n.Site)
		}
	}
	for _, c := range st.Cosignatures(h.Log) {
		if headOf(c).Equal(h) {
			sites = append(sites, c.Site)
		}
	}
	slices.Sort(sites)
	return slices.Compact(sites)
}

// Majority returns of how many sites signatures make a log cosigned, the one of an access
// log's node among them.
func Majority(st *state.State) int { return len(st.Sites())/2 + 1 }

// signedHead is a node's signature of a head, as it stands in the state.
type signedHead struct {
	node      string
	index     uint64
	statement []byte
}

// signaturesOf returns the signatures of a head, that of an access log's node first.
func signaturesOf(st *state.State, h Head) (all []signedHead) {
	if node, access := OwnerOf(h.Log); access {
		if cp, ok := st.Checkpoint(node); ok && cp.Restart == h.Restart && cp.Size == h.Size && bytes.Equal(cp.Root, h.Root) {
			all = append(all, signedHead{node, cp.Index, cp.Statement})
		}
	}
	for _, c := range st.Cosignatures(h.Log) {
		if headOf(c).Equal(h) {
			all = append(all, signedHead{c.Node, c.Index, c.Statement})
		}
	}
	return all
}

// lineages returns the histories that a state has gone through, the present one last.
func lineages(st *state.State) []string {
	l := []string{st.Cluster()}
	for _, r := range st.Recoveries() {
		l = append(l, r.Lineage(st.Cluster()))
	}
	return l
}

// lineageAt returns the history that an index of the log is of.
func lineageAt(st *state.State, index uint64) string {
	n := 0
	for _, r := range st.Recoveries() {
		if r.Index < index {
			n++
		}
	}
	return lineages(st)[n]
}

// SignedNote returns a log's head as a signed note with the signatures of it that stand in
// the state; nil if there are none. A head is signed in a history of the cluster: what was
// signed again after a recovery is another note. Errors: kms.Internal.
func SignedNote(st *state.State, h Head) ([]byte, error) {
	var pairs []note.Signed
	lineage := ""
	for _, s := range signaturesOf(st, h) {
		if at := lineageAt(st, s.index); lineage == "" {
			lineage = at
		} else if at != lineage {
			continue
		}
		w, ok := st.NoteWitness(s.node, s.index)
		if !ok {
			return nil, kms.Errorf(kms.Internal, "the key of node %s for checkpoints is not known", s.node)
		}
		cmd, err := commandOf(s.statement)
		if err != nil {
			return nil, err
		}
		switch c := cmd.(type) {
		case state.SubmitCheckpoint:
			pairs = append(pairs, note.Signed{Witness: w, Signature: c.Signature})
		case state.Cosign:
			pairs = append(pairs, note.Signed{Witness: w, Signature: c.Signature})
		}
	}
	if len(pairs) == 0 {
		return nil, nil
	}
	return note.Join(state.LogHead(lineage, h.Log, h.Restart, h.Size, h.Root, h.State), pairs...)
}

func commandOf(raw []byte) (state.Command, error) {
	b, _, err := state.Split(raw)
	if err != nil {
		return nil, err
	}
	_, cmd, err := state.ParseEnvelope(b)
	return cmd, err
}
