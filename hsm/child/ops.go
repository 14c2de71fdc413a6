package child

import (
	"bytes"
	"context"
	"crypto/ecdh"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms/secret"
)

const (
	maxArgument = 80 << 10 // bytes of one argument that are sent at all; what is longer no method takes
	randomChunk = 32 << 10
)

// one makes a request whose reply has one part and returns a copy of it.
func (d *Device) one(ctx context.Context, m message) ([]byte, error) {
	var out []byte
	err := d.call(ctx, m, func(reply message) error {
		if reply.n != 1 {
			return badReply(m.op)
		}
		out = bytes.Clone(reply.parts[0])
		return nil
	})
	return out, err
}

func badReply(o op) error {
	return unavailablef("%s: the PKCS#11 process answered with a malformed frame", opNames[o])
}

// fits refuses arguments that no frame has room for.
func fits(o op, args ...[]byte) error {
	for _, a := range args {
		if len(a) > maxArgument {
			return invalidf("%s: an argument of %d bytes", opNames[o], len(a))
		}
	}
	return nil
}

// ECDH is hsm.Device.ECDH.
func (d *Device) ECDH(ctx context.Context, peer *ecdh.PublicKey) ([]byte, error) {
	if peer == nil || peer.Curve() != d.id.agreement.Curve() {
		return nil, invalidf("ECDH: the peer's key is not on %v", d.id.agreement.Curve())
	}
	return d.one(ctx, request(opECDH, 0, peer.Bytes()))
}

// Sign is hsm.Device.Sign.
func (d *Device) Sign(ctx context.Context, digest []byte) ([]byte, error) {
	if err := fits(opSign, digest); err != nil {
		return nil, err
	}
	return d.one(ctx, request(opSign, 0, digest))
}

// Wrap is hsm.Device.Wrap.
func (d *Device) Wrap(ctx context.Context, aad, key []byte) ([]byte, error) {
	if len(key) == 0 || len(key) > hsm.MaxWrap {
		return nil, invalidf("Wrap: the key has %d bytes, 1 to %d are possible", len(key), hsm.MaxWrap)
	}
	if err := fits(opWrap, aad); err != nil {
		return nil, err
	}
	return d.one(ctx, request(opWrap, 0, aad, key))
}

// Unwrap is hsm.Device.Unwrap.
func (d *Device) Unwrap(ctx context.Context, aad, wrapped []byte) (*secret.Bytes, error) {
	if err := fits(opUnwrap, aad); err != nil {
		return nil, err
	}
	if len(wrapped) > hsm.MaxWrap+1024 {
		return nil, invalidf("Unwrap: the blob does not open: it has %d bytes", len(wrapped))
	}
	var out *secret.Bytes
	err := d.call(ctx, request(opUnwrap, 0, aad, wrapped), func(reply message) (err error) {
		if reply.n != 1 {
			return badReply(opUnwrap)
		}
		if out, err = secret.Copy(reply.parts[0]); err != nil {
			return unavailablef("%v", err)
		}
		return nil
	})
	return out, err
}

// Random is hsm.Device.Random.
func (d *Device) Random(ctx context.Context, b []byte) error {
	if len(b) == 0 {
		if err := ctx.Err(); err != nil {
			return contextError(opNames[opRandom], err)
		}
		return d.state.Load().err
	}
	for len(b) > 0 {
		part := b[:min(len(b), randomChunk)]
		err := d.call(ctx, request(opRandom, uint64(len(part))), func(reply message) error {
			if reply.n != 1 || len(reply.parts[0]) != len(part) {
				return badReply(opRandom)
			}
			copy(part, reply.parts[0])
			return nil
		})
		if err != nil {
			return err
		}
		b = b[len(part):]
	}
	return nil
}

// Check is hsm.Device.Check.
func (d *Device) Check(ctx context.Context) error { return d.call(ctx, request(opCheck, 0), nil) }

// Attributes is hsm.Device.Attributes.
func (d *Device) Attributes(ctx context.Context) (all []hsm.KeyAttributes, err error) {
	err = d.call(ctx, request(opAttributes, 0), func(reply message) (err error) {
		if reply.n != 1 {
			return badReply(opAttributes)
		}
		if all, err = decodeAttributes(reply.parts[0]); err != nil {
			return badReply(opAttributes)
		}
		return nil
	})
	return all, err
}

// Rewrap is hsm.Device.Rewrap.
func (d *Device) Rewrap(ctx context.Context, blob []byte, recipient []byte) ([]byte, error) {
	if err := fits(opRewrap, append(bytes.Clone(blob), recipient...)); err != nil {
		return nil, err
	}
	return d.one(ctx, request(opRewrap, 0, blob, recipient))
}
