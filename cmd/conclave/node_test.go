package main

import (
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms/wire"
)

// An operator sees which node sealed copies that a root has refused, and what is in
// the way.
func TestNodeShowsRefused(t *testing.T) {
	n := wire.Node{
		ID: "de-1", Site: "de", Root: 1,
		Replacing: &wire.Replacing{Root: 2, Proposal: "p", Missing: 1, Note: "every copy was refused"},
		Refused: []wire.RefusedCopy{
			{Root: 2, Keyring: "hard", Key: "tags", Version: 3, SealedBy: "fr-1", Time: time.UnixMilli(0)},
			{Root: 2, Keyring: "soft", Version: 1, SealedBy: "jp-1"},
		},
	}
	var b strings.Builder
	nodeDetail(&b, n)
	for _, words := range []string{
		"refused\tby root number 2, 1970-01-01 00:00:00Z: the copy of key hard/tags, version 3, that node fr-1 sealed",
		"the copy of the KEK of keyring soft, version 1, that node jp-1 sealed", "1 missing: every copy was refused",
	} {
		if !strings.Contains(b.String(), words) {
			t.Errorf("it does not say %q:\n%s", words, b.String())
		}
	}
}
