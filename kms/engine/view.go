package engine

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

// at returns an instant of the state, the zero time for 0.
func at(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}

func siteView(st *state.State, s state.Site) wire.Site {
	v := wire.Site{ID: s.ID, TrustDomain: s.TrustDomain, CAs: s.CAs, Nodes: []string{}, Revision: st.SiteRevision(s.ID)}
	for _, n := range st.NodesOf(s.ID) {
		v.Nodes = append(v.Nodes, n.ID)
	}
	slices.Sort(v.Nodes)
	return v
}

func custodianView(c approval.Custodian) wire.Custodian {
	v := wire.Custodian{ID: c.ID, Site: c.Site, Revoked: c.Revoked, Revision: c.Revision, Credentials: []wire.Credential{}}
	for _, k := range c.Credentials {
		v.Credentials = append(v.Credentials, wire.Credential{
			ID: k.ID, Suite: k.Suite, SuiteName: pqc.SuiteID(k.Suite).String(), PublicKey: k.PublicKey, Suspended: k.Suspended,
		})
	}
	return v
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// duration writes milliseconds in the largest unit that divides them.
func duration(ms int64) string {
	d := time.Duration(ms) * time.Millisecond
	for _, u := range []struct {
		d    time.Duration
		name string
	}{{24 * time.Hour, "day"}, {time.Hour, "hour"}, {time.Minute, "minute"}, {time.Second, "second"}} {
		if d >= u.d && d%u.d == 0 {
			return count(int(d/u.d), u.name)
		}
	}
	return d.String()
}

func (e *Engine) keyringView(st *state.State, kr state.Keyring) wire.Keyring {
	v := wire.Keyring{
		Name: kr.Name, Residency: kr.Residency, Protection: string(kr.Protection), Policy: kr.Policy,
		Receipts: string(kr.Receipts), MaxStalenessMS: kr.MaxStaleness, Survive: kr.Survive, KEK: kr.KEK,
		Keys: len(st.Keys(kr.Name)), Nodes: []wire.NodeAPI{}, Resident: st.Resident(kr.Name, e.node),
		Created: at(kr.Created), Creator: kr.Creator, Revision: kr.Revision,
	}
	for _, n := range st.ResidentNodes(kr.Name) {
		v.Nodes = append(v.Nodes, wire.NodeAPI{ID: n.ID, Site: n.Site, API: n.API})
	}
	v.Rotation = rotationView(st, kr)
	return v
}

func (e *Engine) keyView(st *state.State, k state.Key, versions bool) wire.Key {
	id := kms.KeyID{}
	copy(id[:], k.ID)
	v := wire.Key{
		Keyring: k.Keyring, Name: k.Name, ID: id.String(), Purpose: string(k.Purpose), Algorithm: string(k.Algorithm), Protection: protectionOf(st, k),
		Suspended: k.Suspended, Primary: k.Primary, Latest: k.Latest, RotationPeriodMS: k.RotationPeriod,
		Created: at(k.Created), Rotated: at(k.Rotated), Creator: k.Creator, Revision: k.Revision,
	}
	if due := rotationDue(k); due > 0 {
		v.NextRotation, v.Overdue = at(due), st.Clock() >= due
	}
	if !versions {
		return v
	}
	for _, kv := range st.Versions(k.Keyring, k.Name) {
		x := versionView(st, k, kv)
		x.Use = useView(st, k, kv)
		v.Versions = append(v.Versions, x)
	}
	open, _ := st.ProposalsBy(state.ProposalQuery{Open: true, Target: approval.KeyTarget(k.Keyring, k.Name)})
	for _, p := range open {
		v.Proposals = append(v.Proposals, p.ID)
	}
	return v
}

// protectionOf is the protection level of a key's keyring.
func protectionOf(st *state.State, k state.Key) string {
	kr, _ := st.Keyring(k.Keyring)
	return string(kr.Protection)
}

// rotationDue returns when a key's rotation is due, Unix milliseconds, 0 for a
// key that is rotated on request only.
func rotationDue(k state.Key) int64 {
	if k.RotationPeriod <= 0 || k.Primary == 0 {
		return 0
	}
	return max(k.Rotated, k.Created) + k.RotationPeriod
}

func versionView(st *state.State, k state.Key, v state.Version) wire.KeyVersion {
	out := wire.KeyVersion{
		Version: v.Version, State: string(v.State), Primary: v.Version == k.Primary, KEK: v.KEK, PublicKey: v.PublicKey,
		Created: at(v.Created), Activated: at(v.Activated), Proposal: v.Proposal, Generated: string(v.Generated),
	}
	if v.Version == 1 && v.Proposal != "" {
		out.Generated = string(kms.Imported)
	}
	for _, n := range receiptsFrom(st, k, v) {
		out.Receipts = append(out.Receipts, wire.Receipt{Node: n.ID, Site: n.Site,
			Received: slices.ContainsFunc(v.Receipts, func(r state.Receipt) bool { return r.Node == n.ID })})
	}
	return out
}

// receiptsFrom returns the nodes whose receipts a version asks for: those that it
// commits to check values for, or for a sign key of protection hardware, which
// has none, all resident nodes.
func receiptsFrom(st *state.State, k state.Key, v state.Version) (nodes []state.Node) {
	if v.Generated != "" && k.Purpose == kms.Sign {
		return st.ResidentNodes(k.Keyring)
	}
	for _, c := range v.Checks {
		n, ok := st.Node(c.Node)
		if !ok {
			n.ID = c.Node
		}
		nodes = append(nodes, n)
	}
	return nodes
}

// proposalView shows a proposal decoded from the very bytes that are signed.
func proposalView(st *state.State, p state.Proposal) (wire.Proposal, error) {
	content, err := approval.ParseProposal(p.Bytes)
	if err != nil {
		return wire.Proposal{}, kms.Wrap(kms.Internal, err, "the stored proposal cannot be read", "")
	}
	v := wire.Proposal{
		ID: p.ID, Bytes: p.Bytes, Votes: []wire.Vote{},
		AuthorisedAt: at(p.AuthorisedAt), ClosedAt: at(p.ClosedAt),
	}
	if v.Content, err = contentView(content); err != nil {
		return wire.Proposal{}, err
	}
	if r, err := st.Rule(content); err == nil {
		rv := ruleView(r)
		v.Rule = &rv
		if p.AuthorisedAt > 0 {
			v.ExecutableAt = at(max(content.NotBefore, r.NotBefore, p.AuthorisedAt+r.Delay))
		}
	}
	for _, vote := range p.Votes {
		s := vote.Statement
		v.Votes = append(v.Votes, wire.Vote{Site: vote.Site, Time: at(vote.Time), Statement: wire.Statement{
			Proposal: s.Proposal, Verdict: string(s.Verdict), Custodian: s.Custodian, Credential: s.Credential, Signature: s.Signature,
		}})
	}
	v.Progress = string(p.Progress)
	if d, progress, ok := st.Decision(p.ID); ok {
		v.Progress, v.Met, v.Approvals, v.Sites, v.Missing = progress, d.Met, d.Approvals, d.Sites, d.Missing
	}
	v.Summary = summaryOf(v)
	return v, nil
}

// summaryOf says in a sentence where a proposal stands.
func summaryOf(v wire.Proposal) string {
	when := func(t time.Time) string { return t.Format(time.RFC3339) }
	switch v.Progress {
	case string(state.Open):
		if len(v.Missing) == 0 {
			return "open, expires " + when(v.Content.Expires)
		}
		return "waits for " + strings.Join(v.Missing, " and ") + ", expires " + when(v.Content.Expires)
	case string(state.Authorised):
		return "authorised, is being carried out"
	case state.Waiting:
		return "authorised, waits until " + when(v.ExecutableAt)
	case string(state.Executed):
		return "carried out at " + when(v.ClosedAt)
	case string(state.Rejected):
		return "rejected at " + when(v.ClosedAt)
	case string(state.Void):
		return "void: the target or the policy changed meanwhile"
	case state.Expired:
		return "expired at " + when(v.Content.Expires)
	}
	return v.Progress
}

func contentView(p approval.Proposal) (wire.ProposalContent, error) {
	v := wire.ProposalContent{
		Format: p.Format, Cluster: p.Cluster, Nonce: p.Nonce, Action: string(p.Action), Target: p.Target, Revision: p.Revision,
		Policy: p.Policy, PolicyRevision: p.PolicyRevision, Proposer: p.Proposer, Created: at(p.Created),
		NotBefore: at(p.NotBefore), Expires: at(p.Expires), Reason: p.Reason,
	}
	switch p.Action {
	case kms.ActionActivate, kms.ActionDeactivate, kms.ActionCompromise, kms.ActionDestroy:
		x, err := p.VersionParams()
		if err != nil {
			return v, err
		}
		v.Parameters.Version, v.Parameters.Override = x.Version, x.Override
	case kms.ActionSchedule:
		x, err := p.ScheduleParams()
		if err != nil {
			return v, err
		}
		v.Parameters.RotationPeriodMS = &x.RotationPeriod
	case kms.ActionPolicy:
		x, err := p.PolicyParams()
		if err != nil {
			return v, err
		}
		for _, r := range x.Rules {
			v.Parameters.Rules = append(v.Parameters.Rules, ruleView(r))
		}
		v.Parameters.Attested, v.Parameters.Forbid = &x.Attested, suiteNames(x.Forbid)
	case kms.ActionCustodian:
		x, err := p.CustodianParams()
		if err != nil {
			return v, err
		}
		v.Parameters = custodianParamsView(x)
	case kms.ActionNode:
		x, err := p.NodeParams()
		if err != nil {
			return v, err
		}
		v.Parameters.Node = nodeParamsView(x)
	case kms.ActionSite:
		x, err := p.SiteParams()
		if err != nil {
			return v, err
		}
		v.Parameters.Site = &wire.NextSite{Change: string(x.Change), TrustDomain: x.TrustDomain, CAs: x.CAs}
	case kms.ActionImport:
		x, err := p.ImportParams()
		if err != nil {
			return v, err
		}
		v.Parameters.Import = &wire.ImportedKey{Node: x.Node, Purpose: string(x.Purpose), Algorithm: string(x.Algorithm),
			RotationPeriodMS: x.RotationPeriod, PublicKey: x.PublicKey, Sealed: x.Sealed}
	case kms.ActionRecoveryKey:
		v.Parameters.Recovery = p.Parameters
	}
	return v, nil
}

// byName sorts views by their name.
func byName[T any](list []T, name func(T) string) []T {
	slices.SortFunc(list, func(a, b T) int { return cmp.Compare(name(a), name(b)) })
	return list
}
