package state_test

import (
	"errors"
	"slices"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// later is a kind of command of a release to come.
var later = state.CommandKind{Type: 999, Version: 1}

func of(k state.CommandKind) statetest.Option {
	return func(e *state.Envelope) { e.Type, e.Version = k.Type, k.Version }
}

// with is what a node announces whose program knows more kinds than this one.
func with(w *statetest.World, node string, kinds ...state.CommandKind) state.Announce {
	a := state.Program("next")
	a.Kinds = append(a.Kinds, kinds...)
	news, _ := w.State().News(node, a)
	return news
}

// A command of a new kind is the same no-op for all until every node has announced
// it, whether a node's program knows it or not; from then on it halts a node whose
// program does not.
func TestNewKindsWaitForAllNodes(t *testing.T) {
	for _, kind := range []state.CommandKind{later, {Type: state.TypeTick, Version: 2}, {Type: 12, Version: 7}} {
		w := small(t)
		for i, node := range w.NodeIDs() {
			raw := w.Command("node-fr-1", state.Tick{}, of(kind))
			if err := w.State().Check(raw); !errors.Is(err, kms.Unavailable) {
				t.Errorf("%v, %d nodes have announced it: Check gives %v", kind, i, err)
			}
			if r := w.Apply(raw); r.Kind != kms.Unavailable || r.Halt {
				t.Errorf("%v, %d nodes have announced it: %+v", kind, i, r)
			}
			if !slices.Contains(w.State().Lacking(kind), node) {
				t.Errorf("%v: %s is not said to lack it", kind, node)
			}
			w.Do(node, with(w, node, kind))
		}
		before := w.State()
		raw := w.Command("node-fr-1", state.Tick{}, of(kind))
		next, r := before.Apply(before.Index()+1, raw)
		if !r.Halt || next != before || r.Err() == nil {
			t.Errorf("%v, announced by all: %+v", kind, r)
		}
		if err := before.Check(raw); !errors.Is(err, state.ErrUnknownCommand) {
			t.Errorf("%v, announced by all: Check gives %v", kind, err)
		}
		if got := before.Forgotten("node-fr-1"); !slices.Contains(got, kind) {
			t.Errorf("a node whose program lacks %v is told of %v", kind, got)
		}
		// Only a member can halt a node, and not with an old command.
		env, sig, _ := state.Split(raw)
		sig[0] ^= 1
		refused(t, w, kms.BadSignature, state.Join(env, sig))
	}
}

// What a node has announced stays announced, and is announced once.
func TestAnnouncementsOnlyGrow(t *testing.T) {
	w := small(t)
	const node = "node-fr-1"
	own := state.Program("one")
	w.Do(node, own)
	w.Refuse(kms.Conflict, node, own)
	if _, any := w.State().News(node, own); any {
		t.Error("what stands in the state is news")
	}
	w.Do(node, with(w, node, later))
	w.Refuse(kms.Conflict, node, own) // a downgrade takes nothing back
	if news, any := w.State().News(node, own); !any || !slices.Contains(news.Kinds, later) {
		t.Errorf("after a downgrade the news are %+v, %v", news, any)
	}
	for name, a := range map[string]state.Announce{
		"a kind that all know": {Kinds: []state.CommandKind{{Type: state.TypeTick, Version: 1}}, Format: own.Format, Program: "x"},
		"unsorted":             {Kinds: []state.CommandKind{later, {Type: 998, Version: 1}}, Format: own.Format, Program: "x"},
		"twice":                {Kinds: []state.CommandKind{later, later}, Format: own.Format, Program: "x"},
		"no name":              {Format: own.Format},
		"an old format":        {Format: 1, Program: "x"},
		"too many":             {Kinds: make([]state.CommandKind, state.MaxKinds+1), Format: own.Format, Program: "x"},
	} {
		if r := w.Apply(w.Command("node-jp-1", a)); r.Kind != kms.Invalid {
			t.Errorf("%s: %+v", name, r)
		}
	}
	if l := w.State().Lacking(later); !slices.Equal(l, []string{"node-de-1", "node-jp-1"}) {
		t.Errorf("%v lack what only %s announced", l, node)
	}
	if l := w.State().Lacking(state.CommandKind{Type: state.TypeReceipt, Version: 1}); l != nil {
		t.Errorf("%v lack what every release knows", l)
	}
}
