package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
)

// TestFormatVectors holds FORMAT.md against what is written.
func TestFormatVectors(t *testing.T) {
	page, err := os.ReadFile("FORMAT.md")
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte("command"))
	access := entry(7).Marshal()
	cluster := canon.Marshal(state.Leaf{Index: 7, Time: 1767225600007, Type: 4, Origin: "fr-node-1", Command: sum[:]})
	m := newMerkle(nil)
	m.append(LeafHash(access))
	m.append(LeafHash(cluster))
	var commands bytes.Buffer
	for _, c := range []string{"cd", "e"} {
		if err := writeCommand(&commands, []byte(c)); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string][]byte{
		"access log leaf": access, "its hash": LeafHash(access), "cluster log leaf": cluster, "the hash of that": LeafHash(cluster),
		"root": m.tree().Root, "commands": commands.Bytes(),
	} {
		if !strings.Contains(string(page), "\n"+hex.EncodeToString(want)+"\n") {
			t.Errorf("%s: %x", name, want)
		}
	}
}
