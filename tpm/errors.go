// Package tpm is a hardware root in a TPM 2.0: an agreement key (ECDH), a
// signing key (ECDSA) and a storage key under which small secrets are
// TPM-sealed. These keys are generated in the TPM and never leave it. HMAC and
// ECDSA keys come in wrapped for the storage key, by software or by the TPM that
// generated them, and from then on are used in the TPM alone.
//
// An attestation key lets the TPM testify to the others (Attest, Activate), and
// a policy can bind the use of the agreement and signing key to what the machine
// booted (Config.PCRs, UpdatePCRPolicy).
//
// It speaks to a Linux resource manager device (/dev/tpmrm0) or to a software
// TPM on a Unix domain socket. Every command that carries a secret travels in a
// salted HMAC session with parameter encryption. A Device survives a TPM that
// hangs, dies or restarts: calls fail with ErrUnavailable within a bounded time
// and work again once the TPM does.
//
// DESIGN.md in this folder gives the reasons.
package tpm

import (
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// The kinds of failure, to be tested with errors.Is.
var (
	// ErrUnavailable: the TPM is absent, hung, failing, or the device is closed.
	// The same call may succeed later.
	ErrUnavailable = errors.New("TPM unavailable")
	// ErrAuth: the TPM refused an authorization value. Never retried.
	ErrAuth = errors.New("TPM authorization refused")
	// ErrNotProvisioned: the TPM holds no keys of ours; run Provision.
	ErrNotProvisioned = errors.New("TPM not provisioned")
	// ErrProvisioned: Provision found its keys already in place.
	ErrProvisioned = errors.New("TPM already provisioned")
	// ErrUnsafe: the TPM or a key in it is configured more loosely than
	// required, or is not the one that was opened.
	ErrUnsafe = errors.New("TPM configured unsafely")
	// ErrPCRs: the platform configuration registers of Config.PCRs do not hold
	// approved values; see UpdatePCRPolicy.
	ErrPCRs = errors.New("platform configuration not approved")
	// ErrUnsupported: the TPM cannot do that at all.
	ErrUnsupported error = &kind{"not supported by the TPM"}
	// ErrInvalid: an argument, a configuration value or a wrapped key is wrong.
	ErrInvalid error = &kind{"invalid input"}
)

// kind is an error kind that tells callers what it means who know no names of
// this package.
type kind struct{ text string }

func (k *kind) Error() string { return k.text }

// Unsupported reports whether the TPM cannot do it at all.
func (k *kind) Unsupported() bool { return k == ErrUnsupported }

// Invalid reports whether what was given is wrong, such as a key blob that does
// not open.
func (k *kind) Invalid() bool { return k == ErrInvalid }

func invalid(format string, args ...any) error {
	return fmt.Errorf("tpm: %w: %s", ErrInvalid, fmt.Sprintf(format, args...))
}

func unsafe(format string, args ...any) error {
	return fmt.Errorf("tpm: %w: %s", ErrUnsafe, fmt.Sprintf(format, args...))
}

func unavailable(format string, args ...any) error {
	return fmt.Errorf("tpm: %w: %s", ErrUnavailable, fmt.Sprintf(format, args...))
}

// What an answer of the TPM means for the operator, and what comes next.
const (
	meansAuth = "the keys take another authorization value than that of AuthFile: was the file exchanged, or the TPM? " +
		"No try is counted against a lockout"
	meansLockout = "the TPM is in dictionary attack lockout, because others gave wrong authorization values for objects of theirs; " +
		"it ends by itself, or by tpm2_dictionarylockout --clear-lockout"
	meansGone = "no key of ours is where it should be. In a new node make the keys: conclaved init. In a node that had them the TPM was " +
		"cleared or exchanged and they are gone for good: replace the node's root by another resident node's help (conclaved rekey, conclave node rekey)"
	meansFailure = "the TPM is in failure mode after a self-test of its own: only a restart of the machine may help"
)

// classify gives an error of the TPM or of the transport one of the kinds.
func classify(op string, err error) error {
	if err == nil {
		return nil
	}
	if isKind(err) {
		return err
	}
	of, means := ErrUnavailable, ""
	switch {
	case errors.Is(err, tpm2.TPMRCBadAuth), errors.Is(err, tpm2.TPMRCAuthFail):
		of, means = ErrAuth, meansAuth
	case errors.Is(err, tpm2.TPMRCLockout):
		means = meansLockout
	case errors.Is(err, tpm2.TPMRCFailure):
		means = meansFailure
	case handleMissing(err):
		of, means = ErrNotProvisioned, meansGone
	case errors.Is(err, tpm2.TPMRCECCPoint), errors.Is(err, tpm2.TPMRCCurve):
		of = ErrInvalid
	}
	if means != "" {
		return fmt.Errorf("tpm: %s: %w: %s (%w)", op, of, means, err)
	}
	return fmt.Errorf("tpm: %s: %w: %w", op, of, err)
}

func isKind(err error) bool {
	for _, k := range []error{ErrUnavailable, ErrAuth, ErrNotProvisioned, ErrProvisioned, ErrUnsafe, ErrPCRs, ErrUnsupported, ErrInvalid, ErrNoCounter} {
		if errors.Is(err, k) {
			return true
		}
	}
	return false
}

// handleMissing reports whether the TPM said that a handle names nothing.
func handleMissing(err error) bool {
	var f tpm2.TPMFmt1Error
	if !errors.As(err, &f) {
		return false
	}
	onHandle, _ := f.Handle()
	return onHandle && errors.Is(err, tpm2.TPMRCHandle)
}

// restarted reports whether the TPM lost its volatile state or is full of what
// somebody left in it: reconnecting helps.
func restarted(err error) bool {
	for _, rc := range []tpm2.TPMRC{
		tpm2.TPMRCInitialize, tpm2.TPMRCReboot,
		tpm2.TPMRCSessionMemory, tpm2.TPMRCSessionHandles, tpm2.TPMRCObjectMemory, tpm2.TPMRCObjectHandles,
	} {
		if errors.Is(err, rc) {
			return true
		}
	}
	return false
}

// distrusts reports whether err leaves open in which state the TPM is: it failed,
// or its answer was not well-formed or not authentic.
func distrusts(err error) bool {
	if err == nil || isKind(err) {
		return false
	}
	var rc tpm2.TPMRC
	return !errors.As(err, &rc) || errors.Is(err, tpm2.TPMRCFailure)
}
