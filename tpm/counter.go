package tpm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// counterLen is the size of an NV counter in bytes (TPM 2.0 Part 2, 13.2).
const counterLen = 8

// ErrNoCounter: the TPM was provisioned by a release that made no counter. Provision
// adds it.
var ErrNoCounter = errors.New("tpm: there is no counter")

// counterIndex is the index of the device's counter: it only goes up, also when it is
// undefined and defined again, whoever does so (TPM 2.0 Part 1, 37.2.3). It takes the
// authorization value of the keys.
func (d *Device) counterIndex(written bool) tpm2.TPMSNVPublic {
	return tpm2.TPMSNVPublic{
		NVIndex: d.policyIndex(true).NVIndex + 2, NameAlg: d.suite.hash, DataSize: counterLen,
		Attributes: tpm2.TPMANV{NT: tpm2.TPMNTCounter, AuthWrite: true, AuthRead: true, NoDA: true, Written: written},
	}
}

// makeCounter defines the counter where it is missing and the handle is an owner's.
// Foreign things at the handle are left alone and refused.
func (d *Device) makeCounter(c *conn, salt *object) error {
	public := d.counterIndex(false)
	if public.NVIndex > nvOwnerMax {
		return nil
	}
	if _, err := d.findCounter(c); !errors.Is(err, ErrNoCounter) {
		return err
	}
	d.extend(c)
	return d.withOwner(c, salt, func(s tpm2.Session) error {
		_, err := (tpm2.NVDefineSpace{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: s},
			Auth:       tpm2.TPM2BAuth{Buffer: d.auth.key.Reveal()}, PublicInfo: tpm2.New2B(public),
		}).Execute(c)
		return err
	})
}

// findCounter returns the counter, ErrNoCounter where there is none.
func (d *Device) findCounter(c *conn) (*nvIndex, error) {
	at := d.counterIndex(false).NVIndex
	if at > nvOwnerMax {
		return nil, ErrNoCounter
	}
	x, err := c.readNVPublic(at)
	if handleMissing(err) {
		return nil, ErrNoCounter
	}
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(x.name.Buffer, nvName(d.counterIndex(false)).Buffer) && !bytes.Equal(x.name.Buffer, nvName(d.counterIndex(true)).Buffer) {
		return nil, invalid("index %#x is taken by another: undefine it or choose another PersistentBase", uint32(at))
	}
	return x, nil
}

// HasCounter reports whether the TPM has a counter for this device. Errors: as of Check.
func (d *Device) HasCounter(ctx context.Context) (bool, error) {
	err := d.run(ctx, "find the counter", func(c *conn) error {
		_, err := d.findCounter(c)
		return err
	})
	if errors.Is(err, ErrNoCounter) {
		return false, nil
	}
	return err == nil, err
}

// Count returns the value of the device's counter, 0 if it was never incremented. The
// answer is authenticated. Errors: ErrNoCounter, and those of Check.
func (d *Device) Count(ctx context.Context) (uint64, error) {
	return d.useCounter(ctx, "read the counter", d.readCounter)
}

// Increment adds one to the device's counter and returns its value. It writes the TPM's
// non-volatile memory, which bears a limited number of writes. Errors: as of Count.
func (d *Device) Increment(ctx context.Context) (uint64, error) {
	return d.useCounter(ctx, "increment the counter", func(c *conn, x *nvIndex) (uint64, error) {
		err := c.withSession(d.storage, func(s tpm2.Session) error {
			_, err := (tpm2.NVIncrement{AuthHandle: x.with(s), NVIndex: x.named()}).Execute(c)
			return err
		}, tpm2.Auth(d.auth.key.Reveal()))
		if err != nil {
			return 0, err
		}
		if x, err = d.findCounter(c); err != nil { // the first increment changes the name
			return 0, err
		}
		return d.readCounter(c, x)
	})
}

func (d *Device) useCounter(ctx context.Context, op string, fn func(*conn, *nvIndex) (uint64, error)) (uint64, error) {
	return do(ctx, d, call[uint64]{op: op, fn: func(c *conn) (uint64, error) {
		x, err := d.findCounter(c)
		if err != nil {
			return 0, err
		}
		return fn(c, x)
	}})
}

func (d *Device) readCounter(c *conn, x *nvIndex) (v uint64, err error) {
	if !x.public.Attributes.Written {
		return 0, nil
	}
	err = c.withSession(d.storage, func(s tpm2.Session) error {
		rsp, err := (tpm2.NVRead{AuthHandle: x.with(s), NVIndex: x.named(), Size: counterLen}).Execute(c)
		if err != nil {
			return err
		}
		if len(rsp.Data.Buffer) != counterLen {
			return fmt.Errorf("tpm: %w: the counter has %d bytes", ErrUnsafe, len(rsp.Data.Buffer))
		}
		v = binary.BigEndian.Uint64(rsp.Data.Buffer)
		return nil
	}, encryptOut(), tpm2.Auth(d.auth.key.Reveal()))
	return v, err
}

// with authorizes access to the index in a session that knows its authorization value.
func (x *nvIndex) with(s tpm2.Session) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: x.public.NVIndex, Name: x.name, Auth: s}
}
