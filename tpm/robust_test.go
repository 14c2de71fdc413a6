package tpm_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/conclave-kms/conclave/tpm"
	"github.com/conclave-kms/conclave/tpm/tpmtest"
)

// lockOut drives the TPM into dictionary attack lockout, as another user of it
// may at any time: an object of theirs with a wrong authorization value.
func lockOut(t *testing.T, cfg tpm.Config) {
	t.Helper()
	link, err := linuxudstpm.Open(strings.TrimPrefix(cfg.Path, "unix:"))
	if err != nil {
		t.Fatal(err)
	}
	defer link.Close()
	made, err := (tpm2.CreatePrimary{
		PrimaryHandle: tpm2.TPMRHNull,
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
			UserAuth: tpm2.TPM2BAuth{Buffer: []byte("right")}, Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{}),
		}},
		InPublic: tpm2.New2B(tpm2.TPMTPublic{
			Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
			ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, SignEncrypt: true},
			Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgKeyedHash, &tpm2.TPMSKeyedHashParms{Scheme: tpm2.TPMTKeyedHashScheme{
				Scheme: tpm2.TPMAlgHMAC, Details: tpm2.NewTPMUSchemeKeyedHash(tpm2.TPMAlgHMAC, &tpm2.TPMSSchemeHMAC{HashAlg: tpm2.TPMAlgSHA256}),
			}}),
			Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgKeyedHash, &tpm2.TPM2BDigest{}),
		}),
	}).Execute(link)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = (tpm2.FlushContext{FlushHandle: made.ObjectHandle}).Execute(link) }()
	for range 100 {
		_, err := (tpm2.Hmac{
			Handle:  tpm2.AuthHandle{Handle: made.ObjectHandle, Name: made.Name, Auth: tpm2.PasswordAuth([]byte("wrong"))},
			HashAlg: tpm2.TPMAlgSHA256,
		}).Execute(link)
		if errors.Is(err, tpm2.TPMRCLockout) {
			return
		}
		if err == nil {
			t.Fatal("a wrong authorization value was taken")
		}
	}
	t.Fatal("the TPM does not go into lockout")
}

// TestLockout: somebody else's lockout of the TPM stops nothing of ours: use,
// imported keys, attestation, opening, approval, a second set of keys.
func TestLockout(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	cfg := p.Config()
	cfg.PCRs = []int{7}
	d := p.Open(cfg)
	key, mac, _ := loadHMAC(t, d)
	lockOut(t, cfg)
	if err := everything(t.Context(), d); err != nil {
		t.Error(err)
	}
	checkHMAC(t, mac, key, longMessage(3000))
	loadHMAC(t, d)
	ev, err := d.Attest(t.Context(), []byte("q"))
	if err != nil {
		t.Fatal(err)
	}
	checkCertificate(t, ev, p.EndorsementRoot())
	activate(t, d, ev)
	if err := openErr(t, cfg); err != nil {
		t.Errorf("opening: %v", err)
	}
	update(t, cfg)
	p.Restart()
	if err := everything(t.Context(), d); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	lockOut(t, cfg)
	second := cfg
	second.PersistentBase = 0x81080010
	p.Open(second)
	direct(t, cfg, tpm2.GetRandom{BytesRequested: 1}) // the TPM itself is well
}

// TestWrongSecret: an AuthFile that is not this TPM's is refused with an error
// that says so, by a running device too, and counts as no attack.
func TestWrongSecret(t *testing.T) {
	t.Parallel()
	p, q := tpmtest.New(t), tpmtest.New(t)
	cfg := p.Config()
	p.Open(cfg)
	wrong := cfg
	wrong.AuthFile = q.Config().AuthFile
	for range 40 { // more tries than any TPM allows
		if err := openErr(t, wrong); !errors.Is(err, tpm.ErrAuth) || !strings.Contains(err.Error(), "AuthFile") {
			t.Fatalf("%v, want that AuthFile is another's", err)
		}
	}
	wantErr(t, "provisioning", tpm.Provision(t.Context(), func() tpm.Config { c := wrong; c.PersistentBase = 0x81080010; return c }()), tpm.ErrAuth)
	if n := dictionaryAttacks(t, cfg); n != 0 {
		t.Errorf("%d dictionary attacks counted", n)
	}
	if err := openErr(t, cfg); err != nil {
		t.Error(err)
	}
}

// TestCleared: after TPM2_Clear every call says that the keys are gone and what to
// do, and nothing pretends to work.
func TestCleared(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	cfg := p.Config()
	cfg.PCRs = []int{7}
	d := p.Open(cfg)
	_, mac, _ := loadHMAC(t, d)
	if _, err := mac(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	wrapped := mustWrap(t, d, nil, []byte("key"))
	blob := hmacBlob(t, d, bytes.Repeat([]byte{1}, 32))
	for range 2 {
		direct(t, cfg, tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHPlatform, Auth: tpm2.PasswordAuth(nil)}})
		for what, err := range map[string]error{
			"Check": d.Check(t.Context()),
			"ECDH":  second(d.ECDH(t.Context(), d.AgreementKey())), "Sign": second(d.Sign(t.Context(), make([]byte, 48))),
			"Wrap": second(d.Wrap(t.Context(), nil, []byte("k"))), "Unwrap": second(d.Unwrap(t.Context(), nil, wrapped)),
			"Random": d.Random(t.Context(), make([]byte, 8)), "HMAC": second(mac(t.Context(), nil)),
			"LoadHMAC": func() error { _, _, err := d.LoadHMAC(t.Context(), blob); return err }(),
			"Attest":   second(d.Attest(t.Context(), []byte("q"))), "Open": openErr(t, cfg),
		} {
			if !errors.Is(err, tpm.ErrNotProvisioned) || !strings.Contains(err.Error(), "gone for good") || !strings.Contains(err.Error(), "rekey") {
				t.Errorf("%s: %v, want that the keys are gone and what to do", what, err)
			}
		}
		p.Restart() // also when the TPM was cleared in the firmware's setup, before the node started
	}
	if err := tpm.Provision(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if err := openErr(t, cfg); err != nil {
		t.Errorf("new keys after the clear: %v", err)
	}
	wantErr(t, "an old device on new keys", d.Check(t.Context()), tpm.ErrUnsafe)
}

func second[T any](_ T, err error) error { return err }

// commandCode is that of a marshalled command.
func commandCode(cmd []byte) tpm2.TPMCC { return tpm2.TPMCC(binary.BigEndian.Uint32(cmd[6:])) }

// TestRandomFails: a random number generator that fails, or gives too little, is
// an error and leaves nothing that looks random.
func TestRandomFails(t *testing.T) {
	p := tpmtest.New(t)
	w, cfg := tap(t, p.Config())
	d := p.Open(cfg)
	for name, rc := range map[string]tpm2.TPMRC{"TPM_RC_FAILURE": tpm2.TPMRCFailure, "TPM_RC_NO_RESULT": 0x154} {
		n := 0
		w.setRefuse(func(cmd []byte) []byte {
			if commandCode(cmd) != tpm2.TPMCCGetRandom {
				return nil
			}
			if n++; n < 3 { // a good start
				return nil
			}
			return binary.BigEndian.AppendUint32([]byte{0x80, 1, 0, 0, 0, 10}, uint32(rc))
		})
		b := bytes.Repeat([]byte{0xaa}, 5000)
		err := d.Random(t.Context(), b)
		wantErr(t, name, err, tpm.ErrUnavailable)
		if !bytes.Equal(b, make([]byte, len(b))) {
			t.Errorf("%s: the buffer is not cleared", name)
		}
		if rc == tpm2.TPMRCFailure && (err == nil || !strings.Contains(err.Error(), "failure mode")) {
			t.Errorf("%v, want that the TPM is in failure mode", err)
		}
		wantErr(t, "opening with "+name, openErr(t, cfg), tpm.ErrUnavailable)
		w.setRefuse(nil)
		if err := everything(t.Context(), d); err != nil {
			t.Errorf("after %s: %v", name, err)
		}
	}
	if n := loaded(t, p.Config()); n != 0 {
		t.Errorf("%d transient objects and sessions are left", n)
	}
}

// TestPointOffCurve: the TPM refuses it, and that is the caller's fault.
func TestPointOffCurve(t *testing.T) {
	onBothCurves(t, func(t *testing.T, d *tpm.Device) {
		n := len(d.AgreementKey().Bytes()) / 2
		one := make([]byte, n)
		one[n-1] = 1
		for name, p := range map[string][2][]byte{
			"(1,1)": {one, one}, "(0,0)": {make([]byte, n), make([]byte, n)}, "beyond the field": {bytes.Repeat([]byte{0xff}, n), one}, "empty": {nil, nil},
		} {
			z, err := tpm.ECDHRaw(t.Context(), d, p[0], p[1])
			if !errors.Is(err, tpm.ErrInvalid) || z != nil {
				t.Errorf("%s: %x, %v, want ErrInvalid", name, z, err)
			}
		}
		if err := d.Check(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// TestRecovers: whatever happened to the TPM, the first call after its return
// works, be it Check or another; after a hang the first after an answer to Check or
// to a probe.
func TestRecovers(t *testing.T) {
	p := tpmtest.New(t)
	cfg := p.Config()
	cfg.CallTimeout = 2 * time.Second
	d := provisioned(p, cfg)
	key, mac, _ := loadHMAC(t, d)
	calls := map[string]func() error{
		"Check": func() error { return d.Check(t.Context()) },
		"Sign":  func() error { return second(d.Sign(t.Context(), make([]byte, 48))) },
		"HMAC":  func() error { return second(mac(t.Context(), longMessage(2000))) },
	}
	for name, call := range calls {
		for what, away := range map[string]func() (back func()){
			"killed":    func() func() { p.Kill(); return p.Restart },
			"restarted": func() func() { p.Restart(); return func() {} },
			"hung":      func() func() { p.Stop(); return p.Cont },
		} {
			back := away()
			if what != "restarted" {
				wantErr(t, fmt.Sprintf("%s, %s", name, what), call(), tpm.ErrUnavailable)
			}
			back()
			start := time.Now()
			switch {
			case what == "hung" && name == "Sign":
				if err := d.Check(t.Context()); err != nil {
					t.Errorf("Check after a hang: %v", err)
				}
			case what == "hung" && name == "HMAC":
				eventually(t, call) // a probe in the background
			}
			if err := call(); err != nil {
				t.Errorf("%s: first call (%s) after the return: %v", what, name, err)
			}
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("%s: %s took %v after the return", what, name, took)
			}
			checkHMAC(t, mac, key, []byte("m"))
		}
	}
	if n := dictionaryAttacks(t, cfg); n != 0 {
		t.Errorf("%d dictionary attacks counted", n)
	}
}

// TestSlow: a TPM that takes its time within the deadline is no failure.
func TestSlow(t *testing.T) {
	p := tpmtest.New(t)
	w, cfg := tap(t, p.Config())
	d := p.Open(cfg)
	busy := 0
	w.setRefuse(func([]byte) []byte {
		if busy++; busy%2 == 0 {
			return nil
		}
		return binary.BigEndian.AppendUint32([]byte{0x80, 1, 0, 0, 0, 10}, uint32(tpm2.TPMRCRetry))
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := everything(ctx, d); err != nil {
		t.Error(err)
	}
}
