package engine

import (
	"bytes"
	"slices"
	"sync/atomic"

	"github.com/cedar-policy/cedar-go"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
)

// Action is what a caller wants to do, as access policies name it:
// Action::"encrypt".
type Action string

// Actions on a key, Key::"KEYRING/KEY".
const (
	ActEncrypt        Action = "encrypt"
	ActDecrypt        Action = "decrypt"
	ActRewrap         Action = "rewrap"
	ActDataKey        Action = "datakey"
	ActDataKeyWrapped Action = "datakey-wrapped"
	ActMAC            Action = "mac"
	ActVerifyMAC      Action = "verify-mac"
	ActSign           Action = "sign"
	ActVerify         Action = "verify"
	ActPublicKey      Action = "public-key"
	ActExport         Action = "export"          // a data key, sealed to a recipient
	ActExportMaterial Action = "export-material" // the key version itself, sealed to a recipient
	ActReadKey        Action = "key:read"        // also on Keyring::"KEYRING" to list its keys
)

// Actions on a keyring, Keyring::"KEYRING".
const (
	ActReadKeyring Action = "keyring:read" // also on System::"cluster" to list them
	ActCreateKey   Action = "key:create"
)

// Actions on System::"cluster".
const (
	ActCreateKeyring Action = "keyring:create"
	ActReadCluster   Action = "cluster:read" // nodes, sites, custodians, policies
	ActReadStatus    Action = "status:read"
	ActReadMetrics   Action = "metrics:read"
	ActOpenProposal  Action = "proposal:open"
	ActReadProposal  Action = "proposal:read"
	ActVote          Action = "proposal:vote" // submit a custodian's signed statement
	ActReadEvidence  Action = "evidence:read"
	ActCreateBackup  Action = "backup:create"
)

// DefaultAccess returns the text of the Cedar policy set that a new cluster
// starts with. Operators administer and never use keys; services use keys of the
// keyrings that are resident at their own site, but do not take key material
// away; custodians read and vote; auditors read.
//
// What a policy can speak about: principal Principal::"SPIFFE ID" with the
// attributes role, site and trustDomain, in Role::"ROLE" and Site::"SITE";
// resource Key::"KEYRING/KEY" (attributes residency, protection, policy,
// purpose, algorithm) in Keyring::"KEYRING" (residency, protection, policy), or
// System::"cluster". Attributes are absent where the thing does not exist.
func DefaultAccess() string { return defaultAccess }

const defaultAccess = `// Whoever is authenticated may ask how the cluster is.
permit (principal, action == Action::"status:read", resource);

// Operators administer. They never use keys.
permit (
  principal in Role::"operator",
  action in [
    Action::"keyring:create", Action::"keyring:read", Action::"key:create", Action::"key:read",
    Action::"proposal:open", Action::"proposal:read", Action::"proposal:vote",
    Action::"cluster:read", Action::"evidence:read", Action::"metrics:read", Action::"backup:create"
  ],
  resource
);

// Services use the keys of keyrings that are resident at their own site.
permit (
  principal in Role::"service",
  action in [
    Action::"encrypt", Action::"decrypt", Action::"rewrap", Action::"datakey", Action::"datakey-wrapped",
    Action::"mac", Action::"verify-mac", Action::"sign", Action::"verify", Action::"public-key",
    Action::"export", Action::"key:read", Action::"keyring:read"
  ],
  resource
) when {
  resource has residency && resource.residency.contains(principal.site)
};

// Custodians read and vote, and may propose.
permit (
  principal in Role::"custodian",
  action in [
    Action::"proposal:open", Action::"proposal:read", Action::"proposal:vote",
    Action::"cluster:read", Action::"evidence:read", Action::"keyring:read", Action::"key:read"
  ],
  resource
);

// Auditors read.
permit (
  principal in Role::"auditor",
  action in [
    Action::"proposal:read", Action::"cluster:read", Action::"evidence:read",
    Action::"keyring:read", Action::"key:read", Action::"metrics:read"
  ],
  resource
);
`

// level says what kind of thing a resource is.
type level uint8

const (
	system level = iota
	aRing
	aKey
)

// resource is what an action is about: the cluster (the zero value), a keyring or
// a key. The revisions, 0 for what does not exist, number the attributes that
// policies see.
type resource struct {
	level                     level
	keyring, key              string
	ringRevision, keyRevision uint64
}

func ofRing(keyring string) resource     { return resource{level: aRing, keyring: keyring} }
func ofKey(keyring, key string) resource { return resource{level: aKey, keyring: keyring, key: key} }

// check refuses names that cannot exist, so that they reach no log.
func (r resource) check() error {
	if r.level == system {
		return nil
	}
	if err := kms.CheckName("keyring", r.keyring); err != nil || r.level == aRing {
		return err
	}
	return kms.CheckName("key", r.key)
}

// find returns the resource with the revisions of the state, and its records.
func (r resource) find(st *state.State) (resource, found) {
	var f found
	if r.level >= aRing {
		if kr, ok := st.Keyring(r.keyring); ok {
			f.ring, r.ringRevision = &kr, kr.Revision
		}
	}
	if r.level >= aKey {
		if k, ok := st.Key(r.keyring, r.key); ok {
			f.key, r.keyRevision = &k, k.Revision
		}
	}
	return r, f
}

// at returns the resource with the revisions of the state.
func (r resource) at(st *state.State) resource {
	r, _ = r.find(st)
	return r
}

// uid returns the resource as an entity of the policy language.
func (r resource) uid() cedar.EntityUID {
	switch r.level {
	case aKey:
		return cedar.NewEntityUID("Key", cedar.String(kms.KeyPath(r.keyring, r.key)))
	case aRing:
		return cedar.NewEntityUID("Keyring", cedar.String(r.keyring))
	}
	return cedar.NewEntityUID("System", "cluster")
}

// name is the resource as the access log names it.
func (r resource) name() string {
	switch r.level {
	case aKey:
		return kms.KeyPath(r.keyring, r.key)
	case aRing:
		return r.keyring
	}
	return "cluster"
}

// policies is a parsed policy set.
type policies struct {
	text       []byte // the state's own, so that comparing is one of addresses
	set        *cedar.PolicySet
	generation uint64
}

// access decides who may do what. The zero value is ready for use.
type access struct {
	current    atomic.Pointer[policies]
	generation atomic.Uint64
	cache      decisionCache
}

// CheckAccess reports whether text is a policy set that the engine can use.
// Errors: kms.Invalid.
func CheckAccess(text []byte) error {
	_, err := parseAccess(text)
	return err
}

func parseAccess(text []byte) (*cedar.PolicySet, error) {
	set, err := cedar.NewPolicySetFromBytes("access", text)
	if err != nil {
		return nil, kms.Wrap(kms.Invalid, err, "the access policy does not parse", "see the cedar policy language's grammar")
	}
	return set, nil
}

// load returns the parsed form of the state's access policy, parsing it only
// when its text has changed.
func (a *access) load(st *state.State) (*policies, error) {
	text := st.Access()
	if p := a.current.Load(); p != nil && bytes.Equal(p.text, text) {
		return p, nil
	}
	set, err := parseAccess(text)
	if err != nil {
		return nil, kms.Wrap(kms.Denied, err, "the cluster's access policy cannot be read, so nothing is permitted", "an administrator must repair it")
	}
	p := &policies{text: text, set: set, generation: a.generation.Add(1)}
	a.current.Store(p)
	return p, nil
}

// allow returns nil if the policies permit the action, else kms.Denied. The
// decision for the same identity, action, resource revision and policy text is
// taken once; sites and nodes, which a decision also depends on, are fixed by
// the genesis.
func (a *access) allow(st *state.State, id kms.Identity, act Action, res resource) error {
	p, err := a.load(st)
	if err != nil {
		return err
	}
	k := decisionKey{id: id, action: act, resource: res, generation: p.generation}
	ok, known := a.cache.get(k)
	if !known {
		ok = decide(p.set, st, id, act, res)
		a.cache.put(k, ok)
	}
	if !ok {
		return denied(id, act, res)
	}
	return nil
}

func denied(id kms.Identity, act Action, res resource) error {
	u := res.uid()
	return &kms.Error{
		Kind: kms.Denied,
		Msg:  id.String() + " may not " + string(act) + " " + u.String(),
		Fix:  "an administrator's access policy must permit Action::\"" + string(act) + "\" on it",
	}
}

// decide evaluates the policies. A forbid policy that fails to evaluate denies:
// skipping it, as the language does, would open what it was to close.
func decide(set *cedar.PolicySet, st *state.State, id kms.Identity, act Action, res resource) bool {
	principal, ok := principalEntity(st, id)
	if !ok {
		return false // no site speaks for the trust domain
	}
	entities := cedar.EntityMap{principal.UID: principal}
	for _, e := range resourceEntities(st, res) {
		entities[e.UID] = e
	}
	decision, diag := cedar.Authorize(set, entities, cedar.Request{
		Principal: principal.UID,
		Action:    cedar.NewEntityUID("Action", cedar.String(act)),
		Resource:  res.uid(),
		Context:   cedar.NewRecord(nil),
	})
	for _, e := range diag.Errors {
		if p := set.Get(e.PolicyID); p == nil || p.Effect() == cedar.Forbid {
			return false
		}
	}
	return decision == cedar.Allow
}

func principalEntity(st *state.State, id kms.Identity) (cedar.Entity, bool) {
	site, ok := siteOf(st, id.TrustDomain)
	if !ok {
		return cedar.Entity{}, false
	}
	return cedar.Entity{
		UID: cedar.NewEntityUID("Principal", cedar.String(id.String())),
		Parents: cedar.NewEntityUIDSet(
			cedar.NewEntityUID("Role", cedar.String(id.Role)),
			cedar.NewEntityUID("Site", cedar.String(site)),
		),
		Attributes: cedar.NewRecord(cedar.RecordMap{
			"role":        cedar.String(id.Role),
			"site":        cedar.String(site),
			"trustDomain": cedar.String(id.TrustDomain),
		}),
	}, true
}

// siteOf returns the site that speaks for a trust domain.
func siteOf(st *state.State, trustDomain string) (string, bool) {
	sites := st.Sites()
	i := slices.IndexFunc(sites, func(s state.Site) bool { return s.TrustDomain == trustDomain })
	if i < 0 {
		return "", false
	}
	return sites[i].ID, true
}

func resourceEntities(st *state.State, res resource) []cedar.Entity {
	if res.level == system {
		return []cedar.Entity{{UID: res.uid()}}
	}
	ring := cedar.Entity{UID: ofRing(res.keyring).uid()}
	attrs := cedar.RecordMap{}
	if kr, ok := st.Keyring(res.keyring); ok {
		sites := make([]cedar.Value, len(kr.Residency))
		for i, s := range kr.Residency {
			sites[i] = cedar.String(s)
		}
		attrs["residency"] = cedar.NewSet(sites...)
		attrs["protection"] = cedar.String(kr.Protection)
		attrs["policy"] = cedar.String(kr.Policy)
	}
	ring.Attributes = cedar.NewRecord(attrs)
	if res.level == aRing {
		return []cedar.Entity{ring}
	}
	if k, ok := st.Key(res.keyring, res.key); ok {
		attrs["purpose"] = cedar.String(k.Purpose)
		attrs["algorithm"] = cedar.String(k.Algorithm)
	}
	return []cedar.Entity{ring, {
		UID:        res.uid(),
		Parents:    cedar.NewEntityUIDSet(ring.UID),
		Attributes: cedar.NewRecord(attrs),
	}}
}
