package statetest

import (
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/pqc"
)

// Options shape a World; the zero value gives three sites with a node and two
// custodians each.
type Options struct {
	Sites             []string // sorted or not; default fr, de, jp
	NodesPerSite      int      // default 1
	CustodiansPerSite int      // default 2
	Created           int64    // Unix milliseconds, default Start
	P384              bool     // ECDSA and ML-KEM with P-384 instead of P-256, slower
	Policies          []approval.Policy
	Access            []byte                   // Cedar policies
	Address           func(node string) string // host:port between nodes
	API               func(node string) string // https URL
	Attested          map[string]string        // nodes of the genesis with an attestation document, and the nodes that witness it
	Amend             func(*state.Node)        // changes the record of a node or of its next root before it is signed
	Hooks             Hooks
}

// Hooks supply what keys are made of. The defaults give bytes that fit the state
// machine but nothing can open.
type Hooks struct {
	// Keyring returns what a new keyring's KEK comes with, sorted by node.
	Keyring func(keyring string, nodes []state.Node) ([]state.SealedCopy, []state.Check)
	// PerKey returns wrapped material, public key and checks of a key version.
	PerKey func(keyring, key string, id kms.KeyID, version uint32, alg kms.Algorithm, nodes []state.Node) (wrapped, public []byte, checks []state.Check)
	// KCV returns a node's key check value; key is empty for the KEK.
	KCV func(node, keyring, key string, version uint32) []byte
}

func (o *Options) defaults() {
	if len(o.Sites) == 0 {
		o.Sites = []string{"de", "fr", "jp"}
	}
	o.Sites = slices.Clone(o.Sites)
	slices.Sort(o.Sites)
	if o.NodesPerSite == 0 {
		o.NodesPerSite = 1
	}
	if o.CustodiansPerSite == 0 {
		o.CustodiansPerSite = 2
	}
	if o.Created == 0 {
		o.Created = Start
	}
	if o.Policies == nil {
		o.Policies = Policies(len(o.Sites))
	}
	if o.Access == nil {
		o.Access = []byte("permit(principal, action, resource);\n")
	}
	if o.Address == nil {
		o.Address = func(node string) string { return node + ".example:7600" }
	}
	if o.API == nil {
		o.API = func(node string) string { return "https://" + node + ".example:7700" }
	}
	o.Hooks.defaults()
}

// Policies returns the policy governance and one called standard: creation is
// direct for operators and services, suspension takes one custodian, destruction
// up to three of different sites and seven days, all else up to two of two sites.
func Policies(sites int) []approval.Policy {
	hour := time.Hour.Milliseconds()
	quorum := func(a kms.Action, n int, delay, lifetime int64) approval.Rule {
		m := uint32(min(n, sites))
		return approval.Rule{Action: a, Approvals: m, Sites: m, Delay: delay, Lifetime: lifetime}
	}
	direct := func(a kms.Action, roles ...string) approval.Rule { return approval.Rule{Action: a, Direct: roles} }
	return []approval.Policy{
		{Name: kms.Governance, Revision: 1, Rules: []approval.Rule{
			quorum(kms.ActionCustodian, 2, 0, 72*hour),
			direct(kms.ActionKeyring, "operator"),
			quorum(kms.ActionNode, 2, 0, 72*hour),
			quorum(kms.ActionPolicy, 2, 0, 72*hour),
			quorum(kms.ActionRecover, 2, 0, 72*hour),
			quorum(kms.ActionRecoveryKey, 2, 0, 72*hour),
			quorum(kms.ActionSite, 2, 0, 72*hour),
		}},
		{Name: "standard", Revision: 1, Rules: []approval.Rule{
			quorum(kms.ActionCompromise, 2, 0, 72*hour),
			direct(kms.ActionCreate, "operator", "service"),
			quorum(kms.ActionDeactivate, 2, 0, 72*hour),
			quorum(kms.ActionDestroy, 3, 7*24*hour, 30*24*hour),
			quorum(kms.ActionResume, 2, 0, 72*hour),
			quorum(kms.ActionRotate, 2, 0, 72*hour),
			quorum(kms.ActionSuspend, 1, 0, 72*hour),
		}},
	}
}

// TrustDomain returns the trust domain of a site.
func TrustDomain(site string) string { return site + ".example" }

// Node is a node with its keys in software.
type Node struct {
	Record    state.Node
	Key       *ecdsa.PrivateKey // signing
	Agreement *ecdh.PrivateKey  // classical half of the agreement key
	Seed      *secret.Bytes     // ML-KEM half, 64 bytes
	Private   *pqc.PrivateKey   // both halves
}

// SigningKey returns the public signing key.
func (n *Node) SigningKey() *ecdsa.PublicKey { return &n.Key.PublicKey }

// Sign signs a digest as a device does: r‖s.
func (n *Node) Sign(_ context.Context, digest []byte) ([]byte, error) {
	r, s, err := ecdsa.Sign(rand.Reader, n.Key, digest)
	if err != nil {
		return nil, err
	}
	size := (n.Key.Curve.Params().BitSize + 7) / 8
	sig := make([]byte, 2*size)
	r.FillBytes(sig[:size])
	s.FillBytes(sig[size:])
	return sig, nil
}

// SignCommand signs envelope bytes and joins them to a command.
func (n *Node) SignCommand(t testing.TB, envelope []byte) []byte {
	t.Helper()
	return state.Join(envelope, n.signature(t, envelope, state.CommandContext))
}

func (n *Node) signature(t testing.TB, message []byte, context string) []byte {
	t.Helper()
	digest, err := pqc.Digest(pqc.SuiteID(n.Record.SigningSuite), message, []byte(context))
	if err != nil {
		t.Fatal(err)
	}
	sig, err := n.Sign(t.Context(), digest)
	if err != nil {
		t.Fatal(err)
	}
	return sig
}

// CA is a site's certificate authority.
type CA struct {
	Certificate *x509.Certificate
	Key         *ecdsa.PrivateKey
}

// found makes all keys and the signed genesis.
func (w *World) found() {
	w.t.Helper()
	o := w.opts
	g := state.Genesis{Format: state.GenesisFormat, Name: "test coalition", Nonce: make([]byte, state.GenesisNonce), Created: o.Created, Policies: o.Policies, Access: o.Access}
	copy(g.Nonce, "a nonce of a cluster for tests")
	for _, site := range o.Sites {
		ca := w.newCA(site)
		w.cas[site] = ca
		g.Sites = append(g.Sites, state.Site{ID: site, TrustDomain: TrustDomain(site), CAs: [][]byte{ca.Certificate.Raw}})
		for i := range o.NodesPerSite {
			n := w.newNode(fmt.Sprintf("node-%s-%d", site, i+1), site)
			w.nodes[n.Record.ID] = []*Node{n}
			g.Nodes = append(g.Nodes, n.Record)
		}
		for i := range o.CustodiansPerSite {
			id := fmt.Sprintf("%s-%d", site, i+1)
			g.Custodians = append(g.Custodians, Record(id, site, 1, w.AddCustodianKey(id)))
		}
	}
	if o.Attested != nil {
		w.vendor = w.newCA("the vendor")
		g.Vendors = [][]byte{w.vendor.Certificate.Raw}
	}
	for i, n := range g.Nodes {
		if witness, ok := o.Attested[n.ID]; ok {
			w.Attest(w.Node(n.ID), witness)
			g.Nodes[i] = w.Node(n.ID).Record
		}
	}
	slices.SortFunc(g.Nodes, func(a, b state.Node) int { return strings.Compare(a.ID, b.ID) })
	slices.SortFunc(g.Custodians, func(a, b approval.Custodian) int { return strings.Compare(a.ID, b.ID) })
	w.genesis, w.signed = g, w.SignGenesis(g)
}

// SignGenesis signs a genesis with the keys of all nodes of this World.
func (w *World) SignGenesis(g state.Genesis) state.SignedGenesis {
	w.t.Helper()
	s := state.SignedGenesis{Genesis: g.Marshal()}
	for _, n := range g.Nodes {
		s.Signatures = append(s.Signatures, state.NodeSignature{Node: n.ID, Signature: w.Node(n.ID).signature(w.t, s.Genesis, state.GenesisContext)})
	}
	return s
}

// Record returns a custodian's record with one hybrid credential.
func Record(id, site string, revision uint64, key *pqc.HybridKey) approval.Custodian {
	pub := key.PublicKey()
	return approval.Custodian{ID: id, Site: site, Revision: revision, Credentials: []approval.Credential{
		{ID: pqc.Fingerprint(pub), Suite: uint16(pqc.MLDSA65Ed25519), PublicKey: pub},
	}}
}

func (w *World) newCA(site string) *CA {
	w.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	from := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "CA of " + site}, NotBefore: from, NotAfter: from.AddDate(50, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		w.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		w.t.Fatal(err)
	}
	return &CA{Certificate: cert, Key: key}
}

func (w *World) newNode(id, site string) *Node {
	w.t.Helper()
	curve, agreement, kem, sign := elliptic.P256(), ecdh.P256(), pqc.MLKEM768P256, pqc.ECDSAP256SHA256
	if w.opts.P384 {
		curve, agreement, kem, sign = elliptic.P384(), ecdh.P384(), pqc.MLKEM1024P384, pqc.ECDSAP384SHA384
	}
	n := &Node{}
	var err error
	check := func() {
		if err != nil {
			w.t.Fatal(err)
		}
	}
	n.Key, err = ecdsa.GenerateKey(curve, rand.Reader)
	check()
	n.Agreement, err = agreement.GenerateKey(rand.Reader)
	check()
	n.Seed, err = pqc.GenerateSeed(nil)
	check()
	w.t.Cleanup(n.Seed.Destroy)
	n.Private, err = pqc.NewPrivateKey(kem, n.Seed, n.Agreement)
	check()
	point, err := n.Key.PublicKey.ECDH()
	check()
	n.Record = state.Node{
		ID: id, Site: site, Address: w.opts.Address(id), API: w.opts.API(id),
		Suite: uint16(kem), Agreement: n.Private.PublicKey().Bytes(),
		SigningSuite: uint16(sign), Signing: point.Bytes(), Device: "software, for tests", Voter: true,
		Root: 1, Revision: 1, ImportKind: ImportKind, Import: n.Agreement.PublicKey().Bytes(),
	}
	if w.opts.Amend != nil {
		w.opts.Amend(&n.Record)
	}
	return n
}
