package fakedevice

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"

	"github.com/conclave-kms/conclave/hsm"
	kwp "github.com/tink-crypto/tink-go/v2/kwp/subtle"
)

// The operations of keys that the device makes, as the faults see them.
const (
	OpGenerate   = "generate"
	OpRewrap     = "rewrap"
	OpAttributes = "attributes"
)

const maxRecipients = 256

// NoGeneration makes the device one that cannot generate keys for others:
// Generates says so, and the calls fail.
func (d *Device) NoGeneration() { d.barren.Store(true) }

// Generates is that of package hsm.
func (d *Device) Generates() (hmac, signer bool) {
	able := !d.barren.Load()
	return able, able
}

var errBarren = fmt.Errorf("fakedevice: %w", hsm.ErrUnsupported)

// GenerateHMAC is that of package hsm.
func (d *Device) GenerateHMAC(ctx context.Context, recipients [][]byte) (blobs [][]byte, mac func(ctx context.Context, message []byte) ([]byte, error), unload func(), err error) {
	if d.barren.Load() {
		return nil, nil, nil, errBarren
	}
	if err := d.begin(ctx, OpGenerate); err != nil {
		return nil, nil, nil, err
	}
	key := make([]byte, 32)
	_, _ = rand.Read(key) // crypto/rand.Read never returns an error
	blobs, own, err := d.wrapForAll(1, key, recipients)
	if err != nil {
		return nil, nil, nil, err
	}
	mac, unload, err = d.LoadHMAC(ctx, own)
	if err != nil {
		return nil, nil, nil, err
	}
	return blobs, mac, unload, nil
}

// GenerateSigner is that of package hsm.
func (d *Device) GenerateSigner(ctx context.Context, c ecdh.Curve, recipients [][]byte) (blobs [][]byte, public *ecdsa.PublicKey, sign func(ctx context.Context, digest []byte) ([]byte, error), unload func(), err error) {
	if d.barren.Load() {
		return nil, nil, nil, nil, errBarren
	}
	kind, _, ec, err := signerKind(c)
	if err != nil {
		return nil, nil, nil, nil, err
	}
	if err := d.begin(ctx, OpGenerate); err != nil {
		return nil, nil, nil, nil, err
	}
	key, err := ecdsa.GenerateKey(ec, rand.Reader)
	if err != nil {
		return nil, nil, nil, nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key) // with the public key: the form of kinds 4 and 5
	if err != nil {
		return nil, nil, nil, nil, err
	}
	blobs, own, err := d.wrapForAll(kind+2, der, recipients)
	if err != nil {
		return nil, nil, nil, nil, err
	}
	sign, unload, err = d.LoadSigner(ctx, c, own)
	if err != nil {
		return nil, nil, nil, nil, err
	}
	return blobs, &key.PublicKey, sign, unload, nil
}

// Rewrap is that of package hsm.
func (d *Device) Rewrap(ctx context.Context, blob []byte, recipient []byte) ([]byte, error) {
	if d.barren.Load() {
		return nil, errBarren
	}
	blob = bytes.Clone(blob)
	if err := d.begin(ctx, OpRewrap); err != nil {
		return nil, err
	}
	if len(blob) < 2 {
		return nil, errBlob
	}
	plain, err := d.open(blob, blob[1])
	if err != nil {
		return nil, err
	}
	return wrapFor(blob[1], plain, recipient)
}

// Attributes is that of package hsm, for keys as good as they can be.
func (d *Device) Attributes(ctx context.Context) ([]hsm.KeyAttributes, error) {
	if err := d.begin(ctx, OpAttributes); err != nil {
		return nil, err
	}
	all := []hsm.KeyAttributes{
		{Role: "agreement", Public: d.AgreementKey().Bytes()},
		{Role: "signing"},
		{Role: "wrapping"},
	}
	signing, err := d.keys.signing.PublicKey.Bytes()
	if err != nil {
		return nil, err
	}
	all[1].Public = signing
	for i := range all {
		all[i].Label = "fake-" + all[i].Role
		all[i].ID = []byte(all[i].Role)
		all[i].Values = map[string]bool{"CKA_SENSITIVE": true, "CKA_ALWAYS_SENSITIVE": true,
			"CKA_NEVER_EXTRACTABLE": true, "CKA_EXTRACTABLE": false, "CKA_LOCAL": true}
	}
	return all, nil
}

// wrapForAll wraps material for the recipients and for this device.
func (d *Device) wrapForAll(kind byte, material []byte, recipients [][]byte) (blobs [][]byte, own []byte, err error) {
	if len(recipients) == 0 || len(recipients) > maxRecipients {
		return nil, nil, fmt.Errorf("%w: %d recipients", ErrInvalid, len(recipients))
	}
	for _, r := range recipients {
		b, err := wrapFor(kind, material, r)
		if err != nil {
			return nil, nil, err
		}
		blobs = append(blobs, b)
	}
	_, public := d.ImportKey()
	own, err = wrapFor(kind, material, public)
	return blobs, own, err
}

// wrapFor writes a blob as package hsm's WrapHMAC does, without a label.
func wrapFor(kind byte, material, recipient []byte) ([]byte, error) {
	bad := fmt.Errorf("%w: not an import key", ErrInvalid)
	if len(recipient) < 2 || recipient[0] != importVersion || recipient[1] != kdfNull && recipient[1] != kdfSHA256 {
		return nil, bad
	}
	curve := ecdh.P384()
	if len(recipient) == 2+65 {
		curve = ecdh.P256()
	}
	to, err := curve.NewPublicKey(recipient[2:])
	if err != nil {
		return nil, bad
	}
	eph, err := curve.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	z, err := eph.ECDH(to)
	if err != nil {
		return nil, bad
	}
	header := []byte{importVersion, kind, recipient[1], 0}
	kek := z[len(z)-32:]
	if recipient[1] == kdfSHA256 {
		h := sha256.Sum256(bytes.Join([][]byte{z, {0, 0, 0, 1}, []byte("conclave device import\x00"), header}, nil))
		kek = h[:]
	}
	box, err := kwp.NewKWP(kek)
	if err != nil {
		return nil, err
	}
	wrapped, err := box.Wrap(material)
	if err != nil {
		return nil, err
	}
	return bytes.Join([][]byte{header, eph.PublicKey().Bytes(), wrapped}, nil), nil
}
