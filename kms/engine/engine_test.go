package engine

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var bg = context.Background()

func TestEncryptDecryptAcrossSites(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("coalition", "fr", "de", "jp")
	w.key("coalition", "data", kms.Encrypt)
	c := wire.Context{"tenant": "a"}
	r := check[wire.EncryptResponse](t)(w.at("fr").engine.Encrypt(bg, caller("service", "fr"), "coalition", "data",
		wire.EncryptRequest{Plaintext: []byte("hello"), Context: c}))
	if r.KeyVersion != 1 {
		t.Errorf("version %d", r.KeyVersion)
	}
	p := check[wire.DecryptResponse](t)(w.at("jp").engine.Decrypt(bg, caller("service", "jp"), "coalition", "data",
		wire.DecryptRequest{Ciphertext: r.Ciphertext, Context: c}))
	if string(p.Plaintext) != "hello" || p.KeyVersion != 1 {
		t.Errorf("decrypted to %d bytes, version %d", len(p.Plaintext), p.KeyVersion)
	}
	e := w.at("jp").log.last()
	if e.Action != "decrypt" || e.Resource != "coalition/data" || e.Outcome != "ok" || e.Version != 1 || e.Context["tenant"] != "a" ||
		e.Principal != "spiffe://jp.example/service/test" || e.Node != "jp-1" || e.Request != "r-1" || e.Count != 1 {
		t.Errorf("logged %+v", e)
	}
	_, err := w.at("jp").engine.Decrypt(bg, caller("service", "jp"), "coalition", "data",
		wire.DecryptRequest{Ciphertext: r.Ciphertext, Context: wire.Context{"tenant": "b"}})
	if err != kms.ErrOpen {
		t.Errorf("another context: %v", err)
	}
	if e := w.at("jp").log.last(); e.Outcome != "open-failed" {
		t.Errorf("logged %+v", e)
	}
}

func TestDecryptNeedsTheKeyAddressed(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("coalition", "fr")
	w.key("coalition", "one", kms.Encrypt)
	w.key("coalition", "two", kms.Encrypt)
	svc, e := caller("service", "fr"), w.at("fr").engine
	r := check[wire.EncryptResponse](t)(e.Encrypt(bg, svc, "coalition", "one", wire.EncryptRequest{Plaintext: []byte("x")}))
	if _, err := e.Decrypt(bg, svc, "coalition", "two", wire.DecryptRequest{Ciphertext: r.Ciphertext}); err != kms.ErrOpen {
		t.Errorf("another key's ciphertext: %v", err)
	}
	forged := bytes.Clone(r.Ciphertext)
	forged[24] = 99 // a version that does not exist
	if _, err := e.Decrypt(bg, svc, "coalition", "one", wire.DecryptRequest{Ciphertext: forged}); err != kms.ErrOpen {
		t.Errorf("unknown version: %v", err)
	}
	for _, b := range [][]byte{nil, {1}, bytes.Repeat([]byte{0}, 200)} {
		if _, err := e.Decrypt(bg, svc, "coalition", "one", wire.DecryptRequest{Ciphertext: b}); err != kms.ErrOpen {
			t.Errorf("%d bytes of nothing: %v", len(b), err)
		}
	}
}

// A node without a sealed copy cannot open a keyring, and does not ask its
// device to.
func TestNotResident(t *testing.T) {
	permit := DefaultAccess() + `permit (principal, action, resource);`
	w := newWorld(t, permit)
	w.keyring("europe", "fr", "de")
	w.key("europe", "data", kms.Encrypt)
	r := check[wire.EncryptResponse](t)(w.at("de").engine.Encrypt(bg, caller("service", "de"), "europe", "data", wire.EncryptRequest{Plaintext: []byte("x")}))
	jp := w.at("jp")
	before := jp.dev.Calls("ecdh")
	_, err := jp.engine.Decrypt(bg, caller("service", "jp"), "europe", "data", wire.DecryptRequest{Ciphertext: r.Ciphertext})
	wantKind(t, err, kms.NotResident)
	for _, s := range []string{"de, fr", "https://fr.example:8443", "https://de.example:8443"} {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%q does not name %q", err, s)
		}
	}
	if n := jp.dev.Calls("ecdh"); n != before {
		t.Errorf("the device was asked %d times", n-before)
	}
	_, err = jp.engine.CreateKey(bg, caller("operator", "jp"), "europe", wire.CreateKeyRequest{Name: "other", Purpose: "mac"})
	wantKind(t, err, kms.NotResident)
	_, err = jp.engine.CreateKeyring(bg, caller("operator", "jp"), wire.CreateKeyringRequest{Name: "more", Residency: []string{"de", "fr"}, Policy: "standard"})
	wantKind(t, err, kms.NotResident)
	if n := jp.dev.Calls("random"); n != 0 {
		t.Errorf("a node that is not resident made key material")
	}
}

func TestStaleness(t *testing.T) {
	w := newWorld(t, "")
	op := caller("operator", "fr")
	for name, survive := range map[string]bool{"strict": false, "lasting": true} {
		check[wire.Keyring](t)(w.at("fr").engine.CreateKeyring(bg, op, wire.CreateKeyringRequest{
			Name: name, Residency: []string{"fr"}, Policy: "standard", MaxStalenessMS: 5000, Survive: survive}))
		w.key(name, "data", kms.Encrypt)
		w.key(name, "mac", kms.MAC)
	}
	fr, svc := w.at("fr"), caller("service", "fr")
	r := map[string]wire.EncryptResponse{}
	m := map[string]wire.MACResponse{}
	for _, ring := range []string{"strict", "lasting"} {
		r[ring] = check[wire.EncryptResponse](t)(fr.engine.Encrypt(bg, svc, ring, "data", wire.EncryptRequest{Plaintext: []byte("x")}))
		m[ring] = check[wire.MACResponse](t)(fr.engine.MAC(bg, svc, ring, "mac", wire.MACRequest{Message: []byte("x")}))
	}
	*fr.fresh = 5 * time.Second
	check[wire.EncryptResponse](t)(fr.engine.Encrypt(bg, svc, "strict", "data", wire.EncryptRequest{}))
	*fr.fresh = 5*time.Second + time.Millisecond
	for _, ring := range []string{"strict", "lasting"} {
		_, err := fr.engine.Encrypt(bg, svc, ring, "data", wire.EncryptRequest{})
		wantKind(t, err, kms.Stale)
		_, err = fr.engine.Rewrap(bg, svc, ring, "data", wire.RewrapRequest{Ciphertext: r[ring].Ciphertext})
		wantKind(t, err, kms.Stale)
		_, err = fr.engine.MAC(bg, svc, ring, "mac", wire.MACRequest{})
		wantKind(t, err, kms.Stale)
	}
	_, err := fr.engine.Decrypt(bg, svc, "strict", "data", wire.DecryptRequest{Ciphertext: r["strict"].Ciphertext})
	wantKind(t, err, kms.Stale)
	check[wire.DecryptResponse](t)(fr.engine.Decrypt(bg, svc, "lasting", "data", wire.DecryptRequest{Ciphertext: r["lasting"].Ciphertext}))
	v := check[wire.VerifyResponse](t)(fr.engine.VerifyMAC(bg, svc, "lasting", "mac", wire.VerifyMACRequest{Message: []byte("x"), MAC: m["lasting"].MAC}))
	if !v.Valid {
		t.Error("the MAC does not verify")
	}
	if rd := fr.engine.Ready(bg); !rd.Ready {
		t.Errorf("5 s old and not ready: %v", rd.Reasons)
	}
	*fr.fresh = time.Minute
	if rd := fr.engine.Ready(bg); rd.Ready || len(rd.Reasons) != 1 {
		t.Errorf("a minute old: %+v", rd)
	}
}

func TestDeniedIsLoggedAndSaysWhy(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("europe", "fr", "de")
	w.key("europe", "data", kms.Encrypt)
	for _, x := range []Caller{
		caller("operator", "fr"), caller("auditor", "fr"), caller("custodian", "fr"), caller("node", "fr"),
		caller("service", "jp"),
		{Identity: kms.Identity{TrustDomain: "elsewhere.example", Role: "service", Name: "x"}},
	} {
		_, err := w.at("fr").engine.Encrypt(bg, x, "europe", "data", wire.EncryptRequest{Plaintext: []byte("secret text")})
		wantKind(t, err, kms.Denied)
		for _, s := range []string{"encrypt", `Key::"europe/data"`, "policy must permit", x.Identity.String()} {
			if !strings.Contains(err.Error(), s) {
				t.Errorf("%q does not say %q", err, s)
			}
		}
		if e := w.at("fr").log.last(); e.Outcome != "denied" || e.Principal != x.Identity.String() || e.Action != "encrypt" {
			t.Errorf("logged %+v", e)
		}
	}
	_, err := w.at("fr").engine.Encrypt(bg, Caller{}, "europe", "data", wire.EncryptRequest{})
	wantKind(t, err, kms.Unauthenticated)
	// What does not exist is denied likewise to who may not know it.
	_, err = w.at("fr").engine.Encrypt(bg, caller("service", "fr"), "europe", "nothing", wire.EncryptRequest{})
	wantKind(t, err, kms.NotFound)
	_, err = w.at("fr").engine.Encrypt(bg, caller("service", "fr"), "nothing", "data", wire.EncryptRequest{})
	wantKind(t, err, kms.Denied)
	_, err = w.at("fr").engine.Encrypt(bg, caller("service", "fr"), "../x", strings.Repeat("y", 1000), wire.EncryptRequest{})
	wantKind(t, err, kms.Invalid)
	if e := w.at("fr").log.last(); e.Outcome != "invalid" || len(e.Resource) > 10 {
		t.Errorf("logged %+v", e)
	}
}

func TestAuditFailureWithholdsTheAnswer(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("europe", "fr")
	w.key("europe", "data", kms.Encrypt)
	fr, svc := w.at("fr"), caller("service", "fr")
	fr.log.fail = kms.Wrap(kms.TooLarge, errors.New("x"), "entry too long", "")
	r, err := fr.engine.Encrypt(bg, svc, "europe", "data", wire.EncryptRequest{Plaintext: []byte("x")})
	wantKind(t, err, kms.ReadOnly)
	if r.Ciphertext != nil {
		t.Error("the answer left")
	}
	fr.log.fail = nil // that entry alone could not be written
	check[wire.EncryptResponse](t)(fr.engine.Encrypt(bg, svc, "europe", "data", wire.EncryptRequest{}))

	fr.log.fail = kms.Errorf(kms.ReadOnly, "disk gone")
	_, err = fr.engine.Encrypt(bg, svc, "europe", "data", wire.EncryptRequest{})
	wantKind(t, err, kms.ReadOnly)
	index := w.cluster.State().Index()
	_, err = fr.engine.CreateKey(bg, caller("operator", "fr"), "europe", wire.CreateKeyRequest{Name: "new", Purpose: "mac"})
	wantKind(t, err, kms.ReadOnly)
	if w.cluster.State().Index() != index {
		t.Error("a change was made although it could not be logged")
	}
	if rd := fr.engine.Ready(bg); rd.Ready {
		t.Error("ready without an access log")
	}
	// The caller's going away does not keep it out of the log.
	de := w.at("de")
	ctx, cancel := context.WithCancel(bg)
	cancel()
	n := de.log.len()
	_, _ = de.engine.Encrypt(ctx, svc, "europe", "data", wire.EncryptRequest{})
	if de.log.len() != n+1 {
		t.Error("a cancelled request is not in the log")
	}
}

func TestDataKeys(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("coalition", "fr", "jp")
	w.key("coalition", "data", kms.Encrypt)
	fr, svc := w.at("fr").engine, caller("service", "fr")
	c := wire.Context{"file": "7"}
	for _, n := range []int{0, 16, 32, 64} {
		r := check[wire.DataKeyResponse](t)(fr.DataKey(bg, svc, "coalition", "data", wire.DataKeyRequest{Bytes: n, Context: c}))
		if n == 0 {
			n = 32
		}
		p := check[wire.DecryptResponse](t)(w.at("jp").engine.Decrypt(bg, caller("service", "jp"), "coalition", "data",
			wire.DecryptRequest{Ciphertext: r.Wrapped, Context: c}))
		if len(r.Plaintext) != n || !bytes.Equal(p.Plaintext, r.Plaintext) {
			t.Errorf("a data key of %d bytes does not come back", n)
		}
	}
	_, err := fr.DataKey(bg, svc, "coalition", "data", wire.DataKeyRequest{Bytes: 24})
	wantKind(t, err, kms.Invalid)
	x := check[wire.WrappedDataKeyResponse](t)(fr.WrappedDataKey(bg, svc, "coalition", "data", wire.DataKeyRequest{}))
	p := check[wire.DecryptResponse](t)(fr.Decrypt(bg, svc, "coalition", "data", wire.DecryptRequest{Ciphertext: x.Wrapped}))
	if len(p.Plaintext) != 32 || bytes.Equal(p.Plaintext, make([]byte, 32)) {
		t.Error("the wrapped data key is not a key")
	}
}

func TestLimitsAndPurposes(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("r", "fr")
	w.key("r", "data", kms.Encrypt)
	w.key("r", "mac", kms.MAC)
	w.key("r", "sig", kms.Sign)
	e, svc := w.at("fr").engine, caller("service", "fr")
	big := make([]byte, wire.MaxPlaintext+1)
	_, err := e.Encrypt(bg, svc, "r", "data", wire.EncryptRequest{Plaintext: big})
	wantKind(t, err, kms.TooLarge)
	_, err = e.MAC(bg, svc, "r", "mac", wire.MACRequest{Message: big})
	wantKind(t, err, kms.TooLarge)
	_, err = e.Encrypt(bg, svc, "r", "data", wire.EncryptRequest{Context: wire.Context{"x": strings.Repeat("y", 9000)}})
	wantKind(t, err, kms.TooLarge)
	if l := w.at("fr").log.last(); l.Context != nil {
		t.Error("a context that was refused is in the log")
	}
	_, err = e.Encrypt(bg, svc, "r", "data", wire.EncryptRequest{Context: wire.Context{"x": "\xff"}})
	wantKind(t, err, kms.Invalid)
	_, err = e.Encrypt(bg, svc, "r", "mac", wire.EncryptRequest{})
	wantKind(t, err, kms.Invalid)
	_, err = e.MAC(bg, svc, "r", "sig", wire.MACRequest{})
	wantKind(t, err, kms.Invalid)
	_, err = e.Sign(bg, svc, "r", "data", wire.SignRequest{})
	wantKind(t, err, kms.Invalid)
	_, err = e.PublicKey(bg, svc, "r", "mac", 0)
	wantKind(t, err, kms.Invalid)
}

func TestBatches(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("r", "fr")
	w.key("r", "data", kms.Encrypt)
	e, svc, log := w.at("fr").engine, caller("service", "fr"), w.at("fr").log
	var b wire.Batch[wire.EncryptRequest]
	for i := range 5 {
		b.Items = append(b.Items, wire.EncryptRequest{Plaintext: []byte{byte(i)}, Context: wire.Context{"i": string(rune('a' + i))}})
	}
	b.Items[2].Plaintext = make([]byte, wire.MaxPlaintext+1)
	before := log.len()
	r := check[wire.BatchResult[wire.EncryptResponse]](t)(e.EncryptBatch(bg, svc, "r", "data", b))
	if log.len() != before+1 {
		t.Errorf("%d entries for one batch", log.len()-before)
	}
	if l := log.last(); l.Count != 5 || l.Outcome != "partial" || len(l.Context[ContextsDigest]) != 64 {
		t.Errorf("logged %+v", l)
	}
	var d wire.Batch[wire.DecryptRequest]
	for i, it := range r.Items {
		if i == 2 {
			if it.Result != nil || it.Problem == nil || it.Problem.Kind() != kms.TooLarge {
				t.Errorf("item 2: %+v", it.Problem)
			}
			continue
		}
		if it.Problem != nil {
			t.Fatalf("item %d: %+v", i, it.Problem)
		}
		d.Items = append(d.Items, wire.DecryptRequest{Ciphertext: it.Result.Ciphertext, Context: b.Items[i].Context})
	}
	p := check[wire.BatchResult[wire.DecryptResponse]](t)(e.DecryptBatch(bg, svc, "r", "data", d))
	for i, want := range []byte{0, 1, 3, 4} {
		if p.Items[i].Result == nil || p.Items[i].Result.Plaintext[0] != want {
			t.Errorf("item %d: %+v", i, p.Items[i])
		}
	}
	same := wire.Batch[wire.EncryptRequest]{Items: []wire.EncryptRequest{{Context: wire.Context{"a": "b"}}, {Context: wire.Context{"a": "b"}}}}
	check[wire.BatchResult[wire.EncryptResponse]](t)(e.EncryptBatch(bg, svc, "r", "data", same))
	if l := log.last(); l.Context["a"] != "b" || l.Version != 1 || l.Outcome != "ok" {
		t.Errorf("logged %+v", l)
	}
	_, err := e.EncryptBatch(bg, svc, "r", "data", wire.Batch[wire.EncryptRequest]{})
	wantKind(t, err, kms.Invalid)
	_, err = e.EncryptBatch(bg, svc, "r", "data", wire.Batch[wire.EncryptRequest]{Items: make([]wire.EncryptRequest, 257)})
	wantKind(t, err, kms.TooLarge)
}

// A node that is stopped in the middle of an operation does not answer from what
// it knew before.
func TestStoppedBetweenStateAndAnswer(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("r", "fr")
	w.key("r", "data", kms.Encrypt)
	fr, svc := w.at("fr"), caller("service", "fr")
	stopped := 0 * time.Second
	fr.dev.Delay(func(op string) time.Duration {
		if op == "ecdh" {
			w.clock.Advance(stopped)
		}
		return 0
	})
	for _, stopped = range []time.Duration{29 * time.Second, 31 * time.Second} {
		fr.cache.Purge()
		r, err := fr.engine.Encrypt(bg, svc, "r", "data", wire.EncryptRequest{})
		if stopped < 30*time.Second {
			check[wire.EncryptResponse](t)(r, err)
			continue
		}
		wantKind(t, err, kms.Stale)
		if r.Ciphertext != nil {
			t.Error("the answer left")
		}
	}
	fr.cache.Purge()
	_, err := fr.engine.EncryptBatch(bg, svc, "r", "data", wire.Batch[wire.EncryptRequest]{Items: make([]wire.EncryptRequest, 2)})
	wantKind(t, err, kms.Stale)
}

// What cannot be read back goes into no log.
func TestCallersTextIsChecked(t *testing.T) {
	w := newWorld(t, "")
	good := caller("service", "fr")
	for _, f := range []func(*Caller){
		func(c *Caller) { c.RequestID = "\xff" }, func(c *Caller) { c.RequestID = "a b" }, func(c *Caller) { c.RequestID = strings.Repeat("x", 65) },
		func(c *Caller) { c.IdempotencyKey = strings.Repeat("x", 129) },
		func(c *Caller) { c.Identity.Name = "x\xff" }, func(c *Caller) { c.Identity.Name = strings.Repeat("x", 600) },
	} {
		c := good
		f(&c)
		n := w.at("fr").log.len()
		if _, err := w.at("fr").engine.Status(bg, c); err == nil {
			t.Errorf("%+v is accepted", c)
		}
		if w.at("fr").log.len() != n+1 { // memoryLog parses every entry
			t.Errorf("%+v is not in the log", c)
		}
	}
}

func TestReadyAsksTheDeviceSparingly(t *testing.T) {
	w := newWorld(t, "")
	fr := w.at("fr")
	for range 5 {
		fr.engine.Ready(bg)
	}
	if n := fr.dev.Calls("check"); n != 1 {
		t.Errorf("asked %d times", n)
	}
	fr.dev.Fail(func(string) error { return errors.New("unplugged") })
	w.clock.Advance(deviceCheckEvery)
	if r := fr.engine.Ready(bg); r.Ready || !strings.Contains(r.Reasons[0], "device") {
		t.Errorf("%+v", r)
	}
}

// The other batch forms do what their single forms do.
func TestEveryBatchForm(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("r", "fr")
	w.key("r", "data", kms.Encrypt)
	w.key("r", "mac", kms.MAC)
	w.key("r", "sig", kms.Sign)
	e, svc := w.at("fr").engine, caller("service", "fr")
	dk := check[wire.BatchResult[wire.DataKeyResponse]](t)(e.DataKeyBatch(bg, svc, "r", "data", wire.Batch[wire.DataKeyRequest]{Items: []wire.DataKeyRequest{{}, {Bytes: 7}, {Bytes: 64}}}))
	if dk.Items[0].Result == nil || dk.Items[1].Problem == nil || len(dk.Items[2].Result.Plaintext) != 64 {
		t.Errorf("%+v", dk)
	}
	wr := check[wire.BatchResult[wire.WrappedDataKeyResponse]](t)(e.WrappedDataKeyBatch(bg, svc, "r", "data", wire.Batch[wire.DataKeyRequest]{Items: make([]wire.DataKeyRequest, 2)}))
	rw := check[wire.BatchResult[wire.EncryptResponse]](t)(e.RewrapBatch(bg, svc, "r", "data", wire.Batch[wire.RewrapRequest]{Items: []wire.RewrapRequest{
		{Ciphertext: wr.Items[0].Result.Wrapped}, {Ciphertext: []byte("x")}}}))
	if rw.Items[0].Result == nil || rw.Items[1].Problem.Kind() != kms.OpenFailed {
		t.Errorf("%+v", rw)
	}
	m := check[wire.BatchResult[wire.MACResponse]](t)(e.MACBatch(bg, svc, "r", "mac", wire.Batch[wire.MACRequest]{Items: []wire.MACRequest{{Message: []byte("a")}, {Message: []byte("b")}}}))
	if len(m.Items[0].Result.MAC) != 32 || bytes.Equal(m.Items[0].Result.MAC, m.Items[1].Result.MAC) {
		t.Error("the two MACs are wrong")
	}
	s := check[wire.BatchResult[wire.SignResponse]](t)(e.SignBatch(bg, svc, "r", "sig", wire.Batch[wire.SignRequest]{Items: []wire.SignRequest{{Message: []byte("a")}}}))
	v := check[wire.BatchResult[wire.VerifyResponse]](t)(e.VerifyBatch(bg, svc, "r", "sig", wire.Batch[wire.VerifyRequest]{Items: []wire.VerifyRequest{
		{Message: []byte("a"), Signature: s.Items[0].Result.Signature}, {Message: []byte("b"), Signature: s.Items[0].Result.Signature}}}))
	if !v.Items[0].Result.Valid || v.Items[1].Result.Valid {
		t.Errorf("%+v", v)
	}
}

// A device that fails is an error that passes, and says nothing of itself.
func TestDeviceFailure(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("r", "fr")
	w.key("r", "data", kms.Encrypt)
	fr, svc := w.at("fr"), caller("service", "fr")
	fr.cache.Purge()
	fr.dev.Fail(func(string) error { return errors.New("slot 7 pin 1234") })
	_, err := fr.engine.Encrypt(bg, svc, "r", "data", wire.EncryptRequest{})
	wantKind(t, err, kms.Unavailable)
	if p := wire.NewProblem(err, ""); strings.Contains(p.Detail+p.Fix, "1234") {
		t.Errorf("%+v", p)
	}
	_, err = fr.engine.OpenProposal(bg, caller("operator", "fr"), wire.OpenProposalRequest{Action: "rotate", Target: "key/r/data", Reason: "x"})
	wantKind(t, err, kms.Unavailable)
	fr.dev.Fail(nil)
	check[wire.EncryptResponse](t)(fr.engine.Encrypt(bg, svc, "r", "data", wire.EncryptRequest{}))
	ctx, cancel := context.WithCancel(bg)
	cancel()
	fr.cache.Purge()
	_, err = fr.engine.Encrypt(ctx, svc, "r", "data", wire.EncryptRequest{})
	wantKind(t, err, kms.Unavailable)
}

func TestSuspendAndResume(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("r", "fr", "de", "jp")
	w.key("r", "data", kms.Encrypt)
	as := w.agents()
	e, svc := w.at("fr").engine, caller("service", "fr")
	r := check[wire.EncryptResponse](t)(e.Encrypt(bg, svc, "r", "data", wire.EncryptRequest{}))
	target := approval.KeyTarget("r", "data")
	p := w.propose(kms.ActionSuspend, target, wire.ProposalParameters{})
	if p.Progress != "open" || len(p.Missing) != 2 || !strings.Contains(p.Summary, "waits for 1 more approval") {
		t.Errorf("%q, missing %q", p.Summary, p.Missing)
	}
	w.vote(p, approval.Approve, "jp-a") // one site alone
	for range siteIDs {
		w.settle(as)
		w.clock.Advance(2 * time.Second)
	}
	_, err := e.Encrypt(bg, svc, "r", "data", wire.EncryptRequest{})
	wantKind(t, err, kms.Conflict)
	if !strings.Contains(err.Error(), "suspended") {
		t.Error(err)
	}
	_, err = e.Decrypt(bg, svc, "r", "data", wire.DecryptRequest{Ciphertext: r.Ciphertext})
	wantKind(t, err, kms.Conflict)
	if n := w.at("fr").cache.Stats().Keys; n != 0 {
		t.Errorf("%d keys of a suspended key stay open", n)
	}
	if got := w.carry(as, kms.ActionResume, target, wire.ProposalParameters{}); got.Progress != "executed" {
		t.Fatalf("resume: %s", got.Summary)
	}
	check[wire.DecryptResponse](t)(e.Decrypt(bg, svc, "r", "data", wire.DecryptRequest{Ciphertext: r.Ciphertext}))
}
