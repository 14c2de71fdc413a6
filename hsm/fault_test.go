package hsm

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/conclave-kms/conclave/kms/secret"
)

// useAll makes every call once and checks the wrapped key.
func useAll(t *testing.T, d *Device) {
	t.Helper()
	if err := callAll(d); err != nil {
		t.Fatal(err)
	}
}

func callAll(d *Device) error {
	ctx := context.Background()
	if _, err := d.ECDH(ctx, d.AgreementKey()); err != nil {
		return err
	}
	if _, err := d.Sign(ctx, make([]byte, 48)); err != nil {
		return err
	}
	blob, err := d.Wrap(ctx, []byte("a"), []byte("some key"))
	if err != nil {
		return err
	}
	got, err := d.Unwrap(ctx, []byte("a"), blob)
	if err != nil {
		return err
	}
	defer got.Destroy()
	if !bytes.Equal(got.Reveal(), []byte("some key")) {
		return errors.New("wrong key")
	}
	return d.Random(ctx, make([]byte, 8))
}

// disturbances are what happens to a PKCS#11 application from outside. They run
// with the whole gate, since SoftHSM crashes when they meet a call.
var disturbances = map[string]func(*Device, *session) error{
	"all sessions closed": func(d *Device, s *session) error { return d.mod.p11.CloseAllSessions(s.slot) },
	"logged out":          func(d *Device, s *session) error { return d.mod.p11.Logout(s.h) },
	"finalised":           func(d *Device, s *session) error { return d.mod.p11.Finalize() },
}

func (d *Device) disturb(what string) error {
	return d.mod.alone(context.Background(), func() error {
		s, err := d.openSession(false, false)
		if err != nil {
			return err
		}
		return disturbances[what](d, s)
	})
}

func TestRecovers(t *testing.T) {
	for what := range disturbances {
		t.Run(what, func(t *testing.T) {
			_, d := openNew(t)
			for range 3 {
				useAll(t, d)
				if err := d.disturb(what); err != nil {
					t.Fatal(err)
				}
				useAll(t, d)
				if err := d.disturb(what); err != nil {
					t.Fatal(err)
				}
				if err := d.Check(context.Background()); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestRecoversUnderLoad: calls that are disturbed succeed or say ErrUnavailable,
// and afterwards all is well.
func TestRecoversUnderLoad(t *testing.T) {
	_, d := openNew(t)
	d.probeEvery = 0
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if err := callAll(d); err != nil && !errors.Is(err, ErrUnavailable) {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 5 {
		for what := range disturbances {
			if err := d.disturb(what); err != nil && !uninitialized(err) {
				t.Error(err)
			}
		}
	}
	close(done)
	wg.Wait()
	if err := d.Check(context.Background()); err != nil {
		t.Fatal(err)
	}
	useAll(t, d)
}

// TestTokenGoesAndComes: without its storage the device is unavailable, with it
// back the next probe finds it.
func TestTokenGoesAndComes(t *testing.T) {
	for name, back := range map[string]func(*testing.T, *Device){
		"check": func(t *testing.T, d *Device) {
			if err := d.Check(context.Background()); err != nil {
				t.Fatal(err)
			}
		},
		"next call": func(t *testing.T, d *Device) { d.probeEvery = 0; d.markUnhealthy(unavailablef("test")) },
	} {
		t.Run(name, func(t *testing.T) {
			tok, d := openNew(t)
			blob, err := d.Wrap(context.Background(), nil, []byte("key"))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(tok.tokens, tok.tokens+".away"); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(tok.tokens, 0o700); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				if err := d.Check(context.Background()); !errors.Is(err, ErrUnavailable) {
					t.Fatalf("Check without storage: %v", err)
				}
				// Not ErrInvalid: the blob is good, it is the token that has gone.
				if _, err := d.Unwrap(context.Background(), nil, blob); !errors.Is(err, ErrUnavailable) || errors.Is(err, ErrInvalid) {
					t.Fatalf("Unwrap without storage: %v", err)
				}
			}
			if err := os.RemoveAll(tok.tokens); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(tok.tokens+".away", tok.tokens); err != nil {
				t.Fatal(err)
			}
			back(t, d)
			useAll(t, d)
			got, err := d.Unwrap(context.Background(), nil, blob)
			if err != nil {
				t.Fatal(err)
			}
			got.Destroy()
		})
	}
}

// TestOtherKeysAreRefused: a token that comes back with other keys is not used.
func TestOtherKeysAreRefused(t *testing.T) {
	_, d := openNew(t)
	d.signingPoint = bytes.Clone(d.signingPoint)
	d.signingPoint[5] ^= 1
	d.flush()
	if err := callAll(d); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "other keys") {
		t.Fatal(err)
	}
}

func TestWrongPIN(t *testing.T) {
	tok := newToken(t)
	if err := Provision(context.Background(), tok.cfg); err != nil {
		t.Fatal(err)
	}
	wrong, err := secret.Copy([]byte("not-the-pin"))
	if err != nil {
		t.Fatal(err)
	}
	defer wrong.Destroy()
	cfg := tok.cfg
	cfg.PIN = wrong
	if _, err := Open(context.Background(), cfg); !errors.Is(err, ErrPIN) || strings.Contains(err.Error(), "not-the-pin") {
		t.Fatalf("wrong PIN: %v", err)
	}
	if err := Provision(context.Background(), cfg); !errors.Is(err, ErrPIN) {
		t.Fatalf("wrong PIN: %v", err)
	}
	d, err := attach(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.learn(context.Background()); !errors.Is(err, ErrPIN) {
		t.Fatal(err)
	}
	// Were a PIN sent again after one refusal, this right one would pass.
	d.pin.now.Destroy()
	if d.pin.now, err = secret.Copy(tok.cfg.PIN.Reveal()); err != nil {
		t.Fatal(err)
	}
	if err := d.learn(context.Background()); !errors.Is(err, ErrPIN) {
		t.Fatalf("after a refusal: %v", err)
	}
	tok.open(t)
}

func TestProvisionRefusesTwice(t *testing.T) {
	tok, d := openNew(t)
	before := d.AgreementKey()
	if err := Provision(context.Background(), tok.cfg); !errors.Is(err, ErrProvisioned) {
		t.Fatal(err)
	}
	if !tok.open(t).AgreementKey().Equal(before) {
		t.Fatal("the key changed")
	}
	second := tok.cfg
	second.Label = "second"
	if _, err := Open(context.Background(), second); !errors.Is(err, ErrNotProvisioned) {
		t.Fatalf("another label: %v", err)
	}
	if err := Provision(context.Background(), second); err != nil {
		t.Fatal(err)
	}
	if (&testToken{cfg: second}).open(t).AgreementKey().Equal(before) {
		t.Fatal("two labels share a key")
	}
}

func TestTokenNotFoundListsTokens(t *testing.T) {
	tok := newToken(t)
	u, err := ParseURI(tok.cfg.URI)
	if err != nil {
		t.Fatal(err)
	}
	u.Token, u.Serial = "elsewhere", ""
	cfg := tok.cfg
	cfg.URI = u.String()
	if _, err := Open(context.Background(), cfg); !errors.Is(err, ErrTokenNotFound) || !strings.Contains(err.Error(), `"test"`) {
		t.Fatal(err)
	}
	if _, err := Open(context.Background(), tok.cfg); !errors.Is(err, ErrNotProvisioned) {
		t.Fatalf("token without keys: %v", err)
	}
}

// TestTwoDevicesOnOneToken: a device that closes does not disturb the other.
func TestTwoDevicesOnOneToken(t *testing.T) {
	tok, d := openNew(t)
	for range 3 {
		other, err := Open(context.Background(), tok.cfg)
		if err != nil {
			t.Fatal(err)
		}
		useAll(t, other)
		useAll(t, d)
		if err := other.Close(); err != nil {
			t.Fatal(err)
		}
		useAll(t, d)
	}
	if err := d.mod.reinitialize(context.Background(), d.mod.gen); err != nil {
		t.Fatal(err)
	}
	useAll(t, d)
}

// TestLibraryInUseElsewhere: a library that others in the process initialised
// is used and not finalised.
func TestLibraryInUseElsewhere(t *testing.T) {
	tok := newToken(t)
	set, err := tok.cfg.settings()
	if err != nil {
		t.Fatal(err)
	}
	m, err := loadModule(set.uri.ModulePath, set.softHSMConf)
	if err != nil {
		t.Fatal(err)
	}
	restore, err := m.setConf()
	if err != nil {
		t.Fatal(err)
	}
	err = m.p11.Initialize()
	restore()
	if err != nil {
		t.Fatal(err)
	}
	if err := Provision(context.Background(), tok.cfg); err != nil {
		t.Fatal(err)
	}
	if _, err := m.p11.GetInfo(); err != nil {
		t.Fatalf("the library was finalised under its owner: %v", err)
	}
	if err := m.p11.Finalize(); err != nil {
		t.Fatal(err)
	}
	useAll(t, tok.open(t))
}

// TestModulesSideBySide: copies of the library come and go while another works.
func TestModulesSideBySide(t *testing.T) {
	_, d := openNew(t)
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
					if err := callAll(d); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	for range 3 {
		tok := newToken(t)
		if err := Provision(context.Background(), tok.cfg); err != nil {
			t.Error(err)
			break
		}
		other, err := Open(context.Background(), tok.cfg)
		if err != nil {
			t.Error(err)
			break
		}
		if err := other.Close(); err != nil {
			t.Error(err)
		}
	}
	close(done)
	wg.Wait()
}
