package state

import (
	"cmp"
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
)

// Member is a server of the Raft cluster.
type Member struct {
	ID    string `cbor:"id"`
	Voter bool   `cbor:"voter"`
}

// Membership is the latest change of the members that custodians have decided. Until
// a node has said that Raft counts with the new list (ConfirmMembers), no other change
// is carried out: Raft changes one server at a time.
type Membership struct {
	Node      string   `cbor:"node"`
	Before    []Member `cbor:"before"` // the list that was in force, sorted by ID
	Proposal  string   `cbor:"proposal"`
	Index     uint64   `cbor:"index"`     // of the execution in the log
	Confirmed uint64   `cbor:"confirmed"` // index of Statement in the log, 0 until then
	Time      int64    `cbor:"time"`      // cluster clock when confirmed
	Statement []byte   `cbor:"statement"` // the ConfirmMembers
}

// membershipID is constant: there is one record, that of the latest change.
func membershipID(*Membership) []byte { return nameKey("members") }

// ConfirmMembers says that Raft's list of servers is the one that the state asks for
// since the change at Index. The leader sends it.
type ConfirmMembers struct {
	Index   uint64   `cbor:"index"`   // Membership.Index
	Members []Member `cbor:"members"` // the list, sorted by ID
}

func (c ConfirmMembers) validate(e Envelope) error {
	if err := sortedIDs("member", c.Members, MaxNodes, func(m Member) string { return m.ID }); err != nil {
		return err
	}
	switch {
	case c.Index == 0:
		return kms.Errorf(kms.Invalid, "confirmation: it needs the log index of the change of members")
	case e.Principal != "":
		return kms.Errorf(kms.Invalid, "confirmation: a node gives it on nobody's behalf")
	}
	return noExpect(e)
}

func (ConfirmMembers) verify(*tx) error { return nil }

func (c ConfirmMembers) apply(t *tx) error {
	r := t.reader()
	m, ok := r.membership()
	switch {
	case !ok || m.Confirmed != 0:
		return kms.Errorf(kms.Conflict, "no change of the members waits to be confirmed")
	case c.Index != m.Index:
		return kms.Errorf(kms.Conflict, "the change of members that waits to be confirmed is that of log index %d, not %d", m.Index, c.Index)
	case !slices.Equal(c.Members, r.members()):
		return kms.Errorf(kms.Conflict, "Raft's members are %s; those of the state are %s", memberText(c.Members), memberText(r.members()))
	}
	m.Confirmed, m.Time, m.Statement = t.index, t.clock, t.raw
	insert(t.Txn, tableMembership, m)
	t.event(Event{Type: EventMembersConfirmed, Node: m.Node, Proposal: m.Proposal})
	return nil
}

func memberText(l []Member) string {
	var names []string
	for _, m := range l {
		if m.Voter {
			names = append(names, m.ID+" (voter)")
		} else {
			names = append(names, m.ID)
		}
	}
	return strings.Join(names, ", ")
}

func (r reader) membership() (Membership, bool) {
	return find[Membership](r.x, tableMembership, byID, membershipID(nil))
}

func (r reader) members() []Member {
	var l []Member
	for _, n := range r.nodes() {
		l = append(l, Member{n.ID, n.Voter})
	}
	return l
}

// Members returns the servers that Raft must have, sorted by ID: every node that has
// not been removed, those that have yet to adopt their first hardware root among them.
func (s *State) Members() []Member { return s.reader().members() }

// Membership returns the latest change of the members, if there was one.
func (s *State) Membership() (Membership, bool) { return s.reader().membership() }

// PendingMembers returns the list of members before the change that is not yet
// confirmed: Raft's may still be that. pending is false when there is none.
func (s *State) PendingMembers() (before []Member, pending bool) {
	m, ok := s.Membership()
	if !ok || m.Confirmed != 0 {
		return nil, false
	}
	return slices.Clone(m.Before), true
}

// Removal is a node that was removed. Its identifier and its keys never come back.
type Removal struct {
	Node     Node      `cbor:"node"`     // as it was
	Keyrings []LeftKEK `cbor:"keyrings"` // whose keys its device could open, adopted or not; sorted by name
	Proposal string    `cbor:"proposal"`
	Time     int64     `cbor:"time"`  // cluster clock
	Index    uint64    `cbor:"index"` // of the execution in the log
}

// LeftKEK is the newest KEK version of a keyring that a removed node could open: what
// is wrapped under it, or an older one, the node's device may still open. 0 for protection hardware.
type LeftKEK struct {
	Keyring string `cbor:"keyring"`
	Version uint32 `cbor:"version"`
}

func removalID(r *Removal) []byte { return nameKey(r.Node.ID) }

func (r reader) removal(node string) (Removal, bool) {
	return find[Removal](r.x, tableRemoved, byID, nameKey(node))
}

func (r reader) removals() []Removal { return list[Removal](r.x, tableRemoved, byID, []byte{}) }

// Removed reports whether a node of that identifier was removed.
func (s *State) Removed(node string) bool {
	_, ok := s.Removal(node)
	return ok
}

// Removal returns what is known of a removed node.
func (s *State) Removal(node string) (Removal, bool) { return s.reader().removal(node) }

// Removals returns the removed nodes in the order in which they were removed.
func (s *State) Removals() []Removal {
	l := s.reader().removals()
	slices.SortFunc(l, func(a, b Removal) int { return cmp.Compare(a.Index, b.Index) })
	return l
}
