package state

import (
	"crypto/sha256"
	"crypto/subtle"
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

func (c CreateKeyring) validate(e Envelope) error {
	if err := kms.CheckName("keyring", c.Name); err != nil {
		return err
	}
	if err := sortedIDs("site of the residency", c.Residency, MaxSites, func(s string) string { return s }); err != nil {
		return err
	}
	if err := kms.CheckName("policy", c.Policy); err != nil {
		return err
	}
	switch {
	case c.Protection != kms.Software && c.Protection != kms.Hardware:
		return kms.Errorf(kms.Invalid, "protection %q is none of %s, %s", c.Protection, kms.Software, kms.Hardware)
	case c.Receipts != kms.EveryNode && c.Receipts != kms.EverySite:
		return kms.Errorf(kms.Invalid, "receipt rule %q is none of %s, %s", c.Receipts, kms.EveryNode, kms.EverySite)
	case c.MaxStaleness < MinStaleness || c.MaxStaleness > MaxStaleness:
		return kms.Errorf(kms.Invalid, "max_staleness is %d ms; it must be from 1 second to 7 days", c.MaxStaleness)
	case c.Policy == kms.Governance:
		return kms.Errorf(kms.Invalid, "the policy %q decides about no keys; name another one", c.Policy)
	}
	if err := c.validateKEK(); err != nil {
		return err
	}
	return noExpect(e)
}

// validateKEK checks the sealed copies of the KEK, which keyrings of protection
// hardware do not have.
func (c CreateKeyring) validateKEK() error {
	if c.Protection == kms.Hardware {
		if len(c.Copies) != 0 || len(c.Checks) != 0 {
			return kms.Errorf(kms.Invalid, "a keyring of protection %s has no KEK; it comes without copies and checks", kms.Hardware)
		}
		return nil
	}
	if err := validateCopies(c.Copies); err != nil {
		return err
	}
	return validateChecks(c.Checks)
}

func (CreateKeyring) verify(*tx) error { return nil }

func (c CreateKeyring) apply(t *tx) error {
	r := t.reader()
	governance, _ := r.policy(kms.Governance)
	rule, _ := governance.Rule(kms.ActionKeyring)
	if err := t.direct(rule); err != nil {
		return err
	}
	if _, exists := r.keyring(c.Name); exists {
		return kms.Errorf(kms.Exists, "keyring %s exists", c.Name)
	}
	policy, ok := r.policy(c.Policy)
	if !ok {
		return kms.Errorf(kms.NotFound, "there is no policy %s", c.Policy)
	}
	for _, site := range c.Residency {
		if _, ok := t.before.Site(site); !ok {
			return kms.Errorf(kms.NotFound, "there is no site %s", site)
		}
	}
	if err := t.residentOrigin(c.Name, c.Residency); err != nil {
		return err
	}
	kek := uint32(1)
	if c.Protection == kms.Hardware {
		kek = 0
	}
	nodes := r.residents(c.Residency)
	if err := c.checkNodes(nodes); err != nil {
		return err
	}
	if err := allowCopies(policy, nodes); err != nil {
		return err
	}
	if policy.Attested {
		if err := t.before.attested("policy "+policy.Name, nodes); err != nil {
			return err
		}
	}
	insert(t.Txn, tableKeyring, Keyring{
		Name: c.Name, Residency: c.Residency, Protection: c.Protection, Policy: c.Policy, Receipts: c.Receipts,
		MaxStaleness: c.MaxStaleness, Survive: c.Survive, KEK: kek, Created: t.clock, Creator: t.env.Principal,
		Revision: 1, Index: t.index, Statement: t.raw,
	})
	if kek != 0 {
		insert(t.Txn, tableKEK, KEK{Keyring: c.Name, Version: kek, Copies: c.Copies, Checks: c.Checks, Created: t.clock})
	}
	t.event(Event{Type: EventKeyringCreated, Keyring: c.Name, Version: kek})
	return nil
}

// checkNodes holds the copies and checks against the resident nodes; for
// protection hardware, whether their devices take keys from others.
func (c CreateKeyring) checkNodes(nodes []Node) error {
	if c.Protection == kms.Hardware {
		for _, n := range nodes {
			if n.ImportKind == "" {
				return kms.Errorf(kms.Conflict, "the device of node %s takes no keys from others, so keyring %s cannot have protection %s", n.ID, c.Name, kms.Hardware)
			}
		}
		return nil
	}
	if err := checkCopies(nodes, c.Copies); err != nil {
		return err
	}
	return exactly("check", nodes, func(i int) string { return c.Checks[i].Node }, len(c.Checks))
}

// keyRule returns the rule of a keyring's policy for an action.
func (r reader) keyRule(k Keyring, a kms.Action) (approval.Rule, error) {
	p, ok := r.policy(k.Policy)
	if !ok {
		return approval.Rule{}, kms.Errorf(kms.NotFound, "there is no policy %s", k.Policy)
	}
	rule, ok := p.Rule(a)
	if !ok {
		return approval.Rule{}, kms.Errorf(kms.Invalid, "policy %s has no rule for %q", p.Name, a)
	}
	return rule, nil
}

func (c GiveReceipt) validate(e Envelope) error {
	if err := kms.CheckName("keyring", c.Keyring); err != nil {
		return err
	}
	if c.Key != "" {
		if err := kms.CheckName("key", c.Key); err != nil {
			return err
		}
	}
	if c.Version == 0 || len(c.KCV) == 0 || len(c.KCV) > MaxSignature {
		return kms.Errorf(kms.Invalid, "receipt: it needs a version and a key check value of %d bytes or a signature", HashSize)
	}
	if e.Principal != "" {
		return kms.Errorf(kms.Invalid, "receipt: a node gives it on nobody's behalf")
	}
	return noExpect(e)
}

func (c GiveReceipt) apply(t *tx) error {
	k, err := t.keyringFor(c.Keyring)
	if err != nil {
		return err
	}
	if c.Key != "" {
		return c.applyVersion(t, k)
	}
	kek, ok := find[KEK](t.Txn, tableKEK, byID, numberKey(uint64(c.Version), c.Keyring))
	if !ok {
		return kms.Errorf(kms.NotFound, "keyring %s has no KEK version %d", c.Keyring, c.Version)
	}
	if kek.Retired() {
		return kms.Errorf(kms.Conflict, "KEK version %d of keyring %s is retired", c.Version, c.Keyring)
	}
	before := t.reader().provenKEK(k, kek)
	if err := t.checkValue(c, kek.Checks); err != nil {
		return err
	}
	if kek.Receipts, err = t.receive(c, kek.Receipts); err != nil {
		return err
	}
	insert(t.Txn, tableKEK, kek)
	t.event(Event{Type: EventReceipt, Keyring: c.Keyring, Version: c.Version, Node: t.env.Origin})
	if !before && t.reader().provenKEK(k, kek) {
		t.event(Event{Type: EventKEKReceiptsComplete, Keyring: c.Keyring, Version: c.Version})
	}
	t.activateKEK(k, kek)
	return nil
}

// checkValue holds the key check value in the origin's receipt against its check.
func (t *tx) checkValue(c GiveReceipt, checks []Check) error {
	check, ok := search(checks, func(x Check) bool { return x.Node == t.env.Origin })
	if !ok {
		return kms.Errorf(kms.NotFound, "no receipt is asked of node %s for this version", t.env.Origin)
	}
	sum := sha256.Sum256(c.KCV)
	if len(c.KCV) != HashSize || subtle.ConstantTimeCompare(sum[:], check.Hash) != 1 {
		return kms.Errorf(kms.Invalid, "the key check value of node %s is not that of this version", t.env.Origin)
	}
	return nil
}

// receive adds the origin's receipt, whose value has been checked.
func (t *tx) receive(c GiveReceipt, receipts []Receipt) ([]Receipt, error) {
	node := t.env.Origin
	at, exists := slices.BinarySearchFunc(receipts, node, func(r Receipt, n string) int {
		switch {
		case r.Node < n:
			return -1
		case r.Node > n:
			return 1
		}
		return 0
	})
	if exists {
		return nil, kms.Errorf(kms.Exists, "node %s has given its receipt", node)
	}
	r := Receipt{Node: node, KCV: c.KCV, Time: t.clock, Index: t.index, Statement: t.raw}
	return slices.Insert(slices.Clone(receipts), at, r), nil
}

// proven reports whether receipts satisfy the keyring's receipt rule among the resident
// nodes that are asked for one: those that were there when the version came. Sites
// without such a node do not count.
func (r reader) proven(k Keyring, receipts []Receipt, asked func(Node) bool) bool {
	sites := make(map[string]bool)
	for _, n := range r.residents(k.Residency) {
		if !asked(n) {
			continue
		}
		given := slices.ContainsFunc(receipts, func(x Receipt) bool { return x.Node == n.ID })
		if !given && k.Receipts != kms.EverySite {
			return false
		}
		sites[n.Site] = sites[n.Site] || given
	}
	for _, given := range sites {
		if !given {
			return false
		}
	}
	return len(sites) > 0
}

// provenKEK reports whether the receipts of a KEK version satisfy the receipt rule.
func (r reader) provenKEK(k Keyring, kek KEK) bool {
	return r.proven(k, kek.Receipts, func(n Node) bool {
		return slices.ContainsFunc(kek.Checks, func(c Check) bool { return c.Node == n.ID })
	})
}
