package audit

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"

	"github.com/conclave-kms/conclave/kms"
	cosigned "github.com/conclave-kms/conclave/kms/note"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/tlog"
)

func sorted[T any](m map[uint64]T) []uint64 { return slices.Sorted(maps.Keys(m)) }

// restartOf returns how often a log has begun anew, as its checkpoint says.
func restartOf(c cosigned.Checkpoint) (uint32, error) {
	for _, e := range c.Extensions {
		if s, ok := strings.CutPrefix(e, "restart "); ok {
			n, err := strconv.ParseUint(s, 10, 32)
			if err != nil {
				return 0, kms.Errorf(kms.Invalid, "the checkpoint's number of restarts is no number")
			}
			return uint32(n), nil
		}
	}
	return 0, nil
}

// witnesses lists the nodes of the replayed state with the keys by which they sign heads.
func (v *dirVerifier) witnesses() {
	v.sites = map[string]string{}
	for _, n := range v.st.Nodes() {
		if w, ok := v.st.NoteWitness(n.ID, v.st.Index()); ok {
			v.known = append(v.known, w)
			v.sites[w.Name] = n.Site
		}
	}
}

// signatories verifies a signed note and returns the sites of whom a node has signed it.
// None is no error; a signature by a known key that does not verify is.
func (v *dirVerifier) signatories(b []byte) ([]string, error) {
	var here []cosigned.Witness
	n, err := note.Open(b, note.VerifierList())
	if unverified := (*note.UnverifiedNoteError)(nil); errors.As(err, &unverified) {
		n, err = unverified.Note, nil
	}
	if err != nil {
		return nil, kms.Wrap(kms.Invalid, err, "the checkpoint is no signed note", "")
	}
	for _, w := range v.known {
		if slices.ContainsFunc(n.UnverifiedSigs, func(s note.Signature) bool { return s.Name == w.Name }) {
			here = append(here, w)
		}
	}
	if len(here) == 0 {
		return nil, nil
	}
	_, names, err := cosigned.Open(b, here...)
	if wrong := (*note.InvalidSignatureError)(nil); errors.As(err, &wrong) {
		return nil, err
	}
	if err != nil { // by keys that these nodes had before, or not by a pair: nobody has signed
		return nil, nil
	}
	var sites []string
	for _, name := range names {
		sites = append(sites, v.sites[name])
	}
	slices.Sort(sites)
	return slices.Compact(sites), nil
}

// textOf parses the checkpoint under a signed note.
func textOf(b []byte) (cosigned.Checkpoint, error) {
	i := bytes.LastIndex(b, []byte("\n\n"))
	if i < 0 {
		return cosigned.Checkpoint{}, kms.Errorf(kms.Invalid, "the checkpoint is no signed note")
	}
	return cosigned.Parse(b[:i+1])
}

// clusterHead verifies the checkpoint of the cluster log by the keys that the log itself
// has brought forth, and who of the sites has cosigned it.
func (v *dirVerifier) clusterHead(context.Context) error {
	v.witnesses()
	c, err := textOf(v.head.Note)
	if err != nil {
		return err
	}
	hash := v.st.Hash()
	want := state.LogHead(v.st.Lineage(), cosigned.ClusterLog, 0, v.st.LogSize(), v.st.LogRoot(), hash[:])
	if !bytes.Equal(c.Marshal(), want.Marshal()) {
		return kms.Errorf(kms.Invalid, "the checkpoint of the cluster log is not about this log and the state that it leads to")
	}
	v.r.States++
	sites, err := v.signatories(v.head.Note)
	if err != nil {
		return err
	}
	l := LogReport{Log: cosigned.ClusterLog, Size: v.head.Size, Root: v.head.Root, Sites: sites, Cosigned: CosignedSize(v.st, cosigned.ClusterLog, 0)}
	if len(sites) >= Majority(v.st) {
		l.Cosigned = l.Size
	}
	if l.Cosigned == 0 {
		v.r.find("no checkpoint of the cluster log is cosigned by a majority of the %d sites", len(v.st.Sites()))
	}
	v.witnessed()
	return v.add(l, tlog.Open(v.clusterPath(), v.head.Size), func(b []byte) (int64, error) {
		leaf, err := state.ParseLeaf(b)
		return leaf.Time, err
	})
}

// witnessed reports what the cluster has recorded against nodes.
func (v *dirVerifier) witnessed() {
	for _, n := range v.st.Nodes() {
		if cp, ok := v.st.Checkpoint(n.ID); ok && cp.Fork != nil {
			v.r.find("node %s has signed two access logs that contradict each other, of %d and of %d entries", n.ID, cp.Size, cp.Fork.Size)
		}
	}
}

// accessTree is an access log that was read.
type accessTree struct {
	node string
	head tlog.Head
}

func (v *dirVerifier) accessPath(node string) string { return filepath.Join(v.dir, accessDir, node) }

func ofAccessLog(node string, err error) error {
	return refuse(kms.KindOf(err), err, "the access log of node %s: %v", node, err)
}

// accessTrees reads the access logs that are there: leaves, tiles and roots.
func (v *dirVerifier) accessTrees(ctx context.Context) error {
	entries, err := os.ReadDir(filepath.Join(v.dir, accessDir))
	if err != nil && !os.IsNotExist(err) {
		return kms.Wrap(kms.Unavailable, err, "the exported access logs cannot be read", "")
	}
	for _, e := range entries {
		node := e.Name()
		if kms.CheckName("node", node) != nil || !e.IsDir() {
			continue
		}
		head, err := tlog.ReadHead(v.accessPath(node))
		if err == nil {
			err = tlog.Check(ctx, v.accessPath(node), head, func(i uint64, b []byte) error {
				v.progress("reading the access log of "+node, i, head.Size)
				e, err := ParseEntry(b)
				if err == nil && e.Node != node {
					err = kms.Errorf(kms.Invalid, "entry %d is of node %q", i, e.Node)
				}
				return err
			})
		}
		if err != nil {
			return ofAccessLog(node, err)
		}
		v.access = append(v.access, accessTree{node, head})
	}
	return nil
}

// accessLogs holds the access logs against their checkpoints and what the cluster knows.
func (v *dirVerifier) accessLogs(context.Context) error {
	for _, a := range v.access {
		if err := v.accessLog(a.node, a.head); err != nil {
			return ofAccessLog(a.node, err)
		}
	}
	for _, n := range v.st.Nodes() {
		here := slices.ContainsFunc(v.access, func(a accessTree) bool { return a.node == n.ID })
		if cp, ok := v.st.Checkpoint(n.ID); ok && !here {
			v.r.note("The access log of node %s, of which the cluster knows %d entries, is not in this directory.", n.ID, cp.Size)
		}
	}
	return nil
}

func (v *dirVerifier) accessLog(node string, head tlog.Head) error {
	log := cosigned.AccessLog(node)
	c, err := textOf(head.Note)
	if err != nil {
		return err
	}
	restart, err := restartOf(c)
	if err != nil {
		return err
	}
	// A node that has logged nothing since a recovery has a checkpoint of before it.
	if !slices.ContainsFunc(lineages(v.st), func(lineage string) bool {
		return bytes.Equal(c.Marshal(), state.LogHead(lineage, log, restart, head.Size, head.Root, nil).Marshal())
	}) {
		return kms.Errorf(kms.Invalid, "the checkpoint is of another log")
	}
	l := LogReport{Log: log, Restart: restart, Size: head.Size, Root: head.Root}
	s := tlog.Open(v.accessPath(node), head.Size)
	if err := v.accessHead(node, head, s, &l); err != nil {
		return err
	}
	return v.add(l, s, func(b []byte) (int64, error) {
		e, err := ParseEntry(b)
		return e.Time, err
	})
}

// accessHead holds an access log against what the cluster knows of it, and verifies its
// checkpoint.
func (v *dirVerifier) accessHead(node string, head tlog.Head, s tlog.Source, l *LogReport) error {
	known, ok := LatestHead(v.st, l.Log)
	if ok && known.Restart > l.Restart {
		v.r.find("the access log of node %s is from before it began anew for the %d. time", node, known.Restart)
		return nil
	}
	if _, recovered := v.st.Recovered(); l.Restart > known.Restart+1 || l.Restart > known.Restart && !recovered {
		v.r.find("the access log of node %s says that it began anew; the cluster knows nothing of it", node)
		return nil
	}
	if ok && known.Restart == l.Restart {
		if err := v.continues(known, s, "checkpoint of node "+node); err != nil {
			return err
		}
	}
	for _, c := range v.st.Cosignatures(l.Log) {
		if c.Restart != l.Restart {
			continue
		}
		if err := v.continues(headOf(c), s, "cosignature of site "+c.Site); err != nil {
			return err
		}
	}
	signed, err := v.signatories(head.Note)
	if err != nil {
		return err
	}
	l.Sites = append(signed, SitesOf(v.st, Head{Log: l.Log, Restart: l.Restart, Size: l.Size, Root: l.Root})...)
	slices.Sort(l.Sites)
	l.Sites = slices.Compact(l.Sites)
	l.Cosigned = CosignedSize(v.st, l.Log, l.Restart)
	own, member := v.st.Node(node)
	switch {
	case !member:
		v.r.note("Node %s was removed from the cluster; what the cluster knows of its access log is where it stands.", node)
	case !slices.Contains(l.Sites, own.Site):
		v.r.find("the checkpoint of the access log of node %s is not signed by the node", node)
	case len(l.Sites) >= Majority(v.st):
		l.Cosigned = l.Size
	}
	if l.Cosigned == 0 {
		v.r.find("no checkpoint of the access log of node %s is cosigned by a majority of the %d sites", node, len(v.st.Sites()))
	}
	return nil
}

// continues holds an access log against a head of it that stands in the cluster's state.
func (v *dirVerifier) continues(h Head, s tlog.Source, whose string) error {
	if h.Size > s.Size() {
		v.r.find("the log %s has %d entries here; by the last %s it had %d: it was truncated or rolled back, or it is an older copy than the cluster log beside it", h.Log, s.Size(), whose, h.Size)
		return nil
	}
	root, err := tlog.Root(s, h.Size)
	if err != nil {
		return err
	}
	if !bytes.Equal(root, h.Root) {
		v.r.find("the log %s is not the one of the last %s: its first %d entries are others", h.Log, whose, h.Size)
	}
	return nil
}

// evidence builds and verifies the evidence of every decision that was carried out.
func (v *dirVerifier) evidence(ctx context.Context) error {
	all := slices.DeleteFunc(v.st.Proposals(), func(p state.Proposal) bool { return p.Progress != state.Executed })
	const at = 64
	for first := 0; first < len(all); first += at {
		if err := ctx.Err(); err != nil {
			return err
		}
		batch := all[first:min(first+at, len(all))]
		v.o.Progress(Progress{"verifying the evidence of decisions", uint64(first), uint64(len(all))})
		errs := make([]error, len(batch))
		v.o.Spread(len(batch), func(i int) {
			if len(batch[i].Execution) > 0 { // else it is erased with the key material
				_, errs[i] = BuildEvidence(v.st, batch[i].ID)
			}
		})
		for i, p := range batch {
			switch {
			case len(p.Execution) == 0:
				v.r.Erased++
			case kms.KindOf(errs[i]) == kms.Conflict:
				v.r.note("Proposal %s: %v.", p.ID, errs[i])
			case errs[i] != nil:
				v.r.find("the evidence of proposal %s does not verify: %v", p.ID, errs[i])
			default:
				v.r.Evidence++
			}
		}
	}
	return nil
}
