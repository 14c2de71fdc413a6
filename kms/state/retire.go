package state

import (
	"fmt"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

// checkUnused refuses to retire versions that somebody may still need: where the rule
// says for how long a version must not have been used, each one that can be used must not
// have been for so long, and every node that can use it must have been heard. The proposal
// may override this; its custodians have signed that. What stands in a snapshot was
// checked when it was applied.
func (t *tx) checkUnused(p approval.Proposal, keyring, key string, version uint32) error {
	params, err := p.VersionParams()
	if err != nil {
		return err
	}
	r := t.reader()
	rule, err := r.rule(p)
	if err != nil || rule.Unused == 0 || params.Override || t.replay {
		return err
	}
	for _, v := range r.versions(keyring, key) {
		if v.State != kms.Active || version != 0 && v.Version != version {
			continue
		}
		if why := unready(r.lastUse(keyring, key, v.Version, t.clock), rule.Unused); why != "" {
			return &kms.Error{Kind: kms.Conflict,
				Msg: fmt.Sprintf("version %d of key %s %s; policy %s asks for %s without use before it may be retired", v.Version, kms.KeyPath(keyring, key), why, p.Policy, hours(rule.Unused)),
				Fix: "have what it protects rewrapped and wait, or propose it with override: then whoever still needs it is cut off"}
		}
	}
	return nil
}

// unready says why a version is not known to be unused for a period that ends with the
// nodes' latest reports, "" if it is.
func unready(u Use, period int64) string {
	switch {
	case !u.Known():
		return "may be in use: no word of " + strings.Join(u.Silent, ", ")
	case u.Last > u.Until-period:
		return "was used within the last " + hours(u.Until-u.Last+2*UseHour)
	case u.Since > u.Until-period:
		return "has been watched for less than " + hours(u.Until-u.Since+UseHour)
	}
	return ""
}

// hours writes a time in full hours.
func hours(ms int64) string { return decimal(uint64(max(ms, 0)/UseHour)) + " hours" }
