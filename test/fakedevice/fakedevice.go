// Package fakedevice is a hardware root in software with the method set of hsm
// and tpm, for tests that need a device to fail: it can return errors, be slow,
// hang until its context ends and return wrong results. It protects nothing.
package fakedevice

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/conclave-kms/conclave/kms/secret"
)

// The operations, as the functions given to Fail, Delay, Hang and Corrupt see
// them; hardware.go has those of imported keys.
const (
	OpECDH   = "ecdh"
	OpSign   = "sign"
	OpWrap   = "wrap"
	OpUnwrap = "unwrap"
	OpRandom = "random"
	OpCheck  = "check"
)

var (
	// ErrInvalid is returned for input that a real device refuses.
	ErrInvalid error = invalidInput{}
	// ErrUnavailable is returned after Close, and when a context's deadline passes.
	ErrUnavailable = errors.New("fakedevice: device unavailable")
)

// invalidInput tells those who do not import this package what it is.
type invalidInput struct{}

func (invalidInput) Error() string { return "fakedevice: invalid input" }
func (invalidInput) Invalid() bool { return true }

const (
	maxWrap  = 96
	version  = 1
	ivSize   = 12
	tagSize  = 16
	overhead = 1 + ivSize + tagSize
)

// keys are what survives Reopen.
type keys struct {
	agreement *ecdh.PrivateKey
	signing   *ecdsa.PrivateKey
	aead      cipher.AEAD
}

// Device is a device in software. The methods that set faults may be called
// while others use it.
type Device struct {
	keys *keys

	mu      sync.Mutex
	closed  bool
	fail    func(op string) error
	delay   func(op string) time.Duration
	hang    func(op string) bool
	corrupt func(op string, out []byte)
	calls   map[string]int

	sha256KDF atomic.Bool
	barren    atomic.Bool
	lost      atomic.Uint64 // how often LoseKeys was called
}

// New makes a device with fresh keys on ecdh.P384() or ecdh.P256(); nil means
// P-384.
func New(curve ecdh.Curve) (*Device, error) {
	if curve == nil {
		curve = ecdh.P384()
	}
	var ec elliptic.Curve
	switch curve {
	case ecdh.P384():
		ec = elliptic.P384()
	case ecdh.P256():
		ec = elliptic.P256()
	default:
		return nil, fmt.Errorf("%w: curve is neither P-384 nor P-256", ErrInvalid)
	}
	agreement, err := curve.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	signing, err := ecdsa.GenerateKey(ec, rand.Reader)
	if err != nil {
		return nil, err
	}
	var key [32]byte
	if _, err := rand.Read(key[:]); err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key[:])
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	return &Device{keys: &keys{agreement, signing, aead}, calls: map[string]int{}}, nil
}

// Reopen returns another device with the same keys and no faults, as a restart
// of the process would.
func (d *Device) Reopen() *Device { return &Device{keys: d.keys, calls: map[string]int{}} }

// Fail makes an operation return the error that f returns; nil lets it pass. A
// nil f ends it.
func (d *Device) Fail(f func(op string) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fail = f
}

// Delay makes an operation wait first, at most until its context ends.
func (d *Device) Delay(f func(op string) time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.delay = f
}

// Hang makes an operation for which f is true wait until its context ends.
func (d *Device) Hang(f func(op string) bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.hang = f
}

// Corrupt lets f change what ECDH, Sign, Wrap, Unwrap, Random and the closures of
// loaded keys return.
func (d *Device) Corrupt(f func(op string, out []byte)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.corrupt = f
}

// Calls returns how often an operation was called, failures included.
func (d *Device) Calls(op string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.calls[op]
}

// begin counts the call and applies the faults that come before the work.
func (d *Device) begin(ctx context.Context, op string) error {
	if err := ctx.Err(); err != nil {
		return contextError(op, err)
	}
	d.mu.Lock()
	d.calls[op]++
	closed, fail, delay, hang := d.closed, d.fail, d.delay, d.hang
	d.mu.Unlock()
	if closed {
		return fmt.Errorf("%w: %s: the device is closed", ErrUnavailable, op)
	}
	if delay != nil {
		timer := time.NewTimer(delay(op))
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return contextError(op, ctx.Err())
		}
	}
	if hang != nil && hang(op) {
		<-ctx.Done()
		return contextError(op, ctx.Err())
	}
	if fail != nil {
		return fail(op)
	}
	return nil
}

func contextError(op string, err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%w: %s: %w", ErrUnavailable, op, err)
	}
	return fmt.Errorf("fakedevice: %s: %w", op, err)
}

// end applies the fault that changes the result.
func (d *Device) end(op string, out []byte) []byte {
	d.mu.Lock()
	f := d.corrupt
	d.mu.Unlock()
	if f != nil {
		f(op, out)
	}
	return out
}

// AgreementKey returns the public half of the agreement key.
func (d *Device) AgreementKey() *ecdh.PublicKey { return d.keys.agreement.PublicKey() }

// SigningKey returns the public half of the signing key.
func (d *Device) SigningKey() *ecdsa.PublicKey {
	k := d.keys.signing.PublicKey
	return &k
}

func (d *Device) size() int { return (d.keys.signing.Curve.Params().BitSize + 7) / 8 }

// ECDH returns the x-coordinate shared with peer.
func (d *Device) ECDH(ctx context.Context, peer *ecdh.PublicKey) ([]byte, error) {
	if peer == nil || peer.Curve() != d.keys.agreement.Curve() {
		return nil, fmt.Errorf("%w: the peer's key is on another curve", ErrInvalid)
	}
	if err := d.begin(ctx, OpECDH); err != nil {
		return nil, err
	}
	z, err := d.keys.agreement.ECDH(peer)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return d.end(OpECDH, z), nil
}

// Sign returns r‖s over a SHA-384 (P-384) or SHA-256 (P-256) digest.
func (d *Device) Sign(ctx context.Context, digest []byte) ([]byte, error) {
	n := d.size()
	if len(digest) != n { // 48 and 32: digest and coordinate have one length on both curves
		return nil, fmt.Errorf("%w: the digest has %d bytes instead of %d", ErrInvalid, len(digest), n)
	}
	if err := d.begin(ctx, OpSign); err != nil {
		return nil, err
	}
	r, s, err := ecdsa.Sign(rand.Reader, d.keys.signing, digest)
	if err != nil {
		return nil, err
	}
	sig := make([]byte, 2*n)
	r.FillBytes(sig[:n])
	s.FillBytes(sig[n:])
	return d.end(OpSign, sig), nil
}

// Wrap returns key, 1 to 96 bytes, encrypted and bound to aad.
func (d *Device) Wrap(ctx context.Context, aad, key []byte) ([]byte, error) {
	if len(key) == 0 || len(key) > maxWrap {
		return nil, fmt.Errorf("%w: the key has %d bytes", ErrInvalid, len(key))
	}
	if err := d.begin(ctx, OpWrap); err != nil {
		return nil, err
	}
	blob := make([]byte, 1+ivSize, overhead+len(key))
	blob[0] = version
	if _, err := rand.Read(blob[1:]); err != nil {
		return nil, err
	}
	return d.end(OpWrap, d.keys.aead.Seal(blob, blob[1:1+ivSize], key, bound(aad))), nil
}

func bound(aad []byte) []byte { return append([]byte{version}, aad...) }

// Unwrap opens what Wrap returned.
func (d *Device) Unwrap(ctx context.Context, aad, wrapped []byte) (*secret.Bytes, error) {
	if len(wrapped) <= overhead || len(wrapped) > overhead+maxWrap || wrapped[0] != version {
		return nil, fmt.Errorf("%w: the blob does not open", ErrInvalid)
	}
	wrapped = bytes.Clone(wrapped)
	if err := d.begin(ctx, OpUnwrap); err != nil {
		return nil, err
	}
	key, err := d.keys.aead.Open(nil, wrapped[1:1+ivSize], wrapped[1+ivSize:], bound(aad))
	if err != nil {
		return nil, fmt.Errorf("%w: the blob does not open", ErrInvalid)
	}
	return secret.Move(d.end(OpUnwrap, key))
}

// Random fills b.
func (d *Device) Random(ctx context.Context, b []byte) error {
	if err := d.begin(ctx, OpRandom); err != nil {
		return err
	}
	if _, err := rand.Read(b); err != nil {
		return err
	}
	d.end(OpRandom, b)
	return nil
}

// Check fails when a fault says so or the device is closed.
func (d *Device) Check(ctx context.Context) error { return d.begin(ctx, OpCheck) }

// Describe says what this is.
func (d *Device) Describe() string {
	return "fake device in software on " + d.keys.signing.Curve.Params().Name
}

// Close ends the device; calls that come later are refused.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	return nil
}
