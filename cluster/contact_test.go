package cluster

import (
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// Only voters count, only in the term, and only what was sent late enough.
func TestContactQuorum(t *testing.T) {
	at := time.Now()
	server := func(id string, s raft.ServerSuffrage) raft.Server {
		return raft.Server{ID: raft.ServerID(id), Suffrage: s}
	}
	five := []raft.Server{server("a", raft.Voter), server("b", raft.Voter), server("c", raft.Voter), server("d", raft.Voter), server("e", raft.Voter)}
	joining := append(five[:3:3], server("x", raft.Nonvoter), server("y", raft.Nonvoter))
	type answer struct {
		id   raft.ServerID
		term uint64
		sent time.Duration // after at
	}
	for _, x := range []struct {
		name    string
		servers []raft.Server
		answers []answer
		want    bool
	}{
		{"nobody", five, nil, false},
		{"alone", five[:1], nil, true},
		{"one of two", five[:2], nil, false},
		{"too few", five, []answer{{"b", 7, 1}}, false},
		{"enough", five, []answer{{"b", 7, 0}, {"d", 7, 5}}, true},
		{"sent before", five, []answer{{"b", 7, 1}, {"c", 7, -1}, {"d", 7, -1}, {"e", 7, -2}}, false},
		{"an old answer after a new one", five, []answer{{"b", 7, 1}, {"c", 7, 1}, {"b", 7, -1}, {"b", 6, 9}}, true},
		{"of another term", five, []answer{{"b", 7, 1}, {"c", 6, 1}, {"d", 8, 1}}, false},
		{"who has no vote", joining, []answer{{"x", 7, 1}, {"y", 7, 1}}, false},
		{"a voter of three", joining, []answer{{"x", 7, 1}, {"c", 7, 1}}, true},
		{"itself twice", five, []answer{{"a", 7, 1}, {"b", 7, 1}}, false},
	} {
		var c contacts
		for _, a := range x.answers {
			c.note(a.id, a.term, at.Add(a.sent))
		}
		if got := c.quorum(x.servers, "a", 7, at); got != x.want {
			t.Errorf("%s: %v", x.name, got)
		}
	}
	var c contacts
	c.note("b", 7, at)
	if c.quorum(five[1:4], "a", 7, at) {
		t.Error("one who has no vote counted itself")
	}
}

// A proof is as old as the clock says that has moved further.
func TestSince(t *testing.T) {
	now := time.Now()
	if d := since(now.Add(-time.Hour)); d < time.Hour || d > time.Hour+time.Minute {
		t.Errorf("an hour ago is %v ago", d)
	}
	// What Go compares by the wall clock, because it has no monotonic reading, is as after a suspension.
	if d := since(now.Round(0).Add(-time.Hour)); d < time.Hour {
		t.Errorf("an hour ago by the wall clock is %v ago", d)
	}
}
