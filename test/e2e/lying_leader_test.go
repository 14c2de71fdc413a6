package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	raftnode "github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/backup"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

// lying is the product with what a leader can do that holds its hand over the log: in the
// node of whose directory a file "lie" names it, for commands that other nodes forward. The
// limit of 30 s is 8 s here and nodes sign their time every second; nothing else differs.
//
//	swallow C    votes of the custodian C are taken and never proposed
//	forge C      votes of the custodian C are proposed with another byte
//	refuse N     commands of the node N are refused: this node does not lead
//	reorder      every second command waits, so that the next overtakes it
//	backdate S   the node's own commands carry times S seconds back
var lying = harness.Patch{
	"cluster/propose.go": {{
		Old: "	result, err := n.proposeHere(ctx, raw)\n",
		New: "	raw, err := lie(ctx, raw)\n	if err != nil {\n		return outcome{}, err\n	}\n	result, err := n.proposeHere(ctx, raw)\n",
	}},
	"cluster/lie.go": {{New: `package cluster

import (
	"bytes"
	"context"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
)

var forwarded atomic.Uint64

func lie(ctx context.Context, raw []byte) ([]byte, error) {
	b, _, err := state.Split(raw)
	var env state.Envelope
	if err != nil || canon.Unmarshal(b, &env) != nil {
		return raw, nil
	}
	votes := func(who string) bool { return env.Type == state.TypeVote && bytes.Contains(env.Payload, []byte(who)) }
	text, _ := os.ReadFile("lie")
	for line := range strings.Lines(string(text)) {
		switch what, who, _ := strings.Cut(strings.TrimSpace(line), " "); {
		case what == "swallow" && votes(who):
			<-ctx.Done()
			return nil, errUnknown
		case what == "forge" && votes(who):
			raw = bytes.Clone(raw)
			raw[len(raw)-1] ^= 1
		case what == "refuse" && env.Origin == who:
			return nil, errNotAppended
		case what == "reorder" && forwarded.Add(1)%2 == 1:
			time.Sleep(300 * time.Millisecond)
		}
	}
	return raw, nil
}
`}},
	"cmd/conclaved/run.go": {
		{Old: "n.engine, err = engine.New(engine.Config{", New: "n.engine, err = engine.New(engine.Config{Now: lyingClock,"},
		{Old: "engine.AgentConfig{Watch: n.cluster}", New: "engine.AgentConfig{Watch: n.cluster, Tick: time.Second}"},
		{Old: "Timing: n.cfg.Cluster.timing(),", New: "Timing: lyingTiming(n.cfg.Cluster.timing()),"},
	},
	"cmd/conclaved/lyingclock.go": {{New: `package main

import (
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/cluster"
)

func lyingTiming(t cluster.Timing) cluster.Timing {
	t.Suspect = 8 * time.Second
	return t
}

func lyingClock() time.Time {
	text, _ := os.ReadFile("lie")
	now := time.Now()
	for line := range strings.Lines(string(text)) {
		if s, ok := strings.CutPrefix(strings.TrimSpace(line), "backdate "); ok {
			seconds, _ := strconv.Atoi(s)
			now = now.Add(-time.Duration(seconds) * time.Second)
		}
	}
	return now
}
`}},
}

const lyingRing = "coalition"

// liars is a coalition of three whose leader may lie.
type liars struct {
	t *testing.T
	c *harness.Coalition
}

// TestLyingLeader has the leader forge, withhold, reorder and backdate, all at once. Nothing
// of it has an effect at any replica beyond what was signed; what is withheld or backdated for more than
// the limit the other nodes report, and when it ends the cluster is whole.
func TestLyingLeader(t *testing.T) {
	bin := binaries(t)
	program, err := lying.Build(t.Context(), filepath.Join(t.TempDir(), "lying"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := harness.Found(t.Context(), bin, t.TempDir(), harness.Plan{
		Nodes: map[string]int{"fr": 1, "de": 1, "jp": 1}, Cluster: map[string]any{"heartbeat": "3s"},
		Program: map[string]string{"fr-1": program, "de-1": program, "jp-1": program},
	})
	if err != nil {
		t.Fatal(err)
	}
	l := liars{t, c}
	stopped := false
	stop := func() {
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
		stopped = true
	}
	defer func() {
		if !stopped {
			stop()
		}
	}()
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err, c.Logs(10))
	}
	leader, err := c.Leader(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	others := c.Except(leader)
	l.found(leader)
	l.lies(leader, others[0], others[1])
	l.whole()
	stop()
	l.recorded(leader, others)
}

// client is that of a site's operator at one node, which makes one try.
func (l liars) client(n *harness.Node) *client.Client {
	l.t.Helper()
	cl, err := l.c.Client(n, "operator", 20*time.Second)
	if err != nil {
		l.t.Fatal(err)
	}
	return cl
}

// found makes a keyring and keys before anybody lies.
func (l liars) found(at *harness.Node) {
	l.t.Helper()
	_, err := l.client(at).CreateKeyring(l.t.Context(), wire.CreateKeyringRequest{Name: lyingRing, Residency: []string{"de", "fr", "jp"}, Policy: "keys"})
	if err != nil {
		l.t.Fatal(err)
	}
	for _, key := range []string{"swallowed", "forged"} {
		if _, err := l.client(at).CreateKey(l.t.Context(), lyingRing, wire.CreateKeyRequest{Name: key, Purpose: string(kms.Encrypt)}); err != nil {
			l.t.Fatal(err)
		}
	}
	l.same()
}

// same waits until all nodes have the same log.
func (l liars) same() {
	l.t.Helper()
	if _, err := l.c.SameLog(l.t.Context()); err != nil {
		l.t.Fatal(err)
	}
}

// lies has the leader swallow the votes of a custodian of a's site and forge those of
// another, refuse all that comes from b, reorder, and backdate what is its own.
func (l liars) lies(leader, a, b *harness.Node) {
	l.t.Helper()
	t := l.t
	swallowed, forged := l.propose(leader, "swallowed"), l.propose(leader, "forged")
	l.vote(leader, leader.Site+"-1", swallowed)
	l.vote(leader, leader.Site+"-1", forged)
	file := filepath.Join(leader.Dir, "lie")
	lies := fmt.Sprintf("swallow %s-1\nforge %s-2\nrefuse %s\nreorder\nbackdate 40\n", a.Site, a.Site, b.ID)
	if err := os.WriteFile(file, []byte(lies), 0o600); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	var votes sync.WaitGroup
	votes.Go(func() { l.votes(a, a.Site+"-1", swallowed, false) })
	votes.Go(func() { l.votes(a, a.Site+"-2", forged, false) })
	l.reordered(a)
	l.suspects(leader, began, a, raftnode.Withheld, a.ID, 2)
	l.suspects(leader, began, b, raftnode.Withheld, b.ID, 2)
	votes.Wait()
	for _, p := range []wire.Proposal{swallowed, forged} {
		now, err := l.client(leader).Proposal(t.Context(), p.ID)
		if err != nil || now.Progress != string(state.Open) || len(now.Votes) != 1 {
			t.Errorf("while the leader lies the proposal is %s with %d votes (%v)", now.Progress, len(now.Votes), err)
		}
	}
	// A node tells the leader's clock from its own by a third one's, so both must be heard.
	if err := os.WriteFile(file, []byte("backdate 40\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*harness.Node{a, b} {
		l.suspects(leader, began, n, raftnode.Backdated, leader.ID, 1)
	}
	if s, err := l.c.Status(t.Context(), leader); err != nil || s.Raft.Leader != leader.ID {
		t.Fatalf("%s does not lead any more, so it could not lie (%v)", leader.ID, err)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	l.votes(a, a.Site+"-1", swallowed, true)
	l.votes(a, a.Site+"-2", forged, true)
	for _, n := range l.c.Nodes {
		for _, key := range []string{"swallowed", "forged"} {
			l.rotated(n, key)
		}
	}
}

func (l liars) propose(at *harness.Node, key string) wire.Proposal {
	l.t.Helper()
	p, err := l.client(at).OpenProposal(l.t.Context(), wire.OpenProposalRequest{
		Action: string(kms.ActionRotate), Target: approval.KeyTarget(lyingRing, key), Reason: "a test",
	})
	if err != nil {
		l.t.Fatal(err)
	}
	return p
}

// vote gives an approval that must count.
func (l liars) vote(at *harness.Node, custodian string, p wire.Proposal) {
	l.t.Helper()
	l.votes(at, custodian, p, true)
}

// votes gives an approval that is to arrive, or not to.
func (l liars) votes(at *harness.Node, custodian string, p wire.Proposal, arrives bool) {
	l.t.Helper()
	k, err := l.c.Custodian(custodian)
	if err != nil {
		l.t.Error(err)
		return
	}
	defer k.Key.Destroy()
	st, err := k.Statement(approval.Approve, p)
	if err == nil {
		_, err = l.client(at).Vote(l.t.Context(), p.ID, wire.VoteRequest{Statement: st})
	}
	if arrives && err != nil {
		l.t.Errorf("the vote of %s: %v", custodian, err)
	} else if !arrives && !errors.Is(err, kms.Unknown) && !errors.Is(err, kms.Unavailable) {
		l.t.Errorf("the vote of %s, which the leader has not proposed as it was: %v", custodian, err)
	}
}

// reordered makes keys at once, and every second is overtaken: all are made once.
func (l liars) reordered(at *harness.Node) {
	l.t.Helper()
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			name := fmt.Sprintf("reordered-%d", i)
			if _, err := l.client(at).CreateKey(l.t.Context(), lyingRing, wire.CreateKeyRequest{Name: name, Purpose: string(kms.MAC)}); err != nil {
				l.t.Errorf("%s: %v", name, err)
			}
		})
	}
	wg.Wait()
}

// suspects waits until a node reports a suspicion against the leader.
func (l liars) suspects(leader *harness.Node, began time.Time, at *harness.Node, kind, origin string, count uint64) {
	l.t.Helper()
	err := harness.Within(l.t.Context(), 2*time.Minute, at.ID+" reports that commands of "+origin+" are "+kind, func(ctx context.Context) error {
		s, err := l.c.Status(ctx, at)
		if err != nil {
			return err
		}
		for _, x := range s.Raft.Suspicions {
			if x.Leader != leader.ID {
				return harness.Give(fmt.Errorf("it suspects %s, which does not lie: %s", x.Leader, x.Text))
			}
			if x.Kind == kind && x.Origin == origin && x.Count >= count {
				l.t.Logf("after %v: %s", x.First.Sub(began).Round(100*time.Millisecond), x.Text)
				return nil
			}
		}
		return fmt.Errorf("it reports %+v", s.Raft.Suspicions)
	})
	if err != nil {
		l.t.Fatal(err, l.c.Logs(10))
	}
	alarms, err := l.client(at).Alarms(l.t.Context())
	if err != nil || !slices.ContainsFunc(alarms.Alarms, func(x wire.Alarm) bool {
		return x.Kind == wire.AlarmSuspicion && x.Subject == approval.NodeTarget(leader.ID) && slices.Contains(x.Nodes, origin)
	}) {
		l.t.Errorf("the alarms of %s do not have it: %v, %+v", at.ID, err, alarms.Alarms)
	}
}

func (l liars) rotated(at *harness.Node, key string) {
	l.t.Helper()
	err := harness.Within(l.t.Context(), time.Minute, key+" is rotated at "+at.ID, func(ctx context.Context) error {
		k, err := l.client(at).Key(lyingRing, key).Describe(ctx)
		if err == nil && k.Primary != 2 {
			err = fmt.Errorf("its primary version is %d", k.Primary)
		}
		return err
	})
	if err != nil {
		l.t.Fatal(err)
	}
}

// whole compares the states of all nodes with what their logs give, applied from the
// genesis on.
func (l liars) whole() {
	l.t.Helper()
	t := l.t
	l.same()
	genesis, err := os.ReadFile(filepath.Join(l.c.Dir, "genesis.cbor"))
	if err != nil {
		t.Fatal(err)
	}
	var first replica
	for i, n := range l.c.Nodes {
		var b bytes.Buffer
		if err := l.client(n).Backup(t.Context(), &b); err != nil {
			t.Fatal(err)
		}
		sum, err := backup.Scan(&b)
		if err != nil {
			t.Fatal(err)
		}
		r, err := first.follow(genesis, n)
		if err != nil {
			t.Fatalf("%s: %v", n.ID, err)
		}
		if i == 0 {
			first = r
		}
		if hash := l.hashAt(genesis, r, sum.Header.Index); !bytes.Equal(hash, sum.Hash) {
			t.Errorf("the state of %s at %d is not what the log gives", n.ID, sum.Header.Index)
		}
	}
	if !slices.ContainsFunc(first.leaves, func(x state.Leaf) bool { return x.Kind == kms.BadSignature }) {
		t.Error("no forged command is in the log: the lie did not work")
	}
}

// hashAt returns the hash of the state at an index of a replica's log.
func (l liars) hashAt(genesis []byte, r replica, index uint64) []byte {
	l.t.Helper()
	signed, err := state.ParseSignedGenesis(genesis)
	if err != nil {
		l.t.Fatal(err)
	}
	st, err := state.New(signed)
	if err != nil {
		l.t.Fatal(err)
	}
	for _, rec := range r.records {
		if rec.Index > index {
			break
		}
		st, _ = st.Apply(rec.Index, rec.Raw)
	}
	sum := st.Hash()
	return sum[:]
}

// recorded looks for the suspicions in the access logs of the nodes that have stopped, and for
// none in the leader's.
func (l liars) recorded(leader *harness.Node, others []*harness.Node) {
	l.t.Helper()
	for _, n := range l.c.Nodes {
		kinds := map[string]bool{}
		err := audit.Read(filepath.Join(n.Data, "access"), func(_ uint64, e audit.Entry) error {
			if e.Action == "leader:suspect" {
				kinds[e.Context["kind"]] = true
				if e.Context["leader"] != leader.ID || !strings.HasSuffix(e.Principal, "/node/"+n.ID) {
					return fmt.Errorf("entry %+v", e)
				}
			}
			return nil
		})
		if err != nil {
			l.t.Errorf("%s: %v", n.ID, err)
		}
		if want := slices.Contains(others, n); kinds[raftnode.Withheld] != want || kinds[raftnode.Backdated] != want {
			l.t.Errorf("the access log of %s has suspicions of the kinds %v", n.ID, kinds)
		}
	}
}
