package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms/wire"
)

func TestKeyringRotateUsage(t *testing.T) {
	noEnvironment(t)
	_, _, err := cli(t, "", "keyring", "rotate", "coalition")
	if err == nil || !strings.Contains(err.Error(), "--reason") {
		t.Errorf("without a reason: %v", err)
	}
	out, _, err := cli(t, "", "keyring", "rotate", "--help")
	if err != nil || !strings.Contains(out, "has no KEK: rotate its keys") {
		t.Errorf("help: %v, %q", err, out)
	}
}

// TestKEKRotationShown shows how far a rotation is, and nothing where there is none.
func TestKEKRotationShown(t *testing.T) {
	k := wire.Keyring{Name: "coalition", KEK: 2}
	shown := func() string {
		var b bytes.Buffer
		keyringDetail(&b, k)
		return b.String()
	}
	if s := shown(); strings.Contains(s, "rotation") {
		t.Errorf("no rotation: %q", s)
	}
	k.Rotation = &wire.KEKRotation{
		Target: 2, Versions: 8, Done: 5, Rewrapped: 2, Left: 1, Live: []uint32{1, 2}, Awaits: []string{"jp-1"}, Note: "a sentence",
		Receipts:  []wire.Receipt{{Node: "de-1", Received: true}, {Node: "jp-1"}},
		Refused:   []wire.RefusedRewrap{{KEK: 2, Rewrapped: "de-1", Refused: "fr-1", Key: "db", Version: 3, Time: time.UnixMilli(1)}},
		Proposals: []string{"0123"},
	}
	s := shown()
	for _, words := range []string{
		"to version 2; not retired: 1 2", "5 of 8 key versions in use, 2 wait for confirmation, 1 left", "de-1 ok, jp-1 missing", "a sentence",
		"fr-1 refused what de-1 rewrapped: version 3 of coalition/db", "0123",
	} {
		if !strings.Contains(s, words) {
			t.Errorf("%q is not in %q", words, s)
		}
	}
}
