package tpm

import "github.com/google/go-tpm/tpm2"

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
