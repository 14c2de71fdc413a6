package native

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"maps"
	"mime"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/engine"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

// request is one call of an operation that must succeed.
type request struct {
	role string // who asks
	path string
	body any // nil for GET
}

// requests returns a call of every operation, by operationId; each can be made
// twice.
func requests(t testing.TB, w *world) map[string][]request {
	enc, mac, sig := "/v1/keyrings/ring/keys/enc", "/v1/keyrings/ring/keys/mac", "/v1/keyrings/ring/keys/sig"
	service := w.client("service")
	var ct wire.EncryptResponse
	w.call(service, "POST", enc+"/encrypt", wire.EncryptRequest{Plaintext: []byte("hello"), Context: wire.Context{"a": "b"}}).ok(&ct)
	var tag wire.MACResponse
	w.call(service, "POST", mac+"/mac", wire.MACRequest{Message: []byte("m")}).ok(&tag)
	var signature wire.SignResponse
	w.call(service, "POST", sig+"/sign", wire.SignRequest{Message: []byte("m")}).ok(&signature)
	recipient := must(pqc.GenerateKey(pqc.XWing))
	t.Cleanup(recipient.Destroy)
	w.states.Announce()
	incoming := w.incoming("incoming")
	executed := w.states.Carry(kms.ActionSuspend, "key/spare/enc", nil)
	var open wire.Proposal
	w.call(w.client("operator"), "POST", "/v1/proposals", wire.OpenProposalRequest{Action: "rotate", Target: "key/ring/mac", Reason: "due"}).ok(&open)
	w.states.SetRecovery("spare", w.states.RecoveryParams([]string{"fr"}, 2, 2, "de-1", "fr-1"))
	w.states.Replace("node-fr-1", false)
	restore := w.restore("spare", "node-fr-1", "de-1", "fr-1")
	suspend := wire.SuspendRequest{Statement: wire.Suspension(w.states.Suspension("fr-2", "fr-1"))}
	vote := wire.VoteRequest{Statement: w.statement(open.ID, "de-1", approval.Approve)}

	open1 := wire.DecryptRequest{Ciphertext: ct.Ciphertext, Context: wire.Context{"a": "b"}}
	export := wire.ExportRequest{RecipientSuite: pqc.XWing.String(), RecipientPublicKey: recipient.PublicKey().Bytes(), Wrapped: ct.Ciphertext, Context: wire.Context{"a": "b"}}
	get := func(role, path string) []request { return []request{{role, path, nil}} }
	both := func(path string, q any) []request {
		return []request{{"service", path, q}, {"service", path, object{"items": []any{q, q}}}}
	}
	return map[string][]request{
		"health": get("service", "/v1/health"), "ready": get("service", "/v1/ready"), "openapi": get("auditor", "/v1/openapi.json"),
		"status": get("operator", "/v1/status"), "listNodes": get("auditor", "/v1/nodes"), "listSites": get("auditor", "/v1/sites"),
		"listCustodians": get("custodian", "/v1/custodians"), "listPolicies": get("operator", "/v1/policies"),
		"listKeyrings": get("service", "/v1/keyrings"), "getKeyring": get("operator", "/v1/keyrings/ring"),
		"listKeys": get("operator", "/v1/keyrings/ring/keys"), "getKey": get("operator", "/v1/keyrings/ring/keys/sig"),
		"publicKey":     append(get("service", sig+"/public-key"), get("service", sig+"/public-key?version=1")...),
		"listProposals": append(get("custodian", "/v1/proposals"), get("operator", "/v1/proposals?open=true&action=rotate&target=key/ring/mac&waits_for=fr-1&limit=1&before=9999999")...), "getProposal": get("custodian", "/v1/proposals/"+open.ID),
		"evidence": get("auditor", "/v1/proposals/"+executed+"/evidence"), "metrics": get("operator", "/v1/metrics"),
		"backup": get("operator", "/v1/backup"), "drift": get("operator", "/v1/drift"), "alarms": get("operator", "/v1/alarms"), "listRecoveries": get("auditor", "/v1/recoveries"), "auditCheckpoints": get("auditor", "/v1/audit/checkpoints"),
		"listRecoveryKeys": get("custodian", "/v1/recovery-keys"), "restoreKEKs": {{"custodian", "/v1/recovery-keys/restore", restore}},
		"createKeyring":     {{"operator", "/v1/keyrings", wire.CreateKeyringRequest{Name: "more", Residency: []string{"fr"}, Policy: "standard"}}},
		"createKey":         {{"operator", "/v1/keyrings/ring/keys", wire.CreateKeyRequest{Name: "more", Purpose: "sign", Algorithm: "ed25519"}}},
		"importKey":         {{"operator", "/v1/keyrings/ring/keys/incoming/import", incoming}},
		"openProposal":      {{"custodian", "/v1/proposals", wire.OpenProposalRequest{Action: "rotate", Target: "key/ring/sig", Reason: "due"}}},
		"vote":              {{"custodian", "/v1/proposals/" + open.ID + "/votes", vote}},
		"suspendCredential": {{"custodian", "/v1/custodians/fr-2/suspensions", suspend}},
		"encrypt":           both(enc+"/encrypt", wire.EncryptRequest{Plaintext: []byte("hello")}),
		"decrypt":           both(enc+"/decrypt", open1), "rewrap": both(enc+"/rewrap", open1),
		"dataKey": both(enc+"/datakey", wire.DataKeyRequest{}), "wrappedDataKey": both(enc+"/datakey/wrapped", wire.DataKeyRequest{Bytes: 64}),
		"mac": both(mac+"/mac", wire.MACRequest{Message: []byte("m")}), "verifyMAC": both(mac+"/verify-mac", wire.VerifyMACRequest{Message: []byte("m"), MAC: tag.MAC}),
		"sign": both(sig+"/sign", wire.SignRequest{Message: []byte("m")}), "verify": both(sig+"/verify", wire.VerifyRequest{Message: []byte("m"), Signature: signature.Signature}),
		"export": both(enc+"/export", export),
	}
}

// incoming is an approved import, by the node of fr.
func (w *world) incoming(name string) wire.ImportKeyRequest {
	w.t.Helper()
	w.states.AllowImport()
	params := w.states.ImportParams("ring", name, kms.Encrypt)
	params.Node = "node-fr-1"
	info, aad := approval.ImportBinding(w.states.State().Cluster(), "ring", name, params.Node, params.Purpose, params.Algorithm)
	material := sha256.Sum256([]byte("the material of " + name))
	q := wire.ImportKeyRequest{Sealed: must(w.states.Node(params.Node).Private.PublicKey().Seal(info, aad, material[:]))}
	sum := sha256.Sum256(q.Sealed)
	params.Sealed = sum[:]
	q.Proposal = w.states.Propose(kms.ActionImport, approval.KeyTarget("ring", name), params)
	w.states.ApproveAll(q.Proposal)
	return q
}

// restore is what comes out of a ceremony to which custodians consented.
func (w *world) restore(ring, node string, custodians ...string) wire.RestoreRequest {
	c := w.states.RestoreCommand(w.states.NewCeremony(ring, node), node, state.Pending{Keyring: ring, Version: 1}, custodians...)
	q := wire.RestoreRequest{Ceremony: c.Ceremony, Restored: []wire.Restored{{Node: c.Node, Root: c.Root, Keyring: c.Keyring, Version: c.Version, Sealed: c.Sealed, Signature: c.Signature}}}
	for _, x := range c.Consents {
		q.Consents = append(q.Consents, wire.Consent{Custodian: x.Custodian, Credential: x.Credential, Share: x.Share, Signature: x.Signature})
	}
	return q
}

func metrics(body string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4")
		_, _ = w.Write([]byte(body))
	})
}

// spare makes a second keyring, whose key the requests suspend.
func (w *world) spare() {
	w.t.Helper()
	w.states.CreateKeyring("spare", "fr")
	w.states.CreateKey("spare", "enc", kms.Encrypt)
}

func TestEveryOperationAnswersAsDocumented(t *testing.T) {
	w := newWorld(t, options{metrics: metrics("up 1\n")})
	w.found()
	w.spare()
	doc := document(t)
	calls := requests(t, w)
	clients := map[string]*http.Client{}
	for _, role := range []string{"operator", "service", "auditor", "custodian"} {
		clients[role] = w.client(role)
	}
	operations(t, doc, func(method, path string, op object) {
		id := op["operationId"].(string)
		if len(calls[id]) == 0 {
			t.Errorf("%s is not tested", id)
		}
		for _, q := range calls[id] {
			pattern := regexp.MustCompile("^" + pathParameter.ReplaceAllString(path, "[^/]+") + `(\?.*)?$`)
			if !pattern.MatchString(q.path) {
				t.Fatalf("%s: the test calls %s", id, q.path)
			}
			// An idempotency key makes creations repeatable.
			a := w.call(clients[q.role], method, q.path, q.body, "Idempotency-Key", id).ok(nil)
			checkDocumented(t, doc, id, op, q, a)
		}
		delete(calls, id)
	})
	for id := range calls {
		t.Errorf("%s is not documented", id)
	}
}

func checkDocumented(t *testing.T, doc object, id string, op object, q request, a answer) {
	t.Helper()
	content := at(t, op, "responses", "200", "content").(object)
	mediaType, _, err := mime.ParseMediaType(a.header.Get("Content-Type"))
	if err != nil || content[mediaType] == nil {
		t.Errorf("%s: media type %q, documented %v", id, a.header.Get("Content-Type"), slices.Collect(maps.Keys(content)))
		return
	}
	if a.header.Get("Cache-Control") != "no-store" || a.header.Get("X-Request-Id") == "" {
		t.Errorf("%s: headers %v", id, a.header)
	}
	if mediaType == "application/json" {
		var v any
		if err := json.Unmarshal(a.body, &v); err != nil {
			t.Errorf("%s: %v", id, err)
		}
		if why := conforms(t, doc, at(t, content[mediaType], "schema"), v); why != "" {
			t.Errorf("%s: the answer is not as documented: %s", id, why)
		}
	}
	if q.body != nil {
		var v any
		if err := json.Unmarshal(must(json.Marshal(q.body)), &v); err != nil {
			t.Fatal(err)
		}
		if why := conforms(t, doc, at(t, op, "requestBody", "content", "application/json", "schema"), v); why != "" {
			t.Errorf("%s: the request is not as documented: %s", id, why)
		}
	}
}

// TestEmptyPlaintext holds the edge where nil and empty differ: the documented
// type is a string, so no answer may say null.
func TestEmptyPlaintext(t *testing.T) {
	w := newWorld(t, options{})
	w.found()
	c := w.client("service")
	var ct wire.EncryptResponse
	w.call(c, "POST", "/v1/keyrings/ring/keys/enc/encrypt", `{"plaintext":""}`).ok(&ct)
	a := w.call(c, "POST", "/v1/keyrings/ring/keys/enc/decrypt", wire.DecryptRequest{Ciphertext: ct.Ciphertext}).ok(nil)
	if !bytes.Contains(a.body, []byte(`"plaintext":""`)) {
		t.Errorf("the empty plaintext came back as %s", a.body)
	}
}

func TestDataRoundTrips(t *testing.T) {
	w := newWorld(t, options{})
	w.found()
	c := w.client("service")
	key := func(name, op string) string { return "/v1/keyrings/ring/keys/" + name + "/" + op }
	var dk wire.DataKeyResponse
	w.call(c, "POST", key("enc", "datakey"), `{}`).ok(&dk)
	var back wire.DecryptResponse
	w.call(c, "POST", key("enc", "decrypt"), wire.DecryptRequest{Ciphertext: dk.Wrapped}).ok(&back)
	if !bytes.Equal(back.Plaintext, dk.Plaintext) || len(dk.Plaintext) != 32 {
		t.Error("the data key does not come back")
	}
	var v wire.VerifyResponse
	w.call(c, "POST", key("mac", "verify-mac"), wire.VerifyMACRequest{Message: []byte("m"), MAC: make([]byte, 32)}).ok(&v)
	if v.Valid {
		t.Error("a wrong MAC is valid")
	}
	var batch wire.BatchResult[wire.DecryptResponse]
	w.call(c, "POST", key("enc", "decrypt"), object{"items": []any{wire.DecryptRequest{Ciphertext: dk.Wrapped}, wire.DecryptRequest{Ciphertext: []byte("no")}}}).ok(&batch)
	if len(batch.Items) != 2 || batch.Items[0].Result == nil || batch.Items[1].Problem == nil || batch.Items[1].Problem.Kind() != kms.OpenFailed {
		t.Errorf("%+v", batch)
	}
	if h, err := keyring.ParseHeader(dk.Wrapped); err != nil || h.Version != 1 {
		t.Errorf("%+v, %v", h, err)
	}
}

func TestBatchSizes(t *testing.T) {
	w := newWorld(t, options{})
	w.found()
	c := w.client("service")
	for _, n := range []int{0, 1, wire.MaxBatch, wire.MaxBatch + 1} {
		items := make([]wire.MACRequest, n)
		for i := range items {
			items[i].Message = []byte{byte(i)}
		}
		a := w.call(c, "POST", "/v1/keyrings/ring/keys/mac/mac", wire.Batch[wire.MACRequest]{Items: items})
		switch n {
		case 0:
			a.problem(kms.Invalid, 400)
		case wire.MaxBatch + 1:
			a.problem(kms.TooLarge, 413)
		default:
			var r wire.BatchResult[wire.MACResponse]
			a.ok(&r)
			if len(r.Items) != n || r.Items[n-1].Result == nil {
				t.Errorf("%d items: %d answers", n, len(r.Items))
			}
			if e := w.log.entry(); e.Count != n {
				t.Errorf("the access log counts %d of %d items", e.Count, n)
			}
		}
	}
}

func TestRequestID(t *testing.T) {
	w := newWorld(t, options{})
	c := w.client("operator")
	for id, taken := range map[string]bool{
		"abc-DEF_123": true, strings.Repeat("a", engine.MaxRequestID): true,
		"": false, strings.Repeat("a", engine.MaxRequestID+1): false, "a b": false, "a\"b": false, "é": false,
	} {
		a := w.call(c, "GET", "/v1/status", nil, "X-Request-Id", id).ok(nil)
		got := a.header.Get("X-Request-Id")
		if (got == id) != taken || got == "" {
			t.Errorf("id %q was answered with %q", id, got)
		}
		if e := w.log.entry(); e.Request != got {
			t.Errorf("the access log has %q, the answer %q", e.Request, got)
		}
	}
	if p := w.call(c, "GET", "/v1/keyrings/none", nil, "X-Request-Id", "mine").problem(kms.NotFound, 404); p.Instance != "mine" {
		t.Errorf("%+v", p)
	}
}

func TestIdempotentRetry(t *testing.T) {
	w := newWorld(t, options{})
	w.found()
	c := w.client("operator")
	q := wire.CreateKeyRequest{Name: "again", Purpose: "encrypt"}
	var first, second wire.Key
	w.set(func(w *world) { w.lost = kms.Errorf(kms.Unknown, "leadership was lost") })
	w.call(c, "POST", "/v1/keyrings/ring/keys", q, "Idempotency-Key", "k1").problem(kms.Unknown, 503)
	w.set(func(w *world) { w.lost = nil })
	w.call(c, "POST", "/v1/keyrings/ring/keys", q, "Idempotency-Key", "k1").ok(&first)
	index := w.states.State().Index()
	w.call(c, "POST", "/v1/keyrings/ring/keys", q, "Idempotency-Key", "k1").ok(&second)
	if first.ID == "" || first.ID != second.ID || w.states.State().Index() != index {
		t.Errorf("the retry made another key: %s, %s", first.ID, second.ID)
	}
	q.Purpose = "mac"
	w.call(c, "POST", "/v1/keyrings/ring/keys", q, "Idempotency-Key", "k1").problem(kms.Conflict, 409)
	w.call(c, "POST", "/v1/keyrings/ring/keys", q, "Idempotency-Key", "k2").problem(kms.Exists, 409)
	w.call(c, "POST", "/v1/keyrings/ring/keys", q, "Idempotency-Key", strings.Repeat("k", engine.MaxIdempotencyKey+1)).problem(kms.Invalid, 400)
}

func TestReadyAnswers503(t *testing.T) {
	w := newWorld(t, options{})
	c := w.client("service")
	w.set(func(w *world) { w.fresh = time.Hour })
	a := w.call(c, "GET", "/v1/ready", nil)
	var r wire.Ready
	if err := json.Unmarshal(a.body, &r); err != nil || a.status != 503 || r.Ready || len(r.Reasons) == 0 {
		t.Errorf("%d %s", a.status, a.body)
	}
}
