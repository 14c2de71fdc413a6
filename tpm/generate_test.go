package tpm_test

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/tpm"
	"github.com/conclave-kms/conclave/tpm/tpmtest"
)

// importKeyOf is what ImportKey returns.
func importKeyOf(d *tpm.Device) []byte {
	_, public := d.ImportKey()
	return public
}

// elsewhere is the import key of a TPM that there is not.
func elsewhere(t *testing.T, like *tpm.Device) []byte {
	t.Helper()
	key, err := like.AgreementKey().Curve().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public := importKeyOf(like)
	point := key.PublicKey().Bytes()[1:]
	n := len(point) / 2
	copy(public[len(public)-n:], point[n:])
	copy(public[len(public)-2-2*n:], point[:n])
	return public
}

func sameMACs(t *testing.T, a, b keyFunc) {
	t.Helper()
	for _, n := range []int{0, 100, 3000} {
		x, errX := a(context.Background(), longMessage(n))
		y, errY := b(context.Background(), longMessage(n))
		if err := errors.Join(errX, errY); err != nil {
			t.Fatal(err)
		}
		if len(x) != 32 || !bytes.Equal(x, y) {
			t.Fatalf("the HMACs of %d bytes differ", n)
		}
	}
}

// TestGenerateHMAC generates for several TPMs; each recipient's blob opens there
// and nowhere else, and all have one key.
func TestGenerateHMAC(t *testing.T) {
	t.Parallel()
	for _, curve := range []ecdh.Curve{ecdh.P384(), ecdh.P256()} {
		p, q := tpmtest.New(t), tpmtest.New(t)
		cfg, otherCfg := p.Config(), q.Config()
		cfg.Curve, otherCfg.Curve = curve, curve
		d, other := p.Open(cfg), q.Open(otherCfg)
		if mac, signer := d.Generates(); !mac || !signer {
			t.Error("the TPM does not generate")
		}
		devices := []*tpm.Device{d, other}
		for name, to := range map[string][]int{"both": {0, 1}, "the other first": {1, 0}, "the other alone": {1}, "itself": {0}, "one twice": {1, 1}} {
			var recipients [][]byte
			for _, i := range to {
				recipients = append(recipients, importKeyOf(devices[i]))
			}
			blobs, mac, unload, err := d.GenerateHMAC(t.Context(), recipients)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if len(blobs) != len(to) {
				t.Fatalf("%s: %d blobs", name, len(blobs))
			}
			for i, at := range to {
				again, end, err := devices[at].LoadHMAC(t.Context(), blobs[i])
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				sameMACs(t, mac, again)
				end()
				if _, _, err := devices[1-at].LoadHMAC(t.Context(), blobs[i]); !errors.Is(err, tpm.ErrInvalid) {
					t.Errorf("%s: a blob at another TPM: %v", name, err)
				}
			}
			unload()
			_, err = mac(t.Context(), nil)
			wantErr(t, "after unload", err, tpm.ErrInvalid)
		}
		for _, c := range []tpm.Config{cfg, otherCfg} {
			if n := loaded(t, c); n != 0 {
				t.Errorf("%d transient objects and sessions are left", n)
			}
		}
	}
}

func TestGenerateSigner(t *testing.T) {
	t.Parallel()
	p, q := tpmtest.New(t), tpmtest.New(t)
	d, other := p.Open(p.Config()), q.Open(q.Config())
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
		blobs, public, sign, unload, err := d.GenerateSigner(t.Context(), ecdhCurve(curve), [][]byte{importKeyOf(other), importKeyOf(d)})
		if err != nil {
			t.Fatal(err)
		}
		if public.Curve != curve {
			t.Error("a key on another curve")
		}
		checkSignature(t, sign, public)
		for i, at := range []*tpm.Device{other, d} {
			again, end, err := at.LoadSigner(t.Context(), ecdhCurve(curve), blobs[i])
			if err != nil {
				t.Fatal(err)
			}
			checkSignature(t, again, public)
			end()
		}
		unload()
	}
}

// TestGenerateMany uses both levels of the policy; a recipient in the last group
// opens its blob, and after a restart the generator's own copy still works.
func TestGenerateMany(t *testing.T) {
	t.Parallel()
	p, q := tpmtest.New(t), tpmtest.New(t)
	d, other := p.Open(p.Config()), q.Open(q.Config())
	recipients := [][]byte{importKeyOf(other)}
	for len(recipients) < 20 {
		recipients = append(recipients, elsewhere(t, d))
	}
	blobs, mac, _, err := d.GenerateHMAC(t.Context(), recipients)
	if err != nil {
		t.Fatal(err)
	}
	again, _, err := other.LoadHMAC(t.Context(), blobs[0])
	if err != nil {
		t.Fatal(err)
	}
	p.Restart()
	sameMACs(t, mac, again)
	for i, b := range blobs[1:] {
		if _, _, err := other.LoadHMAC(t.Context(), b); !errors.Is(err, tpm.ErrInvalid) {
			t.Errorf("blob %d at another TPM: %v", i+1, err)
		}
	}
}

func TestGenerateRefuses(t *testing.T) {
	p, q := tpmtest.New(t), tpmtest.New(t)
	d := p.Open(p.Config())
	cfg := q.Config()
	cfg.Curve = ecdh.P256()
	other := q.Open(cfg)
	own := importKeyOf(d)
	many := make([][]byte, tpm.MaxRecipients+1)
	for i := range many {
		many[i] = own
	}
	for name, c := range map[string]struct {
		to   [][]byte
		want error
	}{
		"nobody": {nil, tpm.ErrInvalid}, "an empty one": {[][]byte{{}}, tpm.ErrInvalid}, "a good and a bad one": {[][]byte{own, own[1:]}, tpm.ErrInvalid},
		"too many": {many, tpm.ErrUnsupported}, "one on another curve": {[][]byte{own, importKeyOf(other)}, tpm.ErrUnsupported},
	} {
		_, _, _, err := d.GenerateHMAC(t.Context(), c.to)
		wantErr(t, name, err, c.want)
		_, _, _, _, err = d.GenerateSigner(t.Context(), ecdh.P256(), c.to)
		wantErr(t, name, err, c.want)
		var cannot interface{ Unsupported() bool }
		if errors.As(err, &cannot) && cannot.Unsupported() != (c.want == tpm.ErrUnsupported) {
			t.Errorf("%s: Unsupported is not told by method", name)
		}
		var wrong interface{ Invalid() bool }
		if !errors.As(err, &wrong) || wrong.Invalid() != (c.want == tpm.ErrInvalid) {
			t.Errorf("%s: Invalid is not told by method", name)
		}
	}
	for _, c := range []ecdh.Curve{nil, ecdh.X25519(), ecdh.P521()} {
		_, _, _, _, err := d.GenerateSigner(t.Context(), c, [][]byte{own})
		wantErr(t, fmt.Sprint(c), err, tpm.ErrInvalid)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, _, err := d.GenerateHMAC(cancelled, [][]byte{own}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestGeneratedStays: the TPM duplicates a generated key to its recipients alone:
// not to a storage key that software knows, not in the clear, not by the
// authorization value, neither where it was made nor where it was imported.
func TestGeneratedStays(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	d := p.Open(p.Config())
	own := importKeyOf(d)
	blobs, _, _, err := d.GenerateHMAC(t.Context(), [][]byte{own, elsewhere(t, d)})
	if err != nil {
		t.Fatal(err)
	}
	byPolicy, byAuth, err := tpm.DuplicateImported(t.Context(), d, blobs[0])
	if err != nil {
		t.Fatal(err)
	}
	if !errors.Is(byPolicy, tpm2.TPMRCPolicyFail) {
		t.Errorf("TPM2_Duplicate in the clear: %v, want TPM_RC_POLICY_FAIL", byPolicy)
	}
	if !errors.Is(byAuth, tpm2.TPMRCAuthType) {
		t.Errorf("TPM2_Duplicate with the authorization value: %v, want TPM_RC_AUTH_TYPE", byAuth)
	}
	if err := tpm.DuplicateTo(t.Context(), d, blobs[0], elsewhere(t, d)); !errors.Is(err, tpm2.TPMRCValue) && !errors.Is(err, tpm2.TPMRCPolicyFail) {
		t.Errorf("TPM2_Duplicate to a stranger: %v, want a refusal of the policy", err)
	}
	if err := tpm.DuplicateTo(t.Context(), d, blobs[0], own); err != nil {
		t.Errorf("TPM2_Duplicate to a recipient: %v (so the test proves nothing)", err)
	}
	for i := range blobs[0] {
		bad := bytes.Clone(blobs[0])
		bad[i] ^= 0x20
		if _, _, err := d.LoadHMAC(t.Context(), bad); !errors.Is(err, tpm.ErrInvalid) {
			t.Errorf("byte %d altered: %v, want ErrInvalid", i, err)
		}
	}
	if n := loaded(t, p.Config()); n != 0 {
		t.Errorf("%d transient objects and sessions are left", n)
	}
}

// TestGenerateTampering: with any bit of an answer changed the generation fails, or
// what comes out is right.
func TestGenerateTampering(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	w, cfg := tap(t, p.Config())
	d := p.Open(cfg)
	own := importKeyOf(d)
	n, failed := 0, 0
	w.setTamper(func(rsp []byte) []byte {
		if n++; n%7 != 0 {
			return rsp
		}
		rsp = bytes.Clone(rsp)
		bit := 48 + (n*131)%(8*len(rsp)-48)
		rsp[bit/8] ^= 1 << (bit % 8)
		return rsp
	})
	var made []func()
	for range 20 {
		blobs, mac, unload, err := d.GenerateHMAC(t.Context(), [][]byte{own})
		if err != nil {
			failed++
			continue
		}
		made = append(made, func() {
			again, end, err := d.LoadHMAC(t.Context(), blobs[0])
			if err != nil {
				t.Error(err)
				return
			}
			sameMACs(t, mac, again)
			end()
			unload()
		})
	}
	w.setTamper(nil)
	if failed == 0 {
		t.Error("no call failed")
	}
	for _, check := range made {
		check()
	}
	// TPM2_LoadExternal runs in no session: one whose success was turned into a
	// refusal leaves its object there, until a connection is made anew.
	p.Restart()
	if _, _, _, err := d.GenerateHMAC(t.Context(), [][]byte{own}); err != nil {
		t.Error(err)
	}
}
