package hsm

import (
	"bytes"
	"crypto/ecdh"
	"crypto/elliptic"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
	"unicode"

	"github.com/conclave-kms/conclave/kms/secret"
)

// Defaults of Config.
const (
	DefaultLabel       = "conclave"
	DefaultCallTimeout = 10 * time.Second
	DefaultMaxSessions = 8
	DefaultMaxLoaded   = 256
)

// Config says which token to use and how. The PIN comes from exactly one of
// PIN, PINFile, PINFD and the pin-source of the URI.
type Config struct {
	// URI is a PKCS#11 URI, see ParseURI. It must name the token or its
	// serial number, and the library by module-path.
	URI string

	// PIN is the user PIN itself. It is copied; the caller keeps its own.
	PIN *secret.Bytes
	// PINFile is a file that holds the PIN. Others must not be able to read it.
	PINFile string
	// PINFD is a file descriptor above 2 that is read to its end, once, and closed.
	// 0 means none.
	PINFD int

	// Label is the prefix of the labels of the three device keys, 1 to 20
	// printable ASCII characters; empty means DefaultLabel. Several nodes may
	// share a token under different labels.
	Label string
	// Curve of the agreement and the signing key: ecdh.P384() or ecdh.P256().
	// nil means P-384.
	Curve ecdh.Curve

	// CallTimeout bounds every single device call; 0 means DefaultCallTimeout.
	// An operation may first wait as long for a free session, and on an
	// unhealthy device for a probe.
	CallTimeout time.Duration
	// MaxSessions bounds the sessions open at a time; 0 means DefaultMaxSessions.
	// One more holds the keys that are loaded.
	MaxSessions int
	// MaxLoaded bounds the keys of LoadHMAC and LoadSigner that are in the token at a
	// time; those not used for longest give way and are loaded again when used. 0
	// means DefaultMaxLoaded. Keys in use at the very moment may exceed it.
	MaxLoaded int

	// SoftHSMConf, when set, is put into SOFTHSM2_CONF while the library
	// initialises. Leave it empty when the process was started with it.
	SoftHSMConf string
}

// settings is a Config after validation.
type settings struct {
	uri         *URI
	label       string
	curve       curve
	timeout     time.Duration
	maxSessions int
	maxLoaded   int
	softHSMConf string
}

// curve holds what the rest of the package needs to know about a curve.
type curve struct {
	name   string
	ecdh   ecdh.Curve
	ec     elliptic.Curve
	size   int    // bytes of a coordinate, of Z, of r and of s
	digest int    // bytes of the digest that Sign takes
	oid    []byte // DER of the curve's object identifier, CKA_EC_PARAMS
}

// curves are those that keys may be on.
var curves = []curve{
	{"P-384", ecdh.P384(), elliptic.P384(), 48, 48, []byte{0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22}},
	{"P-256", ecdh.P256(), elliptic.P256(), 32, 32, []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07}},
}

// curveOf returns what belongs to c, nil being P-384.
func curveOf(c ecdh.Curve) (curve, error) {
	for _, crv := range curves {
		if c == crv.ecdh || c == nil {
			return crv, nil
		}
	}
	return curve{}, invalidf("curve is neither P-384 nor P-256")
}

func (c Config) settings() (*settings, error) {
	u, err := ParseURI(c.URI)
	if err != nil {
		return nil, err
	}
	if u.Token == "" && u.Serial == "" {
		return nil, invalidf("PKCS#11 URI names neither token nor serial")
	}
	if u.ModulePath == "" {
		return nil, invalidf("PKCS#11 URI has no module-path (for SoftHSM on Debian: ?module-path=/usr/lib/softhsm/libsofthsm2.so)")
	}
	crv, err := curveOf(c.Curve)
	if err != nil {
		return nil, err
	}
	s := &settings{uri: u, label: c.Label, curve: crv, timeout: c.CallTimeout,
		maxSessions: c.MaxSessions, maxLoaded: c.MaxLoaded, softHSMConf: c.SoftHSMConf}
	if s.label == "" {
		s.label = DefaultLabel
	}
	if len(s.label) > 20 {
		return nil, invalidf("Label is longer than 20 characters")
	}
	for _, r := range s.label {
		if r > unicode.MaxASCII || !unicode.IsPrint(r) {
			return nil, invalidf("Label has a character that is not printable ASCII")
		}
	}
	switch {
	case s.timeout == 0:
		s.timeout = DefaultCallTimeout
	case s.timeout < 0:
		return nil, invalidf("CallTimeout is negative")
	}
	switch {
	case s.maxSessions == 0:
		s.maxSessions = DefaultMaxSessions
	case s.maxSessions < 0 || s.maxSessions > 1024:
		return nil, invalidf("MaxSessions is not between 1 and 1024")
	}
	switch {
	case s.maxLoaded == 0:
		s.maxLoaded = DefaultMaxLoaded
	case s.maxLoaded < 0 || s.maxLoaded > 1<<16:
		return nil, invalidf("MaxLoaded is not between 1 and 65536")
	}
	return s, nil
}

const maxPIN = 256

// readPIN reads the PIN from the one source that is configured.
func (c Config) readPIN(u *URI) (*secret.Bytes, error) {
	sources := 0
	for _, set := range []bool{c.PIN != nil, c.PINFile != "", c.PINFD != 0, u.PINSource != ""} {
		if set {
			sources++
		}
	}
	if sources != 1 {
		return nil, invalidf("the PIN needs exactly one source (PIN file, file descriptor or pin-source), %d are configured", sources)
	}
	switch {
	case c.PIN != nil:
		if err := checkPIN(c.PIN.Reveal()); err != nil {
			return nil, err
		}
		return hold(c.PIN.Reveal())
	case c.PINFD != 0:
		if c.PINFD < 3 {
			return nil, invalidf("PIN file descriptor must be 3 or higher")
		}
		f := os.NewFile(uintptr(c.PINFD), "PIN descriptor")
		if f == nil {
			return nil, invalidf("PIN file descriptor %d is not valid", c.PINFD)
		}
		defer f.Close()
		return readPIN(f)
	case c.PINFile != "":
		return readPINFile(c.PINFile)
	default:
		return readPINFile(u.PINSource)
	}
}

func readPINFile(path string) (*secret.Bytes, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%w: read the PIN file: %w: write the user PIN to it, mode 600", ErrPIN, err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("%w: read the PIN file: %w", ErrPIN, err)
	}
	if st.Mode().IsRegular() && st.Mode().Perm()&0o007 != 0 {
		return nil, fmt.Errorf("%w: everybody can read or change the PIN file %s: chmod 600 it", ErrPIN, path)
	}
	pin, err := readPIN(f)
	if errors.Is(err, ErrPIN) {
		err = fmt.Errorf("%w (PIN file %s: it holds the user PIN and nothing else)", err, path)
	}
	return pin, err
}

// readPIN reads to the end of r, trims one trailing newline and checks the PIN.
func readPIN(r io.Reader) (*secret.Bytes, error) {
	buf, err := secret.New(maxPIN + 2) // room for a newline and one byte too many
	if err != nil {
		return nil, unavailablef("hold the PIN: %v", err)
	}
	defer buf.Destroy()
	b := buf.Reveal()
	n, err := io.ReadFull(r, b)
	if err == nil {
		return nil, fmt.Errorf("%w: the PIN is longer than %d bytes", ErrPIN, maxPIN)
	}
	if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, fmt.Errorf("%w: read the PIN: %w", ErrPIN, err)
	}
	b = bytes.TrimSuffix(b[:n], []byte("\n"))
	b = bytes.TrimSuffix(b, []byte("\r"))
	if err := checkPIN(b); err != nil {
		return nil, err
	}
	return hold(b)
}

func hold(pin []byte) (*secret.Bytes, error) {
	s, err := secret.Copy(pin)
	if err != nil {
		return nil, unavailablef("hold the PIN: %v", err)
	}
	return s, nil
}

func checkPIN(b []byte) error {
	switch {
	case len(b) == 0:
		return fmt.Errorf("%w: the PIN is empty", ErrPIN)
	case len(b) > maxPIN:
		return fmt.Errorf("%w: the PIN is longer than %d bytes", ErrPIN, maxPIN)
	case bytes.IndexByte(b, 0) >= 0:
		return fmt.Errorf("%w: the PIN has a NUL byte", ErrPIN)
	}
	return nil
}
