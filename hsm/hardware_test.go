package hsm

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io/fs"
	"sync"
	"testing"
	"time"

	"github.com/c2sp/wycheproof"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/miekg/pkcs11"
	kwp "github.com/tink-crypto/tink-go/v2/kwp/subtle"
)

// TestSoftHSMImports pins what the self test finds out about SoftHSM.
func TestSoftHSMImports(t *testing.T) {
	_, d := openNew(t)
	if d.imports == nil {
		t.Fatal(d.noImports)
	}
	if p := *d.imports; p.mech != pkcs11.CKM_AES_KEY_WRAP_PAD || p.kdf != kdfNull || !p.signers || p.dialect != (dialect{true, true}) {
		t.Fatalf("%+v", p)
	}
}

// TestKWP checks the library that wraps against Wycheproof's AES-KWP, with the
// key sizes that it has to take: AES-256 and 16 bytes or more.
func TestKWP(t *testing.T) {
	raw, err := fs.ReadFile(wycheproof.TestVectors, "aes_kwp_test.json")
	if err != nil {
		t.Fatal(err)
	}
	var f struct {
		TestGroups []struct {
			KeySize int `json:"keySize"`
			Tests   []struct {
				ID                   int `json:"tcId"`
				Key, Msg, CT, Result string
			}
		}
	}
	if err := json.Unmarshal(raw, &f); err != nil {
		t.Fatal(err)
	}
	unhex := func(s string) []byte {
		b, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	valid, invalid := 0, 0
	for _, g := range f.TestGroups {
		for _, c := range g.Tests {
			if g.KeySize != 256 {
				continue
			}
			k, err := kwp.NewKWP(unhex(c.Key))
			if err != nil {
				t.Fatal(err)
			}
			msg, ct := unhex(c.Msg), unhex(c.CT)
			got, err := k.Unwrap(ct)
			if c.Result != "valid" {
				invalid++
				if err == nil {
					t.Errorf("%d: opened", c.ID)
				}
				continue
			}
			if len(msg) < kwp.MinWrapSize {
				continue // shorter than any key of ours
			}
			valid++
			if err != nil || !bytes.Equal(got, msg) {
				t.Errorf("%d: not opened", c.ID)
			}
			if made, err := k.Wrap(msg); err != nil || !bytes.Equal(made, ct) {
				t.Errorf("%d: wrapped otherwise", c.ID)
			}
		}
	}
	if valid < 10 || invalid < 10 {
		t.Fatalf("%d valid, %d invalid cases", valid, invalid)
	}
}

func wrapFor(t testing.TB, d *Device, key []byte) []byte {
	t.Helper()
	held, err := secret.Copy(key)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Destroy()
	_, public := d.ImportKey()
	blob, err := WrapHMAC(public, held, nil)
	if err != nil {
		t.Fatal(err)
	}
	return blob
}

// sessionObjects counts the session objects in the token.
func (d *Device) sessionObjects(t *testing.T) int {
	t.Helper()
	n, err := call(context.Background(), d, callOptions{op: "count"}, func(s *session) (int, error) {
		got, err := s.find([]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false)})
		return len(got), err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestObjectsBounded: never more than MaxLoaded in the token, none left over.
func TestObjectsBounded(t *testing.T) {
	tok := newToken(t)
	tok.cfg.MaxLoaded = 4
	if err := Provision(context.Background(), tok.cfg); err != nil {
		t.Fatal(err)
	}
	d := tok.open(t)
	if n := d.sessionObjects(t); n != 0 {
		t.Fatalf("%d session objects after Open", n)
	}
	var unloads []func()
	var macs []func(context.Context, []byte) ([]byte, error)
	for i := range 10 {
		mac, unload, err := d.LoadHMAC(context.Background(), wrapFor(t, d, bytes.Repeat([]byte{byte(i + 1)}, 32)))
		if err != nil {
			t.Fatal(err)
		}
		macs, unloads = append(macs, mac), append(unloads, unload)
		if n, want := d.sessionObjects(t), min(i+1, 4); n != want {
			t.Fatalf("%d session objects, want %d", n, want)
		}
	}
	for _, mac := range macs {
		if _, err := mac(context.Background(), []byte("m")); err != nil {
			t.Fatal(err)
		}
	}
	for _, unload := range unloads {
		unload()
	}
	if n := d.sessionObjects(t); n != 0 {
		t.Fatalf("%d session objects after all were unloaded", n)
	}
}

// TestLoadedRecovers: closures go on after everything that ends sessions.
func TestLoadedRecovers(t *testing.T) {
	for what := range disturbances {
		t.Run(what, func(t *testing.T) {
			_, d := openNew(t)
			mac, unload, err := d.LoadHMAC(context.Background(), wrapFor(t, d, make([]byte, 32)))
			if err != nil {
				t.Fatal(err)
			}
			defer unload()
			for range 3 {
				if err := d.disturb(what); err != nil {
					t.Fatal(err)
				}
				if _, err := mac(context.Background(), []byte("m")); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestLoadedUnderDisturbance: under load a disturbed MAC is right or ErrUnavailable.
func TestLoadedUnderDisturbance(t *testing.T) {
	_, d := openNew(t)
	d.probeEvery = 0
	known := knownMACs()[0]
	mac, unload, err := d.LoadHMAC(context.Background(), wrapFor(t, d, known.key))
	if err != nil {
		t.Fatal(err)
	}
	defer unload()
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
				got, err := mac(context.Background(), known.message)
				if err != nil && !errors.Is(err, ErrUnavailable) || err == nil && hex.EncodeToString(got) != known.mac {
					t.Errorf("wrong MAC or error: %v", err)
					return
				}
			}
		})
	}
	for range 4 {
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
	if _, err := mac(context.Background(), known.message); err != nil {
		t.Fatal(err)
	}
}

// TestLoadedAfterHang: a call that hangs voids the keeper; afterwards keys load anew.
func TestLoadedAfterHang(t *testing.T) {
	tok, _ := openNew(t)
	tok.cfg.CallTimeout = 2 * time.Second
	d := tok.open(t)
	d.probeEvery = 0
	mac, unload, err := d.LoadHMAC(context.Background(), wrapFor(t, d, make([]byte, 32)))
	if err != nil {
		t.Fatal(err)
	}
	defer unload()
	release := make(chan struct{})
	var once sync.Once
	hook := func(op string) error {
		if op == "hmac" {
			once.Do(func() { <-release })
		}
		return nil
	}
	d.hook.Store(&hook)
	if _, err := mac(context.Background(), []byte("m")); !errors.Is(err, ErrUnavailable) {
		t.Fatalf("a hanging call: %v", err)
	}
	d.hook.Store(nil)
	if _, err := mac(context.Background(), []byte("m")); err != nil {
		t.Errorf("while the call hangs: %v", err)
	}
	close(release)
	if _, err := mac(context.Background(), []byte("m")); err != nil {
		t.Errorf("after the call came back: %v", err)
	}
}

func FuzzParseImport(f *testing.F) {
	crv, err := curveOf(ecdh.P256())
	if err != nil {
		f.Fatal(err)
	}
	key, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	held, err := secret.New(32)
	if err != nil {
		f.Fatal(err)
	}
	for _, k := range []kdf{kdfNull, kdfSHA256} {
		blob, err := WrapHMAC(recipient{k, key.PublicKey()}.bytes(), held, []byte("label"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(blob)
		f.Add(blob[:len(blob)-8])
	}
	f.Add([]byte{importVersion, byte(materialP256), byte(kdfNull), 0})
	for _, m := range []material{materialP256Public, materialP384Public, materialP256Padded} {
		f.Add(imported{m, kdfNull, []byte{importVersion, byte(m), byte(kdfNull), 0}, key.PublicKey().Bytes(), make([]byte, m.wrappedSize())}.bytes())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		in, err := parseImport(b, crv)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		if !bytes.Equal(in.bytes(), b) || len(in.wrapped) != in.material.wrappedSize() {
			t.Fatal("no round trip")
		}
	})
}

func FuzzParseRecipient(f *testing.F) {
	for _, c := range []ecdh.Curve{ecdh.P256(), ecdh.P384()} {
		key, err := c.GenerateKey(rand.Reader)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(recipient{kdfNull, key.PublicKey()}.bytes())
		f.Add(recipient{kdfSHA256, key.PublicKey()}.bytes()[:20])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := parseRecipient(b); err == nil && !bytes.Equal(r.bytes(), b) {
			t.Fatal("no round trip")
		}
	})
}

// TestLoadedAttacksDetect: a loaded key that came out looser is seen by its
// attributes, and by the attacks alone.
func TestLoadedAttacksDetect(t *testing.T) {
	_, d := openNew(t)
	worked, err := call(context.Background(), d, callOptions{op: "attack", rw: true}, func(s *session) (int, error) {
		if err := s.loadVictims(d.imports); err != nil {
			return 0, err
		}
		loose := freshKey(s) // extractable and modifiable
		for name := range s.victims {
			s.victims[name] = loose
		}
		if err := s.checkLoaded(materialHMAC, loose, d.imports.dialect, stays); !errors.Is(err, ErrUnsafeToken) {
			t.Errorf("attributes of a loose key: %v", err)
		}
		n := 0
		for _, target := range loadedTargets(d.imports) {
			if ok, err := target.wrapUnderFresh(wrapMechanisms[1])(s); ok && err == nil {
				n++
			}
			if ok, err := target.set(flag{pkcs11.CKA_DERIVE, true})(s); ok && err == nil {
				n++
			}
		}
		return n, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := 2 * len(loadedTargets(d.imports)); worked != want {
		t.Fatalf("%d attacks worked on loose keys, want %d", worked, want)
	}
}
