package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state/statetest"
	"github.com/conclave-kms/conclave/kms/wire"
)

// policyTest runs conclave policy test on a genesis document with the policies.
func policyTest(t *testing.T, policies []approval.Policy, args ...string) (string, error) {
	t.Helper()
	w := statetest.New(t, statetest.Options{Policies: policies})
	genesis := filepath.Join(t.TempDir(), "genesis.cbor")
	if err := os.WriteFile(genesis, w.State().SignedGenesis().Marshal(), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	root := rootCommand()
	root.SetOut(&out)
	root.SetErr(&out)
	root.SetArgs(append([]string{"policy", "test", "--genesis", genesis}, args...))
	err := root.Execute()
	return out.String(), err
}

func TestPolicyTest(t *testing.T) {
	good := statetest.Policies(2)
	// Each custodian of the test world has one credential, but none is the only one of its site.
	out, err := policyTest(t, good)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"POLICY", "a single operator or service", "de-1 fr-1, or others", "every rule of standard", "any custodian"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	bad := statetest.Policies(2)
	bad[1].Rules[5].Sites = 1 // to rotate: two of any site
	out, err = policyTest(t, bad, "standard")
	if exitCode(err) != 5 || !strings.Contains(out, "problem: standard: rotate could be decided by fr alone") || strings.Contains(out, "governance") {
		t.Errorf("%v\n%s", err, out)
	}
	if out, err = policyTest(t, bad, "--alone", "rotate"); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	// A proposal by a custodian takes another of its site.
	out, err = policyTest(t, bad, "standard", "--proposer", "spiffe://fr.example/custodian/fr-1")
	if exitCode(err) != 5 || strings.Contains(out, "rotate could be decided by fr alone") || !strings.Contains(out, "rotate could be decided by de alone") {
		t.Errorf("%v\n%s", err, out)
	}
	if _, err = policyTest(t, good, "other"); !errors.Is(err, kms.NotFound) {
		t.Errorf("%v", err)
	}
	if _, err = policyTest(t, good, "--rules", "x"); exitCode(err) != 2 {
		t.Errorf("%v", err)
	}
}

func TestPolicyTestOfAFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "rules.json")
	p := wire.Policy{Name: "standard"}
	for _, r := range statetest.Policies(2)[1].Rules {
		p.Rules = append(p.Rules, wire.Rule{Action: string(r.Action), Direct: r.Direct, Approvals: r.Approvals, Sites: r.Sites, DelayMS: r.Delay, LifetimeMS: r.Lifetime})
	}
	at := slices.IndexFunc(p.Rules, func(r wire.Rule) bool { return r.Action == "rotate" })
	p.Rules[at].Need = &wire.Group{Need: 2, Custodians: []wire.Weight{{Name: "fr-1", Weight: 2}, {Name: "de-1"}, {Name: "jp-2"}}}
	write := func() {
		b, err := json.Marshal(p)
		if err == nil {
			err = os.WriteFile(file, b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	write()
	out, err := policyTest(t, nil, "standard", "--rules", file, "-o", "json")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var s simulation
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		t.Fatal(err)
	}
	at = slices.IndexFunc(s.Cases, func(c simulated) bool { return c.Action == "rotate" })
	if r := s.Cases[at]; r.Rule.Need == nil || r.Rule.Need.Custodians[0] != (approval.Weight{Name: "de-1", Weight: 1}) ||
		!slices.Contains(strings.Fields(strings.Join(r.Simulation.Quorums[0], " ")), "fr-1") && !slices.Contains(r.Simulation.Quorums[0], "jp-2") {
		t.Errorf("%+v", r)
	}
	p.Rules[at].Need.Need = 5
	write()
	if _, err := policyTest(t, nil, "standard", "--rules", file); err == nil || !strings.Contains(err.Error(), "needs 5, but the weights of its members add up to 4") {
		t.Errorf("%v", err)
	}
}

func TestNotBefore(t *testing.T) {
	p := proposing{reason: "a release", notBefore: "2027-01-31T06:00:00Z"}
	if err := p.check(); err != nil {
		t.Fatal(err)
	}
	if got := p.request(kms.ActionRotate, "key/a/b", wire.ProposalParameters{}).NotBefore.UTC().String(); got != "2027-01-31 06:00:00 +0000 UTC" {
		t.Error(got)
	}
	p.notBefore = "tomorrow"
	if err := p.check(); exitCode(err) != 2 {
		t.Error(err)
	}
}
