package keyring

import (
	"context"
	"errors"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/pqc"
)

const (
	versionInfo = "conclave/device-key/1/info"
	versionAAD  = "conclave/device-key/1/aad"
)

// encodeVersion returns the canonical encoding, under a domain string, of
// everything that a sealed copy of a key version of protection hardware is bound
// to.
func encodeVersion(domain string, b KeyBinding, node string) []byte {
	return canon.Marshal(struct {
		Domain     string         `cbor:"domain"`
		Cluster    string         `cbor:"cluster"`
		Keyring    string         `cbor:"keyring"`
		KeyID      []byte         `cbor:"key-id"`
		Version    uint32         `cbor:"version"`
		Algorithm  kms.Algorithm  `cbor:"algorithm"`
		Purpose    kms.Purpose    `cbor:"purpose"`
		Node       string         `cbor:"node"`
		Protection kms.Protection `cbor:"protection"`
	}{domain, b.Cluster, b.Keyring, b.KeyID[:], b.Version, b.Algorithm, b.Purpose, node, kms.Hardware})
}

// SealVersion seals the blob of a key version, wrapped for the device of a node,
// to that node. b.KEK is 0. A binding or public key of the wrong shape is
// kms.Invalid.
func SealVersion(r Recipient, b KeyBinding, blob []byte) ([]byte, error) {
	if err := b.validate(kms.Hardware); err != nil {
		return nil, err
	}
	if r.Node == "" || len(blob) == 0 {
		return nil, kms.Errorf(kms.Invalid, "a sealed copy needs a node and what is sealed")
	}
	pub, err := pqc.ParsePublicKey(pqc.SuiteID(r.Suite), r.PublicKey)
	if err != nil {
		return nil, kms.Wrap(kms.Invalid, err, "the agreement key of node "+r.Node+" is not valid", "")
	}
	sealed, err := pub.Seal(encodeVersion(versionInfo, b, r.Node), encodeVersion(versionAAD, b, r.Node), blob)
	if err != nil {
		return nil, kms.Wrap(kms.Internal, err, "sealing to node "+r.Node+" failed", "")
	}
	return sealed, nil
}

// OpenVersion opens the node's sealed copy of a key version of protection
// hardware and returns the blob that its device loads. A copy that was not made
// for exactly this binding and node is kms.ErrOpen; a device that does not
// answer, or ctx ending first, is kms.Unavailable with the cause wrapped.
func (r *Root) OpenVersion(ctx context.Context, b KeyBinding, node string, sealed []byte) ([]byte, error) {
	if err := b.validate(kms.Hardware); err != nil {
		return nil, err
	}
	priv := r.priv.WithExchanger(exchanger{ctx: ctx, dev: r.dev, pub: r.pub})
	blob, err := priv.Open(encodeVersion(versionInfo, b, node), encodeVersion(versionAAD, b, node), sealed)
	switch {
	case errors.Is(err, pqc.ErrDevice):
		return nil, deviceError(err, "open the key")
	case err != nil:
		return nil, kms.ErrOpen
	}
	return blob, nil
}

// LoadVersion is OpenVersion, and then loads the key into the device; the caller
// destroys it. Errors as of OpenVersion; kms.ErrOpen also for a blob that the
// device refuses.
func (r *Root) LoadVersion(ctx context.Context, b KeyBinding, node string, sealed []byte) (*Material, error) {
	if err := b.validate(kms.Hardware); err != nil {
		return nil, err
	}
	if r.hardware == nil {
		return nil, errNoHardware
	}
	blob, err := r.OpenVersion(ctx, b, node, sealed)
	if err != nil {
		return nil, err
	}
	return loadBlob(ctx, r.hardware, b, blob)
}

// ErrCannotRewrap says that the device of this node cannot wrap a key that it
// holds for another device; another node's may.
var ErrCannotRewrap error = &kms.Error{Kind: kms.Conflict, Msg: "the device of this node cannot wrap a key that it holds for another device",
	Fix: "another node of the keyring's residency may be able to"}

// RewrapVersion opens the node's sealed copy of a key version and has the device
// wrap the key for another device of the same import kind, the next one of the
// node that to names; the result is sealed to that node. device is what the other
// device publishes. Errors as of LoadVersion, and ErrCannotRewrap.
func (r *Root) RewrapVersion(ctx context.Context, b KeyBinding, node string, sealed []byte, to Recipient, device []byte) ([]byte, error) {
	rw, ok := r.hardware.(Rewrapper)
	if !ok {
		return nil, ErrCannotRewrap
	}
	blob, err := r.OpenVersion(ctx, b, node, sealed)
	if err != nil {
		return nil, err
	}
	moved, err := rw.Rewrap(ctx, blob, device)
	switch {
	case unsupported(err):
		return nil, ErrCannotRewrap
	case err != nil:
		return nil, loadError(err)
	}
	return SealVersion(to, b, moved)
}
