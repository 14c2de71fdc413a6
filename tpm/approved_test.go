package tpm

import (
	"bytes"
	"crypto/ecdh"
	"testing"
)

func valuesOf(pcrs []int, fill byte) map[int][]byte {
	m := map[int][]byte{}
	for _, p := range pcrs {
		m[p] = bytes.Repeat([]byte{fill ^ byte(p)}, pcrLen)
	}
	return m
}

func TestApproved(t *testing.T) {
	all := make([]int, pcrCount)
	for i := range all {
		all[i] = i
	}
	for _, curve := range []ecdh.Curve{ecdh.P384(), ecdh.P256()} {
		s := suiteOf(curve)
		for _, c := range []struct {
			pcrs []int
			most int
		}{{[]int{0}, 4}, {[]int{7, 11}, 4}, {all[:8], 4}, {all, 2}} {
			var sets []map[int][]byte
			for n := range c.most {
				sets = append(sets, valuesOf(c.pcrs, byte(16*n)))
			}
			a, err := s.approve(c.pcrs, append(sets, sets[0]))
			if err != nil {
				t.Fatal(err)
			}
			if len(a.sets) != c.most {
				t.Errorf("%d sets of %d registers, want %d", len(a.sets), len(c.pcrs), c.most)
			}
			b := a.encode()
			back, ok := s.parseApproved(b)
			if !ok || !bytes.Equal(back.encode(), b) {
				t.Errorf("%d registers do not come back", len(c.pcrs))
			}
			if got := back.changed(sets[c.most-1]); len(got) != 0 {
				t.Errorf("approved values are reported as changed: %v", got)
			}
			other := valuesOf(c.pcrs, 0)
			other[c.pcrs[0]] = make([]byte, pcrLen)
			other[c.pcrs[0]][0] = 0xee
			if got := back.changed(other); len(got) != 1 || got[0] != c.pcrs[0] {
				t.Errorf("changed: %v, want %d", got, c.pcrs[0])
			}
			if _, err := s.approve(c.pcrs, append(sets, valuesOf(c.pcrs, 0xf0))); err == nil {
				t.Errorf("%d sets of %d registers were taken", c.most+1, len(c.pcrs))
			}
		}
	}
}

func FuzzParseApproved(f *testing.F) {
	s := suiteOf(ecdh.P384())
	for _, pcrs := range [][]int{{0}, {7, 11, 23}} {
		a, err := s.approve(pcrs, []map[int][]byte{valuesOf(pcrs, 1), valuesOf(pcrs, 2)})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(a.encode())
	}
	f.Add(make([]byte, approvedLen))
	f.Fuzz(func(t *testing.T, b []byte) {
		if a, ok := s.parseApproved(b); ok && !bytes.Equal(a.encode(), b) {
			t.Error("another encoding of the same")
		}
	})
}
