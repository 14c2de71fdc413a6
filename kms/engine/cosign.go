package engine

import (
	"bytes"
	"context"
	"slices"
	"strconv"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/audit"
	cosigned "github.com/conclave-kms/conclave/kms/note"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/tlog"
)

// cosignOthers cosigns the checkpoints of other sites' access logs. One node signs for
// a site: which one goes first changes with each checkpoint.
func (a *Agent) cosignOthers(ctx context.Context, st *state.State, n state.Node) time.Duration {
	wait := idleWait
	for _, o := range st.Nodes() {
		log := cosigned.AccessLog(o.ID)
		cp, ok := st.Checkpoint(o.ID)
		mine, _ := cosignatureOf(st, log, n.Site)
		if o.Site == n.Site || !ok || cp.Fork != nil || mine.Restart == cp.Restart && mine.Size >= cp.Size {
			continue
		}
		rank := a.cosigner(st, n, log)
		wait = min(wait, a.attempt(ctx, "cosign", "cosign/"+log, rank, func(ctx context.Context) error {
			return a.cosign(ctx, st, cp, mine)
		}))
	}
	return wait
}

// cosigner returns how long this node leaves the signature to others of its site.
func (a *Agent) cosigner(st *state.State, n state.Node, subject string) time.Duration {
	nodes := slices.DeleteFunc(st.NodesOf(n.Site), func(o state.Node) bool { _, ok := st.Witness(o.ID); return !ok })
	rank, _ := place(nodes, subject, n.ID)
	return time.Duration(rank) * a.cfg.RankDelay
}

func cosignatureOf(st *state.State, log, site string) (state.Cosignature, bool) {
	l := st.Cosignatures(log)
	i := slices.IndexFunc(l, func(c state.Cosignature) bool { return c.Site == site })
	if i < 0 {
		return state.Cosignature{}, false
	}
	return l[i], true
}

// errRolledBack and errForked are what a cosigner refuses to sign.
func errRolledBack(log string, seen, now uint64) error {
	return kms.Errorf(kms.Invalid, "this node has cosigned %d leaves of the log %s, which now has %d: it was rolled back", seen, log, now)
}

func errForked(log string, seen uint64) error {
	return kms.Errorf(kms.Invalid, "the log %s does not continue the %d leaves of it that this node has cosigned: it was forked", log, seen)
}

// cosign cosigns a checkpoint if it is consistent with the last one that this node has
// seen: with what it remembers itself, not only with the state.
func (a *Agent) cosign(ctx context.Context, st *state.State, cp state.Checkpoint, mine state.Cosignature) error {
	log := cosigned.AccessLog(cp.Node)
	origin := seenOrigin(st, log, cp.Restart)
	size, root, err := a.e.cfg.Checkpoints.Seen.Get(origin)
	if err != nil {
		return err
	}
	if size == 0 && mine.Restart == cp.Restart { // the memory is new, or another node of the site signed
		size, root = mine.Size, mine.Root
	}
	switch {
	case size > cp.Size:
		return a.e.alarm(log, errRolledBack(log, size, cp.Size))
	case size == cp.Size && !bytes.Equal(root, cp.Root):
		return a.e.alarm(log, errForked(log, size))
	case size > 0 && size < cp.Size:
		proof, ok, err := proofFrom(cp, size)
		if err != nil {
			return err
		}
		if !ok { // its owner brings a proof from where the state says that this site stands
			if mine.Restart == cp.Restart && mine.Size >= size {
				return nil
			}
			return a.submitCosign(ctx, st, state.Cosign{Log: log, Restart: cp.Restart, Size: size, Root: root})
		}
		if proof.Verify(root, cp.Size, cp.Root) != nil {
			return a.e.alarm(log, errForked(log, size))
		}
	}
	if err := a.e.cfg.Checkpoints.Seen.Put(origin, cp.Size, cp.Root); err != nil {
		return err
	}
	_ = a.e.alarm(log, nil)
	return a.submitCosign(ctx, st, state.Cosign{Log: log, Restart: cp.Restart, Size: cp.Size, Root: cp.Root})
}

// seenOrigin names a log in the memory of what was cosigned: one that has begun anew is
// another.
func seenOrigin(st *state.State, log string, restart uint32) string {
	return cosigned.Origin(st.Lineage(), log) + "#" + strconv.FormatUint(uint64(restart), 10)
}

// proofFrom returns the proof that a checkpoint brought from a size.
func proofFrom(cp state.Checkpoint, size uint64) (state.LogProof, bool, error) {
	_, cmd, err := parseStatement(cp.Statement)
	if err != nil {
		return state.LogProof{}, false, err
	}
	c, _ := cmd.(state.SubmitCheckpoint)
	i := slices.IndexFunc(c.Proofs, func(p state.LogProof) bool { return p.From == size })
	if i < 0 {
		return state.LogProof{}, false, nil
	}
	return c.Proofs[i], true, nil
}

func (a *Agent) submitCosign(ctx context.Context, st *state.State, c state.Cosign) (err error) {
	if c.Signature, err = a.e.signHead(ctx, st, state.LogHead(st.Lineage(), c.Log, c.Restart, c.Size, c.Root, c.State)); err != nil {
		return err
	}
	_, err = a.e.submit(ctx, attempt{}, c)
	return err
}

// cosignCluster cosigns the cluster log at the latest mark.
func (a *Agent) cosignCluster(ctx context.Context, st *state.State, n state.Node) time.Duration {
	m, ok := a.e.cfg.Checkpoints.Marks.wanted()
	if !ok {
		return idleWait
	}
	if mine, _ := cosignatureOf(st, cosigned.ClusterLog, n.Site); mine.Size >= m.st.LogSize() || m.st.Lineage() != st.Lineage() {
		a.e.cfg.Checkpoints.Marks.done(m.st.LogSize())
		return idleWait
	}
	return a.attempt(ctx, "cosign", "cosign/"+cosigned.ClusterLog, a.cosigner(st, n, cosigned.ClusterLog), func(ctx context.Context) error {
		return a.cosignMark(ctx, st, m)
	})
}

func (a *Agent) cosignMark(ctx context.Context, st *state.State, m mark) error {
	c := a.e.cfg.Checkpoints
	began := a.e.now()
	hash := m.st.Hash()
	h := audit.Head{Log: cosigned.ClusterLog, Size: m.st.LogSize(), Root: m.st.LogRoot(), State: hash[:]}
	c.Marks.hashed(h, a.e.now().Sub(began))
	origin := seenOrigin(st, cosigned.ClusterLog, 0)
	size, root, err := c.Seen.Get(origin)
	if err != nil {
		return err
	}
	switch {
	case size > h.Size:
		err = errRolledBack(cosigned.ClusterLog, size, h.Size)
	case size == h.Size && !bytes.Equal(root, h.Root):
		err = errForked(cosigned.ClusterLog, size)
	case size > 0 && size < h.Size:
		if p, perr := tlog.Consistency(c.Cluster, size, h.Size); perr == nil && tlog.VerifyConsistency(size, h.Size, p, root, h.Root) != nil {
			err = errForked(cosigned.ClusterLog, size)
		} // else a log with gaps: this node took it over in a snapshot, which it had verified
	}
	if a.e.alarm(cosigned.ClusterLog, err) != nil {
		return err
	}
	if err := c.Seen.Put(origin, h.Size, h.Root); err != nil {
		return err
	}
	if err := a.submitCosign(ctx, st, state.Cosign{Log: cosigned.ClusterLog, Size: h.Size, Root: h.Root, State: h.State}); err != nil && kms.KindOf(err) != kms.Exists {
		return err
	}
	c.Marks.done(h.Size)
	return nil
}
