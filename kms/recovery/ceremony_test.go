package recovery

import (
	"crypto/sha256"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
)

const cluster = "00112233445566778899aabbccddeeff"

// nations are custodians of two sites: 3 of fr, 2 of de.
type nations struct {
	keys    map[string]*pqc.HybridKey
	params  approval.RecoveryParams
	records map[string]approval.Custodian
}

func newNations(t *testing.T) *nations {
	n := &nations{keys: map[string]*pqc.HybridKey{}, records: map[string]approval.Custodian{}}
	var cards []approval.RecoveryHolder
	for _, id := range []string{"fr-1", "fr-2", "fr-3", "de-1", "de-2"} {
		key, err := pqc.GenerateHybrid(nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(key.Destroy)
		site, _, _ := strings.Cut(id, "-")
		n.keys[id] = key
		n.records[id] = approval.Custodian{ID: id, Site: site, Credentials: []approval.Credential{
			{ID: pqc.Fingerprint(key.PublicKey()), Suite: uint16(pqc.MLDSA65Ed25519), PublicKey: key.PublicKey()},
		}}
		card, err := NewCard(cluster, id, site, key)
		if err != nil {
			t.Fatal(err)
		}
		if err := card.VerifyCard(cluster, n.records[id]); err != nil {
			t.Fatal(err)
		}
		if err := card.VerifyCard(strings.Repeat("0", 32), n.records[id]); kms.KindOf(err) != kms.BadSignature {
			t.Errorf("a card for another cluster: %v", err)
		}
		cards = append(cards, card)
	}
	var err error
	if n.params, err = Deal([]string{"fr"}, pqc.MLKEM1024P384, 3, 2, cards); err != nil {
		t.Fatal(err)
	}
	if again, err := approval.ParseRecoveryParams(n.params.Marshal()); err != nil || again.Threshold != 3 {
		t.Fatal(err)
	}
	return n
}

// begin returns a ceremony for a new root of node fr-a, and that root's key.
func (n *nations) begin(t *testing.T) (*Coordinator, *pqc.SoftwareKey) {
	root, err := pqc.GenerateKey(pqc.MLKEM768P256)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(root.Destroy)
	c, err := Begin(Occasion{
		Cluster: cluster, Name: "paris", Number: 1, Params: n.params, Reason: "fire", Created: time.UnixMilli(1767225600000), Lifetime: time.Hour,
		Roots: []Root{{2, keyring.Recipient{Node: "fr-a", Suite: uint16(pqc.MLKEM768P256), PublicKey: root.PublicKey().Bytes()}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Destroy)
	return c, root
}

func (n *nations) contribute(t *testing.T, c *Coordinator, ids ...string) {
	t.Helper()
	for _, id := range ids {
		x, err := Contribute(c.Document(), n.params, id, n.keys[id], time.UnixMilli(1767225600001))
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Add(x, n.records[id]); err != nil {
			t.Fatal(err)
		}
	}
}

// lostKEK is a KEK sealed to the recovery key, after a copy that a hostile node made up.
func (n *nations) lostKEK(t *testing.T) (*secret.Bytes, Lost) {
	kek, garbage := locked(t, []byte(strings.Repeat("k", 32))), locked(t, []byte(strings.Repeat("g", 32)))
	b := keyring.KEKBinding{Cluster: cluster, Keyring: "paris", Version: 1, Protection: kms.Software}
	to := keyring.Recipient{Node: approval.RecoveryRecipient("paris"), Suite: n.params.Suite, PublicKey: n.params.PublicKey}
	sum := sha256.Sum256(keyring.CheckValue(kek, cluster, "paris", kms.KeyID{}, 1, "fr-a"))
	l := Lost{Keyring: "paris", Version: 1, Checks: map[string][]byte{"fr-a": sum[:]}}
	for _, k := range []*secret.Bytes{garbage, kek} {
		s, err := keyring.SealKEK([]keyring.Recipient{to}, b, k)
		if err != nil {
			t.Fatal(err)
		}
		l.Copies = append(l.Copies, s[0].Sealed)
	}
	return kek, l
}

// TestCeremony: 3 of 5 shares from 2 nations bring a lost KEK back to a new root; 2
// shares, and 3 or even all of one nation, give no key: the shares themselves do not
// reach it, nothing is refused by counting.
func TestCeremony(t *testing.T) {
	n := newNations(t)
	kek, lost := n.lostKEK(t)
	for _, few := range [][]string{{"fr-1", "de-1"}, {"fr-1", "fr-2", "fr-3"}, {"de-1", "de-2"}, {"fr-1"}} {
		c, _ := n.begin(t)
		n.contribute(t, c, few...)
		if c.Missing() == "" {
			t.Errorf("%v are enough", few)
		}
		if _, err := c.Restore([]Lost{lost}); kms.KindOf(err) != kms.OpenFailed || !strings.Contains(err.Error(), "do not give the recovery key") {
			t.Errorf("%v: %v", few, err)
		}
	}
	for _, enough := range [][]string{{"fr-1", "fr-3", "de-2"}, {"de-1", "de-2", "fr-2"}, {"fr-1", "fr-2", "fr-3", "de-1", "de-2"}} {
		c, root := n.begin(t)
		n.contribute(t, c, enough...)
		if m := c.Missing(); m != "" {
			t.Errorf("%v: missing %s", enough, m)
		}
		out, err := c.Restore([]Lost{lost})
		if err != nil || len(out) != 1 {
			t.Fatalf("%v: %v", enough, err)
		}
		got, err := keyring.OpenRecoveryKEK(root.PrivateKey, keyring.KEKBinding{Cluster: cluster, Keyring: "paris", Version: 1, Node: "fr-a", Protection: kms.Software}, out[0].Sealed)
		if err != nil || !got.Equal(kek) {
			t.Fatalf("%v: the new root does not open the KEK: %v", enough, err)
		}
		tr, err := c.Transcript(out)
		if err != nil {
			t.Fatal(err)
		}
		n.checkTranscript(t, c, tr)
		c.Destroy()
		c.Destroy()
	}
}

// checkTranscript verifies a transcript, and variants of it that must be refused: some are
// signed well by the ceremony's key, as a hostile coordinator could.
func (n *nations) checkTranscript(t *testing.T, c *Coordinator, tr Transcript) {
	t.Helper()
	records := Records{
		Cluster: cluster,
		Key: func(name string, number uint64) (approval.RecoveryParams, bool) {
			return n.params, name == "paris" && number == 1
		},
		Custodian: func(id string) (approval.Custodian, bool) { r, ok := n.records[id]; return r, ok },
	}
	if doc, err := tr.Verify(records); err != nil || doc.Reason != "fire" {
		t.Fatal(err)
	}
	site := func(s string) func(approval.Contribution) bool {
		return func(x approval.Contribution) bool { return strings.HasPrefix(x.Custodian, s) }
	}
	for name, x := range map[string]struct {
		kind   kms.Kind
		sign   bool
		change func(*Transcript, *Records)
	}{
		"another result": {kms.BadSignature, true, func(x *Transcript, _ *Records) { x.Restored[0].Version++ }},
		"a result less":  {kms.BadSignature, false, func(x *Transcript, _ *Records) { x.Restored = nil }},
		"another ceremony": {kms.BadSignature, true, func(x *Transcript, _ *Records) {
			d, _ := approval.ParseCeremony(x.Ceremony)
			d.Reason = "theft"
			x.Ceremony = d.Marshal()
		}},
		"two contributions":   {kms.NeedsApproval, true, func(x *Transcript, _ *Records) { x.Contributions = x.Contributions[:2] }},
		"contributions of fr": {kms.NeedsApproval, true, func(x *Transcript, _ *Records) { x.Contributions = slices.DeleteFunc(x.Contributions, site("de")) }},
		"one contribution thrice": {kms.Denied, true, func(x *Transcript, _ *Records) {
			y := x.Contributions[0]
			x.Contributions = []approval.Contribution{y, y, y}
		}},
		"another cluster": {kms.Conflict, false, func(_ *Transcript, r *Records) { r.Cluster = strings.Repeat("0", 32) }},
		"an unknown recovery key": {kms.NotFound, false, func(_ *Transcript, r *Records) {
			r.Key = func(string, uint64) (approval.RecoveryParams, bool) { return approval.RecoveryParams{}, false }
		}},
		"unknown custodians": {kms.Denied, false, func(_ *Transcript, r *Records) {
			r.Custodian = func(string) (approval.Custodian, bool) { return approval.Custodian{}, false }
		}},
	} {
		bad, r := tr, records
		bad.Restored, bad.Contributions = slices.Clone(tr.Restored), slices.Clone(tr.Contributions)
		x.change(&bad, &r)
		if x.sign {
			var err error
			if bad.Signature, err = c.signer.Sign(bad.message(), []byte(TranscriptContext)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := bad.Verify(r); kms.KindOf(err) != x.kind {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestContributionRefused(t *testing.T) {
	n := newNations(t)
	c, _ := n.begin(t)
	other, _ := n.begin(t)
	now := time.UnixMilli(1767225600001)
	x, err := Contribute(c.Document(), n.params, "fr-1", n.keys["fr-1"], now)
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Add(x, n.records["fr-1"]); kms.KindOf(err) != kms.Invalid {
		t.Errorf("to another ceremony: %v", err)
	}
	moved := x
	moved.Ceremony = other.document.ID()
	if err := other.Add(moved, n.records["fr-1"]); kms.KindOf(err) != kms.BadSignature {
		t.Errorf("moved to another ceremony: %v", err)
	}
	changed := x
	changed.Sealed = slices.Clone(x.Sealed)
	changed.Sealed[len(changed.Sealed)-1] ^= 1
	if err := c.Add(changed, n.records["fr-1"]); kms.KindOf(err) != kms.BadSignature {
		t.Errorf("changed: %v", err)
	}
	if _, err := Contribute(c.Document(), n.params, "fr-1", n.keys["fr-2"], now); kms.KindOf(err) != kms.OpenFailed {
		t.Errorf("with another's key: %v", err)
	}
	if _, err := Contribute(c.Document(), n.params, "fr-1", n.keys["fr-1"], now.Add(2*time.Hour)); kms.KindOf(err) != kms.Expired {
		t.Errorf("late: %v", err)
	}
	if _, err := Contribute(c.Document(), n.params, "jp-1", n.keys["fr-1"], now); kms.KindOf(err) != kms.NotFound {
		t.Errorf("no share: %v", err)
	}
	if err := c.Add(x, n.records["fr-1"]); err != nil {
		t.Fatal(err)
	}
	if err := c.Add(x, n.records["fr-1"]); kms.KindOf(err) != kms.Exists {
		t.Errorf("twice: %v", err)
	}
	// A share that is not the one dealt, well sealed and signed: the commitment tells.
	i, _ := n.params.Holder("fr-2")
	p := n.params
	p.Holders = slices.Clone(p.Holders)
	p.Holders[i].Commitment = make([]byte, 32)
	c.occasion.Params = p
	y, err := Contribute(c.Document(), n.params, "fr-2", n.keys["fr-2"], now)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Add(y, n.records["fr-2"]); kms.KindOf(err) != kms.OpenFailed {
		t.Errorf("another share: %v", err)
	}
	if _, err := OpenShare(p, "fr-2", n.keys["fr-2"]); kms.KindOf(err) != kms.OpenFailed {
		t.Errorf("another share for its holder: %v", err)
	}
}
