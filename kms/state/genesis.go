package state

import (
	"net/url"
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/pqc"
)

// GenesisFormat is the format of genesis documents of this program, and
// GenesisContext the signature context of the nodes' signatures over them.
const (
	GenesisFormat  uint8 = 1
	GenesisContext       = "conclave/genesis/v1"
)

// Genesis is the founding document of a cluster. All lists are sorted by their
// identifier (policies by name) without repetition; policies and custodians have
// revision 1 and no custodian is revoked.
type Genesis struct {
	Format     uint8                `cbor:"format"`
	Name       string               `cbor:"name"`
	Nonce      []byte               `cbor:"nonce"`   // 32 random bytes
	Created    int64                `cbor:"created"` // Unix milliseconds; the cluster's clock starts here
	Sites      []Site               `cbor:"sites"`
	Nodes      []Node               `cbor:"nodes"`
	Custodians []approval.Custodian `cbor:"custodians"`
	Policies   []approval.Policy    `cbor:"policies"`
	Access     []byte               `cbor:"access"`  // Cedar policy set, text
	Vendors    [][]byte             `cbor:"vendors"` // DER certificates to which those of attested devices must lead

	// MajoritySite is the site that has a majority of the voters, where the founders want that; see CheckFounding.
	MajoritySite string `cbor:"majority-site,omitempty"`
}

// NodeSignature is a node's signature over the genesis bytes.
type NodeSignature struct {
	Node      string `cbor:"node"`
	Signature []byte `cbor:"signature"` // r‖s of pqc.Digest(signing suite, genesis bytes, GenesisContext)
}

// SignedGenesis is a genesis document with the signatures of all its nodes.
type SignedGenesis struct {
	Genesis    []byte          `cbor:"genesis"`    // exact bytes
	Signatures []NodeSignature `cbor:"signatures"` // sorted by node
}

// Marshal returns the canonical encoding, which the nodes sign.
func (g Genesis) Marshal() []byte { return canon.Marshal(g) }

// ParseGenesis decodes and validates a genesis document. Errors: kms.TooLarge,
// kms.Invalid.
func ParseGenesis(b []byte) (Genesis, error) {
	if len(b) > MaxGenesis {
		return Genesis{}, kms.Errorf(kms.TooLarge, "the genesis has %d bytes; the limit is %d", len(b), MaxGenesis)
	}
	var g Genesis
	if err := canon.Unmarshal(b, &g); err != nil {
		return Genesis{}, kms.Wrap(kms.Invalid, err, "the genesis is not in canonical form", "")
	}
	if err := g.Validate(); err != nil {
		return Genesis{}, err
	}
	return g, nil
}

// Marshal returns the canonical encoding.
func (s SignedGenesis) Marshal() []byte { return canon.Marshal(s) }

// ParseSignedGenesis decodes what Marshal writes; Verify checks it. Errors:
// kms.TooLarge, kms.Invalid.
func ParseSignedGenesis(b []byte) (SignedGenesis, error) {
	if len(b) > 2*MaxGenesis {
		return SignedGenesis{}, kms.Errorf(kms.TooLarge, "the signed genesis has %d bytes; the limit is %d", len(b), 2*MaxGenesis)
	}
	var s SignedGenesis
	if err := canon.Unmarshal(b, &s); err != nil {
		return SignedGenesis{}, kms.Wrap(kms.Invalid, err, "the signed genesis is not in canonical form", "")
	}
	return s, nil
}

// Verify validates the genesis and checks that exactly its nodes have signed its
// bytes. Errors: kms.TooLarge, kms.Invalid, kms.BadSignature.
func (s SignedGenesis) Verify() (Genesis, error) {
	g, err := ParseGenesis(s.Genesis)
	if err != nil {
		return Genesis{}, err
	}
	if len(s.Signatures) != len(g.Nodes) {
		return Genesis{}, kms.Errorf(kms.BadSignature, "the genesis has %d signatures of its %d nodes; every node must sign", len(s.Signatures), len(g.Nodes))
	}
	for i, n := range g.Nodes {
		sig := s.Signatures[i]
		if sig.Node != n.ID {
			return Genesis{}, kms.Errorf(kms.BadSignature, "the signature of node %s is missing or not in order", n.ID)
		}
		if err := verifyBy(n.SigningSuite, n.Signing, s.Genesis, GenesisContext, sig.Signature); err != nil {
			return Genesis{}, kms.Wrap(kms.BadSignature, err, "the genesis signature of node "+n.ID+" does not verify", "")
		}
	}
	return g, nil
}

// verifyBy checks a signature by the signing key of a node's root.
func verifyBy(suite uint16, signing, message []byte, context string, sig []byte) error {
	return pqc.Verify(pqc.SuiteID(suite), signing, message, []byte(context), sig)
}

// Validate checks the document's shape and that what it says fits together: the
// sites of nodes and custodians exist, every policy can be met. Errors:
// kms.Invalid.
func (g Genesis) Validate() error {
	switch {
	case g.Format != GenesisFormat:
		return kms.Errorf(kms.Invalid, "genesis: format %d is not known; this program knows %d", g.Format, GenesisFormat)
	case len(g.Nonce) != GenesisNonce:
		return kms.Errorf(kms.Invalid, "genesis: the nonce has %d bytes, not %d", len(g.Nonce), GenesisNonce)
	case g.Created <= 0 || g.Created > maxTime:
		return kms.Errorf(kms.Invalid, "genesis: the time of creation is out of range")
	case len(g.Access) > MaxAccess:
		return kms.Errorf(kms.Invalid, "genesis: the access policy has %d bytes; the limit is %d", len(g.Access), MaxAccess)
	}
	if err := checkText("genesis: name", g.Name, true); err != nil {
		return err
	}
	for _, check := range []func() error{g.validateSites, g.validateNodes, g.validateCustodians, g.validatePolicies, g.checkForbidden, g.validateAttestations} {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

func (g Genesis) validateSites() error {
	if err := sortedIDs("site", g.Sites, MaxSites, func(s Site) string { return s.ID }); err != nil {
		return err
	}
	domains := make(map[string]string)
	for _, s := range g.Sites {
		if err := approval.CheckTrustDomain(s.TrustDomain); err != nil {
			return kms.Wrap(kms.Invalid, err, "site "+s.ID+": "+err.Error(), "")
		}
		if o, taken := domains[s.TrustDomain]; taken {
			return kms.Errorf(kms.Invalid, "sites %s and %s have the same trust domain", o, s.ID)
		}
		domains[s.TrustDomain] = s.ID
		if err := approval.CheckCAs(s.CAs); err != nil {
			return kms.Wrap(kms.Invalid, err, "site "+s.ID+": "+err.Error(), "")
		}
	}
	return nil
}

func (g Genesis) validateNodes() error {
	if err := sortedIDs("node", g.Nodes, MaxNodes, func(n Node) string { return n.ID }); err != nil {
		return err
	}
	populated := make(map[string]bool)
	signing := make(map[string]bool)
	voters := 0
	for _, n := range g.Nodes {
		if !slices.ContainsFunc(g.Sites, func(s Site) bool { return s.ID == n.Site }) {
			return kms.Errorf(kms.Invalid, "node %s: there is no site %q", n.ID, n.Site)
		}
		if err := n.validate(); err != nil {
			return err
		}
		if n.Root != 1 || n.Revision != 1 {
			return kms.Errorf(kms.Invalid, "node %s: in a genesis the number of its root and its revision are 1", n.ID)
		}
		if signing[string(n.Signing)] {
			return kms.Errorf(kms.Invalid, "node %s has the signing key of another node", n.ID)
		}
		signing[string(n.Signing)] = true
		populated[n.Site] = true
		if n.Voter {
			voters++
		}
	}
	for _, s := range g.Sites {
		if !populated[s.ID] {
			return kms.Errorf(kms.Invalid, "site %s has no node", s.ID)
		}
	}
	if voters == 0 {
		return kms.Errorf(kms.Invalid, "genesis: no node is a voter")
	}
	if g.MajoritySite != "" && !populated[g.MajoritySite] {
		return kms.Errorf(kms.Invalid, "genesis: the site with the majority, %q, does not exist", g.MajoritySite)
	}
	return nil
}

func (n Node) validate() error {
	if a, err := url.Parse("//" + n.Address); err != nil || a.Host != n.Address || a.Hostname() == "" || a.Port() == "" || len(n.Address) > MaxText {
		return kms.Errorf(kms.Invalid, "node %s: address %q is not host:port", n.ID, n.Address)
	}
	if n.API != "" {
		u, err := url.Parse(n.API)
		if err != nil || u.Scheme != "https" || u.Host == "" || len(n.API) > MaxText {
			return kms.Errorf(kms.Invalid, "node %s: API address %q is not an https URL", n.ID, n.API)
		}
	}
	if err := n.HardwareRoot().Validate(); err != nil {
		return kms.Wrap(kms.Invalid, err, "node "+n.ID+": "+err.Error(), "")
	}
	return nil
}

func (g Genesis) validateCustodians() error {
	if err := sortedIDs("custodian", g.Custodians, MaxCustodians, func(c approval.Custodian) string { return c.ID }); err != nil {
		return err
	}
	for _, c := range g.Custodians {
		if err := c.Validate(); err != nil {
			return err
		}
		if c.Revision != 1 || c.Revoked || slices.ContainsFunc(c.Credentials, func(k approval.Credential) bool { return k.Suspended }) {
			return kms.Errorf(kms.Invalid, "custodian %s: in a genesis the revision is 1 and nobody is revoked or suspended", c.ID)
		}
		if !slices.ContainsFunc(g.Sites, func(s Site) bool { return s.ID == c.Site }) {
			return kms.Errorf(kms.Invalid, "custodian %s: there is no site %q", c.ID, c.Site)
		}
	}
	return approval.CheckCustodians(g.Custodians)
}

func (g Genesis) validatePolicies() error {
	if err := sortedIDs("policy", g.Policies, MaxPolicies, func(p approval.Policy) string { return p.Name }); err != nil {
		return err
	}
	for _, p := range g.Policies {
		if p.Revision != 1 {
			return kms.Errorf(kms.Invalid, "policy %s: in a genesis the revision is 1", p.Name)
		}
		if err := checkPolicy(p, g.Custodians, g.Sites); err != nil {
			return err
		}
	}
	if !slices.ContainsFunc(g.Policies, func(p approval.Policy) bool { return p.Name == kms.Governance }) {
		return kms.Errorf(kms.Invalid, "genesis: the policy %q is missing", kms.Governance)
	}
	return nil
}

// quorumOnly are the actions that no rule may leave to one person.
var quorumOnly = []kms.Action{kms.ActionPolicy, kms.ActionCustodian, kms.ActionNode, kms.ActionSite, kms.ActionRecoveryKey, kms.ActionRecover}

// checkPolicy validates a policy and checks that the custodians can meet it, that
// its required sites exist, and that nobody may change policies, custodians or the
// hardware of a node alone.
func checkPolicy(p approval.Policy, custodians []approval.Custodian, sites []Site) error {
	if err := p.Validate(); err != nil {
		return err
	}
	for _, r := range p.Rules {
		if slices.Contains(quorumOnly, r.Action) && !r.Quorum() {
			return kms.Errorf(kms.Invalid, "policy %s: the rule for %q must be a quorum", p.Name, r.Action)
		}
		for _, req := range slices.Concat(r.Required, r.GroupSites()) {
			if !slices.ContainsFunc(sites, func(s Site) bool { return s.ID == req }) {
				return kms.Errorf(kms.Invalid, "policy %s: rule for %q requires site %q, which does not exist", p.Name, r.Action, req)
			}
		}
	}
	return p.Possible(custodians)
}
