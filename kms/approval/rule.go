package approval

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms"
)

// Bounds of a rule's times, in milliseconds, and of its lists.
const (
	MinLifetime = int64(time.Minute / time.Millisecond)
	MaxLifetime = int64(90 * 24 * time.Hour / time.Millisecond)
	MinUnused   = int64(time.Hour / time.Millisecond)
	MaxUnused   = int64(3650 * 24 * time.Hour / time.Millisecond)
	// MaxRotationPeriod is the longest rotation period of a key, ten years.
	MaxRotationPeriod = MaxUnused

	MaxDelay        = int64(30 * 24 * time.Hour / time.Millisecond)
	MinDestroyDelay = int64(7 * 24 * time.Hour / time.Millisecond)
	MaxThreshold    = 1000 // of Approvals and Sites, and entries of Required and Veto
)

var roles = []string{"auditor", "custodian", "node", "operator", "service"}

// Quorum reports whether the rule has the form of a quorum: both thresholds at
// least 1 and no direct roles.
func (r Rule) Quorum() bool { return r.Approvals > 0 && r.Sites > 0 && len(r.Direct) == 0 }

// Validate checks the rule's shape: a known action, direct or quorum but not
// both, no threshold omitted, times within bounds, lists sorted without
// repetition. Errors are kms.Invalid and name the action.
func (r Rule) Validate() error {
	bad := func(format string, args ...any) error {
		return kms.Errorf(kms.Invalid, "rule for %q: %s", r.Action, fmt.Sprintf(format, args...))
	}
	if !slices.Contains(kms.KeyActions, r.Action) && !slices.Contains(kms.GovernanceActions, r.Action) {
		return bad("there is no such action")
	}
	if len(r.Direct) > 0 {
		return r.validateDirect(bad)
	}
	if r.Approvals == 0 {
		return bad("approvals is missing; it must be at least 1, or name the roles that may act alone in direct")
	}
	if r.Sites == 0 {
		return bad("sites is missing; it must be at least 1")
	}
	if r.Sites > r.Approvals {
		return bad("%d approvals cannot come from %d sites", r.Approvals, r.Sites)
	}
	if r.Approvals > MaxThreshold {
		return bad("approvals exceeds %d", MaxThreshold)
	}
	if err := checkNames("required site", r.Required); err != nil {
		return bad("%v", err)
	}
	if len(r.Required) > int(r.Sites) {
		return bad("%d required sites make sites at least %d, not %d", len(r.Required), len(r.Required), r.Sites)
	}
	if err := checkNames("veto custodian", r.Veto); err != nil {
		return bad("%v", err)
	}
	if r.Need != nil {
		if err := r.Need.validate(1); err != nil {
			return bad("%v", err)
		}
	}
	if err := r.validateUnused(bad); err != nil {
		return err
	}
	return r.validateTimes(bad)
}

// validateUnused checks for how long a version must not have been used.
func (r Rule) validateUnused(bad func(string, ...any) error) error {
	switch {
	case r.Unused == 0:
		return nil
	case r.Action != kms.ActionDeactivate && r.Action != kms.ActionDestroy:
		return bad("unused is for %s and %s alone", kms.ActionDeactivate, kms.ActionDestroy)
	case r.Unused < MinUnused || r.Unused > MaxUnused:
		return bad("unused is %d ms; it must be from 1 hour to 10 years", r.Unused)
	}
	return nil
}

func (r Rule) validateDirect(bad func(string, ...any) error) error {
	if r.Approvals != 0 || r.Sites != 0 || len(r.Required) != 0 || r.ProposerMayApprove ||
		r.Delay != 0 || r.Lifetime != 0 || len(r.Veto) != 0 || r.Need != nil || r.NotBefore != 0 || r.Unused != 0 {
		return bad("it is direct and has parts of a quorum; choose one")
	}
	if r.Action == kms.ActionDestroy {
		return bad("it cannot be direct; set approvals, sites and a delay of 7 to 30 days")
	}
	for i, role := range r.Direct {
		if !slices.Contains(roles, role) {
			return bad("there is no role %q; the roles are %s", role, strings.Join(roles, ", "))
		}
		if i > 0 && r.Direct[i-1] >= role {
			return bad("direct is not sorted or repeats %q", role)
		}
	}
	return nil
}

func (r Rule) validateTimes(bad func(string, ...any) error) error {
	if r.Lifetime == 0 {
		return bad("lifetime is missing; it must be from 1 minute to 90 days")
	}
	if r.Lifetime < MinLifetime || r.Lifetime > MaxLifetime {
		return bad("lifetime is %d ms; it must be from 1 minute to 90 days", r.Lifetime)
	}
	if r.Delay < 0 || r.Delay > MaxDelay {
		return bad("delay is %d ms; it must be from 0 to 30 days", r.Delay)
	}
	if r.Action == kms.ActionDestroy && r.Delay < MinDestroyDelay {
		return bad("delay is %d ms; destruction waits 7 to 30 days (%d to %d ms)", r.Delay, MinDestroyDelay, MaxDelay)
	}
	if r.NotBefore < 0 || r.NotBefore > maxTime {
		return bad("not-before %d is no time", r.NotBefore)
	}
	if r.NotBefore != 0 && r.Action == kms.ActionRecover {
		return bad("a recovery cannot wait for a day that is set now")
	}
	if r.Delay >= r.Lifetime {
		return bad("delay %d ms is not shorter than lifetime %d ms, so that nothing could ever be carried out", r.Delay, r.Lifetime)
	}
	return nil
}

// checkNames checks that names are well formed, sorted and distinct.
func checkNames(what string, names []string) error {
	if len(names) > MaxThreshold {
		return kms.Errorf(kms.Invalid, "more than %d entries of %s", MaxThreshold, what)
	}
	for i, n := range names {
		if err := kms.CheckName(what, n); err != nil {
			return err
		}
		if i > 0 && names[i-1] >= n {
			return kms.Errorf(kms.Invalid, "%s %q: the list is not sorted or repeats it", what, n)
		}
	}
	return nil
}

// Stricter returns the rule that accepts only what both r and other accept,
// field by field, and the groups of both; its Action is r's. A quorum is stricter than a direct rule; of
// two direct rules the roles common to both remain. The result can fail
// Validate (no common role; a delay as long as the lifetime): then the change
// cannot be made in one step.
func (r Rule) Stricter(other Rule) Rule {
	switch d, o := len(r.Direct) > 0, len(other.Direct) > 0; {
	case d && o:
		var both []string
		for _, role := range r.Direct {
			if slices.Contains(other.Direct, role) {
				both = append(both, role)
			}
		}
		return Rule{Action: r.Action, Direct: both}
	case d:
		other.Action = r.Action
		return other
	case o:
		return r
	}
	if !r.Quorum() || !other.Quorum() {
		return Rule{Action: r.Action} // neither form: refused everywhere
	}
	s := Rule{
		Action:             r.Action,
		Approvals:          max(r.Approvals, other.Approvals),
		Sites:              max(r.Sites, other.Sites),
		Required:           union(r.Required, other.Required),
		ProposerMayApprove: r.ProposerMayApprove && other.ProposerMayApprove,
		Delay:              max(r.Delay, other.Delay),
		Lifetime:           min(r.Lifetime, other.Lifetime),
		Veto:               union(r.Veto, other.Veto),
		Need:               both(r.Need, other.Need),
		NotBefore:          max(r.NotBefore, other.NotBefore),
		Unused:             max(r.Unused, other.Unused),
	}
	// Required sites count as sites, and every site takes an approval.
	s.Sites = max(s.Sites, uint32(len(s.Required)))
	s.Approvals = max(s.Approvals, s.Sites)
	return s
}

// union returns the sorted union of two lists.
func union(a, b []string) []string {
	u := append(slices.Clone(a), b...)
	slices.Sort(u)
	return slices.Compact(u)
}
