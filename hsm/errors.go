package hsm

import (
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"
)

// The kinds of failure, to be tested with errors.Is. Every error of this
// package wraps exactly one of them, except that a call given up because its
// context was cancelled wraps context.Canceled alone.
var (
	// ErrUnavailable: the device did not answer, answered too late, or failed.
	ErrUnavailable = errors.New("hsm: device unavailable")
	// ErrPIN: the token refused the PIN, or the PIN could not be read. It is
	// never retried, so that a wrong PIN cannot lock the token.
	ErrPIN = errors.New("hsm: PIN refused")
	// ErrNotProvisioned: the token does not hold the three device keys.
	ErrNotProvisioned = errors.New("hsm: device keys are missing")
	// ErrProvisioned: Provision found device keys that are there already.
	ErrProvisioned = errors.New("hsm: device keys exist already")
	// ErrUnsafeToken: a key is looser than its template, or an attack of the
	// start-up self test worked, or a known answer came out wrong.
	ErrUnsafeToken = errors.New("hsm: token is not safe to use")
	// ErrUnsupported: the token lacks a mechanism that is needed.
	ErrUnsupported error = &kind{"hsm: mechanism not supported by the token"}
	// ErrModule: the PKCS#11 library is missing or cannot be loaded.
	ErrModule = errors.New("hsm: PKCS#11 library not usable")
	// ErrTokenNotFound: no token matches the URI.
	ErrTokenNotFound = errors.New("hsm: token not found")
	// ErrInvalid: an argument, a configuration or a wrapped blob is wrong.
	ErrInvalid error = &kind{"hsm: invalid input"}
)

// kind is an error that tells those who do not import this package what it is.
type kind struct{ text string }

func (k *kind) Error() string { return k.text }

// Invalid reports whether what the device was given is at fault, and not the device.
func (k *kind) Invalid() bool { return k == ErrInvalid }

// Unsupported reports whether the token cannot do it at all.
func (k *kind) Unsupported() bool { return k == ErrUnsupported }

func invalidf(format string, a ...any) error {
	return fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(format, a...))
}

func unavailablef(format string, a ...any) error {
	return fmt.Errorf("%w: %s", ErrUnavailable, fmt.Sprintf(format, a...))
}

func unsafef(format string, a ...any) error {
	return fmt.Errorf("%w: %s", ErrUnsafeToken, fmt.Sprintf(format, a...))
}

// rv returns the PKCS#11 return value inside err.
func rv(err error) (uint, bool) {
	var e pkcs11.Error
	if errors.As(err, &e) {
		return uint(e), true
	}
	return 0, false
}

func isRV(err error, codes ...uint) bool {
	got, ok := rv(err)
	if !ok {
		return false
	}
	for _, c := range codes {
		if got == c {
			return true
		}
	}
	return false
}

// errLost marks a failure after which the call may be repeated on a new
// session: the session, the login or the object handles are gone.
var errLost = errors.New("session or handles lost")

// isLost reports whether a new session, login and search for the keys may help.
func isLost(err error) bool {
	return errors.Is(err, errLost) || isRV(err,
		pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED,
		pkcs11.CKR_OBJECT_HANDLE_INVALID, pkcs11.CKR_KEY_HANDLE_INVALID,
		pkcs11.CKR_USER_NOT_LOGGED_IN, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED,
		pkcs11.CKR_TOKEN_NOT_PRESENT, pkcs11.CKR_DEVICE_REMOVED,
		pkcs11.CKR_TOKEN_NOT_RECOGNIZED, pkcs11.CKR_SLOT_ID_INVALID)
}

func isPIN(err error) bool {
	return isRV(err, pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID,
		pkcs11.CKR_PIN_LEN_RANGE, pkcs11.CKR_PIN_EXPIRED, pkcs11.CKR_PIN_LOCKED,
		pkcs11.CKR_USER_PIN_NOT_INITIALIZED)
}

// typed reports whether err already carries one of the exported kinds.
func typed(err error) bool {
	for _, k := range []error{ErrUnavailable, ErrPIN, ErrNotProvisioned, ErrProvisioned,
		ErrUnsafeToken, ErrUnsupported, ErrModule, ErrTokenNotFound, ErrInvalid} {
		if errors.Is(err, k) {
			return true
		}
	}
	return false
}

// classify gives a device error its exported kind. PKCS#11 errors carry a
// return value and nothing else, so no secret can be in them.
func classify(op string, err error) error {
	switch {
	case err == nil:
		return nil
	case typed(err):
		return err
	case isPIN(err):
		return fmt.Errorf("%w: %s: %w", ErrPIN, op, err)
	case isRV(err, pkcs11.CKR_MECHANISM_INVALID, pkcs11.CKR_MECHANISM_PARAM_INVALID, pkcs11.CKR_FUNCTION_NOT_SUPPORTED):
		return fmt.Errorf("%w: %s: %w", ErrUnsupported, op, err)
	default:
		return fmt.Errorf("%w: %s: %w", ErrUnavailable, op, err)
	}
}
