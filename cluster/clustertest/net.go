package clustertest

import (
	"context"
	"net"
	"sync"
)

// network is the wire between the members. A member that is cut off loses what it
// sends and what is sent to it, as behind a broken cable: nothing is refused,
// nothing arrives.
type network struct {
	delays *delays // nil: none

	mu    sync.Mutex
	cut   map[string]bool // addresses of members
	conns map[*wire]struct{}
}

// wire is a connection between two members, as its dialler has it.
type wire struct {
	net.Conn
	network  *network
	from, to string
}

func (n *network) isCut(from, to string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.cut[from] || n.cut[to]
}

// dialFrom returns the dialler of the member with address from.
func (n *network) dialFrom(from string) func(ctx context.Context, address string) (net.Conn, error) {
	return func(ctx context.Context, to string) (net.Conn, error) {
		if n.isCut(from, to) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		c, err := n.delays.dial(ctx, from, to)
		if err != nil {
			return nil, err
		}
		w := &wire{Conn: c, network: n, from: from, to: to}
		n.mu.Lock()
		defer n.mu.Unlock()
		n.conns[w] = struct{}{}
		return w, nil
	}
}

// Write implements net.Conn.
func (w *wire) Write(b []byte) (int, error) {
	if w.network.isCut(w.from, w.to) {
		return len(b), nil
	}
	return w.Conn.Write(b)
}

// Read implements net.Conn.
func (w *wire) Read(b []byte) (int, error) {
	for {
		n, err := w.Conn.Read(b)
		if err != nil || !w.network.isCut(w.from, w.to) {
			return n, err
		}
	}
}

// Close implements net.Conn.
func (w *wire) Close() error {
	w.network.mu.Lock()
	delete(w.network.conns, w)
	w.network.mu.Unlock()
	return w.Conn.Close()
}

// set cuts a member off or heals it. Healing breaks the connections that have
// lost something.
func (n *network) set(address string, cut bool) {
	n.mu.Lock()
	n.cut[address] = cut
	var lossy []*wire
	for w := range n.conns {
		if !cut && (w.from == address || w.to == address) {
			lossy = append(lossy, w)
		}
	}
	n.mu.Unlock()
	for _, w := range lossy {
		_ = w.Close()
	}
}

// Cut cuts a member off from the others until Heal. It runs on.
func (c *Cluster) Cut(i int) { c.network.set(c.Members[i].Address, true) }

// Heal ends Cut.
func (c *Cluster) Heal(i int) { c.network.set(c.Members[i].Address, false) }
