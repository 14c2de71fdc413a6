package audit

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
	"github.com/conclave-kms/conclave/pqc"
)

// change is a way to alter evidence.
type change struct {
	name   string
	change func(e *Evidence)
	kind   kms.Kind // 0: any
}

// resign lets the node that signed a command sign another envelope or payload,
// as a node could that conspires.
func resign[T state.Command](t *testing.T, w *statetest.World, raw []byte, f func(e *state.Envelope, c *T)) []byte {
	t.Helper()
	envelope, _, err := state.Split(raw)
	if err != nil {
		t.Fatal(err)
	}
	e, cmd, err := state.ParseEnvelope(envelope)
	if err != nil {
		t.Fatal(err)
	}
	c := cmd.(T)
	f(&e, &c)
	e.Type, e.Payload = c.Type(), canon.Marshal(c)
	return w.Sign(e)
}

// tamper alters the command and leaves the signature.
func tamper[T state.Command](t *testing.T, raw []byte, f func(e *state.Envelope, c *T)) []byte {
	t.Helper()
	envelope, sig, err := state.Split(raw)
	if err != nil {
		t.Fatal(err)
	}
	e, cmd, err := state.ParseEnvelope(envelope)
	if err != nil {
		t.Fatal(err)
	}
	c := cmd.(T)
	f(&e, &c)
	e.Payload = canon.Marshal(c)
	return state.Join(e.Marshal(), sig)
}

func clone(t *testing.T, e Evidence) Evidence {
	t.Helper()
	c, err := ParseEvidence(e.Marshal())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func reproposed(t *testing.T, b []byte, f func(p *approval.Proposal)) []byte {
	t.Helper()
	p, err := approval.ParseProposal(b)
	if err != nil {
		t.Fatal(err)
	}
	f(&p)
	return p.Marshal()
}

func TestAlteredEvidenceIsRefused(t *testing.T) {
	t.Parallel()
	w, _, good := rotated(t)
	cluster := w.State().Cluster()
	foreign, _, other := rotated(t)
	if foreign.State().Cluster() == cluster {
		t.Fatal("the worlds are the same cluster")
	}
	for _, c := range slices.Concat(votesAndProposals(t), governance(t), commands(t, w), strangers(t, w, other)) {
		t.Run(c.name, func(t *testing.T) {
			e := clone(t, good)
			c.change(&e)
			r, err := VerifyEvidence(e, cluster)
			if err == nil {
				t.Fatalf("accepted; checks: %s", strings.Join(r.Checks, "\n"))
			}
			if c.kind != 0 && !errors.Is(err, c.kind) {
				t.Errorf("%v: %v, want %v", kms.KindOf(err), err, c.kind)
			}
		})
	}
}

func votesAndProposals(t *testing.T) []change {
	return []change{
		{"a vote's signature", func(e *Evidence) { e.Decision.Votes[0].Signature[9] ^= 1 }, kms.BadSignature},
		{"a vote's custodian", func(e *Evidence) { e.Decision.Votes[0].Custodian = "de-0" }, kms.Denied},
		{"a vote given to another custodian", func(e *Evidence) { e.Decision.Votes[1].Custodian = "fr-1" }, kms.Denied},
		{"a vote's credential", func(e *Evidence) { e.Decision.Votes[0].Credential = e.Decision.Votes[1].Credential }, kms.Denied},
		{"a vote's verdict", func(e *Evidence) { e.Decision.Votes[0].Verdict = approval.Reject }, kms.BadSignature},
		{"a vote's proposal", func(e *Evidence) { e.Decision.Votes[0].Proposal = strings.Repeat("0", 32) }, kms.Invalid},
		{"a vote dropped", func(e *Evidence) { e.Decision.Votes = e.Decision.Votes[1:] }, kms.NeedsApproval},
		{"no votes", func(e *Evidence) { e.Decision.Votes = nil }, kms.NeedsApproval},
		{"a vote twice", func(e *Evidence) {
			e.Decision.Votes = append(e.Decision.Votes[:1:1], e.Decision.Votes[:2]...)
		}, kms.Invalid},
		{"votes in another order", func(e *Evidence) { slices.Reverse(e.Decision.Votes) }, kms.Invalid},
		{"a vote on another decision", func(e *Evidence) {
			e.Decision.Votes[0] = e.Governance[3].Votes[0]
		}, kms.Invalid},
		{"the reason", func(e *Evidence) {
			e.Decision.Proposal = reproposed(t, e.Decision.Proposal, func(p *approval.Proposal) { p.Reason = "another reason" })
		}, kms.Invalid},
		{"the target", func(e *Evidence) {
			e.Decision.Proposal = reproposed(t, e.Decision.Proposal, func(p *approval.Proposal) { p.Target = "key/coalition/orders2" })
		}, kms.Invalid},
		{"no proposal", func(e *Evidence) { e.Decision.Proposal = nil }, kms.Invalid},
		{"the format", func(e *Evidence) { e.Format = 1 }, kms.Invalid},
		{"the cluster's name", func(e *Evidence) { e.Cluster = strings.Repeat("0", 32) }, kms.Invalid},
		{"no cluster", func(e *Evidence) { e.Cluster = "" }, kms.Invalid},
	}
}

func governance(t *testing.T) []change {
	return []change{
		{"a governance decision dropped", func(e *Evidence) { e.Governance = e.Governance[1:] }, 0},
		{"the last governance decision dropped", func(e *Evidence) { e.Governance = e.Governance[:3] }, kms.Conflict},
		{"no governance decisions", func(e *Evidence) { e.Governance = nil }, 0},
		{"a governance decision twice", func(e *Evidence) { e.Governance = append(e.Governance, e.Governance[3]) }, kms.Conflict},
		{"governance decisions in another order", func(e *Evidence) {
			e.Governance[0], e.Governance[3] = e.Governance[3], e.Governance[0]
		}, 0},
		{"a vote of a governance decision dropped", func(e *Evidence) { e.Governance[0].Votes = e.Governance[0].Votes[1:] }, kms.NeedsApproval},
		{"a vote of a governance decision changed", func(e *Evidence) { e.Governance[2].Votes[0].Signature[99] ^= 1 }, kms.BadSignature},
		{"an adoption with a decision on a custodian", func(e *Evidence) { e.Governance[0].Adoption = e.Governance[0].Execution }, kms.Invalid},
		{"the decision itself as governance", func(e *Evidence) { e.Governance = append(e.Governance, e.Decision) }, kms.Invalid},
		{"the execution of another governance decision", func(e *Evidence) { e.Governance[0].Execution = e.Governance[1].Execution }, kms.Invalid},
		{"the opening of another governance decision", func(e *Evidence) { e.Governance[0].Open = e.Governance[1].Open }, kms.Invalid},
		{"the policy of the genesis", func(e *Evidence) {
			regenesis(t, e, func(g *state.Genesis) { g.Policies[1].Rules[5].Lifetime-- })
		}, kms.BadSignature},
		{"a custodian of the genesis", func(e *Evidence) {
			regenesis(t, e, func(g *state.Genesis) {
				k, err := pqc.GenerateHybrid(nil)
				if err != nil {
					t.Fatal(err)
				}
				g.Custodians[0].Credentials = statetest.Record("x", "x", 0, k).Credentials
			})
		}, kms.BadSignature},
		{"a signature of the genesis dropped", func(e *Evidence) {
			s, err := state.ParseSignedGenesis(e.Genesis)
			if err != nil {
				t.Fatal(err)
			}
			s.Signatures = s.Signatures[1:]
			e.Genesis = s.Marshal()
		}, kms.BadSignature},
		{"a signature of the genesis changed", func(e *Evidence) {
			s, err := state.ParseSignedGenesis(e.Genesis)
			if err != nil {
				t.Fatal(err)
			}
			s.Signatures[0].Signature[3] ^= 1
			e.Genesis = s.Marshal()
		}, kms.BadSignature},
		{"no genesis", func(e *Evidence) { e.Genesis = nil }, kms.Invalid},
	}
}

func regenesis(t *testing.T, e *Evidence, f func(g *state.Genesis)) {
	t.Helper()
	s, err := state.ParseSignedGenesis(e.Genesis)
	if err != nil {
		t.Fatal(err)
	}
	g, err := state.ParseGenesis(s.Genesis)
	if err != nil {
		t.Fatal(err)
	}
	f(&g)
	s.Genesis = g.Marshal()
	e.Genesis, e.Cluster = s.Marshal(), kms.ClusterID(s.Genesis)
}

// commands are alterations of nodes' commands, also signed anew by the nodes
// themselves: without the custodians they gain nothing.
func commands(t *testing.T, w *statetest.World) []change {
	type rotation = state.CommitRotation
	return []change{
		{"the wrapped key", func(e *Evidence) {
			e.Decision.Execution = tamper(t, e.Decision.Execution, func(_ *state.Envelope, c *rotation) { c.Wrapped = []byte("another") })
		}, kms.BadSignature},
		{"a commit of another wrapped key, signed", func(e *Evidence) {
			e.Decision.Execution = resign(t, w, e.Decision.Execution, func(_ *state.Envelope, c *rotation) {
				c.Wrapped = []byte("another")
				c.Checks = slices.Clone(c.Checks)
				for i := range c.Checks {
					sum := sha256.Sum256([]byte(fmt.Sprintf("another key on %s", c.Checks[i].Node)))
					c.Checks[i].Hash = sum[:]
				}
			})
		}, kms.Invalid},
		{"a commit for another proposal, signed", func(e *Evidence) {
			e.Decision.Execution = resign(t, w, e.Decision.Execution, func(_ *state.Envelope, c *rotation) { c.Proposal = strings.Repeat("0", 32) })
		}, kms.Invalid},
		{"a commit for another key, signed", func(e *Evidence) {
			e.Decision.Execution = resign(t, w, e.Decision.Execution, func(_ *state.Envelope, c *rotation) { c.Key = "orders2" })
		}, kms.Invalid},
		{"a commit of another version, signed", func(e *Evidence) {
			e.Decision.Execution = resign(t, w, e.Decision.Execution, func(_ *state.Envelope, c *rotation) { c.Version = 3 })
		}, kms.Invalid},
		{"a commit for another revision, signed", func(e *Evidence) {
			e.Decision.Execution = resign(t, w, e.Decision.Execution, func(v *state.Envelope, _ *rotation) { v.Expect++ })
		}, kms.Conflict},
		{"a commit that asks fewer nodes, signed", func(e *Evidence) {
			e.Decision.Execution = resign(t, w, e.Decision.Execution, func(_ *state.Envelope, c *rotation) { c.Checks = c.Checks[1:] })
			e.Receipts = e.Receipts[1:]
		}, kms.Invalid},
		{"a commit long before, signed", func(e *Evidence) {
			e.Decision.Execution = resign(t, w, e.Decision.Execution, func(v *state.Envelope, _ *rotation) { v.Time -= 3 * state.Window })
		}, kms.Conflict},
		{"an execution of another kind, signed", func(e *Evidence) { e.Decision.Execution = e.Governance[0].Execution }, kms.Invalid},
		{"no execution", func(e *Evidence) { e.Decision.Execution = nil }, kms.Invalid},
		{"a receipt dropped", func(e *Evidence) { e.Receipts = e.Receipts[:2] }, kms.Conflict},
		{"no receipts", func(e *Evidence) { e.Receipts = nil }, kms.Conflict},
		{"a receipt twice", func(e *Evidence) { e.Receipts[2] = e.Receipts[1] }, kms.Invalid},
		{"a receipt's node", func(e *Evidence) {
			e.Receipts[0] = tamper(t, e.Receipts[0], func(v *state.Envelope, _ *state.GiveReceipt) { v.Origin = "node-fr-1" })
		}, kms.BadSignature},
		{"a receipt of another node's value, signed", func(e *Evidence) {
			var kcv []byte
			resign(t, w, e.Receipts[1], func(_ *state.Envelope, c *state.GiveReceipt) { kcv = c.KCV })
			e.Receipts[0] = resign(t, w, e.Receipts[0], func(_ *state.Envelope, c *state.GiveReceipt) { c.KCV = kcv })
		}, kms.Invalid},
		{"a receipt's value, signed", func(e *Evidence) {
			e.Receipts[0] = resign(t, w, e.Receipts[0], func(_ *state.Envelope, c *state.GiveReceipt) { c.KCV = make([]byte, 32) })
		}, kms.Invalid},
		{"a receipt of another version, signed", func(e *Evidence) {
			e.Receipts[0] = resign(t, w, e.Receipts[0], func(_ *state.Envelope, c *state.GiveReceipt) { c.Version = 1 })
		}, kms.Invalid},
		{"an opening by somebody else, signed", func(e *Evidence) {
			e.Decision.Open = resign(t, w, e.Decision.Open, func(v *state.Envelope, _ *state.OpenProposal) { v.Principal = w.Operator("jp") })
		}, kms.Denied},
		{"an opening of other bytes, signed", func(e *Evidence) {
			e.Decision.Open = resign(t, w, e.Decision.Open, func(_ *state.Envelope, c *state.OpenProposal) {
				c.Proposal = reproposed(t, c.Proposal, func(p *approval.Proposal) { p.Reason = "other" })
			})
		}, kms.Invalid},
		{"no opening", func(e *Evidence) { e.Decision.Open = nil }, kms.Invalid},
		{"no keyring", func(e *Evidence) { e.Keyring = nil }, kms.Invalid},
		{"the key's command for the keyring's", func(e *Evidence) { e.Keyring = e.Key }, kms.Invalid},
		{"another keyring, signed", func(e *Evidence) {
			e.Keyring = resign(t, w, e.Keyring, func(_ *state.Envelope, c *state.CreateKeyring) { c.Name = "europe" })
		}, kms.Invalid},
		{"a smaller residency, signed", func(e *Evidence) {
			e.Keyring = resign(t, w, e.Keyring, func(_ *state.Envelope, c *state.CreateKeyring) {
				c.Residency, c.Checks, c.Copies = []string{"de"}, c.Checks[:1], c.Copies[:1]
			})
		}, kms.Invalid},
		{"a keyring under another policy, signed", func(e *Evidence) {
			e.Keyring = resign(t, w, e.Keyring, func(_ *state.Envelope, c *state.CreateKeyring) { c.Policy = "lenient" })
		}, kms.Conflict},
		{"a keyring by nobody, signed", func(e *Evidence) {
			e.Keyring = resign(t, w, e.Keyring, func(v *state.Envelope, _ *state.CreateKeyring) { v.Principal = "" })
		}, 0},
		{"a keyring by a role without the right, signed", func(e *Evidence) {
			e.Keyring = resign(t, w, e.Keyring, func(v *state.Envelope, _ *state.CreateKeyring) { v.Principal = w.Service("fr") })
		}, kms.Denied},
		{"another key, signed", func(e *Evidence) {
			e.Key = resign(t, w, e.Key, func(_ *state.Envelope, c *state.CreateKey) { c.Name = "orders2" })
		}, kms.Invalid},
		{"the key's identifier", func(e *Evidence) {
			e.Key = tamper(t, e.Key, func(_ *state.Envelope, c *state.CreateKey) { c.ID = make([]byte, 16) })
		}, kms.BadSignature},
	}
}

// strangers put parts of another cluster's true evidence in.
func strangers(t *testing.T, w *statetest.World, other Evidence) []change {
	return []change{
		{"a foreign cluster as a whole", func(e *Evidence) { *e = other }, kms.Denied},
		{"a foreign genesis", func(e *Evidence) { e.Genesis = other.Genesis }, kms.Invalid},
		{"a foreign genesis and cluster", func(e *Evidence) { e.Genesis, e.Cluster = other.Genesis, other.Cluster }, kms.Denied},
		{"a foreign decision", func(e *Evidence) { e.Decision = other.Decision }, kms.Invalid},
		{"a foreign governance decision", func(e *Evidence) { e.Governance[0] = other.Governance[0] }, kms.Invalid},
		{"a foreign execution", func(e *Evidence) { e.Decision.Execution = other.Decision.Execution }, kms.Invalid},
		{"foreign receipts", func(e *Evidence) { e.Receipts = other.Receipts }, kms.Invalid},
		{"a foreign keyring", func(e *Evidence) { e.Keyring = other.Keyring }, kms.Invalid},
		{"a foreign key", func(e *Evidence) { e.Key = other.Key }, kms.Invalid},
		{"receipts for what asks for none", func(e *Evidence) {
			*e = mustBuild(t, w, carriedGovernance(t, w))
			e.Receipts = other.Receipts
		}, kms.Invalid},
	}
}

// carriedGovernance returns the first executed proposal about a custodian.
func carriedGovernance(t *testing.T, w *statetest.World) string {
	t.Helper()
	for _, p := range w.State().Proposals() {
		if p.Content.Action == kms.ActionCustodian && p.Progress == state.Executed {
			return p.ID
		}
	}
	t.Fatal("no such proposal")
	return ""
}

// TestEveryByteOfTheFileCounts flips bits throughout the file.
func TestEveryByteOfTheFileCounts(t *testing.T) {
	t.Parallel()
	w, _, e := rotated(t)
	everyByte(t, e, w.State().Cluster())
	w = vault(t)
	w.Rekey(de1)
	everyByte(t, mustBuild(t, w, rotate(w, sealTarget)), w.State().Cluster())
}

func everyByte(t *testing.T, e Evidence, cluster string) {
	t.Helper()
	file := e.Marshal()
	step := max(1, len(file)/210) | 1
	flipped, verified := 0, 0
	for i := 0; i < len(file); i += step {
		bad := bytes.Clone(file)
		bad[i] ^= 1 << (flipped % 7)
		flipped++
		parsed, err := ParseEvidence(bad)
		if err != nil {
			continue
		}
		verified++
		if _, err := VerifyEvidence(parsed, cluster); err == nil {
			t.Fatalf("byte %d of %d (%q for %q) makes no difference", i, len(file), bad[i], file[i])
		}
	}
	if flipped < 200 || verified < 50 {
		t.Errorf("%d bytes changed, of which %d reached verification", flipped, verified)
	}
}
