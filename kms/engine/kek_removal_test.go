package engine

import (
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// TestRemovalAsksForRotation: when a node is removed, the others propose to rotate the
// KEKs that it could open, once for each, and again only when that was refused and a day
// has passed.
func TestRemovalAsksForRotation(t *testing.T) {
	w := newWorld(t, "")
	as := w.agents()
	w.announce(as)
	w.keyring("all", "fr", "de", "jp")
	w.keyring("europe", "fr", "de")
	w.hardware("hard", "fr", "de", "jp")
	w.key("all", "data", kms.Encrypt)
	w.settle(as)
	minute := func() {
		w.clock.Advance(scheduleEvery)
		w.tickOf("fr", "de")
		w.settle(as)
	}
	minute()
	if n := len(w.cluster.State().ProposalsOpen()); n != 0 {
		t.Fatalf("%d proposals before a removal", n)
	}
	p := w.carry(as, kms.ActionNode, "node/jp-1", wire.ProposalParameters{Node: &wire.NextRoot{Change: "remove"}})
	if p.Progress != "executed" {
		t.Fatalf("%+v", p)
	}
	w.confirm()
	delete(as, "jp-1")
	if v := w.ringView("all"); v.Rotation == nil || !strings.Contains(v.Rotation.Note, "jp-1 was removed") {
		t.Errorf("shown as %+v", v.Rotation)
	}
	if v := w.ringView("europe"); v.Rotation != nil {
		t.Errorf("europe: %+v", v.Rotation)
	}
	for range 4 {
		minute()
	}
	asked := func() []state.Proposal {
		t.Helper()
		open := w.cluster.State().ProposalsOpen()
		for _, p := range open {
			if p.Content.Target != approval.KeyringTarget("all") || p.Content.Action != kms.ActionRotate ||
				!strings.Contains(p.Content.Proposer, "/node/") || !strings.Contains(p.Content.Reason, "jp-1 was removed") {
				t.Errorf("%+v", p.Content)
			}
		}
		return open
	}
	open := asked()
	if len(open) != 1 {
		t.Fatalf("%d proposals", len(open))
	}
	// It is rejected; a day later they ask again.
	view := check[wire.Proposal](t)(proposalView(w.cluster.State(), open[0]))
	for _, c := range []string{"fr-a", "fr-b", "de-a", "de-b", "jp-a"} {
		if now, _ := w.cluster.State().Proposal(view.ID); now.Progress == state.Open {
			view = check[wire.Proposal](t)(w.at("fr").engine.Vote(bg, caller("custodian", "fr"), view.ID,
				wire.VoteRequest{Statement: w.statement(c, approval.Reject, view)}))
		}
	}
	for range 4 {
		minute()
	}
	if n := len(asked()); n != 0 {
		t.Fatalf("%d proposals after one was rejected", n)
	}
	w.clock.Advance(reopenAfter + time.Hour)
	for range 4 {
		minute()
	}
	if open = asked(); len(open) != 1 {
		t.Fatalf("%d proposals a day later", len(open))
	}
	view = check[wire.Proposal](t)(proposalView(w.cluster.State(), open[0]))
	for _, c := range []string{"fr-a", "de-a"} {
		view = check[wire.Proposal](t)(w.at("fr").engine.Vote(bg, caller("custodian", "fr"), view.ID,
			wire.VoteRequest{Statement: w.statement(c, approval.Approve, view)}))
	}
	for range 6 {
		minute()
	}
	if v := w.ringView("all"); v.KEK != 2 || v.Rotation != nil || len(asked()) != 0 {
		t.Errorf("at the end KEK %d, %+v", v.KEK, v.Rotation)
	}
	kek, _ := w.cluster.State().KEK("all", 2)
	if len(kek.Copies) != 2 {
		t.Errorf("%d copies", len(kek.Copies))
	}
}

// tickOf lets the nodes of some sites sign their time.
func (w *world) tickOf(sites ...string) {
	w.t.Helper()
	for _, site := range sites {
		check[state.Result](w.t)(w.at(site).engine.submit(bg, attempt{}, state.Tick{}))
	}
}
