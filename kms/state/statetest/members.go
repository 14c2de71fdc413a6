package statetest

import (
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
)

// JoinParams makes the keys of a node that is to join a site, and the parameters of
// the proposal.
func (w *World) JoinParams(id, site string, leave bool) (*Node, approval.NodeParams) {
	w.t.Helper()
	n := w.newNode(id, site)
	w.mu.Lock()
	w.nodes[id] = append(w.nodes[id], n)
	w.mu.Unlock()
	p := w.NodeParams(id, n, leave)
	p.Change, p.Site, p.Address, p.API = approval.NodeJoin, site, n.Record.Address, n.Record.API
	return n, p
}

// Join has a new node approved, and Raft count with it. It has yet to adopt its root.
func (w *World) Join(id, site string) *Node {
	w.t.Helper()
	w.Announce()
	n, p := w.JoinParams(id, site, false)
	w.Carry(kms.ActionNode, approval.NodeTarget(id), p)
	w.ConfirmMembers()
	return n
}

// JoinWhole has a new node join, adopt its root, announce what it knows and tick.
func (w *World) JoinWhole(id, site string) *Node {
	w.t.Helper()
	n := w.Join(id, site)
	w.Reseal(id)
	w.Do(id, w.AdoptCommand(id))
	w.Announce()
	w.Do(id, state.Tick{})
	return n
}

// Promote makes a node a voter.
func (w *World) Promote(id string) {
	w.t.Helper()
	w.Announce()
	w.Carry(kms.ActionNode, approval.NodeTarget(id), approval.NodeParams{Change: approval.NodePromote})
	w.ConfirmMembers()
}

// RemoveNode removes a node.
func (w *World) RemoveNode(id string, leave bool) {
	w.t.Helper()
	w.Announce()
	w.Carry(kms.ActionNode, approval.NodeTarget(id), approval.NodeParams{Change: approval.NodeRemove, Leave: leave})
	w.ConfirmMembers()
}

// ConfirmCommand returns the command that says that Raft counts with the members.
func (w *World) ConfirmCommand() state.ConfirmMembers {
	s := w.State()
	m, _ := s.Membership()
	return state.ConfirmMembers{Index: m.Index, Members: s.Members()}
}

// ConfirmMembers has the first node say that Raft counts with the members.
func (w *World) ConfirmMembers() {
	w.t.Helper()
	w.Do(w.FirstNode(), w.ConfirmCommand())
}

// AddSite adds a site with a CA of its own, and custodians called SITE-1 and so on.
func (w *World) AddSite(site string, custodians int) {
	w.t.Helper()
	w.Announce()
	ca := w.newCA(site)
	w.cas[site] = ca
	w.Carry(kms.ActionSite, approval.SiteTarget(site), approval.SiteParams{Change: approval.SiteAdd, TrustDomain: TrustDomain(site), CAs: [][]byte{ca.Certificate.Raw}})
	for i := range custodians {
		id := site + "-" + string(rune('1'+i))
		w.Carry(kms.ActionCustodian, "custodian/"+id, approval.CustodianParams{Custodian: Record(id, site, 0, w.AddCustodianKey(id))})
		if i == 0 {
			w.opts.Sites = append(w.opts.Sites, site) // its custodians vote from now on, after the others
		}
	}
}
