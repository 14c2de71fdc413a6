package engine

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

const fr2 = "fr-2"

// joining makes the test's side of a node that is to join site fr.
func (w *world) joining() (nextRoot, wire.ProposalParameters) {
	w.t.Helper()
	w.nodes[fr2] = &testNode{id: fr2, log: &memoryLog{}, fresh: new(time.Duration)}
	next := newNextRoot(w.t)
	w.nodes[fr2].dev = next.dev
	w.nodes[fr2].cache = must(keyring.NewCache(next.root, keyring.Limits{TTL: time.Hour, MaxKEKs: 100, MaxKeys: 1000}))
	params := next.parameters(w, fr2, false)
	n := params.Node
	n.Change, n.Site, n.Address, n.API = string(approval.NodeJoin), "fr", "fr-2.example:7000", "https://fr-2.example:8443"
	return next, params
}

// confirm has Raft count with the members.
func (w *world) confirm() {
	w.t.Helper()
	st := w.cluster.State()
	m, _ := st.Membership()
	check[state.Result](w.t)(w.at("fr").engine.submit(bg, attempt{}, state.ConfirmMembers{Index: m.Index, Members: st.Members()}))
}

// A node joins: the others seal what its site may open, it checks that against what
// they have proven, and serves.
func TestNodeJoins(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("soft", "fr", "de", "jp")
	w.key("soft", "data", kms.Encrypt)
	w.keyring("theirs", "fr", "de")
	w.hardware("hard", "fr", "de")
	w.threeKeys("hard")
	as := w.agents()
	w.settle(as)
	fr, svc := w.at("fr").engine, caller("service", "fr")
	softCT := check[wire.EncryptResponse](t)(fr.Encrypt(bg, svc, "soft", "data", wire.EncryptRequest{Plaintext: []byte("soft")}))
	hardCT := check[wire.EncryptResponse](t)(fr.Encrypt(bg, svc, "hard", "encrypt", wire.EncryptRequest{Plaintext: []byte("hard")}))

	next, params := w.joining()
	a := next.adoption(w, fr2, nil)
	if done, err := a.step(bg); done || err != nil {
		t.Fatalf("before the proposal: %v, %v", done, err)
	}
	p := w.carry(as, kms.ActionNode, "node/"+fr2, params)
	if n := p.Content.Parameters.Node; p.Progress != "executed" || n == nil || n.Change != "join" || n.Site != "fr" || n.Address == "" || n.API == "" {
		t.Fatalf("proposal %s, %+v", p.Progress, n)
	}
	members := check[wire.Nodes](t)(fr.Nodes(bg, caller("operator", "fr")))
	if members.Change == nil || members.Change.Node != fr2 {
		t.Errorf("change under way: %+v", members.Change)
	}
	if n := w.node(fr2); n.Root != 0 || n.Voter || n.Suite != "" || len(n.Protections) != 0 || n.Replacing == nil || !n.LastHeard.IsZero() {
		t.Errorf("joining node %+v", n)
	}
	w.confirm()
	for range 3 {
		w.settle(as)
		w.clock.Advance(2 * time.Second)
	}
	if r := w.node(fr2).Replacing; r == nil || r.Missing != 0 || r.Sealed != 5 || !strings.Contains(r.Note, "conclaved run") {
		t.Fatalf("replacing %+v", r)
	}
	tn := w.nodes[fr2]
	cfg := w.config(tn, next.root)
	tn.engine = must(New(cfg)) // before it has adopted: it serves nothing
	if r := tn.engine.Ready(bg); r.Ready || !strings.Contains(strings.Join(r.Reasons, " "), "yet to adopt") {
		t.Errorf("ready %+v", r)
	}
	_, err := tn.engine.Decrypt(bg, svc, "soft", "data", wire.DecryptRequest{Ciphertext: softCT.Ciphertext})
	wantKind(t, err, kms.NotResident)
	if done, err := a.step(bg); !done || err != nil {
		t.Fatalf("adoption: %v, %v", done, err)
	}
	next.restart(w, fr2)
	if r := tn.engine.Ready(bg); !r.Ready {
		t.Errorf("ready %+v", r)
	}
	for want, x := range map[string]struct {
		ring, key string
		ct        []byte
	}{"soft": {"soft", "data", softCT.Ciphertext}, "hard": {"hard", "encrypt", hardCT.Ciphertext}} {
		d := check[wire.DecryptResponse](t)(tn.engine.Decrypt(bg, svc, x.ring, x.key, wire.DecryptRequest{Ciphertext: x.ct}))
		if string(d.Plaintext) != want {
			t.Errorf("%s: %d bytes", want, len(d.Plaintext))
		}
	}

	// Its receipt counts from now on; and it gets another root like any other node.
	as[fr2] = must(NewAgent(tn.engine, AgentConfig{Watch: w.cluster, After: w.clock.After}))
	w.carry(as, kms.ActionRotate, approval.KeyTarget("soft", "data"), wire.ProposalParameters{})
	as[fr2].work(bg)
	w.settle(as)
	if v, _ := w.cluster.State().Version("soft", "data", 2); len(v.Receipts) != 4 || v.State != kms.Active {
		t.Errorf("version 2 is %s with %d receipts", v.State, len(v.Receipts))
	}
	second := newNextRoot(t)
	w.carry(as, kms.ActionNode, "node/"+fr2, second.parameters(w, fr2, false))
	for range 3 {
		w.settle(as)
		w.clock.Advance(2 * time.Second)
	}
	if done, err := second.adoption(w, fr2, nil).step(bg); !done || err != nil {
		t.Fatalf("adoption of its second root: %v, %v", done, err)
	}
	if n := w.node(fr2); n.Root != 2 {
		t.Errorf("node %+v", n)
	}
}

// A node goes, and comes into the list of those that were removed.
func TestNodeRemoved(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("soft", "fr", "de", "jp")
	as := w.agents()
	w.settle(as)
	w.carry(as, kms.ActionNode, "node/jp-1", wire.ProposalParameters{Node: &wire.NextRoot{Change: "remove"}})
	l := check[wire.Nodes](t)(w.at("fr").engine.Nodes(bg, caller("operator", "fr")))
	if len(l.Nodes) != 2 || len(l.Removed) != 1 || l.Removed[0].ID != "jp-1" || len(l.Removed[0].Keyrings) != 1 || l.Removed[0].Time.IsZero() {
		t.Errorf("members %+v", l)
	}
	jp := w.at("jp").engine
	if r := jp.Ready(bg); r.Ready || !strings.Contains(strings.Join(r.Reasons, " "), "was removed") {
		t.Errorf("ready %+v", r)
	}
	jp.cfg.SigningSuite = pqc.ECDSAP256SHA256 // that of its device; the state says nothing of it any more
	_, err := jp.submit(bg, attempt{}, state.Tick{})
	wantKind(t, err, kms.Denied)
	_, err = w.at("fr").engine.OpenProposal(bg, caller("operator", "fr"), wire.OpenProposalRequest{
		Action: "node", Target: "node/jp-1", Reason: "a test", Parameters: wire.ProposalParameters{Node: &wire.NextRoot{Change: "remove"}}})
	wantKind(t, err, kms.Conflict) // the change before is not confirmed
}

// What a node that joined opens is held against the commitments to others that are
// known to be right.
func TestAgrees(t *testing.T) {
	value := func(secret, node string) []byte { return append([]byte(secret), node...) }
	of := func(secret string, nodes ...string) (l []state.Check) {
		for _, n := range nodes {
			l = append(l, state.Check{Node: n, Hash: keyring.CheckHash(value(secret, n))})
		}
		return l
	}
	receipts := func(nodes ...string) (l []state.Receipt) {
		for _, n := range nodes {
			l = append(l, state.Receipt{Node: n})
		}
		return l
	}
	for name, c := range map[string]struct {
		checks   []state.Check
		receipts []state.Receipt
		err      error
	}{
		"own":                       {of("good", "x"), nil, nil},
		"own, others false":         {append(of("bad", "a"), of("good", "x")...), receipts("a"), nil},
		"own false":                 {append(of("good", "a"), of("bad", "x")...), receipts("a"), kms.ErrOpen},
		"others":                    {of("good", "a", "b"), receipts("a", "b"), nil},
		"another key":               {of("bad", "a", "b"), receipts("a", "b"), kms.ErrOpen},
		"another key, one proven":   {of("bad", "a", "b"), receipts("b"), kms.ErrOpen},
		"one lied to":               {append(of("bad", "a"), of("good", "b")...), receipts("b"), nil},
		"no receipt yet":            {of("good", "a", "b"), nil, nil},
		"no receipt, one lied to":   {append(of("bad", "a"), of("good", "b")...), nil, kms.ErrOpen},
		"nobody has committed":      {nil, nil, kms.Internal},
		"receipts without a commit": {nil, receipts("a"), kms.Internal},
	} {
		err := agrees(c.checks, c.receipts, "x", func(node string) ([]byte, error) { return value("good", node), nil })
		if !errors.Is(err, c.err) || (err == nil) != (c.err == nil) {
			t.Errorf("%s: %v, want %v", name, err, c.err)
		}
	}
	failing := errors.New("the device")
	if err := agrees(of("good", "a"), nil, "x", func(string) ([]byte, error) { return nil, failing }); !errors.Is(err, failing) {
		t.Errorf("a failing device: %v", err)
	}
}
