package approval

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
)

// Bounds of a group as a policy holds it. A group that Stricter joins of several may
// be one level deeper and as long as all of them together: nothing stores it.
const (
	maxGroupDepth   = 4    // levels, the outermost counts
	maxGroupMembers = 256  // of all levels together
	maxWeight       = 1000 // of one member, and of a site's approvals
)

// Group is met when the weights of its members that are met add up to Need. With
// weights of 1 that is all-of (Need is their number), any-of (Need is 1) or k-of. A
// member is a custodian who approves, a site enough custodians of which approve, or
// another group. More approvals never make it unmet.
type Group struct {
	Need       uint32       `cbor:"need" json:"need"`
	Weight     uint32       `cbor:"weight,omitempty" json:"weight,omitempty"` // in the group above; 0 for the outermost
	Custodians []Weight     `cbor:"custodians,omitempty" json:"custodians,omitempty"`
	Sites      []SiteWeight `cbor:"sites,omitempty" json:"sites,omitempty"`
	Groups     []Group      `cbor:"groups,omitempty" json:"groups,omitempty"`
}

// Weight is what a custodian's approval weighs in a group.
type Weight struct {
	Name   string `cbor:"name" json:"name"`
	Weight uint32 `cbor:"weight" json:"weight"`
}

// SiteWeight is what a site weighs in a group once that many of its custodians approve.
type SiteWeight struct {
	Name      string `cbor:"name" json:"name"`
	Weight    uint32 `cbor:"weight" json:"weight"`
	Approvals uint32 `cbor:"approvals" json:"approvals"`
}

// tally is who approves, as far as it counts.
type tally struct {
	custodians map[string]bool
	sites      map[string]int // approvals of each site
}

// member is one entry of a group with what the approvals say of it.
type member struct {
	weight uint32
	met    bool
	words  string          // what it is, in words
	lacks  func() []string // what an unmet one still needs, in words
}

// members returns the entries of a group: custodians, sites, groups.
func (g *Group) members(t tally) (all []member) {
	for _, c := range g.Custodians {
		all = append(all, member{c.Weight, t.custodians[c.Name], c.Name, func() []string { return []string{"custodian " + c.Name} }})
	}
	for _, s := range g.Sites {
		have, words := t.sites[s.Name], custodiansOf(int(s.Approvals), s.Name)
		all = append(all, member{s.Weight, s.Approvals > 0 && have >= int(s.Approvals), words, func() []string {
			if have > 0 {
				return []string{fmt.Sprintf("%s (%d so far)", words, have)}
			}
			return []string{words}
		}})
	}
	for i := range g.Groups {
		inner := &g.Groups[i]
		all = append(all, member{inner.Weight, inner.met(t), "(" + inner.Words() + ")", func() []string { return inner.missing(t) }})
	}
	return all
}

func custodiansOf(n int, site string) string {
	if n == 1 {
		return "a custodian of site " + site
	}
	return fmt.Sprintf("%d custodians of site %s", n, site)
}

// met reports whether the members that are met weigh enough. Weights are bounded and
// so are members, so that the sum cannot overflow.
func (g *Group) met(t tally) bool { return g.sum(t) >= uint64(g.Need) && g.Need > 0 }

func (g *Group) sum(t tally) (sum uint64) {
	for _, c := range g.Custodians {
		if t.custodians[c.Name] {
			sum += uint64(c.Weight)
		}
	}
	for _, s := range g.Sites {
		if s.Approvals > 0 && t.sites[s.Name] >= int(s.Approvals) {
			sum += uint64(s.Weight)
		}
	}
	for i := range g.Groups {
		if g.Groups[i].met(t) {
			sum += uint64(g.Groups[i].Weight)
		}
	}
	return sum
}

// total is what all members weigh, and whether each of them weighs 1.
func (g *Group) total() (total uint64, plain bool) {
	plain = true
	add := func(w uint32) {
		total += uint64(w)
		plain = plain && w == 1
	}
	for _, c := range g.Custodians {
		add(c.Weight)
	}
	for _, s := range g.Sites {
		add(s.Weight)
	}
	for _, i := range g.Groups {
		add(i.Weight)
	}
	return total, plain
}

// missing says what an unmet group still needs: each of its unmet members where it
// needs all, else how many of which.
func (g *Group) missing(t tally) (out []string) {
	total, plain := g.total()
	var left []string
	for _, m := range g.members(t) {
		switch {
		case m.met:
		case total == uint64(g.Need):
			out = append(out, m.lacks()...)
		case plain:
			left = append(left, m.words)
		default:
			left = append(left, fmt.Sprintf("%s (weighs %d)", m.words, m.weight))
		}
	}
	if total == uint64(g.Need) {
		return out
	}
	need := uint64(g.Need) - g.sum(t)
	if plain {
		return []string{fmt.Sprintf("%d of: %s", need, strings.Join(left, ", "))}
	}
	return []string{fmt.Sprintf("a weight of %d from: %s", need, strings.Join(left, ", "))}
}

// Words says what the group asks for, for people.
func (g *Group) Words() string {
	total, plain := g.total()
	var words []string
	for _, m := range g.members(tally{}) {
		if !plain && total != uint64(g.Need) {
			m.words = fmt.Sprintf("%s (weighs %d)", m.words, m.weight)
		}
		words = append(words, m.words)
	}
	switch {
	case total == uint64(g.Need):
		return strings.Join(words, " and ")
	case plain && g.Need == 1:
		return strings.Join(words, " or ")
	case plain:
		return fmt.Sprintf("%d of: %s", g.Need, strings.Join(words, ", "))
	}
	return fmt.Sprintf("a weight of %d from: %s", g.Need, strings.Join(words, ", "))
}

// validate checks the shape of a group and of those in it; depth is that of g, 1 for
// the outermost. What a policy may hold is bounded further by checkSize.
func (g *Group) validate(depth int) error {
	switch {
	case depth > maxGroupDepth+1:
		return kms.Errorf(kms.Invalid, "groups are nested more than %d deep", maxGroupDepth)
	case g.Need == 0:
		return kms.Errorf(kms.Invalid, "a group's need is missing; it must be at least 1")
	case depth == 1 && g.Weight != 0:
		return kms.Errorf(kms.Invalid, "the outermost group has a weight, which weighs in nothing")
	}
	if err := sortedWeights("custodian", len(g.Custodians), func(i int) (string, uint32) { return g.Custodians[i].Name, g.Custodians[i].Weight }); err != nil {
		return err
	}
	if err := sortedWeights("site", len(g.Sites), func(i int) (string, uint32) { return g.Sites[i].Name, g.Sites[i].Weight }); err != nil {
		return err
	}
	for _, s := range g.Sites {
		if s.Approvals == 0 || s.Approvals > maxWeight {
			return kms.Errorf(kms.Invalid, "site %s in a group needs the approvals of 1 to %d of its custodians, not of %d", s.Name, maxWeight, s.Approvals)
		}
	}
	for i := range g.Groups {
		inner := &g.Groups[i]
		if inner.Weight == 0 || inner.Weight > maxWeight {
			return kms.Errorf(kms.Invalid, "a group in a group weighs %d; it must be 1 to %d", inner.Weight, maxWeight)
		}
		if err := inner.validate(depth + 1); err != nil {
			return err
		}
	}
	if total, _ := g.total(); total < uint64(g.Need) {
		return kms.Errorf(kms.Invalid, "a group needs %d, but the weights of its members add up to %d", g.Need, total)
	}
	return nil
}

func sortedWeights(what string, n int, at func(int) (string, uint32)) error {
	last := ""
	for i := range n {
		name, weight := at(i)
		if err := kms.CheckName(what, name); err != nil {
			return err
		}
		if name <= last {
			return kms.Errorf(kms.Invalid, "%s %q in a group: the list is not sorted or repeats it", what, name)
		}
		if weight == 0 || weight > maxWeight {
			return kms.Errorf(kms.Invalid, "%s %s weighs %d in a group; it must be 1 to %d", what, name, weight, maxWeight)
		}
		last = name
	}
	return nil
}

// size returns how many levels and members a group has.
func (g *Group) size() (depth, members int) {
	members = len(g.Custodians) + len(g.Sites) + len(g.Groups)
	for i := range g.Groups {
		d, m := g.Groups[i].size()
		depth, members = max(depth, d), members+m
	}
	return depth + 1, members
}

// checkSize holds a group against what a policy may hold.
func (g *Group) checkSize() error {
	depth, members := g.size()
	if depth > maxGroupDepth {
		return kms.Errorf(kms.Invalid, "groups are nested %d deep; the limit is %d", depth, maxGroupDepth)
	}
	if members > maxGroupMembers {
		return kms.Errorf(kms.Invalid, "the groups have %d members; the limit is %d", members, maxGroupMembers)
	}
	return nil
}

// each calls f for a group and for all in it.
func (g *Group) each(f func(*Group)) {
	if g == nil {
		return
	}
	f(g)
	for i := range g.Groups {
		g.Groups[i].each(f)
	}
}

// both returns the group that is met when a and b are, nil for nobody's wish. It does
// not depend on their order.
func both(a, b *Group) *Group {
	parts := append(terms(a), terms(b)...)
	slices.SortFunc(parts, func(x, y Group) int { return bytes.Compare(canon.Marshal(x), canon.Marshal(y)) })
	parts = slices.CompactFunc(parts, func(x, y Group) bool { return bytes.Equal(canon.Marshal(x), canon.Marshal(y)) })
	switch len(parts) {
	case 0:
		return nil
	case 1:
		parts[0].Weight = 0
		return &parts[0]
	}
	return &Group{Need: uint32(len(parts)), Groups: parts}
}

// terms returns the groups all of which a group asks for: itself, with the weight 1,
// or those that it is made of where it asks for all of them and for nothing else.
func terms(g *Group) []Group {
	if g == nil {
		return nil
	}
	if _, plain := g.total(); plain && len(g.Groups) == int(g.Need) && len(g.Custodians) == 0 && len(g.Sites) == 0 {
		return slices.Clone(g.Groups)
	}
	one := *g
	one.Weight = 1
	return []Group{one}
}

// impossible says why the custodians, all approving, could not meet the group, or
// returns "".
func (g *Group) impossible(t tally, known map[string]bool) string {
	stranger := ""
	g.each(func(x *Group) {
		for _, c := range x.Custodians {
			if !known[c.Name] && stranger == "" {
				stranger = c.Name
			}
		}
	})
	switch {
	case stranger != "":
		return fmt.Sprintf("has a group with %s, who is no custodian", stranger)
	case g.met(t):
		return ""
	}
	total, _ := g.total()
	return fmt.Sprintf("has a group that needs %d of the %d that its members weigh, but with the custodians that are not revoked it could reach %d; it would still lack %s",
		g.Need, total, g.sum(t), strings.Join(g.missing(t), ", "))
}

// GroupSites returns the sites that the rule's groups name, sorted.
func (r Rule) GroupSites() (sites []string) {
	r.Need.each(func(g *Group) {
		for _, s := range g.Sites {
			sites = append(sites, s.Name)
		}
	})
	slices.Sort(sites)
	return slices.Compact(sites)
}
