package state

import (
	"cmp"
	"slices"

	"github.com/conclave-kms/conclave/kms"
)

// CommandKind is a command type with its version.
type CommandKind struct {
	Type    Type   `cbor:"type"`
	Version uint16 `cbor:"version"`
}

// MaxKinds is how many kinds of commands a node may announce.
const MaxKinds = 1024

// Announce says what the program of the origin node knows: the kinds of commands
// beyond those that every release knows, and the newest format of snapshots that it
// reads. A kind that not all nodes have announced is refused by all of them, so
// that none meets a command that it does not know. What was announced once is
// announced for good: each announcement of a node repeats its former kinds.
type Announce struct {
	Kinds   []CommandKind `cbor:"kinds"` // sorted by type, then version; without those that every release knows
	Format  uint8         `cbor:"format"`
	Program string        `cbor:"program"` // the release's name, for people
}

// Release is what a node has announced last.
type Release struct {
	Node      string        `cbor:"node"`
	Kinds     []CommandKind `cbor:"kinds"`
	Format    uint8         `cbor:"format"`
	Program   string        `cbor:"program"`
	Time      int64         `cbor:"time"`  // cluster clock
	Index     uint64        `cbor:"index"` // of Statement in the log
	Statement []byte        `cbor:"statement"`
}

func releaseID(r *Release) []byte { return nameKey(r.Node) }

// everywhere reports whether every release that takes part in a cluster knows a kind.
func (k CommandKind) everywhere() bool {
	return k.Version == 1 && (k.Type >= TypeTick && k.Type <= TypeRefuseCopy || k.Type == TypeAnnounce)
}

func (k CommandKind) compare(o CommandKind) int {
	return cmp.Or(cmp.Compare(k.Type, o.Type), cmp.Compare(k.Version, o.Version))
}

// Program returns what this program has to announce under a name.
func Program(name string) Announce {
	a := Announce{Format: snapshotFormat, Program: name}
	for k := range decoders {
		if !k.everywhere() {
			a.Kinds = append(a.Kinds, k)
		}
	}
	slices.SortFunc(a.Kinds, CommandKind.compare)
	return a
}

// News returns what a node whose program is a has to announce: everything it
// announced before and the rest of a. ok is false when that stands in the state already.
func (s *State) News(node string, a Announce) (news Announce, ok bool) {
	r, announced := s.Release(node)
	a.Kinds = slices.Concat(a.Kinds, r.Kinds)
	slices.SortFunc(a.Kinds, CommandKind.compare)
	a.Kinds = slices.Compact(a.Kinds)
	a.Format = max(a.Format, r.Format)
	return a, !announced || !r.same(a)
}

func (r Release) same(a Announce) bool {
	return slices.Equal(r.Kinds, a.Kinds) && r.Format == a.Format && r.Program == a.Program
}

// Forgotten lists what a node has announced and this program does not know: it was
// started with an older release than before, and halts when such a command comes.
func (s *State) Forgotten(node string) []CommandKind {
	r, _ := s.Release(node)
	return slices.DeleteFunc(slices.Clone(r.Kinds), func(k CommandKind) bool { _, known := decoders[k]; return known })
}

func (c Announce) validate(e Envelope) error {
	switch {
	case len(c.Kinds) > MaxKinds:
		return kms.Errorf(kms.Invalid, "there are %d kinds of commands; the limit is %d", len(c.Kinds), MaxKinds)
	case c.Format < baseFormat:
		return kms.Errorf(kms.Invalid, "snapshots of format %d are older than what every release reads, %d", c.Format, baseFormat)
	}
	for i, k := range c.Kinds {
		if k.everywhere() || k.Type == 0 || k.Version == 0 {
			return kms.Errorf(kms.Invalid, "command type %d version %d is not to be announced", k.Type, k.Version)
		}
		if i > 0 && c.Kinds[i-1].compare(k) >= 0 {
			return kms.Errorf(kms.Invalid, "the kinds of commands are not sorted or repeat one")
		}
	}
	if err := checkText("program", c.Program, true); err != nil {
		return err
	}
	return noExpect(e)
}

func (Announce) verify(*tx) error { return nil }

func (c Announce) apply(t *tx) error {
	r, announced := find[Release](t.Txn, tableRelease, byID, nameKey(t.env.Origin))
	if announced && r.same(c) {
		return kms.Errorf(kms.Conflict, "node %s has announced the same before", t.env.Origin)
	}
	for _, k := range r.Kinds {
		if !slices.Contains(c.Kinds, k) {
			return kms.Errorf(kms.Conflict, "node %s has announced command type %d version %d before and must repeat it", t.env.Origin, k.Type, k.Version)
		}
	}
	if c.Format < r.Format {
		return kms.Errorf(kms.Conflict, "node %s has announced snapshots of format %d before", t.env.Origin, r.Format)
	}
	insert(t.Txn, tableRelease, Release{
		Node: t.env.Origin, Kinds: c.Kinds, Format: c.Format, Program: c.Program, Time: t.clock, Index: t.index, Statement: t.raw,
	})
	t.event(Event{Type: EventReleaseAnnounced, Node: t.env.Origin})
	return nil
}

// extends: what a node announced stays announced.
func (r *Release) extends(was *Release) bool {
	return r.Index >= was.Index && r.Format >= was.Format &&
		!slices.ContainsFunc(was.Kinds, func(k CommandKind) bool { return !slices.Contains(r.Kinds, k) })
}

// Release returns what a node has announced last.
func (s *State) Release(node string) (Release, bool) {
	return find[Release](s.read(), tableRelease, byID, nameKey(node))
}

// Lacking lists the nodes that have not announced a kind of command, by id. A node of
// the genesis that has announced nothing lacks all; one that joined later counts from its
// first announcement on, since what came before its time it must know anyhow.
func (s *State) Lacking(k CommandKind) []string {
	if k.everywhere() {
		return nil
	}
	var l []string
	for _, n := range s.Nodes() {
		r, announced := s.Release(n.ID)
		_, founding := s.genesis.siteOf(n.ID)
		if (announced || founding) && !slices.Contains(r.Kinds, k) {
			l = append(l, n.ID)
		}
	}
	return l
}

// lackingBut is Lacking without the nodes of a site.
func (s *State) lackingBut(k CommandKind, site string) []string {
	return slices.DeleteFunc(s.Lacking(k), func(id string) bool {
		n, _ := s.Node(id)
		return n.Site == site
	})
}

// checkKind refuses a command of a kind that some node may not know. It looks at the
// state alone, so that a program that does not know the kind decides likewise. The
// confirmation of a removal does not wait for the other nodes of that site, see
// membersMayChange.
func (s *State) checkKind(e Envelope) error {
	kind, leaving := CommandKind{e.Type, e.Version}, ""
	if m, ok := s.Membership(); ok && m.Confirmed == 0 && kind == (CommandKind{TypeConfirmMembers, 1}) {
		gone, _ := s.Removal(m.Node)
		leaving = gone.Node.Site
	}
	lacking := s.lackingBut(kind, leaving)
	if len(lacking) == 0 {
		return nil
	}
	return &kms.Error{Kind: kms.Unavailable,
		Msg: "the release that node " + lacking[0] + " runs has not announced commands of type " + decimal(uint64(e.Type)) +
			" version " + decimal(uint64(e.Version)) + "; such a command is taken when all nodes know it",
		Fix: "start the node, with a newer release if need be, or remove it"}
}

// format is the newest format of snapshots that this program writes and every node
// reads. The hash that nodes compare is of that format.
func (s *State) format() uint8 {
	f := snapshotFormat
	for _, n := range s.Nodes() {
		r, announced := s.Release(n.ID)
		if _, founding := s.genesis.siteOf(n.ID); announced || founding {
			f = min(f, max(r.Format, baseFormat))
		}
	}
	return f
}
