package main

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
)

const someCluster = "00112233445566778899aabbccddeeff"

func shown(size uint64, root byte) wire.Status {
	return wire.Status{Cluster: someCluster, Lineage: someCluster, LogSize: size, LogRoot: []byte{root}, Node: "fr-1", Time: time.Unix(1, 0)}
}

// TestMemory: what was seen is kept, and a cluster with less or something else is refused.
func TestMemory(t *testing.T) {
	t.Setenv(memoryEnv, t.TempDir())
	m, known, err := recall(someCluster)
	if err != nil || known {
		t.Fatal(known, err)
	}
	if err := m.seen(shown(10, 1)).save(); err != nil {
		t.Fatal(err)
	}
	if m, known, err = recall(someCluster); err != nil || !known || m.LogSize != 10 {
		t.Fatal(m, known, err)
	}
	other, later := shown(20, 2), shown(3, 3)
	other.Lineage, other.Epoch = strings.Repeat("f", 32), 0
	later.Lineage, later.Epoch = strings.Repeat("e", 32), 1
	for name, c := range map[string]struct {
		s    wire.Status
		want string
	}{
		"the same":                  {shown(10, 1), ""},
		"more":                      {shown(11, 2), ""},
		"less":                      {shown(9, 1), "was set back"},
		"another log":               {shown(10, 2), "another log"},
		"another history":           {other, "given up"},
		"a recovery not yet agreed": {later, "memory accept"},
	} {
		err := m.sameHistory(c.s)
		if err == nil {
			err = m.compare(c.s)
		}
		text := ""
		var e *kms.Error
		if errors.As(err, &e) {
			text = e.Msg + e.Fix
		}
		if (c.want == "") != (err == nil) || !strings.Contains(text, c.want) || err != nil && !errors.Is(err, kms.Conflict) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got := m.seen(shown(5, 5)); got.LogSize != 10 {
		t.Errorf("a node that lags made it forget: %d", got.LogSize)
	}
	if _, _, err := recall("../" + someCluster); !errors.Is(err, kms.Invalid) {
		t.Errorf("a cluster of that name: %v", err)
	}
}
