package cluster_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/cluster/clustertest"
	"github.com/conclave-kms/conclave/kms"
)

// rollback is a cluster of which a member's disk is kept as it was, for later.
type rollback struct {
	*clustertest.Cluster
	t   *testing.T
	old string
}

// keep stops a member and keeps its disk, then has the cluster go on.
func (r *rollback) keep(members ...int) {
	r.t.Helper()
	r.old = r.t.TempDir()
	r.SameState(r.Propose(members[0], r.Tick(members[0])).Index)
	for _, i := range members {
		r.Kill(i)
		copyDir(r.t, r.Members[i].Dir, filepath.Join(r.old, r.Members[i].ID))
	}
	for _, i := range members {
		r.Restart(i)
	}
	for range 5 {
		r.SameState(r.Propose(members[0], r.Tick(members[0])).Index)
	}
	for _, i := range members {
		r.Until("the others know what the member has promised", func() bool {
			for _, j := range r.Running() {
				if j != i && !r.Node(j).Keeps(r.Node(i)) {
					return false
				}
			}
			return true
		})
	}
}

// putBack gives stopped members their old disks.
func (r *rollback) putBack(members ...int) {
	r.t.Helper()
	for _, i := range members {
		if err := os.RemoveAll(r.Members[i].Dir); err != nil {
			r.t.Fatal(err)
		}
		copyDir(r.t, filepath.Join(r.old, r.Members[i].ID), r.Members[i].Dir)
	}
}

func copyDir(t *testing.T, from, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(to, func(path string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() {
			return os.Chmod(path, 0o700)
		}
		return os.Chmod(path, 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// servesNothing checks that a member on probation says so and takes no work.
func (r *rollback) servesNothing(i int) {
	r.t.Helper()
	n := r.Node(i)
	if err := n.Probation(); !errors.Is(err, kms.Unavailable) {
		r.t.Fatalf("node %s is not on probation: %v", r.Members[i].ID, err)
	}
	ctx, cancel := context.WithTimeout(r.t.Context(), clustertest.Timing().Heartbeat)
	defer cancel()
	if _, err := n.Propose(ctx, r.Tick(i)); !errors.Is(err, kms.Unavailable) {
		r.t.Errorf("a proposal to a node on probation: %v", err)
	}
	if err := n.Barrier(ctx); !errors.Is(err, kms.Unavailable) {
		r.t.Errorf("a barrier at a node on probation: %v", err)
	}
	if s := n.Status(); s.Fresh < clustertest.Patience || s.Probation == "" {
		r.t.Errorf("the status of a node on probation: %+v", s)
	}
}

func (r *rollback) goesOn(i int) {
	r.t.Helper()
	r.Until("the end of the probation", func() bool { return r.Node(i).Probation() == nil })
	r.Until("proof that it is up to date", func() bool { return r.Node(i).Fresh() < clustertest.Patience })
	r.SameState(r.Propose(i, r.Tick(i)).Index)
}

// A node whose disk was put back does not help to elect a leader that may lack what it
// had stored, and serves nothing; when it has caught up it does both again.
func TestRolledBackNode(t *testing.T) {
	r := &rollback{Cluster: clustertest.New(t, clustertest.Options{}), t: t}
	leader := r.Leader()
	i := r.Follower()
	third := 3 - leader - i
	r.keep(i)
	if leader = r.Leader(); leader == i {
		t.Fatal("the member that was restarted leads at once")
	}
	r.Kill(leader)
	r.Kill(i)
	if leader == third {
		third = 3 - leader - i
	}
	r.putBack(i)
	r.Restart(i)
	r.servesNothing(i)
	refused := r.Node(i).RefusedCalls()
	r.Until("attempts at an election without the third node", func() bool { return r.Node(i).RefusedCalls() >= refused+4 })
	if s := r.Node(third).Status(); s.State == "leader" {
		t.Fatalf("node %s was elected by a node that had forgotten its promises", s.Node)
	}
	r.servesNothing(i)

	r.Restart(leader)
	r.goesOn(i)
	// It votes again: without it there is no majority now.
	r.Kill(leader)
	r.Leader() // a proposal that meets the death itself may be kms.Unknown
	r.SameState(r.Propose(i, r.Tick(i)).Index)
}

// When all nodes start at once the one whose disk was put back learns it from the
// others' disks, also when it has begun before it could ask them.
func TestRolledBackNodeAmongStartingOnes(t *testing.T) {
	r := &rollback{Cluster: clustertest.New(t, clustertest.Options{}), t: t}
	i := r.Follower()
	r.keep(i)
	r.Until("the promises are on the others' disks", func() bool {
		for _, j := range r.Running() {
			if j != i && !r.Node(j).KeepsOnDisk(r.Node(i)) {
				return false
			}
		}
		return true
	})
	for j := range r.Members {
		r.Kill(j)
	}
	r.putBack(i)
	n := r.Restart(i) // alone: nobody can tell it anything
	if n.Probation() != nil {
		t.Fatal("it knows without having asked anybody")
	}
	for j := range r.Members {
		if j != i {
			r.Restart(j)
		}
	}
	select {
	case err := <-n.Done():
		if !errors.Is(err, cluster.ErrRolledBack) {
			t.Fatalf("what it was told came to: %v", err)
		}
	case <-time.After(clustertest.Patience):
		t.Fatal("it goes on")
	}
	if n.State().Index() != 0 {
		t.Errorf("it had applied %d entries before it knew", n.State().Index())
	}
	r.Kill(i)
	r.Restart(i)
	r.goesOn(i)
}

// device is a counter that survives its node's disk.
type device struct {
	mu sync.Mutex
	n  uint64
}

func (d *device) Count(context.Context) (uint64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.n, nil
}

func (d *device) Increment(context.Context) (uint64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.n++
	return d.n, nil
}

func (d *device) value() uint64 {
	v, _ := d.Count(context.Background())
	return v
}

// When all disks were put back, a node with a counter in its device does not go along,
// until the custodians have approved it.
func TestRolledBackCluster(t *testing.T) {
	counting, d := 0, &device{}
	r := &rollback{t: t, Cluster: clustertest.New(t, clustertest.Options{Config: func(member int, c *cluster.Config) {
		if member == counting {
			c.Counter = d
		}
	}})}
	counts := func(from uint64) {
		t.Helper()
		r.Until("the device counts", func() bool { return d.value() > from })
	}
	counts(0)
	r.keep(0, 1, 2)
	counts(1)
	for j := range r.Members {
		r.Kill(j)
	}
	r.putBack(0, 1, 2)
	for j := range r.Members {
		r.Restart(j)
	}
	r.servesNothing(counting)
	for j := range r.Members { // the others cannot know
		if j != counting {
			r.SameStateOf(r.Propose(j, r.Tick(j)).Index, 3-counting-j, j)
		}
	}
	r.servesNothing(counting)
	before := d.value()
	r.Kill(counting)
	if err := cluster.AcceptRollback(r.Members[counting].Dir); err != nil {
		t.Fatal(err)
	}
	r.Restart(counting)
	r.goesOn(counting)
	counts(before)

	// Approved once is not approved for ever.
	r.Until("the approval is used up", func() bool {
		_, err := os.Stat(filepath.Join(r.Members[counting].Dir, "accepted"))
		return errors.Is(err, os.ErrNotExist)
	})
	r.Until("the others know of it", func() bool { return r.Node(1).Keeps(r.Node(0)) && r.Node(2).Keeps(r.Node(0)) })
	r.Kill(counting)
	r.putBack(counting)
	r.Restart(counting)
	// The others remember what it had promised since: it comes back by itself.
	r.goesOn(counting)
}

// A machine that was set up anew under the name of a node does not come back as that
// node: its hardware and its log may be anybody's.
func TestNodeSetUpAnew(t *testing.T) {
	r := &rollback{Cluster: clustertest.New(t, clustertest.Options{}), t: t}
	i := r.Follower()
	r.keep(i)
	r.Kill(i)
	if err := os.RemoveAll(r.Members[i].Dir); err != nil {
		t.Fatal(err)
	}
	n, err := cluster.Open(t.Context(), r.Config(i))
	if err == nil {
		t.Cleanup(func() { _ = n.Close() })
		select {
		case err = <-n.Done():
		case <-time.After(clustertest.Patience):
			t.Fatal("it goes on")
		}
		if n.State().Index() != 0 {
			t.Errorf("it had applied %d entries before it knew", n.State().Index())
		}
	}
	if !errors.Is(err, kms.Conflict) {
		t.Fatalf("it is refused with: %v", err)
	}
}
