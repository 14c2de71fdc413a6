package pqc

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"

	"filippo.io/age"
	"filippo.io/age/armor"

	"github.com/conclave-kms/conclave/kms/secret"
)

// Work factors of scrypt as powers of two. 2^18 takes about a second and 256
// MiB; a file that asks for more than 2^20 is refused.
const (
	DefaultWorkFactor = 18
	MinWorkFactor     = 10
	MaxWorkFactor     = 20
)

const (
	keyFileMagic  = "conclave-custodian-secret-1\n"
	keyFileLen    = len(keyFileMagic) + 2 + HybridSeedSize
	maxKeyFile    = 16 << 10
	publicKeyName = "conclave-custodian-key-1"
)

var (
	// ErrPassphrase reports a passphrase that does not open the key file. A
	// damaged header can look the same.
	ErrPassphrase = errors.New("pqc: wrong passphrase")

	// ErrKeyFile reports a key file or public line that is damaged or of
	// another format.
	ErrKeyFile = errors.New("pqc: not a valid custodian key file")
)

// KeyFileOptions tunes EncryptKeyFile. The zero value is the safe default.
type KeyFileOptions struct {
	// WorkFactor is scrypt's cost as a power of two, MinWorkFactor to
	// MaxWorkFactor; 0 means DefaultWorkFactor. Lower it for tests only.
	WorkFactor int
}

// EncryptKeyFile returns the custodian key file: an ASCII-armoured age file
// (age-encryption.org/v1, scrypt recipient) that holds the key's seed. Errors:
// ErrPassphrase for an empty one, ErrKey after Destroy, a work factor out of
// range.
func EncryptKeyFile(k *HybridKey, passphrase *secret.Bytes, opts KeyFileOptions) ([]byte, error) {
	if opts.WorkFactor == 0 {
		opts.WorkFactor = DefaultWorkFactor
	}
	if opts.WorkFactor < MinWorkFactor || opts.WorkFactor > MaxWorkFactor {
		return nil, fmt.Errorf("pqc: scrypt work factor %d is not between %d and %d", opts.WorkFactor, MinWorkFactor, MaxWorkFactor)
	}
	if passphrase.Len() == 0 {
		return nil, fmt.Errorf("%w: it is empty", ErrPassphrase)
	}
	if k.seed.Len() != HybridSeedSize {
		return nil, fmt.Errorf("%w: it was destroyed", ErrKey)
	}
	recipient, err := age.NewScryptRecipient(string(passphrase.Reveal()))
	runtime.KeepAlive(passphrase)
	if err != nil {
		return nil, fmt.Errorf("pqc: passphrase: %w", err)
	}
	recipient.SetWorkFactor(opts.WorkFactor)
	payload, err := keyFilePayload(k.seed)
	runtime.KeepAlive(k)
	if err != nil {
		return nil, err
	}
	defer payload.Destroy()
	return encryptArmored(recipient, payload.Reveal())
}

// keyFilePayload is magic ‖ suite id (2 bytes, big endian) ‖ seed (64 bytes).
func keyFilePayload(seed *secret.Bytes) (*secret.Bytes, error) {
	payload, err := secret.New(keyFileLen)
	if err != nil {
		return nil, err
	}
	b := payload.Reveal()
	n := copy(b, keyFileMagic)
	binary.BigEndian.PutUint16(b[n:], uint16(MLDSA65Ed25519))
	copy(b[n+2:], seed.Reveal())
	return payload, nil
}

func encryptArmored(recipient age.Recipient, payload []byte) ([]byte, error) {
	var out bytes.Buffer
	a := armor.NewWriter(&out)
	w, err := age.Encrypt(a, recipient)
	if err != nil {
		return nil, fmt.Errorf("pqc: encrypt key file: %w", err)
	}
	if _, err := w.Write(payload); err != nil {
		return nil, fmt.Errorf("pqc: encrypt key file: %w", err)
	}
	if err := errors.Join(w.Close(), a.Close()); err != nil {
		return nil, fmt.Errorf("pqc: encrypt key file: %w", err)
	}
	return out.Bytes(), nil
}

// DecryptKeyFile opens a custodian key file. Errors: ErrPassphrase,
// ErrKeyFile.
func DecryptKeyFile(b []byte, passphrase *secret.Bytes) (*HybridKey, error) {
	return decryptKeyFile(b, passphrase, MaxWorkFactor)
}

func decryptKeyFile(b []byte, passphrase *secret.Bytes, maxWorkFactor int) (*HybridKey, error) {
	if len(b) > maxKeyFile {
		return nil, fmt.Errorf("%w: longer than %d bytes", ErrKeyFile, maxKeyFile)
	}
	if passphrase.Len() == 0 {
		return nil, fmt.Errorf("%w: it is empty", ErrPassphrase)
	}
	identity, err := age.NewScryptIdentity(string(passphrase.Reveal()))
	runtime.KeepAlive(passphrase)
	if err != nil {
		return nil, fmt.Errorf("pqc: passphrase: %w", err)
	}
	identity.SetMaxWorkFactor(maxWorkFactor)
	r, err := age.Decrypt(armor.NewReader(bytes.NewReader(b)), identity)
	if err != nil {
		return nil, keyFileError(err)
	}
	payload, err := secret.New(keyFileLen)
	if err != nil {
		return nil, err
	}
	defer payload.Destroy()
	if _, err := io.ReadFull(r, payload.Reveal()); err != nil {
		return nil, fmt.Errorf("%w: its payload is damaged or too short", ErrKeyFile)
	}
	// Reading to the end authenticates the last chunk and refuses more.
	if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		return nil, fmt.Errorf("%w: its payload is damaged or too long", ErrKeyFile)
	}
	return parseKeyFilePayload(payload.Reveal())
}

func keyFileError(err error) error {
	var none *age.NoIdentityMatchError
	if !errors.As(err, &none) {
		return fmt.Errorf("%w: %v", ErrKeyFile, err)
	}
	if len(none.StanzaTypes) != 1 || none.StanzaTypes[0] != "scrypt" {
		return fmt.Errorf("%w: it is not encrypted with a passphrase", ErrKeyFile)
	}
	return ErrPassphrase
}

func parseKeyFilePayload(b []byte) (*HybridKey, error) {
	rest, ok := bytes.CutPrefix(b, []byte(keyFileMagic))
	if !ok || len(rest) != 2+HybridSeedSize || SuiteID(binary.BigEndian.Uint16(rest)) != MLDSA65Ed25519 {
		return nil, fmt.Errorf("%w: its content is of another version or suite", ErrKeyFile)
	}
	seed, err := secret.Copy(rest[2:])
	if err != nil {
		return nil, err
	}
	defer seed.Destroy()
	return NewHybridKey(seed)
}

// MarshalPublic returns the public line of a custodian's key of a signature suite:
// "conclave-custodian-key-1 " ‖ base64(suite id ‖ public key) ‖ "\n".
// Errors: ErrSuite, ErrPublicKey.
func MarshalPublic(suite SuiteID, pub []byte) ([]byte, error) {
	s, err := lookupKind(suite, Signature)
	if err != nil {
		return nil, err
	}
	if len(pub) != s.PublicKeySize {
		return nil, fmt.Errorf("%w: %v has %d bytes, not %d", ErrPublicKey, s.ID, s.PublicKeySize, len(pub))
	}
	raw := binary.BigEndian.AppendUint16(nil, uint16(suite))
	raw = append(raw, pub...)
	out := base64.StdEncoding.AppendEncode([]byte(publicKeyName+" "), raw)
	return append(out, '\n'), nil
}

// ParsePublic reads the public line that MarshalPublic writes, with or without
// its newline, and returns the suite and the public key. Nothing else is accepted.
// Errors: ErrKeyFile.
func ParsePublic(line []byte) (SuiteID, []byte, error) {
	text, ok := bytes.CutPrefix(bytes.TrimSuffix(line, []byte("\n")), []byte(publicKeyName+" "))
	if !ok {
		return 0, nil, fmt.Errorf("%w: a public key line begins with %q", ErrKeyFile, publicKeyName)
	}
	// The decoder skips line breaks inside the text; a line has none.
	if len(text) > maxKeyFile || bytes.ContainsAny(text, "\r\n") {
		return 0, nil, fmt.Errorf("%w: the public key line has the wrong length", ErrKeyFile)
	}
	raw, err := base64.StdEncoding.Strict().AppendDecode(nil, text)
	if err != nil || len(raw) < 2 {
		return 0, nil, fmt.Errorf("%w: the public key line is not valid base64", ErrKeyFile)
	}
	s, err := lookupKind(SuiteID(binary.BigEndian.Uint16(raw)), Signature)
	if err != nil || len(raw) != 2+s.PublicKeySize {
		return 0, nil, fmt.Errorf("%w: it is no public key of a signature suite", ErrKeyFile)
	}
	return s.ID, raw[2:], nil
}

// Fingerprint names a public key of any suite for people:
// "SHA256:" ‖ base64 without padding of SHA-256(pub).
func Fingerprint(pub []byte) string {
	sum := sha256.Sum256(pub)
	return "SHA256:" + base64.RawStdEncoding.EncodeToString(sum[:])
}
