package contract

import (
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"testing"

	"github.com/conclave-kms/conclave/kms/secret"
)

// HardwareDevice is the method set of a hardware root that also takes keys for
// use inside it alone (protection level hardware).
type HardwareDevice interface {
	Device
	ImportKey() (kind string, public []byte)
	LoadHMAC(ctx context.Context, blob []byte) (mac func(ctx context.Context, message []byte) ([]byte, error), unload func(), err error)
	LoadSigner(ctx context.Context, c ecdh.Curve, blob []byte) (sign func(ctx context.Context, digest []byte) ([]byte, error), unload func(), err error)
}

// GeneratingDevice is the method set of a hardware root that makes keys and wraps
// them for others inside it.
type GeneratingDevice interface {
	HardwareDevice
	Generates() (hmac, signer bool)
	GenerateHMAC(ctx context.Context, recipients [][]byte) (blobs [][]byte, mac func(ctx context.Context, message []byte) ([]byte, error), unload func(), err error)
	GenerateSigner(ctx context.Context, c ecdh.Curve, recipients [][]byte) (blobs [][]byte, public *ecdsa.PublicKey, sign func(ctx context.Context, digest []byte) ([]byte, error), unload func(), err error)
	Rewrap(ctx context.Context, blob []byte, recipient []byte) ([]byte, error)
}

// Hardware is what RunHardware needs to know about a kind of device.
type Hardware struct {
	// Open opens the device; RunHardware closes it.
	Open func(t *testing.T) HardwareDevice
	// Other opens another device of the same kind with keys of its own on the
	// same curve; RunHardware closes it.
	Other func(t *testing.T) HardwareDevice
	// Kind is what ImportKey returns.
	Kind string

	WrapHMAC   func(public []byte, key *secret.Bytes, label []byte) ([]byte, error)
	WrapSigner func(public []byte, c ecdh.Curve, scalar *secret.Bytes, label []byte) ([]byte, error)

	// Loaded is how many keys are loaded side by side in the test of the LRU:
	// more than the device keeps.
	Loaded int
	// Stride is the distance of the bytes that are altered in turn; 0 means 1.
	// For devices that are slow to refuse.
	Stride int
	// HMAC and Signer say what the device must generate and wrap for others inside it:
	// what Generates returns. A device without both need not have the methods of
	// GeneratingDevice.
	HMAC, Signer bool
	// Lose makes the device lose its sessions and loaded objects, as a
	// disconnect would. nil leaves that test out.
	Lose func(t *testing.T, d HardwareDevice)
}

// RunHardware runs the suite of imported keys.
func RunHardware(t *testing.T, h Hardware) {
	d := h.Open(t)
	defer closeDevice(t, d)
	for _, c := range []struct {
		name string
		run  func(*testing.T, Hardware, HardwareDevice)
	}{
		{"import key", testImportKey},
		{"HMAC", testHMAC},
		{"HMAC refuses", testHMACRefuses},
		{"signer", testSigner},
		{"wrong curve", testWrongCurve},
		{"wrapping refuses", testWrappingRefuses},
		{"wrapping is fresh", testWrappingFresh},
		{"altered key blobs", testAlteredKeys},
		{"another device", testOtherDevice},
		{"unload", testUnload},
		{"more than fit", testMoreThanFit},
		{"cancelled load", testCancelledLoad},
		{"concurrent", testLoadedConcurrent},
		{"generates", testGenerates},
		{"generated HMAC", testGenerateHMAC},
		{"generated signer", testGenerateSigner},
		{"generation refuses", testGenerateRefuses},
		{"rewrap", testRewrap},
		{"rewrap refuses", testRewrapRefuses},
		{"concurrent generation", testGenerateConcurrent},
		{"lost sessions", testLost},
		{"lost generated keys", testGeneratedLost},
	} {
		t.Run(c.name, func(t *testing.T) { c.run(t, h, d) })
	}
	t.Run("after close", func(t *testing.T) { testLoadedClose(t, h) })
}
