package engine

import (
	"fmt"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

func nodeView(st *state.State, n state.Node) wire.Node {
	v := wire.Node{
		ID: n.ID, Site: n.Site, Address: n.Address, API: n.API,
		Suite: pqc.SuiteID(n.Suite).String(), Agreement: n.Agreement,
		SigningSuite: pqc.SuiteID(n.SigningSuite).String(), Signing: n.Signing, Device: n.Device, Voter: n.Voter,
		Root: n.Root, ImportKind: n.ImportKind, Protections: []string{string(kms.Software)},
	}
	if n.ImportKind != "" {
		v.Protections = append(v.Protections, string(kms.Hardware))
	}
	if s, ok := st.NodeStatus(n.ID); ok {
		v.LastHeard = at(s.Time)
	}
	r := st.Attestation(n.ID)
	v.Attested, v.Proven, v.Claimed = r.Attested, r.Proven, r.Claimed
	if next, ok := st.Replacement(n.ID); ok {
		v.Replacing = replacingView(st, next)
	}
	return v
}

// replacingView is how far the replacement of a node's root has come.
func replacingView(st *state.State, r state.Replacement) *wire.Replacing {
	v := &wire.Replacing{Root: r.Root, Device: r.New.Device, Proposal: r.Proposal, Sealed: len(copiesFor(st, r.Node, r.Root))}
	stuck := 0
	for _, p := range st.Unsealed(r.Node) {
		if leaves(st, r, p) {
			continue
		}
		v.Missing++
		if len(resealers(st, r, p)) == 0 {
			stuck++
		}
	}
	switch {
	case stuck > 0:
		v.Note = fmt.Sprintf("%s of protection hardware cannot be moved to a device of kind %q, for no other resident node has one: rotate the keys and destroy the versions, or propose the root with leave",
			count(stuck, "key version"), r.New.ImportKind)
	case v.Missing > 0:
		v.Note = "resident nodes seal their copies to the next root"
	default:
		v.Note = "the node has to adopt it: it must run with its next device"
	}
	return v
}

func rootView(r approval.NodeRoot) wire.NodeRoot {
	return wire.NodeRoot{
		Suite: r.Suite, SuiteName: pqc.SuiteID(r.Suite).String(), Agreement: r.Agreement,
		SigningSuite: r.SigningSuite, SigningSuiteName: pqc.SuiteID(r.SigningSuite).String(), Signing: r.Signing,
		Device: r.Device, ImportKind: r.ImportKind, Import: r.Import, Attestation: r.Attestation,
	}
}
