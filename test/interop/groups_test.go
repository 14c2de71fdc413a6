package interop

import (
	"slices"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
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
