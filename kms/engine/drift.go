package engine

import (
	"cmp"
	"context"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

const (
	// nodeSilence is after how long without a word a node counts as behind: it signs its
	// time every five seconds.
	nodeSilence = time.Minute
	// nodeLag is how many log entries a node may be behind without a word.
	nodeLag = 1000
	// certificateAhead is how long before its end a certificate is reported.
	certificateAhead = 30 * 24 * time.Hour
)

// drift gathers the findings of one report.
type drift struct {
	e   *Engine
	st  *state.State
	now int64 // of the cluster, Unix milliseconds
	out wire.Drift
}

// Drift reports what is not as it should be: keys that are overdue, receipts that are
// missing, versions in use that should not be, what is ageing, nodes that are behind,
// certificates that expire. Keyrings that the caller may not read are left out.
func (e *Engine) Drift(ctx context.Context, c Caller) (wire.Drift, error) {
	return read(ctx, e, c, ActReadCluster, resource{}, "drift", func(st *state.State) (wire.Drift, error) {
		d := &drift{e: e, st: st, now: st.Clock(), out: wire.Drift{Node: e.node, Time: at(st.Clock()), Findings: []wire.Finding{}}}
		var shown []state.Keyring
		for _, kr := range st.Keyrings() {
			if e.access.allow(st, c.Identity, ActReadKey, ofRing(kr.Name).at(st)) != nil {
				d.out.Hidden++
				continue
			}
			shown = append(shown, kr)
			d.keyring(kr)
		}
		d.suites(shown)
		d.nodes()
		d.certificates(func(time.Duration) time.Duration { return certificateAhead })
		return d.report(), nil
	})
}

// report puts what asks for something first.
func (d *drift) report() wire.Drift {
	slices.SortStableFunc(d.out.Findings, func(a, b wire.Finding) int {
		return cmp.Compare(int(oneIf(b.Act)), int(oneIf(a.Act)))
	})
	for _, f := range d.out.Findings {
		d.out.Act += int(oneIf(f.Act))
	}
	return d.out
}

func (d *drift) find(f wire.Finding, format string, args ...any) {
	f.Text = fmt.Sprintf(format, args...)
	d.out.Findings = append(d.out.Findings, f)
}

// keyring looks at a keyring's KEK and keys.
func (d *drift) keyring(kr state.Keyring) {
	d.rotateKEK(kr)
	target := approval.KeyringTarget(kr.Name)
	for _, k := range d.st.KEKs(kr.Name) {
		if k.Retired() {
			continue
		}
		owing := lackReceipt(k.Checks, k.Receipts)
		d.receipts(wire.Finding{Subject: target, Version: k.Version, Nodes: owing, Since: at(k.Created)}, "KEK version")
	}
	for _, k := range d.st.Keys(kr.Name) {
		d.key(k)
	}
}

// rotateKEK looks whether a removed node can open a keyring's KEK.
func (d *drift) rotateKEK(kr state.Keyring) {
	gone, wanted := d.st.RotationWanted(kr.Name)
	if !wanted {
		return
	}
	target := approval.KeyringTarget(kr.Name)
	removal, _ := d.st.Removal(gone)
	d.find(wire.Finding{Kind: wire.DriftRotateKEK, Act: true, Subject: target, Version: kr.KEK, Nodes: []string{gone}, Since: at(removal.Time)},
		"node %s was removed and could open the KEK: %s", gone, d.rotate(target, "propose conclave keyring rotate "+kr.Name))
}

// rotate says what is to be done for a rotation: approve the proposal that is open, or
// open one.
func (d *drift) rotate(target, otherwise string) string {
	open, _ := d.st.ProposalsBy(state.ProposalQuery{Open: true, Target: target, Action: kms.ActionRotate, Limit: 1})
	if len(open) == 0 {
		return otherwise
	}
	return "proposal " + open[0].ID + " to rotate it is open"
}

// overdue looks whether a key should have been rotated.
func (d *drift) overdue(k state.Key) {
	due := rotationDue(k)
	if due == 0 || d.now < due {
		return
	}
	target := approval.KeyTarget(k.Keyring, k.Name)
	d.find(wire.Finding{Kind: wire.DriftOverdue, Act: true, Subject: target, Version: k.Primary, Since: at(due)},
		"its rotation is overdue: %s", d.rotate(target, "propose conclave key rotate "+kms.KeyPath(k.Keyring, k.Name)))
}

func (d *drift) key(k state.Key) {
	d.overdue(k)
	target := approval.KeyTarget(k.Keyring, k.Name)
	for _, v := range d.st.Versions(k.Keyring, k.Name) {
		if v.State.Gone() {
			continue
		}
		owing := lackReceipt(v.Checks, v.Receipts)
		if v.Generated != "" && k.Purpose == kms.Sign {
			owing = lackSignature(d.st, v)
		}
		d.receipts(wire.Finding{Subject: target, Version: v.Version, Nodes: owing, Since: at(v.Created)}, "version")
		d.version(k, v, target)
	}
}

// receipts reports nodes that have not proved that they can open a version, once they
// have had the time for it.
func (d *drift) receipts(f wire.Finding, what string) {
	if len(f.Nodes) == 0 || d.now-f.Since.UnixMilli() < nodeSilence.Milliseconds() {
		return
	}
	f.Kind, f.Act = wire.DriftReceipt, true
	d.find(f, "%s has not proved that it can open %s %d: see the log of the node", strings.Join(f.Nodes, ", "), what, f.Version)
}

func lackReceipt(checks []state.Check, receipts []state.Receipt) (nodes []string) {
	for _, c := range checks {
		if !slices.ContainsFunc(receipts, func(r state.Receipt) bool { return r.Node == c.Node }) {
			nodes = append(nodes, c.Node)
		}
	}
	return nodes
}

// lackSignature is lackReceipt of a sign key of protection hardware, which has no checks.
func lackSignature(st *state.State, v state.Version) (nodes []string) {
	for _, n := range st.ResidentNodes(v.Keyring) {
		if !slices.ContainsFunc(v.Receipts, func(r state.Receipt) bool { return r.Node == n.ID }) {
			nodes = append(nodes, n.ID)
		}
	}
	return nodes
}

// oldUse is for how long an old version must not have been used before it is worth
// proposing that it is deactivated.
const oldUse = 30 * 24 * time.Hour

// version looks at how a version that is not the primary one is used.
func (d *drift) version(k state.Key, v state.Version, target string) {
	if v.Version == k.Primary || v.State == kms.PreActive {
		return
	}
	u := d.st.LastUse(k.Keyring, k.Name, v.Version)
	f := wire.Finding{Subject: target, Version: v.Version, Nodes: u.Silent, Since: at(u.Last)}
	if v.State != kms.Active {
		if ended := d.ended(k, v, target); u.Last-state.UseHour > ended && u.Last > 0 {
			f.Kind, f.Act = wire.DriftDeactivated, true
			d.find(f, "version %d is %s since %s, and somebody still asks for it: what it protects cannot be opened", v.Version, v.State, at(ended).Format(time.RFC3339))
		}
		return
	}
	switch {
	case u.Known() && d.now-u.Since >= oldUse.Milliseconds():
		f.Kind, f.Since = wire.DriftUnused, at(u.Since)
		d.find(f, "version %d has not been used since then: it can be deactivated", v.Version)
	case u.Last > k.Rotated:
		f.Kind = wire.DriftOldVersion
		d.find(f, "version %d is in use beside the primary version %d: what it protects has not been rewrapped", v.Version, k.Primary)
	}
}

// ended returns when a version was deactivated or compromised: it stopped being used
// then.
func (d *drift) ended(k state.Key, v state.Version, target string) int64 {
	for _, p := range slices.Backward(d.st.ProposalsOn(target)) { // the oldest first
		if p.Progress != state.Executed || p.Content.Action != kms.ActionDeactivate && p.Content.Action != kms.ActionCompromise {
			continue
		}
		if params, err := p.Content.VersionParams(); err == nil && params.Version == v.Version {
			return p.ClosedAt
		}
	}
	return k.Created
}

// nodes looks at who is silent, behind, or of an older release.
func (d *drift) nodes() {
	behind := map[string]bool{}
	for _, n := range d.st.Nodes() {
		s, ok := d.st.NodeStatus(n.ID)
		if n.Root == 0 || ok && d.now-s.Time < nodeSilence.Milliseconds() {
			continue
		}
		behind[n.ID] = true
		d.find(wire.Finding{Kind: wire.DriftNode, Act: true, Subject: approval.NodeTarget(n.ID), Nodes: []string{n.ID}, Since: at(s.Time)},
			"nothing was heard of it since then: it is stopped or cut off, or its clock is behind")
	}
	if d.e.cfg.Raft != nil {
		for _, p := range d.e.cfg.Raft().Peers {
			if p.Lag > nodeLag && !behind[p.ID] {
				d.find(wire.Finding{Kind: wire.DriftNode, Act: true, Subject: approval.NodeTarget(p.ID), Nodes: []string{p.ID}}, "it is %d log entries behind", p.Lag)
			}
		}
	}
	lacking := map[string]int{}
	for _, k := range state.Program("").Kinds {
		for _, id := range d.st.Lacking(k) {
			lacking[id]++
		}
	}
	for _, n := range d.st.Nodes() {
		if lacking[n.ID] > 0 {
			d.find(wire.Finding{Kind: wire.DriftRelease, Act: true, Subject: approval.NodeTarget(n.ID), Nodes: []string{n.ID}},
				"its release does not know %s of this node's: they are not taken until it does", count(lacking[n.ID], "kind"))
		}
	}
}

// certificates looks at the sites' CAs and at this node's own certificate, the only ones
// that a node knows. ahead says of a certificate's validity how long before its end it is
// reported.
func (d *drift) certificates(ahead func(validity time.Duration) time.Duration) {
	for _, s := range d.st.Sites() {
		for _, der := range s.CAs {
			if c, err := x509.ParseCertificate(der); err == nil {
				d.certificate(approval.TargetSite+"/"+s.ID, "a CA of the site", c, ahead)
			}
		}
	}
	own := "this node's own certificate"
	if c := d.e.cfg.Certificate; c != nil {
		d.certificate(approval.NodeTarget(d.e.node), own, c, ahead)
		own = ""
	}
	d.out.Unknown = append(d.out.Unknown, "when the certificates of other nodes expire: ask each node", "when the certificates of operators, services, custodians and auditors expire: their CAs know")
	if own != "" {
		d.out.Unknown = append(d.out.Unknown, "when "+own+" expires")
	}
}

func (d *drift) certificate(subject, what string, c *x509.Certificate, ahead func(time.Duration) time.Duration) {
	left := c.NotAfter.UnixMilli() - d.now
	f := wire.Finding{Kind: wire.DriftCertificate, Act: true, Subject: subject, Since: c.NotAfter.UTC()}
	switch {
	case left < 0:
		d.find(f, "%s (%s) has expired", what, c.Subject)
	case left < ahead(c.NotAfter.Sub(c.NotBefore)).Milliseconds():
		d.find(f, "%s (%s) expires in %s", what, c.Subject, (time.Duration(left) * time.Millisecond).Round(time.Hour))
	}
}
