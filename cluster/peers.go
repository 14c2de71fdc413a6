package cluster

import (
	"context"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
)

// pingInfo is what a node tells of itself when it is pinged.
type pingInfo struct {
	Applied  uint64   `cbor:"applied"` // index of the last entry applied, Raft's own included
	Fresh    int64    `cbor:"fresh"`   // age in nanoseconds of the proof that it is up to date; the largest there is for none
	Leads    bool     `cbor:"leads"`
	ReadOnly bool     `cbor:"read_only"`
	Prefer   []string `cbor:"prefer"` // sites by which it wants the cluster led, the first best
}

// pong is an answered ping.
type pong struct {
	pingInfo
	rtt time.Duration
	at  time.Time
	lag uint64 // entries committed here, as far as is known, that the peer had not applied
}

// keepRTTs is how many round trips with a peer make up its RTT, their median: one
// that was held up by a lost segment says nothing about the distance.
const keepRTTs = 15

// peers is what a node knows of the others from pinging them.
type peers struct {
	mu   sync.Mutex
	seen map[string]*peerSeen

	wanted atomic.Pointer[Profile] // what the round trips called for last
}

type peerSeen struct {
	asking bool
	last   pong
	rtts   []time.Duration // latest last
}

func newPeers() *peers { return &peers{seen: map[string]*peerSeen{}} }

// begin notes that a peer is being asked; false if it already is.
func (p *peers) begin(id string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	s, ok := p.seen[id]
	if !ok {
		s = &peerSeen{}
		p.seen[id] = s
	}
	was := s.asking
	s.asking = true
	return !was
}

// end notes the answer, nil for none.
func (p *peers) end(id string, answer *pong) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.seen[id]
	s.asking = false
	if answer == nil {
		return
	}
	s.last = *answer
	if len(s.rtts) == keepRTTs {
		s.rtts = s.rtts[1:]
	}
	s.rtts = append(s.rtts, answer.rtt)
}

// of returns the last answer of a peer, with the median of its round trips; false
// if there was none.
func (p *peers) of(id string) (pong, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s, ok := p.seen[id]
	if !ok || len(s.rtts) == 0 {
		return pong{}, false
	}
	a := s.last
	a.rtt = median(s.rtts)
	return a, true
}

// rtts returns the round trips to the peers that have answered often enough to tell.
func (p *peers) rtts() map[string]time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	m := map[string]time.Duration{}
	for id, s := range p.seen {
		if len(s.rtts) >= keepRTTs/2 {
			m[id] = median(s.rtts)
		}
	}
	return m
}

func median(l []time.Duration) time.Duration {
	l = slices.Sorted(slices.Values(l))
	return l[len(l)/2]
}

// ping asks a peer how it is. The round trip is longer if they have to connect first.
func (n *Node) ping(ctx context.Context, peer string) (pong, error) {
	start := time.Now()
	resp, _, err := n.wire.call(ctx, peer, n.cfg.Timing.dial(), request{Op: opPing})
	if err == nil {
		err = resp.err()
	}
	if err != nil {
		return pong{}, err
	}
	p := pong{rtt: time.Since(start), at: time.Now()}
	if err := canon.Unmarshal(resp.Info, &p.pingInfo); err != nil {
		return pong{}, kms.Wrap(kms.Invalid, err, "node "+peer+" answers a ping with something else", "")
	}
	return p, nil
}

// answerPing tells a peer about this node. Raft may not be running yet.
func (n *Node) answerPing() []byte {
	info := pingInfo{Fresh: math.MaxInt64, ReadOnly: n.readOnly.Load(), Prefer: n.cfg.PreferSites}
	if n.running() {
		info.Applied, info.Fresh, info.Leads = n.raft.AppliedIndex(), int64(n.Fresh()), n.raft.State() == raft.Leader
	}
	return canon.Marshal(info)
}

// pingLoop asks the other nodes once a heartbeat.
func (n *Node) pingLoop(ctx context.Context) {
	var asks sync.WaitGroup
	defer asks.Wait()
	tick := time.NewTicker(n.cfg.Timing.Heartbeat)
	defer tick.Stop()
	for {
		for _, peer := range n.State().Nodes() {
			if peer.ID == n.cfg.NodeID || !n.peers.begin(peer.ID) {
				continue
			}
			asks.Go(func() {
				ctx, cancel := context.WithTimeout(ctx, n.cfg.Timing.RPC)
				defer cancel()
				committed := n.raft.CommitIndex() // before the answer, so that the lag is not made up of what came meanwhile
				if p, err := n.ping(ctx, peer.ID); err == nil {
					p.lag = max(committed, p.Applied) - p.Applied
					n.peers.end(peer.ID, &p)
				} else {
					n.peers.end(peer.ID, nil)
				}
			})
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		n.checkProfile()
	}
}
