package state

import (
	"cmp"
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

// MaxPromoteSilence is how long before its promotion, in milliseconds of the cluster's
// clock, a node may have sent its last tick: who becomes a voter runs and has caught up.
const MaxPromoteSilence = int64(60 * 1000)

// changeNode does what a proposal about a node says.
func (t *tx) changeNode(id string, p approval.Proposal) error {
	params, err := p.NodeParams()
	if err != nil {
		return err
	}
	if params.Change == approval.NodeReplaceRoot {
		return t.replaceRoot(id, p)
	}
	r := t.reader()
	leaving := "" // the site of a node that is to go
	if params.Change == approval.NodeRemove {
		leaving, _ = r.siteOf(id)
	}
	if err := t.membersMayChange(leaving); err != nil {
		return err
	}
	change := Membership{Node: id, Before: r.members(), Proposal: approval.ProposalID(p.Marshal()), Index: t.index}
	switch params.Change {
	case approval.NodeJoin:
		err = t.join(id, params, p)
	case approval.NodePromote:
		err = t.promote(id)
	case approval.NodeRemove:
		err = t.removeNode(id, params.Leave, p)
	}
	if err != nil {
		return err
	}
	insert(t.Txn, tableMembership, change)
	t.voidTarget(p.Target)
	return nil
}

// membersMayChange refuses a change of the members while the one before it is under
// way, or while a node's program does not know of such changes. leaving is the site of a
// node that is to be removed, "" for another change: what that site's nodes announce does
// not count then, for a node that never announces anything, dead or hostile, could else
// never be removed. When a stored statement
// is replayed, who had confirmed and announced what by then cannot be told.
func (t *tx) membersMayChange(leaving string) error {
	if t.replay {
		return nil
	}
	if m, ok := t.reader().membership(); ok && m.Confirmed == 0 {
		return &kms.Error{Kind: kms.Conflict,
			Msg: "the change of members about node " + m.Node + " by proposal " + m.Proposal + " is not complete: one change at a time",
			Fix: "wait until Raft counts with it (conclave status), then try again"}
	}
	return t.before.knownToAll("changes of the members", leaving)
}

// knownToAll refuses what a program from before changes of nodes and sites would
// judge otherwise, but for nodes of the site without.
func (s *State) knownToAll(what, without string) error {
	lacking := s.lackingBut(CommandKind{TypeConfirmMembers, 1}, without)
	if len(lacking) > 0 {
		return &kms.Error{Kind: kms.Unavailable,
			Msg: "the release that node " + lacking[0] + " runs has not announced that it knows " + what,
			Fix: "start the node, with a newer release if need be"}
	}
	return nil
}

// join makes a member that does not vote, and approves its first hardware root. It is
// resident for nothing until it has adopted that.
func (t *tx) join(id string, params approval.NodeParams, p approval.Proposal) error {
	r := t.reader()
	if err := r.newNode(id); err != nil {
		return err
	}
	if _, _, ok := r.site(params.Site); !ok {
		return kms.Errorf(kms.NotFound, "there is no site %s", params.Site)
	}
	nodes := r.nodes()
	if len(nodes) >= MaxNodes {
		return kms.Errorf(kms.TooLarge, "there are %d nodes, which is the limit", MaxNodes)
	}
	n := Node{ID: id, Site: params.Site, Address: params.Address, API: params.API, Revision: 1}
	if err := n.with(0, params.Root).validate(); err != nil {
		return err
	}
	if o, taken := search(nodes, func(o Node) bool { return o.Address == n.Address }); taken {
		return kms.Errorf(kms.Conflict, "node %s has the address %s", o.ID, n.Address)
	}
	insert(t.Txn, tableNode, n)
	insert(t.Txn, tableStatus, NodeStatus{Node: id, Time: t.before.genesis.Created})
	if err := t.approveRoot(n, firstRoot, params, p); err != nil {
		return err
	}
	t.event(Event{Type: EventNodeJoining, Node: id, Proposal: approval.ProposalID(p.Marshal())})
	return nil
}

// newNode refuses the name of a node that is or was there.
func (r reader) newNode(id string) error {
	if _, exists := r.node(id); exists {
		return kms.Errorf(kms.Exists, "there is a node %s; to give it another device, replace its root; a machine that was set up anew joins under a new name", id)
	}
	if old, removed := r.removal(id); removed {
		return kms.Errorf(kms.Conflict, "node %s was removed by proposal %s and does not come back; a machine that was set up anew joins under a new name", id, old.Proposal)
	}
	return nil
}

// firstRoot is the number of a node's first hardware root.
const firstRoot = 1

// promote makes a member a voter.
func (t *tx) promote(id string) error {
	r := t.reader()
	n, ok := r.node(id)
	switch {
	case !ok:
		return r.noNode(id)
	case n.Voter:
		return kms.Errorf(kms.Conflict, "node %s is a voter", id)
	case n.Root == 0:
		return kms.Errorf(kms.Conflict, "node %s has not yet adopted its hardware root; it votes once it has shown that it is who it says", id)
	}
	if _, pending := r.replacement(id); pending {
		return kms.Errorf(kms.Conflict, "the hardware root of node %s is being replaced; promote it when it has adopted the next one", id)
	}
	if st, _ := find[NodeStatus](t.Txn, tableStatus, byID, nameKey(id)); !t.replay && (len(st.Statement) == 0 || st.Time < t.clock-MaxPromoteSilence) {
		return kms.Errorf(kms.Conflict, "node %s has not been heard of for more than a minute; a voter that is not there weakens the others", id)
	}
	n.Voter = true
	n.Revision++
	insert(t.Txn, tableNode, n)
	if err := r.noMajority(id); err != nil {
		return err
	}
	t.advance()
	t.event(Event{Type: EventNodePromoted, Node: id})
	return nil
}

// removeNode ends a membership. Nothing is sealed to the node any more; its record
// stays as a tombstone, so that what it signed still verifies.
func (t *tx) removeNode(id string, leave bool, p approval.Proposal) error {
	r := t.reader()
	n, ok := r.node(id)
	if !ok {
		return r.noNode(id)
	}
	gone := Removal{Node: n, Proposal: approval.ProposalID(p.Marshal()), Time: t.clock, Index: t.index}
	for _, k := range r.keyrings() {
		// Also of a node that has not adopted its first root: copies were sealed to that
		// as soon as it was approved, and its device opens them, adopted or not.
		if !slices.Contains(k.Residency, n.Site) {
			continue
		}
		if n.Root != 0 && len(r.residents(k.Residency)) == 1 && !leave {
			return &kms.Error{Kind: kms.Conflict,
				Msg: "node " + id + " is the last one that can open keyring " + k.Name + ": its keys would be lost",
				Fix: "let another node of its residency join first, or propose the removal with leave if the keys may be lost"}
		}
		gone.Keyrings = append(gone.Keyrings, LeftKEK{k.Name, r.newestKEK(k.Name).Version})
	}
	owed := list[Version](t.Txn, tableVersion, byPending, prefixKey(id))
	t.dropCopies(id, n.Root)
	if next, pending := r.replacement(id); pending {
		t.dropCopies(id, next.Root)
		mustDB(t.Delete(tableNext, &next))
	}
	mustDB(t.Delete(tableNode, &n))
	insert(t.Txn, tableRemoved, gone)
	if err := r.votersAfter(n); err != nil {
		return err
	}
	t.settleVersions(owed)
	t.residencyChanged()
	t.advance()
	t.removed = id
	t.event(Event{Type: EventNodeRemoved, Node: id, Proposal: gone.Proposal})
	return nil
}

// settleVersions makes versions primary that only a removed node's receipt kept from
// it.
func (t *tx) settleVersions(owed []Version) {
	r := t.reader()
	for _, v := range owed {
		v, _ = r.version(v.Keyring, v.Key, v.Version) // without the copies that are gone
		k, _ := r.keyring(v.Keyring)
		t.activate(k, v)
	}
}

// votersAfter refuses the removal of a voter that leaves none, or leaves one site with
// a majority.
func (r reader) votersAfter(n Node) error {
	if !n.Voter {
		return nil
	}
	if !slices.ContainsFunc(r.nodes(), func(o Node) bool { return o.Voter }) {
		return kms.Errorf(kms.Conflict, "node %s is the only voter; without one nothing could be decided", n.ID)
	}
	return r.noMajority("")
}

// noMajority refuses voters of which one site has the majority: it alone could decide
// what stands in the log, and stop the others by leaving. Of two sites one always has
// at least half, and with an odd number of voters the majority, so it is tolerated
// where the cluster has fewer than three. promoted is the node that has become a
// voter: then only its site is looked at, so that a majority from before can be
// mended step by step.
func (r reader) noMajority(promoted string) error {
	if len(r.sites()) < 3 {
		return nil
	}
	voters, total := make(map[string]int), 0
	only := ""
	for _, n := range r.nodes() {
		if n.Voter {
			voters[n.Site]++
			total++
		}
		if n.ID == promoted {
			only = n.Site
		}
	}
	for _, s := range r.sites() {
		if v := voters[s.ID]; 2*v > total && (only == "" || only == s.ID) {
			return &kms.Error{Kind: kms.Conflict,
				Msg: majority(s.ID, "would have", v, total),
				Fix: "promote a node of another site first, or remove a voter of site " + s.ID + " first"}
		}
	}
	return nil
}

func (r reader) noNode(id string) error {
	if old, removed := r.removal(id); removed {
		return kms.Errorf(kms.NotFound, "node %s was removed by proposal %s", id, old.Proposal)
	}
	return kms.Errorf(kms.NotFound, "there is no node %s", id)
}

// joined returns the log index at which a node adopted its first hardware root, 0 for
// a node of the genesis.
func (r reader) joined(node string) uint64 {
	f, _ := find[FormerRoot](r.x, tableFormer, byID, numberKey(0, node))
	return f.Until
}

// known returns a node, also one that was removed.
func (r reader) known(id string) (Node, bool) {
	if n, ok := r.node(id); ok {
		return n, true
	}
	old, ok := r.removal(id)
	return old.Node, ok
}

// siteOf returns the site of a node, also of one that was removed. It never changes.
func (r reader) siteOf(node string) (string, bool) {
	n, ok := r.known(node)
	return n.Site, ok
}

// unsealedJoining lists what a node without a hardware root needs for its first one:
// everything that its site may open and of which somebody has a copy.
func (r reader) unsealedJoining(n Node, next Replacement) (l []Pending) {
	for _, k := range r.keyrings() {
		if !slices.Contains(k.Residency, n.Site) {
			continue
		}
		for _, kek := range list[KEK](r.x, tableKEK, byID, prefixKey(k.Name)) {
			if len(kek.Copies) > 0 && !hasCopy(kek.Copies, n.ID, next.Root) {
				l = append(l, Pending{Keyring: k.Name, Version: kek.Version})
			}
		}
		if k.Protection != kms.Hardware {
			continue
		}
		for _, v := range list[Version](r.x, tableVersion, byID, prefixKey(k.Name)) {
			if len(v.Copies) > 0 && !hasCopy(v.Copies, n.ID, next.Root) {
				l = append(l, Pending{Keyring: k.Name, Key: v.Key, Version: v.Version})
			}
		}
	}
	slices.SortStableFunc(l, func(a, b Pending) int { // KEKs first
		return cmp.Compare(min(len(a.Key), 1), min(len(b.Key), 1))
	})
	return l
}

// sameChange reports whether two proposals for one action on one target are for the
// same change of it.
func sameChange(a, b approval.Proposal) bool {
	change := func(p approval.Proposal) string {
		switch p.Action {
		case kms.ActionNode:
			params, _ := p.NodeParams() // verified before
			return string(params.Change)
		case kms.ActionSite:
			params, _ := p.SiteParams()
			return string(params.Change)
		}
		return ""
	}
	return change(a) == change(b)
}
