package tpm

import (
	"bytes"
	"context"
	"slices"

	"github.com/google/go-tpm/tpm2"
)

// EvictHandle removes a persistent object of the owner's range.
func EvictHandle(at tpm2.TPMHandle) Fault {
	return func(d *Device, c *conn) error {
		o, err := c.readObject(at)
		if err != nil {
			return err
		}
		salt, err := d.saltKey(c)
		if err != nil {
			return err
		}
		defer c.flush(salt.handle)
		return d.evict(c, salt, o.named(), at)
	}
}

// UndefinePlatform removes an index that the platform's maker defined. swtpm
// leaves the platform authorization empty.
func UndefinePlatform(at tpm2.TPMHandle) Fault {
	return func(_ *Device, c *conn) error {
		x, err := c.readNVPublic(at)
		if err != nil {
			return err
		}
		_, err = (tpm2.NVUndefineSpace{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHPlatform, Auth: tpm2.PasswordAuth(nil)}, NVIndex: x.named(),
		}).Execute(c)
		return err
	}
}

// UndefineOwner removes an index by the owner authorization.
func UndefineOwner(at tpm2.TPMHandle) Fault {
	return func(d *Device, c *conn) error {
		x, err := c.readNVPublic(at)
		if err != nil {
			return err
		}
		return d.asOwner(c, func(s tpm2.Session) error {
			_, err := (tpm2.NVUndefineSpace{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: s}, NVIndex: x.named()}).Execute(c)
			return err
		})
	}
}

// DefineOwner defines an index that is not ours.
func DefineOwner(at tpm2.TPMHandle, size uint16) Fault {
	return func(d *Device, c *conn) error {
		return d.asOwner(c, func(s tpm2.Session) error {
			_, err := (tpm2.NVDefineSpace{
				AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: s}, PublicInfo: tpm2.New2B(d.suite.ownerIndex(at, size, false)),
			}).Execute(c)
			return err
		})
	}
}

// WriteOwner writes an index by the owner authorization.
func WriteOwner(at tpm2.TPMHandle, data []byte) Fault {
	return func(d *Device, c *conn) error {
		x, err := c.readNVPublic(at)
		if err != nil {
			return err
		}
		return d.asOwner(c, func(s tpm2.Session) error {
			_, err := (tpm2.NVWrite{
				AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: s}, NVIndex: x.named(), Data: tpm2.TPM2BMaxNVBuffer{Buffer: data},
			}).Execute(c)
			return err
		})
	}
}

func (d *Device) asOwner(c *conn, fn func(tpm2.Session) error) error {
	salt, err := c.readObject(tpm2.TPMHandle(d.cfg.PersistentBase))
	if err != nil {
		return err
	}
	return c.withSession(salt, fn, tpm2.Auth(d.auth.owner.Reveal()))
}

// ECDHRaw has the TPM multiply a point that no ecdh.PublicKey can be.
func ECDHRaw(ctx context.Context, d *Device, x, y []byte) ([]byte, error) {
	return do(ctx, d, call[[]byte]{op: "ECDH", fn: func(c *conn) (z []byte, err error) {
		err = d.withDeviceKey(c, encryptInOut(), func(s tpm2.Session) error {
			rsp, err := (tpm2.ECDHZGen{KeyHandle: d.agreement.auth(s), InPoint: tpm2.New2B(tpm2.TPMSECCPoint{
				X: tpm2.TPM2BECCParameter{Buffer: x}, Y: tpm2.TPM2BECCParameter{Buffer: y},
			})}).Execute(c)
			if err != nil {
				return err
			}
			z = rsp.OutPoint.Bytes()
			return nil
		})
		return z, err
	}})
}

// DuplicateTo has the TPM duplicate a generated key to a storage key, with the
// policy as far as it can be satisfied for that.
func DuplicateTo(ctx context.Context, d *Device, blob, parent []byte) error {
	k, err := d.importBlob(ctx, importHMAC, blob)
	if err != nil {
		return err
	}
	b, _ := d.suite.parseImport(blob)
	names, _ := d.suite.parseNames(b.label)
	to, err := d.suite.parseRecipients([][]byte{parent})
	if err != nil {
		return err
	}
	return d.run(ctx, "duplicate", func(c *conn) error {
		return d.withKeyAuth(c, encryptOut(), func(s tpm2.Session) error {
			o, err := d.loadObject(c, s, k)
			if err != nil {
				return err
			}
			defer c.flush(o.handle)
			if i := slices.IndexFunc(names, func(n []byte) bool { return bytes.Equal(n, to[0].name) }); i < 0 {
				names[0] = to[0].name // as if it were one
			}
			return d.duplicateFor(c, o, to[0], names, &importBlob{})
		})
	})
}
