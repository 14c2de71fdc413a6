package tpm_test

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"math/big"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/tpm"
	"github.com/conclave-kms/conclave/tpm/tpmtest"
)

type keyFunc func(context.Context, []byte) ([]byte, error)

func newSecret(t testing.TB, b []byte) *secret.Bytes {
	t.Helper()
	s, err := secret.Copy(b)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Destroy)
	return s
}

func hmacBlob(t testing.TB, d *tpm.Device, key []byte) []byte {
	t.Helper()
	kind, public := d.ImportKey()
	if kind != "tpm2-import" {
		t.Fatalf("kind %q", kind)
	}
	blob, err := tpm.WrapHMAC(public, newSecret(t, key), []byte("label"))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(blob, key) {
		t.Fatal("the blob contains the key")
	}
	return blob
}

// loadHMAC brings a fresh key into the TPM and returns it with its use.
func loadHMAC(t testing.TB, d *tpm.Device) (key []byte, mac keyFunc, unload func()) {
	t.Helper()
	key = make([]byte, 32)
	rand.Read(key)
	mac, unload, err := d.LoadHMAC(t.Context(), hmacBlob(t, d, key))
	if err != nil {
		t.Fatal(err)
	}
	return key, mac, unload
}

func softHMAC(key, msg []byte) []byte {
	h := hmac.New(sha256.New, key)
	h.Write(msg)
	return h.Sum(nil)
}

func checkHMAC(t testing.TB, mac keyFunc, key, msg []byte) {
	t.Helper()
	got, err := mac(context.Background(), msg)
	if err != nil {
		t.Error(err)
	} else if !bytes.Equal(got, softHMAC(key, msg)) {
		t.Errorf("HMAC of %d bytes differs from the standard library's", len(msg))
	}
}

func signerBlob(t testing.TB, d *tpm.Device, curve elliptic.Curve) (*ecdsa.PublicKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	private, err := key.ECDH()
	if err != nil {
		t.Fatal(err)
	}
	_, public := d.ImportKey()
	blob, err := tpm.WrapSigner(public, private.Curve(), newSecret(t, private.Bytes()), []byte("label"))
	if err != nil {
		t.Fatal(err)
	}
	return &key.PublicKey, blob
}

func loadSigner(t testing.TB, d *tpm.Device, curve elliptic.Curve) (*ecdsa.PublicKey, keyFunc, func()) {
	t.Helper()
	pub, blob := signerBlob(t, d, curve)
	sign, unload, err := d.LoadSigner(t.Context(), ecdhCurve(curve), blob)
	if err != nil {
		t.Fatal(err)
	}
	return pub, sign, unload
}

func ecdhCurve(c elliptic.Curve) ecdh.Curve {
	if c == elliptic.P256() {
		return ecdh.P256()
	}
	return ecdh.P384()
}

func checkSignature(t testing.TB, sign keyFunc, pub *ecdsa.PublicKey) {
	t.Helper()
	n := pub.Curve.Params().BitSize / 8
	digest := make([]byte, n)
	rand.Read(digest)
	sig, err := sign(context.Background(), digest)
	if err != nil {
		t.Error(err)
		return
	}
	if len(sig) != 2*n || !ecdsa.Verify(pub, digest, new(big.Int).SetBytes(sig[:n]), new(big.Int).SetBytes(sig[n:])) {
		t.Errorf("a signature of %d bytes does not verify", len(sig))
	}
}

func TestImported(t *testing.T) {
	t.Parallel()
	onBothCurves(t, func(t *testing.T, d *tpm.Device) {
		key, mac, unload := loadHMAC(t, d)
		for _, n := range []int{0, 1, 63, 64, 65, 1023, 1024, 1025, 2048, 2049, 5000, tpm.MaxMessage} {
			checkHMAC(t, mac, key, bytes.Repeat([]byte{byte(n)}, n))
		}
		if _, err := mac(t.Context(), make([]byte, tpm.MaxMessage+1)); !errors.Is(err, tpm.ErrInvalid) {
			t.Errorf("a message too long: %v, want ErrInvalid", err)
		}
		for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
			pub, sign, unload := loadSigner(t, d, curve)
			for range 3 {
				checkSignature(t, sign, pub)
				checkHMAC(t, mac, key, []byte("in turn"))
			}
			for _, n := range []int{0, 20, 31, 33, 47, 49, 64} {
				if _, err := sign(t.Context(), make([]byte, n)); !errors.Is(err, tpm.ErrInvalid) {
					t.Errorf("a digest of %d bytes: %v, want ErrInvalid", n, err)
				}
			}
			unload()
		}
		unload()
	})
}

func TestUnload(t *testing.T) {
	p := tpmtest.New(t)
	d := p.Open(p.Config())
	key, mac, unload := loadHMAC(t, d)
	pub, sign, unloadSigner := loadSigner(t, d, elliptic.P384())
	checkSignature(t, sign, pub)
	checkHMAC(t, mac, key, []byte("m"))
	if n := loaded(t, p.Config()); n != 2 {
		t.Errorf("%d objects and sessions in the TPM between calls, want the last key and its session", n)
	}
	unloadSigner() // not the one that is kept
	for range 3 {
		unload()
	}
	if n := loaded(t, p.Config()); n != 0 {
		t.Errorf("%d objects and sessions are left after unload", n)
	}
	for name, use := range map[string]keyFunc{"HMAC": mac, "signer": sign} {
		if _, err := use(t.Context(), make([]byte, 48)); !errors.Is(err, tpm.ErrInvalid) {
			t.Errorf("%s after unload: %v, want ErrInvalid", name, err)
		}
	}
	key, mac, _ = loadHMAC(t, d)
	checkHMAC(t, mac, key, []byte("m"))
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if n := loaded(t, p.Config()); n != 0 {
		t.Errorf("%d objects and sessions are left after Close", n)
	}
	if _, err := mac(t.Context(), nil); !errors.Is(err, tpm.ErrUnavailable) {
		t.Errorf("after Close: %v, want ErrUnavailable", err)
	}
}

func TestWrapRefusesKeys(t *testing.T) {
	p := tpmtest.New(t)
	d := p.Open(p.Config())
	_, public := d.ImportKey()
	want := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, tpm.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", what, err)
		}
	}
	good := newSecret(t, bytes.Repeat([]byte{7}, 32))
	for _, n := range []int{1, 16, 31, 33, 64} {
		_, err := tpm.WrapHMAC(public, newSecret(t, make([]byte, n)), nil)
		want("HMAC key of another length", err)
	}
	_, err := tpm.WrapHMAC(public, nil, nil)
	want("no HMAC key", err)
	_, err = tpm.WrapHMAC(public, good, make([]byte, 65))
	want("a long label", err)
	for i := range public {
		bad := bytes.Clone(public)
		bad[i] ^= 1
		_, err = tpm.WrapHMAC(bad, good, nil)
		want("an altered import key", err)
	}
	for _, bad := range [][]byte{nil, public[:len(public)-1], append(bytes.Clone(public), 0)} {
		_, err = tpm.WrapHMAC(bad, good, nil)
		want("a cut import key", err)
	}
	for _, c := range []ecdh.Curve{nil, ecdh.X25519(), ecdh.P521(), ecdh.P384()} {
		_, err = tpm.WrapSigner(public, c, good, nil)
		want("a scalar of another curve", err)
	}
	order := elliptic.P256().Params().N.Bytes()
	for _, scalar := range [][]byte{make([]byte, 32), order, bytes.Repeat([]byte{0xff}, 32)} {
		_, err = tpm.WrapSigner(public, ecdh.P256(), newSecret(t, scalar), nil)
		want("a scalar out of range", err)
	}
	_, err = tpm.WrapSigner(public, ecdh.P256(), nil, nil)
	want("no scalar", err)
	public[0] ^= 1
	if _, again := d.ImportKey(); bytes.Equal(again, public) {
		t.Error("ImportKey hands out the device's own memory")
	}
}

// TestImportRefuses: a blob with any byte changed, cut, of another kind or for
// another TPM is refused with one and the same error, and nothing stays behind.
func TestImportRefuses(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	d := p.Open(p.Config())
	refuse := func(what string, d *tpm.Device, blob []byte) {
		t.Helper()
		_, unload, err := d.LoadHMAC(t.Context(), blob)
		if err == nil {
			unload()
		}
		if !errors.Is(err, tpm.ErrInvalid) || !strings.Contains(err.Error(), "does not open") {
			t.Errorf("%s: %v, want the error for a key blob that does not open", what, err)
		}
	}
	blob := hmacBlob(t, d, bytes.Repeat([]byte{3}, 32))
	for i := range blob {
		bad := bytes.Clone(blob)
		bad[i] ^= 0x20
		refuse("altered byte", d, bad)
	}
	for _, n := range []int{0, 1, 2, 10, len(blob) / 2, len(blob) - 1} {
		refuse("cut", d, blob[:n])
	}
	refuse("trailing byte", d, append(bytes.Clone(blob), 0))
	refuse("a wrapped key", d, mustWrap(t, d, nil, []byte("key")))
	other := tpmtest.New(t)
	refuse("another TPM", other.Open(other.Config()), blob)

	_, signer := signerBlob(t, d, elliptic.P256())
	refuse("a signing key", d, signer)
	for _, c := range []ecdh.Curve{ecdh.P384(), ecdh.X25519(), nil} {
		if _, _, err := d.LoadSigner(t.Context(), c, signer); !errors.Is(err, tpm.ErrInvalid) {
			t.Errorf("a P-256 key as another: %v, want ErrInvalid", err)
		}
	}
	for i := range signer {
		bad := bytes.Clone(signer)
		bad[i] ^= 0x20
		if _, _, err := d.LoadSigner(t.Context(), ecdh.P256(), bad); !errors.Is(err, tpm.ErrInvalid) {
			t.Errorf("signer with byte %d altered: %v, want ErrInvalid", i, err)
		}
	}
	if _, _, err := d.LoadHMAC(t.Context(), blob); err != nil {
		t.Errorf("the blob itself: %v", err)
	}
	if n := loaded(t, p.Config()); n != 0 {
		t.Errorf("%d transient objects and sessions are left", n)
	}
	if n := dictionaryAttacks(t, p.Config()); n != 0 {
		t.Errorf("%d dictionary attacks counted", n)
	}
}

// TestImportedStays: an imported key is not to be had out of the TPM again, by
// policy or authorization value, and is not to be used with the empty one.
func TestImportedStays(t *testing.T) {
	p := tpmtest.New(t)
	d := p.Open(p.Config())
	byPolicy, byAuth, err := tpm.DuplicateImported(t.Context(), d, hmacBlob(t, d, bytes.Repeat([]byte{3}, 32)))
	if err != nil {
		t.Fatal(err)
	}
	if !errors.Is(byPolicy, tpm2.TPMRCPolicyFail) {
		t.Errorf("TPM2_Duplicate with a policy session: %v, want TPM_RC_POLICY_FAIL", byPolicy)
	}
	if !errors.Is(byAuth, tpm2.TPMRCAuthType) {
		t.Errorf("TPM2_Duplicate with the authorization value: %v, want TPM_RC_AUTH_TYPE", byAuth)
	}
	if err := tpm.UseWithoutAuth(t.Context(), d, hmacBlob(t, d, bytes.Repeat([]byte{3}, 32))); !errors.Is(err, tpm.ErrAuth) {
		t.Errorf("an imported key without its authorization value: %v, want ErrAuth", err)
	}
}

func TestImportedConcurrent(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	cfg := p.Config()
	cfg.CallTimeout = time.Minute
	d := p.Open(cfg)
	key, mac, unload := loadHMAC(t, d)
	key2, mac2, unload2 := loadHMAC(t, d)
	pub, sign, unload3 := loadSigner(t, d, elliptic.P384())
	var wg sync.WaitGroup
	for g := range 32 {
		wg.Go(func() {
			for range 4 {
				switch g % 4 {
				case 0:
					checkHMAC(t, mac, key, []byte{byte(g)})
				case 1:
					checkHMAC(t, mac2, key2, []byte{byte(g)})
				case 2:
					checkSignature(t, sign, pub)
				default:
					if err := everything(context.Background(), d); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	for range 8 { // unload beside use: refused or right, and nothing stays
		wg.Go(func() {
			if got, err := mac(context.Background(), nil); err == nil && !bytes.Equal(got, softHMAC(key, nil)) {
				t.Error("a wrong HMAC")
			} else if err != nil && !errors.Is(err, tpm.ErrInvalid) {
				t.Error(err)
			}
		})
		wg.Go(unload)
	}
	wg.Wait()
	unload2()
	unload3()
	if n := loaded(t, p.Config()); n != 0 {
		t.Errorf("%d transient objects and sessions are left", n)
	}
}

func TestImportedOnTheBus(t *testing.T) {
	p := tpmtest.New(t)
	w, cfg := tap(t, p.Config())
	d := p.Open(cfg)
	key, mac, _ := loadHMAC(t, d)
	msg := []byte("a message that is nobody's business")
	checkHMAC(t, mac, key, msg)
	_, _, auth := tpm.AuthValues(d)
	defer auth.Destroy()
	for name, b := range map[string][]byte{"key": key, "message": msg, "HMAC": softHMAC(key, msg), "authorization value": auth.Reveal()} {
		if w.shows(b) {
			t.Errorf("the bus shows the %s", name)
		}
	}
}

func BenchmarkImported(b *testing.B) {
	p := tpmtest.New(b)
	d := p.Open(p.Config())
	ctx := context.Background()
	_, mac, _ := loadHMAC(b, d)
	_, mac2, _ := loadHMAC(b, d)
	_, sign, _ := loadSigner(b, d, elliptic.P256())
	_, sign384, _ := loadSigner(b, d, elliptic.P384())
	msg, long := make([]byte, 128), make([]byte, tpm.MaxMessage)
	key := newSecret(b, make([]byte, 32))
	_, public := d.ImportKey()
	blob := hmacBlob(b, d, bytes.Repeat([]byte{5}, 32))
	must := func(err error) {
		if err != nil {
			b.Fatal(err)
		}
	}
	for _, c := range []struct {
		name string
		run  func()
	}{
		{"HMAC", func() { _, err := mac(ctx, msg); must(err) }},
		{"HMAC/2keys", func() { _, err := mac(ctx, msg); must(err); _, err = mac2(ctx, msg); must(err) }},
		{"HMAC/64KiB", func() { _, err := mac(ctx, long); must(err) }},
		{"GenerateHMAC", func() { _, _, unload, err := d.GenerateHMAC(ctx, [][]byte{public}); must(err); unload() }},
		{"Attest", func() { _, err := d.Attest(ctx, msg[:32]); must(err) }},
		{"SignP256", func() { _, err := sign(ctx, msg[:32]); must(err) }},
		{"SignP384", func() { _, err := sign384(ctx, msg[:48]); must(err) }},
		{"WrapHMAC", func() { _, err := tpm.WrapHMAC(public, key, nil); must(err) }},
		{"LoadHMAC", func() { _, unload, err := d.LoadHMAC(ctx, blob); must(err); unload() }},
	} {
		b.Run(c.name, func(b *testing.B) {
			for b.Loop() {
				c.run()
			}
		})
	}
}
