package state

import (
	"bytes"
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
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

// siteRevision returns the revision of a site, also of one that was removed; 0 for one
// that is to be added.
func (r reader) siteRevision(id string) uint64 {
	if c, ok := find[siteChange](r.x, tableSite, byID, nameKey(id)); ok {
		return c.Revision
	}
	if _, ok := search(r.genesis.Sites, func(x Site) bool { return x.ID == id }); ok {
		return 1
	}
	return 0
}

// SiteRevision returns the revision of a site, 0 for one that is to be added.
func (s *State) SiteRevision(id string) uint64 { return s.reader().siteRevision(id) }

// changeSite does what a proposal about a site says.
func (t *tx) changeSite(id string, p approval.Proposal) error {
	params, err := p.SiteParams()
	if err != nil {
		return err
	}
	if !t.replay {
		if err := t.before.knownToAll("changes of sites", ""); err != nil {
			return err
		}
	}
	r := t.reader()
	next := siteChange{Site: Site{ID: id, TrustDomain: params.TrustDomain, CAs: params.CAs}, Revision: r.siteRevision(id) + 1}
	if params.Change == approval.SiteAdd {
		err = r.newSite(next.Site)
	} else {
		old, _, ok := r.site(id)
		switch {
		case !ok:
			return kms.Errorf(kms.NotFound, "there is no site %s", id)
		case params.Change == approval.SiteRemove:
			next.Site, next.Removed = old, true
			err = r.siteUnused(id)
		case slices.EqualFunc(old.CAs, params.CAs, bytes.Equal):
			return kms.Errorf(kms.Conflict, "site %s has these CA certificates", id)
		default:
			next.Site.TrustDomain = old.TrustDomain
		}
	}
	if err != nil {
		return err
	}
	insert(t.Txn, tableSite, next)
	t.voidTarget(p.Target)
	t.event(Event{Type: EventSiteChanged, Site: id, Proposal: approval.ProposalID(p.Marshal())})
	return nil
}

// newSite refuses a site whose name or trust domain another one has or had: custodians,
// identities and policies would mean another one than they were made for.
func (r reader) newSite(s Site) error {
	if len(r.sites()) >= MaxSites {
		return kms.Errorf(kms.TooLarge, "there are %d sites, which is the limit", MaxSites)
	}
	if r.siteRevision(s.ID) > 0 {
		return kms.Errorf(kms.Exists, "there is or was a site %s; take another name", s.ID)
	}
	all := slices.Clone(r.genesis.Sites)
	for _, c := range list[siteChange](r.x, tableSite, byID, []byte{}) {
		all = append(all, c.Site)
	}
	if o, taken := search(all, func(o Site) bool { return o.TrustDomain == s.TrustDomain }); taken {
		return kms.Errorf(kms.Exists, "site %s has or had the trust domain %s", o.ID, s.TrustDomain)
	}
	return nil
}

// siteUnused refuses to remove a site that something still stands on.
func (r reader) siteUnused(id string) error {
	if n, ok := search(r.nodes(), func(n Node) bool { return n.Site == id }); ok {
		return kms.Errorf(kms.Conflict, "site %s has node %s; remove its nodes first", id, n.ID)
	}
	if k, ok := search(r.keyrings(), func(k Keyring) bool { return slices.Contains(k.Residency, id) }); ok {
		return kms.Errorf(kms.Conflict, "keyring %s is resident at site %s", k.Name, id)
	}
	if c, ok := search(r.custodians(), func(c approval.Custodian) bool { return c.Site == id && !c.Revoked }); ok {
		return kms.Errorf(kms.Conflict, "custodian %s is of site %s; revoke its custodians first", c.ID, id)
	}
	for _, p := range r.policies() {
		for _, rule := range p.Rules {
			if slices.Contains(rule.Required, id) || slices.Contains(rule.GroupSites(), id) {
				return kms.Errorf(kms.Conflict, "policy %s requires site %s for %q; change it first", p.Name, id, rule.Action)
			}
		}
	}
	return nil
}
