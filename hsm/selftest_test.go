package hsm

import (
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"errors"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"
)

// loosen returns templates in which one key has some attributes otherwise.
func loosen(name string, drop []uint, flags ...flag) templateFunc {
	return func(r role, prefix string, crv curve, dl dialect) (pub, priv []*pkcs11.Attribute) {
		pub, priv = r.templates(prefix, crv, dl)
		if r.name != name {
			return pub, priv
		}
		var out []*pkcs11.Attribute
		for _, a := range priv {
			keep := !contains(drop, a.Type)
			for _, f := range flags {
				if f.typ == a.Type {
					a = pkcs11.NewAttribute(f.typ, f.want)
				}
			}
			if keep {
				out = append(out, a)
			}
		}
		return pub, out
	}
}

var looseTokens = []struct {
	name      string
	templates templateFunc
	attack    string // what the attacks alone say; "" when only the attributes tell
}{
	{"extractable signing key", loosen("signing", nil, flag{pkcs11.CKA_EXTRACTABLE, true}), "wrap the signing key under a fresh key"},
	{"extractable wrapping key", loosen("wrapping", nil, flag{pkcs11.CKA_EXTRACTABLE, true}), "wrap the wrapping key under a fresh key"},
	{"readable agreement key", loosen("agreement", nil, flag{pkcs11.CKA_EXTRACTABLE, true}, flag{pkcs11.CKA_SENSITIVE, false}), "read CKA_VALUE of the agreement key"},
	{"readable wrapping key", loosen("wrapping", nil, flag{pkcs11.CKA_EXTRACTABLE, true}, flag{pkcs11.CKA_SENSITIVE, false}), "read CKA_VALUE of the wrapping key"},
	{"wrapping key that wraps", loosen("wrapping", []uint{pkcs11.CKA_ALLOWED_MECHANISMS}, flag{pkcs11.CKA_WRAP, true}), "wrap a fresh sensitive key under the wrapping key"},
	{"wrapping key that unwraps", loosen("wrapping", []uint{pkcs11.CKA_ALLOWED_MECHANISMS}, flag{pkcs11.CKA_UNWRAP, true}), "unwrap as readable with the wrapping key"},
	{"wrapping key that derives", loosen("wrapping", []uint{pkcs11.CKA_ALLOWED_MECHANISMS}, flag{pkcs11.CKA_DERIVE, true}), "derive with the wrapping key"},
	{"wrapping key that signs", loosen("wrapping", []uint{pkcs11.CKA_ALLOWED_MECHANISMS}, flag{pkcs11.CKA_SIGN, true}), "sign with the wrapping key"},
	{"agreement key that signs", loosen("agreement", []uint{pkcs11.CKA_ALLOWED_MECHANISMS}, flag{pkcs11.CKA_SIGN, true}), "sign with the agreement key"},
	{"signing key that derives", loosen("signing", []uint{pkcs11.CKA_ALLOWED_MECHANISMS}, flag{pkcs11.CKA_DERIVE, true}), "derive with the signing key"},
	{"modifiable wrapping key", loosen("wrapping", nil, flag{pkcs11.CKA_MODIFIABLE, true}), "on the wrapping key"},
	{"modifiable signing key", loosen("signing", nil, flag{pkcs11.CKA_MODIFIABLE, true}), "on the signing key"},
	{"copyable agreement key", loosen("agreement", nil, flag{pkcs11.CKA_COPYABLE, true}, flag{pkcs11.CKA_MODIFIABLE, true}), "the agreement key"},
	{"copyable wrapping key", loosen("wrapping", nil, flag{pkcs11.CKA_COPYABLE, true}), ""},
	{"destroyable wrapping key", loosen("wrapping", nil, flag{pkcs11.CKA_DESTROYABLE, true}), ""},
	{"other mechanisms", loosen("wrapping", []uint{pkcs11.CKA_ALLOWED_MECHANISMS}), ""},
	{"public wrapping key", loosen("wrapping", nil, flag{pkcs11.CKA_PRIVATE, false}), ""},
}

// TestLooseTokenIsRefused: Open refuses keys that are looser than the templates.
func TestLooseTokenIsRefused(t *testing.T) {
	for _, c := range looseTokens {
		t.Run(c.name, func(t *testing.T) {
			tok := newToken(t)
			tok.provisionLoose(t, c.templates)
			d, err := Open(context.Background(), tok.cfg)
			if err == nil {
				_ = d.Close()
				t.Fatal("opened")
			}
			if !errors.Is(err, ErrUnsafeToken) {
				t.Fatal(err)
			}
			t.Log(err)
		})
	}
}

// TestAttacksDetect: the attacks find a bad token by themselves, as they must
// on a token that reports its attributes wrongly.
func TestAttacksDetect(t *testing.T) {
	for _, c := range looseTokens {
		if c.attack == "" {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			tok := newToken(t)
			tok.provisionLoose(t, c.templates)
			d, err := attach(tok.cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			err = d.testAttacks(context.Background())
			if !errors.Is(err, ErrUnsafeToken) || !strings.Contains(err.Error(), c.attack) {
				t.Fatalf("the attacks said: %v", err)
			}
			t.Log(err)
		})
	}
}

// TestAttacksRunAll: on a good token every attack comes to a verdict.
func TestAttacksRunAll(t *testing.T) {
	_, d := openNew(t)
	all := attacks(d.imports)
	if len(all) < 170 {
		t.Fatalf("%d attacks only", len(all))
	}
	for _, a := range all {
		worked, err := call(context.Background(), d, callOptions{op: "attack", rw: true}, func(s *session) (bool, error) {
			if err := s.loadVictims(d.imports); err != nil {
				return false, err
			}
			return a.run(s)
		})
		if worked || err != nil {
			t.Errorf("%s: worked=%v, %v", a.name, worked, err)
		}
	}
}

// TestKnownAnswersDetect: public objects that are not the keys' own are seen.
func TestKnownAnswersDetect(t *testing.T) {
	_, d := openNew(t)
	ctx := context.Background()
	agreement, signing := d.agreement, d.signing
	other, err := signing.ECDH()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Check(ctx); err != nil { // leaves a session that is bound to the keys already
		t.Fatal(err)
	}
	d.agreement = other
	if err := d.testECDH(ctx); !errors.Is(err, ErrUnsafeToken) {
		t.Errorf("ECDH: %v", err)
	}
	d.agreement = agreement
	if d.signing, err = ecdsa.ParseUncompressedPublicKey(d.set.curve.ec, agreement.Bytes()); err != nil {
		t.Fatal(err)
	}
	if err := d.testSign(ctx); !errors.Is(err, ErrUnsafeToken) {
		t.Errorf("Sign: %v", err)
	}
	d.signing = signing
	if err := d.selfTest(ctx); err != nil {
		t.Fatal(err)
	}
}

// TestOtherCurve: a token provisioned on one curve does not open as another.
func TestOtherCurve(t *testing.T) {
	tok, _ := openNew(t)
	tok.cfg.Curve = ecdh.P256()
	if _, err := Open(context.Background(), tok.cfg); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "P-256") {
		t.Fatal(err)
	}
}
