package state_test

import (
	"fmt"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// BenchmarkRekey replaces the root of a node that has copies of 1,000 key versions
// of protection hardware: one Reseal, one look at what is missing, the adoption.
func BenchmarkRekey(b *testing.B) {
	w := statetest.New(b, statetest.Options{})
	w.CreateHardwareKeyring("vault", "fr", "de", "jp")
	for i := range 1000 {
		w.CreateKey("vault", fmt.Sprintf("k%d", i), kms.MAC)
	}
	w.Replace(fr, false)
	lacks := w.State().Unsealed(fr)
	reseal := w.Command(de, w.ResealCommand(fr, lacks[0]))
	s := w.State()
	b.Run("reseal", func(b *testing.B) {
		for b.Loop() {
			if _, r := s.Apply(s.Index()+1, reseal); r.Kind != 0 {
				b.Fatal(r.Message)
			}
		}
	})
	b.Run("unsealed", func(b *testing.B) {
		for b.Loop() {
			if n := len(s.Unsealed(fr)); n != 1000 {
				b.Fatal(n)
			}
		}
	})
	w.Reseal(fr)
	adopt := w.Command(fr, w.AdoptCommand(fr))
	s = w.State()
	b.Run("adopt", func(b *testing.B) {
		for b.Loop() {
			if _, r := s.Apply(s.Index()+1, adopt); r.Kind != 0 {
				b.Fatal(r.Message)
			}
		}
	})
}
