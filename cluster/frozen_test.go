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

// A leader does not see the answers to its messages for a while, as when its process is frozen, and
// is replaced. When the answers reach it at last, Raft takes them for the proof
// that it still leads. They prove nothing of the time since.
func TestAnswersOfBefore(t *testing.T) {
	in, out, toIt := newValve(), newValve(), newValve()
	open := func() {
		for _, v := range []*valve{in, out, toIt} {
			v.set(false)
		}
	}
	var address string // of the one that is frozen, the first member
	c := clustertest.New(t, clustertest.Options{Config: func(i int, cfg *cluster.Config) {
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
				return valved{conn, in, out}, nil
			case to == address:
				return valved{conn, newValve(), toIt}, nil
			}
			return conn, nil
		}
	}})
	t.Cleanup(open) // before the cluster closes
	c.Until("the first leads", func() bool {
		leader := c.Leader()
		if leader != 0 {
			_ = c.Node(leader).TransferTo(t.Context(), c.Members[0].ID) // again, if it was not in time
		}
		return leader == 0
	})
	old := c.Node(0)
	c.SameState(c.Propose(0, c.Tick(0)).Index)
	if err := old.Barrier(t.Context()); err != nil {
		t.Fatal(err)
	}

	in.set(true)
	toIt.set(true)
	c.Until("answers lie there", func() bool { return in.waiting() >= 2 }) // of two nodes, to what an idle leader sends all the time
	out.set(true)
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
	in.set(false)
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
	open()
	if err := <-honest; err != nil {
		t.Errorf("a barrier at the node when it is back: %v", err)
	} else if at := old.State().Index(); at < now.Index {
		t.Errorf("after the barrier it is at %d, not %d", at, now.Index)
	}
}
