package state

import (
	"slices"
	"strings"
)

// siteChange is what became of a site since the genesis: another bundle of CAs, a
// site that was added, or one that was removed. Its identifier and its trust domain
// never come back.
type siteChange struct {
	Site     Site   `cbor:"site"`
	Revision uint64 `cbor:"revision"`
	Removed  bool   `cbor:"removed"`
}

func siteChangeID(r *siteChange) []byte { return nameKey(r.Site.ID) }

// site returns a site that was not removed, with its revision: 1 in the genesis.
func (r reader) site(id string) (Site, uint64, bool) {
	if c, ok := find[siteChange](r.x, tableSite, byID, nameKey(id)); ok {
		return c.Site, c.Revision, !c.Removed
	}
	s, ok := search(r.genesis.Sites, func(x Site) bool { return x.ID == id })
	return s, 1, ok
}

// sites returns the sites that were not removed, sorted.
func (r reader) sites() []Site {
	changes := list[siteChange](r.x, tableSite, byID, []byte{})
	if len(changes) == 0 {
		return r.genesis.Sites
	}
	l := slices.Clone(r.genesis.Sites)
	for _, c := range changes {
		at, exists := slices.BinarySearchFunc(l, c.Site.ID, func(s Site, id string) int { return strings.Compare(s.ID, id) })
		switch {
		case c.Removed && exists:
			l = slices.Delete(l, at, at+1)
		case c.Removed:
		case exists:
			l[at] = c.Site
		default:
			l = slices.Insert(l, at, c.Site)
		}
	}
	return l
}
