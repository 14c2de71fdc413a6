package tpm

import (
	"context"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/kms/secret"
)

// Fault is a step that brings a TPM into a state that Open or Provision meets.
type Fault func(d *Device, c *conn) error

// Apply runs steps on a TPM that may or may not be provisioned.
func Apply(ctx context.Context, cfg Config, faults ...Fault) error {
	d, err := newDevice(cfg, true)
	if err != nil {
		return err
	}
	defer d.abandon()
	return d.run(ctx, "fault", func(c *conn) error {
		for _, f := range faults {
			if err := f(d, c); err != nil {
				return err
			}
		}
		return nil
	})
}

// EvictKey removes the i-th key, as if Provision had been cut short.
func EvictKey(i int) Fault {
	return func(d *Device, c *conn) error {
		salt, err := d.saltKey(c)
		if err != nil {
			return err
		}
		defer c.flush(salt.handle)
		at := tpm2.TPMHandle(d.cfg.PersistentBase) + tpm2.TPMHandle(i)
		o, err := c.readObject(at)
		if err != nil {
			return err
		}
		return d.evict(c, salt, o.named(), at)
	}
}

// LoosenKey replaces the i-th key (1 or 2) by one with another template.
func LoosenKey(i int, change func(*tpm2.TPMTPublic)) Fault {
	return func(d *Device, c *conn) error {
		if err := EvictKey(i)(d, c); err != nil {
			return err
		}
		salt, err := d.saltKey(c)
		if err != nil {
			return err
		}
		defer c.flush(salt.handle)
		parent, err := c.readObject(tpm2.TPMHandle(d.cfg.PersistentBase))
		if err != nil {
			return err
		}
		template := d.keyTemplates()[i].template
		change(&template)
		return d.makeChild(c, salt, parent, template, tpm2.TPMHandle(d.cfg.PersistentBase)+tpm2.TPMHandle(i))
	}
}

// SetLockout changes the lockout authorization value from ours to another.
func SetLockout(value []byte) Fault {
	return func(d *Device, c *conn) error {
		_, err := (tpm2.HierarchyChangeAuth{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(d.auth.lockout.Reveal())},
			NewAuth:    tpm2.TPM2BAuth{Buffer: value},
		}).Execute(c)
		return err
	}
}

// SealForeign seals data under our storage key with another authorization value
// and template than Wrap's, and returns it in Wrap's encoding.
func SealForeign(ctx context.Context, d *Device, auth, data []byte) ([]byte, error) {
	return do(ctx, d, call[[]byte]{op: "seal", fn: func(c *conn) (blob []byte, err error) {
		err = d.withKeyAuth(c, encryptInOut(), func(s tpm2.Session) error {
			rsp, err := (tpm2.Create{
				ParentHandle: d.storage.auth(s),
				InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
					UserAuth: tpm2.TPM2BAuth{Buffer: auth},
					Data:     tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: data}),
				}},
				InPublic: tpm2.New2B(d.suite.sealed()),
			}).Execute(c)
			if err != nil {
				return err
			}
			blob = encodeBlob(rsp.OutPublic.Bytes(), rsp.OutPrivate.Buffer)
			return nil
		})
		return blob, err
	}})
}

// AuthValues returns copies of the owner, lockout and key authorization values.
func AuthValues(d *Device) (owner, lockout, key *secret.Bytes) {
	all, err := loadAuths(d.cfg, true)
	if err != nil {
		panic(err)
	}
	defer all.destroy()
	dup := func(s *secret.Bytes) *secret.Bytes {
		c, err := secret.Copy(s.Reveal())
		if err != nil {
			panic(err) // no locked memory: no test
		}
		return c
	}
	return dup(all.owner), dup(all.lockout), dup(all.key)
}

// DuplicateImported tries to take an imported key out of the TPM again and
// returns the TPM's refusals.
func DuplicateImported(ctx context.Context, d *Device, blob []byte) (byPolicy, byAuth, err error) {
	k, err := d.importBlob(ctx, importHMAC, blob)
	if err != nil {
		return nil, nil, err
	}
	err = d.run(ctx, "duplicate", func(c *conn) error {
		return d.withKeyAuth(c, encryptOut(), func(s tpm2.Session) error {
			o, err := d.loadObject(c, s, k)
			if err != nil {
				return err
			}
			defer c.flush(o.handle)
			duplicate := func(auth tpm2.Session) error {
				_, err := (tpm2.Duplicate{
					ObjectHandle: o.auth(auth), NewParentHandle: tpm2.TPMRHNull,
					Symmetric: tpm2.TPMTSymDef{Algorithm: tpm2.TPMAlgNull},
				}).Execute(c)
				return err
			}
			policy, end, err := tpm2.PolicySession(c, tpm2.TPMAlgSHA384, 16)
			if err != nil {
				return err
			}
			if _, err := (tpm2.PolicyCommandCode{PolicySession: policy.Handle(), Code: tpm2.TPMCCDuplicate}).Execute(c); err != nil {
				return err
			}
			byPolicy = duplicate(policy)
			if err := end(); err != nil {
				return err
			}
			byAuth = duplicate(s)
			return nil
		})
	})
	return byPolicy, byAuth, err
}

// UseWithoutAuth uses an imported key with the empty authorization value that it
// came with.
func UseWithoutAuth(ctx context.Context, d *Device, blob []byte) error {
	k, err := d.importBlob(ctx, importHMAC, blob)
	if err != nil {
		return err
	}
	return d.run(ctx, "use", func(c *conn) error {
		var o *object
		err := d.withKeyAuth(c, encryptInOut(), func(s tpm2.Session) (err error) {
			o, err = d.loadObject(c, s, k)
			return err
		})
		if err != nil {
			return err
		}
		defer c.flush(o.handle)
		return c.withSession(d.storage, func(s tpm2.Session) error {
			_, err := (tpm2.Hmac{Handle: o.auth(s), HashAlg: tpm2.TPMAlgSHA256}).Execute(c)
			return err
		}, encryptInOut())
	})
}

// UndefineCounter removes the counter, as a TPM lacks it that was provisioned before
// there was one, and as an attacker with the owner's authorization could.
func UndefineCounter() Fault {
	return func(d *Device, c *conn) error {
		x, err := d.findCounter(c)
		if err != nil {
			return err
		}
		salt, err := d.saltKey(c)
		if err != nil {
			return err
		}
		defer c.flush(salt.handle)
		return c.withSession(salt, func(s tpm2.Session) error {
			_, err := (tpm2.NVUndefineSpace{
				AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: s}, NVIndex: x.named(),
			}).Execute(c)
			return err
		}, tpm2.Auth(d.auth.owner.Reveal()))
	}
}
