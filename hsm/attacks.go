package hsm

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"runtime"
	"slices"
	"unsafe"

	"github.com/miekg/pkcs11"
)

// attack is one way to get at a key that must not work. run returns true when
// it did. An error that says nothing about permission (a lost session, say)
// makes the self test fail as inconclusive.
type attack struct {
	name string
	run  func(*session) (bool, error)
}

// attacksPerCall bounds the attacks that share a session and a deadline.
const attacksPerCall = 16

// testAttacks tries every attack, on read-write sessions: on a read-only one
// changes to the keys would be refused for the wrong reason.
func (d *Device) testAttacks(ctx context.Context) error {
	for some := range slices.Chunk(attacks(d.imports), attacksPerCall) {
		worked, err := call(ctx, d, callOptions{op: "self test", rw: true}, func(s *session) (string, error) {
			if err := s.loadVictims(d.imports); err != nil {
				return "", err
			}
			for _, a := range some {
				worked, err := a.run(s)
				if err != nil {
					return "", fmt.Errorf("inconclusive: %s: %w", a.name, err)
				}
				if worked {
					return a.name, nil
				}
			}
			return "", nil
		})
		if err != nil {
			return err
		}
		if worked != "" {
			return unsafef("attack succeeded: %s", worked)
		}
	}
	return nil
}

// target is a device key as an attack sees it.
type target struct {
	role
	handle func(*session) pkcs11.ObjectHandle
}

var targets = []target{
	{agreementRole, func(s *session) pkcs11.ObjectHandle { return s.keys.agreement }},
	{signingRole, func(s *session) pkcs11.ObjectHandle { return s.keys.signing }},
	{wrappingRole, func(s *session) pkcs11.ObjectHandle { return s.keys.wrapping }},
}

// attacks returns all of them; those on loaded keys where the token has such.
func attacks(p *importProfile) []attack {
	var all []attack
	targets := append(targets[:len(targets):len(targets)], loadedTargets(p)...)
	for _, t := range targets {
		all = append(all, attack{"read CKA_VALUE of the " + t.name + " key", t.read})
		for _, f := range t.loosenings() {
			all = append(all,
				attack{fmt.Sprintf("set %s=%v on the %s key", attributeName(f.typ), f.want, t.name), t.set(f)},
				attack{fmt.Sprintf("copy the %s key with %s=%v", t.name, attributeName(f.typ), f.want), t.copy(f)})
		}
	}
	for _, m := range wrapMechanisms {
		for _, t := range targets {
			all = append(all, attack{fmt.Sprintf("wrap the %s key under the wrapping key with %s", t.name, m.name), wrapUnderWrapping(m, t.handle)})
		}
		all = append(all,
			attack{"wrap a fresh sensitive key under the wrapping key with " + m.name, wrapUnderWrapping(m, freshKey)},
			attack{"unwrap as readable with the wrapping key and " + m.name, unwrapReadable(m)})
	}
	for _, t := range targets {
		for _, m := range wrapMechanisms {
			all = append(all, attack{fmt.Sprintf("wrap the %s key under a fresh key with %s", t.name, m.name), t.wrapUnderFresh(m)})
		}
	}
	return append(append(all, crossUses()...), loadedUses(p)...)
}

// loosenings are the changes that would break the key's template.
func (t target) loosenings() []flag {
	l := []flag{{pkcs11.CKA_EXTRACTABLE, true}, {pkcs11.CKA_SENSITIVE, false}, {pkcs11.CKA_MODIFIABLE, true}}
	for _, u := range t.uses() {
		if !contains(t.may, u) {
			l = append(l, flag{u, true})
		}
	}
	return l
}

// refused turns the outcome of a call that must fail into a verdict.
func refused(err error) (worked bool, _ error) {
	switch {
	case err == nil:
		return true, nil
	case isLost(err), isRV(err, pkcs11.CKR_SESSION_READ_ONLY, pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_HOST_MEMORY,
		pkcs11.CKR_DEVICE_MEMORY, pkcs11.CKR_OPERATION_ACTIVE, pkcs11.CKR_FUNCTION_CANCELED,
		pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED):
		return false, err
	}
	if _, ok := rv(err); !ok {
		return false, err
	}
	return false, nil
}

func (t target) read(s *session) (bool, error) {
	v, err := s.attribute(t.handle(s), pkcs11.CKA_VALUE)
	worked, err := refused(err)
	return worked && len(v) > 0, err // some tokens answer with nothing
}

// set changes an attribute. A token that says yes and does nothing passes.
func (t target) set(f flag) func(*session) (bool, error) {
	return func(s *session) (bool, error) {
		err := s.p11.SetAttributeValue(s.h, t.handle(s), attrs([]flag{f}))
		if worked, err := refused(err); !worked {
			return false, err
		}
		return s.has(t.handle(s), f)
	}
}

func (t target) copy(f flag) func(*session) (bool, error) {
	return func(s *session) (bool, error) {
		h, err := s.p11.CopyObject(s.h, t.handle(s), append(attrs([]flag{f}), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false)))
		if worked, err := refused(err); !worked {
			return false, err
		}
		worked, err := s.has(h, f)
		_ = s.p11.DestroyObject(s.h, h) // a session object: it goes with the session at the latest
		return worked, err
	}
}

// has reports whether the attribute now has the value; one that cannot be read
// back counts as having it.
func (s *session) has(h pkcs11.ObjectHandle, f flag) (bool, error) {
	v, err := s.attribute(h, f.typ)
	if err != nil {
		return true, nil
	}
	return !bytes.Equal(v, pkcs11.NewAttribute(f.typ, !f.want).Value), nil
}

type wrapMechanism struct {
	name string
	mech uint
}

var wrapMechanisms = []wrapMechanism{
	{"CKM_AES_KEY_WRAP", pkcs11.CKM_AES_KEY_WRAP},
	{"CKM_AES_KEY_WRAP_PAD", pkcs11.CKM_AES_KEY_WRAP_PAD},
	{"CKM_AES_GCM", pkcs11.CKM_AES_GCM},
	{"CKM_AES_CBC_PAD", pkcs11.CKM_AES_CBC_PAD},
	{"CKM_AES_ECB", pkcs11.CKM_AES_ECB},
}

// with makes the mechanism; done frees its parameters.
func (m wrapMechanism) with(iv, aad []byte) (mech []*pkcs11.Mechanism, done func()) {
	switch m.mech {
	case pkcs11.CKM_AES_GCM:
		p := pkcs11.NewGCMParams(iv[:ivSize], aad, 8*tagSize)
		return []*pkcs11.Mechanism{pkcs11.NewMechanism(m.mech, p)}, p.Free
	case pkcs11.CKM_AES_CBC_PAD:
		return []*pkcs11.Mechanism{pkcs11.NewMechanism(m.mech, iv[:16])}, func() {}
	}
	return []*pkcs11.Mechanism{pkcs11.NewMechanism(m.mech, nil)}, func() {}
}

// freshKey makes a sensitive but extractable session key, the kind that a
// wrapping key is for, which itself may wrap and decrypt: the pair of uses that
// reveals every extractable key. 0 when the token does not make one.
func freshKey(s *session) pkcs11.ObjectHandle {
	h, err := s.p11.GenerateKey(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true),
		pkcs11.NewAttribute(pkcs11.CKA_WRAP, true),
		pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true),
	})
	if err != nil {
		return 0
	}
	return h
}

// wrapUnderFresh takes a device key out under a key of the attacker's.
func (t target) wrapUnderFresh(m wrapMechanism) func(*session) (bool, error) {
	return func(s *session) (bool, error) {
		h := freshKey(s)
		if h == 0 {
			return false, nil // a token that makes no such key cannot be attacked with one
		}
		mech, done := m.with(make([]byte, 16), nil)
		defer done()
		_, err := s.p11.WrapKey(s.h, mech, h, t.handle(s))
		return refused(err)
	}
}

func wrapUnderWrapping(m wrapMechanism, key func(*session) pkcs11.ObjectHandle) func(*session) (bool, error) {
	return func(s *session) (bool, error) {
		h := key(s)
		if h == 0 {
			return false, nil // a token that makes no extractable keys has none to lose
		}
		mech, done := m.with(make([]byte, 16), []byte{0xff})
		defer done()
		_, err := s.p11.WrapKey(s.h, mech, s.keys.wrapping, h)
		return refused(err)
	}
}

// unwrapReadable re-imports a blob as a readable key. Under GCM the blob is a
// genuine one; under the others none can be made without the key, so a token
// that complains about the blob, and not about the key, the mechanism or the
// template, has got past the permission, which is as bad.
func unwrapReadable(m wrapMechanism) func(*session) (bool, error) {
	return func(s *session) (bool, error) {
		iv, aad, blob := make([]byte, 16), []byte{0xff}, make([]byte, 48)
		if m.mech == pkcs11.CKM_AES_GCM {
			own, err := s.seal(aad, make([]byte, 32))
			if err != nil {
				return false, err
			}
			iv, blob = own.iv, own.box
		}
		mech, done := m.with(iv, aad)
		defer done()
		h, err := s.p11.UnwrapKey(s.h, mech, s.keys.wrapping, blob, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
			pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET),
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
			pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
			pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, false),
			pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true),
		})
		if err == nil {
			_ = s.p11.DestroyObject(s.h, h) // a session object: it goes with the session at the latest
		}
		if isLost(err) {
			return false, err
		}
		return !isRV(err, pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED, pkcs11.CKR_ACTION_PROHIBITED, pkcs11.CKR_KEY_TYPE_INCONSISTENT,
			pkcs11.CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT, pkcs11.CKR_UNWRAPPING_KEY_HANDLE_INVALID,
			pkcs11.CKR_MECHANISM_INVALID, pkcs11.CKR_MECHANISM_PARAM_INVALID, pkcs11.CKR_FUNCTION_NOT_SUPPORTED,
			pkcs11.CKR_TEMPLATE_INCONSISTENT, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID, pkcs11.CKR_ATTRIBUTE_READ_ONLY), nil
	}
}

// crossUses make one key do another's work. An Init that succeeds is enough.
func crossUses() []attack {
	sign := func(t target, name string, mech uint) attack {
		return attack{fmt.Sprintf("sign with the %s key and %s", t.name, name), func(s *session) (bool, error) {
			return refused(s.p11.SignInit(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(mech, nil)}, t.handle(s)))
		}}
	}
	derive := attack{"derive with the signing key", func(s *session) (bool, error) {
		point, err := s.point(s.keys.agreementPub)
		if err != nil {
			return false, err
		}
		_, err = s.derive(s.keys.signing, point)
		return refused(err)
	}}
	deriveWrapping := attack{"derive with the wrapping key", func(s *session) (bool, error) {
		data := make([]byte, 32)
		var pin runtime.Pinner
		defer pin.Unpin()
		pin.Pin(&data[0])
		param := binary.NativeEndian.AppendUint64(nil, uint64(uintptr(unsafe.Pointer(&data[0])))) // CK_KEY_DERIVATION_STRING_DATA
		param = binary.NativeEndian.AppendUint64(param, uint64(len(data)))
		_, err := s.p11.DeriveKey(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_ECB_ENCRYPT_DATA, param)},
			s.keys.wrapping, []*pkcs11.Attribute{
				pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
				pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET),
				pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32),
				pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
				pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, false),
				pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true),
			})
		return refused(err)
	}}
	return []attack{
		sign(targets[0], "CKM_ECDSA", pkcs11.CKM_ECDSA),
		sign(targets[2], "CKM_AES_CMAC", pkcs11.CKM_AES_CMAC),
		derive, deriveWrapping,
	}
}
