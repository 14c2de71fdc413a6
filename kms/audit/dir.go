package audit

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/note"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/tlog"
)

// DirOptions says how VerifyDir verifies.
type DirOptions struct {
	Cluster  string         // identity of the cluster that the verifier knows, 32 hexadecimal digits
	Seen     []SeenHead     // what the verifier has seen of the logs before
	Spread   state.Spread   // does several things at once; nil: one after another
	Progress func(Progress) // optional, is called now and then
}

// Progress tells how far a verification is.
type Progress struct {
	Doing string
	Done  uint64
	Of    uint64
}

// SeenHead is the head of a log that a verifier has seen. The log must have grown from there.
type SeenHead struct {
	Log     string `json:"log"`
	Lineage string `json:"lineage"`
	Restart uint32 `json:"restart,omitempty"`
	Size    uint64 `json:"size"`
	Root    []byte `json:"root"`
}

// DirReport is what the verification of exported logs has found.
type DirReport struct {
	Cluster     string      `json:"cluster"`
	ClusterName string      `json:"cluster_name"`
	Epoch       uint64      `json:"epoch"`
	Lineage     string      `json:"lineage"`
	Logs        []LogReport `json:"logs"`
	Commands    uint64      `json:"commands"`             // that were carried out again
	Refused     uint64      `json:"refused"`              // of these, without effect, as at the time
	Checkpoints uint64      `json:"checkpoints"`          // in the cluster log whose roots were compared
	States      uint64      `json:"states"`               // places at which the state's hash was compared
	Evidence    uint64      `json:"evidence"`             // executed proposals whose evidence verifies
	Erased      uint64      `json:"evidence_erased"`      // executed proposals whose key material is destroyed, and the evidence with it
	Findings    []string    `json:"findings"`             // what is wrong
	Notes       []string    `json:"notes"`                // what was not verified
	Seen        []SeenHead  `json:"seen"`                 // the heads to remember for the next time
	Tail        uint64      `json:"uncosigned"`           // leaves of all logs that no majority of the sites has cosigned
	TailMS      int64       `json:"uncosigned_ms"`        // the longest time that such leaves span
	Newest      time.Time   `json:"newest_leaf,omitzero"` // by the clock of the node that made it
}

// LogReport is what was found of one log.
type LogReport struct {
	Log      string    `json:"log"`
	Restart  uint32    `json:"restart,omitempty"`
	Size     uint64    `json:"size"`     // leaves
	Root     []byte    `json:"root"`     // RFC 6962
	Cosigned uint64    `json:"cosigned"` // leaves that a majority of the sites have cosigned
	Sites    []string  `json:"sites"`    // that have signed this head
	Tail     uint64    `json:"uncosigned"`
	TailMS   int64     `json:"uncosigned_ms"`
	Newest   time.Time `json:"newest_leaf,omitzero"`
}

func (r *DirReport) find(format string, args ...any) {
	r.Findings = append(r.Findings, fmt.Sprintf(format, args...))
}

func (r *DirReport) note(format string, args ...any) {
	r.Notes = append(r.Notes, fmt.Sprintf(format, args...))
}

// VerifyDir verifies the logs that were exported to a directory, offline. It trusts nothing
// but the identity of the cluster. It reads every leaf, holds all tiles against them,
// carries out every command of the cluster log again from the genesis and compares each
// leaf, and the state's hash where nodes have cosigned it. The keys of cosigners come from
// that replay. The error is kms.Invalid, kms.BadSignature or another kind of what failed first,
// and kms.Invalid for a report with findings; the report holds what was found until then.
func VerifyDir(ctx context.Context, dir string, o DirOptions) (DirReport, error) {
	v := &dirVerifier{dir: dir, o: o, r: DirReport{Logs: []LogReport{}, Findings: []string{}, Notes: []string{}, Seen: []SeenHead{}}}
	if v.o.Spread == nil {
		v.o.Spread = func(n int, f func(int)) {
			for i := range n {
				f(i)
			}
		}
	}
	if v.o.Progress == nil {
		v.o.Progress = func(Progress) {}
	}
	for _, step := range []func(context.Context) error{v.genesis, v.clusterTree, v.accessTrees, v.replay, v.clusterHead, v.evidence, v.accessLogs, v.remembered} {
		if err := step(ctx); err != nil {
			return v.r, err
		}
	}
	if n := len(v.r.Findings); n > 0 {
		return v.r, kms.Errorf(kms.Invalid, "the logs do not verify: %s", v.r.Findings[0])
	}
	return v.r, nil
}

// dirVerifier is a verification under way.
type dirVerifier struct {
	dir    string
	o      DirOptions
	r      DirReport
	st     *state.State // after what was carried out
	head   tlog.Head    // of the cluster log
	marks  marks
	access []accessTree
	known  []note.Witness // who may have signed heads
	sites  map[string]string
	roots  map[string]exportedLog // by log
}

// exportedLog is a log of the directory that was verified.
type exportedLog struct {
	tlog.Source
	restart uint32
}

func (v *dirVerifier) clusterPath() string { return filepath.Join(v.dir, clusterDir) }

// maxSigned is the longest signed genesis, in bytes.
const maxSigned = 2 * state.MaxGenesis

func (v *dirVerifier) genesis(context.Context) error {
	path := filepath.Join(v.dir, genesisFile)
	info, err := os.Stat(path)
	if err == nil && info.Size() > maxSigned {
		return kms.Errorf(kms.TooLarge, "%s has %d bytes; the limit is %d", path, info.Size(), maxSigned)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return kms.Wrap(kms.NotFound, err, path+" cannot be read: is this a directory that logs were exported to?", "")
	}
	signed, err := state.ParseSignedGenesis(b)
	if err != nil {
		return err
	}
	if v.st, err = state.New(signed); err != nil {
		return err
	}
	v.r.Cluster, v.r.ClusterName = v.st.Cluster(), v.st.Genesis().Name
	if v.o.Cluster != v.r.Cluster {
		return kms.Errorf(kms.Invalid, "the logs are those of cluster %s, not of %q", v.r.Cluster, v.o.Cluster)
	}
	v.roots = map[string]exportedLog{}
	return nil
}

// add puts a log that was verified into the report.
func (v *dirVerifier) add(l LogReport, s tlog.Source, timeOf func(leaf []byte) (int64, error)) error {
	v.roots[l.Log] = exportedLog{s, l.Restart}
	at := func(number uint64) (int64, error) {
		leaves, err := s.Leaves(number, 1)
		if err != nil {
			return 0, err
		}
		return timeOf(leaves[0])
	}
	if l.Size > 0 {
		last, err := at(l.Size - 1)
		if err != nil {
			return err
		}
		l.Newest = time.UnixMilli(last).UTC()
		if l.Tail = l.Size - min(l.Cosigned, l.Size); l.Tail > 0 {
			first, err := at(l.Cosigned)
			if err != nil {
				return err
			}
			l.TailMS = max(0, last-first)
		}
	}
	if v.r.Newest.Before(l.Newest) {
		v.r.Newest = l.Newest
	}
	v.r.Tail += l.Tail
	v.r.TailMS = max(v.r.TailMS, l.TailMS)
	v.r.Logs = append(v.r.Logs, l)
	v.r.Seen = append(v.r.Seen, SeenHead{Log: l.Log, Lineage: v.r.Lineage, Restart: l.Restart, Size: l.Size, Root: l.Root})
	return nil
}

// remembered holds the logs against what the verifier has seen of them before.
func (v *dirVerifier) remembered(context.Context) error {
	for _, seen := range v.o.Seen {
		l, ok := v.roots[seen.Log]
		switch {
		case !ok:
			v.r.find("the log %s, of which %d leaves were seen before, is not here", seen.Log, seen.Size)
			continue
		case seen.Restart > l.restart:
			v.r.find("the log %s was seen after it had begun anew for the %d. time; here it is from before", seen.Log, seen.Restart)
			continue
		case seen.Restart < l.restart:
			v.r.note("The log %s has begun anew in a recovery of the cluster: the %d leaves that were seen of it before are not part of it.", seen.Log, seen.Size)
			continue
		case seen.Size > l.Size():
			v.r.find("the log %s had %d leaves when it was last seen and has %d here: it was rolled back, or this is an older copy", seen.Log, seen.Size, l.Size())
			continue
		}
		root, err := tlog.Root(l, seen.Size)
		if err != nil {
			return err
		}
		if !slices.Equal(root, seen.Root) {
			v.r.find("the log %s does not continue the %d leaves of it that were seen before%s", seen.Log, seen.Size, v.otherHistory(seen))
		}
	}
	return nil
}

func (v *dirVerifier) otherHistory(seen SeenHead) string {
	if seen.Lineage == v.r.Lineage {
		return ": it was forked"
	}
	return fmt.Sprintf("; the cluster has gone on from a backup since (epoch %d): if custodians have agreed to lose what came after it, forget what was seen", v.r.Epoch)
}
