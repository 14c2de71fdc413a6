package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/wire"
)

// A node cannot move the cursor, begin a line or turn the direction of the text
// in what a custodian reads.
func TestVisible(t *testing.T) {
	for in, want := range map[string]string{
		"plain text, é, 鍵":      "plain text, é, 鍵",
		"\x1b[2J\x1b[Happroved": `\x1b[2J\x1b[Happroved`,
		"a\nb\tc\rd":            `a\nb\tc\rd`,
		"\u009b2J":              `\u009b2J`,
		"abc\u202edef":          `abc\u202edef`,
		"bad\xffbyte":           `bad\xffbyte`,
	} {
		if got := visible(in); got != want {
			t.Errorf("visible(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestShowProgressEscapesTheNodesText(t *testing.T) {
	var out bytes.Buffer
	showProgress(&out, wire.Proposal{Progress: "open", Summary: "x\x1b[20A\x1b[2Kaction  suspend", Missing: []string{"1\nproposal forged"}})
	if s := out.String(); strings.Contains(s, "\x1b") || strings.Contains(s, "\nproposal forged") {
		t.Errorf("the node's text reaches the terminal as it is: %q", s)
	}
}

func TestDestroyOfTheWholeKeyIsSaid(t *testing.T) {
	p := approval.Proposal{Action: kms.ActionDestroy, Parameters: canon.Marshal(approval.VersionParams{})}
	if s := parameters(p); !strings.Contains(s, "WHOLE KEY") {
		t.Errorf("a custodian sees %q", s)
	}
	p.Parameters = canon.Marshal(approval.VersionParams{Version: 3})
	if s := parameters(p); s != `{"version":3}` {
		t.Errorf("a custodian sees %q", s)
	}
}
