package engine

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

func policyView(p approval.Policy) wire.Policy {
	v := wire.Policy{Name: p.Name, Revision: p.Revision, Rules: []wire.Rule{}, Attested: p.Attested, Forbid: suiteNames(p.Forbid)}
	for _, r := range p.Rules {
		v.Rules = append(v.Rules, ruleView(r))
		v.Summary = append(v.Summary, ruleSentence(r))
	}
	if p.Attested {
		v.Summary = append(v.Summary, "keyrings under it: the hardware of every resident node must be attested")
	}
	if len(p.Forbid) > 0 {
		v.Summary = append(v.Summary, "nothing new of the suites "+strings.Join(v.Forbid, ", "))
	}
	return v
}

// suiteNames returns the names of suites, or numbers of those that this program does not
// know.
func suiteNames(l []uint16) (names []string) {
	for _, id := range l {
		names = append(names, pqc.SuiteID(id).String())
	}
	return names
}

// SuitesFromWire returns the suites of the names that a request gives, sorted. Errors:
// kms.Invalid for one that there is not.
func SuitesFromWire(names []string) (l []uint16, err error) {
	for _, name := range names {
		s, ok := pqc.ByName(name)
		if !ok {
			return nil, kms.Errorf(kms.Invalid, "there is no suite %q", name)
		}
		l = append(l, uint16(s.ID))
	}
	slices.Sort(l)
	return slices.Compact(l), nil
}

func ruleView(r approval.Rule) wire.Rule {
	return wire.Rule{
		Action: string(r.Action), Direct: r.Direct, Approvals: r.Approvals, Sites: r.Sites, Required: r.Required,
		ProposerMayApprove: r.ProposerMayApprove, DelayMS: r.Delay, LifetimeMS: r.Lifetime, Veto: r.Veto, Need: groupView(r.Need), NotBefore: at(r.NotBefore), UnusedMS: r.Unused,
	}
}

func groupView(g *approval.Group) *wire.Group {
	if g == nil {
		return nil
	}
	v := &wire.Group{Need: g.Need, Weight: g.Weight}
	for _, c := range g.Custodians {
		v.Custodians = append(v.Custodians, wire.Weight(c))
	}
	for _, s := range g.Sites {
		v.Sites = append(v.Sites, wire.SiteWeight(s))
	}
	for i := range g.Groups {
		v.Groups = append(v.Groups, *groupView(&g.Groups[i]))
	}
	return v
}

// RuleFromWire returns the rule that a request says, its lists sorted.
func RuleFromWire(r wire.Rule) approval.Rule {
	sorted := func(s []string) []string { return slices.Sorted(slices.Values(s)) }
	release := int64(0)
	if !r.NotBefore.IsZero() {
		release = r.NotBefore.UnixMilli()
	}
	return approval.Rule{
		Action: kms.Action(r.Action), Direct: sorted(r.Direct), Approvals: r.Approvals, Sites: r.Sites,
		Required: sorted(r.Required), ProposerMayApprove: r.ProposerMayApprove, Delay: r.DelayMS,
		Lifetime: r.LifetimeMS, Veto: sorted(r.Veto), Need: groupFromWire(r.Need), NotBefore: release, Unused: r.UnusedMS,
	}
}

// groupFromWire returns the group that a request says, its lists sorted and what has no
// weight with the weight 1. The outermost has none.
func groupFromWire(g *wire.Group) *approval.Group {
	if g == nil {
		return nil
	}
	out := &approval.Group{Need: g.Need, Weight: g.Weight}
	for _, c := range g.Custodians {
		out.Custodians = append(out.Custodians, approval.Weight{Name: c.Name, Weight: cmp.Or(c.Weight, 1)})
	}
	for _, s := range g.Sites {
		out.Sites = append(out.Sites, approval.SiteWeight{Name: s.Name, Weight: cmp.Or(s.Weight, 1), Approvals: s.Approvals})
	}
	for i := range g.Groups {
		inner := groupFromWire(&g.Groups[i])
		inner.Weight = cmp.Or(inner.Weight, 1)
		out.Groups = append(out.Groups, *inner)
	}
	slices.SortFunc(out.Custodians, func(a, b approval.Weight) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(out.Sites, func(a, b approval.SiteWeight) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// ruleSentence says what a rule says.
func ruleSentence(r approval.Rule) string {
	if len(r.Direct) > 0 {
		return fmt.Sprintf("%s: a single %s may do it", r.Action, strings.Join(r.Direct, " or "))
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s from %s", r.Action, count(int(r.Approvals), "approval"), count(int(r.Sites), "site"))
	if len(r.Required) > 0 {
		fmt.Fprintf(&b, ", among them %s", strings.Join(r.Required, " and "))
	}
	if r.Need != nil {
		fmt.Fprintf(&b, ", and besides %s", r.Need.Words())
	}
	if r.ProposerMayApprove {
		b.WriteString(", the proposer's counts")
	}
	if r.Delay > 0 {
		fmt.Fprintf(&b, ", then a delay of %s", duration(r.Delay))
	}
	if r.NotBefore > 0 {
		fmt.Fprintf(&b, "; not before %s", at(r.NotBefore).Format(time.RFC3339))
	}
	if len(r.Veto) > 0 {
		fmt.Fprintf(&b, "; %s may veto", strings.Join(r.Veto, " or "))
	}
	if r.Unused > 0 {
		fmt.Fprintf(&b, "; the version must not have been used for %s, or the proposal says override", duration(r.Unused))
	}
	if r.Lifetime > 0 {
		fmt.Fprintf(&b, "; open for at most %s", duration(r.Lifetime))
	}
	return b.String()
}
