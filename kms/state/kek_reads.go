package state

import (
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

func rewrapID(b *RewrapBatch) []byte {
	return append(numberKey(uint64(b.KEK), b.Keyring), numberKey(b.Index)...)
}

func rewrapRefusedID(x *RefusedRewrap) []byte {
	return append(numberKey(uint64(x.KEK), x.Keyring), numberKey(x.Batch)...)
}

// openRewrap is a value of byLive for batches.
func openRewrap(b *RewrapBatch) []byte {
	if b.Done {
		return nil
	}
	return prefixKey(b.Keyring)
}

// versionKEK is a value of byKEK: the KEK version that wraps a key version in use.
func versionKEK(v *Version) []byte {
	if v.KEK == 0 || v.State.Gone() {
		return nil
	}
	return numberKey(uint64(v.KEK), v.Keyring)
}

// versionWrap is a value of byWrap: the newest KEK version that wraps it, in use or not.
func versionWrap(v *Version) []byte {
	if v.KEK == 0 || v.State.Gone() {
		return nil
	}
	return numberKey(uint64(v.wrappedBy()), v.Keyring)
}

// Retired reports whether the KEK version was retired: nothing is wrapped under it,
// and nobody has a copy of it any more.
func (k KEK) Retired() bool { return k.RetiredIndex != 0 }

func (r reader) kek(keyring string, version uint32) (KEK, bool) {
	return find[KEK](r.x, tableKEK, byID, numberKey(uint64(version), keyring))
}

func (r reader) keks(keyring string) []KEK {
	return list[KEK](r.x, tableKEK, byID, prefixKey(keyring))
}

// newestKEK returns the KEK version that was committed last.
func (r reader) newestKEK(keyring string) KEK {
	l := r.keks(keyring)
	if len(l) == 0 {
		return KEK{}
	}
	return l[len(l)-1]
}

// wraps reports whether key versions are wrapped under a KEK version, or were to be.
func (r reader) wraps(keyring string, version uint32) bool {
	key := numberKey(uint64(version), keyring)
	_, used := find[Version](r.x, tableVersion, byKEK, key)
	_, next := find[Version](r.x, tableVersion, byWrap, key)
	return used || next
}

func (r reader) batch(keyring string, kek uint32, index uint64) (RewrapBatch, bool) {
	return find[RewrapBatch](r.x, tableRewrap, byID, rewrapID(&RewrapBatch{Keyring: keyring, KEK: kek, Index: index}))
}

func (r reader) batches(keyring string, kek uint32) []RewrapBatch {
	return list[RewrapBatch](r.x, tableRewrap, byID, numberKey(uint64(kek), keyring))
}

func (r reader) openBatches(keyring string) []RewrapBatch {
	return list[RewrapBatch](r.x, tableRewrap, byLive, prefixKey(keyring))
}

func (r reader) refusedRewraps(keyring string, kek uint32) []RefusedRewrap {
	return list[RefusedRewrap](r.x, tableRewrapRefused, byID, numberKey(uint64(kek), keyring))
}

// NewestKEK returns the KEK version of a keyring that was committed last, which need
// not be the primary one yet.
func (s *State) NewestKEK(keyring string) (KEK, bool) {
	k := s.reader().newestKEK(keyring)
	return k, k.Version != 0
}

// OpenBatches returns the batches of rewrapped key versions to a keyring's primary
// KEK version that not all resident nodes have confirmed, the first one first.
func (s *State) OpenBatches(keyring string) []RewrapBatch {
	k, _ := s.Keyring(keyring)
	return slices.DeleteFunc(s.reader().openBatches(keyring), func(b RewrapBatch) bool { return b.KEK != k.KEK })
}

// Batch returns a batch of rewrapped key versions.
func (s *State) Batch(keyring string, kek uint32, index uint64) (RewrapBatch, bool) {
	return s.reader().batch(keyring, kek, index)
}

// RefusedRewraps returns the batches to a KEK version that resident nodes refused.
func (s *State) RefusedRewraps(keyring string, kek uint32) []RefusedRewrap {
	return s.reader().refusedRewraps(keyring, kek)
}

// MayRewrap reports whether a node may rewrap for a keyring: it is resident and no
// resident node has refused what it rewrapped for the primary KEK version.
func (s *State) MayRewrap(keyring, node string) bool {
	k, _ := s.Keyring(keyring)
	_, barred := s.reader().barred(k, node)
	return !barred && s.Resident(keyring, node)
}

// ToRewrap calls f for the key versions that are neither wrapped under a keyring's
// primary KEK version nor in an open batch to it, until f returns false.
func (s *State) ToRewrap(keyring string, f func(Version) bool) {
	k, ok := s.Keyring(keyring)
	if !ok || k.KEK == 0 {
		return
	}
	it, err := s.read().Get(tableVersion, byWrap+"_prefix", prefixKey(keyring))
	mustDB(err)
	for raw := it.Next(); raw != nil; raw = it.Next() {
		v := raw.(*Version)
		if v.wrappedBy() >= k.KEK || !f(*v) {
			return // the index is in the order of KEK versions
		}
	}
}

// Retirable returns the old KEK versions of a keyring that wrap nothing any more.
func (s *State) Retirable(keyring string) (versions []uint32) {
	r := s.reader()
	k, _ := r.keyring(keyring)
	for _, kek := range r.keks(keyring) {
		if kek.Version < k.KEK && !kek.Retired() && !r.wraps(keyring, kek.Version) {
			versions = append(versions, kek.Version)
		}
	}
	return versions
}

// Rotating reports whether a keyring has more than one KEK version that is not
// retired: a rotation is under way.
func (s *State) Rotating(keyring string) bool {
	live := 0
	for _, kek := range s.reader().keks(keyring) {
		if !kek.Retired() {
			live++
		}
	}
	return live > 1
}

// KEKProgress is how far the rotation of a keyring's KEK has come.
type KEKProgress struct {
	Target    uint32          // newest KEK version
	Primary   uint32          // that new key versions are wrapped under
	Versions  int             // key versions with material
	Rewrapped int             // in open batches to Primary, not yet in use
	Done      int             // wrapped under Primary, and in use
	Awaits    []string        // resident nodes whose receipt for Target, or confirmation of a batch, is missing; sorted
	Refused   []RefusedRewrap // batches to Primary
	Live      []uint32        // KEK versions not retired, ascending
	Under     map[uint32]int  // key versions by the KEK version that wraps them
}

// KEKProgress counts where a rotation stands; ok is false where none is under way.
// It takes time in proportion to the keyring's key versions.
func (s *State) KEKProgress(keyring string) (p KEKProgress, ok bool) {
	if !s.Rotating(keyring) {
		return p, false
	}
	r := s.reader()
	k, _ := r.keyring(keyring)
	newest := r.newestKEK(keyring)
	p.Primary, p.Target, p.Under = k.KEK, newest.Version, map[uint32]int{}
	p.Refused = r.refusedRewraps(keyring, k.KEK)
	for _, kek := range r.keks(keyring) {
		if !kek.Retired() {
			p.Live = append(p.Live, kek.Version)
		}
	}
	it, err := r.x.Get(tableVersion, byKEK+"_prefix", prefixKey(keyring))
	mustDB(err)
	for raw := it.Next(); raw != nil; raw = it.Next() {
		v := raw.(*Version)
		p.Versions++
		p.Under[v.KEK]++
		if v.Next != nil && v.Next.KEK == k.KEK {
			p.Rewrapped++
		}
	}
	p.Done = p.Under[k.KEK]
	open := s.OpenBatches(keyring)
	for _, n := range r.residents(k.Residency) {
		owes := newest.Version != k.KEK && !slices.ContainsFunc(newest.Receipts, func(x Receipt) bool { return x.Node == n.ID })
		if owes || slices.ContainsFunc(open, func(b RewrapBatch) bool { return !b.ConfirmedBy(n.ID) }) {
			p.Awaits = append(p.Awaits, n.ID)
		}
	}
	return p, true
}

// RotationWanted reports whether a node that was removed could open the newest KEK
// version of a keyring, and names the last such node: its KEK should be rotated.
func (s *State) RotationWanted(keyring string) (node string, wanted bool) {
	newest, ok := s.NewestKEK(keyring)
	if !ok {
		return "", false
	}
	for _, x := range s.Removals() {
		for _, left := range x.Keyrings {
			if left.Keyring == keyring && left.Version >= newest.Version {
				node, wanted = x.Node.ID, true
			}
		}
	}
	return node, wanted
}

// kekTarget reports whether a proposal is to rotate a keyring's KEK.
func (p Proposal) kekTarget() bool {
	return p.Content.Action == kms.ActionRotate && isKeyringTarget(p.Content.Target)
}

func isKeyringTarget(target string) bool {
	kind, _, err := approval.ParseTarget(target)
	return err == nil && kind == approval.TargetKeyring
}

// madeUnder is the KEK version that wrapped the key version first.
func (v Version) madeUnder() uint32 {
	if v.Made != 0 {
		return v.Made
	}
	return v.KEK
}

// wantsRewraps reports whether what was said about rewraps to a KEK version is still
// kept: until that is retired.
func (s *State) wantsRewraps(keyring string, kek uint32) bool {
	k, ok := s.KEK(keyring, kek)
	return ok && !k.Retired()
}

// wantsBatch reports whether a batch is still kept: until its KEK version is retired
// or a node refuses it.
func (s *State) wantsBatch(b *RewrapBatch) bool {
	_, refused := find[RefusedRewrap](s.read(), tableRewrapRefused, byID, rewrapRefusedID(&RefusedRewrap{Keyring: b.Keyring, KEK: b.KEK, Batch: b.Index}))
	return !refused && s.wantsRewraps(b.Keyring, b.KEK)
}

// wholeWraps checks what a replay alone does not show: that the wrapped material of no
// live key version is left out (the statement of a rewrap covers its hash, and
// material that the state has not is none in a replay), and that nothing in use is
// wrapped under a retired KEK version.
func (s *State) wholeWraps() error {
	return each(s.db.Txn(false), tableVersion, func(v *Version) error {
		if v.State.Gone() || v.KEK == 0 {
			return nil
		}
		path := kms.KeyPath(v.Keyring, v.Key)
		if len(v.Wrapped) == 0 || v.Next != nil && len(v.Next.Wrapped) == 0 {
			return kms.Errorf(kms.Invalid, "snapshot: version %d of key %s has no material", v.Version, path)
		}
		for _, version := range []uint32{v.KEK, v.wrappedBy()} {
			if kek, ok := s.KEK(v.Keyring, version); !ok || kek.Retired() {
				return kms.Errorf(kms.Invalid, "snapshot: version %d of key %s is wrapped under KEK version %d, which is retired", v.Version, path, version)
			}
		}
		return nil
	})
}
