package state

import (
	"maps"
	"slices"

	"github.com/conclave-kms/conclave/kms"
)

func (Tick) validate(e Envelope) error {
	if e.Principal != "" {
		return kms.Errorf(kms.Invalid, "tick: a node sends it on nobody's behalf")
	}
	return noExpect(e)
}

func (Tick) verify(*tx) error { return nil }

// apply records the origin's time and moves the clock to the median over sites.
func (Tick) apply(t *tx) error {
	st, _ := find[NodeStatus](t.Txn, tableStatus, byID, nameKey(t.env.Origin))
	if t.env.Time <= st.Time {
		return nil // time never runs backwards
	}
	insert(t.Txn, tableStatus, NodeStatus{Node: t.env.Origin, Time: t.env.Time, Statement: t.raw})
	t.advance()
	return nil
}

// advance moves the clock to where the ticks put it, after one of them or a change of
// who counts.
func (t *tx) advance() { t.clock = max(t.clock, t.reader().median()) }

// latest returns the latest time that a node of each site has signed, for the sites
// that have a voter: others do not hold the clock.
func (r reader) latest() map[string]int64 {
	m, voting := make(map[string]int64), make(map[string]bool)
	for _, n := range r.nodes() {
		if st, ok := find[NodeStatus](r.x, tableStatus, byID, nameKey(n.ID)); ok && n.Root != 0 {
			m[n.Site] = max(m[n.Site], st.Time)
		}
		voting[n.Site] = voting[n.Site] || n.Voter
	}
	maps.DeleteFunc(m, func(site string, _ int64) bool { return !voting[site] })
	return m
}

// median returns the median over sites of the latest time that a node of the site
// has signed, the lower one of two.
func (r reader) median() int64 {
	times := slices.Sorted(maps.Values(r.latest()))
	if len(times) == 0 {
		return 0
	}
	return times[(len(times)-1)/2]
}

// remember records the nonce of a fresh command and the outcome of its idempotency
// key, and forgets what has become too old.
func (t *tx) remember(r Result, dup bool) {
	insert(t.Txn, tableNonce, nonce{t.env.Origin, t.env.Nonce, t.env.Time})
	if len(t.env.Idempotency) > 0 && !dup {
		if _, ok := find[Outcome](t.Txn, tableOutcome, byID, t.env.Idempotency); !ok {
			insert(t.Txn, tableOutcome, Outcome{
				Key: t.env.Idempotency, Principal: t.env.Principal, Request: t.env.Request,
				Index: t.index, Time: t.clock, Kind: r.Kind,
			})
		}
	}
	forget(t, tableNonce, t.clock-Window, func(n *nonce) int64 { return n.Time })
	forget(t, tableOutcome, t.clock-OutcomeRetention, func(o *Outcome) int64 { return o.Time })
}

// forget deletes the records of a table with a time before limit.
func forget[T any](t *tx, table string, limit int64, time func(*T) int64) {
	it, err := t.Get(table, byTime+"_prefix", []byte{})
	mustDB(err)
	var old []*T
	for raw := it.Next(); raw != nil; raw = it.Next() {
		r := raw.(*T)
		if time(r) >= limit {
			break
		}
		old = append(old, r)
	}
	for _, r := range old {
		mustDB(t.Delete(table, r))
	}
}
