package cluster

import (
	"fmt"
	"time"

	"github.com/conclave-kms/conclave/kms"
)

// A recovery begins a new epoch of the cluster, from a backup that custodians have
// approved. The logs of two epochs must never mix: nodes that hold the data of
// different ones do not exchange a byte of Raft, and the terms of a later epoch are
// above all of an earlier one.

// epochTerm returns the Raft term with which an epoch begins. Terms count elections,
// so none reaches that of the next epoch.
func epochTerm(epoch uint64) uint64 { return epoch << 32 }

// protocols are the names by which a node speaks to others of its own epoch. Those
// of epoch 0 have no suffix; as a second name of the forward protocol that one is
// for the greeting alone, by which nodes of different epochs learn of each other.
type protocols struct {
	epoch         uint64
	raft, forward string
}

func (id identity) protocols() protocols {
	p := protocols{epoch: id.Epoch, raft: protoRaft, forward: protoForward}
	if id.Epoch > 0 {
		suffix := fmt.Sprintf("/e%d-%s", id.Epoch, id.Lineage)
		p.raft += suffix
		p.forward += suffix
	}
	return p
}

// offer lists what the calling side offers for a protocol.
func (p protocols) offer(proto string) []string {
	if proto == p.forward && p.forward != protoForward {
		return []string{proto, protoForward}
	}
	return []string{proto}
}

// accept lists what the accepting side takes.
func (p protocols) accept() []string {
	return append([]string{p.raft}, p.offer(p.forward)...)
}

// speaksForward reports whether a protocol begins with a greeting.
func (p protocols) speaksForward(proto string) bool {
	return proto == p.forward || proto == protoForward
}

// proto returns the protocol that was agreed on.
func (c *nodeConn) proto() string { return c.ConnectionState().NegotiatedProtocol }

func (d *dataDir) protocols() protocols { return d.id.protocols() }

// lineage is that of the history that the data is of.
func (d *dataDir) lineage() string {
	if d.id.Epoch == 0 {
		return d.id.Cluster
	}
	return d.id.Lineage
}

// greeting is this node's.
func (n *Node) greeting() greeting {
	st := n.State()
	g := greeting{Node: n.cfg.NodeID, Cluster: st.Cluster(), Epoch: n.dir.id.Epoch}
	if r, ok := st.Recovered(); ok && r.Epoch == g.Epoch {
		g.Recovery = r.Approved
	}
	return g
}

// greet sends a greeting and no more.
func greet(c *nodeConn, g greeting) {
	_ = c.SetWriteDeadline(time.Now().Add(writeTimeout))
	_ = writeFrame(c, g) // the peer sees that nothing comes
	_ = c.CloseWrite()
	_ = c.SetReadDeadline(time.Now().Add(handshakeTimeout))
	_, _ = c.Read(make([]byte, 1)) // until the peer has read it and hung up
}

// foreign takes the greeting of a peer of another epoch. A node whose own custodians
// have approved that the cluster goes on in a later epoch stops: what it holds is
// history, and with another node of its kind it could go on with that. It does not
// take a peer's word for it.
func (n *Node) foreign(peer string, g greeting) {
	if g.Cluster != n.State().Cluster() || g.Epoch <= n.dir.id.Epoch {
		n.otherEpoch(peer, g.Epoch, nil)
		return
	}
	epoch, err := n.State().Superseded(g.Recovery)
	if err != nil || epoch != g.Epoch {
		n.otherEpoch(peer, g.Epoch, err)
		return
	}
	n.machine.halt(kms.Errorf(kms.Conflict, "custodians have approved that the cluster goes on in epoch %d, as node %s shows; this node's data is of epoch %d and is not part of that any more: "+
		"set it up from the backup and the recover statement of that epoch with conclaved recover, or remove it from the cluster", epoch, peer, n.dir.id.Epoch))
}

func (n *Node) otherEpoch(peer string, epoch uint64, err error) {
	if _, told := n.told.LoadOrStore(fmt.Sprintf("%s %d", peer, epoch), true); !told {
		log := n.cfg.Logger.With("peer", peer, "epoch", epoch, "own", n.dir.id.Epoch)
		if err != nil {
			log = log.With("error", err)
		}
		log.Warn("a node is in another epoch of the cluster, no messages are exchanged with it")
	}
}
