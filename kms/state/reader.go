package state

import (
	"cmp"
	"slices"

	"github.com/hashicorp/go-memdb"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

// reader is the part of the read methods that applying commands needs too, on a
// state or on a change in the making.
type reader struct {
	x       *memdb.Txn
	genesis Genesis
}

func (s *State) reader() reader { return reader{s.read(), s.genesis} }

func (r reader) custodian(id string) (approval.Custodian, bool) {
	return find[approval.Custodian](r.x, tableCustodian, byID, nameKey(id))
}

func (r reader) custodians() []approval.Custodian {
	return list[approval.Custodian](r.x, tableCustodian, byID, []byte{})
}

func (r reader) policy(name string) (approval.Policy, bool) {
	return find[approval.Policy](r.x, tablePolicy, byID, nameKey(name))
}

func (r reader) policies() []approval.Policy {
	return list[approval.Policy](r.x, tablePolicy, byID, []byte{})
}

func (r reader) keyring(name string) (Keyring, bool) {
	return find[Keyring](r.x, tableKeyring, byID, nameKey(name))
}

func (r reader) keyrings() []Keyring {
	return list[Keyring](r.x, tableKeyring, byID, []byte{})
}

func (r reader) key(keyring, name string) (Key, bool) {
	return find[Key](r.x, tableKey, byID, nameKey(keyring, name))
}

func (r reader) version(keyring, key string, n uint32) (Version, bool) {
	return find[Version](r.x, tableVersion, byID, numberKey(uint64(n), keyring, key))
}

func (r reader) versions(keyring, key string) []Version {
	return list[Version](r.x, tableVersion, byID, prefixKey(keyring, key))
}

func (r reader) proposal(id string) (Proposal, bool) {
	return find[Proposal](r.x, tableProposal, byID, nameKey(id))
}

// live returns the proposals that are open or authorised, by identifier.
func (r reader) live() []Proposal {
	return list[Proposal](r.x, tableProposal, byLive, []byte{})
}

// residents returns the nodes at the given sites that have a hardware root, sorted.
func (r reader) residents(sites []string) []Node {
	return slices.DeleteFunc(r.nodes(), func(n Node) bool { return n.Root == 0 || !slices.Contains(sites, n.Site) })
}

func (r reader) nodes() []Node { return list[Node](r.x, tableNode, byID, []byte{}) }

func (r reader) node(id string) (Node, bool) {
	return find[Node](r.x, tableNode, byID, nameKey(id))
}

func (r reader) replacement(node string) (Replacement, bool) {
	return find[Replacement](r.x, tableNext, byID, nameKey(node))
}

func (r reader) formers(node string) []FormerRoot {
	return list[FormerRoot](r.x, tableFormer, byID, prefixKey(node))
}

// keyringFor returns the keyring that the origin node of a command must be
// resident for.
func (t *tx) keyringFor(name string) (Keyring, error) {
	k, ok := t.reader().keyring(name)
	if !ok {
		return Keyring{}, kms.Errorf(kms.NotFound, "there is no keyring %s", name)
	}
	if err := t.residentOrigin(k.Name, k.Residency); err != nil {
		return Keyring{}, err
	}
	return k, nil
}

func (t *tx) residentOrigin(keyring string, residency []string) error {
	n, _ := t.before.Node(t.env.Origin)
	if !slices.Contains(residency, n.Site) {
		return kms.Errorf(kms.NotResident, "node %s is at site %s, where keyring %s is not resident", n.ID, n.Site, keyring)
	}
	return nil
}

// exactly checks that names are those of the nodes, both sorted.
func exactly(what string, nodes []Node, names func(int) string, n int) error {
	for i := range max(len(nodes), n) {
		if i >= n || i < len(nodes) && nodes[i].ID < names(i) {
			return kms.Errorf(kms.Invalid, "there is no %s for resident node %s", what, nodes[i].ID)
		}
		if i >= len(nodes) || nodes[i].ID != names(i) {
			return kms.Errorf(kms.Invalid, "there is a %s for node %s, which is not resident", what, names(i))
		}
	}
	return nil
}

// direct checks that the principal of a command has one of a direct rule's roles
// and belongs to a site. A quorum rule needs a proposal.
func (t *tx) direct(rule approval.Rule) error {
	if len(rule.Direct) == 0 {
		return kms.Errorf(kms.NeedsApproval, "the policy asks for a quorum for %q, which is not offered for this action; make the rule direct", rule.Action)
	}
	if t.env.Principal == "" {
		return kms.Errorf(kms.Denied, "%q needs a principal; a node may not do it by itself", rule.Action)
	}
	return t.reader().mayAct(t.env.Principal, rule)
}

// mayAct checks a principal against a direct rule.
func (r reader) mayAct(principal string, rule approval.Rule) error {
	id, err := r.identity(principal)
	if err != nil {
		return err
	}
	if !slices.Contains(rule.Direct, id.Role) {
		return kms.Errorf(kms.Denied, "the role %s may not do %q by the policy", id.Role, rule.Action)
	}
	return nil
}

// siteOf returns the site of a node of the genesis, which never changes.
func (g Genesis) siteOf(node string) (string, bool) {
	n, ok := search(g.Nodes, func(n Node) bool { return n.ID == node })
	return n.Site, ok
}

// identity parses a SPIFFE ID of a trust domain of one of the sites.
func (r reader) identity(principal string) (kms.Identity, error) {
	id, err := kms.ParseIdentity(principal)
	if err != nil {
		return id, err
	}
	if !slices.ContainsFunc(r.sites(), func(s Site) bool { return s.TrustDomain == id.TrustDomain }) {
		return id, kms.Errorf(kms.Denied, "%s is not of the trust domain of any site", principal)
	}
	return id, nil
}

// nodeIdentity returns the SPIFFE ID of a node.
func (r reader) nodeIdentity(node string) string {
	n, _ := r.node(node)
	s, _, _ := r.site(n.Site)
	return kms.Identity{TrustDomain: s.TrustDomain, Role: "node", Name: n.ID}.String()
}

func compare(a, b uint64) int { return cmp.Compare(a, b) }
