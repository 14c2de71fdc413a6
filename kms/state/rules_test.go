package state_test

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// refused applies a command and checks that it is a recorded no-op of the kind.
func refused(t *testing.T, w *statetest.World, kind kms.Kind, raw []byte) {
	t.Helper()
	before := w.State()
	content, size := before.ContentHash(), before.LogSize()
	if err := before.Check(raw); kms.KindOf(err) != kind {
		t.Errorf("Check: %v, want kind %v", err, kind)
	}
	r := w.Apply(raw)
	after := w.State()
	if r.Kind != kind || !errors.Is(r.Err(), kind) {
		t.Errorf("got %v %q, want %v", r.Kind, r.Message, kind)
	}
	if after.ContentHash() != content || before.ContentHash() != content {
		t.Errorf("a refused command (%q) changed the state", r.Message)
	}
	if after.LogSize() != size+1 || after.Index() != before.Index()+1 || len(r.Events) != 0 {
		t.Errorf("a refused command is not recorded as such: %d leaves, %v", after.LogSize(), r.Events)
	}
	l, err := state.ParseLeaf(r.Leaf)
	if err != nil || l.Kind != kind || l.Index != after.Index() {
		t.Errorf("leaf %+v: %v", l, err)
	}
}

func small(t testing.TB) *statetest.World {
	w := statetest.New(t, statetest.Options{})
	w.CreateKeyring("europe", "fr", "de")
	w.CreateKey("europe", "mail", kms.Encrypt)
	return w
}

func TestEnvelopeRefused(t *testing.T) {
	w := small(t)
	w.Advance(time.Hour)
	fr, tick := "node-fr-1", state.Tick{}
	good := w.Command(fr, state.Tick{}, statetest.At(w.Now()+1))
	env, sig, err := state.Split(good)
	if err != nil {
		t.Fatal(err)
	}
	nonces := w.State().Nonces()
	for i := range sig {
		bad := bytes.Clone(sig)
		bad[i] ^= 1
		refused(t, w, kms.BadSignature, state.Join(env, bad))
	}
	refused(t, w, kms.Invalid, nil)
	refused(t, w, kms.Invalid, []byte("garbage"))
	refused(t, w, kms.Invalid, append(bytes.Clone(good), 0))
	refused(t, w, kms.TooLarge, make([]byte, state.MaxCommand+1))
	forged := w.Envelope(fr, tick)
	forged.Origin = "node-xx-1"
	refused(t, w, kms.Denied, state.Join(forged.Marshal(), sig))
	forged.Origin = "node-de-1"
	refused(t, w, kms.BadSignature, w.Node(fr).SignCommand(t, forged.Marshal()))
	if got := w.State().Nonces(); got != nonces {
		t.Errorf("commands without a good signature left %d nonces", got-nonces)
	}
	// A command that nobody signed must not burn the nonce of one that is.
	if r := w.Apply(good); r.Err() != nil {
		t.Fatalf("the good command after its forgeries: %v", r.Err())
	}
	refused(t, w, kms.Replayed, good)
	refused(t, w, kms.Invalid, w.Command(fr, tick, func(e *state.Envelope) { e.Cluster = "00000000000000000000000000000000" }))
	refused(t, w, kms.Invalid, w.Command(fr, tick, func(e *state.Envelope) { e.Domain = "other" }))
	refused(t, w, kms.Invalid, w.Command(fr, tick, func(e *state.Envelope) { e.Nonce = e.Nonce[:15] }))
	refused(t, w, kms.Invalid, w.Command(fr, tick, func(e *state.Envelope) { e.Payload = []byte{0xa1} }))
	refused(t, w, kms.Invalid, w.Command(fr, tick, statetest.Expect(3)))
	refused(t, w, kms.Invalid, w.Command(fr, tick, statetest.Idempotent(make([]byte, 32), nil)))
	refused(t, w, kms.Expired, w.Command(fr, tick, statetest.At(w.State().Clock()-state.Window-1)))
}

func TestClockIsMedianOverSites(t *testing.T) {
	w := statetest.New(t, statetest.Options{NodesPerSite: 2})
	start := w.State().Clock()
	tick := func(node string, at int64) int64 {
		w.Do(node, state.Tick{}, statetest.At(start+at))
		return w.State().Clock() - start
	}
	for _, step := range []struct {
		node     string
		at, want int64
	}{
		{"node-fr-1", 1 << 40, 0}, // one site alone does not push the clock
		{"node-fr-2", 1 << 41, 0}, // however many nodes it has
		{"node-de-1", 1000, 1000}, // the second site does
		{"node-de-2", 900, 1000},  // its latest time counts
		{"node-jp-1", 500, 1000},  // and time never runs backwards
		{"node-jp-1", 3000, 3000}, // de 1000, jp 3000, fr far ahead
		{"node-de-1", 2000, 3000}, //
		{"node-de-1", 1000, 3000}, // an older tick is nothing
		{"node-jp-2", 9000, 9000}, //
		{"node-de-2", 9500, 9500}, //
	} {
		if got := tick(step.node, step.at); got != step.want {
			t.Errorf("after %s at %d: clock %d, want %d", step.node, step.at, got, step.want)
		}
	}
	two := statetest.New(t, statetest.Options{Sites: []string{"fr", "de"}})
	two.Do("node-fr-1", state.Tick{}, statetest.At(start+5000))
	if got := two.State().Clock(); got != start {
		t.Errorf("one of two sites pushed the clock to %d", got)
	}
}

func TestIdempotency(t *testing.T) {
	w := small(t)
	op, idem := w.Operator("fr"), statetest.Idempotent(bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32))
	cmd := w.KeyCommand("europe", "vpn", kms.MAC)
	w.Do("node-fr-1", cmd, statetest.As(op), idem)
	content := w.State().ContentHash()
	again := w.Command("node-de-1", cmd, statetest.As(op), idem)
	if err := w.State().Check(again); err != nil {
		t.Errorf("Check of a repetition: %v", err)
	}
	r := w.Apply(again)
	if !r.Duplicate || r.Err() != nil || len(r.Events) != 0 || w.State().ContentHash() != content {
		t.Errorf("repetition: %+v", r)
	}
	other := statetest.Idempotent(bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{3}, 32))
	refused(t, w, kms.Conflict, w.Command("node-fr-1", cmd, statetest.As(op), other))
	refused(t, w, kms.Conflict, w.Command("node-fr-1", cmd, statetest.As(w.Service("fr")), idem))
	if o, ok := w.State().Outcome(bytes.Repeat([]byte{1}, 32)); !ok || o.Kind != 0 || !bytes.Equal(o.Request, bytes.Repeat([]byte{2}, 32)) {
		t.Errorf("outcome %+v", o)
	}
	// A refusal is remembered as well.
	idem2 := statetest.Idempotent(bytes.Repeat([]byte{4}, 32), bytes.Repeat([]byte{2}, 32))
	w.Refuse(kms.Exists, "node-fr-1", cmd, statetest.As(op), idem2)
	if r := w.Refuse(kms.Exists, "node-fr-1", cmd, statetest.As(op), idem2); !r.Duplicate {
		t.Errorf("repetition of a refusal: %+v", r)
	}
	w.Advance(25 * time.Hour)
	if w.State().Outcomes() != 0 || w.State().Nonces() != len(w.NodeIDs()) {
		t.Errorf("%d outcomes and %d nonces are left a day later", w.State().Outcomes(), w.State().Nonces())
	}
}

func TestCreateRefused(t *testing.T) {
	w := small(t)
	fr, op := "node-fr-1", statetest.As(w.Operator("fr"))
	ring := func(change func(*state.CreateKeyring), opts ...statetest.Option) []byte {
		c := w.KeyringCommand("new", "fr", "de")
		change(&c)
		return w.Command(fr, c, append([]statetest.Option{op}, opts...)...)
	}
	key := func(change func(*state.CreateKey), opts ...statetest.Option) []byte {
		c := w.KeyCommand("europe", "new", kms.Sign)
		change(&c)
		return w.Command(fr, c, append([]statetest.Option{op}, opts...)...)
	}
	same := func(*state.CreateKeyring) {}
	sameKey := func(*state.CreateKey) {}
	for name, c := range map[string]struct {
		kind kms.Kind
		raw  []byte
	}{
		"keyring name":           {kms.Invalid, ring(func(c *state.CreateKeyring) { c.Name = "New" })},
		"keyring exists":         {kms.Exists, ring(func(c *state.CreateKeyring) { c.Name = "europe" })},
		"unknown site":           {kms.NotFound, ring(func(c *state.CreateKeyring) { c.Residency = []string{"fr", "xx"} })},
		"unsorted residency":     {kms.Invalid, ring(func(c *state.CreateKeyring) { c.Residency = []string{"fr", "de"} })},
		"no residency":           {kms.Invalid, ring(func(c *state.CreateKeyring) { c.Residency = nil })},
		"unknown policy":         {kms.NotFound, ring(func(c *state.CreateKeyring) { c.Policy = "lax" })},
		"governance policy":      {kms.Invalid, ring(func(c *state.CreateKeyring) { c.Policy = kms.Governance })},
		"copy missing":           {kms.Invalid, ring(func(c *state.CreateKeyring) { c.Copies = c.Copies[:1] })},
		"check missing":          {kms.Invalid, ring(func(c *state.CreateKeyring) { c.Checks = c.Checks[1:] })},
		"copy for another":       {kms.Invalid, ring(func(c *state.CreateKeyring) { c.Copies[1].Node = "node-jp-1" })},
		"protection":             {kms.Invalid, ring(func(c *state.CreateKeyring) { c.Protection = "" })},
		"receipts":               {kms.Invalid, ring(func(c *state.CreateKeyring) { c.Receipts = "none" })},
		"staleness":              {kms.Invalid, ring(func(c *state.CreateKeyring) { c.MaxStaleness = 0 })},
		"keyring by a service":   {kms.Denied, ring(same, statetest.As(w.Service("fr")))},
		"keyring by nobody":      {kms.Denied, ring(same, statetest.As(""))},
		"keyring by a stranger":  {kms.Denied, ring(same, statetest.As("spiffe://evil.example/operator/x"))},
		"keyring with expect":    {kms.Invalid, ring(same, statetest.Expect(1))},
		"keyring from elsewhere": {kms.NotResident, w.Command("node-jp-1", w.KeyringCommand("new", "fr", "de"), op)},
		"key exists":             {kms.Exists, key(func(c *state.CreateKey) { c.Name = "mail" })},
		"key id exists":          {kms.Exists, key(func(c *state.CreateKey) { c.ID = w.KeyCommand("europe", "mail", kms.Encrypt).ID })},
		"no keyring":             {kms.NotFound, key(func(c *state.CreateKey) { c.Keyring = "asia" })},
		"key id length":          {kms.Invalid, key(func(c *state.CreateKey) { c.ID = c.ID[1:] })},
		"purpose":                {kms.Invalid, key(func(c *state.CreateKey) { c.Purpose = kms.MAC })},
		"no material":            {kms.Invalid, key(func(c *state.CreateKey) { c.Wrapped = nil })},
		"too much material":      {kms.Invalid, key(func(c *state.CreateKey) { c.Wrapped = make([]byte, state.MaxWrapped+1) })},
		"public key":             {kms.Invalid, key(func(c *state.CreateKey) { c.PublicKey[5] ^= 1 })},
		"period":                 {kms.Invalid, key(func(c *state.CreateKey) { c.RotationPeriod = -1 })},
		"another KEK":            {kms.Conflict, key(func(c *state.CreateKey) { c.KEK = 2 })},
		"key by an auditor":      {kms.Denied, key(sameKey, statetest.As("spiffe://fr.example/auditor/eve"))},
		"key from elsewhere":     {kms.NotResident, w.Command("node-jp-1", w.KeyCommand("europe", "new", kms.MAC), op)},
	} {
		t.Run(name, func(t *testing.T) { refused(t, w, c.kind, c.raw) })
	}
}

func TestReceiptRefused(t *testing.T) {
	w := small(t)
	id := w.Propose(kms.ActionRotate, approval.KeyTarget("europe", "mail"), nil)
	w.ApproveAll(id)
	w.Commit(id)
	give := func(node string, change func(*state.GiveReceipt)) []byte {
		c := w.ReceiptCommand(node, "europe", "mail", 2)
		change(&c)
		return w.Command(node, c)
	}
	same := func(*state.GiveReceipt) {}
	refused(t, w, kms.NotResident, give("node-jp-1", same))
	refused(t, w, kms.Invalid, give("node-fr-1", func(c *state.GiveReceipt) { c.KCV[0] ^= 1 }))
	refused(t, w, kms.Invalid, give("node-fr-1", func(c *state.GiveReceipt) { c.KCV = w.ReceiptCommand("node-de-1", "europe", "mail", 2).KCV }))
	refused(t, w, kms.NotFound, give("node-fr-1", func(c *state.GiveReceipt) { c.Version = 1 })) // none is asked
	refused(t, w, kms.NotFound, give("node-fr-1", func(c *state.GiveReceipt) { c.Version = 3 }))
	w.Do("node-fr-1", w.ReceiptCommand("node-fr-1", "europe", "mail", 2))
	refused(t, w, kms.Exists, give("node-fr-1", same))
	if v, _ := w.State().Version("europe", "mail", 2); v.State != kms.PreActive {
		t.Errorf("version 2 is %s before every node has given a receipt", v.State)
	}
	r := w.Do("node-de-1", w.ReceiptCommand("node-de-1", "europe", "mail", 2))
	if len(r.Events) != 2 || r.Events[1].Type != state.EventVersionActivated {
		t.Errorf("events %v", r.Events)
	}
}

// TestEverySite activates a version with one node of each site.
func TestEverySite(t *testing.T) {
	w := statetest.New(t, statetest.Options{NodesPerSite: 2})
	c := w.KeyringCommand("europe", "fr", "de")
	c.Receipts = kms.EverySite
	w.Do("node-fr-1", c, statetest.As(w.Operator("fr")))
	w.CreateKey("europe", "mail", kms.Encrypt)
	id := w.Propose(kms.ActionRotate, approval.KeyTarget("europe", "mail"), nil)
	w.ApproveAll(id)
	w.Commit(id)
	for _, n := range []string{"node-fr-1", "node-fr-2"} {
		w.Do(n, w.ReceiptCommand(n, "europe", "mail", 2))
	}
	if k, _ := w.State().Key("europe", "mail"); k.Primary != 1 {
		t.Errorf("primary %d after the receipts of one site", k.Primary)
	}
	w.Do("node-de-2", w.ReceiptCommand("node-de-2", "europe", "mail", 2))
	if k, _ := w.State().Key("europe", "mail"); k.Primary != 2 {
		t.Errorf("primary %d after the receipts of both sites", k.Primary)
	}
	// A late receipt is recorded and changes nothing else.
	before, _ := w.State().Key("europe", "mail")
	w.GiveReceipts()
	if after, _ := w.State().Key("europe", "mail"); after.Revision != before.Revision || len(w.State().Pending("node-de-1")) != 0 {
		t.Errorf("late receipt: revision %d, was %d", after.Revision, before.Revision)
	}
}

func TestGenesisRefused(t *testing.T) {
	w := statetest.New(t, statetest.Options{})
	for name, change := range map[string]func(*state.Genesis){
		"format":            func(g *state.Genesis) { g.Format = 2 },
		"nonce":             func(g *state.Genesis) { g.Nonce = g.Nonce[1:] },
		"created":           func(g *state.Genesis) { g.Created = 0 },
		"name":              func(g *state.Genesis) { g.Name = "a\x1bb" },
		"no sites":          func(g *state.Genesis) { g.Sites = nil },
		"no nodes":          func(g *state.Genesis) { g.Nodes = nil },
		"trust domain":      func(g *state.Genesis) { g.Sites[0].TrustDomain = "a/b" },
		"same trust domain": func(g *state.Genesis) { g.Sites[0].TrustDomain = g.Sites[1].TrustDomain },
		"no CA":             func(g *state.Genesis) { g.Sites[0].CAs = nil },
		"CA":                func(g *state.Genesis) { g.Sites[0].CAs = [][]byte{{1, 2}} },
		"node's site":       func(g *state.Genesis) { g.Nodes[0].Site = "xx" },
		"site without node": func(g *state.Genesis) { g.Nodes[0].Site = "fr" },
		"node order":        func(g *state.Genesis) { g.Nodes[0], g.Nodes[1] = g.Nodes[1], g.Nodes[0] },
		"same signing key":  func(g *state.Genesis) { g.Nodes[0].Signing = g.Nodes[1].Signing },
		"signing key":       func(g *state.Genesis) { g.Nodes[0].Signing = make([]byte, 65) },
		"agreement key":     func(g *state.Genesis) { g.Nodes[0].Agreement = nil },
		"address":           func(g *state.Genesis) { g.Nodes[0].Address = "nowhere" },
		"API":               func(g *state.Genesis) { g.Nodes[0].API = "http://x" },
		"no voter": func(g *state.Genesis) {
			for i := range g.Nodes {
				g.Nodes[i].Voter = false
			}
		},
		"custodian's site":     func(g *state.Genesis) { g.Custodians[0].Site = "xx" },
		"custodian's revision": func(g *state.Genesis) { g.Custodians[0].Revision = 0 },
		"same credential":      func(g *state.Genesis) { g.Custodians[0].Credentials = g.Custodians[1].Credentials },
		"no governance":        func(g *state.Genesis) { g.Policies = g.Policies[1:] },
		"impossible policy":    func(g *state.Genesis) { g.Policies[0].Rules[0].Approvals = 7 },
		"omitted threshold":    func(g *state.Genesis) { g.Policies[1].Rules[5].Approvals = 0 },
		"policy changed alone": func(g *state.Genesis) {
			g.Policies[0].Rules[3] = approval.Rule{Action: kms.ActionPolicy, Direct: []string{"operator"}}
		},
		"root replaced alone": func(g *state.Genesis) {
			g.Policies[0].Rules[2] = approval.Rule{Action: kms.ActionNode, Direct: []string{"operator"}}
		},
		"root number":       func(g *state.Genesis) { g.Nodes[1].Root = 2 },
		"node's revision":   func(g *state.Genesis) { g.Nodes[1].Revision = 0 },
		"import without":    func(g *state.Genesis) { g.Nodes[1].ImportKind = "" },
		"required site":     func(g *state.Genesis) { g.Policies[1].Rules[5].Required = []string{"xx"} },
		"policy's revision": func(g *state.Genesis) { g.Policies[1].Revision = 7 },
		"access":            func(g *state.Genesis) { g.Access = make([]byte, state.MaxAccess+1) },
	} {
		var g state.Genesis
		if err := canon.Unmarshal(w.Genesis().Marshal(), &g); err != nil {
			t.Fatal(err)
		}
		change(&g)
		if _, err := state.ParseGenesis(g.Marshal()); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	s := w.Signed()
	for name, change := range map[string]func(*state.SignedGenesis){
		"signature missing": func(s *state.SignedGenesis) { s.Signatures = s.Signatures[1:] },
		"signature of another": func(s *state.SignedGenesis) {
			s.Signatures[0].Signature = s.Signatures[1].Signature
		},
		"order": func(s *state.SignedGenesis) { s.Signatures[0], s.Signatures[1] = s.Signatures[1], s.Signatures[0] },
	} {
		c, err := state.ParseSignedGenesis(s.Marshal())
		if err != nil {
			t.Fatal(err)
		}
		change(&c)
		if _, err := state.New(c); kms.KindOf(err) != kms.BadSignature {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got, err := state.ParseGenesis(s.Genesis); err != nil || !bytes.Equal(got.Marshal(), s.Genesis) {
		t.Errorf("round trip: %v", err)
	}
}
