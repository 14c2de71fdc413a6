package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/conclave-kms/conclave/kms"
)

// Profile chooses the periods of Timing that depend on the distance between the
// nodes: Heartbeat, Election and Lease.
type Profile string

// The profiles. They are chosen when the node starts and stay until it stops.
const (
	// LAN suits round trips up to MaxRTT: heartbeat 1 s.
	LAN Profile = "lan"
	// WAN suits round trips up to MaxRTT: heartbeat 3 s. A leader that dies is
	// replaced later than with LAN.
	WAN Profile = "wan"
	// Auto takes LAN or WAN by the round trips to the other nodes, as measured at the start. Those that
	// do not answer then count as they did when this node ran last. If nothing is
	// known it is WAN, which works at any distance that LAN works at.
	Auto Profile = "auto"
)

// MaxRTT is the longest round trip between voters that the profile suits.
func (p Profile) MaxRTT() time.Duration {
	if p == LAN {
		return 100 * time.Millisecond
	}
	return 300 * time.Millisecond
}

// heartbeat is the profile's period; ten round trips.
func (p Profile) heartbeat() time.Duration { return 10 * p.MaxRTT() }

// apply sets the periods that are not given.
func (p Profile) apply(t Timing) Timing {
	if t.Heartbeat == 0 {
		t.Heartbeat = p.heartbeat()
	}
	return t.withDefaults()
}

// ParseProfile returns the profile of a name. Error: kms.Invalid.
func ParseProfile(s string) (Profile, error) {
	switch p := Profile(s); p {
	case LAN, WAN, Auto:
		return p, nil
	}
	return "", kms.Errorf(kms.Invalid, "profile %q is none of lan, wan, auto", s)
}

// suitable returns the profile for a longest round trip.
func suitable(rtt time.Duration) Profile {
	if rtt <= LAN.MaxRTT() {
		return LAN
	}
	return WAN
}

// Limits of the measurement at the start.
const (
	measureAll  = 3 * time.Second // waiting for every voter of the genesis
	measureMost = time.Second     // when a majority has answered
	measures    = 3               // round trips to each; the shortest counts
)

// chooseProfile settles the profile, and with it the timing, before Raft starts.
func (n *Node) chooseProfile(ctx context.Context) {
	if n.cfg.Profile != Auto {
		n.profile = n.cfg.Profile
		return
	}
	known := n.recallRTT()
	for id, rtt := range n.measure(ctx) {
		known[id] = rtt
	}
	var worst time.Duration
	for _, rtt := range known {
		worst = max(worst, rtt)
	}
	n.profile = WAN
	if len(known) > 0 {
		n.profile = suitable(worst)
	}
	n.cfg.Timing = n.profile.apply(n.cfg.given)
	n.cfg.Logger.Info("timing profile chosen", "profile", string(n.profile), "longest_rtt", worst, "nodes_measured", len(known),
		"heartbeat", n.cfg.Timing.Heartbeat)
	n.keepRTT(known)
}

// measure returns the round trips to the voters that answer now.
func (n *Node) measure(ctx context.Context) map[string]time.Duration {
	ctx, cancel := context.WithTimeout(ctx, measureAll)
	defer cancel()
	type measured struct {
		id  string
		rtt time.Duration
	}
	var asked int
	answers := make(chan measured)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for _, peer := range n.State().Nodes() {
		if peer.ID == n.cfg.NodeID || !peer.Voter {
			continue
		}
		asked++
		wg.Go(func() {
			if rtt, ok := n.roundTrip(ctx, peer.ID); ok {
				select {
				case answers <- measured{peer.ID, rtt}:
				case <-ctx.Done():
				}
			}
		})
	}
	found := map[string]time.Duration{}
	enough := time.After(measureMost)
	waited := false
	for len(found) < asked && !(waited && len(found) > asked/2) {
		select {
		case m := <-answers:
			found[m.id] = m.rtt
		case <-enough:
			waited = true
		case <-ctx.Done():
			return found
		}
	}
	return found
}

// roundTrip measures a peer until it has answered or ctx ends.
func (n *Node) roundTrip(ctx context.Context, peer string) (time.Duration, bool) {
	best, count := time.Duration(0), 0
	for count < measures {
		p, err := n.ping(ctx, peer)
		if err == nil {
			if count++; best == 0 || p.rtt < best {
				best = p.rtt
			}
			continue
		}
		select { // it starts, perhaps
		case <-ctx.Done():
			return best, count > 0
		case <-time.After(100 * time.Millisecond):
		}
	}
	return best, true
}

// rttFile keeps the round trips of the last run for the next start.
const rttFile = "rtt.json"

type storedRTT struct {
	Format int                `json:"format"`
	Millis map[string]float64 `json:"rtt_ms"` // by node
}

// recallRTT returns what the last run has measured. A file that cannot be read is
// as good as none: it only spares waiting for a better profile.
func (n *Node) recallRTT() map[string]time.Duration {
	found := map[string]time.Duration{}
	b, err := os.ReadFile(n.dir.file(rttFile))
	var s storedRTT
	if err != nil || json.Unmarshal(b, &s) != nil || s.Format != 1 {
		return found
	}
	for id, ms := range s.Millis {
		if _, ok := n.State().Node(id); ok && ms > 0 && ms < 60_000 {
			found[id] = time.Duration(ms * float64(time.Millisecond))
		}
	}
	return found
}

func (n *Node) keepRTT(known map[string]time.Duration) {
	s := storedRTT{Format: 1, Millis: map[string]float64{}}
	for id, rtt := range known {
		s.Millis[id] = float64(rtt.Round(10*time.Microsecond)) / float64(time.Millisecond)
	}
	b, err := json.MarshalIndent(s, "", "  ")
	if err == nil {
		err = writeFile(n.dir.file(rttFile), append(b, '\n'))
	}
	if err != nil {
		n.cfg.Logger.Warn("cannot keep the measured round trips for the next start", "error", err)
	}
}

// checkProfile compares the profile in force with what the round trips call for, and says so once
// if it does not suit. It keeps the round trips for the next start.
func (n *Node) checkProfile() {
	rtts := n.peers.rtts()
	if len(rtts) == 0 {
		return
	}
	var worst time.Duration
	for id, rtt := range rtts {
		if p, ok := n.State().Node(id); ok && p.Voter {
			worst = max(worst, rtt)
		}
	}
	wanted := suitable(worst)
	if last := n.peers.wanted.Swap(&wanted); last != nil && *last == wanted {
		return
	}
	n.keepRTT(rtts)
	limit := n.cfg.Timing.Heartbeat / 10
	if worst > limit*3/2 { // there is some slack
		n.cfg.Logger.Warn("the other nodes are too far away for this node's timing: elections may come for no reason",
			"longest_rtt", worst, "suits_up_to", limit, "profile", string(n.profile), "fix", fixProfile(n.profile, wanted))
	}
}

func fixProfile(now, wanted Profile) string {
	switch {
	case now == Auto || now == wanted:
		return "set cluster.heartbeat to ten times the round trip and restart the nodes one by one"
	case now == "":
		return fmt.Sprintf("set cluster.profile to %q in place of cluster.heartbeat and restart the nodes one by one", wanted)
	}
	return fmt.Sprintf("with cluster.profile %q the next start takes %q: restart the nodes one by one", Auto, wanted)
}
