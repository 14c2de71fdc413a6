package engine

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/transparency-dev/merkle/rfc6962"

	cosigned "github.com/conclave-kms/conclave/kms/note"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
	"github.com/conclave-kms/conclave/kms/tlog"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

// memorySeen is a node's memory of what it has cosigned.
type memorySeen struct {
	mu   sync.Mutex
	logs map[string]head
	fail error
}

type head struct {
	size uint64
	root []byte
}

func (s *memorySeen) Get(origin string) (uint64, []byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.logs[origin].size, s.logs[origin].root, s.fail
}

func (s *memorySeen) Put(origin string, size uint64, root []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail == nil {
		s.logs[origin] = head{size: size, root: root}
	}
	return s.fail
}

// witnessNode is what the tests hold of a node that takes part in checkpoints.
type witnessNode struct {
	log  *statetest.AccessLog
	seen *memorySeen
}

// audited is a world whose nodes take part in checkpoints.
type audited struct {
	*world
	sites map[string]*witnessNode
	marks []*Marks
	as    map[string]*Agent
}

func newAudited(t *testing.T) *audited {
	w := &audited{world: newWorld(t, ""), sites: map[string]*witnessNode{}}
	w.cluster.applied = func(st *state.State, r state.Result) {
		for _, m := range w.marks {
			m.Applied(st, r)
		}
	}
	for _, site := range siteIDs {
		n := &witnessNode{&statetest.AccessLog{}, &memorySeen{logs: map[string]head{}}}
		w.sites[site] = n
		seed := must(pqc.GenerateMLDSA44Seed(nil))
		key := must(pqc.NewMLDSA44Key(seed))
		seed.Destroy()
		m := NewMarks()
		w.marks = append(w.marks, m)
		w.at(site).engine.cfg.Checkpoints = &Checkpoints{Key: key, Seen: n.seen, Access: n.log, Cluster: &w.cluster.log, Marks: m}
	}
	w.as = w.agents()
	w.settle(w.as)
	w.settle(w.as)
	return w
}

// grow adds entries to a site's access log.
func (w *audited) grow(site string, n int) {
	for range n {
		w.sites[site].log.Add([]byte{byte(w.sites[site].log.Size())})
	}
}

// pass lets ten seconds go by, with ticks, and the agents do what is due.
func (w *audited) pass(sites ...string) {
	w.t.Helper()
	for range 5 {
		w.clock.Advance(2 * time.Second)
		w.tick()
		as := w.as
		if len(sites) > 0 {
			as = map[string]*Agent{}
			for _, s := range sites {
				as[s+"-1"] = w.as[s+"-1"]
			}
		}
		w.settle(as)
	}
}

func (w *audited) view() wire.Checkpoints {
	w.t.Helper()
	return check[wire.Checkpoints](w.t)(w.at("fr").engine.AuditCheckpoints(bg, caller("auditor", "fr")))
}

func (w *audited) logView(log string) wire.LogCheckpoint {
	w.t.Helper()
	l := w.view().Logs
	i := slices.IndexFunc(l, func(v wire.LogCheckpoint) bool { return v.Log == log })
	if i < 0 {
		w.t.Fatalf("no log %s", log)
	}
	return l[i]
}

func TestCheckpointsAreCosigned(t *testing.T) {
	w := newAudited(t)
	w.grow("fr", 3)
	w.pass()
	first := w.logView("access/fr-1")
	if first.Size != 3 || first.Cosigned != 3 || len(first.Sites) != 2 || first.WindowMS != 0 || first.Site != "fr" {
		t.Fatalf("%+v", first)
	}
	// The note verifies for whoever knows the keys, and is of this log.
	var known []cosigned.Witness
	for _, site := range siteIDs {
		k, ok := w.cluster.State().NoteWitness(site+"-1", 1<<60)
		if !ok {
			t.Fatalf("the key of %s is not known", site)
		}
		known = append(known, k)
	}
	c, names, err := cosigned.Open(first.Note, known...)
	if err != nil || len(names) != 3 || c.Size != 3 || c.Origin != cosigned.Origin(w.cluster.State().Lineage(), "access/fr-1") {
		t.Fatalf("%v %v %v", c, names, err)
	}
	// The cluster log is cosigned by all, at one place, with the state's hash.
	log := w.logView(cosigned.ClusterLog)
	if len(log.Sites) != 3 || log.Cosigned != log.Size || len(log.State) != 32 {
		t.Fatalf("%+v", log)
	}
	if root := check[[]byte](t)(tlog.Root(&w.cluster.log, log.Size)); string(root) != string(log.Root) {
		t.Error("the cosigned root is not the log's")
	}
	if _, names, err := cosigned.Open(log.Note, known...); err != nil || len(names) != 3 {
		t.Error(names, err)
	}

	// Logs that do not grow get no more of them.
	idle := w.cluster.State().Index()
	w.pass()
	for _, v := range w.view().Logs {
		if v.WindowMS != 0 {
			t.Errorf("%s: %+v", v.Log, v)
		}
	}
	if ticks := uint64(5 * len(siteIDs)); w.cluster.State().Index() != idle+ticks {
		t.Errorf("an idle cluster's log grew by %d, of which %d ticks", w.cluster.State().Index()-idle, ticks)
	}
	w.grow("fr", 2)
	w.keyring("more", "fr", "de")
	w.pass()
	if v := w.logView("access/fr-1"); v.Size != 5 || v.Cosigned != 5 {
		t.Errorf("%+v", v)
	}
	if v := w.logView(cosigned.ClusterLog); v.Size <= log.Size || v.Cosigned != v.Size {
		t.Errorf("%+v", v)
	}
	if v := w.view(); len(v.Alarms) != 0 {
		t.Error(v.Alarms)
	}
	b := check[[]byte](t)(json.Marshal(w.view()))
	if strings.Contains(string(b), "null") {
		t.Errorf("%s", b)
	}
}

// A cosigner that was away goes on from where it stood; what is not cosigned by a majority
// shows as the window, and as an alarm in readiness that keeps nobody from being served.
func TestCosignerCatchesUp(t *testing.T) {
	w := newAudited(t)
	w.grow("fr", 3)
	w.pass()
	for range 10 { // nobody but fr
		w.grow("fr", 3)
		w.pass("fr")
	}
	v := w.logView("access/fr-1")
	if v.Size != 33 || v.Cosigned != 3 || v.WindowMS < (80*time.Second).Milliseconds() {
		t.Fatalf("%+v", v)
	}
	if r := w.at("fr").engine.Ready(bg); len(r.Alarms) == 0 || !strings.Contains(strings.Join(r.Alarms, " "), "access/fr-1") {
		t.Errorf("%+v", r)
	}
	w.grow("fr", 1)
	w.pass()
	if v := w.logView("access/fr-1"); v.Cosigned != 34 || len(v.Sites) != 2 || v.Sites[0].Size != 34 || v.Sites[1].Size != 34 || v.WindowMS != 0 {
		t.Errorf("%+v", v)
	}
	// One whose memory is ahead of what the cluster knows of it says where it stands.
	cp, _ := w.cluster.State().Checkpoint("fr-1")
	w.grow("fr", 5)
	w.pass("fr")
	mid, _ := w.cluster.State().Checkpoint("fr-1")
	if mid.Size <= cp.Size {
		t.Fatal("no checkpoint")
	}
	origin := seenOrigin(w.cluster.State(), "access/fr-1", 0)
	if err := w.sites["jp"].seen.Put(origin, mid.Size, mid.Root); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the last proof is from later
		w.grow("fr", 5)
		w.pass("fr")
	}
	for range 3 {
		w.pass()
	}
	if v := w.logView("access/fr-1"); len(v.Sites) != 2 || v.Sites[1].Site != "jp" || v.Sites[1].Size != 49 {
		t.Errorf("%+v", v)
	}
}

// A node that truncates its log, or has another one, is caught by every replica.
func TestTruncatedLogIsCaught(t *testing.T) {
	w := newAudited(t)
	w.grow("fr", 5)
	w.pass()
	*w.sites["fr"].log = *w.sites["fr"].log.Fork(4)
	w.pass()
	cp, _ := w.cluster.State().Checkpoint("fr-1")
	if cp.Size != 5 || cp.Fork == nil || cp.Fork.Size != 4 {
		t.Fatalf("%+v", cp)
	}
	at := w.cluster.State().Index()
	w.grow("fr", 9)
	w.pass()
	if n := w.cluster.State().Index() - at; n > 15+3 {
		t.Errorf("a node whose log is done for has sent %d commands", n)
	}
	if v := w.view(); len(v.Alarms) == 0 || !strings.Contains(v.Alarms[0], "contradict") || !w.logView("access/fr-1").Forked {
		t.Errorf("%v", v.Alarms)
	}
	if l := w.alarms("de", wire.AlarmAudit); len(l) != 1 || l[0].Subject != "log/access/fr-1" || l[0].ID != "audit:log/access/fr-1" {
		t.Errorf("%+v", l)
	}
}

// A cosigner whose own memory knows better does not sign, whatever the state says.
func TestCosignerRemembers(t *testing.T) {
	for name, put := range map[string]func(seen *memorySeen, origin string, cp state.Checkpoint){
		"rolled back": func(s *memorySeen, o string, cp state.Checkpoint) { _ = s.Put(o, cp.Size+100, cp.Root) },
		"forked": func(s *memorySeen, o string, cp state.Checkpoint) {
			_ = s.Put(o, cp.Size, rfc6962.DefaultHasher.EmptyRoot())
		},
		"no memory": func(s *memorySeen, _ string, _ state.Checkpoint) { s.fail = errors.New("disk") },
	} {
		t.Run(name, func(t *testing.T) {
			w := newAudited(t)
			w.grow("fr", 5)
			w.pass()
			st := w.cluster.State()
			cp, _ := st.Checkpoint("fr-1")
			put(w.sites["jp"].seen, seenOrigin(st, "access/fr-1", 0), cp)
			put(w.sites["jp"].seen, seenOrigin(st, cosigned.ClusterLog, 0), state.Checkpoint{Size: 1 << 40, Root: cp.Root})
			w.grow("fr", 5)
			w.keyring("more", "fr")
			w.pass()
			for _, log := range []string{"access/fr-1", cosigned.ClusterLog} {
				before, _ := cosignatureOf(st, log, "jp")
				now, _ := cosignatureOf(w.cluster.State(), log, "jp")
				if now.Size != before.Size {
					t.Errorf("it has cosigned %d leaves of %s", now.Size, log)
				}
				if log == "access/fr-1" && w.logView(log).Cosigned != 10 {
					t.Error("the other sites do not cosign")
				}
			}
			if name != "no memory" && len(w.at("jp").engine.auditAlarms(w.cluster.State())) < 2 {
				t.Error("it raises no alarm")
			}
		})
	}
}

// Another cluster log than one's own is noticed.
func TestAnotherClusterLogIsNoticed(t *testing.T) {
	w := newAudited(t)
	w.keyring("more", "fr")
	w.pass("fr", "de")
	st := w.cluster.State()
	mine, _ := cosignatureOf(st, cosigned.ClusterLog, "fr")
	a := w.as["jp-1"]
	if err := a.submitCosign(context.Background(), st, state.Cosign{Log: cosigned.ClusterLog, Size: mine.Size, Root: mine.Root, State: make([]byte, 32)}); err != nil {
		t.Fatal(err)
	}
	if l := w.at("fr").engine.auditAlarms(w.cluster.State()); len(l) != 1 || !strings.Contains(l[0], "site jp has cosigned another cluster log") {
		t.Error(l)
	}
	if v := w.logView(cosigned.ClusterLog); v.Size != mine.Size || string(v.State) != string(mine.State) {
		t.Errorf("%+v", v)
	}
}
