package statetest

import (
	"crypto/sha256"
	"slices"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
)

// ImportParams are the parameters to import a key of a purpose's default algorithm by
// the first node that can open the keyring.
func (w *World) ImportParams(keyring, name string, purpose kms.Purpose) approval.ImportParams {
	w.t.Helper()
	k := w.KeyCommand(keyring, name, purpose)
	sealed := sha256.Sum256([]byte("sealed " + kms.KeyPath(keyring, name)))
	return approval.ImportParams{
		Node: w.State().ResidentNodes(keyring)[0].ID, Purpose: purpose, Algorithm: k.Algorithm, PublicKey: k.PublicKey, Sealed: sealed[:],
	}
}

// ImportCommand returns the command that brings the key which an authorised proposal
// asks for.
func (w *World) ImportCommand(id string) state.ImportKey {
	w.t.Helper()
	p, _ := w.State().Proposal(id)
	_, name, err := approval.ParseTarget(p.Content.Target)
	if err != nil {
		w.t.Fatal(err)
	}
	ring, key, _ := kms.SplitKeyPath(name)
	params, err := p.Content.ImportParams()
	if err != nil {
		w.t.Fatal(err)
	}
	c := w.KeyCommand(ring, key, params.Purpose)
	c.Algorithm, c.PublicKey, c.RotationPeriod = params.Algorithm, params.PublicKey, params.RotationPeriod
	if c.Generated != "" {
		c.Generated = kms.OnHost
	}
	return state.ImportKey{Proposal: id, Key: c}
}

// ImportKey imports a key, from the proposal to the command, and returns the proposal.
func (w *World) ImportKey(keyring, name string, purpose kms.Purpose) string {
	w.t.Helper()
	params := w.ImportParams(keyring, name, purpose)
	id := w.Propose(kms.ActionImport, approval.KeyTarget(keyring, name), params)
	w.ApproveAll(id)
	w.Do(params.Node, w.ImportCommand(id))
	return id
}

// SetRule gives a policy a rule for an action, in place of the one that it may have, by
// a proposal.
func (w *World) SetRule(policy string, r approval.Rule) {
	w.t.Helper()
	now, _ := w.State().Policy(policy)
	rules := slices.DeleteFunc(slices.Clone(now.Rules), func(x approval.Rule) bool { return x.Action == r.Action })
	rules = append(rules, r)
	slices.SortFunc(rules, func(a, b approval.Rule) int { return strings.Compare(string(a.Action), string(b.Action)) })
	w.Carry(kms.ActionPolicy, approval.PolicyTarget(policy), approval.PolicyParams{Rules: rules, Attested: now.Attested})
}

// AllowImport gives the policy of the keyrings a rule to import keys: two custodians of
// two sites, within a day.
func (w *World) AllowImport() {
	w.t.Helper()
	w.SetRule("standard", approval.Rule{Action: kms.ActionImport, Approvals: 2, Sites: 2, Lifetime: 24 * time.Hour.Milliseconds()})
}
