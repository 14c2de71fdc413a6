package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/kms"
)

// removedFile says in a data directory that its node was removed.
const removedFile = "removed"

// leave ends a node that was removed, some time after it has learnt of it: first it
// hands over the lead, and lets the others know that the removal is committed.
func (n *Node) leave(ctx context.Context, since time.Duration) {
	if n.raft.State() == raft.Leader {
		_ = n.TransferLeadership(ctx) // again at the next tick
		if since < 10*n.cfg.Timing.Heartbeat {
			return
		}
	}
	if since < 2*n.cfg.Timing.Heartbeat {
		return
	}
	old, _ := n.State().Removal(n.cfg.NodeID)
	n.giveUp(old.Proposal, "")
}

// giveUp ends a node that was removed, for good. said is whose word that is, "" if its own log says it.
func (n *Node) giveUp(proposal, said string) {
	if err := writeFile(n.dir.file(removedFile), []byte(proposal+said+"\n")); err != nil {
		n.cfg.Logger.Warn("cannot record that this node was removed", "error", err)
	}
	n.machine.halt(errRemoved(n.cfg.NodeID, proposal+said))
}

// farewells are what other nodes have answered instead of taking part with this one: that
// it was removed. A node that was off at its removal learns of it in no other way, for nobody sends it the log.
type farewells struct {
	mu   sync.Mutex
	from map[string]string // peer to proposal
}

// add notes an answer; first is false if the peer has said it before.
func (f *farewells) add(peer, proposal string) (first bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.from == nil {
		f.from = map[string]string{}
	}
	_, known := f.from[peer]
	f.from[peer] = proposal
	return !known
}

// enough returns the voters that have said it if they are a majority of all.
func (f *farewells) enough(voters []string) []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var said []string
	for _, v := range voters {
		if _, ok := f.from[v]; ok {
			said = append(said, v)
		}
	}
	if len(said) <= len(voters)/2 {
		return nil
	}
	return said
}

// dismissed takes a peer's answer that this node was removed. Any single node can say that.
// Where a majority of the voters in this node's own log says so, nobody is left with whom it could
// elect or follow a leader, whether they are right or not: so it loses nothing by believing it.
func (n *Node) dismissed(peer, proposal string) {
	proposal = fmt.Sprintf("%.32q", proposal)
	if n.farewells.add(peer, proposal) {
		n.cfg.Logger.Warn("another node says that this node was removed from the cluster", "peer", peer, "proposal", proposal)
	}
	if !n.running() {
		return // it is asked again
	}
	said := n.farewells.enough(votersIn(n.raft.GetConfiguration().Configuration()))
	if said != nil {
		n.giveUp(proposal, fmt.Sprintf(" (so say %s, a majority of the voters that it knows)", strings.Join(said, ", ")))
	}
}

// votersIn lists the voters of Raft's list.
func votersIn(c raft.Configuration) (ids []string) {
	for _, s := range c.Servers {
		if s.Suffrage == raft.Voter {
			ids = append(ids, string(s.ID))
		}
	}
	slices.Sort(ids)
	return ids
}

func errRemoved(node, proposal string) error {
	return &kms.Error{Kind: kms.Conflict, Msg: fmt.Sprintf("node %s was removed from the cluster by proposal %s and takes no further part", node, proposal),
		Fix: "to use the machine again, set it up under a new node id with an empty data directory, and have it join"}
}

// checkNotRemoved refuses the directory of a node that was removed.
func checkNotRemoved(d *dataDir) error {
	b, err := os.ReadFile(d.file(removedFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return errRemoved(d.id.Node, strings.TrimSpace(fmt.Sprintf("%.1000s", b)))
}
