package hsm

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"
	kwp "github.com/tink-crypto/tink-go/v2/kwp/subtle"
)

// pinHolder is somebody who has the user PIN and code in the process: a session of
// their own on the token of an open device, read-write and logged in.
type pinHolder struct {
	*testing.T
	tok *testToken
	d   *Device
	*session
	key []byte // of the loaded HMAC key, to compare with
	b   []byte // its blob
	mac func() []byte
}

// pinHolderAttack is one thing that they try. It returns whether they got what they
// wanted.
type pinHolderAttack struct {
	Name, Sentence string
	run            func(*pinHolder) bool
}

// PinHolderStopped are the attacks that the templates, the self test or the software
// around the token stop. DESIGN.md and SECURITY.md give them in these words.
var PinHolderStopped = []pinHolderAttack{
	{"read-value", "Reading the value of a device key or of a loaded key is refused.", readValues},
	{"wrap-decrypt", "Clulow's wrap-then-decrypt with a key of their own reveals no device key and no loaded key, since none is extractable.", wrapThenDecrypt},
	{"wrap-known-key", "Wrapping device keys and loaded keys under a key whose value they know is refused.", wrapUnderKnown},
	{"wrap-with-wrapping-key", "The wrapping key wraps and unwraps no key objects, so nothing can be re-imported with it as readable.", misuseWrappingKey},
	{"re-template", "Attributes of device keys and loaded keys cannot be loosened with C_SetAttributeValue.", reTemplate},
	{"copy-looser", "Device keys and loaded keys cannot be copied with looser attributes by C_CopyObject.", copyLooser},
	{"trusted-wrapping-key", "The user cannot mark a wrapping key of their own as trusted.", makeTrusted},
	{"destroy-device-key", "The private and secret device keys cannot be destroyed without initialising the token.", destroyDeviceKeys},
	{"same-label-substitution", "Further keys with the labels and ids of device keys are not taken for them: the token is refused.", substituteLabels},
	{"replace-public-object", "A public object put in the place of a device key's is noticed: the token is refused.", replacePublic},
}

// PinHolderPossible are the attacks that SoftHSM cannot stop. The tests assert that
// they work still, so that the list stays true.
var PinHolderPossible = []pinHolderAttack{
	{"use-device-keys", "Whoever has the PIN can sign, agree and open wrapped blobs with the device keys as long as they have access to the token.", useDeviceKeys},
	{"z-as-readable", "They can have the shared secret Z of the agreement key and any public key in the clear, because HPKE needs just that.", readableZ},
	{"blob-as-readable", "With the key blob of a hardware key, which lies inside the node's sealed copy, they can unwrap the key as readable.", readableBlob},
	{"use-loaded-key", "Code in the process that drives the token can use a loaded key while it is loaded.", useLoaded},
	{"wrap-while-generated", "Code in that process can wrap a key away in the moment in which it is generated, when it has to be extractable.", wrapWhileGenerated},
	{"destroy-public-object", "They can destroy the public objects of the device keys; the node then refuses the token.", destroyPublic},
	{"destroy-loaded-key", "Code in that process can destroy loaded keys; the next use loads them again.", destroyLoaded},
	{"change-pin", "They can change the user PIN; the node then reports that its PIN was refused.", changePIN},
}

func newPinHolder(t *testing.T) *pinHolder {
	t.Helper()
	tok, d := openNew(t)
	p := &pinHolder{T: t, tok: tok, d: d, key: bytes.Repeat([]byte{0x42}, HMACKey)}
	p.b = wrapFor(t, d, p.key)
	mac, unload, err := d.LoadHMAC(t.Context(), p.b)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(unload)
	p.mac = func() []byte {
		got, err := mac(t.Context(), []byte("m"))
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	if p.session, err = d.openSession(true, true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.session.close() })
	return p
}

// TestPinHolder runs all of them, each on a token of its own.
func TestPinHolder(t *testing.T) {
	design, err := os.ReadFile("DESIGN.md")
	if err != nil {
		t.Fatal(err)
	}
	words := strings.Join(strings.Fields(string(design)), " ")
	for want, list := range map[bool][]pinHolderAttack{false: PinHolderStopped, true: PinHolderPossible} {
		for _, a := range list {
			t.Run(a.Name, func(t *testing.T) {
				if got := a.run(newPinHolder(t)); got != want {
					t.Errorf("%q worked: %v, want %v", a.Sentence, got, want)
				}
			})
			if !strings.Contains(words, "**"+a.Name+"**: "+a.Sentence) {
				t.Errorf("DESIGN.md does not say of %s: %s", a.Name, a.Sentence)
			}
		}
	}
}

// loaded returns the loaded HMAC key, which every session of the process finds.
func (p *pinHolder) loaded() pkcs11.ObjectHandle {
	p.Helper()
	got, err := p.find([]*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET)})
	if err != nil || len(got) != 1 {
		p.Fatalf("%d loaded keys: %v", len(got), err)
	}
	return got[0]
}

// secrets are the objects that must not come out.
func (p *pinHolder) secrets() map[string]target {
	at := func(h pkcs11.ObjectHandle) func(*session) pkcs11.ObjectHandle {
		return func(*session) pkcs11.ObjectHandle { return h }
	}
	return map[string]target{"agreement": {agreementRole, at(p.keys.agreement)}, "signing": {signingRole, at(p.keys.signing)},
		"wrapping": {wrappingRole, at(p.keys.wrapping)}, "loaded": {hmacRole, at(p.loaded())}}
}

// any reports whether one of the attacks on one of the secrets worked; an outcome
// that says nothing about permission fails the test.
func (p *pinHolder) any(attacks func(target) []func(*session) (bool, error)) bool {
	p.Helper()
	some := false
	for name, t := range p.secrets() {
		for _, f := range attacks(t) {
			worked, err := f(p.session)
			if err != nil {
				p.Errorf("%s: inconclusive: %v", name, err)
			}
			some = some || worked
		}
	}
	return some
}

func readValues(p *pinHolder) bool {
	return p.any(func(t target) []func(*session) (bool, error) { return []func(*session) (bool, error){t.read} })
}

func wrapThenDecrypt(p *pinHolder) bool {
	own := freshKey(p.session) // may wrap and decrypt
	if own == 0 {
		p.Fatal("the token makes no key that may wrap and decrypt")
	}
	return p.any(func(t target) (all []func(*session) (bool, error)) {
		for _, m := range wrapMechanisms {
			all = append(all, t.wrapUnderFresh(m))
		}
		return all
	})
}

// known makes an AES key of a value that the attacker chose.
func (p *pinHolder) known(value []byte) pkcs11.ObjectHandle {
	p.Helper()
	h, err := p.p11.CreateObject(p.h, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false), pkcs11.NewAttribute(pkcs11.CKA_WRAP, true), pkcs11.NewAttribute(pkcs11.CKA_VALUE, value)})
	if err != nil {
		p.Fatal(err)
	}
	return h
}

func wrapUnderKnown(p *pinHolder) bool {
	own := p.known(make([]byte, 32))
	return p.any(func(t target) (all []func(*session) (bool, error)) {
		for _, m := range wrapMechanisms {
			all = append(all, func(s *session) (bool, error) {
				mech, done := m.with(make([]byte, 16), nil)
				defer done()
				_, err := s.p11.WrapKey(s.h, mech, own, t.handle(s))
				return refused(err)
			})
		}
		return all
	})
}

func misuseWrappingKey(p *pinHolder) bool {
	some := false
	for _, m := range wrapMechanisms {
		for _, f := range []func(*session) (bool, error){wrapUnderWrapping(m, freshKey), unwrapReadable(m)} {
			worked, err := f(p.session)
			if err != nil {
				p.Errorf("%s: inconclusive: %v", m.name, err)
			}
			some = some || worked
		}
	}
	return some
}

func reTemplate(p *pinHolder) bool {
	return p.any(func(t target) (all []func(*session) (bool, error)) {
		for _, f := range t.loosenings() {
			all = append(all, t.set(f))
		}
		return all
	})
}

func copyLooser(p *pinHolder) bool {
	return p.any(func(t target) (all []func(*session) (bool, error)) {
		for _, f := range t.loosenings() {
			all = append(all, t.copy(f))
		}
		return all
	})
}

func makeTrusted(p *pinHolder) bool {
	h, err := p.p11.GenerateKey(p.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
		pkcs11.NewAttribute(pkcs11.CKA_WRAP, true), pkcs11.NewAttribute(pkcs11.CKA_TRUSTED, true)})
	if err != nil {
		return false
	}
	worked, err := p.has(h, flag{pkcs11.CKA_TRUSTED, true})
	return worked && err == nil
}

func destroyDeviceKeys(p *pinHolder) bool {
	some := false
	for _, h := range []pkcs11.ObjectHandle{p.keys.agreement, p.keys.signing, p.keys.wrapping} {
		some = some || p.p11.DestroyObject(p.h, h) == nil
	}
	useAll(p.T, p.d)
	return some
}

// substituteLabels makes a signing key of the attacker's beside the device's and
// reports whether a node would use it.
func substituteLabels(p *pinHolder) bool {
	dl := dialect{true, true}
	for _, r := range roles {
		pub, priv := r.templates(p.d.set.label, p.curve, dl)
		if err := p.generate(r, pub, priv); err != nil {
			p.Fatal(err)
		}
	}
	p.d.flush()
	if err := callAll(p.d); !errors.Is(err, ErrUnavailable) {
		p.Errorf("the open device: %v", err)
	}
	d, err := Open(p.Context(), p.tok.cfg)
	if err == nil {
		_ = d.Close()
	} else if !errors.Is(err, ErrUnsafeToken) {
		p.Error(err)
	}
	return err == nil
}

func replacePublic(p *pinHolder) bool {
	some := false
	for _, r := range []role{agreementRole, signingRole} {
		old := map[string]pkcs11.ObjectHandle{"agreement": p.keys.agreementPub, "signing": p.keys.signingPub}[r.name]
		key, err := p.curve.ecdh.GenerateKey(rand.Reader)
		if err != nil {
			p.Fatal(err)
		}
		point := key.PublicKey().Bytes()
		if err := p.p11.DestroyObject(p.h, old); err != nil {
			p.Fatal(err)
		}
		pub, _ := r.templates(p.d.set.label, p.curve, dialect{true, true})
		der := append([]byte{0x04, byte(len(point))}, point...) // an OCTET STRING shorter than 128 bytes
		if _, err := p.p11.CreateObject(p.h, append(pub, pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, der))); err != nil {
			p.Fatal(err)
		}
		d, err := Open(p.Context(), p.tok.cfg)
		if err == nil {
			_ = d.Close()
		} else if !errors.Is(err, ErrUnsafeToken) {
			p.Error(err)
		}
		some = some || err == nil
	}
	return some
}

func useDeviceKeys(p *pinHolder) bool {
	_, err := p.sign(p.keys.signing, make([]byte, 48))
	return err == nil && p.keyWorks() == nil
}

func readableZ(p *pinHolder) bool {
	eph, err := p.curve.ecdh.GenerateKey(rand.Reader)
	if err != nil {
		p.Fatal(err)
	}
	want, err := eph.ECDH(p.d.AgreementKey())
	if err != nil {
		p.Fatal(err)
	}
	got, err := p.ecdh(p.keys.agreement, eph.PublicKey().Bytes())
	return err == nil && bytes.Equal(got, want)
}

func readableBlob(p *pinHolder) bool {
	in, err := parseImport(p.b, p.curve)
	if err != nil {
		p.Fatal(err)
	}
	z, err := p.ecdh(p.keys.agreement, in.point)
	if err != nil {
		return false
	}
	box, err := kwp.NewKWP(in.transport(z))
	if err != nil {
		p.Fatal(err)
	}
	got, err := box.Unwrap(in.wrapped)
	return err == nil && bytes.Equal(got, p.key)
}

func useLoaded(p *pinHolder) bool {
	got, err := p.hmac(p.loaded(), []byte("m"))
	return err == nil && bytes.Equal(got, p.mac())
}

// wrapWhileGenerated looks for an extractable key while one is being generated.
func wrapWhileGenerated(p *pinHolder) bool {
	value := bytes.Repeat([]byte{9}, 32)
	own := p.known(value)
	var wrapped []byte
	hook := func(op string) error {
		if op != "wrap inside" || wrapped != nil {
			return nil
		}
		found, err := p.find([]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
			pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true)})
		if err == nil && len(found) == 1 {
			wrapped, _ = p.p11.WrapKey(p.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_WRAP_PAD, nil)}, own, found[0])
		}
		return nil
	}
	p.d.hook.Store(&hook)
	soft, public := softRecipient(p.T, ecdh.P384(), kdfNull)
	blobs, _, unload, err := p.d.GenerateHMAC(p.Context(), [][]byte{public})
	p.d.hook.Store(nil)
	if err != nil {
		p.Fatal(err)
	}
	unload()
	want, _ := openSoft(p.T, soft, blobs[0])
	box, err := kwp.NewKWP(value)
	if err != nil {
		p.Fatal(err)
	}
	got, err := box.Unwrap(wrapped)
	return err == nil && bytes.Equal(got, want)
}

func destroyPublic(p *pinHolder) bool {
	worked := p.p11.DestroyObject(p.h, p.keys.signingPub) == nil
	if d, err := Open(p.Context(), p.tok.cfg); err == nil {
		p.Error("the token opens without a public object")
		_ = d.Close()
	} else if !errors.Is(err, ErrNotProvisioned) {
		p.Error(err)
	}
	return worked
}

func destroyLoaded(p *pinHolder) bool {
	want := p.mac()
	worked := p.p11.DestroyObject(p.h, p.loaded()) == nil
	if !bytes.Equal(p.mac(), want) {
		p.Error("another MAC after the loaded key was destroyed")
	}
	return worked
}

func changePIN(p *pinHolder) bool {
	worked := p.p11.SetPIN(p.h, string(p.tok.cfg.PIN.Reveal()), "taken-over") == nil
	if err := p.d.mod.alone(p.Context(), func() error { return p.p11.CloseAllSessions(p.slot) }); err != nil {
		p.Fatal(err)
	}
	if err := p.d.Check(p.Context()); !errors.Is(err, ErrPIN) {
		p.Errorf("Check: %v", err)
	}
	return worked
}
