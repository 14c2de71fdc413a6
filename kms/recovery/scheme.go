package recovery

import (
	"crypto/rand"
	"io"
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
)

// Scheme says who can put a secret together: any Threshold of the holders, if they
// are of at least Sites sites. The rule about sites is part of the mathematics and
// not checked by software: the secret is the XOR of two values, of which one is
// shared Threshold-of-n among the holders and the other Sites-of-sites among the
// sites, each site's share of it being given to all of its holders. This is the
// conjunction of two thresholds after J. Benaloh and J. Leichter, "Generalized
// secret sharing and monotone functions" (CRYPTO '88). Whoever lacks either value
// knows nothing about the secret.
type Scheme struct {
	Threshold int
	Sites     int
	Holders   []string // site of each holder
}

// Validate checks that the thresholds can be met. Errors: kms.Invalid.
func (s Scheme) Validate() error {
	sites := s.sites()
	switch {
	case s.Threshold < 1 || s.Threshold > len(s.Holders) || len(s.Holders) > MaxShares:
		return kms.Errorf(kms.Invalid, "%d of %d holders cannot be asked for", s.Threshold, len(s.Holders))
	case s.Sites < 1 || s.Sites > len(sites):
		return kms.Errorf(kms.Invalid, "%d of %d sites cannot be asked for", s.Sites, len(sites))
	}
	return nil
}

// sites returns the distinct sites, sorted: the place of one, from 1, is where its
// share is taken.
func (s Scheme) sites() []string {
	return slices.Compact(slices.Sorted(slices.Values(s.Holders)))
}

// Share is what one holder has: a share of the first value, then the site's share of
// the second one, each as long as the secret.
type Share struct {
	Holder int // place in Scheme.Holders
	Value  *secret.Bytes
}

// Split returns a share for every holder; the caller destroys them. Randomness is
// r's, or the system's where r is nil. Errors: as Validate, and kms.Internal.
func (s Scheme) Split(x *secret.Bytes, r io.Reader) ([]Share, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	if r == nil {
		r = rand.Reader
	}
	a, err := secret.New(max(1, x.Len()))
	if err != nil {
		return nil, noMemory(err)
	}
	defer a.Destroy()
	if _, err := io.ReadFull(r, a.Reveal()); err != nil {
		return nil, kms.Wrap(kms.Internal, err, "no randomness to share a secret with", "")
	}
	b, err := xor(a, x)
	if err != nil {
		return nil, err
	}
	defer b.Destroy()
	members, err := Split(a, s.Threshold, len(s.Holders), r)
	if err != nil {
		return nil, err
	}
	defer destroy(members)
	sites := s.sites()
	bySite, err := Split(b, s.Sites, len(sites), r)
	if err != nil {
		return nil, err
	}
	defer destroy(bySite)
	shares := make([]Share, 0, len(members))
	for i, m := range members {
		at, _ := slices.BinarySearch(sites, s.Holders[i])
		v, err := secret.New(2 * x.Len())
		if err != nil {
			DestroyShares(shares)
			return nil, noMemory(err)
		}
		copy(v.Reveal(), m.Y.Reveal())
		copy(v.Reveal()[x.Len():], bySite[at].Y.Reveal())
		shares = append(shares, Share{i, v})
	}
	return shares, nil
}

// Combine puts shares together, as many as there are. It is not told and does not ask
// whether they suffice: if they do not, what it returns has nothing to do with the
// secret. The caller destroys it. Errors: kms.Invalid for shares that do not fit one
// another or the scheme.
func (s Scheme) Combine(shares []Share) (*secret.Bytes, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	var members, bySite []Point
	defer func() { destroy(members); destroy(bySite) }()
	sites := s.sites()
	for _, h := range shares {
		if h.Holder < 0 || h.Holder >= len(s.Holders) || h.Value.Len() == 0 || h.Value.Len()%2 != 0 {
			return nil, kms.Errorf(kms.Invalid, "a share has the wrong form")
		}
		m, v, err := halves(h.Value)
		if err != nil {
			return nil, err
		}
		members = append(members, Point{byte(h.Holder + 1), m})
		at, _ := slices.BinarySearch(sites, s.Holders[h.Holder])
		if i := slices.IndexFunc(bySite, func(p Point) bool { return p.X == byte(at+1) }); i >= 0 {
			same := bySite[i].Y.Equal(v)
			v.Destroy()
			if !same {
				return nil, kms.Errorf(kms.Invalid, "two holders of site %s have different shares of it", sites[at])
			}
			continue
		}
		bySite = append(bySite, Point{byte(at + 1), v})
	}
	a, err := Combine(members)
	if err != nil {
		return nil, err
	}
	defer a.Destroy()
	b, err := Combine(bySite)
	if err != nil {
		return nil, err
	}
	defer b.Destroy()
	return xor(a, b)
}

// halves copies the two halves of a share.
func halves(v *secret.Bytes) (first, second *secret.Bytes, err error) {
	n := v.Len() / 2
	if first, err = secret.Copy(v.Reveal()[:n]); err != nil {
		return nil, nil, noMemory(err)
	}
	if second, err = secret.Copy(v.Reveal()[n:]); err != nil {
		first.Destroy()
		return nil, nil, noMemory(err)
	}
	return first, second, nil
}

func xor(a, b *secret.Bytes) (*secret.Bytes, error) {
	out, err := secret.New(max(1, a.Len()))
	if err != nil {
		return nil, noMemory(err)
	}
	if a.Len() != b.Len() {
		out.Destroy()
		return nil, kms.Errorf(kms.Invalid, "the halves of a secret differ in length")
	}
	x, y := a.Reveal(), b.Reveal()
	for i := range out.Reveal() {
		out.Reveal()[i] = x[i] ^ y[i]
	}
	return out, nil
}

// DestroyShares zeroises shares.
func DestroyShares(shares []Share) {
	for _, s := range shares {
		s.Value.Destroy()
	}
}
