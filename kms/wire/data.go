package wire

import (
	"strconv"
)

// Context is an encryption context: name-value pairs that are bound to a
// ciphertext, are not secret, and must be given again to open it. At most 64
// pairs and 8 KiB. It is written to the access log.
type Context = map[string]string

// EncryptRequest asks for the encryption of Plaintext (at most MaxPlaintext
// bytes) under the key's primary version.
type EncryptRequest struct {
	Plaintext Secret  `json:"plaintext"`
	Context   Context `json:"context,omitempty"`
}

// EncryptResponse answers encrypt and rewrap.
type EncryptResponse struct {
	Ciphertext []byte `json:"ciphertext"` // format 1
	KeyVersion uint32 `json:"key_version"`
}

// DecryptRequest asks for the plaintext of a ciphertext of this key, or of the
// wrapped form of a data key, which is such a ciphertext.
type DecryptRequest struct {
	Ciphertext []byte  `json:"ciphertext"`
	Context    Context `json:"context,omitempty"`
}

// DecryptResponse answers decrypt.
type DecryptResponse struct {
	Plaintext  Secret `json:"plaintext"`
	KeyVersion uint32 `json:"key_version"` // that opened it
}

// RewrapRequest asks for the same plaintext under the primary version, without
// revealing it. The context stays the same.
type RewrapRequest struct {
	Ciphertext []byte  `json:"ciphertext"`
	Context    Context `json:"context,omitempty"`
}

// DataKeyRequest asks for a new random key for the caller's own use.
type DataKeyRequest struct {
	Bytes   int     `json:"bytes,omitempty"` // 16, 32 or 64; default 32
	Context Context `json:"context,omitempty"`
}

// DataKeyResponse answers datakey.
type DataKeyResponse struct {
	Plaintext  Secret `json:"plaintext"`
	Wrapped    []byte `json:"wrapped"` // a ciphertext of Plaintext: decrypt opens it
	KeyVersion uint32 `json:"key_version"`
}

// WrappedDataKeyResponse answers datakey/wrapped.
type WrappedDataKeyResponse struct {
	Wrapped    []byte `json:"wrapped"`
	KeyVersion uint32 `json:"key_version"`
}

// MACRequest asks for HMAC-SHA-256 of Message under the primary version.
type MACRequest struct {
	Message Secret `json:"message"`
}

// MACResponse answers mac.
type MACResponse struct {
	MAC        []byte `json:"mac"` // 32 bytes
	KeyVersion uint32 `json:"key_version"`
}

// VerifyMACRequest asks whether MAC is that of Message under KeyVersion.
type VerifyMACRequest struct {
	Message    Secret `json:"message"`
	MAC        []byte `json:"mac"`
	KeyVersion uint32 `json:"key_version,omitempty"` // 0: the primary
}

// VerifyResponse answers verify-mac and verify. Valid false is an answer, not a
// problem.
type VerifyResponse struct {
	Valid      bool   `json:"valid"`
	KeyVersion uint32 `json:"key_version"`
}

// SignRequest asks for a signature of Message under the primary version. ECDSA
// hashes it with the algorithm's hash; Ed25519 signs it as it is.
type SignRequest struct {
	Message Secret `json:"message"`
}

// SignResponse answers sign.
type SignResponse struct {
	Signature  []byte `json:"signature"` // ECDSA: ASN.1 DER; Ed25519: 64 bytes
	Algorithm  string `json:"algorithm"`
	KeyVersion uint32 `json:"key_version"`
}

// VerifyRequest asks whether Signature is one of Message under KeyVersion.
type VerifyRequest struct {
	Message    Secret `json:"message"`
	Signature  []byte `json:"signature"`
	KeyVersion uint32 `json:"key_version,omitempty"` // 0: the primary
}

// PublicKeyResponse answers GET public-key?version=N.
type PublicKeyResponse struct {
	PublicKey  []byte `json:"public_key"` // SEC1 uncompressed point or Ed25519 key
	PEM        string `json:"pem"`        // the same as SubjectPublicKeyInfo
	Algorithm  string `json:"algorithm"`
	KeyVersion uint32 `json:"key_version"`
	State      string `json:"state"`
}

// ExportRequest asks for a key sealed (HPKE base mode, hybrid suite) to a
// recipient: the data key that Wrapped holds, or else the material of Version.
// Exactly one of the two is given. Material under protection "hardware" never
// leaves.
type ExportRequest struct {
	RecipientSuite     string  `json:"recipient_suite"` // MLKEM1024-P384, MLKEM768-P256 or MLKEM768-X25519
	RecipientPublicKey []byte  `json:"recipient_public_key"`
	Wrapped            []byte  `json:"wrapped,omitempty"`
	Context            Context `json:"context,omitempty"` // of Wrapped
	Version            uint32  `json:"version,omitempty"`
}

// ExportResponse answers export. Sealed opens with info ExportInfo and the AAD
// that ExportAAD returns for these fields and the caller's own identity.
type ExportResponse struct {
	Sealed     []byte `json:"sealed"` // suite id (2 bytes) ‖ encapsulated key ‖ ciphertext
	Suite      string `json:"suite"`
	Cluster    string `json:"cluster"`
	KeyID      string `json:"key_id"`
	KeyVersion uint32 `json:"key_version"` // of the material, or that wrapped the data key
	Kind       string `json:"kind"`        // ExportDataKey or ExportMaterial
	Identity   string `json:"identity"`    // the caller, bound into the seal
}

// What an export holds.
const (
	ExportDataKey  = "datakey"
	ExportMaterial = "material"
)

// ExportInfo is the HPKE info of every export.
const ExportInfo = "conclave/export/v1"

// ExportAAD returns the HPKE AAD of an export: the five fields in this order,
// each followed by a zero byte, the version in decimal. No field contains a zero
// byte, so the encoding is unambiguous.
func ExportAAD(cluster, keyID string, version uint32, kind, identity string) []byte {
	var b []byte
	for _, s := range []string{cluster, keyID, strconv.FormatUint(uint64(version), 10), kind, identity} {
		b = append(b, s...)
		b = append(b, 0)
	}
	return b
}
