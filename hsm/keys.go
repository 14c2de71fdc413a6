package hsm

import (
	"bytes"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/binary"
	"fmt"

	"github.com/miekg/pkcs11"
)

// Mechanism and attribute numbers by their place in a template.
const (
	mechAgreement = pkcs11.CKM_ECDH1_DERIVE
	mechSigning   = pkcs11.CKM_ECDSA
	mechWrapping  = pkcs11.CKM_AES_GCM
)

// role is one of the three device keys.
type role struct {
	name     string
	mech     uint
	class    uint   // of the secret or private object
	keyType  uint   // CKK_
	generate uint   // mechanism that makes it
	may      []uint // the usage attributes that are true; all others are false
	pubMay   []uint // the same for the public object
}

var (
	agreementRole = role{"agreement", mechAgreement, pkcs11.CKO_PRIVATE_KEY, pkcs11.CKK_EC,
		pkcs11.CKM_EC_KEY_PAIR_GEN, []uint{pkcs11.CKA_DERIVE}, nil}
	signingRole = role{"signing", mechSigning, pkcs11.CKO_PRIVATE_KEY, pkcs11.CKK_EC,
		pkcs11.CKM_EC_KEY_PAIR_GEN, []uint{pkcs11.CKA_SIGN}, []uint{pkcs11.CKA_VERIFY}}
	wrappingRole = role{"wrapping", mechWrapping, pkcs11.CKO_SECRET_KEY, pkcs11.CKK_AES,
		pkcs11.CKM_AES_KEY_GEN, []uint{pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT}, nil}
	roles = []role{agreementRole, signingRole, wrappingRole}
)

// Usage attributes by object class. Every one is written down in a template:
// what is left out defaults to whatever the token likes.
var (
	privateUses = []uint{pkcs11.CKA_DECRYPT, pkcs11.CKA_SIGN, pkcs11.CKA_SIGN_RECOVER, pkcs11.CKA_UNWRAP, pkcs11.CKA_DERIVE}
	secretUses  = []uint{pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT, pkcs11.CKA_SIGN, pkcs11.CKA_VERIFY, pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP, pkcs11.CKA_DERIVE}
	publicUses  = []uint{pkcs11.CKA_ENCRYPT, pkcs11.CKA_VERIFY, pkcs11.CKA_VERIFY_RECOVER, pkcs11.CKA_WRAP, pkcs11.CKA_DERIVE}
)

func (r role) uses() []uint {
	if r.class == pkcs11.CKO_SECRET_KEY {
		return secretUses
	}
	return privateUses
}

func (r role) label(prefix string) string { return prefix + "-" + r.name }

// id is CKA_ID: it tells the key from one that merely has the same label.
func (r role) id(prefix string) []byte {
	h := sha256.Sum256([]byte("conclave device key\x00" + r.name + "\x00" + prefix))
	return h[:16]
}

func contains(list []uint, x uint) bool {
	for _, v := range list {
		if v == x {
			return true
		}
	}
	return false
}

// flag is a boolean attribute with the value that it must have.
type flag struct {
	typ  uint
	want bool
}

// flags are the boolean attributes of the private or secret object that a
// template sets.
func (r role) flags() []flag {
	f := []flag{{pkcs11.CKA_TOKEN, true}, {pkcs11.CKA_PRIVATE, true}, {pkcs11.CKA_SENSITIVE, true},
		{pkcs11.CKA_EXTRACTABLE, false}, {pkcs11.CKA_MODIFIABLE, false}}
	for _, u := range r.uses() {
		f = append(f, flag{u, contains(r.may, u)})
	}
	return f
}

// dialect says which of the newer attributes a token takes: newerFlags (PKCS#11
// 2.40) and CKA_ALLOWED_MECHANISMS. One that does not know them gets the
// template without.
type dialect struct{ flags, mechanisms bool }

var newerFlags = []flag{{pkcs11.CKA_COPYABLE, false}, {pkcs11.CKA_DESTROYABLE, false}}

// historyFlags are set by the token: made inside, never readable.
var historyFlags = []flag{{pkcs11.CKA_LOCAL, true}, {pkcs11.CKA_ALWAYS_SENSITIVE, true}, {pkcs11.CKA_NEVER_EXTRACTABLE, true}}

func (r role) allowed() []byte {
	b := make([]byte, 8)
	binary.NativeEndian.PutUint64(b, uint64(r.mech)) // CK_MECHANISM_TYPE[1]
	return b
}

func attrs(fs []flag) []*pkcs11.Attribute {
	var a []*pkcs11.Attribute
	for _, f := range fs {
		a = append(a, pkcs11.NewAttribute(f.typ, f.want))
	}
	return a
}

// templates returns the public template (nil for the wrapping key) and the
// private or secret one.
func (r role) templates(prefix string, crv curve, dl dialect) (pub, priv []*pkcs11.Attribute) {
	name := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, r.label(prefix)),
		pkcs11.NewAttribute(pkcs11.CKA_ID, r.id(prefix)),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, r.keyType),
	}
	priv = append(priv, pkcs11.NewAttribute(pkcs11.CKA_CLASS, r.class))
	priv = append(append(priv, name...), attrs(r.flags())...)
	if dl.flags {
		priv = append(priv, attrs(newerFlags)...)
	}
	if dl.mechanisms {
		priv = append(priv, pkcs11.NewAttribute(pkcs11.CKA_ALLOWED_MECHANISMS, r.allowed()))
	}
	if r.class == pkcs11.CKO_SECRET_KEY {
		return nil, append(priv, pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32))
	}
	pub = append(pub, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY))
	pub = append(append(pub, name...),
		pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, crv.oid),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false),
		pkcs11.NewAttribute(pkcs11.CKA_MODIFIABLE, false))
	for _, u := range publicUses {
		pub = append(pub, pkcs11.NewAttribute(u, contains(r.pubMay, u)))
	}
	return pub, priv
}

// findKey returns the one object of a class that carries the role's label and id.
func (s *session) findKey(r role, prefix string, class uint) (pkcs11.ObjectHandle, error) {
	got, err := s.find([]*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, class),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, r.label(prefix)),
		pkcs11.NewAttribute(pkcs11.CKA_ID, r.id(prefix)),
	})
	switch {
	case err != nil:
		return 0, err
	case len(got) == 0:
		return 0, fmt.Errorf("%w: no %q (provision the token first)", ErrNotProvisioned, r.label(prefix))
	case len(got) > 1:
		return 0, unsafef("%d objects are called %q", len(got), r.label(prefix))
	}
	return got[0], nil
}

func (s *session) findKeys(prefix string) error {
	for _, k := range []struct {
		r     role
		class uint
		h     *pkcs11.ObjectHandle
	}{
		{agreementRole, pkcs11.CKO_PRIVATE_KEY, &s.keys.agreement},
		{agreementRole, pkcs11.CKO_PUBLIC_KEY, &s.keys.agreementPub},
		{signingRole, pkcs11.CKO_PRIVATE_KEY, &s.keys.signing},
		{signingRole, pkcs11.CKO_PUBLIC_KEY, &s.keys.signingPub},
		{wrappingRole, pkcs11.CKO_SECRET_KEY, &s.keys.wrapping},
	} {
		h, err := s.findKey(k.r, prefix, k.class)
		if err != nil {
			return err
		}
		*k.h = h
	}
	return nil
}

// point reads the uncompressed point of a public key. CKA_EC_POINT is a DER
// OCTET STRING; some libraries give the bare point.
func (s *session) point(pub pkcs11.ObjectHandle) ([]byte, error) {
	v, err := s.attribute(pub, pkcs11.CKA_EC_POINT)
	if err != nil {
		return nil, err
	}
	return decodePoint(v, s.curve)
}

func decodePoint(v []byte, crv curve) ([]byte, error) {
	n := 1 + 2*crv.size
	if len(v) == n && v[0] == 4 {
		return v, nil
	}
	var p []byte
	if rest, err := asn1.Unmarshal(v, &p); err != nil || len(rest) != 0 || len(p) != n || p[0] != 4 {
		return nil, unsafef("a public key is not an uncompressed point on %s", crv.name)
	}
	return p, nil
}

// checkAttributes reads every attribute of the template back and refuses a key
// that is looser in any of them.
func (s *session) checkAttributes(r role, h pkcs11.ObjectHandle) error {
	must := append(r.flags(), historyFlags...)
	for _, f := range append(must, newerFlags...) {
		v, err := s.attribute(h, f.typ)
		if isRV(err, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID) && contains([]uint{pkcs11.CKA_COPYABLE, pkcs11.CKA_DESTROYABLE, pkcs11.CKA_SIGN_RECOVER}, f.typ) {
			continue // the token does not know it; the attacks of the self test decide
		}
		if err != nil {
			return err
		}
		if len(v) != 1 || (v[0] != 0) != f.want {
			return unsafef("the %s key has %s other than %v", r.name, attributeName(f.typ), f.want)
		}
	}
	v, err := s.attribute(h, pkcs11.CKA_ALLOWED_MECHANISMS)
	switch {
	case isRV(err, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID):
	case err != nil:
		return err
	case !bytes.Equal(v, r.allowed()):
		return unsafef("the %s key allows other mechanisms than its own", r.name)
	}
	return s.checkShape(r, h)
}

// checkShape verifies key type and curve or length.
func (s *session) checkShape(r role, h pkcs11.ObjectHandle) error {
	typ, want := uint(pkcs11.CKA_EC_PARAMS), s.curve.oid
	if r.class == pkcs11.CKO_SECRET_KEY {
		typ, want = pkcs11.CKA_VALUE_LEN, pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32).Value
	}
	kt, err := s.attribute(h, pkcs11.CKA_KEY_TYPE)
	if err != nil {
		return err
	}
	v, err := s.attribute(h, typ)
	if err != nil {
		return err
	}
	if !bytes.Equal(kt, pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, r.keyType).Value) || !bytes.Equal(v, want) {
		if r.class == pkcs11.CKO_SECRET_KEY {
			return unsafef("the %s key is not AES-256", r.name)
		}
		return invalidf("the %s key is not on %s: the token was provisioned with another curve than the configured one", r.name, s.curve.name)
	}
	return nil
}

func attributeName(typ uint) string {
	for _, n := range []struct {
		typ  uint
		name string
	}{
		{pkcs11.CKA_TOKEN, "CKA_TOKEN"}, {pkcs11.CKA_PRIVATE, "CKA_PRIVATE"},
		{pkcs11.CKA_SENSITIVE, "CKA_SENSITIVE"}, {pkcs11.CKA_EXTRACTABLE, "CKA_EXTRACTABLE"},
		{pkcs11.CKA_MODIFIABLE, "CKA_MODIFIABLE"}, {pkcs11.CKA_COPYABLE, "CKA_COPYABLE"},
		{pkcs11.CKA_DESTROYABLE, "CKA_DESTROYABLE"}, {pkcs11.CKA_LOCAL, "CKA_LOCAL"},
		{pkcs11.CKA_ALWAYS_SENSITIVE, "CKA_ALWAYS_SENSITIVE"}, {pkcs11.CKA_NEVER_EXTRACTABLE, "CKA_NEVER_EXTRACTABLE"},
		{pkcs11.CKA_ENCRYPT, "CKA_ENCRYPT"}, {pkcs11.CKA_DECRYPT, "CKA_DECRYPT"},
		{pkcs11.CKA_SIGN, "CKA_SIGN"}, {pkcs11.CKA_SIGN_RECOVER, "CKA_SIGN_RECOVER"},
		{pkcs11.CKA_VERIFY, "CKA_VERIFY"}, {pkcs11.CKA_WRAP, "CKA_WRAP"},
		{pkcs11.CKA_UNWRAP, "CKA_UNWRAP"}, {pkcs11.CKA_DERIVE, "CKA_DERIVE"},
	} {
		if n.typ == typ {
			return n.name
		}
	}
	return fmt.Sprintf("attribute %#x", typ)
}
