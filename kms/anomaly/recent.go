package anomaly

import (
	"container/list"
	"encoding/json"

	"github.com/conclave-kms/conclave/kms"
)

// recent remembers so many things by name, those that were asked for last.
type recent[T any] struct {
	max   int
	order *list.List // of item[T], the newest at the front
	by    map[string]*list.Element
}

type item[T any] struct {
	Name  string `json:"name"`
	Value T      `json:"value"`
}

func newRecent[T any](n int) *recent[T] {
	return &recent[T]{max: n, order: list.New(), by: map[string]*list.Element{}}
}

// get returns the thing of the name, the zero one if it is not known, to be changed in place
// until the next call.
func (r *recent[T]) get(name string) (v *T, known bool) {
	if e, ok := r.by[name]; ok {
		r.order.MoveToFront(e)
		return &e.Value.(*item[T]).Value, true
	}
	if r.order.Len() >= r.max {
		oldest := r.order.Back()
		r.order.Remove(oldest)
		delete(r.by, oldest.Value.(*item[T]).Name)
	}
	x := &item[T]{Name: name}
	r.by[name] = r.order.PushFront(x)
	return &x.Value, false
}

// all returns everything, the oldest first.
func (r *recent[T]) all() []*item[T] {
	l := make([]*item[T], 0, r.order.Len())
	for e := r.order.Back(); e != nil; e = e.Prev() {
		l = append(l, e.Value.(*item[T]))
	}
	return l
}

// memory is what a detector remembers.
type memory struct {
	Format int          `json:"format"`
	Began  int64        `json:"began"`
	Last   int64        `json:"last"`
	Uses   []*item[use] `json:"uses"`
	Who    []*item[who] `json:"who"`
}

const memoryFormat = 1

// Marshal returns what the detector remembers, for Unmarshal.
func (d *Detector) Marshal() ([]byte, error) {
	return json.Marshal(memory{memoryFormat, d.began, d.last, d.uses.all(), d.who.all()})
}

// Unmarshal has the detector go on from what another one remembered, and returns the time
// of the newest entry that it had observed, Unix milliseconds. Errors: kms.Invalid.
func (d *Detector) Unmarshal(b []byte) (last int64, err error) {
	var m memory
	if err := json.Unmarshal(b, &m); err != nil {
		return 0, kms.Wrap(kms.Invalid, err, "what was remembered of the access log cannot be read", "")
	}
	if m.Format != memoryFormat || len(m.Uses) > maxUses || len(m.Who) > maxWho {
		return 0, kms.Errorf(kms.Invalid, "what was remembered of the access log is of another format")
	}
	for _, x := range m.Uses {
		if x == nil || x.Value.Hour < 0 {
			return 0, kms.Errorf(kms.Invalid, "what was remembered of the access log is damaged")
		}
	}
	for _, x := range m.Who {
		if x == nil {
			return 0, kms.Errorf(kms.Invalid, "what was remembered of the access log is damaged")
		}
	}
	d.began, d.last = m.Began, m.Last
	d.uses, d.who = newRecent[use](maxUses), newRecent[who](maxWho)
	for _, x := range m.Uses {
		v, _ := d.uses.get(x.Name)
		*v = x.Value
	}
	for _, x := range m.Who {
		v, _ := d.who.get(x.Name)
		*v = x.Value
	}
	return m.Last, nil
}
