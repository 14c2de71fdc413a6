package clustertest

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"sync/atomic"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/pqc"
)

const suite = pqc.ECDSAP256SHA256

// Signer is a node's signing key in software.
type Signer struct{ key *ecdsa.PrivateKey }

// NewSigner makes a P-256 signing key.
func NewSigner(t testing.TB) *Signer {
	t.Helper()
	return &Signer{newKey(t)}
}

// Public returns the SEC1 uncompressed point.
func (s *Signer) Public(t testing.TB) []byte {
	t.Helper()
	b, err := s.key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Sign signs a digest as a device does: r‖s.
func (s *Signer) Sign(_ context.Context, digest []byte) ([]byte, error) {
	r, v, err := ecdsa.Sign(rand.Reader, s.key, digest)
	if err != nil {
		return nil, err
	}
	sig := make([]byte, 64)
	r.FillBytes(sig[:32])
	v.FillBytes(sig[32:])
	return sig, nil
}

// sign signs message in a signature context.
func (s *Signer) sign(t testing.TB, message []byte, context string) []byte {
	t.Helper()
	digest, err := pqc.Digest(suite, message, []byte(context))
	if err != nil {
		t.Fatal(err)
	}
	sig, err := s.Sign(t.Context(), digest)
	if err != nil {
		t.Fatal(err)
	}
	return sig
}

// newGenesis makes the founding document of the members: a custodian a site, and
// the policy "governance" by which operators make keyrings, and all custodians
// decide on the rest.
func newGenesis(t testing.TB, members []*Member, cas map[string]*CA) state.Genesis {
	t.Helper()
	g := state.Genesis{Format: state.GenesisFormat, Name: t.Name(), Nonce: random(t, state.GenesisNonce),
		Created: time.Now().Add(-time.Hour).UnixMilli()}
	seen := map[string]bool{}
	for _, m := range members {
		agreement, err := pqc.GenerateKey(pqc.MLKEM768P256)
		if err != nil {
			t.Fatal(err)
		}
		defer agreement.Destroy()
		g.Nodes = append(g.Nodes, state.Node{
			ID: m.ID, Site: m.Site, Address: m.Address, Device: "software", Voter: true,
			Suite: uint16(pqc.MLKEM768P256), Agreement: agreement.PublicKey().Bytes(),
			SigningSuite: uint16(suite), Signing: m.Signer.Public(t),
		})
		if seen[m.Site] {
			continue
		}
		seen[m.Site] = true
		g.Sites = append(g.Sites, state.Site{ID: m.Site, TrustDomain: TrustDomain(m.Site), CAs: [][]byte{cas[m.Site].Certificate.Raw}})
		g.Custodians = append(g.Custodians, newCustodian(t, m.Site))
	}
	quorum := func(a kms.Action) approval.Rule {
		return approval.Rule{Action: a, Approvals: uint32(len(g.Sites)), Sites: uint32(len(g.Sites)), Lifetime: time.Hour.Milliseconds()}
	}
	g.Policies = []approval.Policy{{Name: kms.Governance, Revision: 1, Rules: []approval.Rule{
		quorum(kms.ActionCustodian), {Action: kms.ActionKeyring, Direct: []string{"operator"}}, quorum(kms.ActionPolicy),
	}}}
	return g
}

func newCustodian(t testing.TB, site string) approval.Custodian {
	t.Helper()
	key, err := pqc.GenerateHybrid(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer key.Destroy()
	public := key.PublicKey()
	return approval.Custodian{ID: site + "-1", Site: site, Revision: 1, Credentials: []approval.Credential{
		{ID: pqc.Fingerprint(public), Suite: uint16(pqc.MLDSA65Ed25519), PublicKey: public}}}
}

func random(t testing.TB, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return b
}

func clusterID(g state.SignedGenesis) string { return kms.ClusterID(g.Genesis) }

// logWriter writes to the test's log until the cluster is closed.
type logWriter struct {
	t      testing.TB
	closed *atomic.Bool
}

// Write implements io.Writer.
func (w logWriter) Write(b []byte) (int, error) {
	if !w.closed.Load() {
		w.t.Logf("%s", bytes.TrimSpace(b))
	}
	return len(b), nil
}
