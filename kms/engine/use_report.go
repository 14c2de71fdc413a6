package engine

import (
	"bytes"
	"cmp"
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

const (
	reportEvery = time.Hour       // between reports of what this node has used
	reportFirst = 5 * time.Minute // after a start
	// inFlight is how long a request may last: one that began before then has noted what
	// it uses by now.
	inFlight = 2 * time.Minute
)

// uses remembers when this node last used each key version, since it started. Noting a
// use takes a load, and once an hour a store; nothing is locked. The zero value is empty.
type uses struct {
	versions sync.Map // usedVersion -> *atomic.Int64, the hour of the last use
}

type usedVersion struct {
	id      kms.KeyID
	version uint32
}

// of returns where the last use of a version is noted.
func (u *uses) of(id kms.KeyID, version uint32) *atomic.Int64 {
	v := usedVersion{id, version}
	if last, ok := u.versions.Load(v); ok {
		return last.(*atomic.Int64)
	}
	last, _ := u.versions.LoadOrStore(v, new(atomic.Int64))
	return last.(*atomic.Int64)
}

// note notes a use in an hour since the Unix epoch.
func note(last *atomic.Int64, hour int64) {
	if last.Load() < hour {
		last.Store(hour)
	}
}

// hourOf returns the hour since the Unix epoch.
func hourOf(t time.Time) int64 { return t.UnixMilli() / state.UseHour }

// since returns the versions used later than was reported, sorted as a report has them.
func (u *uses) since(reported map[usedVersion]int64) (l []state.VersionUse) {
	u.versions.Range(func(k, last any) bool {
		v := k.(usedVersion)
		if hour := last.(*atomic.Int64).Load(); hour > reported[v] {
			l = append(l, state.VersionUse{Key: v.id[:], Version: v.version, Hour: hour})
		}
		return true
	})
	slices.SortFunc(l, func(a, b state.VersionUse) int {
		return cmp.Or(bytes.Compare(a.Key, b.Key), cmp.Compare(a.Version, b.Version))
	})
	return l
}

// useReports is what an agent has reported.
type useReports struct {
	next     time.Time
	from     time.Time             // the node's count is whole from here on
	doubtful bool                  // at the start the node did not know whether its disk was put back
	reported map[usedVersion]int64 // hour
}

// reportUse tells the cluster every hour what this node has used since it last did.
func (a *Agent) reportUse(ctx context.Context, st *state.State) time.Duration {
	r := &a.useReports
	if len(st.Lacking(state.CommandKind{Type: state.TypeReportUse, Version: state.CommandVersion})) > 0 {
		return idleWait
	}
	if n, ok := st.Node(a.e.node); !ok || n.Root == 0 {
		return idleWait
	}
	now := a.e.now()
	if r.reported == nil {
		r.reported, r.next, r.from = map[usedVersion]int64{}, a.e.started.Add(reportFirst), a.e.started
		r.doubtful = a.e.held() != nil
	}
	if wait := r.next.Sub(now); wait > 0 {
		return wait
	}
	return a.attempt(ctx, "use", "use", 0, func(ctx context.Context) error {
		// The time first: what is used from here on is in the next report.
		if r.from.Equal(a.e.started) && !r.doubtful {
			r.from = a.e.recall(ctx, st)
		}
		until := a.e.now().Add(-inFlight)
		if err := a.sendUses(ctx, until); err != nil {
			return err
		}
		r.next = a.e.now().Add(reportEvery)
		return nil
	})
}

// recall notes what this node used after its last report and before it started anew, as
// its access log has it, and returns the time from which its count is whole: that of the last
// report, or that of the start where the log does not tell.
func (e *Engine) recall(ctx context.Context, st *state.State) time.Time {
	last := st.UsesReported(e.node)
	if e.cfg.Past == nil || last == 0 || last >= e.started.UnixMilli() {
		return e.started
	}
	reaches, err := e.cfg.Past(time.UnixMilli(last), func(x audit.Entry) { e.recalled(st, x) })
	if err != nil || !reaches {
		e.log.WarnContext(ctx, "what this node used before it started is not known: its access log does not tell", "since", at(last), "error", err)
		return e.started
	}
	return time.UnixMilli(last)
}

// recalled notes the uses in an entry of the access log. A rewrap and a batch of several
// versions do not name all that they used, so they count for every version of the key.
func (e *Engine) recalled(st *state.State, x audit.Entry) {
	ring, name, err := kms.SplitKeyPath(x.Resource)
	if _, data := purposes[Action(x.Action)]; err != nil || !data && Action(x.Action) != ActExportMaterial {
		return
	}
	k, ok := st.Key(ring, name)
	if !ok {
		return
	}
	hour := hourOf(time.UnixMilli(x.Time))
	for _, v := range st.Versions(ring, name) {
		if v.Version == x.Version || x.Version == 0 || Action(x.Action) == ActRewrap {
			note(e.uses.of(kms.KeyID(k.ID), v.Version), hour)
		}
	}
}

// sendUses reports what is new, in as many commands as it takes. Only the last one says
// until when, so that what did not arrive as a whole covers no time.
func (a *Agent) sendUses(ctx context.Context, until time.Time) error {
	used := a.e.uses.since(a.useReports.reported)
	for {
		n := min(len(used), state.MaxUses)
		c := state.ReportUse{Used: used[:n]}
		if used = used[n:]; len(used) == 0 {
			c.Until = until.UnixMilli()
			c.From = min(a.useReports.from.UnixMilli(), c.Until) // should the clock have been set back
		}
		if _, err := a.e.submit(ctx, attempt{}, c); err != nil {
			return err
		}
		for _, u := range c.Used {
			a.useReports.reported[usedVersion{kms.KeyID(u.Key), u.Version}] = u.Hour
		}
		if len(used) == 0 {
			return nil
		}
	}
}

// useView is what is known of a version's last use, nil for one without material.
func useView(st *state.State, k state.Key, v state.Version) *wire.VersionUse {
	if v.State.Gone() {
		return nil
	}
	u := st.LastUse(k.Keyring, k.Name, v.Version)
	out := &wire.VersionUse{Last: at(u.Last), Known: u.Known(), Silent: u.Silent}
	if u.Known() {
		out.UnusedSince = at(u.Since)
	}
	return out
}
