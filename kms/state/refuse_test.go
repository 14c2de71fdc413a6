package state_test

import (
	"bytes"
	"crypto/sha256"
	"slices"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

const jp = "node-jp-1"

// wide is a cluster with a keyring of each protection at all three nodes, and a root
// of fr on its way.
func wide(t testing.TB, leave bool) (w *statetest.World, kek, version state.Pending) {
	w = statetest.New(t, statetest.Options{})
	w.CreateKeyring("ring", "fr", "de", "jp")
	w.CreateHardwareKeyring("safe", "fr", "de", "jp")
	w.CreateKey("safe", "tags", kms.MAC)
	w.GiveReceipts()
	w.Replace(fr, leave)
	return w, state.Pending{Keyring: "ring", Version: 1}, state.Pending{Keyring: "safe", Key: "tags", Version: 1}
}

// TestRefuse: the next root refuses one copy after the other; each resident node has
// one turn, and the refusals are seen until the root after it.
func TestRefuse(t *testing.T) {
	w, kek, version := wide(t, false)
	for _, p := range []state.Pending{kek, version} {
		w.Do(de, w.ResealCommand(fr, p))
		before := w.State()
		r := w.Do(fr, w.RefuseCommand(fr, p, de))
		if len(r.Events) != 1 || r.Events[0].Type != state.EventCopyRefused || r.Events[0].Node != fr || r.Events[0].Key != p.Key {
			t.Errorf("events %+v", r.Events)
		}
		s := w.State()
		if !slices.Contains(s.Unsealed(fr), p) || s.Extends(before) != nil || before.Extends(s) == nil {
			t.Errorf("%v: unsealed %v, extends %v", p, s.Unsealed(fr), s.Extends(before))
		}
		restoreBoth(t, s)
		refused(t, w, kms.Denied, w.Command(de, w.ResealCommand(fr, p)))
		w.Do(jp, w.ResealCommand(fr, p))
		restoreBoth(t, w.State())
	}
	got := w.State().Refused(fr)
	if len(got) != 2 || w.State().Resealed(fr) != 2 {
		t.Fatalf("refused %+v", got)
	}
	if x := got[1]; x.Node != fr || x.Root != 2 || x.Keyring != "safe" || x.Key != "tags" || x.Version != 1 || x.By != de || len(x.Copy) != 32 || x.Time != w.State().Clock() {
		t.Errorf("refused %+v", x)
	}
	w.Do(fr, w.AdoptCommand(fr))
	if got := w.State().Refused(fr); len(got) != 2 {
		t.Errorf("after the adoption: %+v", got)
	}
	restoreBoth(t, w.State())
	w.Replace(fr, false)
	if got := w.State().Refused(fr); len(got) != 0 {
		t.Errorf("of the next root: %+v", got)
	}
	w.Do(de, w.ResealCommand(fr, kek)) // a new root, a new turn
	w.Reseal(fr)
	w.Do(fr, w.AdoptCommand(fr))
	if got := w.State().Refused(fr); len(got) != 0 {
		t.Errorf("of the root after it: %+v", got)
	}
	restoreBoth(t, w.State())
}

func TestRefuseRefused(t *testing.T) {
	w, kek, version := wide(t, false)
	w.Do(de, w.ResealCommand(fr, kek))
	send := func(node string, p state.Pending, change func(*state.RefuseCopy), opts ...statetest.Option) []byte {
		c := w.RefuseCommand(fr, p, de)
		change(&c)
		return w.Command(node, c, opts...)
	}
	same := func(*state.RefuseCopy) {}
	env := w.Envelope(fr, w.RefuseCommand(fr, kek, de))
	refused(t, w, kms.BadSignature, w.Node(fr).SignCommand(t, env.Marshal())) // the present root has no say
	refused(t, w, kms.Conflict, send(de, kek, same))                          // nothing is pending there
	refused(t, w, kms.NotFound, send(fr, version, same))                      // no copy yet
	refused(t, w, kms.NotFound, send(fr, kek, func(c *state.RefuseCopy) { c.Version = 2 }))
	refused(t, w, kms.NotFound, send(fr, kek, func(c *state.RefuseCopy) { c.Keyring = "none" }))
	refused(t, w, kms.NotFound, send(fr, kek, func(c *state.RefuseCopy) { c.Key = "tags" }))
	refused(t, w, kms.Conflict, send(fr, kek, func(c *state.RefuseCopy) { c.By = jp }))
	refused(t, w, kms.Conflict, send(fr, kek, func(c *state.RefuseCopy) { c.Copy[3] ^= 1 }))
	refused(t, w, kms.Conflict, send(fr, kek, func(c *state.RefuseCopy) { c.Root = 3 }))
	refused(t, w, kms.Invalid, send(fr, kek, func(c *state.RefuseCopy) { c.Root = 0 }))
	refused(t, w, kms.Invalid, send(fr, kek, func(c *state.RefuseCopy) { c.Version = 0 }))
	refused(t, w, kms.Invalid, send(fr, kek, func(c *state.RefuseCopy) { c.Copy = nil }))
	refused(t, w, kms.Invalid, send(fr, kek, func(c *state.RefuseCopy) { c.By = "" }))
	refused(t, w, kms.Invalid, send(fr, kek, func(c *state.RefuseCopy) { c.By = "Not a name" }))
	refused(t, w, kms.Invalid, send(fr, kek, func(c *state.RefuseCopy) { c.Keyring = "" }))
	refused(t, w, kms.Invalid, send(fr, kek, func(c *state.RefuseCopy) { c.Key = "no key/" }))
	refused(t, w, kms.Invalid, send(fr, kek, same, statetest.As(w.Operator("fr"))))
	refused(t, w, kms.Invalid, send(fr, kek, same, statetest.Expect(1)))
	first := w.RefuseCommand(fr, kek, de)
	w.Do(fr, first)
	refused(t, w, kms.NotFound, w.Command(fr, first))
	w.Do(jp, w.ResealCommand(fr, kek))
	refused(t, w, kms.Conflict, w.Command(fr, first)) // it is another node's now
	// A refusal that comes after the adoption, or for a root that was given up.
	late := w.RefuseCommand(fr, kek, jp)
	w.Reseal(fr)
	w.Do(fr, w.AdoptCommand(fr))
	refused(t, w, kms.Conflict, w.Command(fr, late))
	w.Replace(fr, false)
	refused(t, w, kms.Conflict, w.Command(fr, late))
}

// TestRefusedByAll: when all had their turn nothing more happens under this root,
// and what ends it is another proposal, or the destruction of the version.
func TestRefusedByAll(t *testing.T) {
	for _, leave := range []bool{false, true} {
		w, kek, version := wide(t, leave)
		refuseAll := func(p state.Pending) {
			for _, by := range []string{jp, de} {
				w.Do(by, w.ResealCommand(fr, p))
				w.Do(fr, w.RefuseCommand(fr, p, by))
			}
			for _, by := range []string{de, jp, fr} {
				refused(t, w, kms.Denied, w.Command(by, w.ResealCommand(fr, p)))
			}
		}
		refuseAll(version)
		w.Do(de, w.ResealCommand(fr, kek))
		w.Do(fr, w.RefuseCommand(fr, kek, de))
		refused(t, w, kms.Conflict, w.Command(fr, w.AdoptCommand(fr))) // jp can still seal the KEK
		w.Do(jp, w.ResealCommand(fr, kek))
		w.Do(fr, w.RefuseCommand(fr, kek, jp))
		restoreBoth(t, w.State())
		if leave {
			w.Do(fr, w.AdoptCommand(fr))
			if k, _ := w.State().KEK("ring", 1); len(k.Copies) != 2 {
				t.Errorf("%d copies of the KEK", len(k.Copies))
			}
			restoreBoth(t, w.State())
			continue
		}
		refused(t, w, kms.Conflict, w.Command(fr, w.AdoptCommand(fr)))
		before := w.State()
		w.Replace(fr, false)
		if got := w.State().Refused(fr); len(got) != 0 || w.State().Extends(before) != nil {
			t.Errorf("refused by the root that is given up: %+v, %v", got, w.State().Extends(before))
		}
		refuseAll(version)
		w.Rotate("safe", "tags")
		id := w.Propose(kms.ActionDestroy, approval.KeyTarget("safe", "tags"), approval.VersionParams{Version: 1})
		w.ApproveAll(id)
		w.Advance(8 * 24 * time.Hour)
		w.Execute(id)
		restoreBoth(t, w.State())
		w.Reseal(fr)
		w.Do(fr, w.AdoptCommand(fr))
		restoreBoth(t, w.State())
	}
}

// TestRefusedByAlone: a node that is alone with a keyring reseals for itself once.
func TestRefusedByAlone(t *testing.T) {
	w := statetest.New(t, statetest.Options{})
	w.CreateKeyring("home", "fr")
	w.Replace(fr, true)
	p := state.Pending{Keyring: "home", Version: 1}
	w.Do(fr, w.ResealCommand(fr, p))
	w.Do(fr, w.RefuseCommand(fr, p, fr))
	refused(t, w, kms.Denied, w.Command(fr, w.ResealCommand(fr, p)))
	w.Do(fr, w.AdoptCommand(fr))
	restoreBoth(t, w.State())
}

// TestAdoptWhatWasChecked: an adoption is for the copies that the node has checked
// and the versions that it leaves behind, and for no others that came meanwhile.
func TestAdoptWhatWasChecked(t *testing.T) {
	for name, meanwhile := range map[string]func(w *statetest.World){
		"a key created": func(w *statetest.World) { w.CreateKey("safe", "late", kms.Encrypt) },
		"and resealed":  func(w *statetest.World) { w.CreateKey("safe", "late", kms.Encrypt); w.Reseal(fr) },
		"a keyring":     func(w *statetest.World) { w.CreateKeyring("late", "fr", "de"); w.Reseal(fr) },
		"a rotation":    func(w *statetest.World) { w.Rotate("safe", "tags"); w.Reseal(fr) },
		"another copy": func(w *statetest.World) {
			p := state.Pending{Keyring: "safe", Key: "tags", Version: 1}
			w.Do(fr, w.RefuseCommand(fr, p, de))
			c := w.ResealCommand(fr, p)
			c.Sealed = bytes.Clone(append(c.Sealed, 1))
			w.Do(jp, c)
		},
		"a version destroyed": func(w *statetest.World) {
			w.Rotate("safe", "tags")
			id := w.Propose(kms.ActionDestroy, approval.KeyTarget("safe", "tags"), approval.VersionParams{})
			w.ApproveAll(id)
			w.Advance(8 * 24 * time.Hour)
			w.Execute(id)
		},
	} {
		for _, leave := range []bool{false, true} {
			w, _, _ := wide(t, leave)
			w.Reseal(fr)
			checked := w.AdoptCommand(fr)
			meanwhile(w)
			refused(t, w, kms.Conflict, w.Command(fr, checked))
			w.Reseal(fr)
			refused(t, w, kms.Conflict, w.Command(fr, checked))
			w.Do(fr, w.AdoptCommand(fr))
			if n, _ := w.State().Node(fr); n.Root != 2 {
				t.Errorf("%s: root %d", name, n.Root)
			}
			restoreBoth(t, w.State())
		}
	}
}

// TestAdoptionDigest holds the digest against its description, written out.
func TestAdoptionDigest(t *testing.T) {
	a := state.AdoptedCopy{Keyring: "a", Version: 1, Copy: bytes.Repeat([]byte{7}, 32)}
	b := state.AdoptedCopy{Keyring: "a", Key: "k", Version: 2, Copy: []byte{}}
	type m = map[string]any
	h := sha256.New()
	for _, x := range []m{
		{"domain": "conclave/adoption/v1", "cluster": "c", "node": "n", "root": 3, "copies": 2},
		{"keyring": "a", "key": "", "version": 1, "copy": a.Copy},
		{"keyring": "a", "key": "k", "version": 2, "copy": []byte{}},
	} {
		h.Write(canon.Marshal(x))
	}
	got := state.AdoptionDigest("c", "n", 3, []state.AdoptedCopy{b, a})
	if !bytes.Equal(got, h.Sum(nil)) {
		t.Errorf("%x", got)
	}
	for _, other := range [][]byte{
		state.AdoptionDigest("d", "n", 3, []state.AdoptedCopy{a, b}), state.AdoptionDigest("c", "m", 3, []state.AdoptedCopy{a, b}),
		state.AdoptionDigest("c", "n", 2, []state.AdoptedCopy{a, b}), state.AdoptionDigest("c", "n", 3, []state.AdoptedCopy{a}),
		state.AdoptionDigest("c", "n", 3, nil),
	} {
		if bytes.Equal(got, other) {
			t.Error("two adoptions have one digest")
		}
	}
	w, _, _ := wide(t, false)
	if got := w.State().Adoption(fr); len(got) != 2 || len(got[0].Copy) != 0 || len(w.State().Adoption(de)) != 0 {
		t.Errorf("adoption %+v", got)
	}
}
