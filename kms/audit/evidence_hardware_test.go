package audit

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

const (
	sealTarget = "key/vault/seal"
	codeTarget = "key/vault/code"
	de1, fr1   = "node-de-1", "node-fr-1"
)

// vault founds a cluster with a keyring of protection hardware at de and fr.
func vault(t testing.TB) *statetest.World {
	t.Helper()
	w := statetest.New(t, statetest.Options{})
	w.CreateHardwareKeyring("vault", "de", "fr")
	w.CreateKey("vault", "seal", kms.Sign)
	w.CreateKey("vault", "code", kms.MAC)
	return w
}

func rotate(w *statetest.World, target string) string {
	id := w.Propose(kms.ActionRotate, target, nil)
	w.ApproveAll(id)
	w.Commit(id)
	w.GiveReceipts()
	return id
}

// says reports whether a check or note of the report contains the words.
func says(r Report, words string) bool {
	return slices.ContainsFunc(append(r.Checks, r.Notes...), func(s string) bool { return strings.Contains(s, words) })
}

func TestEvidenceOfAHardwareRotation(t *testing.T) {
	w := vault(t)
	for target, how := range map[string]string{sealTarget: "signing with the new version itself", codeTarget: "showing its key check value"} {
		id := rotate(w, target)
		e := mustBuild(t, w, id)
		parsed, err := ParseEvidence(e.Marshal())
		if err != nil {
			t.Fatal(err)
		}
		r := verifies(t, w, parsed, 0)
		for _, words := range []string{
			"Keyring vault has protection hardware", how, "committed version 2, generated in the device of node node-de-1 and wrapped there for the devices of node-de-1, node-fr-1",
			"the word of node node-de-1",
		} {
			if !says(r, words) {
				t.Errorf("%s: the report does not say %q: %q %q", target, words, r.Checks, r.Notes)
			}
		}
		if r.Generated != kms.InDevice || len(r.Receipts) != 2 || len(e.KeyID) != 0 {
			t.Errorf("%+v", r)
		}
	}
	id := w.Propose(kms.ActionRotate, codeTarget, nil)
	w.ApproveAll(id)
	commit := w.CommitCommand(id)
	commit.Generated = kms.OnHost
	k, _ := w.State().Key("vault", "code")
	w.Do(fr1, commit, statetest.Expect(k.Revision))
	w.GiveReceipts()
	if r := verifies(t, w, mustBuild(t, w, id), 0); !says(r, "generated in locked memory of node node-fr-1") || r.Generated != kms.OnHost {
		t.Errorf("%+v", r)
	}
}

// TestEvidenceAfterErasure: when the command that made the key is gone, the
// signatures of a sign key's receipts confirm its identifier.
func TestEvidenceAfterErasure(t *testing.T) {
	w := vault(t)
	ids := map[string]string{sealTarget: rotate(w, sealTarget), codeTarget: rotate(w, codeTarget)}
	for target, id := range ids {
		destroy := w.Propose(kms.ActionDestroy, target, approval.VersionParams{Version: 1})
		w.ApproveAll(destroy)
		w.Advance(7 * 24 * time.Hour)
		w.Execute(destroy)
		e := mustBuild(t, w, id)
		verifies(t, w, e, 0)
		if len(e.Key) != 0 || (len(e.KeyID) == 16) != (target == sealTarget) {
			t.Errorf("%s: identifier of %d bytes", target, len(e.KeyID))
		}
		bad := e
		switch target {
		case sealTarget:
			bad.KeyID = slices.Clone(e.KeyID)
			bad.KeyID[3] ^= 1
			verifies(t, w, bad, kms.BadSignature)
			bad.KeyID = nil
		case codeTarget:
			bad.KeyID = make([]byte, 16)
		}
		verifies(t, w, bad, kms.Invalid)
	}
}

// TestEvidenceAcrossRekeys: commands verify under the hardware root of their time.
func TestEvidenceAcrossRekeys(t *testing.T) {
	w := vault(t)
	before := rotate(w, sealTarget)
	w.Rekey(de1)
	after := rotate(w, sealTarget)
	// A root approved before the commit and adopted before the receipts.
	w.Replace(fr1, false)
	id := w.Propose(kms.ActionRotate, sealTarget, nil)
	w.ApproveAll(id)
	w.Commit(id)
	w.Reseal(fr1)
	w.Do(fr1, w.AdoptCommand(fr1))
	w.GiveReceipts()
	between := id
	// And one approved after the commit.
	id = w.Propose(kms.ActionRotate, codeTarget, nil)
	w.ApproveAll(id)
	w.Commit(id)
	w.Carry(kms.ActionCustodian, "custodian/fr-3", approval.CustodianParams{Custodian: statetest.Record("fr-3", "fr", 0, w.AddCustodianKey("fr-3"))})
	w.Rekey(fr1)
	w.GiveReceipts()
	for _, c := range []struct {
		what        string
		id          string
		gov, adopts int
		later       int
	}{{"before", before, 0, 0, 0}, {"after", after, 1, 1, 0}, {"between", between, 2, 2, 0}, {"later", id, 2, 2, 2}} {
		e := mustBuild(t, w, c.id)
		parsed, err := ParseEvidence(e.Marshal())
		if err != nil {
			t.Fatal(err)
		}
		verifies(t, w, parsed, 0)
		n := 0
		for _, d := range e.Governance {
			if len(d.Adoption) > 0 {
				n++
			}
		}
		if len(e.Governance) != c.gov || n != c.adopts || len(e.Later) != c.later {
			t.Errorf("%s: %d decisions before, %d adoptions, %d decisions after", c.what, len(e.Governance), n, len(e.Later))
		}
	}
}

func TestEvidenceOfANodeDecision(t *testing.T) {
	w := vault(t)
	w.Replace(fr1, false)
	id := w.Propose(kms.ActionNode, approval.NodeTarget(fr1), w.NodeParams(fr1, w.NewRoot(fr1), false))
	w.ApproveAll(id)
	w.Execute(id)
	e := mustBuild(t, w, id)
	if r := verifies(t, w, e, 0); !says(r, "That node node-fr-1 has adopted") || len(e.Governance) != 1 {
		t.Errorf("%q %q", r.Checks, r.Notes)
	}
	w.Reseal(fr1)
	w.Do(fr1, w.AdoptCommand(fr1))
	e = mustBuild(t, w, id)
	if r := verifies(t, w, e, 0); !says(r, "adopted that hardware root as its number 3") {
		t.Errorf("%q %q", r.Checks, r.Notes)
	}
	bad := clone(t, e)
	bad.Decision.Adoption[len(bad.Decision.Adoption)-3] ^= 1
	if _, err := VerifyEvidence(bad, w.State().Cluster()); err == nil {
		t.Error("a changed adoption is accepted")
	}
	bad = clone(t, e)
	bad.Decision.Votes = slices.DeleteFunc(bad.Decision.Votes, func(s approval.Statement) bool { return strings.HasPrefix(s.Custodian, "fr-") })
	verifies(t, w, bad, kms.NeedsApproval) // the node's own site must agree
	bad = clone(t, e)
	bad.Governance = nil
	verifies(t, w, bad, kms.Conflict)
	// The adoption of another node, and one of a decision on a key.
	w.Rekey(de1)
	other := w.State().FormerRoots(de1)[0].Statement
	bad = clone(t, e)
	bad.Decision.Adoption = other
	verifies(t, w, bad, kms.BadSignature)
	bad = mustBuild(t, w, rotate(w, codeTarget))
	bad.Decision.Adoption = other
	verifies(t, w, bad, kms.Invalid)
}

// TestAlteredHardwareEvidence is TestAlteredEvidenceIsRefused for what protection
// hardware and rekeys add.
func TestAlteredHardwareEvidence(t *testing.T) {
	w := vault(t)
	old := w.Node(de1)
	w.Rekey(de1)
	good := mustBuild(t, w, rotate(w, sealTarget))
	code := mustBuild(t, w, rotate(w, codeTarget))
	cluster := w.State().Cluster()
	type rotation = state.CommitRotation
	commit := func(f func(*rotation)) func(*Evidence) {
		return func(e *Evidence) {
			e.Decision.Execution = resign(t, w, e.Decision.Execution, func(_ *state.Envelope, c *rotation) { f(c) })
		}
	}
	byOld := func(raw []byte) []byte {
		envelope, _, err := state.Split(raw)
		if err != nil {
			t.Fatal(err)
		}
		return old.SignCommand(t, envelope)
	}
	for _, c := range []struct {
		name   string
		from   Evidence
		change func(e *Evidence)
		kind   kms.Kind
	}{
		{"where it was generated", good, func(e *Evidence) {
			e.Decision.Execution = tamper(t, e.Decision.Execution, func(_ *state.Envelope, c *rotation) { c.Generated = kms.OnHost })
		}, kms.BadSignature},
		{"a copy", good, func(e *Evidence) {
			e.Decision.Execution = tamper(t, e.Decision.Execution, func(_ *state.Envelope, c *rotation) { c.Copies[0].Sealed[0] ^= 1 })
		}, kms.BadSignature},
		{"a copy dropped, signed", good, commit(func(c *rotation) { c.Copies = c.Copies[:1] }), kms.Invalid},
		{"a copy for a root that never was, signed", good, commit(func(c *rotation) { c.Copies[1].Root = 7 }), kms.Invalid},
		{"a copy for another root of its own, signed", good, commit(func(c *rotation) { c.Copies[0].Root = 1 }), kms.Invalid},
		{"checks for a sign key, signed", good, commit(func(c *rotation) { c.Checks = w.KeyringCommand("x", "de", "fr").Checks }), kms.Invalid},
		{"no checks for another key, signed", code, commit(func(c *rotation) { c.Checks = nil }), kms.Invalid},
		{"a check of version 1 dropped, signed", code, func(e *Evidence) {
			e.Key = resign(t, w, e.Key, func(_ *state.Envelope, c *state.CreateKey) { c.Checks = c.Checks[:1] })
		}, kms.Invalid},
		{"no checks of version 1, signed", code, func(e *Evidence) {
			e.Key = resign(t, w, e.Key, func(_ *state.Envelope, c *state.CreateKey) { c.Checks = nil })
		}, kms.Invalid},
		{"software's form, signed", good, commit(func(c *rotation) {
			c.KEK, c.Wrapped, c.Copies, c.Generated, c.Checks = 1, []byte{1}, nil, "", w.KeyringCommand("x", "de", "fr").Checks
		}), kms.Invalid},
		{"another public key, signed", good, commit(func(c *rotation) { c.PublicKey = w.Node(fr1).Record.Signing }), kms.BadSignature},
		{"no public key, signed", good, commit(func(c *rotation) {
			c.PublicKey, c.Checks = nil, w.KeyringCommand("x", "de", "fr").Checks
		}), kms.Invalid},
		{"a receipt's signature by another version, signed", good, func(e *Evidence) {
			e.Receipts[0] = resign(t, w, e.Receipts[0], func(_ *state.Envelope, c *state.GiveReceipt) {
				c.KCV = w.ReceiptCommand(de1, "vault", "seal", 3).KCV
			})
		}, kms.BadSignature},
		{"a receipt's signature for another node, signed", good, func(e *Evidence) {
			e.Receipts[0] = resign(t, w, e.Receipts[0], func(_ *state.Envelope, c *state.GiveReceipt) {
				c.KCV = w.ReceiptCommand(fr1, "vault", "seal", 2).KCV
			})
		}, kms.BadSignature},
		{"a receipt with a check value in place of a signature, signed", good, func(e *Evidence) {
			e.Receipts[0] = resign(t, w, e.Receipts[0], func(_ *state.Envelope, c *state.GiveReceipt) { c.KCV = make([]byte, 32) })
		}, kms.BadSignature},
		{"a receipt dropped", good, func(e *Evidence) { e.Receipts = e.Receipts[1:] }, kms.Conflict},
		{"an execution with the old root", good, func(e *Evidence) { e.Decision.Execution = byOld(e.Decision.Execution) }, kms.Conflict},
		{"a receipt with the old root", good, func(e *Evidence) { e.Receipts[0] = byOld(e.Receipts[0]) }, kms.Conflict},
		{"the node's decision dropped", good, func(e *Evidence) { e.Governance = nil }, kms.BadSignature},
		{"the adoption dropped", good, func(e *Evidence) { e.Governance[0].Adoption = nil }, kms.BadSignature},
		{"the adoption with the old root", good, func(e *Evidence) { e.Governance[0].Adoption = byOld(e.Governance[0].Adoption) }, kms.BadSignature},
		{"another command for the adoption", good, func(e *Evidence) { e.Governance[0].Adoption = e.Governance[0].Execution }, kms.BadSignature},
		{"a later decision that nothing needs", good, func(e *Evidence) { e.Later = []Decision{e.Governance[0]} }, 0},
		{"an identifier beside the key", good, func(e *Evidence) { e.KeyID = make([]byte, 16) }, kms.Invalid},
		{"a keyring with another protection, signed", good, func(e *Evidence) {
			e.Keyring = resign(t, w, e.Keyring, func(_ *state.Envelope, c *state.CreateKeyring) {
				soft := w.KeyringCommand("vault", "de", "fr")
				c.Protection, c.Copies, c.Checks = kms.Software, soft.Copies, soft.Checks
			})
		}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := clone(t, c.from)
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

// TestEvidenceOfAttestedRoots: the document of a new root holds under the root that
// its witness had then.
func TestEvidenceOfAttestedRoots(t *testing.T) {
	w := statetest.New(t, statetest.Options{Attested: map[string]string{}})
	n := w.NewRoot(fr1)
	w.Attest(n, de1)
	ids := []string{w.Carry(kms.ActionNode, approval.NodeTarget(fr1), w.NodeParams(fr1, n, false))}
	next := w.NewRoot(de1)
	w.Attest(next, "node-jp-1")
	ids = append(ids, w.Carry(kms.ActionNode, approval.NodeTarget(de1), w.NodeParams(de1, next, false)))
	w.Do(de1, w.AdoptCommand(de1))
	w.Do(fr1, w.AdoptCommand(fr1))
	n = w.NewRoot(fr1)
	w.Attest(n, de1)
	ids = append(ids, w.Carry(kms.ActionNode, approval.NodeTarget(fr1), w.NodeParams(fr1, n, false)))
	w.Do(fr1, w.AdoptCommand(fr1))
	for _, id := range ids {
		verifies(t, w, mustBuild(t, w, id), 0)
	}
}
