package kms

import "slices"

// State is the state of a key version: NIST SP 800-57 part 1 revision 5, section 7.
type State string

// The states of SP 800-57.
const (
	PreActive            State = "pre-active"
	Active               State = "active"
	Suspended            State = "suspended"
	Deactivated          State = "deactivated"
	Compromised          State = "compromised"
	Destroyed            State = "destroyed"
	DestroyedCompromised State = "destroyed-compromised"
)

// transitions of SP 800-57 part 1 revision 5, figure 3.
var transitions = map[State][]State{
	PreActive:   {Active, Compromised, Destroyed},
	Active:      {Suspended, Deactivated, Compromised, Destroyed},
	Suspended:   {Active, Deactivated, Compromised, Destroyed},
	Deactivated: {Compromised, Destroyed},
	Compromised: {DestroyedCompromised},
	Destroyed:   {DestroyedCompromised},
}

// Valid reports whether s is one of the states.
func (s State) Valid() bool {
	_, ok := transitions[s]
	return ok || s == DestroyedCompromised
}

// CanBecome reports whether the transition from s to next is allowed.
func (s State) CanBecome(next State) bool { return slices.Contains(transitions[s], next) }

// Gone reports whether the material no longer exists.
func (s State) Gone() bool { return s == Destroyed || s == DestroyedCompromised }

// Purpose is the one thing that a key is for.
type Purpose string

// The purposes.
const (
	Encrypt Purpose = "encrypt"
	MAC     Purpose = "mac"
	Sign    Purpose = "sign"
)

// Algorithm names what a key version is, spelled as users type it.
type Algorithm string

// The algorithms. Sizes of the wrapped material: AES256GCM and HMACSHA256 32
// bytes; the EC keys the big-endian scalar (32 or 48); Ed25519 the 32-byte seed.
const (
	AES256GCM  Algorithm = "aes256-gcm"  // ciphertext format 1
	HMACSHA256 Algorithm = "hmac-sha256" // FIPS 198-1
	ECDSAP256  Algorithm = "ecdsa-p256"  // FIPS 186-5, SHA-256
	ECDSAP384  Algorithm = "ecdsa-p384"  // FIPS 186-5, SHA-384
	Ed25519    Algorithm = "ed25519"     // RFC 8032, pure
)

// Algorithms returns the algorithms of a purpose, the default first.
func (p Purpose) Algorithms() []Algorithm {
	switch p {
	case Encrypt:
		return []Algorithm{AES256GCM}
	case MAC:
		return []Algorithm{HMACSHA256}
	case Sign:
		return []Algorithm{ECDSAP256, ECDSAP384, Ed25519}
	}
	return nil
}

// Protection says where key material may be used.
type Protection string

// The protection levels.
const (
	Software Protection = "software" // in locked process memory of a resident node
	Hardware Protection = "hardware" // only inside the device
)

// Generated says where the material of a key version of protection Hardware was
// made. In both cases it leaves that place wrapped for the resident nodes' devices.
type Generated string

// The places.
const (
	InDevice Generated = "device" // in the origin node's device, which wrapped it itself
	OnHost   Generated = "host"   // in locked memory of the origin node, from the device's randomness, wiped at once
)

// Imported is said, in place of where it was made, of material that was brought from
// outside, at any protection level.
const Imported Generated = "imported"

// ImportTPM is the import kind of a TPM 2.0 (TPM2_Import), whose import key is its
// storage key.
const ImportTPM = "tpm2-import"

// Receipts says which resident nodes must prove that they can open a new
// version before it becomes primary.
type Receipts string

// The receipt rules.
const (
	EveryNode Receipts = "every-node" // every resident node
	EverySite Receipts = "every-site" // at least one node at every resident site
)

// Action is something that a policy decides about.
type Action string

// The guarded actions.
const (
	ActionKeyring    Action = "keyring" // create a keyring
	ActionCreate     Action = "create"  // create a key
	ActionRotate     Action = "rotate"
	ActionActivate   Action = "activate" // one version becomes primary without all its receipts
	ActionSuspend    Action = "suspend"
	ActionResume     Action = "resume"
	ActionDeactivate Action = "deactivate" // one version stops decrypting
	ActionSchedule   Action = "schedule"   // a key gets another rotation period
	ActionCompromise Action = "compromise" // one version is marked compromised
	ActionDestroy    Action = "destroy"    // one version, or the whole key
	ActionImport     Action = "import"     // make a key of material from outside
	ActionPolicy     Action = "policy"     // replace a policy
	ActionCustodian  Action = "custodian"  // add, replace or revoke a custodian
	ActionNode       Action = "node"       // a node joins, is promoted or removed, or gets another hardware root
	ActionSite       Action = "site"       // add or remove a site, or change its CAs
	ActionRecover    Action = "recover"    // begin a new epoch from a backup
	// ActionRecoveryKey sets the recovery key of a residency and who holds its shares.
	ActionRecoveryKey Action = "recovery-key"
)

// KeyActions are decided by the policy that a keyring names, GovernanceActions
// by the policy called Governance. A policy must have a rule for every action
// it decides.
var (
	KeyActions        = []Action{ActionCreate, ActionRotate, ActionActivate, ActionSuspend, ActionResume, ActionDeactivate, ActionCompromise, ActionDestroy, ActionImport, ActionSchedule}
	GovernanceActions = []Action{ActionKeyring, ActionPolicy, ActionCustodian, ActionNode, ActionSite, ActionRecoveryKey, ActionRecover}
)

// LaterActions came after the first release, so a policy may lack a rule for one:
// then nobody can do it until the policy has one.
var LaterActions = []Action{ActionActivate, ActionImport, ActionSchedule, ActionSite, ActionRecoveryKey, ActionRecover}

// Governance is the name of the policy that decides GovernanceActions.
const Governance = "governance"
