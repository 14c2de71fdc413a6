package cluster

import (
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// contacts keeps, for each other node, when the latest message was sent that the node has
// answered as a follower of this one: who answers so has, when the message reached it,
// voted for nobody in a later term. Raft's own VerifyLeader does not ask when what is
// answered was sent, and counts the answers of those who have no vote.
type contacts struct {
	mu    sync.Mutex
	last  map[raft.ServerID]contact
	heard signal // fires with every answer
}

type contact struct {
	term uint64
	sent time.Time
}

// note records an answer to a message that was sent in a term not before a time.
func (c *contacts) note(id raft.ServerID, term uint64, sent time.Time) {
	c.mu.Lock()
	if c.last == nil {
		c.last = map[raft.ServerID]contact{}
	}
	if old := c.last[id]; term > old.term || term == old.term && sent.After(old.sent) {
		c.last[id] = contact{term, sent}
	}
	c.mu.Unlock()
	c.heard.fire()
}

// quorum reports whether a majority of the voters, self being one of them or not, has
// answered what self sent in the term at a time or later.
func (c *contacts) quorum(servers []raft.Server, self raft.ServerID, term uint64, at time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	voters, yes := 0, 0
	for _, s := range servers {
		if s.Suffrage != raft.Voter {
			continue
		}
		voters++
		if l := c.last[s.ID]; s.ID == self || l.term == term && !l.sent.Before(at) {
			yes++
		}
	}
	return yes > voters/2
}

// AppendEntries implements raft.Transport, and notes who follows. Messages in a pipeline
// do not pass here: they prove nothing.
func (g *gate) AppendEntries(id raft.ServerID, to raft.ServerAddress, req *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	term, sent := req.Term, time.Now()
	err := g.Transport.AppendEntries(id, to, req, resp)
	if err == nil && resp.Term == term {
		g.contacts.note(id, term, sent)
	}
	return err
}
