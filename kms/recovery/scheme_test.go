package recovery

import (
	"bytes"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
)

func locked(t interface{ Fatal(...any) }, b []byte) *secret.Bytes {
	s, err := secret.Copy(b)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Products and an inverse from FIPS 197, sections 4.2, 4.2.1 and 4.3 (the inverse
// polynomial's coefficients), and all inverses by definition.
func TestField(t *testing.T) {
	for _, k := range []struct{ a, b, want byte }{
		{0x57, 0x83, 0xc1}, {0x57, 0x13, 0xfe}, {0x57, 0x02, 0xae}, {0x57, 0x04, 0x47}, {0x57, 0x08, 0x8e}, {0x57, 0x10, 0x07},
	} {
		if got := mul(k.a, k.b); got != k.want {
			t.Errorf("%02x * %02x = %02x, want %02x", k.a, k.b, got, k.want)
		}
	}
	for a := 1; a < 256; a++ {
		if got := mul(byte(a), inverse(byte(a))); got != 1 {
			t.Errorf("%02x * inverse = %02x", a, got)
		}
	}
	if inverse(0x53) != 0xca {
		t.Errorf("inverse of 53 is %02x, want ca", inverse(0x53))
	}
}

// One share of a 2-of-n sharing says nothing: for every secret, each value of the
// share comes from exactly one coefficient.
func TestPerfectSecrecy(t *testing.T) {
	for _, s := range []byte{0, 1, 0x5a, 0xff} {
		x := locked(t, []byte{s})
		var seen [MaxShares + 1][256]int
		for c := range 256 {
			points, err := Split(x, 2, 3, bytes.NewReader([]byte{byte(c)}))
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range points {
				seen[p.X][p.Y.Reveal()[0]]++
			}
			destroy(points)
		}
		for at := 1; at <= 3; at++ {
			for v, n := range seen[at] {
				if n != 1 {
					t.Fatalf("secret %02x, point %d: value %02x comes from %d coefficients", s, at, v, n)
				}
			}
		}
		x.Destroy()
	}
}

var fiveOfThree = Scheme{Threshold: 3, Sites: 2, Holders: []string{"de", "de", "fr", "fr", "fr"}}

// The whole access structure of 3 of 5 from 2 sites, subset by subset: the shares
// give the secret exactly where the rule says so, and too few give another value, not
// an error that could be left out.
func TestEverySubset(t *testing.T) {
	x := locked(t, bytes.Repeat([]byte{7}, 32))
	defer x.Destroy()
	shares, err := fiveOfThree.Split(x, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer DestroyShares(shares)
	enough := 0
	for set := 1; set < 1<<len(shares); set++ {
		var some []Share
		var sites []string
		for i, s := range shares {
			if set>>i&1 == 1 {
				some = append(some, s)
				sites = append(sites, fiveOfThree.Holders[i])
			}
		}
		slices.Sort(sites)
		want := len(some) >= 3 && len(slices.Compact(sites)) >= 2
		got, err := fiveOfThree.Combine(some)
		if err != nil {
			t.Fatal(err)
		}
		if got.Equal(x) != want {
			t.Errorf("subset %05b: the secret comes out: %v, want %v", set, !want, want)
		}
		got.Destroy()
		if want {
			enough++
		}
	}
	if enough != 15 { // 10 of three less the one of fr alone, 5 of four, 1 of five
		t.Errorf("%d subsets suffice, want 15", enough)
	}
}

// With shares that do not suffice, every secret is as likely as any other: for each
// there is a remaining share that leads to it.
func TestTooFewSayNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x := locked(t, rapid.SliceOfN(rapid.Byte(), 1, 40).Draw(t, "secret"))
		defer x.Destroy()
		n := rapid.IntRange(2, 12).Draw(t, "n")
		m := rapid.IntRange(2, n).Draw(t, "m")
		points, err := Split(x, m, n, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer destroy(points)
		// Any m-1 points and the secret of one's choice at 0 are m points of a
		// polynomial of the degree asked for: it has a value at the place left.
		other := locked(t, rapid.SliceOfN(rapid.Byte(), x.Len(), x.Len()).Draw(t, "other"))
		defer other.Destroy()
		known := slices.Clone(points[:m-1])
		shifted := make([]Point, 0, m) // the field is of characteristic 2: moving all places by one keeps the values
		for _, p := range known {
			shifted = append(shifted, Point{p.X ^ 0xf0, p.Y})
		}
		shifted = append(shifted, Point{0xf0, other})
		last, err := interpolate(shifted, points[m-1].X^0xf0)
		if err != nil {
			t.Fatal(err)
		}
		defer last.Destroy()
		got, err := Combine(append(known, Point{points[m-1].X, last}))
		if err != nil {
			t.Fatal(err)
		}
		defer got.Destroy()
		if !got.Equal(other) {
			t.Fatal("the shares at hand rule a secret out")
		}
	})
}

func TestSplitCombine(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x := locked(t, rapid.SliceOfN(rapid.Byte(), 1, 64).Draw(t, "secret"))
		defer x.Destroy()
		holders := rapid.SliceOfN(rapid.SampledFrom([]string{"de", "fr", "jp", "us"}), 1, 12).Draw(t, "holders")
		s := Scheme{Holders: holders}
		s.Threshold = rapid.IntRange(1, len(holders)).Draw(t, "threshold")
		s.Sites = rapid.IntRange(1, len(s.sites())).Draw(t, "sites")
		shares, err := s.Split(x, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer DestroyShares(shares)
		some := rapid.Permutation(shares).Draw(t, "order")
		some = some[:rapid.IntRange(1, len(some)).Draw(t, "given")]
		sites := map[string]bool{}
		for _, h := range some {
			sites[holders[h.Holder]] = true
		}
		got, err := s.Combine(some)
		if err != nil {
			t.Fatal(err)
		}
		defer got.Destroy()
		enough := len(some) >= s.Threshold && len(sites) >= s.Sites
		if enough && !got.Equal(x) {
			t.Fatal("enough shares do not give the secret")
		}
		if !enough && x.Len() >= 8 && got.Equal(x) { // short ones may be hit by chance
			t.Fatal("too few shares give the secret")
		}
	})
}

func TestCombineRefuses(t *testing.T) {
	y := locked(t, []byte{1, 2})
	z := locked(t, []byte{1})
	for name, points := range map[string][]Point{
		"none": nil, "zero": {{0, y}}, "twice": {{1, y}, {1, y}}, "lengths": {{1, y}, {2, z}},
	} {
		if _, err := Combine(points); kms.KindOf(err) != kms.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	x := locked(t, []byte{1, 2, 3})
	shares, err := fiveOfThree.Split(x, nil)
	if err != nil {
		t.Fatal(err)
	}
	shares[1].Value.Reveal()[5] ^= 1
	if _, err := fiveOfThree.Combine(shares); kms.KindOf(err) != kms.Invalid {
		t.Errorf("holders of one site with different shares of it: %v", err)
	}
	for _, s := range []Scheme{{}, {Threshold: 3, Sites: 1, Holders: []string{"a", "b"}}, {Threshold: 2, Sites: 3, Holders: []string{"a", "b", "b"}}} {
		if _, err := s.Split(x, nil); kms.KindOf(err) != kms.Invalid {
			t.Errorf("%+v: %v", s, err)
		}
	}
}
