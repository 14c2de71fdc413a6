package hsm

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"errors"
	"math/big"

	"github.com/conclave-kms/conclave/kms/secret"
)

// selfTest shows that each key does its work, compared with software, and that
// none can be made to do more.
func (d *Device) selfTest(ctx context.Context) error {
	for _, test := range []func(context.Context) error{d.testECDH, d.testSign, d.testWrap, d.testRandom, d.testImport, d.testAttacks} {
		if err := test(ctx); err != nil {
			return err
		}
	}
	return nil
}

// testECDH agrees with a fresh software key in both directions.
func (d *Device) testECDH(ctx context.Context) error {
	for range 2 {
		eph, err := d.set.curve.ecdh.GenerateKey(rand.Reader)
		if err != nil {
			return unavailablef("%v", err)
		}
		if err := d.agreesWith(ctx, eph); err != nil {
			return err
		}
	}
	return nil
}

func (d *Device) agreesWith(ctx context.Context, eph *ecdh.PrivateKey) error {
	want, err := eph.ECDH(d.agreement)
	if err != nil {
		return unsafef("self test: ECDH: %v", err)
	}
	defer secret.Wipe(want)
	got, err := d.ECDH(ctx, eph.PublicKey())
	if err != nil {
		return err
	}
	defer secret.Wipe(got)
	if subtle.ConstantTimeCompare(got, want) != 1 {
		return unsafef("self test: ECDH with the agreement key differs from software: the public object is not its own, or the token computes wrongly")
	}
	return nil
}

// testSign verifies a signature in software, and that another digest fails.
func (d *Device) testSign(ctx context.Context) error {
	digest := d.digest([]byte("conclave hsm self test"))
	sig, err := d.Sign(ctx, digest)
	if err != nil {
		return err
	}
	n := d.set.curve.size
	r, s := new(big.Int).SetBytes(sig[:n]), new(big.Int).SetBytes(sig[n:])
	if !ecdsa.Verify(d.signing, digest, r, s) {
		return unsafef("self test: a signature of the signing key does not verify: the public object is not its own, or the token computes wrongly")
	}
	if ecdsa.Verify(d.signing, d.digest([]byte("another message")), r, s) {
		return unsafef("self test: a signature of the signing key verifies for another message")
	}
	return nil
}

func (d *Device) digest(msg []byte) []byte {
	if d.set.curve.digest == sha256.Size {
		h := sha256.Sum256(msg)
		return h[:]
	}
	h := sha512.Sum384(msg)
	return h[:]
}

// testWrap makes the round trip and sees alterations and another AAD refused.
func (d *Device) testWrap(ctx context.Context) error {
	aad, key := []byte("conclave hsm self test"), bytes.Repeat([]byte{0xa5}, 32)
	blob, err := d.Wrap(ctx, aad, key)
	if err != nil {
		return err
	}
	again, err := d.Wrap(ctx, aad, key)
	if err != nil {
		return err
	}
	if bytes.Equal(blob[1:1+ivSize], again[1:1+ivSize]) {
		return unsafef("self test: two wrappings have one IV")
	}
	if bytes.Contains(blob, key[:8]) {
		return unsafef("self test: a wrapped key is readable")
	}
	got, err := d.Unwrap(ctx, aad, blob)
	if err != nil {
		return err
	}
	defer got.Destroy()
	if !bytes.Equal(got.Reveal(), key) {
		return unsafef("self test: unwrapping returns another key than was wrapped")
	}
	if err := d.mustNotOpen(ctx, []byte("another AAD"), blob); err != nil {
		return err
	}
	for _, i := range []int{1, 1 + ivSize, len(blob) - 1} { // IV, ciphertext, tag
		bad := bytes.Clone(blob)
		bad[i] ^= 1
		if err := d.mustNotOpen(ctx, aad, bad); err != nil {
			return err
		}
	}
	return nil
}

func (d *Device) mustNotOpen(ctx context.Context, aad, blob []byte) error {
	got, err := d.Unwrap(ctx, aad, blob)
	switch {
	case err == nil:
		got.Destroy()
		return unsafef("self test: the token opens an altered blob")
	case errors.Is(err, ErrInvalid):
		return nil
	}
	return err
}

// testRandom refuses a generator that stands still. It is no test of quality:
// that is the token's certification.
func (d *Device) testRandom(ctx context.Context) error {
	var a, b [64]byte
	if err := d.Random(ctx, a[:]); err != nil {
		return err
	}
	if err := d.Random(ctx, b[:]); err != nil {
		return err
	}
	if a == b || bytes.Count(a[:], a[:1]) == len(a) || bytes.Count(b[:], b[:1]) == len(b) {
		return unsafef("self test: the random number generator repeats itself")
	}
	return nil
}
