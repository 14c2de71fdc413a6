package engine

import (
	"fmt"
	"sync"
	"time"

	"github.com/conclave-kms/conclave/kms/audit"
	cosigned "github.com/conclave-kms/conclave/kms/note"
	"github.com/conclave-kms/conclave/kms/state"
)

// lagLimit is how long a log may go without the cosignature of a majority of sites
// before it is an alarm.
const lagLimit = time.Minute

// lags remembers since when logs have grown without a cosignature, as this node sees it,
// and what it refuses to cosign.
type lags struct {
	mu      sync.Mutex
	since   map[string]waitingFrom
	refused map[string]string
}

type waitingFrom struct {
	size uint64 // that is to be cosigned
	at   time.Time
}

// observe looks at all logs.
func (l *lags) observe(e *Engine, st *state.State) {
	now := e.now()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.since == nil {
		l.since = make(map[string]waitingFrom)
	}
	look := func(log string, restart uint32, size uint64, since time.Time) {
		done := audit.CosignedSize(st, log, restart)
		if was, ok := l.since[log]; ok && (was.size <= done || size < was.size) {
			delete(l.since, log)
		}
		if _, ok := l.since[log]; !ok && size > done {
			l.since[log] = waitingFrom{size, since}
		}
	}
	for _, n := range st.Nodes() {
		cp, _ := st.Checkpoint(n.ID)
		size := cp.Size
		if n.ID == e.node {
			size = max(size, e.cfg.Checkpoints.Access.Size())
		}
		look(cosigned.AccessLog(n.ID), cp.Restart, size, now)
	}
	if m, ok := e.cfg.Checkpoints.Marks.latest(); ok {
		look(cosigned.ClusterLog, 0, m.st.LogSize(), m.since)
	}
}

// of returns how long a log has gone without the cosignature that it wants.
func (l *lags) of(log string, now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if was, ok := l.since[log]; ok {
		return now.Sub(was.at)
	}
	return 0
}

// alarm remembers why a log is not cosigned here, nil when it is again, and returns the
// error.
func (e *Engine) alarm(log string, err error) error {
	e.lags.mu.Lock()
	defer e.lags.mu.Unlock()
	if e.lags.refused == nil {
		e.lags.refused = make(map[string]string)
	}
	if err == nil {
		delete(e.lags.refused, log)
		return nil
	}
	if e.lags.refused[log] == "" {
		e.log.Error("a log is not what it was: it is not cosigned here", "log", log, "error", err)
	}
	e.lags.refused[log] = cause(err)
	return err
}

// logAlarm is something that is wrong with a log's checkpoints.
type logAlarm struct{ log, text string }

// auditAlarms says in words what is wrong with the logs' checkpoints.
func (e *Engine) auditAlarms(st *state.State) (texts []string) {
	for _, x := range e.logAlarms(st) {
		texts = append(texts, x.text)
	}
	return texts
}

func (e *Engine) logAlarms(st *state.State) (alarms []logAlarm) {
	if e.cfg.Checkpoints == nil {
		return nil
	}
	add := func(log, format string, args ...any) {
		alarms = append(alarms, logAlarm{log, fmt.Sprintf(format, args...)})
	}
	for _, n := range st.Nodes() {
		if cp, ok := st.Checkpoint(n.ID); ok && cp.Fork != nil {
			add(cosigned.AccessLog(n.ID), "node %s has signed two access logs that contradict each other, of %d and of %d entries: see conclave audit checkpoints", n.ID, cp.Size, cp.Fork.Size)
		}
	}
	for _, c := range st.Cosignatures(cosigned.ClusterLog) {
		if e.cfg.Checkpoints.Marks.contradicts(audit.Head{Log: cosigned.ClusterLog, Size: c.Size, Root: c.Root, State: c.State}) {
			add(cosigned.ClusterLog, "site %s has cosigned another cluster log of %d leaves than this node has", c.Site, c.Size)
		}
	}
	now := e.now()
	for _, log := range logsOf(st) {
		e.lags.mu.Lock()
		why := e.lags.refused[log]
		e.lags.mu.Unlock()
		if why != "" {
			add(log, "%s", why)
		}
		if age := e.lags.of(log, now); age > lagLimit {
			add(log, "what the log %s has grown by in the last %s is not cosigned by a majority of the sites", log, age.Round(time.Second))
		}
	}
	return alarms
}

// logsOf names the cluster log and the access logs of all nodes.
func logsOf(st *state.State) []string {
	logs := []string{cosigned.ClusterLog}
	for _, n := range st.Nodes() {
		logs = append(logs, cosigned.AccessLog(n.ID))
	}
	return logs
}
