package cluster

import (
	"bytes"
	"context"
	"encoding/hex"
	"log/slog"
	"sync"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
)

// keepHashes is how many of the latest hashes a node can answer for.
const keepHashes = 8

// hashes compares the states of the nodes. Whenever the cluster log's size is a
// multiple of every, each node hashes its state in the background and asks the
// voters for theirs at the same size. A node that differs from a majority of the voters
// halts; so do all if every voter has answered and no majority agrees. Other nodes are
// not asked: no site has a majority of the voters, but one could have it of all nodes,
// and stop everybody else with hashes that it made up.
type hashes struct {
	every   uint64
	work    chan *state.State
	compare func(ctx context.Context, size uint64, own []byte) error
	halt    func(error)
	log     *slog.Logger

	mu    sync.Mutex
	known map[uint64][]byte // by log size
	order []uint64
}

// offer queues the state for hashing if its log size is a designated one. It
// never blocks: a node that lags with hashing skips one.
func (h *hashes) offer(st *state.State) {
	if st.LogSize()%h.every != 0 {
		return
	}
	select {
	case h.work <- st:
	default:
	}
}

// run hashes and compares until ctx ends.
func (h *hashes) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case st := <-h.work:
			sum := st.Hash()
			h.remember(st.LogSize(), sum[:])
			if err := h.compare(ctx, st.LogSize(), sum[:]); err != nil {
				h.log.Error("the states of the nodes differ", "error", err)
				h.halt(err)
				return
			}
		}
	}
}

func (h *hashes) remember(size uint64, sum []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.known[size] = sum
	h.order = append(h.order, size)
	if len(h.order) > keepHashes {
		delete(h.known, h.order[0])
		h.order = h.order[1:]
	}
}

// at returns the hash at a log size, nil if it is not known.
func (h *hashes) at(size uint64) []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.known[size]
}

// judge decides on the hashes collected from other voters. voters counts all of them,
// this node included if it votes. It returns an error if this node must halt.
func judge(size uint64, voters int, votes bool, own []byte, others map[string][]byte) error {
	counts, rest := map[string]int{}, voters
	if votes {
		counts[string(own)], rest = 1, voters-1
	}
	var differ string
	for id, sum := range others {
		counts[string(sum)]++
		if !bytes.Equal(sum, own) {
			differ = id
		}
	}
	if differ == "" || counts[string(own)]*2 > voters {
		return nil
	}
	majority := false
	for _, c := range counts {
		majority = majority || c*2 > voters
	}
	if !majority && len(others) < rest {
		return nil // undecided: the missing ones may settle it at the next comparison
	}
	return kms.Errorf(kms.Internal, "the state of this node at log size %d (hash %s) differs from that of node %s and others (%s); "+
		"keep its data directory for examination and set the node up anew", size, hex.EncodeToString(own[:8]), differ, hex.EncodeToString(others[differ][:8]))
}

// compareHashes collects the hashes of the other voters and judges them. Nodes
// that are behind are asked again a few times.
func (n *Node) compareHashes(ctx context.Context, size uint64, own []byte) error {
	var ask []string
	votes := false
	for _, m := range n.State().Members() {
		switch {
		case m.ID == n.cfg.NodeID:
			votes = m.Voter
		case m.Voter:
			ask = append(ask, m.ID)
		}
	}
	voters := len(ask)
	if votes {
		voters++
	}
	others := map[string][]byte{}
	for range 5 {
		for _, peer := range ask {
			if others[peer] != nil {
				continue
			}
			if sum := n.askHash(ctx, peer, size); len(sum) == len(own) {
				others[peer] = sum
			}
		}
		if err := judge(size, voters, votes, own, others); err != nil || len(others) == len(ask) {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(n.cfg.Timing.Heartbeat):
		}
	}
	return nil
}

// askHash returns a peer's hash at a log size, nil if it has none or cannot be asked.
func (n *Node) askHash(ctx context.Context, peer string, size uint64) []byte {
	ctx, cancel := context.WithTimeout(ctx, n.cfg.Timing.RPC)
	defer cancel()
	resp, _, err := n.wire.call(ctx, peer, n.cfg.Timing.RPC, request{Op: opHash, Size: size})
	if err != nil || resp.Status != statusOK {
		return nil
	}
	return resp.Hash
}
