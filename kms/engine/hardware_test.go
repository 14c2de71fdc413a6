package engine

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/fakedevice"
)

// mixedWorld is a world in which the device of jp is of another import kind, so
// that keys resident there are made on the host.
func mixedWorld(t testing.TB) *world {
	t.Helper()
	return newWorldOf(t, "", func(n *state.Node) {
		if n.Site == "jp" {
			n.ImportKind = otherKind
		}
	})
}

// hardware creates a keyring of protection hardware through the node of fr.
func (w *world) hardware(name string, residency ...string) wire.Keyring {
	w.t.Helper()
	return check[wire.Keyring](w.t)(w.at("fr").engine.CreateKeyring(bg, caller("operator", "fr"),
		wire.CreateKeyringRequest{Name: name, Residency: residency, Policy: "standard", Protection: "hardware"}))
}

// threeKeys creates a key of every purpose.
func (w *world) threeKeys(ring string) {
	w.t.Helper()
	for _, p := range []kms.Purpose{kms.Encrypt, kms.MAC, kms.Sign} {
		w.key(ring, string(p), p)
	}
}

func TestHardwareKeyrings(t *testing.T) {
	w := mixedWorld(t)
	for ring, c := range map[string]struct {
		residency []string
		generated string
	}{"pair": {[]string{"fr", "de"}, "device"}, "all": {[]string{"fr", "de", "jp"}, "host"}} {
		kr := w.hardware(ring, c.residency...)
		if kr.Protection != "hardware" || kr.KEK != 0 {
			t.Errorf("keyring %+v", kr)
		}
		if _, ok := w.cluster.State().KEK(ring, 1); ok {
			t.Errorf("keyring %s has a KEK", ring)
		}
		w.threeKeys(ring)
		for _, p := range []string{"encrypt", "mac", "sign"} {
			k := check[wire.Key](t)(w.at("jp").engine.Key(bg, caller("auditor", "jp"), ring, p))
			if v := k.Versions[0]; k.Protection != "hardware" || v.Generated != c.generated || v.KEK != 0 || v.State != "active" {
				t.Errorf("%s/%s: %+v", ring, p, k)
			}
			sv, _ := w.cluster.State().Version(ring, p, 1)
			if len(sv.Wrapped) != 0 || len(sv.Copies) != len(c.residency) {
				t.Errorf("%s/%s is stored with %d wrapped bytes and %d copies", ring, p, len(sv.Wrapped), len(sv.Copies))
			}
		}
		for _, site := range c.residency {
			w.useHardware(ring, "fr", site)
		}
	}
	if s := w.at("fr").cache.Stats(); s.Keys != 0 || s.KEKs != 0 || s.Handles != 6 {
		t.Errorf("in fr's cache: %+v", s)
	}
	_, err := w.at("jp").engine.Decrypt(bg, caller("service", "jp"), "pair", "encrypt", wire.DecryptRequest{})
	wantKind(t, err, kms.Denied)
}

// useHardware does every data operation at one site and opens what came of it at
// another.
func (w *world) useHardware(ring, from, to string) {
	t := w.t
	t.Helper()
	a, b := w.at(from).engine, w.at(to).engine
	sa, sb := caller("service", from), caller("service", to)
	c := wire.Context{"tenant": "a"}
	r := check[wire.EncryptResponse](t)(a.Encrypt(bg, sa, ring, "encrypt", wire.EncryptRequest{Plaintext: []byte("hello"), Context: c}))
	p := check[wire.DecryptResponse](t)(b.Decrypt(bg, sb, ring, "encrypt", wire.DecryptRequest{Ciphertext: r.Ciphertext, Context: c}))
	if string(p.Plaintext) != "hello" {
		t.Errorf("%s: decrypted to %d bytes", ring, len(p.Plaintext))
	}
	if _, err := b.Decrypt(bg, sb, ring, "encrypt", wire.DecryptRequest{Ciphertext: r.Ciphertext}); err != kms.ErrOpen {
		t.Errorf("another context: %v", err)
	}
	moved := check[wire.EncryptResponse](t)(b.Rewrap(bg, sb, ring, "encrypt", wire.RewrapRequest{Ciphertext: r.Ciphertext, Context: c}))
	check[wire.DecryptResponse](t)(a.Decrypt(bg, sa, ring, "encrypt", wire.DecryptRequest{Ciphertext: moved.Ciphertext, Context: c}))
	dk := check[wire.DataKeyResponse](t)(a.DataKey(bg, sa, ring, "encrypt", wire.DataKeyRequest{}))
	p = check[wire.DecryptResponse](t)(b.Decrypt(bg, sb, ring, "encrypt", wire.DecryptRequest{Ciphertext: dk.Wrapped}))
	if !bytes.Equal(p.Plaintext, dk.Plaintext) {
		t.Errorf("%s: another data key", ring)
	}
	m := check[wire.MACResponse](t)(a.MAC(bg, sa, ring, "mac", wire.MACRequest{Message: []byte("m")}))
	for message, want := range map[string]bool{"m": true, "n": false} {
		v := check[wire.VerifyResponse](t)(b.VerifyMAC(bg, sb, ring, "mac", wire.VerifyMACRequest{Message: []byte(message), MAC: m.MAC}))
		if v.Valid != want {
			t.Errorf("MAC of %q is valid: %v", message, v.Valid)
		}
	}
	s := check[wire.SignResponse](t)(a.Sign(bg, sa, ring, "sign", wire.SignRequest{Message: []byte("m")}))
	if v := check[wire.VerifyResponse](t)(b.Verify(bg, sb, ring, "sign", wire.VerifyRequest{Message: []byte("m"), Signature: s.Signature})); !v.Valid {
		t.Errorf("%s: the signature does not verify", ring)
	}
	check[wire.PublicKeyResponse](t)(b.PublicKey(bg, sb, ring, "sign", 0))
}

func TestHardwareRefuses(t *testing.T) {
	permit := DefaultAccess() + `permit (principal, action, resource);`
	w := newWorldOf(t, permit, func(n *state.Node) {
		if n.Site == "jp" {
			n.ImportKind, n.Import = "", nil
		}
	})
	fr, op, svc := w.at("fr").engine, caller("operator", "fr"), caller("service", "fr")
	_, err := fr.CreateKeyring(bg, op, wire.CreateKeyringRequest{Name: "all", Residency: []string{"fr", "jp"}, Policy: "standard", Protection: "hardware"})
	if wantKind(t, err, kms.Invalid); !strings.Contains(err.Error(), "jp-1") {
		t.Errorf("%q does not name the node", err)
	}
	w.hardware("r", "fr", "de")
	w.threeKeys("r")
	_, err = fr.CreateKey(bg, op, "r", wire.CreateKeyRequest{Name: "ed", Purpose: "sign", Algorithm: "ed25519"})
	if wantKind(t, err, kms.Invalid); !strings.Contains(err.Error(), "ecdsa") {
		t.Errorf("%q does not say what to use", err)
	}
	_, err = w.at("jp").engine.CreateKey(bg, caller("operator", "jp"), "r", wire.CreateKeyRequest{Name: "k", Purpose: "mac"})
	wantKind(t, err, kms.NotResident)
	_, err = fr.MAC(bg, svc, "r", "mac", wire.MACRequest{Message: []byte("\x00\x00\x00\x01conclave/check-value/2\x00")})
	wantKind(t, err, kms.Invalid)
	_, err = fr.Sign(bg, svc, "r", "sign", wire.SignRequest{Message: []byte(kms.ReceiptPrefix)})
	wantKind(t, err, kms.Invalid)
	check[wire.MACResponse](t)(fr.MAC(bg, svc, "r", "mac", wire.MACRequest{Message: make([]byte, wire.MaxPlaintext)}))
	_, err = fr.Export(bg, svc, "r", "encrypt", wire.ExportRequest{Version: 1, RecipientSuite: "xwing", RecipientPublicKey: nil})
	if err == nil {
		t.Error("a key of protection hardware was exported")
	}
	u := &use{ring: &state.Keyring{Protection: kms.Hardware}}
	if _, _, err := exported(u, &item{}, wire.ExportRequest{Version: 1}); err != keyring.ErrNoExport {
		t.Errorf("export: %v", err)
	}
}

func TestHardwareRotation(t *testing.T) {
	w := mixedWorld(t)
	w.hardware("all", "fr", "de", "jp")
	w.hardware("pair", "fr", "de")
	as := w.agents()
	for ring, nodes := range map[string]int{"all": 3, "pair": 2} {
		w.threeKeys(ring)
		fr, svc := w.at("fr").engine, caller("service", "fr")
		old := check[wire.EncryptResponse](t)(fr.Encrypt(bg, svc, ring, "encrypt", wire.EncryptRequest{Plaintext: []byte("before")}))
		for _, key := range []string{"encrypt", "mac", "sign"} {
			p := w.carry(as, kms.ActionRotate, approval.KeyTarget(ring, key), wire.ProposalParameters{})
			k := check[wire.Key](t)(fr.Key(bg, caller("auditor", "fr"), ring, key))
			if p.Progress != "executed" || k.Primary != 2 {
				t.Fatalf("%s/%s: %s, primary %d", ring, key, p.Summary, k.Primary)
			}
			if r := k.Versions[1].Receipts; len(r) != nodes || !r[0].Received || r[0].Site == "" {
				t.Errorf("%s/%s: receipts %+v", ring, key, r)
			}
			w.proven(p.ID)
		}
		w.useHardware(ring, "fr", "de")
		w.useHardware(ring, "de", "fr")
		d := check[wire.DecryptResponse](t)(w.at("de").engine.Decrypt(bg, caller("service", "de"), ring, "encrypt", wire.DecryptRequest{Ciphertext: old.Ciphertext}))
		if d.KeyVersion != 1 || string(d.Plaintext) != "before" {
			t.Errorf("version %d", d.KeyVersion)
		}
	}
}

// A version with a public key that its material does not have gets no receipt.
func TestNoReceiptForAnotherDeviceKey(t *testing.T) {
	w := newWorld(t, "")
	w.hardware("r", "fr", "de")
	w.threeKeys("r")
	as := w.agents()
	de := w.at("de")
	de.dev.Corrupt(func(op string, out []byte) {
		if op == fakedevice.OpLoadedSign {
			out[5] ^= 1
		}
	})
	w.carry(as, kms.ActionRotate, approval.KeyTarget("r", "sign"), wire.ProposalParameters{})
	if v, _ := w.cluster.State().Version("r", "sign", 2); v.State != kms.PreActive || len(v.Receipts) != 1 {
		t.Errorf("state %s with %d receipts", v.State, len(v.Receipts))
	}
	de.dev.Corrupt(nil)
	w.clock.Advance(MaxBackoff)
	w.settle(as)
	if v, _ := w.cluster.State().Version("r", "sign", 2); v.State != kms.Active {
		t.Errorf("state %s after the device got well", v.State)
	}
}

func TestHardwareDestroy(t *testing.T) {
	w := newWorld(t, "")
	w.hardware("r", "fr", "de")
	w.threeKeys("r")
	as := w.agents()
	w.useHardware("r", "fr", "de")
	p := w.propose(kms.ActionDestroy, approval.KeyTarget("r", "encrypt"), wire.ProposalParameters{})
	w.vote(p, approval.Approve, "fr-a", "de-a")
	w.clock.Advance(8 * 24 * time.Hour)
	w.tick()
	for range siteIDs {
		w.settle(as)
		w.clock.Advance(2 * time.Second)
	}
	v, _ := w.cluster.State().Version("r", "encrypt", 1)
	if v.State != kms.Destroyed || len(v.Copies) != 0 {
		t.Errorf("version is %s with %d copies", v.State, len(v.Copies))
	}
	if n := w.at("fr").cache.Stats().Handles; n != 2 {
		t.Errorf("%d handles are left, of two keys", n)
	}
	_, err := w.at("fr").engine.Encrypt(bg, caller("service", "fr"), "r", "encrypt", wire.EncryptRequest{})
	wantKind(t, err, kms.Conflict)
}

// A device that fails or hangs stops its own keys; keys in memory go on, readiness
// names the cause, and all is well when it is.
func TestHardwareDeviceFails(t *testing.T) {
	w := newWorld(t, "")
	w.hardware("hard", "fr", "de")
	w.threeKeys("hard")
	w.keyring("soft", "fr")
	w.key("soft", "data", kms.Encrypt)
	fr, svc := w.at("fr"), caller("service", "fr")
	w.useHardware("hard", "fr", "de")
	soft := func() error {
		_, err := fr.engine.Encrypt(bg, svc, "soft", "data", wire.EncryptRequest{})
		return err
	}
	hard := func() error {
		_, err := fr.engine.Encrypt(bg, svc, "hard", "encrypt", wire.EncryptRequest{})
		return err
	}
	for _, err := range []error{soft(), hard()} {
		if err != nil {
			t.Fatal(err)
		}
	}
	fr.dev.Fail(func(string) error { return errors.New("hsm: device unavailable: C_Sign:\nCKR_DEVICE_REMOVED") })
	if err := soft(); err != nil {
		t.Errorf("a key in memory: %v", err)
	}
	err := hard()
	if wantKind(t, err, kms.Unavailable); !strings.Contains(err.Error(), "/v1/ready") || strings.Contains(err.Error(), "CKR") {
		t.Errorf("error %q", err)
	}
	w.clock.Advance(deviceCheckEvery)
	if r := fr.engine.Ready(bg); r.Ready || !strings.Contains(r.Reasons[0], "hsm: device unavailable: C_Sign: CKR_DEVICE_REMOVED") {
		t.Errorf("ready %+v", r)
	}
	fr.dev.Fail(nil)
	fr.dev.LoseKeys()
	w.clock.Advance(deviceCheckEvery)
	if r := fr.engine.Ready(bg); !r.Ready {
		t.Errorf("ready %+v", r)
	}
	if err := hard(); err != nil {
		t.Errorf("after the device's return: %v", err)
	}
}

// A device that hangs keeps only those waiting who need it, and as long as they
// want to.
func TestHardwareDeviceHangs(t *testing.T) {
	w := newWorld(t, "")
	w.hardware("hard", "fr", "de")
	w.threeKeys("hard")
	w.keyring("soft", "fr")
	w.key("soft", "data", kms.Encrypt)
	fr, svc := w.at("fr"), caller("service", "fr")
	soft := func() {
		check[wire.EncryptResponse](t)(fr.engine.Encrypt(bg, svc, "soft", "data", wire.EncryptRequest{}))
	}
	soft() // opens its key
	fr.dev.Hang(func(string) bool { return true })
	ctx, cancel := context.WithCancel(bg)
	const waiting = 8
	errs := make(chan error, waiting)
	for range waiting {
		go func() { // loads the key, or waits for who does
			_, err := fr.engine.Encrypt(ctx, svc, "hard", "encrypt", wire.EncryptRequest{})
			errs <- err
		}()
	}
	for range 10 {
		soft()
	}
	cancel()
	for range waiting {
		wantKind(t, <-errs, kms.Unavailable)
	}
	fr.dev.Hang(nil)
	w.useHardware("hard", "fr", "de")
}

func TestCauseIsOneShortLine(t *testing.T) {
	got := cause(errors.New("a\x00b\nc\xff" + strings.Repeat("é", 400)))
	if len(got) > maxCause+10 || !utf8.ValidString(got) || strings.ContainsAny(got, "\n\x00") || !strings.HasPrefix(got, "a b c?é") {
		t.Errorf("%q", got)
	}
}

func TestNodesShowTheirHardware(t *testing.T) {
	w := newWorldOf(t, "", func(n *state.Node) {
		if n.Site == "jp" {
			n.ImportKind, n.Import = "", nil
		}
	})
	l := check[wire.Nodes](t)(w.at("fr").engine.Nodes(bg, caller("operator", "fr")))
	for _, n := range l.Nodes {
		want := 2
		if n.Site == "jp" {
			want = 1
		}
		if n.Root != 1 || len(n.Protections) != want || n.Attested || n.Replacing != nil || n.Device == "" {
			t.Errorf("%+v", n)
		}
	}
}
