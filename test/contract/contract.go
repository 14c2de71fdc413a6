// Package contract is the test suite that every hardware root passes: SoftHSM
// through hsm, swtpm through tpm, and the fake device.
package contract

import (
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"testing"

	"github.com/conclave-kms/conclave/kms/secret"
)

// Device is the method set of a hardware root.
type Device interface {
	AgreementKey() *ecdh.PublicKey
	ECDH(ctx context.Context, peer *ecdh.PublicKey) ([]byte, error)
	SigningKey() *ecdsa.PublicKey
	Sign(ctx context.Context, digest []byte) ([]byte, error)
	Wrap(ctx context.Context, aad, key []byte) ([]byte, error)
	Unwrap(ctx context.Context, aad, wrapped []byte) (*secret.Bytes, error)
	Random(ctx context.Context, b []byte) error
	Check(ctx context.Context) error
	Describe() string
	Close() error
}

// Run runs the suite. open opens one and the same device each time it is
// called, with the keys that it had before. The suite closes a device before it
// opens it again.
func Run(t *testing.T, open func(t *testing.T) Device) {
	t.Run("shared", func(t *testing.T) {
		d := open(t)
		defer closeDevice(t, d)
		for _, c := range []struct {
			name string
			run  func(*testing.T, Device)
		}{
			{"key shapes", testShapes},
			{"ECDH", testECDH},
			{"ECDH refuses", testECDHRefuses},
			{"sign", testSign},
			{"sign refuses", testSignRefuses},
			{"wrap sizes", testWrapSizes},
			{"wrap refuses", testWrapRefuses},
			{"wrapping is fresh", testWrapFresh},
			{"AAD is bound", testAAD},
			{"altered blobs", testAltered},
			{"truncated blobs", testTruncated},
			{"random", testRandom},
			{"check", testCheck},
			{"cancelled", testCancelled},
			{"inputs stay", testInputs},
			{"errors", testErrors},
			{"concurrent", testConcurrent},
		} {
			t.Run(c.name, func(t *testing.T) { c.run(t, d) })
		}
	})
	t.Run("close", func(t *testing.T) { testClose(t, open(t)) })
	t.Run("reopen", func(t *testing.T) { testReopen(t, open) })
}

func closeDevice(t *testing.T, d Device) {
	t.Helper()
	if err := d.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
}
