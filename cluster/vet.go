package cluster

import (
	"fmt"
	"log/slog"
	"sync"

	"github.com/hashicorp/raft"
)

// vet is the transport next to the network. Raft believes what other members send: a list of
// servers that does not decode or an entry of a type that it does not know ends the process, the
// latter each time anew; an entry out of order leaves a log that cannot be read again; entries of
// its first releases change the list of servers past the gate; and a term near the end
// of its range is the last one. vet refuses what no honest node sends.
type vet struct {
	raft.Transport
	term  func() uint64   // this node's, or the first of its epoch if that is later; once ready
	last  func() uint64   // the index of its last entry; once ready
	ready <-chan struct{} // closed when Raft runs
	log   *slog.Logger

	calls chan raft.RPC // on to Raft
	done  chan struct{}
	once  sync.Once
	said  sync.Once
}

// vetPreVote is vet over a transport with pre-votes.
type vetPreVote struct {
	*vet
	inner raft.WithPreVote
}

// Terms count elections, of which there are few a minute at most, and with pre-votes a node
// that is cut off begins none; indexes count entries. So a node is never further behind than this. A
// hostile one would have to send as many messages to bring either to its end as no disk takes.
const (
	maxTermStep  = uint64(1) << 24
	maxIndexStep = uint64(1) << 32
)

// newVet wraps the node's transport. Closing it closes the transport.
func newVet(inner raft.Transport, ready <-chan struct{}, term, last func() uint64, log *slog.Logger) raft.Transport {
	v := &vet{Transport: inner, term: term, last: last, ready: ready, log: log, calls: make(chan raft.RPC), done: make(chan struct{})}
	go v.run()
	if pv, ok := inner.(raft.WithPreVote); ok {
		return vetPreVote{v, pv}
	}
	return v
}

// run hands calls on until the transport closes.
func (v *vet) run() {
	select {
	case <-v.ready:
	case <-v.done:
		return
	}
	for {
		select {
		case rpc := <-v.Transport.Consumer():
			if err := v.refuse(rpc.Command); err != nil {
				rpc.Respond(refusal(rpc.Command), err)
				continue
			}
			select {
			case v.calls <- rpc:
			case <-v.done:
				rpc.Respond(refusal(rpc.Command), raft.ErrTransportShutdown)
				return
			}
		case <-v.done:
			return
		}
	}
}

// refuse returns why a message is not one of an honest node, and says so once.
func (v *vet) refuse(command any) error {
	err := v.check(command)
	if err != nil {
		v.said.Do(func() {
			v.log.Error("refused a message of Raft such as no honest node sends; find out which member sent it", "error", err)
		})
	}
	return err
}

func (v *vet) check(command any) error {
	switch c := command.(type) {
	case *raft.AppendEntriesRequest:
		if err := v.checkTerm(c.Term); err != nil {
			return err
		}
		return checkEntries(c)
	case *raft.RequestVoteRequest:
		return v.checkTerm(c.Term)
	case *raft.RequestPreVoteRequest:
		return v.checkTerm(c.Term)
	case *raft.InstallSnapshotRequest:
		if err := v.checkTerm(c.Term); err != nil {
			return err
		}
		return v.checkSnapshot(c)
	case *raft.TimeoutNowRequest:
		return nil
	}
	return fmt.Errorf("cluster: a message of type %T", command)
}

// checkTerm refuses a term that is too far ahead. A node whose log is empty learns any.
func (v *vet) checkTerm(term uint64) error {
	if own := v.term(); own != 0 && term > own && term-own > maxTermStep {
		return fmt.Errorf("cluster: term %d, while this node is in term %d", term, own)
	}
	return nil
}

// checkEntries checks what Raft stores without a look.
func checkEntries(c *raft.AppendEntriesRequest) error {
	index, term := c.PrevLogEntry, c.PrevLogTerm
	for _, e := range c.Entries {
		if e == nil {
			return fmt.Errorf("cluster: an entry is missing")
		}
		if e.Index != index+1 || e.Term < term || e.Term > c.Term {
			return fmt.Errorf("cluster: entry %d of term %d follows entry %d of term %d, from a leader of term %d", e.Index, e.Term, index, term, c.Term)
		}
		index, term = e.Index, e.Term
		switch e.Type {
		case raft.LogCommand, raft.LogNoop, raft.LogBarrier:
		case raft.LogConfiguration:
			if _, err := decodeList(e.Data); err != nil {
				return err
			}
		default:
			return fmt.Errorf("cluster: entry %d is of type %d", e.Index, e.Type)
		}
	}
	return nil
}

func (v *vet) checkSnapshot(c *raft.InstallSnapshotRequest) error {
	if _, err := decodeList(c.Configuration); err != nil {
		return err
	}
	last := v.last()
	switch {
	case c.SnapshotVersion != raft.SnapshotVersionMax:
		return fmt.Errorf("cluster: a snapshot of version %d", c.SnapshotVersion)
	case c.Size < 0 || c.LastLogTerm > c.Term || c.ConfigurationIndex > c.LastLogIndex:
		return fmt.Errorf("cluster: a snapshot with %d bytes, term %d and members of entry %d, up to entry %d, from a leader of term %d", c.Size, c.LastLogTerm, c.ConfigurationIndex, c.LastLogIndex, c.Term)
	case c.LastLogIndex > last && c.LastLogIndex-last > maxIndexStep:
		return fmt.Errorf("cluster: a snapshot up to entry %d, while this node is at entry %d", c.LastLogIndex, last)
	}
	return nil
}

// decodeList is raft.DecodeConfiguration with an error in place of the panic.
func decodeList(b []byte) (c raft.Configuration, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("cluster: a list of servers does not decode: %v", r)
		}
	}()
	return raft.DecodeConfiguration(b), nil
}

// Consumer implements raft.Transport.
func (v *vet) Consumer() <-chan raft.RPC { return v.calls }

// SetHeartbeatHandler implements raft.Transport.
func (v *vet) SetHeartbeatHandler(handle func(raft.RPC)) {
	if handle == nil {
		v.Transport.SetHeartbeatHandler(nil)
		return
	}
	v.Transport.SetHeartbeatHandler(func(rpc raft.RPC) {
		err := v.up()
		if err == nil {
			err = v.refuse(rpc.Command)
		}
		if err != nil {
			rpc.Respond(refusal(rpc.Command), err)
			return
		}
		handle(rpc)
	})
}

// up returns an error while Raft is starting.
func (v *vet) up() error {
	select {
	case <-v.ready:
		return nil
	default:
		return errUnsettled
	}
}

// RequestVote implements raft.Transport: Raft takes over the term of an answer, too.
func (v *vet) RequestVote(id raft.ServerID, to raft.ServerAddress, req *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	if err := v.up(); err != nil {
		return err
	}
	var answer raft.RequestVoteResponse
	if err := v.Transport.RequestVote(id, to, req, &answer); err != nil {
		return err
	}
	if err := v.checkTerm(answer.Term); err != nil {
		return err
	}
	*resp = answer
	return nil
}

// RequestPreVote implements raft.WithPreVote.
func (v vetPreVote) RequestPreVote(id raft.ServerID, to raft.ServerAddress, req *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	if err := v.up(); err != nil {
		return err
	}
	var answer raft.RequestPreVoteResponse
	if err := v.inner.RequestPreVote(id, to, req, &answer); err != nil {
		return err
	}
	if err := v.checkTerm(answer.Term); err != nil {
		return err
	}
	*resp = answer
	return nil
}

// Close implements raft.WithClose.
func (v *vet) Close() error {
	v.once.Do(func() { close(v.done) })
	if c, ok := v.Transport.(raft.WithClose); ok {
		return c.Close()
	}
	return nil
}
