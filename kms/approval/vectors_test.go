package approval

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/fxamacker/cbor/v2"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/pqc"
)

const vectorDir = "../../test/vectors/approval"

var update = flag.Bool("update", false, "write test/vectors/approval anew")

// annotate writes canonical CBOR as lines of hexadecimal with what they say.
func annotate(b []byte, depth int, out *strings.Builder) []byte {
	line := func(head []byte, format string, args ...any) {
		fmt.Fprintf(out, "%s%x  # %s\n", strings.Repeat("  ", depth), head, fmt.Sprintf(format, args...))
	}
	if b[0]>>5 == 5 || b[0]>>5 == 4 { // map or array of fewer than 24 entries
		n := int(b[0] & 31)
		if n > 23 {
			panic("annotate: a longer container than these vectors have")
		}
		if b[0]>>5 == 5 {
			line(b[:1], "map of %d", n)
			n *= 2
		} else {
			line(b[:1], "list of %d", n)
		}
		b = b[1:]
		for range n {
			b = annotate(b, depth+1, out)
		}
		return b
	}
	var v any
	rest, err := cbor.UnmarshalFirst(b, &v)
	if err != nil {
		panic(err)
	}
	switch v := v.(type) {
	case []byte:
		line(b[:len(b)-len(rest)], "%d bytes", len(v))
		if len(v) > 0 && v[0]>>5 == 5 && cbor.Wellformed(v) == nil {
			fmt.Fprintf(out, "%s# which are, decoded:\n", strings.Repeat("  ", depth))
			var inner strings.Builder
			annotate(v, depth+1, &inner)
			for l := range strings.Lines(inner.String()) {
				out.WriteString("# " + l)
			}
		}
	case string:
		line(b[:len(b)-len(rest)], "%q", v)
	default:
		line(b[:len(b)-len(rest)], "%v", v)
	}
	return rest
}

// load reads the bytes of an annotated file: hexadecimal up to '#' in each line.
func load(t testing.TB, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(vectorDir, name))
	if err != nil {
		t.Fatal(err)
	}
	var b []byte
	for l := range strings.Lines(string(text)) {
		l, _, _ = strings.Cut(l, "#")
		part, err := hex.DecodeString(strings.Join(strings.Fields(l), ""))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		b = append(b, part...)
	}
	if len(b) == 0 {
		t.Fatalf("%s: no vector", name)
	}
	return b
}

func store(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(vectorDir, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// messageText annotates a message without repeating the proposal's fields.
func messageText(v Verdict, proposal []byte) string {
	return fmt.Sprintf("# what a credential signs to %s the proposal of proposal-rotate.txt\n%x00  # \"conclave/statement/v1\", 00\n%x00  # %q, 00\n%x  # the proposal's bytes\n",
		v, "conclave/statement/v1", string(v), v, proposal)
}

func TestVectors(t *testing.T) {
	for _, a := range proposable {
		p := sampleProposal(a)
		name := "proposal-" + string(a) + ".txt"
		if *update {
			var out strings.Builder
			fmt.Fprintf(&out, "# proposal %s: canonical CBOR, as custodians sign it\n", ProposalID(p.Marshal()))
			annotate(p.Marshal(), 0, &out)
			store(t, name, out.String())
		}
		golden := load(t, name)
		if !bytes.Equal(p.Marshal(), golden) {
			t.Errorf("%s: the encoding has changed", name)
		}
		if _, err := ParseProposal(golden); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	message := RootMessage("00112233445566778899aabbccddeeff", "fr-1", 2, sampleRoot())
	if *update {
		var out strings.Builder
		fmt.Fprintf(&out, "# what the signing key of node fr-1's root number 2 signs, in the context %s\n", RootContext)
		annotate(message, 0, &out)
		store(t, "message-node-root.txt", out.String())
	}
	if !bytes.Equal(message, load(t, "message-node-root.txt")) {
		t.Error("message-node-root.txt: the message has changed")
	}
	rotate := load(t, "proposal-rotate.txt")
	if got, want := ProposalID(rotate), "6bbd19e6bce4d2c660e6ba1cccff16a6"; got != want {
		t.Errorf("proposal id %s, want %s", got, want)
	}
	for _, v := range []Verdict{Approve, Reject} {
		name := "message-" + string(v) + ".txt"
		if *update {
			store(t, name, messageText(v, rotate))
		}
		if !bytes.Equal(Message(v, rotate), load(t, name)) {
			t.Errorf("%s: the message has changed", name)
		}
	}
}

// TestStatementVector verifies a recorded signature (Ed25519 is deterministic,
// RFC 8032): whatever signs or verifies statements elsewhere must agree with it.
func TestStatementVector(t *testing.T) {
	proposal := sampleProposal(kms.ActionRotate).Marshal()
	c := sampleCustodian()
	tbs, err := pqc.ToBeSigned(Message(Approve, proposal), []byte(Context))
	if err != nil {
		t.Fatal(err)
	}
	sig := ed25519.Sign(ed25519Key(1), tbs)
	if *update {
		store(t, "signature-approve-ed25519.txt", fmt.Sprintf("# Ed25519 signature by the seed of 32 bytes 01 over\n# 14 (length of context) \"conclave/approval/v1\" and the bytes of message-approve.txt\n%x\n", sig))
	}
	golden := load(t, "signature-approve-ed25519.txt")
	if !bytes.Equal(sig, golden) {
		t.Error("the signed bytes have changed")
	}
	s := Statement{Proposal: ProposalID(proposal), Verdict: Approve, Custodian: "fr-1", Credential: c.Credentials[0].ID, Signature: golden}
	if err := s.Verify(c, proposal); err != nil {
		t.Error(err)
	}
	golden[0] ^= 1
	if err := s.Verify(c, proposal); !errors.Is(err, kms.BadSignature) {
		t.Error(err)
	}
}
