package cluster

import (
	"testing"

	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// What was kept comes before what the state at the start says, and not after the
// state has caught up; a damaged file is nothing.
func TestKept(t *testing.T) {
	w := statetest.New(t, statetest.Options{})
	genesis := w.State()
	w.Join("node-de-2", "de")
	joined := w.State()
	k := keep(joined)
	var read kept
	if err := read.decode(k.encode()); err != nil || !read.same(k) || read.Index != joined.Index() {
		t.Fatalf("%+v, %v", read, err)
	}
	for i := range k.encode() {
		b := k.encode()
		b[i] ^= 1
		if err := new(kept).decode(b); err == nil {
			t.Fatalf("byte %d is changed, and the file is read", i)
		}
	}
	if err := new(kept).decode(nil); err == nil {
		t.Error("an empty file is read")
	}
	d := introductions{State: genesis, kept: k}
	if n, ok := d.Node("node-de-2"); !ok || n.Site != "de" || n.Address == "" {
		t.Errorf("a node that has joined: %+v, %v", n, ok)
	}
	if s, ok := d.Site("fr"); !ok || s.TrustDomain != statetest.TrustDomain("fr") || len(s.CAs) == 0 {
		t.Errorf("a site: %+v, %v", s, ok)
	}
	w.RemoveNode("node-de-2", true)
	d.State = w.State()
	if _, ok := d.Node("node-de-2"); ok {
		t.Error("a removed node is let in")
	}
}
