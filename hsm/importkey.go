package hsm

import (
	"crypto/ecdh"
	"crypto/rand"
	"crypto/sha256"
	"fmt"

	"github.com/conclave-kms/conclave/kms/secret"
	kwp "github.com/tink-crypto/tink-go/v2/kwp/subtle"
)

// ImportKind is the kind that ImportKey of a PKCS#11 token returns: ECDH with an
// ephemeral key and AES-KWP (RFC 5649).
const ImportKind = "pkcs11-ecdh-kwp"

// Sizes of imported keys.
const (
	HMACKey  = 32       // bytes of an HMAC-SHA-256 key
	MaxLabel = 64       // bytes of label that WrapHMAC and WrapSigner take
	MaxMAC   = 64 << 10 // bytes of message that an HMAC closure takes

	importVersion = 1
	headerSize    = 4 // version, material, KDF, length of the label
	kekSize       = 32
)

// material says what a blob holds.
type material byte

const (
	materialHMAC material = 1
	materialP256 material = 2
	materialP384 material = 3
	// The same keys as some tokens write them.
	materialP256Public material = 4 // PKCS#8 with the public key
	materialP384Public material = 5
	materialP256Padded material = 6 // PKCS#8 and zeros up to a multiple of 8 bytes: SoftHSM
)

// kdf says how the transport key comes from the shared secret Z.
type kdf byte

const (
	kdfNull   kdf = 1 // the last 32 bytes of Z: CKD_NULL of PKCS#11, which truncates at the leading end
	kdfSHA256 kdf = 2 // ANSI X9.63 with SHA-256: CKD_SHA256_KDF
)

// Beginnings of PKCS#8 PrivateKeyInfo (RFC 5208) around ECPrivateKey (RFC 5915)
// with neither parameters nor public key; the scalar follows.
var (
	pkcs8P256 = []byte{0x30, 0x41, 0x02, 0x01, 0x00, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01,
		0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x04, 0x27, 0x30, 0x25, 0x02, 0x01, 0x01, 0x04, 0x20}
	pkcs8P384 = []byte{0x30, 0x4e, 0x02, 0x01, 0x00, 0x30, 0x10, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01,
		0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22, 0x04, 0x37, 0x30, 0x35, 0x02, 0x01, 0x01, 0x04, 0x30}
)

// Lengths of the same with the public key as [1] BIT STRING of an uncompressed point,
// and with zeros after it.
const (
	pkcs8P256Public = 138
	pkcs8P384Public = 185
	pkcs8P256Padded = 72
)

// size is the length of the plain material, 0 for one that is not known.
func (m material) size() int {
	switch m {
	case materialHMAC:
		return HMACKey
	case materialP256:
		return len(pkcs8P256) + 32
	case materialP384:
		return len(pkcs8P384) + 48
	case materialP256Public:
		return pkcs8P256Public
	case materialP384Public:
		return pkcs8P384Public
	case materialP256Padded:
		return pkcs8P256Padded
	}
	return 0
}

// bare is the material of the same kind of key as WrapHMAC and WrapSigner write it.
func (m material) bare() material {
	switch m {
	case materialP256Public, materialP256Padded:
		return materialP256
	case materialP384Public:
		return materialP384
	}
	return m
}

// forms are the ways to write a key of the same kind.
func (m material) forms() []material {
	switch m.bare() {
	case materialP256:
		return []material{materialP256, materialP256Padded, materialP256Public}
	case materialP384:
		return []material{materialP384, materialP384Public}
	}
	return []material{m}
}

// wrappedSize is the length of the material under KWP (RFC 5649 section 3).
func (m material) wrappedSize() int { return (m.size()+7)/8*8 + 8 }

// signer returns the material of a signing key on a curve.
func signerOf(c ecdh.Curve) (material, []byte, error) {
	switch c {
	case ecdh.P256():
		return materialP256, pkcs8P256, nil
	case ecdh.P384():
		return materialP384, pkcs8P384, nil
	}
	return 0, nil, invalidf("a signing key is on neither P-256 nor P-384")
}

// imported is a blob in its parts. The point is on its curve.
type imported struct {
	material material
	kdf      kdf
	header   []byte // version, material, KDF, label
	point    []byte // ephemeral, uncompressed
	wrapped  []byte
}

// sharedInfo is what the KDF mixes in besides Z.
func (in imported) sharedInfo() []byte {
	if in.kdf == kdfNull {
		return nil
	}
	return append([]byte("conclave device import\x00"), in.header...)
}

func (in imported) bytes() []byte {
	return append(append(append([]byte(nil), in.header...), in.point...), in.wrapped...)
}

// parseImport cuts a blob for an agreement key on crv into copies of its parts
// and refuses whatever WrapHMAC and WrapSigner do not write. Lengths are checked
// here because tokens (SoftHSM) take wrong ones.
func parseImport(b []byte, crv curve) (imported, error) {
	if len(b) < headerSize || b[0] != importVersion {
		return imported{}, errImport
	}
	m, k, label := material(b[1]), kdf(b[2]), int(b[3])
	known := k == kdfNull && label == 0 || k == kdfSHA256 && label <= MaxLabel
	points := 1 + 2*crv.size
	if !known || m.size() == 0 || len(b) != headerSize+label+points+m.wrappedSize() {
		return imported{}, errImport
	}
	b = append([]byte(nil), b...)
	at := headerSize + label
	in := imported{m, k, b[:at:at], b[at : at+points : at+points], b[at+points:]}
	if _, err := crv.ecdh.NewPublicKey(in.point); err != nil {
		return imported{}, errImport
	}
	return in, nil
}

var errImport = invalidf("the key blob does not open: it was altered, or wrapped for another device or another kind of key")

// WrapHMAC wraps a 32-byte HMAC-SHA-256 key for the device whose ImportKey
// returned public; LoadHMAC of that device alone opens it. label, 0 to MaxLabel
// bytes, is bound to the blob where the device has CKD_SHA256_KDF and left out
// where it has not. key stays as it is. Every failure is ErrInvalid but for that to
// lock memory, ErrUnavailable.
func WrapHMAC(public []byte, key *secret.Bytes, label []byte) ([]byte, error) {
	if key.Len() != HMACKey {
		return nil, invalidf("WrapHMAC: the key has %d bytes, %d are needed", key.Len(), HMACKey)
	}
	return wrapMaterial(public, materialHMAC, key, label)
}

// WrapSigner is WrapHMAC for the private key of an ECDSA key on ecdh.P256() or
// ecdh.P384(): scalar is big-endian, 32 or 48 bytes, above 0 and below the order.
func WrapSigner(public []byte, c ecdh.Curve, scalar *secret.Bytes, label []byte) ([]byte, error) {
	m, prefix, err := signerOf(c)
	if err != nil {
		return nil, err
	}
	crv, err := curveOf(c)
	if err != nil {
		return nil, err
	}
	if !validScalar(scalar.Reveal(), crv) {
		return nil, invalidf("WrapSigner: the private key is not one on %s", crv.name)
	}
	der, err := secret.New(m.size())
	if err != nil {
		return nil, unavailablef("%v", err)
	}
	defer der.Destroy()
	copy(der.Reveal(), prefix)
	copy(der.Reveal()[len(prefix):], scalar.Reveal())
	return wrapMaterial(public, m, der, label)
}

// validScalar reports whether 0 < d < n, without a copy of d and in constant time
// for one length. The standard library would do it on a copy that cannot be wiped.
func validScalar(d []byte, crv curve) bool {
	if len(d) != crv.size {
		return false
	}
	n := crv.ec.Params().N.FillBytes(make([]byte, crv.size))
	borrow, any := 0, byte(0)
	for i := len(d) - 1; i >= 0; i-- {
		borrow = (int(d[i]) - int(n[i]) - borrow) >> 8 & 1
		any |= d[i]
	}
	return borrow == 1 && any != 0
}

// recipient is what ImportKey publishes: version ‖ KDF ‖ SEC1 uncompressed point.
type recipient struct {
	kdf kdf
	key *ecdh.PublicKey
}

func (r recipient) bytes() []byte {
	return append([]byte{importVersion, byte(r.kdf)}, r.key.Bytes()...)
}

func parseRecipient(b []byte) (recipient, error) {
	bad := invalidf("the import key is not one of kind %s", ImportKind)
	if len(b) < 2 || b[0] != importVersion || kdf(b[1]) != kdfNull && kdf(b[1]) != kdfSHA256 {
		return recipient{}, bad
	}
	var c ecdh.Curve
	switch len(b) - 2 {
	case 65:
		c = ecdh.P256()
	case 97:
		c = ecdh.P384()
	default:
		return recipient{}, bad
	}
	key, err := c.NewPublicKey(b[2:])
	if err != nil {
		return recipient{}, bad
	}
	return recipient{kdf(b[1]), key}, nil
}

// wrapMaterial seals the material to the recipient under a fresh ephemeral key.
func wrapMaterial(public []byte, m material, plain *secret.Bytes, label []byte) ([]byte, error) {
	to, err := parseRecipient(public)
	if err != nil {
		return nil, err
	}
	if len(label) > MaxLabel {
		return nil, invalidf("the label has %d bytes, at most %d are possible", len(label), MaxLabel)
	}
	if to.kdf == kdfNull {
		label = nil // nothing would bind it
	}
	eph, err := to.key.Curve().GenerateKey(rand.Reader)
	if err != nil {
		return nil, unavailablef("%v", err)
	}
	z, err := eph.ECDH(to.key)
	if err != nil {
		return nil, invalidf("the import key does not agree: %v", err)
	}
	defer secret.Wipe(z)
	in := imported{material: m, kdf: to.kdf, point: eph.PublicKey().Bytes(),
		header: append([]byte{importVersion, byte(m), byte(to.kdf), byte(len(label))}, label...)}
	kek := in.transport(z)
	defer secret.Wipe(kek)
	box, err := kwp.NewKWP(kek)
	if err != nil {
		return nil, fmt.Errorf("%w: KWP: %w", ErrInvalid, err)
	}
	if in.wrapped, err = box.Wrap(plain.Reveal()); err != nil {
		return nil, fmt.Errorf("%w: KWP: %w", ErrInvalid, err)
	}
	return in.bytes(), nil
}

// transport is the AES-256 key that the token derives from Z too. The caller
// wipes it.
func (in imported) transport(z []byte) []byte {
	if in.kdf == kdfNull {
		return append([]byte(nil), z[len(z)-kekSize:]...)
	}
	h := sha256.New() // X9.63: one block is enough
	_, _ = h.Write(z)
	_, _ = h.Write([]byte{0, 0, 0, 1})
	_, _ = h.Write(in.sharedInfo())
	return h.Sum(nil)
}
