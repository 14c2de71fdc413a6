package audit

import (
	"bytes"
	"fmt"
	"maps"
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/pqc"
)

// replay is the cluster as far as authority goes: who is a custodian and which
// policies hold, derived from the genesis through one governance decision after
// another. Nothing in it is taken on anybody's word.
type replay struct {
	genesis    state.Genesis
	cluster    string
	history    history
	nodes      map[string]*member // those that were removed too
	members    [][]state.Node     // who was a member with a hardware root, one time after the other; ID and Site alone
	since      int                // index in members from the last removal on
	sites      map[string]site    // those that were removed too
	custodians map[string]approval.Custodian
	policies   map[string]approval.Policy
	past       map[string][]approval.Policy // every revision so far, by name
	collected  uint64                       // while evidence is built: where in the log the last decision in it was executed
	imports    map[string]decided           // decisions by which keys were imported, by path
}

// newReplay verifies the genesis.
func newReplay(signed state.SignedGenesis) (*replay, error) {
	g, err := signed.Verify()
	if err != nil {
		return nil, err
	}
	w := &replay{
		genesis: g, cluster: kms.ClusterID(signed.Genesis), history: foundedHistory(kms.ClusterID(signed.Genesis)),
		nodes:      make(map[string]*member),
		sites:      make(map[string]site),
		custodians: make(map[string]approval.Custodian),
		policies:   make(map[string]approval.Policy),
		past:       make(map[string][]approval.Policy),
		imports:    make(map[string]decided),
	}
	for _, n := range g.Nodes {
		w.nodes[n.ID] = &member{site: n.Site, revision: n.Revision, roots: []root{{n.Root, n.HardwareRoot()}}}
	}
	for _, s := range g.Sites {
		w.sites[s.ID] = site{domain: s.TrustDomain, revision: 1}
	}
	w.mark(false)
	for _, c := range g.Custodians {
		w.custodians[c.ID] = c
	}
	for _, p := range g.Policies {
		w.setPolicy(p)
	}
	return w, nil
}

func (w *replay) setPolicy(p approval.Policy) {
	w.policies[p.Name] = p
	w.past[p.Name] = append(w.past[p.Name], p)
}

func (w *replay) custodian(id string) (approval.Custodian, bool) {
	c, ok := w.custodians[id]
	return c, ok
}

// enrolled reports whether a site has or had a custodian.
func (w *replay) enrolled(site string) bool {
	for _, c := range w.custodians {
		if c.Site == site {
			return true
		}
	}
	return false
}

func (w *replay) siteOf(node string) (string, bool) {
	n, ok := w.node(node)
	return n.Site, ok
}

// signed is an envelope with the number of its origin's hardware root that signed it.
type signed struct {
	state.Envelope
	root uint32
}

// command verifies a signed command of a node of this cluster, by any of the
// hardware roots that it has or had, and decodes it.
func command[T state.Command](w *replay, what string, raw []byte) (e signed, c T, err error) {
	return commandBy[T](w, what, raw, func(m *member) []root { return m.roots })
}

// commandBy is command for roots of the origin that the caller chooses.
func commandBy[T state.Command](w *replay, what string, raw []byte, by func(*member) []root) (e signed, c T, err error) {
	envelope, signature, err := state.Split(raw)
	if err != nil {
		return e, c, refuse(kms.Invalid, err, "%s: %v", what, err)
	}
	var cmd state.Command
	e.Envelope, cmd, err = state.ParseEnvelope(envelope)
	if err != nil {
		return e, c, refuse(kms.Invalid, err, "%s: %v", what, err)
	}
	if known, err := w.reach(e.Cluster); err != nil {
		return e, c, err
	} else if !known {
		return e, c, refuse(kms.Invalid, nil, "%s: the command is for another cluster", what)
	}
	n, ok := w.node(e.Origin)
	if !ok {
		return e, c, refuse(kms.Denied, nil, "%s: %q is no node of the cluster", what, e.Origin)
	}
	for _, r := range by(w.nodes[n.ID]) {
		if pqc.Verify(pqc.SuiteID(r.keys.SigningSuite), r.keys.Signing, envelope, []byte(state.CommandContext), signature) == nil {
			e.root = r.number
		}
	}
	if e.root == 0 {
		return e, c, refuse(kms.BadSignature, nil, "%s: the signature of node %s does not verify", what, n.ID)
	}
	c, ok = cmd.(T)
	if !ok {
		return e, c, refuse(kms.Invalid, nil, "%s: the command is of another type", what)
	}
	return e, c, nil
}

func refuse(k kms.Kind, cause error, format string, args ...any) error {
	return &kms.Error{Kind: k, Msg: fmt.Sprintf(format, args...), Err: cause}
}

// identity parses a SPIFFE ID of a trust domain of one of the sites.
func (w *replay) identity(principal string) (kms.Identity, error) {
	id, err := kms.ParseIdentity(principal)
	if err != nil {
		return id, err
	}
	if !slices.ContainsFunc(slices.Collect(maps.Values(w.sites)), func(s site) bool { return s.domain == id.TrustDomain }) {
		return id, refuse(kms.Denied, nil, "%s is not of the trust domain of any site", principal)
	}
	return id, nil
}

func (w *replay) nodeIdentity(node string) string {
	n, _ := w.node(node)
	return kms.Identity{TrustDomain: w.sites[n.Site].domain, Role: "node", Name: n.ID}.String()
}

// decided is a decision that verified.
type decided struct {
	id         string
	content    approval.Proposal
	rule       approval.Rule
	approvals  []Approval
	rejections []Approval

	suspensions []approval.Suspension // before it

	open      signed
	execution signed
	adoption  []byte
	commit    state.CommitRotation // for a rotation of a key
	kek       state.CommitKEK      // for a rotation of a KEK
	imported  state.ImportKey      // for an import
}

// decide verifies a decision under the custodians and policies in force.
func (w *replay) decide(d Decision) (decided, error) {
	p, err := approval.ParseProposal(d.Proposal)
	if err != nil {
		return decided{}, err
	}
	out := decided{id: approval.ProposalID(d.Proposal), content: p, adoption: d.Adoption}
	if err := w.suspendBefore(d, &out); err != nil {
		return out, err
	}
	if known, err := w.reach(p.Cluster); err != nil {
		return out, err
	} else if !known || p.Cluster != w.history.lineage { // none outlives its epoch
		return out, refuse(kms.Invalid, nil, "proposal %s is for another cluster", out.id)
	}
	if out.open, err = w.checkOpen(out.id, p, d); err != nil {
		return out, err
	}
	if out.rule, err = state.RuleFor(w.sortedPolicies(), w.siteOf, w.enrolled, p); err != nil {
		return out, err
	}
	if err := w.checkRevision(p); err != nil {
		return out, err
	}
	if err := w.countVotes(d, &out); err != nil {
		return out, err
	}
	return out, w.checkExecution(d, &out)
}

// checkOpen verifies the command that opened the proposal and whom it names.
func (w *replay) checkOpen(id string, p approval.Proposal, d Decision) (signed, error) {
	e, open, err := command[state.OpenProposal](w, "the opening of proposal "+id, d.Open)
	if err != nil {
		return e, err
	}
	if !bytes.Equal(open.Proposal, d.Proposal) {
		return e, refuse(kms.Invalid, nil, "the opening of proposal %s carries other bytes", id)
	}
	who := e.Principal
	if who == "" {
		who = w.nodeIdentity(e.Origin)
	}
	if who != p.Proposer {
		return e, refuse(kms.Denied, nil, "proposal %s names %s as proposer, but was opened for %s", id, p.Proposer, who)
	}
	_, err = w.identity(p.Proposer)
	return e, err
}

// checkRevision holds a proposal on a policy, custodian, node or site against the revision in
// force. The revision of a key is in the signed execution.
func (w *replay) checkRevision(p approval.Proposal) error {
	kind, name, err := approval.ParseTarget(p.Target)
	if err != nil {
		return err
	}
	now := p.Revision
	switch kind {
	case approval.TargetPolicy:
		now = w.policies[name].Revision
	case approval.TargetCustodian:
		now = w.custodians[name].Revision
	case approval.TargetNode:
		now = 0
		if m, ok := w.nodes[name]; ok {
			now = m.at(p.Revision)
		}
	case approval.TargetSite:
		now = w.sites[name].revision
	}
	if now != p.Revision {
		return refuse(kms.Conflict, nil, "%s was at revision %d, the proposal is about revision %d", p.Target, now, p.Revision)
	}
	return nil
}

// countVotes verifies every statement and the quorum.
func (w *replay) countVotes(d Decision, out *decided) error {
	var approvers []string
	last := ""
	for _, s := range d.Votes {
		if s.Custodian <= last {
			return refuse(kms.Invalid, nil, "the votes on proposal %s are not sorted by custodian or repeat one", out.id)
		}
		last = s.Custodian
		c, ok := w.custodian(s.Custodian)
		if !ok {
			return refuse(kms.Denied, nil, "there was no custodian %q when proposal %s was carried out", s.Custodian, out.id)
		}
		if err := s.Verify(c, d.Proposal); err != nil {
			return err
		}
		a := Approval{Custodian: c.ID, Site: c.Site, Credential: s.Credential}
		if s.Verdict == approval.Approve {
			out.approvals = append(out.approvals, a)
			approvers = append(approvers, c.ID)
			continue
		}
		if out.content.Action == kms.ActionDestroy || slices.Contains(out.rule.Veto, c.ID) {
			return refuse(kms.Denied, nil, "the rejection of custodian %s ends proposal %s", c.ID, out.id)
		}
		out.rejections = append(out.rejections, a)
	}
	if len(out.rule.Direct) > 0 {
		return w.mayAct(out.content.Proposer, out.rule)
	}
	if got := out.rule.Decide(out.content.Proposer, w.custodian, approvers); !got.Met {
		return refuse(kms.NeedsApproval, nil, "proposal %s has %d approvals from %d sites; it lacks %s", out.id, got.Approvals, got.Sites, list(got.Missing))
	}
	return nil
}

// mayAct checks a principal against a direct rule.
func (w *replay) mayAct(principal string, rule approval.Rule) error {
	id, err := w.identity(principal)
	if err != nil {
		return err
	}
	if !slices.Contains(rule.Direct, id.Role) {
		return refuse(kms.Denied, nil, "the role %s may not do %q by the policy", id.Role, rule.Action)
	}
	return nil
}

// checkExecution verifies the command that carried the decision out: for this
// proposal, about this revision, by a node itself, not too early.
func (w *replay) checkExecution(d Decision, out *decided) error {
	what := "the execution of proposal " + out.id
	proposal, err := w.executedBy(what, d, out)
	switch {
	case err != nil:
		return err
	case proposal != out.id:
		return refuse(kms.Invalid, nil, "%s is that of proposal %s", what, proposal)
	case out.execution.Expect != out.content.Revision:
		return refuse(kms.Conflict, nil, "%s expects revision %d, the proposal is about %d", what, out.execution.Expect, out.content.Revision)
	}
	if err := w.inOrder(what, out.open, out.execution); err != nil {
		return err
	}
	if m := w.nodes[out.execution.Origin]; m.removed {
		return refuse(kms.Denied, nil, "%s is signed by node %s, which was removed by then", what, out.execution.Origin)
	}
	if err := w.nodes[out.execution.Origin].act(what, out.execution); err != nil {
		return err
	}
	// The cluster's clock at a command is at most Window past its signed time, and
	// at the opening at most Window before the proposal's creation.
	earliest := max(out.content.NotBefore-state.Window, out.rule.NotBefore-state.Window, out.content.Created+out.rule.Delay-2*state.Window)
	if out.execution.Time < earliest {
		return refuse(kms.Conflict, nil, "%s is signed %d ms too early for the delay or the earliest time", what, earliest-out.execution.Time)
	}
	return nil
}

// executedBy verifies the command that carried a decision out, of the type that its
// action asks for, and returns the proposal that it names.
func (w *replay) executedBy(what string, d Decision, out *decided) (proposal string, err error) {
	kind, _, _ := approval.ParseTarget(out.content.Target)
	switch {
	case kind == approval.TargetKeyring:
		out.execution, out.kek, err = command[state.CommitKEK](w, what, d.Execution)
		return out.kek.Proposal, err
	case out.content.Action == kms.ActionRotate:
		out.execution, out.commit, err = command[state.CommitRotation](w, what, d.Execution)
		return out.commit.Proposal, err
	case out.content.Action == kms.ActionImport:
		out.execution, out.imported, err = command[state.ImportKey](w, what, d.Execution)
		return out.imported.Proposal, err
	}
	var c state.Execute
	out.execution, c, err = command[state.Execute](w, what, d.Execution)
	return c.Proposal, err
}

// govern applies a verified decision on a policy, a custodian, a node or a site, or takes
// note of an import.
func (w *replay) govern(d decided) error {
	_, name, err := approval.ParseTarget(d.content.Target)
	if err != nil {
		return err
	}
	if len(d.adoption) != 0 && d.content.Action != kms.ActionNode {
		return refuse(kms.Invalid, nil, "the evidence holds the adoption of a hardware root, but %s is no node", d.content.Target)
	}
	switch d.content.Action {
	case kms.ActionPolicy:
		params, err := d.content.PolicyParams()
		if err != nil {
			return err
		}
		return w.changePolicy(approval.Policy{Name: name, Revision: w.policies[name].Revision + 1, Rules: params.Rules, Attested: params.Attested, Forbid: params.Forbid})
	case kms.ActionCustodian:
		params, err := d.content.CustodianParams()
		if err != nil {
			return err
		}
		return w.changeCustodian(params)
	case kms.ActionNode:
		return w.changeNode(name, d)
	case kms.ActionSite:
		return w.changeSite(name, d)
	case kms.ActionRecoveryKey:
		return w.setRecoveryKey(d)
	case kms.ActionImport:
		return w.importKey(name, d)
	}
	return refuse(kms.Invalid, nil, "proposal %s is about %q, which changes neither policies, custodians, nodes nor sites", d.id, d.content.Action)
}

func (w *replay) changePolicy(p approval.Policy) error {
	if err := p.Validate(); err != nil {
		return err
	}
	for _, r := range p.Rules {
		if slices.Contains([]kms.Action{kms.ActionPolicy, kms.ActionCustodian, kms.ActionNode, kms.ActionSite, kms.ActionRecoveryKey, kms.ActionRecover}, r.Action) && !r.Quorum() {
			return refuse(kms.Invalid, nil, "policy %s lets one person alone change %q", p.Name, r.Action)
		}
	}
	if err := p.Possible(w.sortedCustodians()); err != nil {
		return err
	}
	w.setPolicy(p)
	return nil
}

func (w *replay) changeCustodian(params approval.CustodianParams) error {
	old, exists := w.custodians[params.Custodian.ID]
	if err := params.VerifyPossession(w.cluster, old, false); err != nil {
		return err
	}
	next, err := params.Change(old, exists)
	switch {
	case err != nil:
		return err
	case w.sites[next.Site].domain == "" || w.sites[next.Site].removed:
		return refuse(kms.NotFound, nil, "there is no site %s", next.Site)
	}
	if err := w.policies[kms.Governance].AllowCustodian(old, next); err != nil {
		return err
	}
	w.custodians[next.ID] = next
	all := w.sortedCustodians()
	if err := approval.CheckCustodians(all); err != nil {
		return err
	}
	return approval.CheckCustodianChange(w.sortedPolicies(), all)
}

func (w *replay) sortedPolicies() (all []approval.Policy) {
	for _, name := range slices.Sorted(maps.Keys(w.policies)) {
		all = append(all, w.policies[name])
	}
	return all
}

func (w *replay) sortedCustodians() (all []approval.Custodian) {
	for _, id := range slices.Sorted(maps.Keys(w.custodians)) {
		all = append(all, w.custodians[id])
	}
	return all
}
