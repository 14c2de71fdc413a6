package approval

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"unicode"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
)

// Limits of a proposal.
const (
	ProposalFormat = 1
	MaxProposal    = 128 << 10 // bytes of its encoding
	MaxReason      = 1000      // bytes
	NonceSize      = 16        // bytes
)

// maxTime is the last millisecond of the year 9999, so that no sum of times
// overflows and every time has a usual written form.
const maxTime = 253402300799999

const proposalDomain = "conclave/proposal/v1\x00"

// Marshal returns the bytes that custodians sign: the canonical encoding.
func (p Proposal) Marshal() []byte { return canon.Marshal(p) }

// ParseProposal decodes exactly what Marshal writes and validates the shape.
// Errors: kms.TooLarge, kms.Invalid.
func ParseProposal(b []byte) (Proposal, error) {
	if len(b) > MaxProposal {
		return Proposal{}, kms.Errorf(kms.TooLarge, "the proposal has %d bytes; the limit is %d", len(b), MaxProposal)
	}
	var p Proposal
	if err := canon.Unmarshal(b, &p); err != nil {
		return Proposal{}, kms.Wrap(kms.Invalid, err, "the proposal is not in canonical form", "")
	}
	if err := p.Validate(); err != nil {
		return Proposal{}, err
	}
	return p, nil
}

// ProposalID returns the identifier of a proposal given as its exact bytes: 32
// hexadecimal digits, the first 16 bytes of SHA-256 over a domain string and b.
func ProposalID(b []byte) string {
	h := sha256.New()
	h.Write([]byte(proposalDomain))
	h.Write(b)
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// Validate checks the shape of the proposal and of its parameters, nothing that
// depends on state. Errors: kms.Invalid.
func (p Proposal) Validate() error {
	bad := func(format string, args ...any) error {
		return kms.Errorf(kms.Invalid, "proposal: %s", fmt.Sprintf(format, args...))
	}
	if p.Format != ProposalFormat {
		return bad("format %d is not known; this program knows %d", p.Format, ProposalFormat)
	}
	if !isHex128(p.Cluster) {
		return bad("cluster is not 32 hexadecimal digits")
	}
	if len(p.Nonce) != NonceSize {
		return bad("nonce has %d bytes, not %d", len(p.Nonce), NonceSize)
	}
	if err := kms.CheckName("policy", p.Policy); err != nil {
		return bad("%v", err)
	}
	if _, err := kms.ParseIdentity(p.Proposer); err != nil {
		return bad("proposer: %v", err)
	}
	if p.Created <= 0 || p.Expires <= p.Created || p.Expires > maxTime {
		return bad("created %d and expires %d are not two times in that order", p.Created, p.Expires)
	}
	if p.NotBefore < 0 || p.NotBefore >= p.Expires {
		return bad("not-before %d is not earlier than expires %d", p.NotBefore, p.Expires)
	}
	if err := checkReason(p.Reason); err != nil {
		return bad("%v", err)
	}
	return p.validateAction(bad)
}

// checkReason keeps out what could mislead the custodian who reads it on a
// terminal: control characters and invisible direction marks.
func checkReason(s string) error {
	if s == "" {
		return fmt.Errorf("reason is missing")
	}
	if len(s) > MaxReason {
		return fmt.Errorf("reason is longer than %d bytes", MaxReason)
	}
	for _, r := range s {
		if r == unicode.ReplacementChar || r != '\n' && !unicode.IsGraphic(r) {
			return fmt.Errorf("reason contains %U, which does not show as text", r)
		}
	}
	return nil
}

// targetKinds are the actions that can be proposed, with what they are about.
var targetKinds = map[kms.Action]string{
	kms.ActionRotate: TargetKey, kms.ActionActivate: TargetKey, kms.ActionSuspend: TargetKey, kms.ActionResume: TargetKey,
	kms.ActionDeactivate: TargetKey, kms.ActionCompromise: TargetKey, kms.ActionDestroy: TargetKey,
	kms.ActionImport: TargetKey, kms.ActionSchedule: TargetKey,
	kms.ActionPolicy: TargetPolicy, kms.ActionCustodian: TargetCustodian, kms.ActionNode: TargetNode,
	kms.ActionSite: TargetSite, kms.ActionRecoveryKey: TargetRecovery, kms.ActionRecover: TargetCluster,
}

// validateAction checks that the target is of the action's kind and that the
// parameters are the action's.
func (p Proposal) validateAction(bad func(string, ...any) error) error {
	kind, name, err := ParseTarget(p.Target)
	if err != nil {
		return bad("%v", err)
	}
	want, ok := targetKinds[p.Action]
	if !ok {
		return bad("action %q cannot be proposed", p.Action)
	}
	if kind != want && !(p.Action == kms.ActionRotate && kind == TargetKeyring) {
		return bad("action %q has a target of the form %s/..., not %q", p.Action, want, p.Target)
	}
	switch p.Action {
	case kms.ActionActivate, kms.ActionDeactivate, kms.ActionCompromise, kms.ActionDestroy:
		v, err := p.VersionParams()
		if err != nil {
			return bad("%v", err)
		}
		if v.Override && p.Action != kms.ActionDeactivate && p.Action != kms.ActionDestroy {
			return bad("action %q has no override: it happens whether the version is in use or not", p.Action)
		}
		if v.Version == 0 && p.Action != kms.ActionDestroy {
			return bad("action %q needs the version that it is about", p.Action)
		}
	case kms.ActionImport:
		if err := p.validateImport(); err != nil {
			return bad("%v", err)
		}
	case kms.ActionSchedule:
		s, err := p.ScheduleParams()
		if err != nil {
			return bad("%v", err)
		}
		if s.RotationPeriod < 0 || s.RotationPeriod > MaxRotationPeriod {
			return bad("the rotation period is %d ms; it must be from 0 (on request only) to ten years", s.RotationPeriod)
		}
	case kms.ActionPolicy:
		pp, err := p.PolicyParams()
		if err != nil {
			return bad("%v", err)
		}
		if err := (Policy{Name: name, Rules: pp.Rules, Attested: pp.Attested, Forbid: pp.Forbid}).Validate(); err != nil {
			return bad("%v", err)
		}
	case kms.ActionCustodian:
		cp, err := p.CustodianParams()
		if err != nil {
			return bad("%v", err)
		}
		if cp.Custodian.ID != name {
			return bad("target %q and parameters name different custodians", p.Target)
		}
		if cp.Custodian.Revision != 0 {
			return bad("the custodian's revision must be 0 in the parameters")
		}
		if err := cp.Custodian.Validate(); err != nil {
			return bad("%v", err)
		}
		if err := cp.validate(); err != nil {
			return bad("%v", err)
		}
	case kms.ActionNode:
		if err := p.validateNode(); err != nil {
			return bad("%v", err)
		}
	case kms.ActionSite:
		if err := p.validateSite(); err != nil {
			return bad("%v", err)
		}
	case kms.ActionRecoveryKey:
		if _, err := ParseRecoveryParams(p.Parameters); err != nil {
			return bad("%v", err)
		}
	case kms.ActionRecover:
		if err := p.validateRecover(name); err != nil {
			return bad("%v", err)
		}
	default:
		if len(p.Parameters) != 0 {
			return bad("action %q has no parameters", p.Action)
		}
	}
	return nil
}

// VersionParams decodes the parameters of activate, deactivate, compromise and destroy.
func (p Proposal) VersionParams() (VersionParams, error) { return params[VersionParams](p) }

// ScheduleParams decodes the parameters of the action schedule.
func (p Proposal) ScheduleParams() (ScheduleParams, error) { return params[ScheduleParams](p) }

// PolicyParams decodes the parameters of the action policy.
func (p Proposal) PolicyParams() (PolicyParams, error) { return params[PolicyParams](p) }

// CustodianParams decodes the parameters of the action custodian.
func (p Proposal) CustodianParams() (CustodianParams, error) { return params[CustodianParams](p) }

// NodeParams decodes the parameters of the action node.
func (p Proposal) NodeParams() (NodeParams, error) { return params[NodeParams](p) }

func params[T any](p Proposal) (v T, err error) {
	if err := canon.Unmarshal(p.Parameters, &v); err != nil {
		return v, kms.Wrap(kms.Invalid, err, fmt.Sprintf("the parameters are not those of the action %q", p.Action), "")
	}
	return v, nil
}

// The kinds of target.
const (
	TargetKey       = "key"
	TargetPolicy    = "policy"
	TargetCustodian = "custodian"
	TargetNode      = "node"
	TargetSite      = "site"
	TargetCluster   = "cluster" // by its lineage
	TargetKeyring   = "keyring" // to rotate its KEK
)

// KeyTarget returns the target of a proposal about a key.
func KeyTarget(keyring, key string) string { return TargetKey + "/" + kms.KeyPath(keyring, key) }

// KeyringTarget returns the target of a proposal to rotate a keyring's KEK.
func KeyringTarget(keyring string) string { return TargetKeyring + "/" + keyring }

// NodeTarget returns the target of a proposal about a node.
func NodeTarget(node string) string { return TargetNode + "/" + node }

// PolicyTarget names a policy as a target.
func PolicyTarget(policy string) string { return TargetPolicy + "/" + policy }

// CustodianTarget names a custodian as a target.
func CustodianTarget(custodian string) string { return TargetCustodian + "/" + custodian }

// ParseTarget splits a target "key/KEYRING/KEY", "keyring/NAME", "policy/NAME",
// "custodian/ID", "node/ID", "site/ID", "recovery/NAME" or "cluster/LINEAGE" into its kind and the name ("KEYRING/KEY" for a key), and
// checks the names. Errors: kms.Invalid.
func ParseTarget(s string) (kind, name string, err error) {
	kind, name, _ = strings.Cut(s, "/")
	switch kind {
	case TargetKey:
		_, _, err = kms.SplitKeyPath(name)
	case TargetKeyring, TargetPolicy, TargetCustodian, TargetNode, TargetSite, TargetRecovery:
		err = kms.CheckName(kind, name)
	case TargetCluster:
		if !isHex128(name) {
			err = kms.Errorf(kms.Invalid, "target %q: a cluster is named by 32 hexadecimal digits", s)
		}
	default:
		err = kms.Errorf(kms.Invalid, "target %q is none of key/KEYRING/KEY, keyring/NAME, policy/NAME, custodian/ID, node/ID, site/ID, recovery/NAME, cluster/LINEAGE", s)
	}
	if err != nil {
		return "", "", err
	}
	return kind, name, nil
}

func isHex128(s string) bool {
	return len(s) == 32 && !slices.ContainsFunc([]byte(s), func(c byte) bool {
		return !(c >= '0' && c <= '9' || c >= 'a' && c <= 'f')
	})
}
