package engine

import (
	"fmt"
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

func nodeView(st *state.State, n state.Node) wire.Node {
	v := wire.Node{
		ID: n.ID, Site: n.Site, Address: n.Address, API: n.API,
		Agreement: n.Agreement, Signing: n.Signing, Device: n.Device, Voter: n.Voter,
		Root: n.Root, ImportKind: n.ImportKind, Protections: []string{},
	}
	if r, ok := st.Release(n.ID); ok {
		v.Release = r.Program
	}
	if n.Root != 0 { // else it has no keys yet
		v.Suite, v.SigningSuite = pqc.SuiteID(n.Suite).String(), pqc.SuiteID(n.SigningSuite).String()
		v.Protections = append(v.Protections, string(kms.Software))
	}
	if n.ImportKind != "" {
		v.Protections = append(v.Protections, string(kms.Hardware))
	}
	if s, ok := st.NodeStatus(n.ID); ok && (n.Root != 0 || len(s.Statement) > 0) {
		v.LastHeard = at(s.Time)
	}
	r := st.Attestation(n.ID)
	v.Attested, v.Proven, v.Claimed = r.Attested, r.Proven, r.Claimed
	v.Refused = refusedView(st, n.ID)
	if next, ok := st.Replacement(n.ID); ok {
		v.Replacing = replacingView(st, next)
	}
	return v
}

// replacingView is how far the replacement of a node's root has come.
func replacingView(st *state.State, r state.Replacement) *wire.Replacing {
	v := &wire.Replacing{Root: r.Root, Device: r.New.Device, Proposal: r.Proposal, Sealed: len(copiesFor(st, r.Node, r.Root))}
	for _, p := range st.Unsealed(r.Node) {
		if !leaves(st, r, p) {
			v.Missing++
		}
	}
	v.Note = "the node has to adopt it: it must run with its next device"
	if n, _ := st.Node(r.Node); n.Root == 0 {
		v.Note = "the node has to adopt it: it must run (conclaved run)"
	}
	if v.Missing > 0 {
		v.Note = hindrance(st, r)
	}
	return v
}

// hindrance says what keeps a node from its next root while copies are missing, and
// what to do about it.
func hindrance(st *state.State, r state.Replacement) string {
	var notes []string
	stuck := 0
	refused := st.Refused(r.Node)
	for _, p := range st.Unsealed(r.Node) {
		by := resealers(st, r, p)
		others := slices.ContainsFunc(by, func(n state.Node) bool { return n.ID != r.Node })
		if key, ok := st.RecoveryFor(p.Keyring); ok && recoverable(st, p) && !others {
			notes = append(notes, fmt.Sprintf("the KEK of keyring %s version %d: no other node can seal it; if the node's former device is gone, a ceremony brings it back: conclave ceremony run %s", p.Keyring, p.Version, key.Name))
			continue
		}
		if leaves(st, r, p) || len(by) > 0 {
			continue
		}
		if by := refusedBy(refused, p); len(by) > 0 {
			notes = append(notes, refusedByAll(st, r, p, by))
		} else {
			stuck++
		}
	}
	if stuck > 0 {
		notes = append(notes, fmt.Sprintf("%s of protection hardware cannot be moved to a device of kind %q, for no other resident node has one: rotate the keys and destroy the versions, or propose the root with leave",
			count(stuck, "key version"), r.New.ImportKind))
	}
	if len(notes) == 0 {
		notes = append(notes, "resident nodes seal their copies to the next root")
		if len(refused) > 0 {
			notes = append(notes, "it refused copies that did not open or held another key, sealed by "+strings.Join(refusers(refused), ", "))
		}
	}
	const most = 3
	if n := len(notes); n > most {
		notes = append(notes[:most], fmt.Sprintf("and %d more", n-most))
	}
	return strings.Join(notes, "; ")
}

// refusedBy returns the nodes whose copies of a version a root has refused.
func refusedBy(refused []state.RefusedCopy, p state.Pending) (by []string) {
	for _, x := range refused {
		if x.Of() == p {
			by = append(by, x.By)
		}
	}
	return by
}

// refusers returns the nodes whose copies a root has refused, sorted.
func refusers(refused []state.RefusedCopy) []string {
	var by []string
	for _, x := range refused {
		by = append(by, x.By)
	}
	slices.Sort(by)
	return slices.Compact(by)
}

// refusedByAll says that nobody is left to seal a version. Whether the nodes that
// did or the one that committed to the check values lied, the node's receipt tells:
// it showed then that the commitment is right.
func refusedByAll(st *state.State, r state.Replacement, p state.Pending, by []string) string {
	kek, _ := st.KEK(p.Keyring, p.Version)
	what, end, receipts := "the KEK of keyring "+p.Keyring, "propose the root with leave, and make another keyring", kek.Receipts
	if p.Key != "" {
		v, _ := st.Version(p.Keyring, p.Key, p.Version)
		what, end, receipts = "key "+kms.KeyPath(p.Keyring, p.Key), "rotate the key and destroy the version, or propose the root with leave", v.Receipts
	}
	proven := "the node never proved that it could open it, so that the commitment itself may be wrong"
	if slices.ContainsFunc(receipts, func(x state.Receipt) bool { return x.Node == r.Node }) {
		proven = "the node once proved that the commitment is right"
	}
	return fmt.Sprintf("every copy of %s version %d was refused, sealed by %s, and no other node can seal one (%s): to try all again, prepare the next root anew and propose it; else %s",
		what, p.Version, strings.Join(by, ", "), proven, end)
}

func refusedView(st *state.State, node string) (l []wire.RefusedCopy) {
	for _, x := range st.Refused(node) {
		l = append(l, wire.RefusedCopy{Root: x.Root, Keyring: x.Keyring, Key: x.Key, Version: x.Version, SealedBy: x.By, Time: at(x.Time)})
	}
	return l
}

// nodeParamsView is what becomes of a node by a proposal.
func nodeParamsView(x approval.NodeParams) *wire.NextRoot {
	v := &wire.NextRoot{Change: string(x.Change), Site: x.Site, Address: x.Address, API: x.API, Possession: x.Possession, Leave: x.Leave}
	if x.HasRoot() {
		v.Root = rootView(x.Root)
	}
	return v
}

// nodesView lists the members, those that were removed, and the change under way.
func nodesView(st *state.State) wire.Nodes {
	l := views(st.Nodes(), func(n state.Node) wire.Node { return nodeView(st, n) })
	v := wire.Nodes{Nodes: byName(l, func(n wire.Node) string { return n.ID })}
	for _, x := range st.Removals() {
		gone := wire.RemovedNode{ID: x.Node.ID, Site: x.Node.Site, Proposal: x.Proposal, Time: at(x.Time)}
		for _, k := range x.Keyrings {
			gone.Keyrings = append(gone.Keyrings, k.Keyring)
		}
		v.Removed = append(v.Removed, gone)
	}
	if m, ok := st.Membership(); ok && m.Confirmed == 0 {
		v.Change = &wire.MemberChange{Node: m.Node, Proposal: m.Proposal}
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
