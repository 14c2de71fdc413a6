package state_test

import (
	"bytes"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/note"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// TestApplyAhead: what was verified ahead has the outcome that it has otherwise, also where a
// key changes in between, and a signature that does not verify is none ahead either.
func TestApplyAhead(t *testing.T) {
	w := statetest.New(t, statetest.Options{})
	var log [][]byte
	st, index := w.State(), uint64(0)
	w.Attach(func(raw []byte) (*state.State, state.Result) {
		index++
		log = append(log, raw)
		next, r := st.Apply(index, raw)
		st = next
		return next, r
	}, func() int64 { return statetest.Start + int64(index)*1000 })
	w.CreateKeyring("ring", "de", "fr", "jp")
	w.CreateKey("ring", "a", kms.Encrypt)
	w.GiveReceipts()
	const fr, de = "node-fr-1", "node-de-1"
	for range 2 {
		for _, id := range []string{fr, de} {
			w.Do(id, w.RegisterCommand(id))
		}
		w.Do(fr, w.CheckpointCommand(fr, w.Grow(fr, 3)))
		w.Do(de, w.CosignCommand(de, fr))
		w.Do(de, w.CosignCommand(de, ""))
		w.Rotate("ring", "a")
	}
	w.Rekey(fr) // what fr signs from here on is by another key
	w.Do(fr, w.CheckpointCommand(fr, w.Grow(fr, 3)))
	w.Do(de, w.CosignCommand(de, fr))

	// Wrong in the envelope's signature, and in that of a head under a good envelope.
	bad := w.Command(de, state.Tick{})
	bad[len(bad)-1] ^= 1
	w.Apply(bad)
	cp := w.CheckpointCommand(fr, w.Grow(fr, 3))
	cp.Signature.MLDSA = bytes.Clone(cp.Signature.MLDSA)
	cp.Signature.MLDSA[7] ^= 1
	w.Refuse(kms.BadSignature, fr, cp)
	other := w.CosignCommand(de, "")
	other.Signature = w.SignCheckpoint(de, note.Checkpoint{Origin: "x", Size: other.Size, Root: other.Root})
	w.Refuse(kms.BadSignature, de, other)

	for _, at := range []int{1, 7, len(log)} {
		now, err := state.New(w.Signed())
		if err != nil {
			t.Fatal(err)
		}
		plain := now
		for first := 0; first < len(log); first += at {
			before := now
			for i := first; i < min(first+at, len(log)); i++ {
				var got, want state.Result
				now, got = now.ApplyAhead(uint64(i)+1, before.Ahead(log[i]))
				plain, want = plain.Apply(uint64(i)+1, log[i])
				if !bytes.Equal(got.Leaf, want.Leaf) {
					t.Fatalf("command %d, %d at once: %v %s, otherwise %v %s", i, at, got.Kind, got.Message, want.Kind, want.Message)
				}
			}
		}
		if now.Hash() != st.Hash() {
			t.Errorf("%d at once lead to another state", at)
		}
	}
}
