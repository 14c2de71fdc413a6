package main

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/hsm/hsmtest"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

// nextTable is the configuration of a token under the name of a table.
func nextTable(table string, tok *hsmtest.Token) string {
	return fmt.Sprintf("[%s]\ntype = \"pkcs11\"\nisolate = false\ncurve = \"P-256\"\nuri = \"%s&pin-source=file:%s\"\nsofthsm_conf = %q\n", table, tok.URI, tok.PINFile, tok.ConfFile)
}

// devices configures fr's node with the tokens in these tables.
func (f *founding) devices(tables map[string]*hsmtest.Token) {
	f.t.Helper()
	config := f.read("fr", "conclaved.toml")
	config = config[:strings.Index(config, "[device]")]
	for _, table := range []string{"device", "next_device"} {
		if tok := tables[table]; tok != nil {
			config += nextTable(table, tok)
		}
	}
	f.write(config, "fr", "conclaved.toml")
}

// founded is a founding whose document all nodes have signed.
func founded(t *testing.T) *founding {
	f := newFounding(t)
	f.initialise()
	f.write(plan, "genesis.toml")
	accepted(t, "genesis", "create", "--plan", f.path("genesis.toml"), "--out", f.path("genesis.cbor"))
	accepted(t, "genesis", "sign", "-c", f.config("fr"), f.path("genesis.cbor"))
	accepted(t, "genesis", "sign", "-c", f.config("de"), f.path("genesis.cbor"))
	return f
}

func (f *founding) nextCard() card {
	f.t.Helper()
	c, err := readCard(f.path("fr", "data", "next-node.json"))
	if err != nil {
		f.t.Fatal(err)
	}
	return c
}

// possessed checks the signature on the prepared card.
func (f *founding) possessed(c card, number uint32) error {
	f.t.Helper()
	s, err := readSignedGenesis(f.path("genesis.cbor"))
	if err != nil {
		f.t.Fatal(err)
	}
	root, err := c.nextRoot()
	if err != nil {
		f.t.Fatal(err)
	}
	return approval.NodeParams{Root: root, Possession: c.Possession}.VerifyPossession(kms.ClusterID(s.Genesis), "fr-1", number)
}

func TestRekeyPrepare(t *testing.T) {
	f := founded(t)
	old, other, third := f.tokens["fr"], hsmtest.New(t), hsmtest.New(t)
	prepare := []string{"rekey", "prepare", "-c", f.config("fr")}
	refused(t, prepare, "[next_device]")
	f.devices(map[string]*hsmtest.Token{"device": old, "next_device": old})
	refused(t, prepare, "is the device that the node has")
	clone := *other
	clone.URI = old.URI // and so the library
	f.devices(map[string]*hsmtest.Token{"device": old, "next_device": &clone})
	refused(t, prepare, "write isolate = true into [next_device]")
	f.devices(map[string]*hsmtest.Token{"device": old, "next_device": other})
	refused(t, append(prepare, "--number", "1"), "has root number 1")
	refused(t, append(prepare, "--witness", f.path("none.json")), "none.json")

	out := accepted(t, prepare...)
	first := f.nextCard()
	if !strings.Contains(out, "root number 2") || !strings.Contains(out, "conclave node rekey fr-1") || first.Root != 2 {
		t.Errorf("%s; root %d", out, first.Root)
	}
	if err := f.possessed(first, 2); err != nil {
		t.Error(err)
	}
	if err := f.possessed(first, 3); !errors.Is(err, kms.BadSignature) {
		t.Errorf("for another number: %v", err)
	}
	root := f.read("fr", "data", "next-root.json")
	accepted(t, prepare...)
	again := f.nextCard()
	if !bytes.Equal(again.Signing, first.Signing) || !bytes.Equal(again.Agreement, first.Agreement) || !bytes.Equal(again.Attestation, first.Attestation) ||
		f.read("fr", "data", "next-root.json") != root {
		t.Error("a second preparation changed the root")
	}
	accepted(t, append(prepare, "--number", "4")...)
	if c := f.nextCard(); c.Root != 4 || f.possessed(c, 4) != nil || !bytes.Equal(c.Agreement, first.Agreement) {
		t.Errorf("renumbered: root %d, %v", c.Root, f.possessed(c, 4))
	}

	f.devices(map[string]*hsmtest.Token{"device": old, "next_device": third})
	refused(t, prepare, "next-root.json", "given up")
	if err := os.Remove(f.path("fr", "data", "root.json")); err != nil {
		t.Fatal(err)
	}
	refused(t, prepare, "conclaved init")
}

// opens opens the node's roots as run does, says which they are, and closes them.
func (f *founding) opens() (present, next string, err error) {
	f.t.Helper()
	cfg, err := loadConfig(f.config("fr"))
	if err != nil {
		f.t.Fatal(err)
	}
	r, err := openRoots(f.t.Context(), cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		return "", "", err
	}
	defer func() {
		if err := r.close(); err != nil {
			f.t.Error(err)
		}
	}()
	name := func(h *heldRoot) string {
		if h == nil {
			return ""
		}
		return fmt.Sprintf("%s, root %d", h.table, h.file.Root)
	}
	return name(r.present), name(r.next), nil
}

// TestOpenRoots holds that root.json decides which device a node runs on, in either
// order of the tables, and that a node without that device waits only where another
// root was prepared.
func TestOpenRoots(t *testing.T) {
	f := founded(t)
	old, other := f.tokens["fr"], hsmtest.New(t)
	f.devices(map[string]*hsmtest.Token{"device": old, "next_device": other})
	accepted(t, "rekey", "prepare", "-c", f.config("fr"))
	dead := *other
	dead.URI = strings.Replace(other.URI, other.Label, "gone", 1)
	wrongPIN := *old
	wrongPIN.PINFile = f.path("wrong")
	f.write("000000", "wrong")

	check := func(device, next *hsmtest.Token, wantPresent, wantNext string, wantErr error) {
		t.Helper()
		f.devices(map[string]*hsmtest.Token{"device": device, "next_device": next})
		present, waits, err := f.opens()
		if present != wantPresent || waits != wantNext || !errors.Is(err, wantErr) {
			t.Errorf("present %q, next %q, %v; wanted %q, %q, %v", present, waits, err, wantPresent, wantNext, wantErr)
		}
	}
	check(old, other, "device, root 1", "", nil)
	check(other, old, "next_device, root 1", "device, root 2", nil)
	check(&dead, other, "", "next_device, root 2", nil)
	check(other, nil, "", "device, root 2", nil)
	check(&dead, nil, "", "", hsm.ErrTokenNotFound)
	check(&wrongPIN, other, "", "", hsm.ErrPIN) // not dead, so nothing waits

	for range 2 { // the second time as after a crash in the midst of it
		if err := adoptFiles(f.path("fr", "data")); err != nil {
			t.Fatal(err)
		}
	}
	c, err := readCard(f.path("fr", "data", "node.json"))
	if err != nil || c.Root != 0 || c.Possession != nil {
		t.Errorf("node.json: %+v, %v", c, err)
	}
	if _, err := os.Stat(f.path("fr", "data", "next-node.json")); err == nil {
		t.Error("next-node.json is still there")
	}
	check(old, other, "next_device, root 2", "", nil)
	check(other, nil, "device, root 2", "", nil)
	check(&dead, other, "next_device, root 2", "", nil)
	check(&wrongPIN, other, "next_device, root 2", "", nil)
	f.devices(map[string]*hsmtest.Token{"device": old})
	if _, _, err := f.opens(); err == nil || !strings.Contains(err.Error(), "belongs to the device with signing key") {
		t.Errorf("the former device alone: %v", err)
	}
}

func TestParsePCRs(t *testing.T) {
	value := strings.Repeat("ab", 32)
	got, err := parsePCRs("  sha256:\n  0 : 0x"+strings.ToUpper(value)+"\n  7 : "+value+"\n", []int{7})
	if err != nil || len(got) != 1 || len(got[7]) != 32 {
		t.Errorf("%v, %v", got, err)
	}
	for text, says := range map[string]string{
		"":                              "register 7",
		"0: " + value:                   "register 7",
		"7: " + value[2:]:               "line 1",
		"24: " + value:                  "line 1",
		"7 " + value:                    "line 1",
		"sha1:\n7: " + value:            "line 1",
		"7: " + value + "\n7: " + value: "line 2",
		"7: " + strings.Replace(value, "a", "g", 1): "line 1",
	} {
		if _, err := parsePCRs(text, []int{7}); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// A node that starts again after the adoption of its root must not take a proof of
// freshness from before the adoption for one that its state, without it, is complete.
func TestHasCaughtUp(t *testing.T) {
	for _, x := range []struct {
		fresh, running time.Duration
		want           bool
	}{
		{math.MaxInt64, time.Minute, false},   // never proven
		{time.Second, time.Second / 2, false}, // proven before the start
		{time.Second, time.Second, false},     // as old as the start
		{time.Second / 2, 2 * time.Second, true},
	} {
		if got := hasCaughtUp(x.fresh, x.running); got != x.want {
			t.Errorf("fresh %v, running %v: %v", x.fresh, x.running, got)
		}
	}
}
