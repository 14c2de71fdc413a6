package state

import (
	"bytes"
	"cmp"
	"slices"
	"time"

	"github.com/conclave-kms/conclave/kms"
)

// TypeReportUse is the type of ReportUse.
const TypeReportUse Type = 32

const (
	// MaxUses is how many versions one ReportUse has at most.
	MaxUses = 1024
	// UseHour is the precision of a last use in milliseconds.
	UseHour = int64(time.Hour / time.Millisecond)
	// UseSilence is after how many milliseconds without a report a node's silence means
	// that nothing is known of what it uses. Nodes report every hour.
	UseSilence = 3 * UseHour
)

// ReportUse says which key versions the origin node has used since its last report, and
// between what times it has counted without a gap. Only what has changed is in it.
type ReportUse struct {
	// From and Until, in Unix milliseconds of the node's clock, are the time that the
	// report with those before it covers: whatever was used in it is reported. From is that
	// of the report before where nothing was missed since. Until is 0 where more follows.
	From  int64        `cbor:"from"`
	Until int64        `cbor:"until"`
	Used  []VersionUse `cbor:"used"` // sorted by key, then version
}

// VersionUse is the last use of a key version.
type VersionUse struct {
	Key     []byte `cbor:"key"` // kms.KeyID
	Version uint32 `cbor:"version"`
	Hour    int64  `cbor:"hour"` // since the Unix epoch
}

// Type implements Command.
func (ReportUse) Type() Type { return TypeReportUse }

// use is the last use of a version at a node, or, where Keyring is empty, the time that
// the node's reports cover. It is the node's word: no statement is kept of it.
type use struct {
	Keyring string `cbor:"keyring"`
	Key     string `cbor:"key"`
	Version uint32 `cbor:"version"`
	Node    string `cbor:"node"`
	Hour    int64  `cbor:"hour"`  // of the last use
	From    int64  `cbor:"from"`  // of what is covered
	Until   int64  `cbor:"until"` // of what is covered
}

func useID(r *use) []byte { return append(resealedKey(r.Keyring, r.Key, r.Version), r.Node...) }

func coverKey(node string) []byte { return useID(&use{Node: node}) }

func (c ReportUse) validate(e Envelope) error {
	switch {
	case len(c.Used) > MaxUses:
		return kms.Errorf(kms.Invalid, "use: it has %d versions; the limit is %d", len(c.Used), MaxUses)
	case e.Principal != "":
		return kms.Errorf(kms.Invalid, "use: a node reports it on nobody's behalf")
	case c.Until == 0 && (c.From != 0 || len(c.Used) == 0):
		return kms.Errorf(kms.Invalid, "use: a report that goes on covers no time and says something")
	case c.Until != 0 && (c.From <= 0 || c.From > c.Until || c.Until > e.Time):
		return kms.Errorf(kms.Invalid, "use: the times that it covers are not two in that order, before it was signed")
	}
	for i, u := range c.Used {
		if len(u.Key) != KeyIDSize || u.Version == 0 || u.Hour <= 0 || u.Hour > e.Time/UseHour {
			return kms.Errorf(kms.Invalid, "use: it has no key id of %d bytes, no version, or an hour that has not begun", KeyIDSize)
		}
		if i > 0 && c.Used[i-1].compare(u) >= 0 {
			return kms.Errorf(kms.Invalid, "use: the versions are not sorted or repeat one")
		}
	}
	return noExpect(e)
}

func (u VersionUse) compare(o VersionUse) int {
	return cmp.Or(bytes.Compare(u.Key, o.Key), cmp.Compare(u.Version, o.Version))
}

func (ReportUse) verify(*tx) error { return nil }

// apply takes the latest hour for each version that still has material; what was
// destroyed meanwhile is passed over. A node whose clock is ahead cannot say that a version
// will be in use.
func (c ReportUse) apply(t *tx) error {
	for _, u := range c.Used {
		k, _ := find[Key](t.Txn, tableKey, byKeyID, u.Key)
		if v, ok := t.reader().version(k.Keyring, k.Name, u.Version); !ok || v.State.Gone() {
			continue
		}
		r := use{Keyring: k.Keyring, Key: k.Name, Version: u.Version, Node: t.env.Origin, Hour: min(u.Hour, t.clock/UseHour)}
		if old, ok := find[use](t.Txn, tableUse, byID, useID(&r)); !ok || old.Hour < r.Hour {
			insert(t.Txn, tableUse, r)
		}
	}
	if c.Until == 0 {
		return nil
	}
	now := use{Node: t.env.Origin, From: c.From, Until: min(c.Until, t.clock)}
	now.From = min(now.From, now.Until)
	if old, ok := find[use](t.Txn, tableUse, byID, coverKey(t.env.Origin)); ok {
		if now.Until <= old.Until {
			return kms.Errorf(kms.Conflict, "node %s has reported what it used until then", t.env.Origin)
		}
		if c.From <= old.Until { // without a gap
			now.From = min(now.From, old.From)
		}
	}
	insert(t.Txn, tableUse, now)
	return nil
}

// dropUses forgets the uses of a version whose material is gone.
func (t *tx) dropUses(v Version) {
	for _, u := range list[use](t.Txn, tableUse, byID, resealedKey(v.Keyring, v.Key, v.Version)) {
		mustDB(t.Delete(tableUse, &u))
	}
}

// forgetsUse reports whether a use is of a version whose material is gone.
func (s *State) forgetsUse(u *use) bool {
	v, ok := s.Version(u.Keyring, u.Key, u.Version)
	return ok && v.State.Gone()
}

// Use is what is known of the last use of a key version.
type Use struct {
	Last   int64    // end of the hour of the last use that a node has reported, Unix milliseconds; 0: none was reported
	Since  int64    // nobody used it after this time, as far as the nodes say that are not silent
	Until  int64    // as far as they have reported; what was used since then is in their next reports
	Silent []string // nodes that can use it and of which nothing or nothing new was heard, sorted: they may have used it at any time
}

// Known reports whether every node that can use the version has been heard.
func (u Use) Known() bool { return len(u.Silent) == 0 }

// UsesReported returns the time, in Unix milliseconds, until when a node has reported what it
// used, 0 if it never did.
func (s *State) UsesReported(node string) int64 {
	x, _ := find[use](s.read(), tableUse, byID, coverKey(node))
	return x.Until
}

// LastUse returns what is known of the last use of a version: by encrypting, decrypting,
// signing, verifying and the like, or fetching its public key, at any node, removed ones
// too. Where a node has started anew and cannot tell what it used before, Since is not before
// its start. A node that has not reported for UseSilence is silent.
func (s *State) LastUse(keyring, key string, version uint32) Use {
	return s.reader().lastUse(keyring, key, version, s.clock)
}

func (r reader) lastUse(keyring, key string, version uint32, clock int64) (u Use) {
	v, ok := r.version(keyring, key, version)
	if !ok {
		return u
	}
	for _, x := range list[use](r.x, tableUse, byID, resealedKey(keyring, key, version)) {
		u.Last = max(u.Last, (x.Hour+1)*UseHour)
	}
	u.Since = max(u.Last, v.Created)
	for _, n := range r.mayUse(keyring, key) {
		x, heard := find[use](r.x, tableUse, byID, coverKey(n.ID))
		if !heard || x.Until < clock-UseSilence {
			u.Silent = append(u.Silent, n.ID)
			continue
		}
		u.Since = max(u.Since, x.From)
		if u.Until == 0 || x.Until < u.Until {
			u.Until = x.Until
		}
	}
	return u
}

// mayUse returns the nodes that can use a key, sorted: those that can open it, and all
// for one that signs, since its signatures are verified everywhere.
func (r reader) mayUse(keyring, key string) []Node {
	kr, _ := r.keyring(keyring)
	if k, _ := r.key(keyring, key); k.Purpose != kms.Sign {
		return r.residents(kr.Residency)
	}
	return slices.DeleteFunc(r.nodes(), func(n Node) bool { return n.Root == 0 })
}
