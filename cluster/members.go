package cluster

import (
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
)

// Raft's list of servers follows the members of the state, which only approved
// proposals change. The list itself is not covered by signatures: a hostile leader can put another
// into the log, and so make a majority of fewer. So every node compares each list
// in the log with the state as it is at that place in the log.

// servers is the list that Raft has for members of the state. Raft knows nodes by id
// alone; the transport looks addresses up in the state.
func servers(l []state.Member) raft.Configuration {
	var c raft.Configuration
	for _, m := range l {
		s := raft.Server{Suffrage: raft.Nonvoter, ID: raft.ServerID(m.ID), Address: raft.ServerAddress(m.ID)}
		if m.Voter {
			s.Suffrage = raft.Voter
		}
		c.Servers = append(c.Servers, s)
	}
	return c
}

// sameServers reports whether two lists are equal but for their order.
func sameServers(a, b raft.Configuration) bool {
	return len(a.Servers) == len(b.Servers) && len(changes(a, b)) == 0
}

// checkMembers says whether Raft may have a list of servers at a state: that of the
// members, or the one before the change of members that is under way.
func checkMembers(st *state.State, have raft.Configuration) error {
	want := servers(st.Members())
	if sameServers(have, want) {
		return nil
	}
	if before, pending := st.PendingMembers(); pending && sameServers(have, servers(before)) {
		return nil
	}
	return strange(have, want)
}

// checkSnapshotMembers is checkMembers for the list that comes with a snapshot. It
// may be older than the state: also the one before a change that is confirmed.
func checkSnapshotMembers(st *state.State, have raft.Configuration) error {
	err := checkMembers(st, have)
	if m, ok := st.Membership(); err != nil && ok && sameServers(have, servers(m.Before)) {
		return nil
	}
	return err
}

func strange(have, want raft.Configuration) error {
	return &kms.Error{Kind: kms.Internal,
		Msg: fmt.Sprintf("Raft's list of servers is not one that custodians have approved: it is %s, the members are %s", members(have), members(want)),
		Fix: "find out which node led when it changed (search the logs of the nodes for this message); keep the data directories for examination"}
}

func members(c raft.Configuration) string {
	l := make([]string, len(c.Servers))
	for i, s := range c.Servers {
		l[i] = fmt.Sprintf("%.80q (%s)", s.ID, suffrageName(s.Suffrage))
	}
	slices.Sort(l)
	return strings.Join(l, ", ")
}

// change is a step from one list of servers to another.
type change struct {
	command raft.ConfigurationChangeCommand
	id      raft.ServerID
}

// changes returns the steps from one list to another, sorted by node.
func changes(from, to raft.Configuration) []change {
	was, will := bySuffrage(from), bySuffrage(to)
	var l []change
	for id, s := range will {
		old, ok := was[id]
		switch {
		case s == raft.Voter && old != s, s == raft.Voter && !ok:
			l = append(l, change{raft.AddVoter, id})
		case !ok:
			l = append(l, change{raft.AddNonvoter, id})
		case old != s:
			l = append(l, change{raft.DemoteVoter, id})
		}
	}
	for id := range was {
		if _, ok := will[id]; !ok {
			l = append(l, change{raft.RemoveServer, id})
		}
	}
	slices.SortFunc(l, func(a, b change) int { return strings.Compare(string(a.id), string(b.id)) })
	return l
}

func bySuffrage(c raft.Configuration) map[raft.ServerID]raft.ServerSuffrage {
	m := map[raft.ServerID]raft.ServerSuffrage{}
	for _, s := range c.Servers {
		m[s.ID] = s.Suffrage
	}
	return m
}

// nextChange returns the step that brings Raft's list to that of the state, or to the one
// before the latest change, from where it is one more. Every list on the way is one that
// checkMembers accepts. done is true if there is nothing to do; the error says that
// there is no such step.
func nextChange(st *state.State, have raft.Configuration) (c change, done bool, err error) {
	want := servers(st.Members())
	l := changes(have, want)
	if len(l) == 0 {
		return change{}, true, nil
	}
	if len(l) > 1 {
		before, pending := st.PendingMembers()
		if l = changes(have, servers(before)); !pending || len(l) != 1 {
			return change{}, false, strange(have, want)
		}
	}
	return l[0], false, nil
}
