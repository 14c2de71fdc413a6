package interop

import (
	"slices"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// sample is true evidence with the world that it is from.
type sample struct {
	world string
	w     *statetest.World
	e     audit.Evidence
}

// worlds are histories of clusters, of which evidence is built for every decision
// that was carried out.
var worlds = map[string]func(t *testing.T) *statetest.World{
	"actions":    actions,
	"hardware":   hardware,
	"P-384":      p384,
	"KEK":        kek,
	"membership": membership,
	"every site": everySite,
	"policies":   policies,
	"custodians": custodians,
	"recovery":   recovery,
	"attested":   attested,
	"tokens":     tokens,
	"groups":     groups,
	"imports":    imports,
	"forbid":     forbid,
}

// samples builds the evidence of every world, world by world.
func samples(t *testing.T) (l []sample) {
	t.Helper()
	for name, build := range worlds {
		w, n := build(t), 0
		for _, p := range w.State().Proposals() {
			if e, err := audit.BuildEvidence(w.State(), p.ID); err == nil {
				l = append(l, sample{name, w, e})
				n++
			} else if kms.KindOf(err) != kms.Conflict && kms.KindOf(err) != kms.NotFound {
				t.Fatalf("%s: %v", name, err)
			}
		}
		if n < 3 {
			t.Fatalf("%s: only %d decisions have evidence", name, n)
		}
	}
	slices.SortFunc(l, func(a, b sample) int {
		return slices.Compare([]string{a.world, approval.ProposalID(a.e.Decision.Proposal)}, []string{b.world, approval.ProposalID(b.e.Decision.Proposal)})
	})
	return l
}

const week = 7 * 24 * time.Hour

// enrol gives a custodian of a site, new or not, a new credential.
func enrol(w *statetest.World, id, site string, approvers ...string) {
	record := statetest.Record(id, site, 0, w.AddCustodianKey(id))
	p := w.Propose(kms.ActionCustodian, "custodian/"+id, approval.CustodianParams{Custodian: record})
	w.Approve(p, approvers...)
	w.Execute(p)
}

func revoke(w *statetest.World, id string) {
	gone, _ := w.State().Custodian(id)
	gone = gone.Restored() // a proposal marks nothing
	gone.Revoked, gone.Revision = true, 0
	w.Carry(kms.ActionCustodian, "custodian/"+id, approval.CustodianParams{Custodian: gone})
}

// setRule changes a rule of the policy standard.
func setRule(w *statetest.World, a kms.Action, change func(*approval.Rule), approvers ...string) {
	w.Announce()
	standard, _ := w.State().Policy("standard")
	rules := slices.Clone(standard.Rules)
	for i := range rules {
		if rules[i].Action == a {
			change(&rules[i])
		}
	}
	p := w.Propose(kms.ActionPolicy, "policy/standard", approval.PolicyParams{Rules: rules})
	w.Approve(p, approvers...)
	w.Execute(p)
}

func destroy(w *statetest.World, target string, version uint32) {
	id := w.Propose(kms.ActionDestroy, target, approval.VersionParams{Version: version})
	w.ApproveAll(id)
	w.Advance(week)
	w.Execute(id)
}

// actions has every action on keys of protection software, while custodians and
// policies change.
func actions(t *testing.T) *statetest.World {
	w := statetest.New(t, statetest.Options{})
	w.CreateKeyring("coalition", "de", "fr", "jp")
	w.CreateKeyring("europe", "de", "fr")
	w.CreateKey("coalition", "orders", kms.Encrypt)
	w.CreateKey("coalition", "stamp", kms.Sign)
	w.CreateKey("europe", "tag", kms.MAC)
	orders := approval.KeyTarget("coalition", "orders")
	w.Rotate("coalition", "orders")
	w.Rotate("coalition", "stamp")
	w.Carry(kms.ActionSuspend, orders, nil)
	w.Carry(kms.ActionResume, orders, nil)
	retire(w, orders)
	w.Carry(kms.ActionCompromise, orders, approval.VersionParams{Version: 1})
	enrol(w, "fr-3", "fr", "fr-1", "de-1", "jp-1")
	revoke(w, "de-2")
	enrol(w, "jp-1", "jp", "de-1", "fr-1", "jp-2")
	setRule(w, kms.ActionRotate, func(r *approval.Rule) { r.Approvals, r.Required = 3, []string{"jp"} }, "fr-3", "de-1", "jp-1")
	for _, key := range []string{"coalition/orders", "europe/tag"} {
		id := w.Propose(kms.ActionRotate, "key/"+key, nil)
		w.Vote(id, "jp-2", approval.Reject)
		w.Approve(id, "fr-3", "de-1", "jp-1")
		w.Commit(id)
		w.GiveReceipts()
	}
	destroy(w, orders, 1)
	return w
}

// custodians has credentials with proofs of possession, suspended and restored ones, and
// decisions between.
func custodians(t *testing.T) *statetest.World {
	w := statetest.New(t, statetest.Options{})
	w.Announce()
	w.CreateKeyring("coalition", "de", "fr", "jp")
	w.CreateKey("coalition", "orders", kms.Encrypt)
	enrol(w, "fr-3", "fr", "fr-1", "de-1", "jp-1")
	w.SuspendCredential("fr-2", "fr-1")
	id := w.Propose(kms.ActionRotate, approval.KeyTarget("coalition", "orders"), nil)
	w.Approve(id, "fr-3", "de-1")
	w.SuspendCredential("fr-3", "fr-1")
	w.Approve(id, "jp-1")
	w.Commit(id)
	w.GiveReceipts()
	restore := w.Propose(kms.ActionCustodian, "custodian/fr-3", w.RestoreParams("fr-3"))
	w.Approve(restore, "de-1", "jp-1")
	w.Execute(restore)
	w.SuspendCredential("jp-2", "jp-1")
	id = w.Propose(kms.ActionRotate, approval.KeyTarget("coalition", "orders"), nil)
	w.Approve(id, "fr-3", "de-1")
	w.Commit(id)
	w.GiveReceipts()
	revoke(w, "jp-2")
	return w
}

// hardware has keys of protection hardware, roots that are replaced before, between
// and after commits and receipts, and a key whose creation is erased.
func hardware(t *testing.T) *statetest.World {
	w := statetest.New(t, statetest.Options{})
	w.CreateHardwareKeyring("vault", "de", "fr")
	w.CreateKey("vault", "seal", kms.Sign)
	w.CreateKey("vault", "code", kms.MAC)
	w.Rotate("vault", "seal")
	w.Rekey("node-de-1")
	w.Rotate("vault", "seal")
	w.Replace("node-fr-1", false)
	id := w.Propose(kms.ActionRotate, approval.KeyTarget("vault", "seal"), nil)
	w.ApproveAll(id)
	w.Commit(id)
	w.Reseal("node-fr-1")
	w.Do("node-fr-1", w.AdoptCommand("node-fr-1"))
	w.GiveReceipts()
	id = w.Propose(kms.ActionRotate, approval.KeyTarget("vault", "code"), nil)
	w.ApproveAll(id)
	commit := w.CommitCommand(id)
	commit.Generated = kms.OnHost
	k, _ := w.State().Key("vault", "code")
	w.Do("node-de-1", commit, statetest.Expect(k.Revision))
	w.Rekey("node-fr-1")
	w.GiveReceipts()
	destroy(w, approval.KeyTarget("vault", "seal"), 1)
	destroy(w, approval.KeyTarget("vault", "code"), 1)
	return w
}

func p384(t *testing.T) *statetest.World {
	w := statetest.New(t, statetest.Options{P384: true, Sites: []string{"de", "fr"}})
	w.CreateHardwareKeyring("vault", "de", "fr")
	w.CreateKeyring("europe", "de", "fr")
	c := w.KeyCommand("vault", "seal", kms.Sign)
	c.Algorithm, c.PublicKey = kms.ECDSAP384, statetest.PublicKey(kms.ECDSAP384)
	w.Do("node-de-1", c, statetest.As(w.Operator("de")))
	w.CreateKey("europe", "mail", kms.Encrypt)
	w.Rotate("vault", "seal")
	w.Rotate("europe", "mail")
	w.Rekey("node-fr-1")
	w.Rotate("vault", "seal")
	return w
}

func kek(t *testing.T) *statetest.World {
	w := statetest.New(t, statetest.Options{})
	w.Announce()
	w.CreateKeyring("ring", "fr", "de", "jp")
	w.CreateKeyring("europe", "fr", "de")
	w.GiveReceipts()
	w.CreateKey("ring", "data", kms.Encrypt)
	w.RotateKEK("ring")
	w.RotateKEK("europe")
	late := w.ProposeKEK("ring")
	w.CommitKEK(late)
	w.Rekey("node-jp-1")
	w.GiveReceipts()
	w.Rotate("ring", "data")
	return w
}

// membership has nodes and sites that come and go.
func membership(t *testing.T) *statetest.World {
	const fr2, it1 = "node-fr-2", "node-it-1"
	w := statetest.New(t, statetest.Options{})
	w.Announce()
	w.CreateKeyring("coalition", "de", "fr", "jp")
	w.CreateKey("coalition", "orders", kms.Encrypt)
	w.CreateHardwareKeyring("vault", "fr", "de")
	w.CreateKey("vault", "code", kms.MAC)
	w.GiveReceipts()
	w.Advance(time.Minute)
	w.Join(fr2, "fr")
	w.Rotate("coalition", "orders") // while it joins
	w.Reseal(fr2)
	w.Do(fr2, w.AdoptCommand(fr2))
	w.Announce()
	w.Advance(time.Minute)
	w.Rotate("coalition", "orders")
	w.Promote(fr2)
	waits := w.Propose(kms.ActionRotate, approval.KeyTarget("vault", "code"), nil)
	w.ApproveAll(waits)
	w.Commit(waits)
	for _, node := range []string{"node-de-1", "node-fr-1"} {
		w.Do(node, w.ReceiptCommand(node, "vault", "code", 2))
	}
	w.RemoveNode(fr2, false)
	w.Rotate("coalition", "orders")
	w.AddSite("it", 1)
	w.JoinWhole(it1, "it")
	w.Do(it1, w.KeyringCommand("rome", "it", "fr"), statetest.As(w.Operator("it")))
	w.GiveReceipts()
	w.CreateKey("rome", "seal", kms.Encrypt)
	w.Rotate("rome", "seal")
	w.Carry(kms.ActionSite, "site/it", approval.SiteParams{Change: approval.SiteCAs, CAs: [][]byte{w.CA("it").Certificate.Raw, w.CA("fr").Certificate.Raw}})
	w.AddSite("uk", 0)
	w.Carry(kms.ActionSite, "site/uk", approval.SiteParams{Change: approval.SiteRemove})
	return w
}

func everySite(t *testing.T) *statetest.World {
	w := statetest.New(t, statetest.Options{NodesPerSite: 2, Sites: []string{"de", "fr"}})
	c := w.KeyringCommand("wide", "de", "fr")
	c.Receipts = kms.EverySite
	w.Do("node-de-1", c, statetest.As(w.Operator("de")))
	w.CreateKey("wide", "orders", kms.MAC)
	for range 3 {
		id := w.Propose(kms.ActionRotate, approval.KeyTarget("wide", "orders"), nil)
		w.ApproveAll(id)
		commit := w.Commit(id)
		for _, node := range []string{"node-de-2", "node-fr-1"} {
			w.Do(node, w.ReceiptCommand(node, commit.Keyring, commit.Key, commit.Version))
		}
	}
	w.GiveReceipts()
	return w
}

// policies has direct rules, vetoes, delays, required sites and proposers who count.
func policies(t *testing.T) *statetest.World {
	hour := time.Hour.Milliseconds()
	all := statetest.Policies(3)
	set := func(r approval.Rule) {
		i := slices.IndexFunc(all[1].Rules, func(x approval.Rule) bool { return x.Action == r.Action })
		all[1].Rules[i] = r
	}
	set(approval.Rule{Action: kms.ActionSuspend, Direct: []string{"operator"}})
	set(approval.Rule{Action: kms.ActionResume, Approvals: 2, Sites: 1, Lifetime: 48 * hour, Delay: 2 * hour, ProposerMayApprove: true})
	set(approval.Rule{Action: kms.ActionRotate, Approvals: 3, Sites: 2, Required: []string{"de", "jp"}, Lifetime: 48 * hour, Veto: []string{"jp-2"}})
	w := statetest.New(t, statetest.Options{Policies: all, CustodiansPerSite: 3})
	w.CreateKeyring("coalition", "de", "fr", "jp")
	w.CreateKey("coalition", "orders", kms.Encrypt)
	orders := approval.KeyTarget("coalition", "orders")
	w.Execute(w.Propose(kms.ActionSuspend, orders, nil))
	p := w.Proposal(kms.ActionResume, orders, nil)
	p.Proposer = w.Custody("fr", "fr-1")
	resume := p.Marshal()
	w.Do("node-fr-1", state.OpenProposal{Proposal: resume}, statetest.As(p.Proposer))
	w.Approve(approval.ProposalID(resume), "fr-1", "fr-2")
	w.Advance(3 * time.Hour)
	w.Execute(approval.ProposalID(resume))
	rotate := w.Propose(kms.ActionRotate, orders, nil)
	w.Vote(rotate, "jp-3", approval.Reject)
	w.Approve(rotate, "de-1", "de-2", "jp-1")
	w.Commit(rotate)
	w.GiveReceipts()
	setRule(w, kms.ActionRotate, func(r *approval.Rule) { r.Required, r.Veto = nil, nil }, "de-1", "fr-1", "jp-1")
	w.Rotate("coalition", "orders")
	destroy(w, orders, 0)
	return w
}

// recovery goes through two recoveries, and has a recovery key.
func recovery(t *testing.T) *statetest.World {
	w := statetest.New(t, statetest.Options{})
	w.CreateKeyring("coalition", "de", "fr", "jp")
	w.GiveReceipts()
	w.Announce()
	w.CreateKey("coalition", "mail", kms.Encrypt)
	w.Rotate("coalition", "mail")
	w.SetRecovery("all", w.RecoveryParams([]string{"de", "fr", "jp"}, 3, 2, "de-1", "fr-1", "fr-2", "jp-1"))
	enrol(w, "fr-3", "fr", "fr-1", "de-1", "jp-1")
	w.Recover(w.State(), "node-de-1", "node-fr-1")
	w.Announce()
	w.Rotate("coalition", "mail")
	revoke(w, "fr-2")
	w.Recover(w.State(), "node-de-1", "node-jp-1")
	w.Announce()
	w.Rotate("coalition", "mail")
	return w
}

func attested(t *testing.T) *statetest.World {
	w := statetest.New(t, statetest.Options{Attested: map[string]string{"node-jp-1": "node-fr-1"}})
	w.CreateKeyring("coalition", "de", "fr")
	w.CreateKey("coalition", "mail", kms.Encrypt)
	n := w.NewRoot("node-fr-1")
	w.Attest(n, "node-de-1")
	w.Carry(kms.ActionNode, approval.NodeTarget("node-fr-1"), w.NodeParams("node-fr-1", n, false))
	next := w.NewRoot("node-de-1")
	w.Attest(next, "node-jp-1")
	w.Carry(kms.ActionNode, approval.NodeTarget("node-de-1"), w.NodeParams("node-de-1", next, false))
	w.Reseal("node-de-1")
	w.Do("node-de-1", w.AdoptCommand("node-de-1"))
	w.Reseal("node-fr-1")
	w.Do("node-fr-1", w.AdoptCommand("node-fr-1"))
	w.Rotate("coalition", "mail")
	return w
}

// retire makes a rule about the use of versions, and has the first one retired in spite
// of it.
func retire(w *statetest.World, orders string) {
	w.Announce()
	standard, _ := w.State().Policy("standard")
	rules := slices.Clone(standard.Rules)
	for i, r := range rules {
		if r.Action == kms.ActionDeactivate || r.Action == kms.ActionDestroy {
			rules[i].Unused = 30 * state.UseHour
		}
	}
	w.Carry(kms.ActionPolicy, "policy/standard", approval.PolicyParams{Rules: rules})
	w.Carry(kms.ActionDeactivate, orders, approval.VersionParams{Version: 1, Override: true})
}
