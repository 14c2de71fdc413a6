// Package anomaly finds what is unusual in an access log: who uses a key for the first time,
// far more than before, at a node of another site, outside the hours, or is denied many times.
// It is pure: the same entries in the same order under the same policy give the
// same findings, and each says by what numbers it was found. Its memory is bounded.
package anomaly

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms"
)

// The rules by which something is unusual.
const (
	FirstUse = "first-use" // a principal uses a key for the first time, or again after long
	Rate     = "rate"      // a principal uses a key far more in an hour than before
	Denials  = "denials"   // a principal is denied many times
	Site     = "site"      // a principal of another site uses keys at this node, which it does not usually
	Hours    = "hours"     // a key is used outside the hours of the policy
)

// Rules are all of them.
func Rules() []string { return []string{FirstUse, Rate, Denials, Site, Hours} }

// Entry is what counts of an entry of an access log.
type Entry struct {
	Time      int64  // Unix milliseconds
	Node      string // whose log it is
	Principal string // SPIFFE ID
	Action    string
	Resource  string // KEYRING/KEY, or what else it is about
	Outcome   string // "ok", "partial" or a kms.Kind's name
	Count     int    // items of a batch
}

// Finding is something unusual.
type Finding struct {
	ID        string // the same when the same entries are observed again
	Rule      string
	Principal string
	Key       string // KEYRING/KEY, empty where the rule is not about one
	Time      int64  // of the entry, Unix milliseconds
	Count     int64  // that was seen
	Limit     int64  // that was expected at most
	Text      string // what was found and by what numbers
}

// Policy says what is unusual.
type Policy struct {
	TrustDomain string        // of the node's site
	Learn       time.Duration // from the first entry on, before a first use or another site is unusual
	Memory      time.Duration // after which something is forgotten
	RateFactor  int64         // times the busiest hour of the last seven days
	RateFloor   int64         // items in an hour that are never too many
	Denials     int64         // in DenialWindow
	Hours       []Window
}

// Fixed parts of the policy.
const (
	DenialWindow = 10 * time.Minute
	rateHistory  = 7              // days
	rateLearn    = 24 * time.Hour // of use, before a rate is unusual
)

// DefaultPolicy is for a site's own services that run all day.
func DefaultPolicy() Policy {
	return Policy{Learn: 7 * 24 * time.Hour, Memory: 30 * 24 * time.Hour, RateFactor: 10, RateFloor: 1000, Denials: 20}
}

// Window is when keys are used, day by day.
type Window struct {
	Keyrings []string       // none: all
	Days     []time.Weekday // none: all
	From, To int            // minutes after midnight; To may be before From, which is then past midnight
	Zone     *time.Location
}

// holds reports whether the window is about a keyring, and if so whether t is in it. What
// is past midnight belongs to the day on which it began.
func (w Window) holds(keyring string, t time.Time) (about, in bool) {
	if len(w.Keyrings) > 0 && !slices.Contains(w.Keyrings, keyring) {
		return false, false
	}
	t = t.In(w.Zone)
	day, minute := t.Weekday(), t.Hour()*60+t.Minute()
	switch {
	case w.From < w.To:
		in = minute >= w.From && minute < w.To
	case minute >= w.From:
		in = true
	case minute < w.To:
		in, day = true, (day+6)%7
	}
	return true, in && (len(w.Days) == 0 || slices.Contains(w.Days, day))
}

// used are the actions that use a key.
var used = map[string]bool{
	"encrypt": true, "decrypt": true, "rewrap": true, "datakey": true, "datakey-wrapped": true, "mac": true, "verify-mac": true,
	"sign": true, "verify": true, "export": true, "export-material": true,
}

// Limits of a Detector's memory.
const (
	maxUses = 20_000 // of a key by a principal
	maxWho  = 5_000  // principals
)

// use is what is remembered of a principal's use of a key.
type use struct {
	First int64              `json:"first"` // Unix milliseconds
	Last  int64              `json:"last"`
	Hour  int64              `json:"hour"`  // the present one, since 1970
	Count int64              `json:"count"` // in it
	Peaks [rateHistory]int64 `json:"peaks"` // busiest hours of the last days
	Told  int64              `json:"told"`  // hour in which its rate was last told
	Out   int64              `json:"out"`   // day on which it was last told to be outside the hours
}

// who is what is remembered of a principal.
type who struct {
	Away   int64 `json:"away"`   // when it last used a key at this node, of another site
	Window int64 `json:"window"` // the present one, since 1970
	Denied int64 `json:"denied"` // in it
}

// Detector observes one node's access log. It is not safe for concurrent use.
type Detector struct {
	policy Policy
	began  int64 // time of the first entry
	last   int64 // of the newest
	uses   *recent[use]
	who    *recent[who]
}

// New returns a detector that knows nothing yet.
func New(p Policy) *Detector {
	return &Detector{policy: p, uses: newRecent[use](maxUses), who: newRecent[who](maxWho)}
}

// Observe takes the next entry and returns what is unusual about it.
func (d *Detector) Observe(e Entry) (l []Finding) {
	denied := e.Outcome == kms.Denied.String()
	ring, _, err := kms.SplitKeyPath(e.Resource)
	use := used[e.Action] && err == nil && (e.Outcome == "ok" || e.Outcome == "partial")
	if e.Principal == "" || e.Time < 0 || !denied && !use {
		return nil
	}
	if d.began == 0 {
		d.began = e.Time
	}
	d.last = max(d.last, e.Time)
	if denied {
		return d.denied(e)
	}
	u, known := d.uses.get(e.Principal + "\x00" + e.Resource)
	if !known || e.Time-u.Last > d.policy.Memory.Milliseconds() {
		*u = blank(e.Time)
		l = d.firstUse(l, e)
	}
	u.Last = max(u.Last, e.Time)
	l = d.rate(l, e, u)
	l = d.hours(l, e, u, ring)
	return d.site(l, e)
}

// blank is a use that begins.
func blank(at int64) use {
	return use{First: at, Last: at, Hour: at / hour, Told: -1, Out: -1}
}

const (
	hour = int64(time.Hour / time.Millisecond)
	day  = 24 * hour
)

func (d *Detector) find(l []Finding, e Entry, rule, key string, window, count, limit int64, format string, args ...any) []Finding {
	return append(l, Finding{
		ID:   fmt.Sprintf("%s:%s:%s:%s@%d", rule, e.Node, e.Principal, key, window),
		Rule: rule, Principal: e.Principal, Key: key, Time: e.Time, Count: count, Limit: limit, Text: fmt.Sprintf(format, args...),
	})
}

// learning reports whether too little was seen to know what is usual.
func (d *Detector) learning(e Entry) bool {
	return e.Time-d.began < d.policy.Learn.Milliseconds()
}

func (d *Detector) firstUse(l []Finding, e Entry) []Finding {
	if d.learning(e) {
		return l
	}
	return d.find(l, e, FirstUse, e.Resource, e.Time, 1, 0, "%s used %s (%s) for the first time that this node remembers, which is up to %d days",
		e.Principal, e.Resource, e.Action, int64(d.policy.Memory/(24*time.Hour)))
}

// rate compares the present hour with the busiest one of the days before.
func (d *Detector) rate(l []Finding, e Entry, u *use) []Finding {
	if h := e.Time / hour; h > u.Hour {
		u.turn(h)
	}
	u.Count += int64(max(e.Count, 1))
	peak := slices.Max(u.Peaks[:])
	limit := max(d.policy.RateFloor, d.policy.RateFactor*peak)
	if u.Count <= limit || u.Told == u.Hour || e.Time-u.First < rateLearn.Milliseconds() {
		return l
	}
	u.Told = u.Hour
	return d.find(l, e, Rate, e.Resource, u.Hour, u.Count, limit, "%s used %s for %d items in the hour from %s on; the busiest hour of the last %d days had %d, and more than %d is unusual (%d times that, at least %d)",
		e.Principal, e.Resource, u.Count, clock(u.Hour*hour), rateHistory, peak, limit, d.policy.RateFactor, d.policy.RateFloor)
}

// turn goes on to another hour.
func (u *use) turn(h int64) {
	slot := func(day int64) *int64 { return &u.Peaks[day%rateHistory] }
	from, to := u.Hour/24, h/24
	*slot(from) = max(*slot(from), u.Count)
	for x := max(from, to-rateHistory) + 1; x <= to; x++ {
		*slot(x) = 0
	}
	u.Hour, u.Count = h, 0
}

// hours looks whether a key may be used at the time by the windows that are about it.
func (d *Detector) hours(l []Finding, e Entry, u *use, ring string) []Finding {
	t, out := time.UnixMilli(e.Time).UTC(), false
	for _, w := range d.policy.Hours {
		about, in := w.holds(ring, t)
		if in {
			return l
		}
		out = out || about
	}
	if !out || u.Out == e.Time/day {
		return l
	}
	u.Out = e.Time / day
	return d.find(l, e, Hours, e.Resource, u.Out, 1, 0, "%s used %s (%s) at %s, outside the hours of the policy", e.Principal, e.Resource, e.Action, clock(e.Time))
}

// site looks at principals of other sites.
func (d *Detector) site(l []Finding, e Entry) []Finding {
	domain, _, _ := strings.Cut(strings.TrimPrefix(e.Principal, "spiffe://"), "/")
	if domain == d.policy.TrustDomain {
		return l
	}
	w, _ := d.who.get(e.Principal)
	was := w.Away
	w.Away = max(was, e.Time)
	if d.learning(e) || was > 0 && e.Time-was <= d.policy.Memory.Milliseconds() {
		return l
	}
	return d.find(l, e, Site, "", e.Time, 1, 0, "%s used keys at node %s, which is of another site, for the first time that this node remembers, which is up to %d days",
		e.Principal, e.Node, int64(d.policy.Memory/(24*time.Hour)))
}

// denied counts what a principal was denied.
func (d *Detector) denied(e Entry) []Finding {
	w, _ := d.who.get(e.Principal)
	if now := e.Time / DenialWindow.Milliseconds(); now > w.Window {
		w.Window, w.Denied = now, 0
	}
	w.Denied++
	if w.Denied != d.policy.Denials {
		return nil
	}
	return d.find(nil, e, Denials, "", w.Window, w.Denied, d.policy.Denials-1, "%s was denied %d times in the %v from %s on, the last time %s of %s",
		e.Principal, w.Denied, DenialWindow, clock(w.Window*DenialWindow.Milliseconds()), e.Action, e.Resource)
}

func clock(ms int64) string { return time.UnixMilli(ms).UTC().Format(time.RFC3339) }
