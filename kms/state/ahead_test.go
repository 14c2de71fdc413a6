package state_test

import (
	"bytes"
	"errors"
	"sync"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// TestRestoreSpread: who does the work, and in which order, changes nothing; what was not
// done is missed.
func TestRestoreSpread(t *testing.T) {
	s := rich(t).State()
	b := snapshot(t, s)
	restore := func(spread state.Spread) error {
		got, err := state.RestoreSpread(bytes.NewReader(b), no, spread)
		if err == nil && got.Hash() != s.Hash() {
			t.Error("another state came out")
		}
		return err
	}
	for name, spread := range map[string]state.Spread{
		"at once": func(n int, f func(int)) {
			var wg sync.WaitGroup
			for i := range n {
				wg.Go(func() { f(i) })
			}
			wg.Wait()
		},
		"backwards": func(n int, f func(int)) {
			for i := range n {
				f(n - 1 - i)
			}
		},
	} {
		if err := restore(spread); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := restore(func(int, func(int)) {}); err == nil {
		t.Error("accepted although nothing was done")
	}
	err := restore(func(n int, f func(int)) {
		for i := range n - 1 { // the last one is a command
			f(i)
		}
	})
	if err == nil {
		t.Error("accepted although the last statement was not opened")
	}
}

// TestLyingSnapshot: who had to sign is never the snapshot's word. Here it says that de had
// fr's key before its root was replaced, and a receipt of de is signed by fr.
func TestLyingSnapshot(t *testing.T) {
	w := statetest.New(t, statetest.Options{})
	w.CreateKeyring("coalition", "fr", "de", "jp")
	w.GiveReceipts()
	w.Rekey("node-de-1")
	records := split(t, snapshot(t, w.State()))
	forged := 0
	for i, r := range records {
		switch state.VerifiedTables()[r.number] {
		case "former":
			f := decode[state.FormerRoot](t, r.body)
			f.Signing = w.Node("node-fr-1").Record.Signing
			records[i].body = canon.Marshal(f)
			forged++
		case "kek":
			k := decode[state.KEK](t, r.body)
			for j, x := range k.Receipts {
				if x.Node == "node-de-1" {
					envelope, _, err := state.Split(x.Statement)
					if err != nil {
						t.Fatal(err)
					}
					k.Receipts[j].Statement = w.Node("node-fr-1").SignCommand(t, envelope)
					forged++
				}
			}
			records[i].body = canon.Marshal(k)
		}
	}
	if forged != 2 {
		t.Fatalf("%d records were forged", forged)
	}
	if _, err := state.Restore(bytes.NewReader(join(records)), no); !errors.Is(err, kms.BadSignature) {
		t.Errorf("got %v", err)
	}
}

func decode[T any](t *testing.T, b []byte) (v T) {
	t.Helper()
	if err := canon.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	return v
}
