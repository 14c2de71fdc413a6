// Package hsm is a hardware root in a PKCS#11 token: an agreement key (ECDH), a
// signing key (ECDSA) and a wrapping key (AES-256), generated in the token and
// never leaving it.
//
// Provision makes the keys, Open finds them, checks their attributes and runs
// the start-up self test, which includes the known attacks on the PKCS#11 API
// (Clulow, "On the Security of PKCS#11", CHES 2003). A Device is safe for
// concurrent use; every call has a deadline and recovers lost sessions by
// itself. DESIGN.md says why it is built this way.
package hsm

import (
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"github.com/miekg/pkcs11"
	"golang.org/x/sync/semaphore"
)

// Device is an open hardware root.
type Device struct {
	set  *settings
	mod  *module
	pin  *userPIN // under loginMu
	info pkcs11.TokenInfo

	agreement    *ecdh.PublicKey
	signing      *ecdsa.PublicKey
	signingPoint []byte

	imports   *importProfile // nil: the token cannot import keys, noImports says why
	noImports string
	objects   objects

	loginMu sync.Mutex

	probing    *semaphore.Weighted // one health check at a time
	probeEvery time.Duration
	hook       atomic.Pointer[func(op string) error] // tests: runs before every device call
	closing    chan struct{}                         // closed by Close
	finished   chan struct{}                         // closed when the device is dismantled

	serial bool          // light calls gain nothing from a second session; set by Open
	epoch  atomic.Uint64 // sessions of an earlier one are void
	unwell atomic.Bool   // sick != nil

	mu        sync.Mutex
	queue     []passenger // calls that wait for a worker
	workers   []*worker   // all goroutines, those with abandoned calls included
	idle      []*worker   // parked; the one used last is at the end
	busy      int         // workers with a call, abandoned ones left out
	light     int         // those of them with a light call
	abandoned int
	watchdog  *time.Timer
	watching  bool // the watchdog has been wound up for calls
	holds     int  // what else keeps the module
	closed    bool
	gone      bool  // dismantling
	sick      error // why the device is unhealthy; nil when it is not
	probeAt   time.Time
	failures  int // in a row; the probes back off
	nursed    bool
}

// attach loads the library and returns a device whose keys are not yet known.
func attach(cfg Config) (*Device, error) {
	set, err := cfg.settings()
	if err != nil {
		return nil, err
	}
	mod, err := loadModule(set.uri.ModulePath, set.softHSMConf)
	if err != nil {
		return nil, err
	}
	pin, err := cfg.userPIN(set.uri)
	if err != nil {
		return nil, err
	}
	mod.retain()
	return &Device{set: set, objects: objects{max: set.maxLoaded}, mod: mod, pin: pin, probing: semaphore.NewWeighted(1),
		probeEvery: probeInterval, closing: make(chan struct{}), finished: make(chan struct{})}, nil
}

// Open finds the device keys that Provision made, refuses them when any is
// looser than its template, and runs the self test. Errors: ErrInvalid,
// ErrModule, ErrTokenNotFound, ErrPIN, ErrNotProvisioned, ErrUnsafeToken,
// ErrUnsupported, ErrUnavailable.
func Open(ctx context.Context, cfg Config) (*Device, error) {
	d, err := attach(cfg)
	if err != nil {
		return nil, err
	}
	if err := d.start(ctx); err != nil {
		_ = d.Close() // the reason for the refusal matters more
		return nil, err
	}
	return d, nil
}

func (d *Device) start(ctx context.Context) error {
	if err := d.learn(ctx); err != nil {
		return err
	}
	return d.selfTest(ctx)
}

// identity is what Open learns about the token.
type identity struct {
	info               pkcs11.TokenInfo
	agreement, signing []byte
}

// learn reads the public keys and checks the attributes of all keys.
func (d *Device) learn(ctx context.Context) error {
	id, err := call(ctx, d, callOptions{op: "open"}, func(s *session) (identity, error) {
		var id identity
		_, info, err := findSlot(s.p11, d.set.uri)
		if err != nil {
			return id, err
		}
		id.info = info
		if err := s.checkMechanisms(); err != nil {
			return id, err
		}
		for _, k := range []struct {
			r role
			h pkcs11.ObjectHandle
		}{{agreementRole, s.keys.agreement}, {signingRole, s.keys.signing}, {wrappingRole, s.keys.wrapping}} {
			if err := s.checkAttributes(k.r, k.h); err != nil {
				return id, err
			}
		}
		if id.agreement, err = s.point(s.keys.agreementPub); err != nil {
			return id, err
		}
		id.signing, err = s.point(s.keys.signingPub)
		return id, err
	})
	if err != nil {
		return err
	}
	d.info = id.info
	agreement, err := d.set.curve.ecdh.NewPublicKey(id.agreement)
	if err != nil {
		return unsafef("the agreement key's public point is not on %s", d.set.curve.name)
	}
	if d.signing, err = ecdsa.ParseUncompressedPublicKey(d.set.curve.ec, id.signing); err != nil {
		return unsafef("the signing key's public point is not on %s", d.set.curve.name)
	}
	d.signingPoint = id.signing
	d.agreement = agreement
	// Sessions opened before the keys were known have not been compared with them.
	d.flush()
	return nil
}

// checkMechanisms refuses a token that lacks what the device needs.
func (s *session) checkMechanisms() error {
	for _, m := range []struct {
		mech, flag uint
		name       string
	}{
		{mechAgreement, pkcs11.CKF_DERIVE, "CKM_ECDH1_DERIVE"},
		{mechSigning, pkcs11.CKF_SIGN, "CKM_ECDSA"},
		{mechWrapping, pkcs11.CKF_ENCRYPT | pkcs11.CKF_DECRYPT, "CKM_AES_GCM"},
	} {
		mi, err := s.p11.GetMechanismInfo(s.slot, []*pkcs11.Mechanism{pkcs11.NewMechanism(m.mech, nil)})
		if isRV(err, pkcs11.CKR_MECHANISM_INVALID) || err == nil && mi.Flags&m.flag != m.flag {
			return fmt.Errorf("%w: %s", ErrUnsupported, m.name)
		}
		if err != nil {
			return fmt.Errorf("C_GetMechanismInfo: %w", err)
		}
	}
	return nil
}

// AgreementKey returns the public half of the agreement key.
func (d *Device) AgreementKey() *ecdh.PublicKey { return d.agreement }

// SigningKey returns the public half of the signing key.
func (d *Device) SigningKey() *ecdsa.PublicKey {
	k := *d.signing
	return &k
}

// Describe names the token for a person: manufacturer, model, serial, firmware.
func (d *Device) Describe() string {
	return fmt.Sprintf("PKCS#11 token %q: %s %s, serial %s, firmware %d.%d, keys %q on %s",
		clean(d.info.Label), shown(d.info.ManufacturerID), shown(d.info.Model), shown(d.info.SerialNumber),
		d.info.FirmwareVersion.Major, d.info.FirmwareVersion.Minor, d.set.label, d.set.curve.name)
}

// shown makes a string from a token fit for a terminal.
func shown(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, clean(s))
}

// Close ends the device. Calls that come later are refused with ErrUnavailable.
// It waits for calls under way as long as a call may take; ErrUnavailable says
// that one still hangs in the library. It may be called again.
func (d *Device) Close() error {
	d.mu.Lock()
	first := !d.closed
	d.closed = true
	queue := d.queue
	d.queue = nil
	for _, p := range queue {
		p.base().left = true
		p.base().err = unavailablef("%s: the device is closed", p.base().o.op)
	}
	for _, w := range d.idle {
		close(w.wake)
	}
	d.idle = nil
	last := d.lastGone()
	if d.watchdog != nil && d.busy == 0 {
		d.watchdog.Stop()
	}
	d.mu.Unlock()
	for _, p := range queue {
		p.base().o.released()
		p.base().tell()
	}
	if first {
		close(d.closing)
	}
	if last {
		go d.dismantle() // closing a session may hang like any other call
	}
	timer := time.NewTimer(d.set.timeout)
	defer timer.Stop()
	select {
	case <-d.finished:
		return nil
	case <-timer.C:
		return unavailablef("close: a call still hangs in the library")
	}
}

// dismantle runs once, when the device is closed and no call is inside.
func (d *Device) dismantle() {
	ctx, cancel := context.WithTimeout(context.Background(), d.set.timeout)
	defer cancel()
	if d.mod.gate.Acquire(ctx, 1) == nil {
		d.objects.end(d)
		d.mod.gate.Release(1)
	}
	d.pin.destroy()
	d.mod.release(ctx)
	close(d.finished)
}
