package cluster

import (
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/raft"
)

func TestCheckMembers(t *testing.T) {
	server := func(id string, s raft.ServerSuffrage) raft.Server {
		return raft.Server{ID: raft.ServerID(id), Address: raft.ServerAddress(id), Suffrage: s}
	}
	genesis := []raft.Server{server("de-1", raft.Voter), server("fr-1", raft.Voter), server("jp-1", raft.Nonvoter)}
	reversed := slices.Clone(genesis)
	slices.Reverse(reversed)
	promoted := slices.Clone(genesis)
	promoted[2].Suffrage = raft.Voter
	for name, c := range map[string]struct {
		have []raft.Server
		ok   bool
	}{
		"the same":         {genesis, true},
		"in another order": {reversed, true},
		"one removed":      {genesis[:2], false},
		"the leader alone": {genesis[:1], false},
		"one more":         {append(slices.Clone(genesis), server("xx-1", raft.Voter)), false},
		"one promoted":     {promoted, false},
		"one twice":        {append(slices.Clone(genesis[:2]), genesis[1]), false},
		"none":             {nil, false},
	} {
		err := checkMembers(raft.Configuration{Servers: genesis}, raft.Configuration{Servers: c.have})
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil && !strings.Contains(err.Error(), "not that of the genesis") {
			t.Error(err)
		}
	}
}
