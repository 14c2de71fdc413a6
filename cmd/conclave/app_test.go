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
	if s := strings.Join(parameters(p), "|"); s != "version = 0|which means that it is about THE WHOLE KEY, every version" {
		t.Errorf("a custodian sees %q", s)
	}
	p.Parameters = canon.Marshal(approval.VersionParams{Version: 3})
	if s := strings.Join(parameters(p), "|"); s != "version = 3" {
		t.Errorf("a custodian sees %q", s)
	}
}

func TestParametersOneToALine(t *testing.T) {
	p := approval.Proposal{Action: kms.ActionPolicy, Parameters: canon.Marshal(approval.PolicyParams{Rules: []approval.Rule{
		{Action: kms.ActionKeyring, Approvals: 2, Sites: 2}, {Action: kms.ActionRotate, Approvals: 1, Sites: 1}}})}
	got := parameters(p)
	if len(got) != 3 || !strings.HasPrefix(got[0], `rules = {`) || !strings.HasPrefix(got[1], `rules = {`) || !strings.HasPrefix(got[2], "which means that attested") {
		t.Errorf("a custodian sees %q", got)
	}
	if got := parameters(approval.Proposal{Action: kms.ActionRotate}); len(got) != 1 || got[0] != "-" {
		t.Errorf("of a rotation a custodian sees %q", got)
	}
	if got := parameters(approval.Proposal{Action: kms.ActionNode, Parameters: []byte("x")}); !strings.HasPrefix(got[0], "NOT READABLE") {
		t.Errorf("of what cannot be read a custodian sees %q", got)
	}
	p = approval.Proposal{Action: kms.ActionNode, Parameters: canon.Marshal(approval.NodeParams{Change: approval.NodeRemove})}
	if got := doing(wire.Proposal{Content: wire.ProposalContent{Action: "node"}}); got != "node" {
		t.Errorf("an action that cannot be decoded: %q", got)
	}
	if got := parameters(p); got[0] != `change = "remove"` {
		t.Errorf("of a removal a custodian sees %q", got)
	}
}
