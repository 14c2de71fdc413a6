package cluster_test

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/cluster/clustertest"
)

// valve holds what passes a connection in one direction.
type valve struct {
	mu     sync.Mutex
	opened *sync.Cond
	shut   bool
	held   int // that wait
}

func newValve() *valve {
	v := &valve{}
	v.opened = sync.NewCond(&v.mu)
	return v
}

func (v *valve) pass() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.held++
	for v.shut {
		v.opened.Wait()
	}
	v.held--
}

func (v *valve) set(shut bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.shut = shut
	v.opened.Broadcast()
}

func (v *valve) waiting() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.held
}

// valved is a connection as its dialler has it.
type valved struct {
	net.Conn
	in, out *valve
}

// Read implements net.Conn. What was read is held, as in the memory of a frozen process.
func (c valved) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err == nil {
		c.in.pass()
	}
	return n, err
}

// Write implements net.Conn.
func (c valved) Write(b []byte) (int, error) {
	c.out.pass()
	return c.Conn.Write(b)
}

// frozen is a cluster whose first member leads, with valves on its wires.
type frozen struct {
	*clustertest.Cluster
	in, out *valve // what the others answer it, and what it asks them
	toIt    *valve // what they ask it
}

func (f *frozen) open() {
	for _, v := range []*valve{f.in, f.out, f.toIt} {
		v.set(false)
	}
}

func newFrozen(t *testing.T) *frozen {
	t.Helper()
	f := &frozen{in: newValve(), out: newValve(), toIt: newValve()}
	var address string // of the first member
	f.Cluster = clustertest.New(t, clustertest.Options{Config: func(i int, cfg *cluster.Config) {
		dial := cfg.Dial
		if i == 0 { // it does not give up the lead by itself meanwhile
			address = cfg.Listen
			cfg.Timing.Heartbeat, cfg.Timing.Lease, cfg.Timing.Election = clustertest.Patience, clustertest.Patience/2, clustertest.Patience/2
			cfg.Timing.RPC = clustertest.Patience
		}
		cfg.Dial = func(ctx context.Context, to string) (net.Conn, error) {
			conn, err := dial(ctx, to)
			switch {
			case err != nil:
				return nil, err
			case i == 0:
				return valved{conn, f.in, f.out}, nil
			case to == address:
				return valved{conn, newValve(), f.toIt}, nil
			}
			return conn, nil
		}
	}})
	t.Cleanup(f.open) // before the cluster closes
	f.Until("the first leads", func() bool {
		leader := f.Leader()
		if leader != 0 {
			_ = f.Node(leader).TransferTo(t.Context(), f.Members[0].ID) // again, if it was not in time
		}
		return leader == 0
	})
	f.SameState(f.Propose(0, f.Tick(0)).Index)
	if err := f.Node(0).Barrier(t.Context()); err != nil {
		t.Fatal(err)
	}
	return f
}

// A leader does not see the answers to its messages for a while, as when its process is frozen, and
// is replaced. When the answers reach it at last, Raft takes them for the proof
// that it still leads. They prove nothing of the time since.
func TestAnswersOfBefore(t *testing.T) {
	t.Parallel()
	f := newFrozen(t)
	c, old := f.Cluster, f.Node(0)
	f.in.set(true)
	f.toIt.set(true)
	c.Until("answers lie there", func() bool { return f.in.waiting() >= 2 }) // of two nodes, to what an idle leader sends all the time
	f.out.set(true)
	c.Until("another leader", func() bool {
		return c.Node(1).Status().State == "leader" || c.Node(2).Status().State == "leader"
	})
	now := c.Propose(1, c.Tick(1))
	replaced := time.Now()
	honest := make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), clustertest.Patience)
	defer cancel()
	go func() { honest <- old.Barrier(ctx) }()
	fooled := old.VerifyLeader()
	for range 40 { // Raft takes its channels by lot: then it has seen to the verification, too
		old.Append(c.Tick(0))
	}
	f.in.set(false)
	if err := fooled.Error(); err != nil {
		t.Fatalf("the answers do not reach Raft as they should here: %v", err)
	}
	released := time.Now() // a proof by those answers would be there at once
	c.Until("the time to prove it", func() bool {
		select {
		case err := <-honest:
			t.Fatalf("a barrier at the old leader ended: %v", err)
		default:
		}
		if since, f := time.Since(replaced), old.Fresh(); f < since {
			t.Fatalf("the old leader was replaced %v ago and thinks that what it has is %v old", since, f)
		}
		return time.Since(released) > time.Second
	})
	if at := old.State().Index(); at >= now.Index {
		t.Fatalf("the old leader has applied %d", at)
	}
	f.open()
	if err := <-honest; err != nil {
		t.Errorf("a barrier at the node when it is back: %v", err)
	} else if at := old.State().Index(); at < now.Index {
		t.Errorf("after the barrier it is at %d, not %d", at, now.Index)
	}
}
