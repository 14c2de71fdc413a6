package tpm

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"math/big"

	"github.com/conclave-kms/conclave/kms/secret"
)

// selfTest runs every operation once against the standard library.
func (d *Device) selfTest(ctx context.Context) error {
	for _, test := range []func(context.Context) error{d.testECDH, d.testSign, d.testSeal, d.testRandom, d.testImport} {
		if err := test(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (d *Device) testECDH(ctx context.Context) error {
	eph, err := d.suite.curve.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	got, err := d.ECDH(ctx, eph.PublicKey())
	if err != nil {
		return err
	}
	want, err := eph.ECDH(d.agreementPub)
	if err != nil {
		return err
	}
	defer secret.Wipe(got)
	defer secret.Wipe(want)
	if subtle.ConstantTimeCompare(got, want) != 1 {
		return unsafe("self-test: ECDH in the TPM and in software disagree")
	}
	return nil
}

func (d *Device) testSign(ctx context.Context) error {
	digest := make([]byte, d.suite.digest)
	if _, err := rand.Read(digest); err != nil {
		return err
	}
	sig, err := d.Sign(ctx, digest)
	if err != nil {
		return err
	}
	n := len(sig) / 2
	r, s := new(big.Int).SetBytes(sig[:n]), new(big.Int).SetBytes(sig[n:])
	if !ecdsa.Verify(d.SigningKey(), digest, r, s) {
		return unsafe("self-test: the TPM's signature does not verify")
	}
	return nil
}

func (d *Device) testSeal(ctx context.Context) error {
	aad, key := []byte("conclave tpm self-test"), make([]byte, 32)
	if _, err := rand.Read(key); err != nil {
		return err
	}
	wrapped, err := d.Wrap(ctx, aad, key)
	if err != nil {
		return err
	}
	got, err := d.Unwrap(ctx, aad, wrapped)
	if err != nil {
		return err
	}
	same := subtle.ConstantTimeCompare(got.Reveal(), key) == 1
	got.Destroy()
	if !same {
		return unsafe("self-test: TPM unseal does not return what was sealed")
	}
	altered := bytes.Clone(wrapped)
	altered[len(altered)-1] ^= 1
	if err := d.refuses(ctx, aad, altered); err != nil {
		return err
	}
	return d.refuses(ctx, append(aad, '!'), wrapped)
}

// refuses checks that a wrapped key does not open.
func (d *Device) refuses(ctx context.Context, aad, wrapped []byte) error {
	got, err := d.Unwrap(ctx, aad, wrapped)
	if err == nil {
		got.Destroy()
		return unsafe("self-test: the TPM opens an altered wrapped key")
	}
	if !errors.Is(err, ErrInvalid) {
		return err
	}
	return nil
}

// testImport brings a known key into the TPM and compares its HMAC with RFC
// 4231, test case 4. The 25 bytes of its key are filled up to 32 with zeros,
// which HMAC does anyway (RFC 2104, section 2).
func (d *Device) testImport(ctx context.Context) error {
	raw := make([]byte, hmacKeyLen)
	for i := range 25 {
		raw[i] = byte(i + 1)
	}
	key, err := secret.Move(raw)
	if err != nil {
		return err
	}
	defer key.Destroy()
	blob, err := WrapHMAC(d.importPub, key, []byte("self-test"))
	if err != nil {
		return err
	}
	mac, unload, err := d.LoadHMAC(ctx, blob)
	if err != nil {
		return err
	}
	defer unload()
	got, err := mac(ctx, bytes.Repeat([]byte{0xcd}, 50))
	if err != nil {
		return err
	}
	if hex.EncodeToString(got) != "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b" {
		return unsafe("self-test: HMAC under an imported key is not that of RFC 4231")
	}
	blob[len(blob)-1-2-2*(2+d.suite.field)] ^= 1 // the last byte of the duplicate
	if _, _, err := d.LoadHMAC(ctx, blob); !errors.Is(err, ErrInvalid) {
		if err == nil {
			return unsafe("self-test: the TPM imports an altered key")
		}
		return err
	}
	return nil
}

func (d *Device) testRandom(ctx context.Context) error {
	b := make([]byte, 2*randomChunk)
	defer secret.Wipe(b)
	if err := d.Random(ctx, b); err != nil {
		return err
	}
	if bytes.Equal(b[:randomChunk], b[randomChunk:]) || bytes.Equal(b[:randomChunk], make([]byte, randomChunk)) {
		return unsafe("self-test: the TPM's random number generator is stuck")
	}
	return nil
}
