package audit

import (
	"maps"
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
)

// node returns a node that is or was a member.
func (w *replay) node(id string) (state.Node, bool) {
	m, ok := w.nodes[id]
	if !ok {
		return state.Node{}, false
	}
	return state.Node{ID: id, Site: m.site}, true
}

// mark notes who is a member with a hardware root now. A command does not say before
// or after which decision it came, only that it came before or after a removal.
func (w *replay) mark(removal bool) {
	var l []state.Node
	for _, id := range slices.Sorted(maps.Keys(w.nodes)) {
		if m := w.nodes[id]; !m.removed && len(m.roots) > 0 {
			l = append(l, state.Node{ID: id, Site: m.site})
		}
	}
	w.members = append(w.members, l)
	if removal {
		w.since = len(w.members) - 1
	}
}

func amongSites(nodes []state.Node, sites []string) (l []state.Node) {
	for _, n := range nodes {
		if slices.Contains(sites, n.Site) {
			l = append(l, n)
		}
	}
	return l
}

// residentsOf returns the nodes that a command is for, if these were exactly the
// resident ones at some time since the last removal, or for an old command at any.
func residentsOf[T any](w *replay, sites []string, list []T, node func(T) string, old bool) ([]state.Node, bool) {
	from := w.since
	if old {
		from = 0
	}
	for _, members := range w.members[from:] {
		if nodes := amongSites(members, sites); sameNodes(nodes, list, node) {
			return nodes, true
		}
	}
	return nil, false
}

// stillMembers leaves those of the nodes that were not removed since.
func (w *replay) stillMembers(nodes []state.Node) []state.Node {
	return slices.DeleteFunc(slices.Clone(nodes), func(n state.Node) bool { return w.nodes[n.ID].removed })
}

// changeNode applies a verified decision on a node.
func (w *replay) changeNode(id string, d decided) error {
	params, err := d.content.NodeParams()
	if err != nil {
		return err
	}
	if len(d.adoption) != 0 && !params.HasRoot() {
		return refuse(kms.Invalid, nil, "proposal %s brings no hardware root that node %s could adopt", d.id, id)
	}
	m, ok := w.nodes[id]
	switch {
	case params.Change == approval.NodeJoin:
		return w.join(id, params, d)
	case !ok || m.removed:
		return refuse(kms.NotFound, nil, "there is no node %s", id)
	case params.Change == approval.NodeReplaceRoot:
		return w.replaceRoot(id, d)
	case params.Change == approval.NodeRemove:
		m.removed = true
		w.mark(true)
	}
	m.revision++
	return nil
}

// join makes a new member, which has no hardware root until it has adopted its first.
func (w *replay) join(id string, params approval.NodeParams, d decided) error {
	if _, known := w.nodes[id]; known {
		return refuse(kms.Exists, nil, "there is or was a node %s", id)
	}
	if s, ok := w.sites[params.Site]; !ok || s.removed {
		return refuse(kms.NotFound, nil, "there is no site %s", params.Site)
	}
	w.nodes[id] = &member{site: params.Site}
	if err := w.replaceRoot(id, d); err != nil {
		return err
	}
	if len(d.adoption) != 0 {
		w.mark(false)
	}
	return nil
}

// site is a site with its revision.
type site struct {
	domain   string
	revision uint64
	removed  bool
}

// changeSite applies a verified decision on a site.
func (w *replay) changeSite(id string, d decided) error {
	params, err := d.content.SiteParams()
	if err != nil {
		return err
	}
	s, known := w.sites[id]
	switch {
	case params.Change == approval.SiteAdd && known:
		return refuse(kms.Exists, nil, "there is or was a site %s", id)
	case params.Change == approval.SiteAdd:
		for o, x := range w.sites {
			if x.domain == params.TrustDomain {
				return refuse(kms.Exists, nil, "site %s has or had the trust domain %s", o, x.domain)
			}
		}
		s.domain = params.TrustDomain
	case !known || s.removed:
		return refuse(kms.NotFound, nil, "there is no site %s", id)
	case params.Change == approval.SiteRemove:
		s.removed = true
	}
	s.revision++
	w.sites[id] = s
	return nil
}

// lateRemovals returns the place in the log after the removal of nodes whose receipt a
// version of the keyring waited for until then: without these decisions the receipts
// would not suffice.
func lateRemovals(s *state.State, p state.Proposal, ring string, receipts []state.Receipt, limit uint64) uint64 {
	for _, x := range s.Removals() {
		could := slices.ContainsFunc(x.Keyrings, func(k state.LeftKEK) bool { return k.Keyring == ring })
		given := slices.ContainsFunc(receipts, func(r state.Receipt) bool { return r.Node == x.Node.ID })
		if x.Index > p.Executed && could && !given {
			limit = max(limit, x.Index+1)
		}
	}
	return limit
}

// askedNodes returns the resident nodes of which a receipt was asked for what a
// proposal brought: those that had joined by then and were not removed since.
func askedNodes(s *state.State, p state.Proposal, ring string) []state.Node {
	return slices.DeleteFunc(s.ResidentNodes(ring), func(n state.Node) bool {
		former := s.FormerRoots(n.ID)
		return len(former) > 0 && former[0].Root == 0 && former[0].Until > p.Executed
	})
}

func checkNode(c state.Check) string     { return c.Node }
func copyNode(c state.SealedCopy) string { return c.Node }
