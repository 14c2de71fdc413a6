package audit

import (
	"fmt"
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
)

func list(s []string) string { return strings.Join(s, ", ") }

func (r *Report) passed(format string, args ...any) {
	r.Checks = append(r.Checks, fmt.Sprintf(format, args...))
}

// VerifyEvidence re-verifies evidence offline. It believes nothing but the
// identifier of the cluster that the verifier knows from elsewhere (32
// hexadecimal digits); with "" it shows only that the evidence is consistent in
// itself, and Report.Pinned is false. On an error the report holds the checks
// passed before it. Errors have the kind of what failed.
func VerifyEvidence(e Evidence, cluster string) (Report, error) {
	r := Report{Notes: []string{
		"That these are all decisions on policies and custodians, that no rejection is left out, that the keyring was created so, and that the cluster carried the decision out when its executor says, " +
			"rests on the nodes that signed the commands and on whoever made this file; the inclusion in the cluster log is not part of it. Compare evidence from nodes of two sites.",
	}}
	if e.Format != EvidenceFormat {
		return r, kms.Errorf(kms.Invalid, "the evidence has format %d; this program knows %d", e.Format, EvidenceFormat)
	}
	w, err := openEvidence(e, cluster, &r)
	if err != nil {
		return r, err
	}
	for i, d := range e.Governance {
		if err := w.replayGovernance(d, &r); err != nil {
			return r, inGovernance(err, i)
		}
	}
	out, err := w.verifyDecision(e, &r)
	if err != nil {
		return r, err
	}
	if err := w.verifyTarget(e, out, &r); err != nil {
		return r, err
	}
	if err := w.noStrayImport(); err != nil {
		return r, err
	}
	if n := len(w.history.ahead); n > 0 {
		return r, refuse(kms.Invalid, nil, "the evidence holds %d recoveries that nothing in it belongs to", n)
	}
	if w.history.epoch > 0 {
		r.passed("It belongs to epoch %d of the cluster, which custodians approved to begin from a backup.", w.history.epoch)
	}
	return r, nil
}

func inGovernance(err error, i int) error {
	return refuse(kms.KindOf(err), err, "governance decision %d: %v", i+1, err)
}

// openEvidence verifies the genesis and which cluster it founded.
func openEvidence(e Evidence, cluster string, r *Report) (*replay, error) {
	signed, err := state.ParseSignedGenesis(e.Genesis)
	if err != nil {
		return nil, err
	}
	w, err := newReplay(signed)
	if err != nil {
		return nil, err
	}
	w.history.ahead = e.Recoveries
	r.Cluster, r.ClusterName = w.cluster, w.genesis.Name
	if e.Cluster != w.cluster {
		return nil, refuse(kms.Invalid, nil, "the evidence names cluster %q, its genesis is that of %s", e.Cluster, w.cluster)
	}
	r.passed("The genesis of %q is signed by each of its %d nodes.", w.genesis.Name, len(w.genesis.Nodes))
	switch cluster {
	case "":
		r.Notes = append(r.Notes, "No cluster identifier was given: the file is consistent in itself, whoever made it.")
	case w.cluster:
		r.Pinned = true
		r.passed("It founds cluster %s, the one asked for.", w.cluster)
	default:
		return nil, refuse(kms.Denied, nil, "the evidence is of cluster %s, not of %s", w.cluster, cluster)
	}
	return w, nil
}

func (w *replay) replayGovernance(d Decision, r *Report) error {
	out, err := w.decide(d)
	if err != nil {
		return err
	}
	if err := w.govern(out); err != nil {
		return err
	}
	r.reportSuspensions(out)
	if out.content.Action == kms.ActionImport {
		r.passed("Proposal %s to import %s was authorised by %s.", out.id, out.content.Target, authority(out))
		return nil
	}
	r.passed("Proposal %s to change %s was authorised by %s and is in force.", out.id, out.content.Target, authority(out))
	w.reportAdoption(out, r)
	return nil
}

// authority says in words who authorised a decision.
func authority(d decided) string {
	if len(d.rule.Direct) > 0 {
		return fmt.Sprintf("%s alone, whose role the policy lists", d.content.Proposer)
	}
	var who []string
	for _, a := range d.approvals {
		who = append(who, fmt.Sprintf("%s (%s)", a.Custodian, a.Site))
	}
	return list(who)
}

func (w *replay) verifyDecision(e Evidence, r *Report) (decided, error) {
	out, err := w.decide(e.Decision)
	if err != nil {
		return out, err
	}
	r.Proposal, r.Content, r.Rule = out.id, out.content, out.rule
	r.Approvals, r.Rejections = out.approvals, out.rejections
	r.Executor, r.Executed = out.execution.Origin, out.execution.Time
	p := out.content
	r.reportSuspensions(out)
	r.passed("Proposal %s asks to %s %s; node %s signed its opening for %s.", out.id, p.Action, p.Target, out.open.Origin, p.Proposer)
	if len(out.rule.Direct) > 0 {
		r.passed("Policy %s revision %d lets the role of %s do this alone.", p.Policy, p.PolicyRevision, p.Proposer)
		r.Notes = append(r.Notes, "The proposer's identity was checked by the node that opened the proposal; this file holds no signature of the proposer's.")
	} else {
		r.passed("The signatures of %s verify.", authority(out))
		r.passed("They meet policy %s revision %d: %d approvals from %d sites%s.", p.Policy, p.PolicyRevision,
			out.rule.Approvals, out.rule.Sites, required(out.rule))
	}
	retirement(out, r)
	r.passed("Node %s signed its execution, for revision %d of %s and no earlier than the policy's delay.", out.execution.Origin, p.Revision, p.Target)
	return out, nil
}

func required(r approval.Rule) string {
	s := ""
	if len(r.Required) > 0 {
		s = ", among them " + list(r.Required)
	}
	if r.Need != nil {
		s += ", and besides " + r.Need.Words()
	}
	return s
}

// verifyTarget verifies what belongs to a decision about a key: the keyring and
// its policy, the key, and for a rotation the commit and the receipts. A decision
// about anything else is put into force.
func (w *replay) verifyTarget(e Evidence, out decided, r *Report) error {
	kind, name, err := approval.ParseTarget(r.Content.Target)
	if err != nil {
		return err
	}
	if kind == approval.TargetKeyring {
		return w.verifyKEK(e, name, out, r)
	}
	if kind != approval.TargetKey {
		if len(e.Keyring) != 0 || len(e.Key) != 0 || len(e.KeyID) != 0 || len(e.Receipts) != 0 || len(e.Later) != 0 {
			return refuse(kms.Invalid, nil, "the evidence holds commands on a key, but %s is none", r.Content.Target)
		}
		if err := w.govern(out); err != nil {
			return err
		}
		if n, ok := w.node(name); ok && kind == approval.TargetNode {
			r.Site = n.Site
		}
		w.reportAdoption(out, r)
		return nil
	}
	ringName, keyName, err := kms.SplitKeyPath(name)
	if err != nil {
		return err
	}
	if len(e.Decision.Adoption) != 0 {
		return refuse(kms.Invalid, nil, "the evidence holds the adoption of a hardware root, but %s is no node", r.Content.Target)
	}
	ring, created, err := w.verifyKeyring(e, ringName, r)
	if err != nil {
		return err
	}
	if r.Content.Action == kms.ActionImport {
		if err := w.govern(out); err != nil {
			return err
		}
		r.Version = 1
	}
	key, err := w.verifyKey(e, ring, created, out, keyName, r)
	if err != nil {
		return err
	}
	if r.Content.Action == kms.ActionRotate {
		return w.verifyRotation(e, ring, key, out, r)
	}
	if len(e.Receipts) != 0 || len(e.KeyID) != 0 || len(e.Later) != 0 {
		return refuse(kms.Invalid, nil, "the evidence holds receipts, but to %s asks for none", r.Content.Action)
	}
	return nil
}

// allowed checks that a revision of the policy, up to the one in force, lets the
// principal act alone.
func (w *replay) allowed(policy string, a kms.Action, principal string) error {
	var last error = refuse(kms.NotFound, nil, "there is no policy %s", policy)
	for _, p := range w.past[policy] {
		rule, ok := p.Rule(a)
		if !ok || len(rule.Direct) == 0 {
			last = refuse(kms.NeedsApproval, nil, "policy %s lets nobody do %q alone", policy, a)
			continue
		}
		if last = w.mayAct(principal, rule); last == nil {
			return nil
		}
	}
	return last
}

func (w *replay) verifyKeyring(e Evidence, name string, r *Report) (state.CreateKeyring, signed, error) {
	what := "the creation of keyring " + name
	env, ring, err := command[state.CreateKeyring](w, what, e.Keyring)
	if err != nil {
		return ring, env, err
	}
	switch {
	case ring.Name != name:
		return ring, env, refuse(kms.Invalid, nil, "%s is that of %s", what, ring.Name)
	case ring.Policy != r.Content.Policy:
		return ring, env, refuse(kms.Conflict, nil, "keyring %s is under policy %s, the proposal was made under %s", name, ring.Policy, r.Content.Policy)
	}
	if err := w.keyringForm(what, env, ring); err != nil {
		return ring, env, err
	}
	if err := w.residentOrigin(what, env, ring); err != nil {
		return ring, env, err
	}
	if err := w.allowed(kms.Governance, kms.ActionKeyring, env.Principal); err != nil {
		return ring, env, refuse(kms.KindOf(err), err, "%s: %v", what, err)
	}
	r.passed("Keyring %s has protection %s and is resident at %s, under policy %s, with receipts of %s; node %s signed its creation for %s.",
		name, ring.Protection, list(ring.Residency), ring.Policy, ring.Receipts, env.Origin, env.Principal)
	return ring, env, nil
}

func (w *replay) verifyKey(e Evidence, ring state.CreateKeyring, created signed, out decided, name string, r *Report) (state.CreateKey, error) {
	path := kms.KeyPath(ring.Name, name)
	if d, imported := w.imports[path]; imported {
		return w.verifyImported(e, ring, created, d, out, r)
	}
	if len(e.Key) == 0 {
		r.Notes = append(r.Notes, "The creation of key "+path+" is not in this file: it is erased when version 1 is destroyed.")
		return state.CreateKey{Keyring: ring.Name, Name: name, ID: e.KeyID}, w.inOrder("the opening of proposal "+out.id, created, out.open)
	}
	what := "the creation of key " + path
	env, key, err := command[state.CreateKey](w, what, e.Key)
	if err != nil {
		return key, err
	}
	switch {
	case key.Keyring != ring.Name || key.Name != name:
		return key, refuse(kms.Invalid, nil, "%s is that of %s", what, kms.KeyPath(key.Keyring, key.Name))
	case len(e.KeyID) != 0:
		return key, refuse(kms.Invalid, nil, "the evidence holds %s and its identifier again", what)
	case ring.Protection == kms.Hardware && key.Purpose != kms.Sign && !w.wereResident(ring.Residency, key.Checks):
		return key, refuse(kms.Invalid, nil, "%s does not ask exactly the resident nodes for receipts", what)
	}
	if err := w.inOrder(what, created, env); err != nil {
		return key, err
	}
	if err := w.inOrder("the opening of proposal "+out.id, env, out.open); err != nil {
		return key, err
	}
	if err := w.residentOrigin(what, env, ring); err != nil {
		return key, err
	}
	if err := w.allowed(ring.Policy, kms.ActionCreate, env.Principal); err != nil {
		return key, refuse(kms.KindOf(err), err, "%s: %v", what, err)
	}
	r.passed("Key %s has the identifier %x and the algorithm %s; node %s signed its creation for %s.", path, key.ID, key.Algorithm, env.Origin, env.Principal)
	return key, nil
}

func (w *replay) wereResident(sites []string, checks []state.Check) bool {
	_, ok := residentsOf(w, sites, checks, checkNode, true)
	return ok
}

// residentOrigin refuses a command of a node that is or was a member, but never at a
// site of the residency. That it was one when it signed, the replicas have judged; of
// an execution it is checked besides.
func (w *replay) residentOrigin(what string, e signed, ring state.CreateKeyring) error {
	if n, ok := w.node(e.Origin); ok && slices.Contains(ring.Residency, n.Site) {
		return nil
	}
	return refuse(kms.NotResident, nil, "%s: node %s may not open keyring %s", what, e.Origin, ring.Name)
}

// unproven returns the nodes, or sites, whose receipts the keyring's rule misses.
func unproven(nodes []state.Node, ring state.CreateKeyring, given []string) (missing []string) {
	if len(nodes) == 0 {
		return []string{"any node"}
	}
	has := make(map[string]bool)
	for _, n := range given {
		has[n] = true
	}
	if ring.Receipts != kms.EverySite {
		for _, n := range nodes {
			if !has[n.ID] {
				missing = append(missing, n.ID)
			}
		}
		return missing
	}
	sites := make(map[string]bool)
	for _, n := range nodes {
		sites[n.Site] = sites[n.Site] || has[n.ID]
	}
	for _, s := range ring.Residency {
		if proven, asked := sites[s]; asked && !proven {
			missing = append(missing, "site "+s)
		}
	}
	return missing
}
