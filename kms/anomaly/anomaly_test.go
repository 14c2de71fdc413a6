package anomaly

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
)

// start is a Monday, at 10:00 UTC.
var start = time.Date(2026, 1, 5, 10, 0, 0, 0, time.UTC)

const (
	planner = "spiffe://fr.example/service/planner"
	guest   = "spiffe://de.example/service/guest"
)

func policy() Policy {
	p := DefaultPolicy()
	p.TrustDomain = "fr.example"
	return p
}

// entry is a use of a key at a time after start.
func entry(after time.Duration, principal, key string, count int) Entry {
	return Entry{Time: start.Add(after).UnixMilli(), Node: "fr-1", Principal: principal, Action: "encrypt", Resource: key, Outcome: "ok", Count: count}
}

func denied(after time.Duration, principal string) Entry {
	e := entry(after, principal, "coalition/orders", 1)
	e.Outcome = "denied"
	return e
}

// want fails the test unless the findings are of these rules.
func want(t *testing.T, what string, l []Finding, rules ...string) {
	t.Helper()
	var got []string
	for _, f := range l {
		got = append(got, f.Rule)
		if f.ID == "" || f.Principal == "" || f.Time == 0 || !strings.Contains(f.Text, f.Principal) {
			t.Errorf("%s: %+v explains nothing", what, f)
		}
	}
	if fmt.Sprint(got) != fmt.Sprint(rules) && len(got)+len(rules) > 0 {
		t.Errorf("%s: %v, want %v", what, got, rules)
	}
}

const aDay = 24 * time.Hour

func TestFirstUse(t *testing.T) {
	d := New(policy())
	want(t, "while it learns", d.Observe(entry(0, planner, "coalition/orders", 1)))
	want(t, "known", d.Observe(entry(8*aDay, planner, "coalition/orders", 1)))
	want(t, "another key", d.Observe(entry(8*aDay, planner, "coalition/plans", 1)), FirstUse)
	want(t, "the same again", d.Observe(entry(9*aDay, planner, "coalition/plans", 1)))
	want(t, "another principal", d.Observe(entry(9*aDay, planner+"2", "coalition/plans", 1)), FirstUse)
	want(t, "just remembered", d.Observe(entry(38*aDay, planner, "coalition/orders", 1)))
	want(t, "after long", d.Observe(entry(68*aDay+time.Millisecond, planner, "coalition/orders", 1)), FirstUse)
	e := entry(80*aDay, planner, "coalition/new", 1)
	e.Action = "key:read"
	want(t, "no use of a key", d.Observe(e))
	e.Action, e.Outcome = "encrypt", "not-found"
	want(t, "nothing was done", d.Observe(e))
	e = entry(80*aDay, "", "coalition/new", 1)
	want(t, "nobody", d.Observe(e))
	e = entry(80*aDay, planner, "cluster", 1)
	want(t, "no key", d.Observe(e))
}

func TestRate(t *testing.T) {
	d := New(policy())
	want(t, "much at once, at first", d.Observe(entry(0, planner, "coalition/orders", 5000)))
	at := aDay
	want(t, "ten times its busiest hour", d.Observe(entry(at, planner, "coalition/orders", 50_000)))
	l := d.Observe(entry(at+time.Minute, planner, "coalition/orders", 1))
	want(t, "more", l, Rate)
	if l[0].Count != 50_001 || l[0].Limit != 50_000 || !strings.Contains(l[0].Text, "50001 items") || !strings.Contains(l[0].Text, "had 5000") {
		t.Errorf("%+v", l[0])
	}
	want(t, "told once an hour", d.Observe(entry(at+2*time.Minute, planner, "coalition/orders", 100_000)))
	// That was its busiest hour since, and is forgotten after a week.
	want(t, "the new measure", d.Observe(entry(at+2*time.Hour, planner, "coalition/orders", 1_400_000)))
	want(t, "the floor", d.Observe(entry(at+10*aDay, planner, "coalition/orders", 1000)))
	want(t, "above the floor", d.Observe(entry(at+10*aDay+time.Second, planner, "coalition/orders", 1)), Rate)
	// A clock that goes back counts in the present hour.
	want(t, "back", d.Observe(entry(at, planner, "coalition/orders", 1)))
	// The busiest hour of six days ago counts, of seven not.
	d = New(policy())
	d.Observe(entry(0, planner, "a/b", 2000))
	for i := time.Duration(1); i < 6; i++ {
		d.Observe(entry(i*aDay, planner, "a/b", 1))
	}
	want(t, "six days", d.Observe(entry(6*aDay, planner, "a/b", 20_000)))
	d = New(policy())
	d.Observe(entry(0, planner, "a/b", 2000))
	want(t, "seven days", d.Observe(entry(7*aDay, planner, "a/b", 1001)), Rate)
}

func TestDenials(t *testing.T) {
	d := New(policy())
	for i := range 19 {
		want(t, "few", d.Observe(denied(time.Duration(i)*time.Second, guest)))
	}
	want(t, "of another", d.Observe(denied(20*time.Second, planner)))
	want(t, "many", d.Observe(denied(21*time.Second, guest)), Denials)
	want(t, "told once", d.Observe(denied(22*time.Second, guest)))
	for i := range 19 {
		want(t, "in the next window", d.Observe(denied(DenialWindow+time.Duration(i)*time.Second, guest)))
	}
	want(t, "again", d.Observe(denied(DenialWindow+time.Minute, guest)), Denials)
}

func TestSite(t *testing.T) {
	d := New(policy())
	want(t, "while it learns", d.Observe(entry(0, guest, "coalition/orders", 1)))
	want(t, "own site", d.Observe(entry(8*aDay, planner, "coalition/orders", 1)), FirstUse)
	want(t, "known", d.Observe(entry(8*aDay, guest, "coalition/orders", 1)))
	want(t, "another", d.Observe(entry(8*aDay, guest+"2", "coalition/orders", 1)), FirstUse, Site)
	want(t, "another key", d.Observe(entry(8*aDay, guest+"2", "coalition/plans", 1)), FirstUse)
	want(t, "after long", d.Observe(entry(39*aDay, guest+"2", "coalition/plans", 1)), FirstUse, Site)
	want(t, "one that calls itself alike", d.Observe(entry(39*aDay, "spiffe://fr.example.evil/service/x", "coalition/plans", 1)), FirstUse, Site)
}

func TestHours(t *testing.T) {
	paris := time.FixedZone("CET", 3600)
	p := policy()
	p.Hours = []Window{
		{Keyrings: []string{"coalition"}, Days: []time.Weekday{1, 2, 3, 4, 5}, From: 9 * 60, To: 17*60 + 30, Zone: paris},
		{Keyrings: []string{"night"}, Days: []time.Weekday{time.Friday}, From: 22 * 60, To: 6 * 60, Zone: time.UTC},
	}
	at := func(key, when string) []Finding {
		t.Helper()
		x, err := time.Parse("2006-01-02 15:04", when)
		if err != nil {
			t.Fatal(err)
		}
		return New(p).Observe(entry(x.Sub(start), planner, key, 1))
	}
	for _, x := range []struct {
		key, when string
		out       bool
	}{
		{"coalition/a", "2026-01-05 08:00", false}, {"coalition/a", "2026-01-05 07:59", true}, {"coalition/a", "2026-01-05 16:29", false}, {"coalition/a", "2026-01-05 16:30", true},
		{"coalition/a", "2026-01-10 10:00", true}, {"other/a", "2026-01-10 03:00", false},
		{"night/a", "2026-01-09 22:00", false}, {"night/a", "2026-01-10 05:59", false}, {"night/a", "2026-01-10 06:00", true}, {"night/a", "2026-01-10 22:00", true}, {"night/a", "2026-01-09 05:00", true},
	} {
		var rules []string
		if x.out {
			rules = []string{Hours}
		}
		want(t, x.key+" at "+x.when, at(x.key, x.when), rules...)
	}
	d := New(p)
	night := 12 * time.Hour
	want(t, "outside", d.Observe(entry(night, planner, "coalition/a", 1)), Hours)
	want(t, "told once a day", d.Observe(entry(night+time.Hour, planner, "coalition/a", 1)))
	want(t, "the next day", d.Observe(entry(night+aDay, planner, "coalition/a", 1)), Hours)
}

// story is a log of many principals and keys.
func story(n int) (l []Entry) {
	r := rand.New(rand.NewSource(1))
	at := time.Duration(0)
	for range n {
		at += time.Duration(r.Intn(60)) * time.Second
		e := entry(at, fmt.Sprintf("spiffe://%s.example/service/%d", []string{"fr", "de"}[r.Intn(2)], r.Intn(30)), fmt.Sprintf("r/%d", r.Intn(40)), 1<<r.Intn(14))
		if r.Intn(4) == 0 {
			e.Outcome = "denied"
		}
		l = append(l, e)
	}
	return l
}

// TestDeterministic: the same log gives the same findings, also over a restart.
func TestDeterministic(t *testing.T) {
	log := story(20_000)
	run := func(restart int) (l []Finding, d *Detector) {
		p := policy()
		p.Denials, p.Learn = 3, 5*time.Minute
		d = New(p)
		for i, e := range log {
			if restart > 0 && i%restart == 0 {
				b, err := d.Marshal()
				if err != nil {
					t.Fatal(err)
				}
				d = New(p)
				if last, err := d.Unmarshal(b); err != nil || i > 0 && last == 0 {
					t.Fatal(last, err)
				}
			}
			l = append(l, d.Observe(e)...)
		}
		return l, d
	}
	a, da := run(0)
	b, db := run(997)
	seen := map[string]bool{}
	for _, f := range a {
		seen[f.Rule] = true
	}
	if !reflect.DeepEqual(a, b) || len(seen) != 4 {
		t.Errorf("%d and %d findings, of %v", len(a), len(b), seen)
	}
	ma, errA := da.Marshal()
	mb, errB := db.Marshal()
	if errors.Join(errA, errB) != nil || !bytes.Equal(ma, mb) {
		t.Error("they remember different things")
	}
}

// TestBounded: the memory does not grow with the principals and keys.
func TestBounded(t *testing.T) {
	d := New(policy())
	for i := range maxUses + 1000 {
		d.Observe(entry(time.Duration(i), fmt.Sprintf("spiffe://de.example/service/%d", i), "a/b", 1))
	}
	if d.uses.order.Len() != maxUses || len(d.uses.by) != maxUses || d.who.order.Len() != maxWho || len(d.who.by) != maxWho {
		t.Errorf("%d uses, %d principals", len(d.uses.by), len(d.who.by))
	}
	if _, known := d.uses.by["spiffe://de.example/service/999\x00a/b"]; known {
		t.Error("the oldest is still remembered")
	}
	if _, known := d.uses.by["spiffe://de.example/service/1000\x00a/b"]; !known {
		t.Error("another one than the oldest was forgotten")
	}
}

func TestUnmarshalRefuses(t *testing.T) {
	for _, text := range []string{"", "{}", `{"format":2}`, `{"format":1,"uses":[null]}`, `{"format":1,"uses":[{"value":{"hour":-1}}]}`, `{"format":1,"who":[null]}`} {
		if _, err := New(policy()).Unmarshal([]byte(text)); !errors.Is(err, kms.Invalid) {
			t.Errorf("%q: %v", text, err)
		}
	}
}
