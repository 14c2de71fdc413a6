package approval

import (
	"bytes"
	"errors"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/pqc"
)

func TestCard(t *testing.T) {
	key, err := pqc.GenerateHybrid(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer key.Destroy()
	c := Card{Format: 1, Cluster: "00112233445566778899aabbccddeeff", Custodian: "fr-1", Suite: uint16(pqc.MLDSA65Ed25519), PublicKey: key.PublicKey()}
	if c.Signature, err = key.Sign(CredentialCard(c.Cluster, c.Custodian, c.Credential()), []byte(CredentialContext)); err != nil {
		t.Fatal(err)
	}
	got, err := ParseCard(c.Marshal())
	if err != nil || !bytes.Equal(got.Marshal(), c.Marshal()) {
		t.Fatal(err)
	}
	for name, x := range map[string]struct {
		kind   kms.Kind
		change func(*Card)
	}{
		"custodian": {kms.BadSignature, func(c *Card) { c.Custodian = "fr-2" }},
		"cluster":   {kms.BadSignature, func(c *Card) { c.Cluster = "ffffffffffffffffffffffffffffffff" }},
		"format":    {kms.Invalid, func(c *Card) { c.Format = 2 }},
		"suite":     {kms.Invalid, func(c *Card) { c.Suite = uint16(pqc.Ed25519) }},
		"signature": {kms.BadSignature, func(c *Card) { c.Signature = c.Signature[1:] }},
	} {
		bad := c
		x.change(&bad)
		if _, err := ParseCard(bad.Marshal()); !errors.Is(err, x.kind) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ParseCard(make([]byte, maxCard+1)); !errors.Is(err, kms.TooLarge) {
		t.Errorf("too long: %v", err)
	}
}

// TestRestorable: a site that requires itself cannot be left to the one who suspends.
func TestRestorable(t *testing.T) {
	custodian := func(id, site string, suspended bool) Custodian {
		return Custodian{ID: id, Site: site, Credentials: []Credential{{ID: id, Suspended: suspended}}}
	}
	governance := func(r Rule) []Policy {
		r.Action = kms.ActionCustodian
		return []Policy{{Name: kms.Governance, Rules: []Rule{r}}}
	}
	all := []Custodian{custodian("de-1", "de", false), custodian("fr-1", "fr", false), custodian("fr-2", "fr", true), custodian("jp-1", "jp", false)}
	for _, x := range []struct {
		rule    Rule
		without string
		ok      bool
	}{
		{Rule{Approvals: 2, Sites: 2}, "fr-1", true},
		{Rule{Approvals: 2, Sites: 2}, "", true},
		{Rule{Approvals: 3, Sites: 3}, "fr-1", false},
		{Rule{Approvals: 3, Sites: 3}, "", true},
		{Rule{Approvals: 1, Sites: 1, Required: []string{"fr"}}, "fr-1", false},
		{Rule{Approvals: 4, Sites: 3}, "", false},
	} {
		if err := Restorable(governance(x.rule), all, x.without); (err == nil) != x.ok || err != nil && !errors.Is(err, kms.Conflict) {
			t.Errorf("%+v without %q: %v", x.rule, x.without, err)
		}
	}
	if all[0].Revoked || all[1].Revoked {
		t.Error("the records were changed")
	}
	if err := Restorable(governance(Rule{Approvals: 9, Sites: 9}), all[:2], "fr-1"); err != nil {
		t.Errorf("where nothing is suspended: %v", err)
	}
}
