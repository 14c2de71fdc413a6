package statetest

import (
	"crypto/ecdh"
	"crypto/sha256"
	"fmt"
	"slices"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
)

func (h *Hooks) defaults() {
	if h.KCV == nil {
		h.KCV = func(node, keyring, key string, version uint32) []byte {
			return hash("kcv", node, keyring, key, version)
		}
	}
	if h.Keyring == nil {
		h.Keyring = func(keyring string, nodes []state.Node) (copies []state.SealedCopy, _ []state.Check) {
			for _, n := range nodes {
				copies = append(copies, state.SealedCopy{Node: n.ID, Root: n.Root, Sealed: hash("sealed", keyring, n.ID)})
			}
			return copies, h.checks(keyring, "", 1, nodes)
		}
	}
	if h.PerKey == nil {
		h.PerKey = func(keyring, key string, id kms.KeyID, version uint32, alg kms.Algorithm, nodes []state.Node) (wrapped, public []byte, checks []state.Check) {
			return hash("wrapped", keyring, key, version), PublicKey(alg), h.checks(keyring, key, version, nodes)
		}
	}
}

func (h *Hooks) checks(keyring, key string, version uint32, nodes []state.Node) (c []state.Check) {
	for _, n := range nodes {
		sum := sha256.Sum256(h.KCV(n.ID, keyring, key, version))
		c = append(c, state.Check{Node: n.ID, Hash: sum[:]})
	}
	return c
}

func hash(parts ...any) []byte {
	sum := sha256.Sum256([]byte(fmt.Sprintf("%q", parts)))
	return sum[:]
}

// PublicKey returns some public key that fits an algorithm.
func PublicKey(alg kms.Algorithm) []byte {
	var curve ecdh.Curve
	size := 32
	switch alg {
	case kms.ECDSAP256:
		curve = ecdh.P256()
	case kms.ECDSAP384:
		curve, size = ecdh.P384(), 48
	case kms.Ed25519:
		return hash("ed25519")
	default:
		return nil
	}
	k, err := curve.NewPrivateKey(keyScalar(size))
	if err != nil {
		panic(err) // constant
	}
	return k.PublicKey().Bytes()
}

// KeyringCommand returns the command that makes a keyring, KeyCommand that for a
// key with its purpose's default algorithm.
func (w *World) KeyringCommand(name string, sites ...string) state.CreateKeyring {
	sites = slices.Clone(sites)
	slices.Sort(sites)
	var nodes []state.Node
	for _, n := range w.State().Nodes() {
		if n.Root != 0 && slices.Contains(sites, n.Site) {
			nodes = append(nodes, n)
		}
	}
	copies, checks := w.opts.Hooks.Keyring(name, nodes)
	return state.CreateKeyring{
		Name: name, Residency: sites, Protection: kms.Software, Policy: "standard", Receipts: kms.EveryNode,
		MaxStaleness: 30_000, Copies: copies, Checks: checks,
	}
}

func (w *World) KeyCommand(keyring, name string, purpose kms.Purpose) state.CreateKey {
	id := kms.KeyID(hash("key-id", keyring, name)[:16])
	alg := purpose.Algorithms()[0]
	wrapped, public, checks := w.opts.Hooks.PerKey(keyring, name, id, 1, alg, w.State().ResidentNodes(keyring))
	c := state.CreateKey{Keyring: keyring, Name: name, ID: id[:], Purpose: purpose, Algorithm: alg, PublicKey: public}
	c.KEK, c.Wrapped, c.Copies, c.Generated, c.Checks = w.material(keyring, name, 1, purpose, wrapped, checks)
	if c.Generated == "" {
		c.Checks = nil
	}
	return c
}

// CreateKeyring makes a keyring resident at the sites.
func (w *World) CreateKeyring(name string, sites ...string) {
	w.t.Helper()
	c := w.KeyringCommand(name, sites...)
	w.Do(w.State().NodesOf(c.Residency[0])[0].ID, c, As(w.Operator(c.Residency[0])))
}

// CreateKey makes a key.
func (w *World) CreateKey(keyring, name string, purpose kms.Purpose) {
	w.t.Helper()
	n := w.State().ResidentNodes(keyring)[0]
	w.Do(n.ID, w.KeyCommand(keyring, name, purpose), As(w.Operator(n.Site)))
}

// Proposal returns a proposal by the operator of the first site, true to the state
// as it is; params is the action's *Params value or nil.
func (w *World) Proposal(action kms.Action, target string, params any) approval.Proposal {
	w.t.Helper()
	s := w.State()
	p := approval.Proposal{
		Format: 1, Cluster: s.Lineage(), Nonce: hash("proposal", s.Index(), target)[:16], Action: action, Target: target,
		Policy: kms.Governance, Proposer: w.Operator(w.opts.Sites[0]), Created: w.Now(), Reason: "a test",
	}
	if c, ok := params.(approval.CustodianParams); ok {
		params = w.Possess(c)
	}
	if params != nil {
		p.Parameters = canon.Marshal(params)
	}
	kind, name, err := approval.ParseTarget(target)
	if err != nil {
		w.t.Fatal(err)
	}
	switch kind {
	case approval.TargetKey:
		ring, key, _ := kms.SplitKeyPath(name)
		k, _ := s.Key(ring, key)
		r, _ := s.Keyring(ring)
		p.Revision, p.Policy = k.Revision, r.Policy
	case approval.TargetKeyring:
		r, _ := s.Keyring(name)
		p.Revision, p.Policy = r.Revision, r.Policy
	case approval.TargetPolicy:
		pol, _ := s.Policy(name)
		p.Revision = pol.Revision
	case approval.TargetCustodian:
		c, _ := s.Custodian(name)
		p.Revision = c.Revision
	case approval.TargetNode:
		n, _ := s.Node(name)
		p.Revision = n.Revision
	case approval.TargetSite:
		p.Revision = s.SiteRevision(name)
	case approval.TargetRecovery:
		k, _ := s.RecoveryKeyOf(name)
		p.Revision = k.Number
	}
	pol, _ := s.Policy(p.Policy)
	p.PolicyRevision = pol.Revision
	rule, _ := pol.Rule(action)
	p.Expires = p.Created + max(rule.Lifetime, time.Hour.Milliseconds())
	return p
}

// Open opens a proposal by a node of the first site and returns its identifier.
func (w *World) Open(p approval.Proposal) string {
	w.t.Helper()
	b := p.Marshal()
	w.Do(w.FirstNode(), state.OpenProposal{Proposal: b}, As(p.Proposer))
	return approval.ProposalID(b)
}

// Propose is Open of Proposal.
func (w *World) Propose(action kms.Action, target string, params any) string {
	w.t.Helper()
	return w.Open(w.Proposal(action, target, params))
}

// FirstNode returns the first node of the first site.
func (w *World) FirstNode() string { return w.State().NodesOf(w.opts.Sites[0])[0].ID }

// Statement returns a custodian's signed verdict on a proposal.
func (w *World) Statement(id, custodian string, v approval.Verdict) approval.Statement {
	w.t.Helper()
	p, ok := w.State().Proposal(id)
	if !ok {
		w.t.Fatalf("there is no proposal %s", id)
	}
	key := w.Custodian(custodian)
	sig, err := key.Sign(approval.Message(v, p.Bytes), []byte(approval.Context))
	if err != nil {
		w.t.Fatal(err)
	}
	c := Record(custodian, "", 0, key)
	return approval.Statement{Proposal: id, Verdict: v, Custodian: custodian, Credential: c.Credentials[0].ID, Signature: sig}
}

// Vote casts a custodian's vote, which must be accepted.
func (w *World) Vote(id, custodian string, v approval.Verdict) state.Result {
	w.t.Helper()
	return w.Do(w.FirstNode(), state.CastVote{Statement: w.Statement(id, custodian, v)})
}

// Approve casts the custodians' approvals.
func (w *World) Approve(id string, custodians ...string) {
	w.t.Helper()
	for _, c := range custodians {
		w.Vote(id, c, approval.Approve)
	}
}

// ApproveAll casts approvals of one custodian of each site in turn until the
// proposal is authorised.
func (w *World) ApproveAll(id string) {
	w.t.Helper()
	for i := range w.opts.CustodiansPerSite {
		for _, site := range w.opts.Sites {
			if p, _ := w.State().Proposal(id); p.Progress == state.Authorised {
				return
			}
			w.Vote(id, fmt.Sprintf("%s-%d", site, i+1), approval.Approve)
		}
	}
}

// Execute carries out an authorised proposal of any action but rotate.
func (w *World) Execute(id string) state.Result {
	w.t.Helper()
	p, _ := w.State().Proposal(id)
	return w.Do(w.FirstNode(), state.Execute{Proposal: id}, Expect(p.Content.Revision))
}

// Carry proposes, approves and executes an action without delay.
func (w *World) Carry(action kms.Action, target string, params any) string {
	w.t.Helper()
	id := w.Propose(action, target, params)
	w.ApproveAll(id)
	w.Execute(id)
	return id
}

// CommitCommand returns the command that brings the version that an authorised
// proposal asks for.
func (w *World) CommitCommand(id string) state.CommitRotation {
	w.t.Helper()
	s := w.State()
	p, _ := s.Proposal(id)
	_, name, _ := approval.ParseTarget(p.Content.Target)
	ring, key, _ := kms.SplitKeyPath(name)
	k, ok := s.Key(ring, key)
	if !ok {
		w.t.Fatalf("there is no key %s", name)
	}
	wrapped, public, checks := w.opts.Hooks.PerKey(ring, key, kms.KeyID(k.ID), k.Latest+1, k.Algorithm, s.ResidentNodes(ring))
	c := state.CommitRotation{Proposal: id, Keyring: ring, Key: key, Version: k.Latest + 1, PublicKey: public}
	c.KEK, c.Wrapped, c.Copies, c.Generated, c.Checks = w.material(ring, key, c.Version, k.Purpose, wrapped, checks)
	return c
}

// Commit commits the rotation of an authorised proposal by the first resident node.
func (w *World) Commit(id string) state.CommitRotation {
	w.t.Helper()
	c := w.CommitCommand(id)
	k, _ := w.State().Key(c.Keyring, c.Key)
	w.Do(w.State().ResidentNodes(c.Keyring)[0].ID, c, Expect(k.Revision))
	return c
}

// ReceiptCommand returns a node's receipt.
func (w *World) ReceiptCommand(node, keyring, key string, version uint32) state.GiveReceipt {
	w.t.Helper()
	s := w.State()
	k, _ := s.Key(keyring, key)
	if v, _ := s.Version(keyring, key, version); v.Generated != "" && k.Purpose == kms.Sign {
		message := kms.ReceiptMessage(s.Cluster(), keyring, kms.KeyID(k.ID), version, node)
		return state.GiveReceipt{Keyring: keyring, Key: key, Version: version, KCV: w.signReceipt(k.Algorithm, message)}
	}
	return state.GiveReceipt{Keyring: keyring, Key: key, Version: version, KCV: w.opts.Hooks.KCV(node, keyring, key, version)}
}

// GiveReceipts lets every node give the receipts that it owes.
func (w *World) GiveReceipts() {
	w.t.Helper()
	for _, node := range w.NodeIDs() {
		for _, p := range w.State().Pending(node) {
			w.Do(node, w.ReceiptCommand(node, p.Keyring, p.Key, p.Version))
		}
	}
}

// Rotate rotates a key from proposal to the last receipt and returns the proposal.
func (w *World) Rotate(keyring, key string) string {
	w.t.Helper()
	id := w.Propose(kms.ActionRotate, approval.KeyTarget(keyring, key), nil)
	w.ApproveAll(id)
	w.Commit(id)
	w.GiveReceipts()
	return id
}
