package tpm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/kms/secret"
)

// Provision takes ownership of a TPM and makes the device keys and an
// attestation key: it sets the owner and lockout authorizations, creates the
// keys and makes them persistent. Where the device keys are there and only the
// attestation key or the counter is missing, it adds that. It is refused with ErrProvisioned when the keys exist, with
// ErrAuth when the owner or lockout authorization is set to another value, and
// with ErrInvalid when a foreign object occupies a handle. A run that was cut
// short is taken up by running it again.
func Provision(ctx context.Context, cfg Config) error {
	d, err := newDevice(cfg, true)
	if err != nil {
		return err
	}
	defer d.abandon()
	return d.run(ctx, "provision", d.provision)
}

func (d *Device) provision(c *conn) error {
	leftover, err := d.inventory(c)
	if errors.Is(err, ErrProvisioned) {
		if _, missing := d.findCounter(c); !errors.Is(missing, ErrNoCounter) || d.counterIndex(false).NVIndex > nvOwnerMax {
			return err
		}
		return d.addCounter(c)
	}
	if err != nil {
		return err
	}
	salt, err := d.saltKey(c)
	if err != nil {
		return err
	}
	defer c.flush(salt.handle)
	perm, err := c.property(tpm2.TPMPTPermanent)
	if err != nil {
		return err
	}
	if len(leftover) > 0 && perm&permOwnerAuthSet == 0 {
		return invalid("object %#x exists though the TPM has no owner: evict it or choose another PersistentBase", uint32(leftover[0].handle))
	}
	if perm&permOwnerAuthSet == 0 && perm&permLockoutAuthSet != 0 {
		// Trying ours would count as an attack.
		return fmt.Errorf("tpm: %w: the lockout authorization is set though the TPM has no owner: it is somebody else's; clear the TPM in the firmware's setup", ErrAuth)
	}
	if err := d.takeHierarchy(c, salt, tpm2.TPMRHOwner, d.auth.owner, perm&permOwnerAuthSet != 0); err != nil {
		return fmt.Errorf("owner authorization: %w", err)
	}
	if err := d.takeHierarchy(c, salt, tpm2.TPMRHLockout, d.auth.lockout, perm&permLockoutAuthSet != 0); err != nil {
		return fmt.Errorf("lockout authorization: %w", err)
	}
	if err := d.makeCounter(c, salt); err != nil {
		return fmt.Errorf("counter: %w", err)
	}
	if d.signing != nil {
		return d.makeChild(c, salt, d.storage, d.suite.attestation(), d.handleOf(attestationKey))
	}
	for _, o := range leftover {
		if err := d.evict(c, salt, o.named(), o.handle); err != nil {
			return err
		}
	}
	return d.makeKeys(c, salt)
}

// addCounter makes the counter of a TPM that was provisioned before there was one.
func (d *Device) addCounter(c *conn) error {
	salt, err := d.saltKey(c)
	if err != nil {
		return err
	}
	defer c.flush(salt.handle)
	return d.makeCounter(c, salt)
}

// extend gives the next step of Provision its own deadline: making keys may take
// a chip many seconds.
func (d *Device) extend(c *conn) { c.deadline = time.Now().Add(d.cfg.CallTimeout) }

func (d *Device) handleOf(key int) tpm2.TPMHandle {
	return tpm2.TPMHandle(d.cfg.PersistentBase) + tpm2.TPMHandle(key)
}

// inventory looks at our handles. All in place is ErrProvisioned. What a
// broken-off run left is returned; anything else there is refused. Where the three
// device keys are complete it remembers storage and signing key.
func (d *Device) inventory(c *conn) ([]*object, error) {
	var found []*object
	for i, k := range d.keyTemplates() {
		o, err := c.readObject(d.handleOf(i))
		if handleMissing(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if !sameTemplate(o.public, k.template) {
			return nil, invalid("handle %#x is taken by another object: evict it or choose another PersistentBase", uint32(o.handle))
		}
		found = append(found, o)
	}
	switch {
	case len(found) == keyCount:
		return nil, fmt.Errorf("tpm: %w at %#x", ErrProvisioned, d.cfg.PersistentBase)
	case len(found) == keyCount-1 && found[len(found)-1].handle == d.handleOf(attestationKey-1):
		d.storage, d.signing = found[0], found[len(found)-1]
	}
	return found, nil
}

// saltKey makes a passing storage key in the null hierarchy to salt sessions
// with while the TPM has no key of ours.
func (d *Device) saltKey(c *conn) (*object, error) {
	rsp, err := (tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHNull, InPublic: tpm2.New2B(d.suite.storage())}).Execute(c)
	if err != nil {
		return nil, err
	}
	o, err := c.readObject(rsp.ObjectHandle)
	if err != nil {
		c.flush(rsp.ObjectHandle)
	}
	return o, err
}

// takeHierarchy sets a hierarchy's authorization value from empty, or proves
// that it is ours already by setting it to itself.
func (d *Device) takeHierarchy(c *conn, salt *object, h tpm2.TPMHandle, value *secret.Bytes, set bool) error {
	d.extend(c)
	auth := make([]byte, authLen)
	defer secret.Wipe(auth)
	if set {
		copy(auth, value.Reveal())
	}
	return c.withSession(salt, func(s tpm2.Session) error {
		_, err := (tpm2.HierarchyChangeAuth{
			AuthHandle: tpm2.AuthHandle{Handle: h, Auth: &newAuthSession{Session: s, auth: auth, next: value.Reveal()}},
			NewAuth:    tpm2.TPM2BAuth{Buffer: value.Reveal()},
		}).Execute(c)
		if errors.Is(err, tpm2.TPMRCBadAuth) || errors.Is(err, tpm2.TPMRCAuthFail) {
			return fmt.Errorf("tpm: %w: set to a value that does not come from this file (owner_file, or auth_file)", ErrAuth)
		}
		return err
	}, encryptIn(), tpm2.Auth(auth))
}

// makeKeys creates the storage key and under it the others. The signing key is
// made persistent last: only then does the TPM count as provisioned. No key is
// bound to a policy that the TPM has not been seen to satisfy.
func (d *Device) makeKeys(c *conn, salt *object) error {
	storage, err := d.makeStorage(c, salt, d.handleOf(0))
	if err != nil {
		return err
	}
	if len(d.cfg.PCRs) > 0 {
		if err := d.approve(c, salt, nil); err != nil {
			return err
		}
		d.storage = storage // salts the session
		if err := d.withPolicy(c, encryptIn(), func(tpm2.Session) error { return nil }); err != nil {
			return fmt.Errorf("policy of the PCRs, before any key is bound to it: %w", unsupported(err))
		}
	}
	templates := d.keyTemplates()
	for _, i := range []int{1, attestationKey, 2} {
		if err := d.makeChild(c, salt, storage, templates[i].template, d.handleOf(i)); err != nil {
			return err
		}
	}
	return nil
}

// makeStorage creates the storage key as a primary of the owner hierarchy. The
// random unique field keeps anyone with the owner authorization from making
// the same key again.
func (d *Device) makeStorage(c *conn, salt *object, at tpm2.TPMHandle) (*object, error) {
	d.extend(c)
	x, y := make([]byte, d.suite.field), make([]byte, d.suite.field)
	rand.Read(x)
	rand.Read(y)
	template := d.suite.storage()
	template.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: x}, Y: tpm2.TPM2BECCParameter{Buffer: y},
	})
	var made *tpm2.CreatePrimaryResponse
	err := c.withSession(salt, func(s tpm2.Session) (err error) {
		made, err = (tpm2.CreatePrimary{
			PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: s},
			InSensitive:   d.keyAuthOnly(),
			InPublic:      tpm2.New2B(template),
		}).Execute(c)
		return err
	}, encryptInOut(), tpm2.Auth(d.auth.owner.Reveal()))
	if err != nil {
		return nil, err
	}
	defer c.flush(made.ObjectHandle)
	if err := d.evict(c, salt, tpm2.NamedHandle{Handle: made.ObjectHandle, Name: made.Name}, at); err != nil {
		return nil, err
	}
	return c.readObject(at)
}

// makeChild creates a key under the storage key and makes it persistent.
func (d *Device) makeChild(c *conn, salt, parent *object, template tpm2.TPMTPublic, at tpm2.TPMHandle) error {
	d.extend(c)
	var loaded *tpm2.LoadResponse
	err := c.withSession(parent, func(s tpm2.Session) error {
		made, err := (tpm2.Create{
			ParentHandle: parent.auth(s), InSensitive: d.keyAuthOnly(), InPublic: tpm2.New2B(template),
		}).Execute(c)
		if err != nil {
			return err
		}
		loaded, err = (tpm2.Load{ParentHandle: parent.auth(s), InPrivate: made.OutPrivate, InPublic: made.OutPublic}).Execute(c)
		return err
	}, encryptInOut(), tpm2.Auth(d.auth.key.Reveal()))
	if err != nil {
		return err
	}
	defer c.flush(loaded.ObjectHandle)
	return d.evict(c, salt, tpm2.NamedHandle{Handle: loaded.ObjectHandle, Name: loaded.Name}, at)
}

// keyAuthOnly gives a new key its authorization value and nothing else.
func (d *Device) keyAuthOnly() tpm2.TPM2BSensitiveCreate {
	return tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
		UserAuth: tpm2.TPM2BAuth{Buffer: d.auth.key.Reveal()},
		Data:     tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{}),
	}}
}

// evict makes a transient object persistent at a handle, or removes the
// persistent object that is there (TPM 2.0 Part 3, TPM2_EvictControl).
func (d *Device) evict(c *conn, salt *object, o tpm2.NamedHandle, at tpm2.TPMHandle) error {
	return c.withSession(salt, func(s tpm2.Session) error {
		_, err := (tpm2.EvictControl{
			Auth:             tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: s},
			ObjectHandle:     o,
			PersistentHandle: tpm2.TPMIDHPersistent(at),
		}).Execute(c)
		return err
	}, tpm2.Auth(d.auth.owner.Reveal()))
}
