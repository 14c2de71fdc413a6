package engine

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// TestLastUseIsReported uses versions at several nodes, singly, in batches and by a public
// key, and finds the hours in the state.
func TestLastUseIsReported(t *testing.T) {
	w := newWorld(t, "")
	as := w.agents()
	w.keyring("r", "fr", "de")
	w.key("r", "data", kms.Encrypt)
	w.key("r", "sig", kms.Sign)
	w.settle(as)
	fr, de, jp := w.at("fr").engine, w.at("de").engine, w.at("jp").engine
	service := caller("service", "fr")
	encrypt := func(e *Engine) []byte {
		return check[wire.EncryptResponse](t)(e.Encrypt(bg, service, "r", "data", wire.EncryptRequest{Plaintext: []byte("x")})).Ciphertext
	}
	pass := func(d time.Duration) {
		for ; d > 0; d -= 30 * time.Minute {
			w.clock.Advance(30 * time.Minute)
			w.tick()
			w.settle(as)
		}
	}
	used := func(key string, version uint32) state.Use { return w.cluster.State().LastUse("r", key, version) }
	if u := used("data", 1); !slices.Equal(u.Silent, []string{"de-1", "fr-1"}) {
		t.Errorf("before anybody has reported: %+v", u)
	}
	old := encrypt(fr)
	first := w.clock.Now()
	pass(2 * time.Hour)
	end := func(at time.Time) int64 { return (hourOf(at) + 1) * state.UseHour }
	if u := used("data", 1); !u.Known() || u.Last != end(first) || u.Since != u.Last {
		t.Errorf("after an encryption at %d: %+v", first.UnixMilli(), u)
	}
	w.carry(as, kms.ActionRotate, approval.KeyTarget("r", "data"), wire.ProposalParameters{})
	encrypt(de)
	pass(3 * time.Hour)
	if u := used("data", 1); u.Last != end(first) {
		t.Errorf("an encryption with version 2 counts for version 1: %+v", u)
	}
	// A batch, one item of which is nonsense, and a rewrap.
	batch := wire.Batch[wire.DecryptRequest]{Items: []wire.DecryptRequest{{Ciphertext: []byte("no")}, {Ciphertext: old}}}
	check[wire.BatchResult[wire.DecryptResponse]](t)(de.DecryptBatch(bg, service, "r", "data", batch))
	again := w.clock.Now()
	pass(2 * time.Hour)
	if u := used("data", 1); u.Last != end(again) {
		t.Errorf("after a batch at %d: %+v", again.UnixMilli(), u)
	}
	pass(2 * time.Hour)
	check[wire.EncryptResponse](t)(fr.Rewrap(bg, service, "r", "data", wire.RewrapRequest{Ciphertext: old}))
	rewrapped := w.clock.Now()
	// A signature is verified at a node that cannot make one.
	s := check[wire.SignResponse](t)(fr.Sign(bg, service, "r", "sig", wire.SignRequest{Message: []byte("m")}))
	pass(2 * time.Hour)
	check[wire.VerifyResponse](t)(jp.Verify(bg, service, "r", "sig", wire.VerifyRequest{Message: []byte("m"), Signature: s.Signature}))
	verified := w.clock.Now()
	pass(2 * time.Hour)
	for _, v := range []uint32{1, 2} {
		if u := used("data", v); u.Last != end(rewrapped) {
			t.Errorf("version %d after a rewrap at %d: %+v", v, rewrapped.UnixMilli(), u)
		}
	}
	if u := used("sig", 1); u.Last != end(verified) || !u.Known() {
		t.Errorf("after a verification at %d: %+v", verified.UnixMilli(), u)
	}
	view := check[wire.Key](t)(fr.Key(bg, caller("operator", "fr"), "r", "data"))
	if u := view.Versions[0].Use; u == nil || !u.Known || u.Last.UnixMilli() != end(rewrapped) || !u.UnusedSince.Equal(u.Last) {
		t.Errorf("%+v", u)
	}
	// What is not new is not said again, and a node that is stopped becomes unknown.
	delete(as, "de-1")
	pass(4 * time.Hour)
	if u := used("data", 1); !slices.Equal(u.Silent, []string{"de-1"}) || u.Last != end(rewrapped) {
		t.Errorf("after de-1 stopped: %+v", u)
	}
}

// TestManyUses reports more versions than one command has, while others are in use.
func TestManyUses(t *testing.T) {
	w := newWorld(t, "")
	as := w.agents()
	w.settle(as)
	e := w.at("fr").engine
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 3 * state.MaxUses {
				id := kms.KeyID{byte(i), byte(i >> 8), byte(g / 2)}
				note(e.uses.of(id, 1), hourOf(w.clock.Now()))
			}
		})
	}
	wg.Wait()
	a, before := as["fr-1"], w.cluster.State().Index()
	a.useReports.reported = map[usedVersion]int64{}
	if err := a.sendUses(context.Background(), w.clock.Now()); err != nil {
		t.Fatal(err)
	}
	if n := w.cluster.State().Index() - before; n != 6 || len(a.useReports.reported) != 6*state.MaxUses {
		t.Errorf("%d versions were reported with %d commands", len(a.useReports.reported), n)
	}
	if l := e.uses.since(a.useReports.reported); len(l) != 0 {
		t.Errorf("%d versions would be reported again", len(l))
	}
}

// TestUseBeforeARestart: what a node used after its last report is found in its access log
// when it starts anew; where the log does not tell, the time before is unknown.
func TestUseBeforeARestart(t *testing.T) {
	w := newWorld(t, "")
	as := w.agents()
	w.keyring("r", "fr")
	w.key("r", "data", kms.Encrypt)
	w.settle(as)
	pass := func(d time.Duration) {
		for ; d > 0; d -= 20 * time.Minute {
			w.clock.Advance(20 * time.Minute)
			w.tick()
			w.settle(as)
		}
	}
	fr, service := w.at("fr"), caller("service", "fr")
	pass(2 * time.Hour)
	began := fr.engine.started.UnixMilli()
	old := check[wire.EncryptResponse](t)(fr.engine.Encrypt(bg, service, "r", "data", wire.EncryptRequest{Plaintext: []byte("x")})).Ciphertext
	w.carry(as, kms.ActionRotate, approval.KeyTarget("r", "data"), wire.ProposalParameters{})
	pass(2 * time.Hour)
	covered := func(want int64, what string) {
		t.Helper()
		u := w.cluster.State().LastUse("r", "data", 2)
		if v, _ := w.cluster.State().Version("r", "data", 2); !u.Known() || u.Since != max(want, v.Created, u.Last) {
			t.Errorf("%s: %+v, want since %d", what, u, max(want, v.Created, u.Last))
		}
	}
	covered(began, "before the restart")
	restart := func(past func(time.Time, func(audit.Entry)) (bool, error)) {
		cfg := fr.engine.cfg
		cfg.Past = past
		fr.engine = must(New(cfg))
		as["fr-1"] = must(NewAgent(fr.engine, AgentConfig{Watch: w.cluster, After: w.clock.After}))
	}
	// It rewraps something just before it ends: the entry names version 2 alone.
	pass(2 * time.Hour)
	check[wire.EncryptResponse](t)(fr.engine.Rewrap(bg, service, "r", "data", wire.RewrapRequest{Ciphertext: old}))
	last := w.clock.Now()
	w.clock.Advance(2 * time.Hour)
	restart(func(since time.Time, f func(audit.Entry)) (reaches bool, err error) {
		for _, e := range fr.log.all() {
			if e.Time < since.UnixMilli() {
				reaches = true
			} else {
				f(e)
			}
		}
		return reaches, nil
	})
	pass(time.Hour)
	for _, v := range []uint32{1, 2} {
		if u := w.cluster.State().LastUse("r", "data", v); u.Last != (hourOf(last)+1)*state.UseHour {
			t.Errorf("version %d, used at %d before the restart: %+v", v, last.UnixMilli(), u)
		}
	}
	covered(began, "after a restart with a log that tells")
	w.clock.Advance(10 * time.Minute)
	restart(func(time.Time, func(audit.Entry)) (bool, error) { return false, nil })
	again := fr.engine.started.UnixMilli()
	pass(3 * time.Hour)
	covered(again, "after a restart with another log")
}

// all are the entries of a log.
func (l *memoryLog) all() []audit.Entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.entries)
}
