package state

import (
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

// Cluster returns the cluster's identifier, 32 hexadecimal digits.
func (s *State) Cluster() string { return s.cluster }

// Index returns the index of the last log entry applied.
func (s *State) Index() uint64 { return s.index }

// Clock returns the cluster's time in Unix milliseconds.
func (s *State) Clock() int64 { return s.clock }

// Genesis returns the founding document.
func (s *State) Genesis() Genesis { return s.genesis }

// SignedGenesis returns the founding document as signed.
func (s *State) SignedGenesis() SignedGenesis { return s.signed }

// LogSize returns the number of leaves of the cluster log.
func (s *State) LogSize() uint64 { return s.log.size }

// LogRoot returns the RFC 6962 root hash of the cluster log, 32 bytes.
func (s *State) LogRoot() []byte { return s.log.root() }

// Access returns the Cedar policy set as text.
func (s *State) Access() []byte { return s.genesis.Access }

// Sites returns the sites, sorted.
func (s *State) Sites() []Site { return slices.Clone(s.reader().sites()) }

// Site returns a site.
func (s *State) Site(id string) (Site, bool) {
	x, _, ok := s.reader().site(id)
	return x, ok
}

// Nodes returns the nodes with their present hardware roots, sorted. One that has yet
// to adopt its first has Root 0 and no keys.
func (s *State) Nodes() []Node { return s.reader().nodes() }

// Node returns a node with its present hardware root.
func (s *State) Node(id string) (Node, bool) { return s.reader().node(id) }

// Replacement returns the root that a node is to have next, if there is one.
func (s *State) Replacement(node string) (Replacement, bool) { return s.reader().replacement(node) }

// Replacements returns the roots that nodes are to have next, sorted by node.
func (s *State) Replacements() []Replacement {
	return list[Replacement](s.read(), tableNext, byID, []byte{})
}

// NextRoot returns the number that the next proposal for a node's root is about, 1 for
// a node that is to join.
func (s *State) NextRoot(node string) uint32 { return s.reader().nextRoot(node) }

// FormerRoots returns the hardware roots that a node had before, the first one first.
func (s *State) FormerRoots(node string) []FormerRoot { return s.reader().formers(node) }

// NodesOf returns a site's nodes, sorted.
func (s *State) NodesOf(site string) []Node {
	return slices.DeleteFunc(s.Nodes(), func(n Node) bool { return n.Site != site })
}

func search[T any](l []T, is func(T) bool) (T, bool) {
	if i := slices.IndexFunc(l, is); i >= 0 {
		return l[i], true
	}
	var zero T
	return zero, false
}

// NodeStatus returns the latest time that a node has signed.
func (s *State) NodeStatus(id string) (NodeStatus, bool) {
	return find[NodeStatus](s.read(), tableStatus, byID, nameKey(id))
}

// Custodians returns the custodians, revoked ones too, sorted.
func (s *State) Custodians() []approval.Custodian { return s.reader().custodians() }

// Custodian returns a custodian.
func (s *State) Custodian(id string) (approval.Custodian, bool) { return s.reader().custodian(id) }

// Policies returns the policies in force, sorted by name.
func (s *State) Policies() []approval.Policy { return s.reader().policies() }

// Policy returns the policy in force under a name.
func (s *State) Policy(name string) (approval.Policy, bool) { return s.reader().policy(name) }

// Keyrings returns the keyrings, sorted by name.
func (s *State) Keyrings() []Keyring { return s.reader().keyrings() }

// Keyring returns a keyring.
func (s *State) Keyring(name string) (Keyring, bool) { return s.reader().keyring(name) }

// KEK returns a version of a keyring's KEK.
func (s *State) KEK(keyring string, version uint32) (KEK, bool) {
	return find[KEK](s.read(), tableKEK, byID, numberKey(uint64(version), keyring))
}

// KEKs returns the versions of a keyring's KEK in ascending order.
func (s *State) KEKs(keyring string) []KEK {
	return list[KEK](s.read(), tableKEK, byID, prefixKey(keyring))
}

// Key returns a key.
func (s *State) Key(keyring, name string) (Key, bool) { return s.reader().key(keyring, name) }

// KeyByID returns the key with an identifier.
func (s *State) KeyByID(id kms.KeyID) (Key, bool) {
	return find[Key](s.read(), tableKey, byKeyID, id[:])
}

// Keys returns a keyring's keys, destroyed ones too, sorted by name.
func (s *State) Keys(keyring string) []Key {
	return list[Key](s.read(), tableKey, byID, prefixKey(keyring))
}

// Version returns a key version.
func (s *State) Version(keyring, key string, n uint32) (Version, bool) {
	return s.reader().version(keyring, key, n)
}

// Versions returns a key's versions in ascending order.
func (s *State) Versions(keyring, key string) []Version { return s.reader().versions(keyring, key) }

// Proposal returns a proposal.
func (s *State) Proposal(id string) (Proposal, bool) { return s.reader().proposal(id) }

// Proposals returns all proposals, newest first.
func (s *State) Proposals() []Proposal {
	return list[Proposal](s.read(), tableProposal, bySeq, []byte{})
}

// ProposalsOpen returns the proposals that can still be carried out, newest first:
// open or authorised and not expired.
func (s *State) ProposalsOpen() []Proposal {
	return newestFirst(slices.DeleteFunc(s.reader().live(), func(p Proposal) bool { return p.expired(s.clock) }))
}

// Pending returns the versions whose receipt by the node is missing, KEKs first.
func (s *State) Pending(node string) []Pending {
	x := s.read()
	var l []Pending
	for _, k := range list[KEK](x, tableKEK, byPending, prefixKey(node)) {
		l = append(l, Pending{Keyring: k.Keyring, Version: k.Version})
	}
	for _, v := range list[Version](x, tableVersion, byPending, prefixKey(node)) {
		l = append(l, Pending{Keyring: v.Keyring, Key: v.Key, Version: v.Version})
	}
	return l
}

// ResidentNodes returns the nodes at the sites of a keyring's residency that have a
// hardware root, sorted.
func (s *State) ResidentNodes(keyring string) []Node {
	r := s.reader()
	k, ok := r.keyring(keyring)
	if !ok {
		return nil
	}
	return r.residents(k.Residency)
}

// Resident reports whether the node may open the keyring.
func (s *State) Resident(keyring, node string) bool {
	r := s.reader()
	k, ok := r.keyring(keyring)
	n, known := r.node(node)
	return ok && known && n.Root != 0 && slices.Contains(k.Residency, n.Site)
}

// Outcome returns what became of the command with an idempotency key, while it is
// remembered (OutcomeRetention of the cluster's clock).
func (s *State) Outcome(idempotency []byte) (Outcome, bool) {
	if len(idempotency) == 0 {
		return Outcome{}, false
	}
	return find[Outcome](s.read(), tableOutcome, byID, idempotency)
}

// The stages that Decision adds to those of a Progress.
const (
	Expired = "expired" // open or authorised, but too old
	Waiting = "waiting" // authorised, the delay or not-before is not over
)

// Decision counts the approvals of a proposal under the rule now in force, and
// says where the proposal stands at the cluster's time: its Progress, Expired or
// Waiting.
func (s *State) Decision(id string) (approval.Decision, string, bool) {
	r := s.reader()
	p, ok := r.proposal(id)
	if !ok {
		return approval.Decision{}, "", false
	}
	rule, err := r.rule(p.Content)
	if err != nil {
		return approval.Decision{Missing: []string{message(err)}}, string(p.Progress), true
	}
	d := r.decide(p, rule, approvers(r, p))
	progress := string(p.Progress)
	switch {
	case p.live() && p.expired(s.clock):
		progress = Expired
	case p.Progress == Authorised && s.clock < p.executable(rule):
		progress = Waiting
	}
	return d, progress, true
}

// Rule returns the rule now in force for a proposal: that of its policy for its
// action, made stricter for a change of a policy (see RuleFor). Errors:
// kms.NotFound, kms.Conflict, kms.Invalid.
func (s *State) Rule(p approval.Proposal) (approval.Rule, error) { return s.reader().rule(p) }
