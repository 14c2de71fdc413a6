package audit

import "github.com/conclave-kms/conclave/kms"

// retirement names what was asked of the use of a version before it was retired.
func retirement(out decided, r *Report) {
	if out.rule.Unused == 0 || out.content.Action != kms.ActionDeactivate && out.content.Action != kms.ActionDestroy {
		return
	}
	v, err := out.content.VersionParams()
	switch {
	case err != nil: // its form was checked
	case v.Override:
		r.passed("It OVERRIDES that a version must not have been used for %d hours: the custodians approved it although the version may have been in use.", out.rule.Unused/3600_000)
	default:
		r.Notes = append(r.Notes, "That no version it retires had been used for as long as the policy asks rests on the nodes' reports of what they use, which this file does not hold.")
	}
}
