package interop

import (
	"slices"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// groups is a history of rules with groups, one within another, with times of release,
// and with the action activate.
func groups(t *testing.T) *statetest.World {
	w := statetest.New(t, statetest.Options{CustodiansPerSite: 3})
	w.Announce()
	w.CreateKeyring("coalition", "de", "fr", "jp")
	w.CreateKey("coalition", "orders", kms.Encrypt)
	w.GiveReceipts()
	first := approval.Group{
		Need: 3, Custodians: []approval.Weight{{Name: "de-1", Weight: 2}, {Name: "fr-3", Weight: 1}},
		Groups: []approval.Group{{Need: 1, Weight: 1, Sites: []approval.SiteWeight{{Name: "jp", Weight: 1, Approvals: 2}}}},
	}
	set := func(need *approval.Group, release int64) string {
		standard, _ := w.State().Policy("standard")
		rules := slices.DeleteFunc(slices.Clone(standard.Rules), func(r approval.Rule) bool { return r.Action == kms.ActionActivate })
		at := slices.IndexFunc(rules, func(r approval.Rule) bool { return r.Action == kms.ActionRotate })
		rules[at].Need, rules[at].NotBefore = need, release
		rules = slices.Insert(rules, 0, approval.Rule{Action: kms.ActionActivate, Approvals: 2, Sites: 2, Lifetime: rules[at].Lifetime})
		return w.Propose(kms.ActionPolicy, "policy/standard", approval.PolicyParams{Rules: rules})
	}
	carry := func(id string, custodians ...string) {
		w.Approve(id, custodians...)
		w.Execute(id)
	}
	rotate := func(custodians ...string) {
		id := w.Propose(kms.ActionRotate, "key/coalition/orders", nil)
		w.Approve(id, custodians...)
		w.Advance(2 * time.Hour)
		w.Commit(id)
	}
	carry(set(&first, w.State().Clock()+time.Hour.Milliseconds()), "de-1", "fr-3")
	rotate("de-1", "fr-1", "jp-1", "jp-2")
	w.GiveReceipts()
	add := statetest.Record("fr-9", "fr", 0, w.AddCustodianKey("fr-9"))
	carry(w.Propose(kms.ActionCustodian, "custodian/fr-9", approval.CustodianParams{Custodian: add}), "de-1", "fr-3", "jp-1")
	second := approval.Group{Need: 1, Custodians: []approval.Weight{{Name: "fr-9", Weight: 1}}, Sites: []approval.SiteWeight{{Name: "jp", Weight: 1, Approvals: 3}}}
	carry(set(&second, 0), "de-1", "fr-3", "fr-9")
	rotate("de-2", "fr-9")
	w.Do("node-de-1", w.ReceiptCommand("node-de-1", "coalition", "orders", 3))
	carry(w.Propose(kms.ActionActivate, "key/coalition/orders", approval.VersionParams{Version: 3}), "de-1", "jp-1")
	carry(set(nil, 0), "de-3", "jp-1", "jp-2", "jp-3")
	return w
}

// changedGroup changes the group, or the time of release, of a rule in a decision on a
// policy, or gives or takes one; the custodians who took part sign once more.
func changedGroup(ed editor, s, _ sample, e *audit.Evidence) bool {
	for _, d := range decisions(e) {
		p, err := approval.ParseProposal(d.Proposal)
		if err != nil {
			ed.t.Fatal(err)
		}
		if p.Action != kms.ActionPolicy {
			continue
		}
		params, err := p.PolicyParams()
		if err != nil {
			ed.t.Fatal(err)
		}
		grouped := slices.DeleteFunc(ordered(len(params.Rules)), func(i int) bool { return params.Rules[i].Need == nil })
		if len(grouped) == 0 && ed.r.IntN(3) > 0 {
			continue // rather one that has a group
		}
		if len(grouped) == 0 {
			grouped = ordered(len(params.Rules))
		}
		r := &params.Rules[statetest.Pick(ed.r, grouped)]
		switch ed.r.IntN(6) {
		case 0:
			r.NotBefore = statetest.Pick(ed.r, []int64{-1, 0, p.Created, p.Expires, 1 << 53})
		case 1:
			r.Need = nil
		default:
			ed.group(s, r)
		}
		p.Parameters = canon.Marshal(params)
		again, ok := ed.redecided(s.w, *d, p.Marshal())
		*d = again
		return ok
	}
	return false
}

// group changes one thing of a rule's group, or gives it one.
func (ed editor) group(s sample, r *approval.Rule) {
	if r.Need == nil {
		c := statetest.Pick(ed.r, s.w.State().Custodians())
		r.Need = &approval.Group{Need: 1, Custodians: []approval.Weight{{Name: c.ID, Weight: 1}}}
		return
	}
	g := r.Need
	for len(g.Groups) > 0 && ed.r.IntN(2) == 0 {
		g = &g.Groups[0]
	}
	switch ed.r.IntN(6) {
	case 0:
		g.Need = uint32(ed.r.IntN(5))
	case 1:
		g.Weight = uint32(ed.r.IntN(3))
	case 2:
		g.Custodians = append(g.Custodians, approval.Weight{Name: statetest.Pick(ed.r, []string{"zz-1", "a-1"}), Weight: 1})
	case 3:
		g.Sites = append(g.Sites, approval.SiteWeight{Name: statetest.Pick(ed.r, []string{"zz", "de"}), Weight: uint32(ed.r.IntN(1002)), Approvals: 1})
	case 4:
		for range ed.r.IntN(5) {
			g.Groups = append(g.Groups, approval.Group{Need: 1, Weight: 1, Custodians: []approval.Weight{{Name: "de-1", Weight: 1}}})
			g = &g.Groups[len(g.Groups)-1]
		}
	default:
		if len(g.Custodians) > 0 {
			g.Custodians[0].Weight = uint32(ed.r.IntN(4))
		} else {
			g.Sites, g.Need = nil, 1
		}
	}
}
