package engine

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

const (
	alarmEvery = 10 * time.Second // between a node's looks

	// certificateAlarm is the most that may be left of a certificate for an alarm; it is
	// a tenth of its validity if that is less.
	certificateAlarm = 7 * 24 * time.Hour
)

// Actions of entries in the access log that a node makes on its own behalf. The context
// says what it is about: kind, id, text.
const (
	actAlarmBegins Action = "alarm:begin"
	actAlarmEnds   Action = "alarm:end"
	actAnomaly     Action = "anomaly"
)

// alarmKinds are the findings of a drift report that are alarms.
var alarmKinds = map[string]string{
	wire.DriftOverdue: wire.AlarmOverdue, wire.DriftRotateKEK: wire.AlarmRotateKEK, wire.DriftNode: wire.AlarmNode, wire.DriftCertificate: wire.AlarmCertificate,
}

// alarms returns what is wrong as this node sees it, sorted by kind and subject, and how
// many keyrings were left out.
func (e *Engine) alarms(st *state.State, shown func(keyring string) bool) (l []wire.Alarm, hidden int) {
	d := &drift{e: e, st: st, now: st.Clock()}
	for _, kr := range st.Keyrings() {
		if !shown(kr.Name) {
			hidden++
			continue
		}
		d.rotateKEK(kr)
		for _, k := range st.Keys(kr.Name) {
			d.overdue(k)
		}
	}
	d.cutOff()
	d.nodes()
	d.certificates(func(validity time.Duration) time.Duration { return min(validity/10, certificateAlarm) })
	for _, f := range d.out.Findings {
		if kind, ok := alarmKinds[f.Kind]; ok {
			l = append(l, wire.Alarm{ID: alarmID(kind, f.Subject, f.Since), Kind: kind, Subject: f.Subject, Since: f.Since, Nodes: f.Nodes, Text: f.Text})
		}
	}
	l = append(l, e.suspicions()...)
	for _, x := range e.logAlarms(st) {
		l = append(l, wire.Alarm{ID: alarmID(wire.AlarmAudit, "log/"+x.log, time.Time{}), Kind: wire.AlarmAudit, Subject: "log/" + x.log, Text: x.text})
	}
	slices.SortStableFunc(l, func(a, b wire.Alarm) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Subject, b.Subject), a.Since.Compare(b.Since))
	})
	return slices.CompactFunc(l, func(a, b wire.Alarm) bool { return a.ID == b.ID }), hidden
}

// alarmID names an alarm after what it is about and since when, which nodes agree on.
func alarmID(kind, subject string, since time.Time) string {
	id := kind + ":" + subject
	if !since.IsZero() {
		id += fmt.Sprintf("@%d", since.UnixMilli())
	}
	return id
}

// cutOff reports that this node does not know how the cluster is. What it says of others is
// then as old.
func (d *drift) cutOff() {
	age := d.e.cluster.Fresh()
	if age <= readyStaleness || d.e.now().Sub(d.e.started) <= readyStaleness {
		return
	}
	d.find(wire.Finding{Kind: wire.DriftNode, Act: true, Subject: approval.NodeTarget(d.e.node), Nodes: []string{d.e.node}}, "this node: %s", cutOff(age))
}

// Alarms reports what is wrong at this moment. Keyrings that the caller may not read are
// left out.
func (e *Engine) Alarms(ctx context.Context, c Caller) (wire.Alarms, error) {
	return read(ctx, e, c, ActReadCluster, resource{}, "alarms", func(st *state.State) (wire.Alarms, error) {
		v := wire.Alarms{Node: e.node, Time: at(st.Clock()), Alarms: []wire.Alarm{}}
		l, hidden := e.alarms(st, func(ring string) bool {
			return e.access.allow(st, c.Identity, ActReadKey, ofRing(ring).at(st)) == nil
		})
		v.Alarms, v.Hidden = append(v.Alarms, l...), hidden
		return v, nil
	})
}

// alarmWatch is what a node has logged of alarms.
type alarmWatch struct {
	next time.Time
	on   map[string]wire.Alarm // by ID, whose beginning is in the access log
}

// Standing returns the alarms that are on, as this node's agent last saw them. The caller
// must not change them.
func (e *Engine) Standing() []wire.Alarm {
	if l := e.standing.Load(); l != nil {
		return *l
	}
	return nil
}

type standing = atomic.Pointer[[]wire.Alarm]

// watchAlarms logs what begins and what ends. A node that has started anew logs again what
// is on.
func (a *Agent) watchAlarms(ctx context.Context, st *state.State) time.Duration {
	w, now := &a.alarms, a.e.now()
	if wait := w.next.Sub(now); wait > 0 {
		return wait
	}
	w.next = now.Add(alarmEvery)
	if a.e.cluster.Fresh() == neverFresh && now.Sub(a.e.started) <= readyStaleness {
		return alarmEvery // what it knows is from before it was stopped
	}
	l, _ := a.e.alarms(st, func(string) bool { return true })
	a.e.standing.Store(&l)
	if w.on == nil {
		w.on = map[string]wire.Alarm{}
	}
	ended := maps.Clone(w.on)
	for _, x := range l {
		delete(ended, x.ID)
		if _, known := w.on[x.ID]; !known && a.logAlarm(ctx, st, actAlarmBegins, x) {
			w.on[x.ID] = x
		}
	}
	for _, id := range slices.Sorted(maps.Keys(ended)) {
		if a.logAlarm(ctx, st, actAlarmEnds, ended[id]) {
			delete(w.on, id)
		}
	}
	return alarmEvery
}

// logAlarm reports whether it is in the access log.
func (a *Agent) logAlarm(ctx context.Context, st *state.State, act Action, x wire.Alarm) bool {
	if act == actAlarmBegins {
		a.e.log.WarnContext(ctx, "alarm", "kind", x.Kind, "subject", x.Subject, "what", x.Text)
	} else {
		a.e.log.InfoContext(ctx, "alarm ended", "kind", x.Kind, "subject", x.Subject)
	}
	return a.e.note(ctx, st, act, x.Subject, map[string]string{"id": x.ID, "kind": x.Kind, "text": x.Text}) == nil
}

// note writes an entry of this node's own into the access log.
func (e *Engine) note(ctx context.Context, st *state.State, act Action, subject string, what map[string]string) error {
	if e.logFailed.Load() {
		return errLogFailed
	}
	return e.cfg.Log.Append(context.WithoutCancel(ctx), audit.Entry{
		Time: e.now().UnixMilli(), Node: e.node, Principal: e.self(st).String(), Action: string(act), Resource: subject, Outcome: "ok", Context: what, Count: 1,
	})
}

// NoteAnomaly writes into this node's access log that something in it was unusual: the
// subject, and in words what. Errors: those of the log.
func (e *Engine) NoteAnomaly(ctx context.Context, subject string, what map[string]string) error {
	return e.note(ctx, e.cluster.State(), actAnomaly, subject, what)
}

// self is this node's own identity, with no trust domain where the state does not know
// the node yet.
func (e *Engine) self(st *state.State) kms.Identity {
	n, _ := st.Node(e.node)
	site, _ := st.Site(n.Site)
	return kms.Identity{TrustDomain: site.TrustDomain, Role: "node", Name: e.node}
}
