package tpm

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// Device is an opened TPM. It is safe for concurrent use; the TPM executes one
// call at a time. A call waits at most the configured CallTimeout for its turn
// and at most CallTimeout for the TPM. After a call that the TPM let wait that
// long, calls are refused at once with ErrUnavailable until it answers a probe.
type Device struct {
	cfg   Config
	suite *suite
	auth  *auths

	storage, agreement, signing *object
	attestation                 *object // nil: made by a Provision that made three keys
	agreementPub                *ecdh.PublicKey
	signingPub                  *ecdsa.PublicKey
	description                 string

	importPub []byte
	approved  *approved // as last read; belongs to whoever holds the turn

	// kept is written by whoever holds the turn.
	kept atomic.Pointer[keptKey]
	turn chan struct{} // a token: whoever holds it owns all below
	link link
	// broken: reconnect before the next call.
	broken bool
	closed bool
	// failures counts lost connections, so that calls which queued behind a
	// hung one fail with it and do not wait for it again one after another.
	failures uint64
	seenFail chan uint64 // holds the latest value of failures

	breaker breaker
	probe   func(*conn) error // what Check asks, and the probes of a TPM that hangs
}

// Open finds the keys that Provision made, checks their public areas, checks
// that the owner and lockout authorizations are set, and runs a self-test of
// every operation. Errors: ErrUnavailable, ErrAuth, ErrNotProvisioned,
// ErrUnsafe, ErrInvalid.
func Open(ctx context.Context, cfg Config) (*Device, error) {
	d, err := newDevice(cfg, false)
	if err != nil {
		return nil, err
	}
	err = d.discover(ctx)
	if err == nil {
		err = d.selfTest(ctx)
	}
	if err != nil {
		d.abandon()
		return nil, err
	}
	return d, nil
}

// newDevice reads the configuration and connects nothing. Only who provisions or
// changes the policy knows the owner's authorization values.
func newDevice(cfg Config, asOwner bool) (*Device, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	l, err := newLink(cfg.Path)
	if err != nil {
		return nil, err
	}
	a, err := loadAuths(cfg, asOwner)
	if err != nil {
		return nil, err
	}
	d := &Device{
		cfg: cfg, suite: suiteOf(cfg.Curve), auth: a, link: l, broken: true,
		turn: make(chan struct{}, 1), seenFail: make(chan uint64, 1),
	}
	d.turn <- struct{}{}
	d.seenFail <- 0
	d.probe = d.check
	return d, nil
}

// discover reads the keys and describes the TPM.
func (d *Device) discover(ctx context.Context) error {
	err := d.run(ctx, "open", func(c *conn) error {
		base := tpm2.TPMHandle(d.cfg.PersistentBase)
		keys := [keyCount]*object{}
		for i, k := range d.keyTemplates() {
			o, err := c.readObject(base + tpm2.TPMHandle(i))
			if i == attestationKey && handleMissing(err) {
				continue
			}
			if err != nil {
				return err
			}
			if err := d.checkKey(k.what, o, k.template); err != nil {
				return err
			}
			keys[i] = o
		}
		d.storage, d.agreement, d.signing, d.attestation = keys[0], keys[1], keys[2], keys[attestationKey]
		if err := d.checkHierarchies(c); err != nil {
			return err
		}
		return d.describe(c)
	})
	if err != nil {
		return err
	}
	if d.importPub, err = d.storagePublic(); err != nil {
		return err
	}
	if d.agreementPub, err = d.suite.publicKey(d.agreement); err != nil {
		return err
	}
	signing, err := d.suite.publicKey(d.signing)
	if err != nil {
		return err
	}
	d.signingPub, err = ecdsa.ParseUncompressedPublicKey(d.suite.elliptic(), signing.Bytes())
	return err
}

type keyTemplate struct {
	what     string
	template tpm2.TPMTPublic
}

const (
	keyCount       = 4
	attestationKey = 3
)

// keyTemplates lists the keys in the order of their persistent handles.
func (d *Device) keyTemplates() [keyCount]keyTemplate {
	t := [keyCount]keyTemplate{
		{"storage key", d.suite.storage()},
		{"agreement key", d.suite.agreement()},
		{"signing key", d.suite.signing()},
		{"attestation key", d.suite.attestation()},
	}
	if len(d.cfg.PCRs) > 0 {
		t[1].template, t[2].template = d.bound(t[1].template), d.bound(t[2].template)
	}
	return t
}

// Bits of TPMA_PERMANENT (TPM 2.0 Part 2, 8.6).
const (
	permOwnerAuthSet   = 1 << 0
	permLockoutAuthSet = 1 << 2
)

// checkHierarchies refuses a TPM that anybody may take over or clear. The
// answer is audited in a salted session.
func (d *Device) checkHierarchies(c *conn) error {
	return c.withSession(d.storage, func(s tpm2.Session) error {
		perm, err := c.property(tpm2.TPMPTPermanent, s)
		if err != nil {
			return err
		}
		if perm&permOwnerAuthSet == 0 {
			return unsafe("the owner authorization is not set")
		}
		if perm&permLockoutAuthSet == 0 {
			return unsafe("the lockout authorization is not set: anybody can clear the TPM")
		}
		return nil
	}, tpm2.Audit())
}

func (d *Device) describe(c *conn) error {
	var text []byte
	for _, p := range []tpm2.TPMPT{tpm2.TPMPTManufacturer, tpm2.TPMPTVendorString1, tpm2.TPMPTVendorString2,
		tpm2.TPMPTVendorString3, tpm2.TPMPTVendorString4} {
		v, err := c.property(p)
		if err != nil {
			return err
		}
		if p == tpm2.TPMPTVendorString1 {
			text = append(text, ' ')
		}
		text = append(text, byte(v>>24), byte(v>>16), byte(v>>8), byte(v))
	}
	fw, err := c.property(tpm2.TPMPTFirmwareVersion1)
	if err != nil {
		return err
	}
	printable := strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return -1
		}
		return r
	}, string(text))
	d.description = fmt.Sprintf("TPM 2.0 %s, firmware %d.%d, at %s, %s, keys at %#x, storage key name %x",
		strings.TrimSpace(printable), fw>>16, fw&0xffff, d.cfg.Path, d.suite.name, d.cfg.PersistentBase, d.storage.name.Buffer[:10])
	return nil
}

// AgreementKey returns the public half of the agreement key.
func (d *Device) AgreementKey() *ecdh.PublicKey { return d.agreementPub }

// SigningKey returns the public half of the signing key.
func (d *Device) SigningKey() *ecdsa.PublicKey {
	pub := *d.signingPub
	return &pub
}

// Describe names the TPM, the curve and the storage key. Nothing in it is secret.
func (d *Device) Describe() string { return d.description }

// Check reports whether the TPM answers, is still the one that was opened and is
// still protected by owner and lockout authorization, and whether the registers of
// Config.PCRs hold approved values. A TPM whose own self-test
// failed answers nothing of this. Check asks the TPM also while other calls are refused
// because it hung; an answer ends that.
func (d *Device) Check(ctx context.Context) error {
	_, err := do(ctx, d, call[struct{}]{op: "check", always: true, fn: d.probing})
	return err
}

func (d *Device) probing(c *conn) (struct{}, error) { return struct{}{}, d.probe(c) }

// probeHung probes a TPM that hangs. What comes of it is noted by attemptOnce.
func (d *Device) probeHung(ctx context.Context) {
	_, _ = do(ctx, d, call[struct{}]{op: "probe", always: true, fn: d.probing})
}

func (d *Device) check(c *conn) error {
	if err := d.sameKeys(c); err != nil {
		return err
	}
	if err := d.checkHierarchies(c); err != nil || len(d.cfg.PCRs) == 0 {
		return err
	}
	return d.withPolicy(c, encryptIn(), func(tpm2.Session) error { return nil })
}

// Close tells the TPM that it may lose power, and lets go of it. It waits for
// the call in progress. Later calls fail with ErrUnavailable. A TPM that hangs is
// told nothing, which is an error.
func (d *Device) Close() error {
	err := d.run(context.Background(), "close", func(c *conn) error {
		d.letGo(c)
		_, err := (tpm2.Shutdown{ShutdownType: tpm2.TPMSUClear}).Execute(c)
		return err
	})
	if errors.Is(err, errClosed) {
		return nil
	}
	d.abandon()
	return err
}

var errClosed = fmt.Errorf("tpm: %w: the device is closed", ErrUnavailable)

// abandon closes the device without talking to the TPM. A call in progress
// ends by its deadline, so the wait for the turn is bounded.
func (d *Device) abandon() {
	d.breaker.end()
	<-d.turn
	if !d.closed {
		d.closed = true
		d.kept.Store(nil) // its session refers to the authorization value
		d.link.reset()
		d.auth.destroy()
	}
	d.turn <- struct{}{}
	d.breaker.probes.Wait()
}

// call is one use of the TPM.
type call[T any] struct {
	op    string                 // for errors
	fn    func(*conn) (T, error) // may run twice
	drop  func(T)                // gets a result that nobody waits for any more
	after func()                 // runs when fn will not run again

	always bool // also while the breaker is open
}

// do runs a call with the TPM to itself. When ctx ends first the caller
// returns at once; fn runs on to its own end or deadline.
func do[T any](ctx context.Context, d *Device, k call[T]) (T, error) {
	var zero T
	if k.after == nil {
		k.after = func() {}
	}
	if err := d.acquire(ctx, k.op, k.always); err != nil {
		k.after()
		return zero, err
	}
	type result struct {
		v   T
		err error
	}
	done := make(chan result, 1)
	go func() {
		v, err := attempt(d, k.fn)
		k.after()
		d.turn <- struct{}{}
		done <- result{v, classify(k.op, err)}
	}()
	select {
	case r := <-done:
		return r.v, r.err
	case <-ctx.Done():
		if k.drop != nil {
			go func() {
				if r := <-done; r.err == nil {
					k.drop(r.v)
				}
			}()
		}
		return zero, ended(ctx, k.op)
	}
}

// run is do without a result.
func (d *Device) run(ctx context.Context, op string, fn func(*conn) error) error {
	_, err := do(ctx, d, call[struct{}]{op: op, fn: func(c *conn) (struct{}, error) { return struct{}{}, fn(c) }})
	return err
}

func ended(ctx context.Context, op string) error {
	return fmt.Errorf("tpm: %s: %w: %w", op, ErrUnavailable, ctx.Err())
}

// acquire waits for the turn. Unless always is set, it does not where the TPM hangs.
func (d *Device) acquire(ctx context.Context, op string, always bool) error {
	if ctx.Err() != nil {
		return ended(ctx, op)
	}
	if err := d.breaker.refusal(op); err != nil && !always {
		return err
	}
	before := <-d.seenFail
	d.seenFail <- before
	timer := time.NewTimer(d.cfg.CallTimeout)
	defer timer.Stop()
	select {
	case <-d.turn:
	case <-ctx.Done():
		return ended(ctx, op)
	case <-timer.C:
		return fmt.Errorf("tpm: %s: %w: waited %v for other calls", op, ErrUnavailable, d.cfg.CallTimeout)
	}
	refused := d.breaker.refusal(op)
	switch {
	case d.closed:
		refused = errClosed
	case d.failures != before:
		refused = fmt.Errorf("tpm: %s: %w: the connection was lost while waiting", op, ErrUnavailable)
	case always:
		refused = nil
	}
	if refused != nil {
		d.turn <- struct{}{}
	}
	return refused
}

// attempt runs fn on a connection, and once more if the TPM turns out to have
// been reset without a start-up command, or to be full of leftovers.
func attempt[T any](d *Device, fn func(*conn) (T, error)) (T, error) {
	deadline := time.Now().Add(d.cfg.CallTimeout)
	v, err := attemptOnce(d, deadline, fn)
	if restarted(err) {
		v, err = attemptOnce(d, deadline, fn)
	}
	return v, err
}

func attemptOnce[T any](d *Device, deadline time.Time, fn func(*conn) (T, error)) (v T, err error) {
	c := &conn{link: d.link, deadline: deadline}
	defer c.wipe()
	defer func() { d.breaker.note(c.late, d.probeHung) }()
	if err := d.link.open(deadline); err != nil {
		c.fail(err)
		d.lost()
		return v, c.err
	}
	if d.broken {
		err = d.reconnect(c)
	}
	if err == nil {
		v, err = fn(c)
	}
	if c.err != nil || restarted(err) || distrusts(err) {
		d.lost()
	} else {
		d.link.release()
	}
	return v, err
}

// lost notes that the connection must be made anew.
func (d *Device) lost() {
	d.link.reset()
	d.kept.Store(nil) // reconnecting flushes it
	d.broken = true
	d.failures++
	<-d.seenFail
	d.seenFail <- d.failures
}

// reconnect starts the TPM up if need be, frees what an earlier connection
// left in it, and makes sure that it is the TPM that was opened.
func (d *Device) reconnect(c *conn) error {
	if err := c.startup(); err != nil {
		return err
	}
	if d.link.exclusive() {
		if err := c.flushLeftovers(); err != nil {
			return err
		}
	}
	if d.storage != nil && d.signing != nil {
		if err := d.sameKeys(c); err != nil {
			return err
		}
	}
	d.broken = false
	return nil
}

// sameKeys checks that the keys at our handles bear the names read at Open.
func (d *Device) sameKeys(c *conn) error {
	for _, o := range []*object{d.storage, d.agreement, d.signing, d.attestation} {
		if o == nil {
			continue
		}
		now, err := c.readObject(o.handle)
		if err != nil {
			return err
		}
		if !bytes.Equal(now.name.Buffer, o.name.Buffer) {
			return unsafe("the key at %#x is not the one that was opened", uint32(o.handle))
		}
	}
	return nil
}
