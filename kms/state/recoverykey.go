package state

import (
	"bytes"
	"crypto/sha256"
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/pqc"
)

// RecoveryKey is the public half of a key to which the KEKs of one residency are
// sealed besides the nodes, for the day on which every device of the residency is
// gone. Nobody has the other half: custodians hold shares of it.
type RecoveryKey struct {
	Name     string                  `cbor:"name"`
	Number   uint64                  `cbor:"number"` // 1, 2, ...: the highest of a name is in use
	Params   approval.RecoveryParams `cbor:"params"`
	Proposal string                  `cbor:"proposal"`
	Time     int64                   `cbor:"time"`  // cluster clock when it was approved
	Index    uint64                  `cbor:"index"` // of the execution in the log
}

// RecoveryCopy is a KEK version sealed to a recovery key by a node of one site. Each
// site of the residency gives one, for none can check another's: a single honest site
// is enough.
type RecoveryCopy struct {
	Keyring   string `cbor:"keyring"`
	Version   uint32 `cbor:"version"`
	Recovery  string `cbor:"recovery"`
	Number    uint64 `cbor:"number"`
	Site      string `cbor:"site"`
	Node      string `cbor:"node"` // that sealed it
	Sealed    []byte `cbor:"sealed"`
	Time      int64  `cbor:"time"`  // cluster clock
	Index     uint64 `cbor:"index"` // of Statement in the log
	Statement []byte `cbor:"statement"`
}

// SealRecovery brings the origin site's copy of a KEK version for a recovery key.
type SealRecovery struct {
	Keyring  string `cbor:"keyring"`
	Version  uint32 `cbor:"version"`
	Recovery string `cbor:"recovery"`
	Number   uint64 `cbor:"number"`
	Sealed   []byte `cbor:"sealed"`
}

// RestoreCopy brings a copy of a KEK version for the next root of a node that came out
// of a recovery ceremony. Any node sends it; its authority are the custodians who
// contributed, and the ceremony's key that they signed.
type RestoreCopy struct {
	Ceremony  []byte             `cbor:"ceremony"` // approval.Ceremony, exact bytes
	Consents  []approval.Consent `cbor:"consents"` // sorted by custodian
	Node      string             `cbor:"node"`
	Root      uint32             `cbor:"root"` // number of the next root
	Keyring   string             `cbor:"keyring"`
	Version   uint32             `cbor:"version"`
	Sealed    []byte             `cbor:"sealed"`
	Signature []byte             `cbor:"signature"` // by the ceremony's key over approval.RestoredMessage
}

// Type implements Command.
func (SealRecovery) Type() Type { return TypeSealRecovery }

// Type implements Command.
func (RestoreCopy) Type() Type { return TypeRestoreCopy }

func recoveryKeyID(k *RecoveryKey) []byte { return numberKey(k.Number, k.Name) }

func recoveryCopyID(c *RecoveryCopy) []byte {
	return append(recoveryCopyKey(c.Keyring, c.Version, c.Number), nameKey(c.Site)...)
}

// recoveryCopyKey begins what recoveryCopyID returns. All recovery keys that a keyring
// ever had are of one name.
func recoveryCopyKey(keyring string, version uint32, number uint64) []byte {
	return append(numberKey(uint64(version), keyring), numberKey(number)...)
}

// recoveryKeys returns the recovery keys in use, by name.
func (r reader) recoveryKeys() []RecoveryKey {
	var l []RecoveryKey
	for _, k := range list[RecoveryKey](r.x, tableRecoveryKey, byID, []byte{}) {
		if n := len(l); n > 0 && l[n-1].Name == k.Name {
			l = l[:n-1]
		}
		l = append(l, k)
	}
	return l
}

func (r reader) recoveryKey(name string) (RecoveryKey, bool) {
	return search(r.recoveryKeys(), func(k RecoveryKey) bool { return k.Name == name })
}

// recoveryFor returns the recovery key of a keyring's residency.
func (r reader) recoveryFor(k Keyring) (RecoveryKey, bool) {
	if k.Protection == kms.Hardware {
		return RecoveryKey{}, false
	}
	return search(r.recoveryKeys(), func(x RecoveryKey) bool { return slices.Equal(x.Params.Residency, k.Residency) })
}

func (r reader) recoveryCopies(keyring string, version uint32) []RecoveryCopy {
	return list[RecoveryCopy](r.x, tableRecoveryCopy, byID, numberKey(uint64(version), keyring))
}

// recoverable reports whether a KEK version can be had back by a ceremony.
func (r reader) recoverable(p Pending) bool {
	return p.Key == "" && len(r.recoveryCopies(p.Keyring, p.Version)) > 0
}

// verifyRecovery checks that the holders named in a proposal for a recovery key are
// custodians who have signed that the KEM keys are theirs.
func (t *tx) verifyRecovery(p approval.Proposal) error {
	if p.Action != kms.ActionRecoveryKey {
		return nil
	}
	params, err := p.RecoveryParams()
	if err != nil {
		return err
	}
	for _, h := range params.Holders {
		c, ok := t.reader().custodian(h.Custodian)
		if !ok {
			return kms.Errorf(kms.NotFound, "there is no custodian %s to hold a share", h.Custodian)
		}
		if err := h.VerifyCard(t.before.cluster, c); err != nil {
			return err
		}
	}
	return nil
}

// setRecoveryKey does what a proposal about a recovery key says.
func (t *tx) setRecoveryKey(name string, p approval.Proposal) error {
	params, err := p.RecoveryParams()
	if err != nil {
		return err
	}
	kind := CommandKind{TypeSealRecovery, 1}
	if lacking := t.before.Lacking(kind); len(lacking) > 0 && !t.replay {
		return kms.Errorf(kms.Unavailable, "the release that node %s runs has not announced that it knows recovery keys; start the node, with a newer release if need be", lacking[0])
	}
	r := t.reader()
	if err := r.governance().Allow(params.Suite, "the recovery key "+name); err != nil {
		return err
	}
	for _, site := range params.Residency {
		if _, _, ok := r.site(site); !ok {
			return kms.Errorf(kms.NotFound, "there is no site %s", site)
		}
	}
	for _, k := range r.recoveryKeys() {
		switch same := slices.Equal(k.Params.Residency, params.Residency); {
		case k.Name == name && !same:
			return kms.Errorf(kms.Conflict, "recovery key %s is for another residency; take another name", name)
		case k.Name != name && same:
			return kms.Errorf(kms.Exists, "recovery key %s is for this residency; replace it under its name", k.Name)
		}
	}
	for _, k := range list[RecoveryKey](r.x, tableRecoveryKey, byID, []byte{}) {
		if bytes.Equal(k.Params.PublicKey, params.PublicKey) || bytes.Equal(k.Params.Nonce, params.Nonce) {
			return kms.Errorf(kms.Conflict, "recovery key %s number %d is or was this very key; make a new one", k.Name, k.Number)
		}
	}
	old, _ := r.recoveryKey(name)
	insert(t.Txn, tableRecoveryKey, RecoveryKey{
		Name: name, Number: old.Number + 1, Params: params, Proposal: approval.ProposalID(p.Marshal()), Time: t.clock, Index: t.index,
	})
	t.voidTarget(p.Target)
	t.event(Event{Type: EventRecoveryKeySet, Proposal: approval.ProposalID(p.Marshal())})
	return nil
}

func (c SealRecovery) validate(e Envelope) error {
	if err := kms.CheckName("keyring", c.Keyring); err != nil {
		return err
	}
	if err := kms.CheckName("recovery key", c.Recovery); err != nil {
		return err
	}
	switch {
	case c.Version == 0 || c.Number == 0:
		return kms.Errorf(kms.Invalid, "a copy for a recovery key needs the versions of both")
	case len(c.Sealed) == 0 || len(c.Sealed) > MaxSealed:
		return kms.Errorf(kms.Invalid, "the copy for the recovery key has %d bytes; it must have 1 to %d", len(c.Sealed), MaxSealed)
	case e.Principal != "":
		return kms.Errorf(kms.Invalid, "a node seals to a recovery key on nobody's behalf")
	}
	return noExpect(e)
}

func (SealRecovery) verify(*tx) error { return nil }

func (c SealRecovery) apply(t *tx) error {
	k, err := t.keyringFor(c.Keyring)
	if err != nil {
		return err
	}
	r := t.reader()
	kek, ok := r.kek(c.Keyring, c.Version)
	key, set := r.recoveryFor(k)
	n, _ := t.before.Node(t.env.Origin)
	switch {
	case !ok:
		return kms.Errorf(kms.NotFound, "keyring %s has no KEK version %d", c.Keyring, c.Version)
	case kek.Retired():
		return kms.Errorf(kms.Conflict, "KEK version %d of keyring %s is retired", c.Version, c.Keyring)
	case !set || key.Name != c.Recovery || key.Number != c.Number:
		return kms.Errorf(kms.Conflict, "recovery key %s number %d is not the one of the residency of keyring %s", c.Recovery, c.Number, c.Keyring)
	}
	copied := RecoveryCopy{
		Keyring: c.Keyring, Version: c.Version, Recovery: c.Recovery, Number: c.Number, Site: n.Site, Node: n.ID, Sealed: c.Sealed,
		Time: t.clock, Index: t.index, Statement: t.raw,
	}
	if _, exists := find[RecoveryCopy](t.Txn, tableRecoveryCopy, byID, recoveryCopyID(&copied)); exists {
		return kms.Errorf(kms.Exists, "site %s has given its copy of KEK version %d of keyring %s", n.Site, c.Version, c.Keyring)
	}
	insert(t.Txn, tableRecoveryCopy, copied)
	if len(t.reader().unrecoverableAt(k, kek.Version, key)) == 0 { // the key before it has done its service
		t.dropRecoveryCopies(c.Keyring, c.Version, func(x RecoveryCopy) bool { return x.Number < c.Number })
	}
	t.event(Event{Type: EventRecoverySealed, Keyring: c.Keyring, Version: c.Version, Node: n.ID})
	return nil
}

// unrecoverableAt returns the sites of a residency that have a node and have given no
// copy of a KEK version for a recovery key.
func (r reader) unrecoverableAt(k Keyring, version uint32, key RecoveryKey) []string {
	given := list[RecoveryCopy](r.x, tableRecoveryCopy, byID, recoveryCopyKey(k.Name, version, key.Number))
	var sites []string
	for _, n := range r.residents(k.Residency) {
		if !slices.Contains(sites, n.Site) && !slices.ContainsFunc(given, func(c RecoveryCopy) bool { return c.Site == n.Site }) {
			sites = append(sites, n.Site)
		}
	}
	return sites
}

func (t *tx) dropRecoveryCopies(keyring string, version uint32, which func(RecoveryCopy) bool) {
	for _, c := range t.reader().recoveryCopies(keyring, version) {
		if which(c) {
			mustDB(t.Delete(tableRecoveryCopy, &c))
		}
	}
}

func (c RestoreCopy) validate(e Envelope) error {
	for what, name := range map[string]string{"node": c.Node, "keyring": c.Keyring} {
		if err := kms.CheckName(what, name); err != nil {
			return kms.Errorf(kms.Invalid, "the %s that a ceremony's copy is for is not named", what)
		}
	}
	s, _ := pqc.Lookup(pqc.MLDSA65Ed25519)
	switch {
	case c.Version == 0 || c.Root == 0:
		return kms.Errorf(kms.Invalid, "a ceremony's copy needs a version, and the number of a root")
	case len(c.Sealed) == 0 || len(c.Sealed) > MaxSealed || len(c.Signature) != s.SignatureSize:
		return kms.Errorf(kms.Invalid, "a ceremony's copy, or the signature over it, does not have the right length")
	}
	if err := sortedIDs("custodian of the ceremony", c.Consents, approval.MaxRecoveryHolders, func(x approval.Consent) string { return x.Custodian }); err != nil {
		return err
	}
	if _, err := approval.ParseCeremony(c.Ceremony); err != nil {
		return err
	}
	return noExpect(e)
}

// verify checks the custodians' consents and the signature of the key that they signed.
func (c RestoreCopy) verify(t *tx) error {
	ceremony, err := approval.ParseCeremony(c.Ceremony)
	if err != nil {
		return err
	}
	for _, x := range c.Consents {
		cust, ok := t.reader().custodian(x.Custodian)
		if !ok {
			return kms.Errorf(kms.Denied, "there is no custodian %s", x.Custodian)
		}
		if err := x.Verify(cust, c.Ceremony); err != nil {
			return err
		}
	}
	m := approval.RestoredMessage(c.Ceremony, c.Node, c.Root, c.Keyring, c.Version, c.Sealed)
	if err := pqc.Verify(pqc.MLDSA65Ed25519, ceremony.Signing, m, []byte(approval.RestoredContext), c.Signature); err != nil {
		return kms.Wrap(kms.BadSignature, err, "the ceremony's key has not signed this copy", "")
	}
	return nil
}

func (c RestoreCopy) apply(t *tx) error {
	ceremony, err := approval.ParseCeremony(c.Ceremony)
	if err != nil {
		return err
	}
	r := t.reader()
	k, ok := r.keyring(c.Keyring)
	if !ok {
		return kms.Errorf(kms.NotFound, "there is no keyring %s", c.Keyring)
	}
	if err := t.checkCeremony(ceremony, k, c); err != nil {
		return err
	}
	next, pending := r.replacement(c.Node)
	to, named := ceremony.Recipient(c.Node)
	sum := sha256.Sum256(next.New.Agreement)
	switch {
	case !pending || next.Root != c.Root:
		return kms.Errorf(kms.Conflict, "node %s has no next hardware root of number %d", c.Node, c.Root)
	case !named || to.Root != c.Root || !bytes.Equal(to.Agreement, sum[:]):
		return kms.Errorf(kms.Denied, "the ceremony was not for the next hardware root of node %s", c.Node)
	}
	kek, ok := r.kek(c.Keyring, c.Version)
	if !ok || kek.Retired() {
		return kms.Errorf(kms.NotFound, "keyring %s has no KEK version %d in use", c.Keyring, c.Version)
	}
	if kek.Copies, err = (Reseal{Node: c.Node, Root: c.Root, Keyring: c.Keyring, Sealed: c.Sealed}).add(t, kek.Copies); err != nil {
		return err
	}
	insert(t.Txn, tableKEK, kek)
	insert(t.Txn, tableResealed, resealed{
		Node: c.Node, Root: c.Root, Keyring: c.Keyring, Version: c.Version, Origin: t.env.Origin, Time: t.clock, Index: t.index, Statement: t.raw,
	})
	t.event(Event{Type: EventRestored, Keyring: c.Keyring, Version: c.Version, Node: c.Node})
	return nil
}

// checkCeremony holds a ceremony against the cluster, the recovery key of the keyring
// and who consented: as many holders of as many sites as the key takes.
func (t *tx) checkCeremony(c approval.Ceremony, k Keyring, cmd RestoreCopy) error {
	key, ok := t.reader().recoveryKeyNumber(c.Recovery, c.Number)
	switch {
	case c.Cluster != t.before.cluster:
		return kms.Errorf(kms.Invalid, "the ceremony is of another cluster")
	case t.clock >= c.Expires:
		return kms.Errorf(kms.Expired, "the ceremony has expired; begin another one")
	case !ok || !slices.Equal(key.Params.Residency, k.Residency):
		return kms.Errorf(kms.Conflict, "recovery key %s number %d is not one of the residency of keyring %s", c.Recovery, c.Number, k.Name)
	}
	var sites []string
	for _, x := range cmd.Consents {
		at, holds := key.Params.Holder(x.Custodian)
		if !holds {
			return kms.Errorf(kms.Denied, "custodian %s holds no share of recovery key %s number %d", x.Custodian, key.Name, key.Number)
		}
		sites = append(sites, key.Params.Holders[at].Site)
	}
	slices.Sort(sites)
	if len(sites) < int(key.Params.Threshold) || len(slices.Compact(sites)) < int(key.Params.Sites) {
		return kms.Errorf(kms.NeedsApproval, "the ceremony has contributions of %d custodians; it takes %d from %d sites", len(cmd.Consents), key.Params.Threshold, key.Params.Sites)
	}
	return nil
}

func (r reader) recoveryKeyNumber(name string, number uint64) (RecoveryKey, bool) {
	return find[RecoveryKey](r.x, tableRecoveryKey, byID, numberKey(number, name))
}

// RecoveryKeys returns the recovery keys in use, sorted by name.
func (s *State) RecoveryKeys() []RecoveryKey { return s.reader().recoveryKeys() }

// RecoveryKeyOf returns the recovery key of that name in use.
func (s *State) RecoveryKeyOf(name string) (RecoveryKey, bool) { return s.reader().recoveryKey(name) }

// AllRecoveryKeys returns the recovery keys that there are and were, by name and number.
func (s *State) AllRecoveryKeys() []RecoveryKey {
	return list[RecoveryKey](s.read(), tableRecoveryKey, byID, []byte{})
}

// RecoveryCopies returns the copies of a KEK version for recovery keys.
func (s *State) RecoveryCopies(keyring string, version uint32) []RecoveryCopy {
	return s.reader().recoveryCopies(keyring, version)
}

// Unrecoverable lists the KEK versions of which a node's site has yet to give a copy for
// the recovery key of their residency.
func (s *State) Unrecoverable(node string) (l []Pending) {
	r := s.reader()
	n, _ := r.node(node)
	if n.Root == 0 || len(r.recoveryKeys()) == 0 {
		return nil
	}
	for _, k := range r.keyrings() {
		key, set := r.recoveryFor(k)
		if !set || !slices.Contains(k.Residency, n.Site) {
			continue
		}
		for _, kek := range r.keks(k.Name) {
			if !kek.Retired() && hasCopy(kek.Copies, n.ID, n.Root) && slices.Contains(r.unrecoverableAt(k, kek.Version, key), n.Site) {
				l = append(l, Pending{Keyring: k.Name, Version: kek.Version})
			}
		}
	}
	return l
}

// RecoveryFor returns the recovery key of a keyring's residency.
func (s *State) RecoveryFor(keyring string) (RecoveryKey, bool) {
	k, ok := s.Keyring(keyring)
	if !ok {
		return RecoveryKey{}, false
	}
	return s.reader().recoveryFor(k)
}
