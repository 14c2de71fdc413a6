package pqc

import (
	"bytes"
	"encoding/json"
	"errors"
	"testing"

	"github.com/conclave-kms/conclave/kms/secret"
)

func TestWycheproofMLDSA44Verify(t *testing.T) {
	valid, invalid := 0, 0
	for _, g := range loadWycheproof(t, "mldsa_44_verify_test.json").TestGroups {
		var pub hexBytes
		if err := json.Unmarshal(g.PublicKey, &pub); err != nil {
			t.Fatal(err)
		}
		for _, c := range g.Tests {
			err := VerifyMLDSA44(pub, c.Msg, c.Ctx, c.Sig)
			if (err == nil) != (c.Result == "valid") {
				t.Errorf("test %d (%s): %v, should be %s", c.TcID, c.Comment, err, c.Result)
			}
			if err == nil {
				valid++
			} else {
				invalid++
			}
		}
	}
	both(t, valid, invalid)
}

// Keys from seeds and deterministic signatures with them.
func TestWycheproofMLDSA44Sign(t *testing.T) {
	valid, invalid := 0, 0
	for _, g := range loadWycheproof(t, "mldsa_44_sign_seed_test.json").TestGroups {
		seed := must[*secret.Bytes](t)(secret.Copy(g.PrivateSeed))
		k, err := NewMLDSA44Key(seed)
		seed.Destroy()
		for _, c := range g.Tests {
			if err == nil && (c.Rnd != nil || c.Msg == nil && c.Mu != nil) {
				continue // hedged with given randomness, or from mu: not our interface
			}
			ok := err == nil
			if ok {
				sig, serr := k.sign(c.Msg, c.Ctx, false)
				ok = serr == nil && bytes.Equal(sig, c.Sig)
			}
			if ok != (c.Result == "valid") {
				t.Errorf("test %d (%s): %v, should be %s", c.TcID, c.Comment, ok, c.Result)
			}
			if ok {
				valid++
			} else {
				invalid++
			}
		}
		if err != nil {
			continue
		}
		var pub hexBytes
		if err := json.Unmarshal(g.PublicKey, &pub); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(k.PublicKey(), pub) {
			t.Fatal("the seed gives another public key")
		}
	}
	both(t, valid, invalid)
}

func TestMLDSA44Key(t *testing.T) {
	seed := must[*secret.Bytes](t)(GenerateMLDSA44Seed(nil))
	defer seed.Destroy()
	k := must[*MLDSA44Key](t)(NewMLDSA44Key(seed))
	sig := must[[]byte](t)(k.Sign([]byte("message"), []byte("context")))
	if err := VerifyMLDSA44(k.PublicKey(), []byte("message"), []byte("context"), sig); err != nil {
		t.Error(err)
	}
	for name, err := range map[string]error{
		"another context": VerifyMLDSA44(k.PublicKey(), []byte("message"), nil, sig),
		"a short one":     VerifyMLDSA44(k.PublicKey(), []byte("message"), []byte("context"), sig[1:]),
	} {
		if !errors.Is(err, ErrSignature) {
			t.Errorf("%s: %v", name, err)
		}
	}
	long := make([]byte, MaxContext+1)
	if _, err := k.Sign(nil, long); !errors.Is(err, ErrContext) {
		t.Error(err)
	}
	if err := VerifyMLDSA44(k.PublicKey(), nil, long, sig); !errors.Is(err, ErrContext) {
		t.Error(err)
	}
	if err := VerifyMLDSA44(k.pub[1:], nil, nil, sig); !errors.Is(err, ErrPublicKey) {
		t.Error(err)
	}
	// It is no suite for what the cluster's rules call a signature.
	if err := Verify(MLDSA44, k.PublicKey(), []byte("message"), nil, sig); !errors.Is(err, ErrSuite) {
		t.Error(err)
	}
	k.Destroy()
	k.Destroy()
	if _, err := k.Sign(nil, nil); !errors.Is(err, ErrKey) {
		t.Error(err)
	}
	short := must[*secret.Bytes](t)(secret.Copy([]byte("short")))
	defer short.Destroy()
	if _, err := NewMLDSA44Key(short); !errors.Is(err, ErrKey) {
		t.Error(err)
	}
}
