package cluster_test

import (
	"math"
	"testing"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/cluster/clustertest"
	"github.com/conclave-kms/conclave/kms/state"
)

// A member that sends messages of Raft of its own making neither ends another node, nor
// ruins its log, nor changes its list of servers, nor leaves it without terms to elect in.
func TestHostileMessages(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{})
	c.Attach()
	tick := func() { // by whichever node leads by then: the term of a message deposes one
		t.Helper()
		c.World.Do(c.Members[0].ID, state.Tick{})
		c.SameState(c.Node(c.Leader()).State().Index())
	}
	tick()
	leader := c.Leader()
	bad := c.Follower()
	victim := 3 - leader - bad
	hostile, id, to := c.Node(bad), c.Members[bad].ID, c.Members[victim].ID
	header := raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(id), Addr: []byte(id)}
	entry := func(kind raft.LogType, data []byte) func(term, index uint64) *raft.Log {
		return func(term, index uint64) *raft.Log {
			return &raft.Log{Index: index + 1, Term: term, Type: kind, Data: data}
		}
	}
	alone := append([]byte{0x91, 0xa0 | byte(len(id))}, id...) // a list of one, in MessagePack
	for name, make := range map[string]func(term, index uint64) *raft.Log{
		"a list of servers of the first releases":         entry(raft.LogRemovePeerDeprecated, alone),
		"another list of servers of the first releases":   entry(raft.LogAddPeerDeprecated, alone),
		"a type of entry that Raft does not know":         entry(77, nil),
		"a list of servers that does not decode":          entry(raft.LogConfiguration, []byte("nonsense")),
		"an entry that is none":                           func(uint64, uint64) *raft.Log { return nil },
		"an entry far ahead":                              func(term, _ uint64) *raft.Log { return &raft.Log{Index: 1 << 40, Term: term} },
		"an entry of a term to come":                      func(term, index uint64) *raft.Log { return &raft.Log{Index: index + 1, Term: term + 5} },
		"an entry of a term before that of the log's end": func(_, index uint64) *raft.Log { return &raft.Log{Index: index + 1, Term: 0} },
	} {
		term, index, logTerm := c.Node(victim).Position()
		e := make(term, index)
		err := hostile.AppendEntries(to, &raft.AppendEntriesRequest{
			RPCHeader: header, Term: term, PrevLogEntry: index, PrevLogTerm: logTerm, LeaderCommitIndex: math.MaxUint64, Entries: []*raft.Log{e}})
		if err == nil {
			t.Errorf("%s is taken", name)
		}
		if n := len(c.Node(victim).Servers()); n != 3 {
			t.Fatalf("after %s the node counts %d servers", name, n)
		}
	}
	// The entries that the cluster has acknowledged stay, whatever a leader of a later term sends.
	term, index, logTerm := c.Node(victim).Position()
	_ = hostile.AppendEntries(to, &raft.AppendEntriesRequest{RPCHeader: header, Term: term + 1, PrevLogEntry: 1, PrevLogTerm: 1,
		Entries: []*raft.Log{{Index: 2, Term: term + 1, Type: raft.LogNoop}}}) // refused by the answer, not by an error
	if _, i, lt := c.Node(victim).Position(); i != index || lt != logTerm {
		t.Errorf("the log ended with entry %d of term %d, and now ends with entry %d of term %d", index, logTerm, i, lt)
	}
	if err := hostile.RequestVote(to, &raft.RequestVoteRequest{RPCHeader: header, Term: math.MaxUint64, LastLogIndex: math.MaxUint64, LastLogTerm: math.MaxUint64}); err == nil {
		t.Error("the last term there is is taken")
	}
	if err := hostile.AppendEntries(to, &raft.AppendEntriesRequest{RPCHeader: header, Term: math.MaxUint64}); err == nil {
		t.Error("a heartbeat of the last term there is is taken")
	}
	if term, _, _ := c.Node(victim).Position(); term > 1000 {
		t.Errorf("the node is in term %d", term)
	}
	tick()
	c.Kill(victim) // its log is whole
	c.Restart(victim)
	tick()
}
