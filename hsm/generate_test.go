package hsm

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"math/big"
	"os"
	"sync"
	"testing"

	"github.com/conclave-kms/conclave/kms/secret"
)

// softRecipient is a recipient whose private key the test has.
func softRecipient(t *testing.T, c ecdh.Curve, k kdf) (*ecdh.PrivateKey, []byte) {
	t.Helper()
	key, err := c.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key, recipient{k, key.PublicKey()}.bytes()
}

// openSoft opens a blob as the software recipient.
func openSoft(t *testing.T, key *ecdh.PrivateKey, blob []byte) ([]byte, material) {
	t.Helper()
	crv, err := curveOf(key.Curve())
	if err != nil {
		t.Fatal(err)
	}
	in, err := parseImport(blob, crv)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := in.open(key)
	if err != nil {
		t.Fatal(err)
	}
	return plain, in.material
}

// TestSoftHSMGenerates pins what the self test finds out about SoftHSM.
func TestSoftHSMGenerates(t *testing.T) {
	_, d := openNew(t)
	if g := d.imports.generates; g != (generation{hmac: true, signer: true, p256: materialP256Padded, p384: materialP384}) {
		t.Fatalf("%+v", g)
	}
}

// TestGenerateHMAC: all recipients get the key that the closure uses.
func TestGenerateHMAC(t *testing.T) {
	_, d := openNew(t)
	_, other := openNew(t)
	p256, public256 := softRecipient(t, ecdh.P256(), kdfNull)
	p384, public384 := softRecipient(t, ecdh.P384(), kdfNull)
	_, own := d.ImportKey()
	_, theirs := other.ImportKey()
	blobs, mac, unload, err := d.GenerateHMAC(t.Context(), [][]byte{public256, own, theirs, public384})
	if err != nil {
		t.Fatal(err)
	}
	message := bytes.Repeat([]byte("m"), MaxMAC)
	want, err := mac(t.Context(), message)
	if err != nil {
		t.Fatal(err)
	}
	for i, key := range map[int]*ecdh.PrivateKey{0: p256, 3: p384} {
		plain, m := openSoft(t, key, blobs[i])
		h := hmac.New(sha256.New, plain)
		_, _ = h.Write(message)
		if m != materialHMAC || len(plain) != HMACKey || !hmac.Equal(h.Sum(nil), want) {
			t.Fatalf("recipient %d has another key", i)
		}
	}
	for i, dev := range map[int]*Device{1: d, 2: other} {
		again, done, err := dev.LoadHMAC(t.Context(), blobs[i])
		if err != nil {
			t.Fatal(err)
		}
		if got, err := again(t.Context(), message); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("device %d has another key: %v", i, err)
		}
		done()
	}
	if n := d.sessionObjects(t); n != 1 {
		t.Fatalf("%d session objects, want the closure's own", n)
	}
	unload()
	if n := d.sessionObjects(t); n != 0 {
		t.Fatalf("%d session objects are left", n)
	}
}

// TestGenerateSigner: the same for signing keys, on both curves.
func TestGenerateSigner(t *testing.T) {
	_, d := openNew(t)
	_, other := openNew(t)
	_, theirs := other.ImportKey()
	for _, c := range []ecdh.Curve{ecdh.P256(), ecdh.P384()} {
		crv, err := curveOf(c)
		if err != nil {
			t.Fatal(err)
		}
		key, public := softRecipient(t, ecdh.P384(), kdfNull)
		blobs, pub, sign, unload, err := d.GenerateSigner(t.Context(), c, [][]byte{public, theirs})
		if err != nil {
			t.Fatal(err)
		}
		point, err := pub.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		plain, m := openSoft(t, key, blobs[0])
		if err := checkScalar(plain, m, point); err != nil {
			t.Fatal(err)
		}
		theirSign, theirUnload, err := other.LoadSigner(t.Context(), c, blobs[1])
		if err != nil {
			t.Fatal(err)
		}
		digest := bytes.Repeat([]byte{7}, crv.digest)
		for _, f := range []func(context.Context, []byte) ([]byte, error){sign, theirSign} {
			sig, err := f(t.Context(), digest)
			if err != nil || !ecdsa.Verify(pub, digest, new(big.Int).SetBytes(sig[:crv.size]), new(big.Int).SetBytes(sig[crv.size:])) {
				t.Fatalf("%s: a signature does not verify: %v", crv.name, err)
			}
		}
		unload()
		theirUnload()
		if n := d.sessionObjects(t); n != 0 {
			t.Fatalf("%d session objects are left", n)
		}
	}
}

// TestRewrap: what software wrapped and what the token generated goes on to others.
func TestRewrap(t *testing.T) {
	_, d := openNew(t)
	soft, public := softRecipient(t, ecdh.P256(), kdfNull)
	known := knownMACs()[0]
	out, err := d.Rewrap(t.Context(), wrapFor(t, d, known.key), public)
	if err != nil {
		t.Fatal(err)
	}
	if plain, m := openSoft(t, soft, out); m != materialHMAC || !bytes.Equal(plain, known.key) {
		t.Fatal("another key came out")
	}
	_, own := d.ImportKey()
	for _, c := range []ecdh.Curve{ecdh.P256(), ecdh.P384()} {
		key, err := c.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		scalar, err := secret.Copy(key.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		blob, err := WrapSigner(own, c, scalar, nil)
		scalar.Destroy()
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // the second time from the token's own form
			out, err := d.Rewrap(t.Context(), blob, public)
			if err != nil {
				t.Fatal(err)
			}
			plain, m := openSoft(t, soft, out)
			if err := checkScalar(plain, m, key.PublicKey().Bytes()); err != nil {
				t.Fatal(err)
			}
			if blob, err = d.Rewrap(t.Context(), blob, own); err != nil {
				t.Fatal(err)
			}
		}
	}
	bad := wrapFor(t, d, known.key)
	bad[len(bad)-1] ^= 1
	if _, err := d.Rewrap(t.Context(), bad, public); !errors.Is(err, ErrInvalid) {
		t.Fatalf("an altered blob: %v", err)
	}
	if n := d.sessionObjects(t); n != 0 {
		t.Fatalf("%d session objects are left", n)
	}
}

func TestGenerateRefuses(t *testing.T) {
	_, d := openNew(t)
	_, good := softRecipient(t, ecdh.P384(), kdfNull)
	_, sha := softRecipient(t, ecdh.P384(), kdfSHA256)
	off := bytes.Clone(good)
	off[len(off)-1] ^= 1
	for name, c := range map[string]struct {
		to   [][]byte
		want error
	}{
		"nobody":          {nil, ErrInvalid},
		"too many":        {make([][]byte, MaxRecipients+1), ErrInvalid},
		"not a key":       {[][]byte{good, []byte("key")}, ErrInvalid},
		"off the curve":   {[][]byte{off}, ErrInvalid},
		"another KDF":     {[][]byte{good, sha}, ErrUnsupported},
		"an empty import": {[][]byte{nil}, ErrInvalid},
	} {
		if _, _, _, err := d.GenerateHMAC(t.Context(), c.to); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if _, _, _, _, err := d.GenerateSigner(t.Context(), ecdh.P256(), c.to); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, _, _, err := d.GenerateSigner(t.Context(), ecdh.X25519(), [][]byte{good}); !errors.Is(err, ErrInvalid) {
		t.Error(err)
	}
	if n := d.sessionObjects(t); n != 0 {
		t.Fatalf("%d session objects are left", n)
	}
}

// TestGenerateLeavesNothing: a token that goes away in the middle leaves neither a
// key nor a session with one behind, and the device comes back.
func TestGenerateLeavesNothing(t *testing.T) {
	tok, d := openNew(t)
	d.probeEvery = 0
	_, own := d.ImportKey()
	for what := range disturbances {
		var once sync.Once
		hook := func(op string) error {
			if op == "wrap inside" {
				once.Do(func() {
					s, err := d.openSession(false, false)
					if err != nil {
						t.Error(err)
						return
					}
					if err := disturbances[what](d, s); err != nil {
						t.Error(err)
					}
				})
			}
			return nil
		}
		d.hook.Store(&hook)
		blobs, _, unload, err := d.GenerateHMAC(t.Context(), [][]byte{own})
		d.hook.Store(nil)
		if err == nil {
			unload()
			if _, err := parseImport(blobs[0], d.set.curve); err != nil {
				t.Fatal(err)
			}
		} else if !errors.Is(err, ErrUnavailable) {
			t.Fatalf("%s: %v", what, err)
		}
		if err := d.Check(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n := d.sessionObjects(t); n != 0 {
			t.Fatalf("%s: %d session objects are left", what, n)
		}
	}
	if err := os.Rename(tok.tokens, tok.tokens+".away"); err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := d.GenerateHMAC(t.Context(), [][]byte{own}); err != nil && !errors.Is(err, ErrUnavailable) {
		t.Fatal(err)
	}
	if err := os.Rename(tok.tokens+".away", tok.tokens); err != nil {
		t.Fatal(err)
	}
	// The first probe finds the device unhealthy, the second initialises it again.
	if d.Check(t.Context()) != nil {
		if err := d.Check(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	_, _, unload, err := d.GenerateHMAC(t.Context(), [][]byte{own})
	if err != nil {
		t.Fatal(err)
	}
	unload()
	if n := d.sessionObjects(t); n != 0 {
		t.Fatalf("%d session objects are left", n)
	}
}

func TestAttributes(t *testing.T) {
	_, d := openNew(t)
	all, err := d.Attributes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 3 || !bytes.Equal(all[0].Public, d.AgreementKey().Bytes()) || !bytes.Equal(all[1].Public, d.signingPoint) || all[2].Public != nil {
		t.Fatalf("%+v", all)
	}
	for i, r := range roles {
		a := all[i]
		if a.Role != r.name || a.Label != "conclave-"+r.name || !bytes.Equal(a.ID, r.id("conclave")) || len(a.Mechanisms) != 1 || a.Mechanisms[0] != r.mech {
			t.Errorf("%+v", a)
		}
		for name, want := range map[string]bool{"CKA_SENSITIVE": true, "CKA_EXTRACTABLE": false, "CKA_LOCAL": true,
			"CKA_ALWAYS_SENSITIVE": true, "CKA_NEVER_EXTRACTABLE": true, "CKA_DESTROYABLE": false, "CKA_DERIVE": r.name == "agreement"} {
			if got, ok := a.Values[name]; !ok || got != want {
				t.Errorf("%s: %s is %v, known %v", r.name, name, got, ok)
			}
		}
	}
}
