package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/kms/state/statetest"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

// keyFile writes a custodian's key as conclave custodian keygen does, with a work factor
// for tests, and returns the flags that name it.
func keyFile(t *testing.T, k *pqc.HybridKey) []string {
	t.Helper()
	pass, err := secret.Copy([]byte("of no use outside this test"))
	if err != nil {
		t.Fatal(err)
	}
	defer pass.Destroy()
	b, err := pqc.EncryptKeyFile(k, pass, pqc.KeyFileOptions{WorkFactor: pqc.MinWorkFactor})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write(t, filepath.Join(dir, "key"), b)
	write(t, filepath.Join(dir, "pass"), pass.Reveal())
	return []string{"--custodian-key", filepath.Join(dir, "key"), "--pass-file", filepath.Join(dir, "pass")}
}

func write(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestSignOffline signs exported proposals with nothing but the file and the key, and
// the cluster takes the verdicts.
func TestSignOffline(t *testing.T) {
	noEnvironment(t)
	w := statetest.New(t, statetest.Options{})
	w.CreateKeyring("coalition", "de", "fr", "jp")
	w.CreateKey("coalition", "orders", kms.Encrypt)
	id := w.Propose(kms.ActionRotate, "key/coalition/orders", nil)
	p, _ := w.State().Proposal(id)
	file := filepath.Join(t.TempDir(), "proposal.cbor")
	exported := approval.Carry(w.State().Cluster(), p.Bytes, w.State().Custodians()).Marshal()
	write(t, file, exported)
	sign := func(stdin string, more ...string) (string, string, error) {
		return cli(t, stdin, append([]string{"sign", "--offline", file}, more...)...)
	}

	fr1, de1 := keyFile(t, w.Custodian("fr-1")), keyFile(t, w.Custodian("de-1"))
	stranger, err := pqc.GenerateHybrid(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Destroy()
	for name, x := range map[string]struct {
		stdin string
		args  []string
		code  int
		says  string
	}{
		"no verdict":         {"", fr1, 2, "--approve or --reject"},
		"two verdicts":       {"", append([]string{"--approve", "--reject"}, fr1...), 2, "--approve or --reject"},
		"no key":             {"", []string{"--approve", "--yes"}, 2, "--custodian-key"},
		"an argument":        {"", append([]string{"--approve", "a/b"}, fr1...), 2, "no arguments"},
		"no answer":          {"no\n", append([]string{"--approve"}, fr1...), 2, "nothing was signed"},
		"a stranger":         {"", append([]string{"--approve", "--yes"}, keyFile(t, stranger)...), 4, "no custodian"},
		"over another file":  {"", append([]string{"--approve", "--yes", "--out", file}, fr1...), 5, "exists already"},
		"into no such place": {"", append([]string{"--approve", "--yes", "--out", file + "/x"}, fr1...), 1, "not a directory"},
	} {
		if _, _, err := sign(x.stdin, x.args...); exitCode(err) != x.code || !strings.Contains(err.Error(), x.says) {
			t.Errorf("%s: %v, exit code %d", name, err, exitCode(err))
		}
	}
	if b, _ := os.ReadFile(file); !bytes.Equal(b, exported) {
		t.Fatal("the file was changed")
	}

	_, shown, err := sign("yes\n", append([]string{"--approve"}, fr1...)...)
	if err != nil || !strings.Contains(shown, "key/coalition/orders") || !strings.Contains(shown, "Approve this?") {
		t.Fatalf("%v: %s", err, shown)
	}
	second := file + ".2"
	out, _, err := sign("", append([]string{"--approve", "--yes", "--out", second, "-o", "json"}, de1...)...)
	var info carriedInfo
	if err == nil {
		err = json.Unmarshal([]byte(out), &info)
	}
	if err != nil || len(info.Statements) != 2 || info.Signed.ID != id || info.Cluster != w.State().Cluster() {
		t.Fatalf("%v: %+v", err, info)
	}
	c, _, err := readCarried(second)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range c.Statements {
		record, _ := w.State().Custodian(s.Custodian)
		if err := s.Verify(record, p.Bytes); err != nil {
			t.Errorf("%s: %v", s.Custodian, err)
		}
	}

	// A rejection, of a proposal that is old.
	out, _, err = sign("", append([]string{"--reject", "--yes"}, de1...)...)
	if err != nil || !strings.Contains(out, "reject of de-1") || !strings.Contains(out, "approve of fr-1") || !strings.Contains(out, "EXPIRED by this computer's clock") {
		t.Errorf("%v: %s", err, out)
	}
	write(t, file, exported[:len(exported)-1])
	if _, _, err := sign("", append([]string{"--approve", "--yes"}, fr1...)...); exitCode(err) != 1 || !strings.Contains(err.Error(), "canonical") {
		t.Errorf("a file cut short: %v", err)
	}
}

// everyAction is a world in which a proposal of every action that evidence covers was
// carried out, with their identifiers.
func everyAction(t *testing.T) (*statetest.World, map[kms.Action]string) {
	w := statetest.New(t, statetest.Options{})
	w.Announce()
	const target = "key/coalition/orders"
	w.CreateKeyring("coalition", "de", "fr", "jp")
	w.CreateKey("coalition", "orders", kms.Encrypt)
	w.GiveReceipts()
	ids := map[kms.Action]string{kms.ActionRotate: w.Rotate("coalition", "orders"), "rotate a KEK": w.RotateKEK("coalition")}
	w.AllowImport()
	ids[kms.ActionImport] = w.ImportKey("coalition", "brought", kms.Sign)
	ids[kms.ActionActivate] = activate(w, target)
	ids[kms.ActionSchedule] = w.Carry(kms.ActionSchedule, target, approval.ScheduleParams{RotationPeriod: time.Hour.Milliseconds()})
	ids[kms.ActionSuspend] = w.Carry(kms.ActionSuspend, target, nil)
	ids[kms.ActionResume] = w.Carry(kms.ActionResume, target, nil)
	ids[kms.ActionDeactivate] = w.Carry(kms.ActionDeactivate, target, approval.VersionParams{Version: 1})
	ids[kms.ActionCompromise] = w.Carry(kms.ActionCompromise, target, approval.VersionParams{Version: 1})
	standard, _ := w.State().Policy("standard")
	ids[kms.ActionPolicy] = w.Carry(kms.ActionPolicy, "policy/standard", approval.PolicyParams{Rules: standard.Rules})
	ids[kms.ActionCustodian] = w.Carry(kms.ActionCustodian, "custodian/fr-3",
		approval.CustodianParams{Custodian: statetest.Record("fr-3", "fr", 0, w.AddCustodianKey("fr-3"))})
	_, node := w.JoinParams("node-fr-2", "fr", false)
	ids[kms.ActionNode] = w.Carry(kms.ActionNode, "node/node-fr-2", node)
	ids[kms.ActionSite] = w.Carry(kms.ActionSite, "site/fr", approval.SiteParams{Change: approval.SiteCAs, CAs: [][]byte{w.CA("fr").Certificate.Raw, w.CA("de").Certificate.Raw}})
	ids[kms.ActionRecoveryKey] = w.SetRecovery("paris", w.RecoveryParams([]string{"fr"}, 3, 2, "de-1", "fr-1", "fr-2", "jp-1"))
	destroy := w.Propose(kms.ActionDestroy, target, approval.VersionParams{Version: 1})
	w.ApproveAll(destroy)
	w.Advance(7 * 24 * time.Hour)
	w.Execute(destroy)
	ids[kms.ActionDestroy] = destroy
	return w, ids
}

// activate has a rule for it, with a group, one for schedule, and version 3 of a key activated with one
// receipt.
func activate(w *statetest.World, target string) string {
	standard, _ := w.State().Policy("standard")
	need := &approval.Group{Need: 2, Custodians: []approval.Weight{{Name: "de-1", Weight: 1}}, Sites: []approval.SiteWeight{{Name: "fr", Weight: 1, Approvals: 1}}}
	rule := approval.Rule{Action: kms.ActionActivate, Approvals: 2, Sites: 2, Lifetime: standard.Rules[0].Lifetime, Need: need}
	schedule := approval.Rule{Action: kms.ActionSchedule, Approvals: 2, Sites: 2, Lifetime: rule.Lifetime}
	rules := append(slices.Insert(slices.Clone(standard.Rules), 0, rule), schedule)
	slices.SortFunc(rules, func(a, b approval.Rule) int { return strings.Compare(string(a.Action), string(b.Action)) })
	w.Carry(kms.ActionPolicy, "policy/standard", approval.PolicyParams{Rules: rules})
	id := w.Propose(kms.ActionRotate, target, nil)
	w.ApproveAll(id)
	w.Commit(id)
	w.Do("node-de-1", w.ReceiptCommand("node-de-1", "coalition", "orders", 3))
	id = w.Carry(kms.ActionActivate, target, approval.VersionParams{Version: 3})
	w.GiveReceipts()
	return id
}

// TestShowEqualsEvidence: what conclave proposal show prints of what custodians sign, as a
// table and as JSON, is word for word what conclave evidence verify prints of evidence.
func TestShowEqualsEvidence(t *testing.T) {
	w, ids := everyAction(t)
	for _, a := range slices.Concat(kms.KeyActions, kms.GovernanceActions) {
		// Nobody proposes to create, and what recover takes goes by a backup.
		direct := []kms.Action{kms.ActionCreate, kms.ActionKeyring, kms.ActionRecover}
		if _, done := ids[a]; !done && !slices.Contains(direct, a) {
			t.Errorf("%s is not compared", a)
		}
	}
	dir := t.TempDir()
	for what, id := range ids {
		stored, _ := w.State().Proposal(id)
		signed, err := contentOf(stored.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		shown, err := json.Marshal(shownProposal{wire.Proposal{ID: id, Bytes: stored.Bytes}, signed})
		if err != nil {
			t.Fatal(err)
		}
		e, err := audit.BuildEvidence(w.State(), id)
		if err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		file := filepath.Join(dir, id)
		write(t, file, e.Marshal())
		asJSON, _, err := cli(t, "", "evidence", "verify", file, "--cluster", w.State().Cluster(), "-o", "json")
		if err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		if a, b := signedFields(t, string(shown)), signedFields(t, asJSON); !slices.Equal(a, b) || len(a) < 17 {
			t.Errorf("%s: show has\n%s\nthe evidence\n%s", what, strings.Join(a, "\n"), strings.Join(b, "\n"))
		}
		var table bytes.Buffer
		tw := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
		showSigned(tw, stored.Bytes, signed.Content)
		_ = tw.Flush() // into memory
		text, _, err := cli(t, "", "evidence", "verify", file, "--cluster", w.State().Cluster())
		if err != nil || !strings.HasPrefix(squeeze(text), squeeze(table.String())) {
			t.Errorf("%s: %v: show has\n%s\nthe evidence\n%s", what, err, &table, text)
		}
	}
}

// squeeze drops the padding of a table's columns.
func squeeze(s string) string { return strings.Join(strings.Fields(s), " ") }

// signedFields lists the fields below "signed" with their values, in order.
func signedFields(t *testing.T, object string) (list []string) {
	t.Helper()
	var v struct{ Signed json.RawMessage }
	if err := json.Unmarshal([]byte(object), &v); err != nil {
		t.Fatal(err)
	}
	var walk func(path string, b json.RawMessage)
	walk = func(path string, b json.RawMessage) {
		var fields map[string]json.RawMessage
		if json.Unmarshal(b, &fields) != nil || fields == nil {
			var compact bytes.Buffer
			if err := json.Compact(&compact, b); err != nil {
				t.Fatal(err)
			}
			list = append(list, path+" = "+compact.String())
			return
		}
		for name, x := range fields {
			walk(path+"."+name, x)
		}
	}
	walk("", v.Signed)
	slices.Sort(list)
	return list
}
