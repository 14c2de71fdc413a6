package hsm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"
)

// Numbers that the binding lacks or names otherwise.
const (
	ckdSHA256KDF     = 0x06   // CKD_SHA256_KDF
	ckmAESKeyWrapKWP = 0x210b // CKM_AES_KEY_WRAP_KWP of PKCS#11 3.0; 0x210a was KWP before, in SoftHSM too
)

// importProfile is how a token takes imported keys, found out at Open.
type importProfile struct {
	mech    uint // of C_UnwrapKey
	kdf     kdf  // the one to publish
	dialect dialect
	signers bool // EC private keys can be imported

	generates generation // what the token makes and wraps by itself
}

// roles of the session objects of an import.
var (
	transportRole = role{"transport", 0, pkcs11.CKO_SECRET_KEY, pkcs11.CKK_AES, 0, []uint{pkcs11.CKA_UNWRAP}, nil}
	hmacRole      = role{"loaded HMAC", pkcs11.CKM_SHA256_HMAC, pkcs11.CKO_SECRET_KEY, pkcs11.CKK_GENERIC_SECRET, 0, []uint{pkcs11.CKA_SIGN}, nil}
	signerRole    = role{"loaded signing", pkcs11.CKM_ECDSA, pkcs11.CKO_PRIVATE_KEY, pkcs11.CKK_EC, 0, []uint{pkcs11.CKA_SIGN}, nil}
)

func (m material) role() role {
	if m == materialHMAC {
		return hmacRole
	}
	return signerRole
}

// sessionFlags are the boolean attributes of an object of an import: those of a
// device key, but gone with its session.
func (r role) sessionFlags(leaves exit) []flag {
	f := r.flags()
	f[0] = flag{pkcs11.CKA_TOKEN, false}
	f[3] = flag{pkcs11.CKA_EXTRACTABLE, bool(leaves)}
	return f
}

// exit says whether an object may leave the token, wrapped.
type exit bool

const (
	stays exit = false
	wraps exit = true
)

// sessionTemplate leaves CKA_DESTROYABLE alone: these objects have to go.
// CKA_MODIFIABLE comes last: SoftHSM applies a template of C_DeriveKey and
// C_UnwrapKey in order and takes nothing more after it.
func (r role) sessionTemplate(dl dialect, leaves exit, more ...*pkcs11.Attribute) []*pkcs11.Attribute {
	t := append([]*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, r.class),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, r.keyType),
	}, more...)
	if dl.mechanisms {
		t = append(t, pkcs11.NewAttribute(pkcs11.CKA_ALLOWED_MECHANISMS, r.allowed()))
	}
	for _, f := range r.sessionFlags(leaves) {
		if f.typ != pkcs11.CKA_MODIFIABLE {
			t = append(t, pkcs11.NewAttribute(f.typ, f.want))
		}
	}
	if dl.flags {
		t = append(t, pkcs11.NewAttribute(pkcs11.CKA_COPYABLE, false))
	}
	return append(t, pkcs11.NewAttribute(pkcs11.CKA_MODIFIABLE, false))
}

// errUnwrap marks a failure of C_UnwrapKey.
var errUnwrap = errors.New("C_UnwrapKey")

// load makes the session object of a blob: it derives the transport key, unwraps
// under it and destroys it. The object belongs to this session.
func (s *session) load(in imported, p importProfile, leaves exit) (pkcs11.ObjectHandle, error) {
	aes, err := s.deriveTransport(in, p)
	if err != nil {
		return 0, err
	}
	r := in.material.role()
	h, err := s.p11.UnwrapKey(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(p.mech, nil)}, aes, in.wrapped, r.sessionTemplate(p.dialect, leaves))
	if err != nil {
		err = fmt.Errorf("%w: %w", errUnwrap, err)
	}
	if e := s.p11.DestroyObject(s.h, aes); e != nil {
		err = errors.Join(err, fmt.Errorf("C_DestroyObject: %w", e))
		if h != 0 {
			_ = s.p11.DestroyObject(s.h, h) // at the latest it goes with the session
		}
	}
	if err != nil {
		return 0, err
	}
	if err := s.checkLoaded(in.material, h, p.dialect, leaves); err != nil {
		_ = s.p11.DestroyObject(s.h, h) // at the latest it goes with the session
		return 0, err
	}
	return h, nil
}

// deriveTransport derives the AES-256 key that may unwrap and nothing else.
func (s *session) deriveTransport(in imported, p importProfile) (pkcs11.ObjectHandle, error) {
	ckd := uint(pkcs11.CKD_NULL)
	if in.kdf == kdfSHA256 {
		ckd = ckdSHA256KDF
	}
	r := transportRole
	r.mech = p.mech
	h, err := s.p11.DeriveKey(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDH1_DERIVE,
		pkcs11.NewECDH1DeriveParams(ckd, in.sharedInfo(), in.point))}, s.keys.agreement,
		r.sessionTemplate(p.dialect, stays, pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, kekSize)))
	if err != nil {
		return 0, fmt.Errorf("C_DeriveKey: %w", err)
	}
	return h, nil
}

// checkLoaded refuses an object that came out looser or other than its template.
func (s *session) checkLoaded(m material, h pkcs11.ObjectHandle, dl dialect, leaves exit) error {
	r := m.role()
	must := append(r.sessionFlags(leaves), flag{pkcs11.CKA_COPYABLE, false})
	if !dl.flags {
		must = must[:len(must)-1]
	}
	for _, f := range must {
		v, err := s.attribute(h, f.typ)
		if f.typ == pkcs11.CKA_SIGN_RECOVER && isRV(err, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID) {
			continue
		}
		if err != nil {
			return err
		}
		if len(v) != 1 || (v[0] != 0) != f.want {
			return unsafef("a %s key has %s other than %v", r.name, attributeName(f.typ), f.want)
		}
	}
	for _, a := range []struct {
		typ  uint
		want []byte
	}{{pkcs11.CKA_CLASS, ulong(r.class)}, {pkcs11.CKA_KEY_TYPE, ulong(r.keyType)}, {pkcs11.CKA_ALLOWED_MECHANISMS, r.allowed()}} {
		if a.typ == pkcs11.CKA_ALLOWED_MECHANISMS && !dl.mechanisms {
			continue
		}
		v, err := s.attribute(h, a.typ)
		if err != nil {
			return err
		}
		if !bytes.Equal(v, a.want) {
			return unsafef("a %s key came out with other attributes than it was given", r.name)
		}
	}
	return s.checkLoadedShape(m, h)
}

func ulong(v uint) []byte { return binary.NativeEndian.AppendUint64(nil, uint64(v)) }

// checkLoadedShape verifies curve or length. SoftHSM reports a length of 0; there
// the length of the blob and the probe in LoadHMAC stand for it.
func (s *session) checkLoadedShape(m material, h pkcs11.ObjectHandle) error {
	if m != materialHMAC {
		v, err := s.attribute(h, pkcs11.CKA_EC_PARAMS)
		if err != nil {
			return err
		}
		if crv, err := m.curve(); err != nil || !bytes.Equal(v, crv.oid) {
			return errImport
		}
		return nil
	}
	v, err := s.attribute(h, pkcs11.CKA_VALUE_LEN)
	if err != nil && !isRV(err, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID, pkcs11.CKR_ATTRIBUTE_SENSITIVE) {
		return err
	}
	if err == nil && !bytes.Equal(v, ulong(HMACKey)) && !bytes.Equal(v, ulong(0)) {
		return errImport
	}
	return nil
}

// importError tells a blob that does not open from a device that fails, as
// openError does.
func (d *Device) importError(err error) error {
	if !errors.Is(err, errUnwrap) || isLost(err) {
		return err
	}
	if isRV(err, pkcs11.CKR_WRAPPED_KEY_INVALID, pkcs11.CKR_WRAPPED_KEY_LEN_RANGE, pkcs11.CKR_ENCRYPTED_DATA_INVALID, pkcs11.CKR_KEY_SIZE_RANGE) {
		return errImport
	}
	if isRV(err, pkcs11.CKR_HOST_MEMORY, pkcs11.CKR_DEVICE_MEMORY, pkcs11.CKR_MECHANISM_INVALID, pkcs11.CKR_FUNCTION_NOT_SUPPORTED) {
		return err
	}
	s, e := d.openSession(false, true)
	if e == nil {
		e = s.keyWorks()
		s.close()
	}
	if e != nil {
		return errors.Join(errLost, err)
	}
	return errImport
}
