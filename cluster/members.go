package cluster

import (
	"fmt"
	"slices"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/kms"
)

// checkMembers compares the members that Raft counts with those of the genesis.
// Raft's list is not covered by signatures: a hostile leader can propose another,
// and so make a majority of fewer. Nothing in this release changes it, so any
// difference is such an attempt or a damaged log.
func checkMembers(want, have raft.Configuration) error {
	same := len(want.Servers) == len(have.Servers) &&
		!slices.ContainsFunc(want.Servers, func(s raft.Server) bool { return !slices.Contains(have.Servers, s) })
	if same {
		return nil
	}
	return &kms.Error{Kind: kms.Internal,
		Msg: fmt.Sprintf("Raft's list of members is not that of the genesis: it has %s", members(have)),
		Fix: "find out which node led when it changed (search the logs for this message); keep the data directories for examination"}
}

func members(c raft.Configuration) string {
	l := make([]string, len(c.Servers))
	for i, s := range c.Servers {
		l[i] = fmt.Sprintf("%.80q (%s)", s.ID, suffrageName(s.Suffrage))
	}
	return fmt.Sprint(l)
}
