package state_test

import (
	"slices"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

const hour = state.UseHour

func TestReportUseRefused(t *testing.T) {
	w := small(t)
	good := w.UseCommand("europe", "mail", 1, w.Now())
	if k := w.Apply(w.Command(fr, good)).Kind; k != kms.Unavailable { // nobody has announced it
		t.Errorf("before the releases know it: %v", k)
	}
	w.Announce()
	change := func(f func(*state.ReportUse)) state.ReportUse {
		c := w.UseCommand("europe", "mail", 1, w.Now())
		f(&c)
		return c
	}
	for name, c := range map[string]state.ReportUse{
		"nothing at all":        {},
		"a start, but no end":   change(func(c *state.ReportUse) { c.Until = 0 }),
		"an end, but no start":  change(func(c *state.ReportUse) { c.From = 0 }),
		"an end before a start": change(func(c *state.ReportUse) { c.From = c.Until + 1 }),
		"an end to come":        change(func(c *state.ReportUse) { c.Until = w.Now() + 1 }),
		"an hour to come":       change(func(c *state.ReportUse) { c.Used[0].Hour++ }),
		"no hour":               change(func(c *state.ReportUse) { c.Used[0].Hour = 0 }),
		"no version":            change(func(c *state.ReportUse) { c.Used[0].Version = 0 }),
		"half a key":            change(func(c *state.ReportUse) { c.Used[0].Key = c.Used[0].Key[:8] }),
		"the same twice":        change(func(c *state.ReportUse) { c.Used = append(c.Used, c.Used[0]) }),
		"too many": change(func(c *state.ReportUse) {
			for i := range uint32(state.MaxUses) {
				c.Used = append(c.Used, state.VersionUse{Key: c.Used[0].Key, Version: i + 2, Hour: 1})
			}
		}),
	} {
		if k := w.Apply(w.Command(fr, c)).Kind; k != kms.Invalid {
			t.Errorf("%s: %v", name, k)
		}
	}
	refused(t, w, kms.Invalid, w.Command(fr, good, statetest.As(w.Operator("fr"))))
	refused(t, w, kms.Invalid, w.Command(fr, good, statetest.Expect(1)))
	w.Do(fr, good)
	refused(t, w, kms.Conflict, w.Command(fr, good)) // nothing new
	w.Do(fr, state.ReportUse{Used: good.Used})       // more follows
}

// TestLastUse follows a version through uses, silence and a restart.
func TestLastUse(t *testing.T) {
	w := small(t)
	w.Announce()
	w.Advance(24 * time.Hour)
	created := w.State().Versions("europe", "mail")[0].Created
	expect := func(what string, want state.Use) {
		t.Helper()
		got := w.State().LastUse("europe", "mail", 1)
		if got.Last != want.Last || got.Since != want.Since || !slices.Equal(got.Silent, want.Silent) {
			t.Errorf("%s: %+v, want %+v", what, got, want)
		}
	}
	begin, end := func(ms int64) int64 { return ms / hour }, func(ms int64) int64 { return (ms/hour + 1) * hour }
	expect("nobody has reported", state.Use{Since: created, Silent: []string{de, fr}})
	first := w.Now()
	w.Do(fr, w.UseCommand("europe", "mail", 1, first))
	expect("de is silent", state.Use{Last: end(first), Since: end(first), Silent: []string{de}})
	w.Do(de, state.ReportUse{From: first - 1000, Until: first})
	expect("both were heard", state.Use{Last: end(first), Since: end(first)})
	// An older word changes nothing; the destroyed and the unknown are passed over.
	key := w.State().Keys("europe")[0].ID
	w.Do(fr, state.ReportUse{Used: []state.VersionUse{
		{Key: make([]byte, 16), Version: 1, Hour: begin(first)}, {Key: key, Version: 1, Hour: begin(first) - 5}, {Key: key, Version: 9, Hour: begin(first)}}})
	expect("an older word", state.Use{Last: end(first), Since: end(first)})
	w.Advance(2 * time.Hour)
	w.Do(de, state.ReportUse{From: first - 1000, Until: w.Now()})
	expect("fr is late", state.Use{Last: end(first), Since: end(first)})
	w.Advance(2 * time.Hour)
	expect("fr is silent", state.Use{Last: end(first), Since: end(first), Silent: []string{fr}})
	// A node that counts anew knows nothing of what it did before.
	restarted := w.Now() - 60_000
	w.Do(fr, state.ReportUse{From: restarted, Until: w.Now()})
	expect("fr has restarted", state.Use{Last: end(first), Since: restarted})
	w.Advance(time.Hour)
	w.Do(fr, state.ReportUse{From: restarted, Until: w.Now()})
	w.Do(de, w.UseCommand("europe", "mail", 1, w.Now()))
	expect("used again", state.Use{Last: end(w.Now()), Since: end(w.Now())})
	fullyRestored(t, w.State())
	// A node that is ahead reports no use to come.
	w.Do(fr, state.ReportUse{Used: []state.VersionUse{{Key: key, Version: 1, Hour: begin(w.Now()) + 100}}}, statetest.At(w.Now()+100*hour))
	expect("a clock ahead", state.Use{Last: end(w.Now()), Since: end(w.Now())})
	// It goes with the material.
	w.Rotate("europe", "mail")
	id := w.Propose(kms.ActionDestroy, mail, approval.VersionParams{Version: 1})
	w.ApproveAll(id)
	w.Advance(8 * 24 * time.Hour)
	before := w.State()
	w.Execute(id)
	if u := w.State().LastUse("europe", "mail", 1); u.Last != 0 {
		t.Errorf("of a destroyed version: %+v", u)
	}
	if err := w.State().Extends(before); err != nil {
		t.Error(err)
	}
	if err := before.Extends(w.State()); err == nil {
		t.Error("a state before the destruction extends one after it")
	}
}

// TestUseOfSignKey: signatures are verified at nodes that cannot open the key.
func TestUseOfSignKey(t *testing.T) {
	w := small(t)
	w.Announce()
	w.CreateKey("europe", "seal", kms.Sign)
	if u := w.State().LastUse("europe", "seal", 1); !slices.Equal(u.Silent, []string{de, fr, "node-jp-1"}) || u.Known() {
		t.Errorf("%+v", u)
	}
	if u := w.State().LastUse("europe", "seal", 2); u.Last != 0 || u.Since != 0 {
		t.Errorf("of no version: %+v", u)
	}
}
