package engine

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
)

// Who may do what under the default policy, written out.
func TestDefaultAccess(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("europe", "fr", "de")
	w.key("europe", "data", kms.Encrypt)
	use := []Action{ActEncrypt, ActDecrypt, ActRewrap, ActDataKey, ActDataKeyWrapped, ActMAC, ActVerifyMAC, ActSign, ActVerify, ActPublicKey, ActExport}
	reads := []Action{ActReadCluster, ActReadProposal, ActReadEvidence, ActReadKey, ActReadKeyring}
	change := []Action{ActCreateKeyring, ActCreateKey}
	all := append(append(append([]Action{ActExportMaterial, ActReadStatus, ActReadMetrics, ActOpenProposal, ActVote}, use...), reads...), change...)
	may := map[string][]Action{
		"operator fr":  append(append([]Action{ActReadStatus, ActReadMetrics, ActOpenProposal, ActVote}, reads...), change...),
		"service fr":   append([]Action{ActReadStatus, ActReadKey, ActReadKeyring}, use...),
		"service jp":   {ActReadStatus},
		"custodian jp": append([]Action{ActReadStatus, ActOpenProposal, ActVote}, reads...),
		"auditor de":   append([]Action{ActReadStatus, ActReadMetrics}, reads...),
		"node fr":      {ActReadStatus},
		"unheard fr":   {ActReadStatus},
	}
	var a access
	st := w.cluster.State()
	for who, list := range may {
		role, site, _ := strings.Cut(who, " ")
		permitted := map[Action]bool{}
		for _, x := range list {
			permitted[x] = true
		}
		for _, act := range all {
			res := ofKey("europe", "data").at(st)
			err := a.allow(st, caller(role, site).Identity, act, res)
			if permitted[act] != (err == nil) {
				t.Errorf("%s %s: %v", who, act, err)
			}
		}
	}
	for _, role := range []string{"operator", "service", "custodian", "auditor"} {
		if a.allow(st, kms.Identity{TrustDomain: "us.example", Role: role, Name: "x"}, ActReadStatus, resource{}) == nil {
			t.Errorf("%s of no site may something", role)
		}
	}
	if err := a.allow(st, caller("service", "fr").Identity, ActEncrypt, ofKey("none", "x")); err == nil {
		t.Error("a service may use what does not exist")
	}
}

// A forbid that cannot be evaluated forbids.
func TestForbidFailsClosed(t *testing.T) {
	w := newWorld(t, `permit (principal, action, resource);
forbid (principal, action == Action::"encrypt", resource) when { resource.classification == "secret" };
permit (principal, action, resource) when { principal.nothing };`)
	w.keyring("r", "fr")
	w.key("r", "data", kms.Encrypt)
	_, err := w.at("fr").engine.Encrypt(bg, caller("service", "fr"), "r", "data", wire.EncryptRequest{})
	wantKind(t, err, kms.Denied)
	check[wire.DataKeyResponse](t)(w.at("fr").engine.DataKey(bg, caller("service", "fr"), "r", "data", wire.DataKeyRequest{}))
}

func TestCheckAccess(t *testing.T) {
	if err := CheckAccess([]byte(DefaultAccess())); err != nil {
		t.Fatal(err)
	}
	wantKind(t, CheckAccess([]byte("permit everything;")), kms.Invalid)
}

func TestDecisionCache(t *testing.T) {
	var c decisionCache
	var wg sync.WaitGroup
	const n = 2 * decisionShards * decisionsInShard
	for g := range 4 {
		wg.Go(func() {
			for i := range n {
				k := decisionKey{id: kms.Identity{Name: fmt.Sprint(i)}, action: ActEncrypt, generation: uint64(g)}
				c.put(k, i%2 == 0)
				if allowed, known := c.get(k); known && allowed != (i%2 == 0) {
					t.Errorf("%d: %v", i, allowed)
				}
			}
		})
	}
	wg.Wait()
	for i := range c.shards {
		if l := len(c.shards[i].m); l > decisionsInShard {
			t.Errorf("shard %d holds %d decisions", i, l)
		}
	}
	k := decisionKey{id: kms.Identity{TrustDomain: "a", Role: "b", Name: "c"}, action: ActEncrypt, resource: resource{level: aKey, keyring: "r", key: "k", keyRevision: 1}}
	c.put(k, true)
	for _, other := range []func(*decisionKey){
		func(k *decisionKey) { k.generation++ }, func(k *decisionKey) { k.resource.keyRevision++ },
		func(k *decisionKey) { k.resource.ringRevision++ }, func(k *decisionKey) { k.action = ActDecrypt },
		func(k *decisionKey) { k.id.Role = "x" }, func(k *decisionKey) { k.resource.key = "y" },
	} {
		x := k
		other(&x)
		if _, known := c.get(x); known {
			t.Errorf("%+v is taken for %+v", x, k)
		}
	}
}

func TestAccessHitAllocatesNothing(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("r", "fr")
	w.key("r", "data", kms.Encrypt)
	var a access
	st, id := w.cluster.State(), caller("service", "fr").Identity
	res := ofKey("r", "data").at(st)
	if n := testing.AllocsPerRun(100, func() {
		if err := a.allow(st, id, ActEncrypt, res); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestReads(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("europe", "fr", "de")
	w.keyring("coalition", "fr", "de", "jp")
	w.key("europe", "data", kms.Encrypt)
	jp, op := w.at("jp").engine, caller("operator", "jp")
	s := check[wire.Status](t)(jp.Status(bg, caller("service", "jp")))
	if s.Node != "jp-1" || s.Site != "jp" || s.Keys.Keyrings != 2 || s.Keys.Resident != 1 || s.Keys.Keys != 1 || s.Pending != 1 ||
		s.Index == 0 || len(s.LogRoot) != 32 || s.Clock.IsZero() || s.Name != "test coalition" {
		t.Errorf("%+v", s)
	}
	n := check[wire.Nodes](t)(jp.Nodes(bg, op))
	if len(n.Nodes) != 3 || n.Nodes[0].ID != "de-1" || n.Nodes[0].Suite != "MLKEM768-P256" || n.Nodes[0].LastHeard.IsZero() {
		t.Errorf("%+v", n.Nodes[0])
	}
	si := check[wire.Sites](t)(jp.Sites(bg, op))
	if len(si.Sites) != 3 || si.Sites[2].Nodes[0] != "jp-1" {
		t.Errorf("%+v", si)
	}
	cu := check[wire.Custodians](t)(jp.Custodians(bg, op))
	if len(cu.Custodians) != 6 || cu.Custodians[0].Credentials[0].SuiteName != "MLDSA65-Ed25519-SHA512" {
		t.Errorf("%+v", cu.Custodians[0].ID)
	}
	po := check[wire.Policies](t)(jp.Policies(bg, op))
	if len(po.Policies) != 2 || po.Access != DefaultAccess() || len(po.Policies[1].Summary) != 7 {
		t.Errorf("%d policies", len(po.Policies))
	}
	t.Log(strings.Join(po.Policies[1].Summary, "\n"))
	kr := check[wire.Keyrings](t)(jp.Keyrings(bg, op))
	if len(kr.Keyrings) != 2 || kr.Keyrings[1].Name != "europe" || kr.Keyrings[1].Resident || len(kr.Keyrings[1].Nodes) != 2 {
		t.Errorf("%+v", kr)
	}
	if mine := check[wire.Keyrings](t)(jp.Keyrings(bg, caller("service", "jp"))); len(mine.Keyrings) != 1 || mine.Keyrings[0].Name != "coalition" {
		t.Errorf("a service sees %+v", mine)
	}
	_, err := jp.Keyrings(bg, caller("unheard", "jp"))
	wantKind(t, err, kms.Denied)
	_, err = jp.Keyring(bg, op, "none")
	wantKind(t, err, kms.NotFound)
	_, err = jp.Keys(bg, op, "none")
	wantKind(t, err, kms.NotFound)
	_, err = jp.Keyring(bg, op, "")
	wantKind(t, err, kms.Invalid)
	_, err = jp.Key(bg, op, "europe", "")
	wantKind(t, err, kms.Invalid)
	ks := check[wire.Keys](t)(jp.Keys(bg, op, "europe"))
	if len(ks.Keys) != 1 || len(ks.Keys[0].ID) != 32 || ks.Keys[0].Versions != nil {
		t.Errorf("%+v", ks)
	}
	if err := jp.Authorise(bg, op, ActReadMetrics); err != nil {
		t.Error(err)
	}
	wantKind(t, jp.Authorise(bg, caller("service", "jp"), ActReadMetrics), kms.Denied)
	if h := jp.Health(); h.Status != "ok" || h.Node != "jp-1" {
		t.Errorf("%+v", h)
	}
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	w := newWorld(t, "")
	fr := w.at("fr")
	cfg := fr.engine.cfg
	cfg.Metrics = reg
	e := check[*Engine](t)(New(cfg))
	w.keyring("r", "fr")
	w.key("r", "data", kms.Encrypt)
	check[wire.EncryptResponse](t)(e.Encrypt(bg, caller("service", "fr"), "r", "data", wire.EncryptRequest{}))
	_, err := e.Encrypt(bg, caller("auditor", "fr"), "r", "data", wire.EncryptRequest{})
	wantKind(t, err, kms.Denied)
	found := map[string]float64{}
	for _, f := range check0(t, reg) {
		for _, m := range f.GetMetric() {
			if m.GetCounter() != nil && f.GetName() == "conclave_requests_total" {
				for _, l := range m.GetLabel() {
					if l.GetName() == "outcome" {
						found[l.GetValue()] += m.GetCounter().GetValue()
					}
				}
			}
		}
	}
	if found["ok"] != 1 || found["denied"] != 1 {
		t.Errorf("%v", found)
	}
	if _, err := New(cfg); kms.KindOf(err) != kms.Invalid {
		t.Errorf("a registry used twice: %v", err)
	}
}

func TestNewRefuses(t *testing.T) {
	w := newWorld(t, "")
	good := w.at("fr").engine.cfg
	for what, f := range map[string]func(*Config){
		"no cluster": func(c *Config) { c.Cluster = nil }, "no signer": func(c *Config) { c.Signer = nil },
		"no log": func(c *Config) { c.Log = nil }, "no device": func(c *Config) { c.Device = nil },
		"no cache": func(c *Config) { c.Cache = nil }, "no root": func(c *Config) { c.Root = nil },
		"no name": func(c *Config) { c.Node = "" }, // one that the state does not know may be about to join
	} {
		cfg := good
		f(&cfg)
		if _, err := New(cfg); kms.KindOf(err) != kms.Invalid {
			t.Errorf("%s: %v", what, err)
		}
	}
}
