package cluster

import (
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
)

// Introduction names members of a cluster to a node that has yet to learn of them
// from the log, and the history that they have: in a later epoch than 0 nobody speaks
// of Raft with a node that does not name it. That what they send is this history is
// checked from the genesis on, with what custodians have approved.
type Introduction struct {
	Nodes   []state.Node // ID, Site and Address count
	Sites   []state.Site // ID, TrustDomain and CAs count
	Epoch   uint64
	Lineage string // state.State.Lineage, empty in epoch 0
}

// self returns this node's record: that of the genesis, or what the configuration
// says of a node that joins.
func (c Config) self(genesis *state.State) (state.Node, error) {
	self, ok := genesis.Node(c.NodeID)
	switch {
	case ok && c.Site != "" && c.Site != self.Site:
		return self, kms.Errorf(kms.Invalid, "node %s is of site %s by the genesis, of %s by the configuration", c.NodeID, self.Site, c.Site)
	case ok:
		return self, nil
	case c.Site == "":
		return self, kms.Errorf(kms.Invalid, "%q is not a node of the genesis of cluster %s; for one that joins, the configuration must name its site", c.NodeID, genesis.Cluster())
	case len(c.Signing) == 0:
		return self, kms.Errorf(kms.Invalid, "%q is not a node of the genesis, so its public signing key is needed", c.NodeID)
	}
	return state.Node{ID: c.NodeID, Site: c.Site, SigningSuite: c.SigningSuite, Signing: c.Signing}, nil
}

// introductions is a state as a directory, with what the node was told or has kept besides.
// What the state knows counts, once it is as far as what was kept; whoever it has
// removed stays out.
type introductions struct {
	*state.State
	self state.Node
	told Introduction
	kept *kept // nil for none

	farewell bool // a removed node counts as well: it is to hear that it was removed
}

// behind reports whether more is kept than the state knows yet.
func (d introductions) behind() bool { return d.kept != nil && d.Index() < d.kept.Index }

// Node implements directory.
func (d introductions) Node(id string) (state.Node, bool) {
	if d.behind() {
		if n, ok := d.kept.node(id); ok {
			return n, true
		}
	} else if n, ok := d.State.Node(id); ok {
		return n, ok
	} else if old, gone := d.Removal(id); gone {
		return old.Node, d.farewell
	}
	for _, n := range d.told.Nodes {
		if n.ID == id {
			return n, true
		}
	}
	return d.self, id == d.self.ID
}

// anyone returns the node of an identity that a node takes as a member while its own log
// does not even have itself: any that a site's CA calls one. Whoever leads must be able to send it the log,
// also when no node of the genesis is left.
func (d introductions) anyone(id kms.Identity) (state.Node, bool) {
	if _, member := d.State.Node(d.self.ID); member || d.Removed(d.self.ID) || d.Removed(id.Name) {
		return state.Node{}, false
	}
	for _, s := range slices.Concat(d.Sites(), d.told.Sites) {
		if s.TrustDomain == id.TrustDomain {
			return state.Node{ID: id.Name, Site: s.ID}, true
		}
	}
	return state.Node{}, false
}

// others lists the nodes but this one that it knows of.
func (d introductions) others() (ids []string) {
	add := func(id string) {
		if id != d.self.ID && !slices.Contains(ids, id) && !d.Removed(id) {
			ids = append(ids, id)
		}
	}
	if d.behind() {
		for _, n := range d.kept.Nodes {
			add(n.ID)
		}
		return ids
	}
	for _, n := range d.Nodes() {
		add(n.ID)
	}
	if _, member := d.State.Node(d.self.ID); !member {
		for _, n := range d.told.Nodes {
			add(n.ID)
		}
	}
	return ids
}

// Site implements directory.
func (d introductions) Site(id string) (state.Site, bool) {
	if d.behind() {
		if s, ok := d.kept.site(id); ok {
			return s, true
		}
	}
	if s, ok := d.State.Site(id); ok {
		return s, true
	}
	for _, s := range d.told.Sites {
		if s.ID == id {
			return s, true
		}
	}
	return state.Site{}, false
}

// directory says who may connect now.
func (n *Node) directory() directory { return n.introductions() }

func (n *Node) introductions() introductions {
	return introductions{State: n.State(), self: n.self, told: n.cfg.Introduced, kept: n.kept.Load()}
}
