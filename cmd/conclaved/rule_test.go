package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/pqc"
)

// TestGroupInThePlan reads a rule with a group as people write it.
func TestGroupInThePlan(t *testing.T) {
	const text = `
name = "keys"
forbid = ["Ed25519", "MLKEM768-P256"]
  [[rule]]
  actions = ["rotate", "resume"]
  approvals = 2
  sites = 2
  lifetime = "72h"
  not_before = 2027-01-31T06:00:00Z
    [rule.need]
    need = 2
    custodians = [{ name = "jp-1", weight = 2 }, { name = "fr-1" }]
    sites = [{ name = "de", approvals = 2 }]
    groups = [{ need = 1, custodians = [{ name = "fr-2" }, { name = "fr-3" }] }]
`
	var p policyPlan
	if err := toml.NewDecoder(strings.NewReader(text)).DisallowUnknownFields().Decode(&p); err != nil {
		t.Fatal(err)
	}
	policy, err := p.build()
	rules := policy.Rules
	if err != nil || len(rules) != 2 || !slices.Equal(policy.Forbid, []uint16{uint16(pqc.MLKEM768P256), uint16(pqc.Ed25519)}) {
		t.Fatalf("%+v %v", policy, err)
	}
	p.Forbid = []string{"ROT13"}
	if _, err := p.build(); kms.KindOf(err) != kms.Invalid {
		t.Errorf("a suite that there is not: %v", err)
	}
	for _, r := range rules {
		if err := r.Validate(); err != nil {
			t.Error(err)
		}
		if g := r.Need; r.NotBefore != 1801375200000 || g == nil || g.Need != 2 || !slices.Equal(g.Custodians, []approval.Weight{{Name: "fr-1", Weight: 1}, {Name: "jp-1", Weight: 2}}) ||
			g.Sites[0] != (approval.SiteWeight{Name: "de", Weight: 1, Approvals: 2}) || g.Groups[0].Weight != 1 || len(g.Groups[0].Custodians) != 2 {
			t.Errorf("%+v", g)
		}
	}
	if err := toml.NewDecoder(strings.NewReader(strings.Replace(text, "approvals = 2 }", "approval = 2 }", 1))).DisallowUnknownFields().Decode(&p); err == nil {
		t.Error("a misspelt field is taken")
	}
}
