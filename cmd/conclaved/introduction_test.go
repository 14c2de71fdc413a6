package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms/wire"
)

// A node that joins takes an introduction to the members of its own cluster, and finds it
// again when it starts.
func TestIntroduction(t *testing.T) {
	f := newFounding(t)
	block, err := readCertificates(f.path("fr", "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	good := func() wire.Introduction {
		return wire.Introduction{Format: 1, Cluster: "c", Nodes: []wire.IntroducedNode{{ID: "fr-2", Site: "fr", Address: "fr.example:7600"}},
			Sites: []wire.IntroducedSite{{ID: "fr", TrustDomain: "fr.example", CAs: block}}}
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "members.json")
	write := func(in any) {
		t.Helper()
		b, err := json.Marshal(in)
		if err == nil {
			err = os.WriteFile(file, b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for says, change := range map[string]func(*wire.Introduction){
		"format 2 is not known":    func(in *wire.Introduction) { in.Format = 2 },
		`it is of cluster "other"`: func(in *wire.Introduction) { in.Cluster = "other" },
		"epoch 1 with lineage":     func(in *wire.Introduction) { in.Epoch = 1 },
		"epoch 0 with lineage":     func(in *wire.Introduction) { in.Lineage = strings.Repeat("0", 32) },
		"at least one node":        func(in *wire.Introduction) { in.Nodes = nil },
		"is not host:port":         func(in *wire.Introduction) { in.Nodes[0].Address = "fr.example" },
		"which it does not":        func(in *wire.Introduction) { in.Nodes[0].Site = "de" },
		"trust domain":             func(in *wire.Introduction) { in.Sites[0].TrustDomain = "a/b" },
		"certificate":              func(in *wire.Introduction) { in.Sites[0].CAs = [][]byte{{1, 2}} },
	} {
		in := good()
		change(&in)
		write(in)
		if err := keepIntroduction(Config{DataDir: dir}, file, "c"); err == nil || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), "conclave node introduce") {
			t.Errorf("%s: %v", says, err)
		}
	}
	write(map[string]any{"format": 1, "cluster": "c", "node": nil})
	if _, err := readIntroduction(file, "c"); err == nil {
		t.Error("a field that is not known is taken")
	}
	if got, err := introduced(dir, "c"); err != nil || len(got.Nodes) != 0 {
		t.Errorf("nothing was kept: %+v, %v", got, err)
	}
	write(good())
	if err := keepIntroduction(Config{DataDir: dir}, file, "c"); err != nil {
		t.Fatal(err)
	}
	got, err := introduced(dir, "c")
	if err != nil || len(got.Nodes) != 1 || got.Nodes[0].Address != "fr.example:7600" || len(got.Sites) != 1 || len(got.Sites[0].CAs) != 1 {
		t.Errorf("kept: %+v, %v", got, err)
	}
	if _, err := introduced(dir, "another"); err == nil {
		t.Error("that of another cluster is taken")
	}
}
