package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"

	"github.com/conclave-kms/conclave/kms/approval"
)

// TestGroupInThePlan reads a rule with a group as people write it.
func TestGroupInThePlan(t *testing.T) {
	const text = `
name = "keys"
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
	rules := p.build().Rules
	if len(rules) != 2 {
		t.Fatalf("%+v", rules)
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
