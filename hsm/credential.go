package hsm

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"time"
	"unsafe"

	"github.com/miekg/pkcs11"

	"github.com/conclave-kms/conclave/kms/secret"
)

// credentialTimeout bounds one call to a custodian's token, which may wait for a
// person to touch it.
const credentialTimeout = time.Minute

// CredentialConfig names a custodian's key. The PIN comes from exactly one of PIN,
// PINFile and the pin-source of the URI.
type CredentialConfig struct {
	URI         string        // see ParseCredentialURI
	PIN         *secret.Bytes // copied
	PINFile     string
	CallTimeout time.Duration // of one call; 0 means credentialTimeout
	SoftHSMConf string        // as Config.SoftHSMConf
}

// CredentialInfo is what a token says of a custodian's key. Nothing vouches for it.
type CredentialInfo struct {
	Token, Serial, Manufacturer, Model string

	Label              string // CKA_LABEL
	ID                 []byte // CKA_ID
	Curve              string // P-256 or P-384
	PublicFrom         string // where the public key was found: "public key" or "certificate"
	Sensitive          bool
	NeverExtractable   bool // it is not, and never was, extractable
	Local              bool // made in the token
	AlwaysAuthenticate bool // the token wants the PIN for each signature
}

// Credential is a custodian's EC private key in a token that others have set up: a
// YubiKey's PIV slot, a smart card, SoftHSM. It signs digests and does nothing else. It
// holds one session and is safe for concurrent use.
type Credential struct {
	mod     *module
	timeout time.Duration
	info    CredentialInfo
	public  []byte
	curve   curve

	mu     sync.Mutex
	s      *session
	key    pkcs11.ObjectHandle
	pin    *secret.Bytes
	broken error // no call is made any more
	hangs  bool  // a call is inside the library for good
}

// OpenCredential finds the one EC private key that the URI names, logging in with the
// PIN, and its public key: from the public key of the same id or, as PIV tokens have
// it, from the certificate. A PIN that the token refuses is not sent again. Errors:
// the kinds of this package; ErrNotProvisioned where no such key is.
func OpenCredential(ctx context.Context, cfg CredentialConfig) (*Credential, error) {
	return openCredential(ctx, cfg, (*Credential).bind)
}

// openCredential opens a session, logs in, and runs bind in it.
func openCredential(ctx context.Context, cfg CredentialConfig, bind func(*Credential, *CredentialURI) error) (*Credential, error) {
	u, err := ParseCredentialURI(cfg.URI)
	if err != nil {
		return nil, err
	}
	pin, err := Config{PIN: cfg.PIN, PINFile: cfg.PINFile}.readPIN(&u.URI)
	if err != nil {
		return nil, err
	}
	c := &Credential{timeout: cfg.CallTimeout, pin: pin}
	if c.timeout <= 0 {
		c.timeout = credentialTimeout
	}
	if c.mod, err = loadModule(u.ModulePath, cfg.SoftHSMConf); err != nil {
		pin.Destroy()
		return nil, err
	}
	c.mod.retain()
	err = c.inside(ctx, "open the credential", func() error {
		if err := c.connect(u); err != nil {
			return err
		}
		return bind(c, u)
	})
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// Info returns what the token says of the key.
func (c *Credential) Info() CredentialInfo { return c.info }

// PublicKey returns the SEC 1 uncompressed point.
func (c *Credential) PublicKey() []byte { return bytes.Clone(c.public) }

// Sign returns the ECDSA signature of a digest, r‖s: of SHA-256 (32 bytes) for P-256, of SHA-384 (48) for P-384. A key with
// CKA_ALWAYS_AUTHENTICATE gets the PIN again, for this signature alone (PKCS#11 2.40
// section 5.6, C_Login with CKU_CONTEXT_SPECIFIC).
func (c *Credential) Sign(ctx context.Context, digest []byte) (sig []byte, err error) {
	if len(digest) != c.curve.digest {
		return nil, invalidf("the digest has %d bytes, %s takes %d", len(digest), c.curve.name, c.curve.digest)
	}
	digest = bytes.Clone(digest)
	var made []byte
	err = c.inside(ctx, "sign", func() error {
		if err := c.s.p11.SignInit(c.s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)}, c.key); err != nil {
			return fmt.Errorf("C_SignInit: %w", err)
		}
		if c.info.AlwaysAuthenticate {
			if err := c.login(pkcs11.CKU_CONTEXT_SPECIFIC); err != nil {
				return err
			}
		}
		b, err := c.s.p11.Sign(c.s.h, digest)
		if err != nil {
			return fmt.Errorf("C_Sign: %w", err)
		}
		if len(b) != 2*c.curve.size {
			return unavailablef("the token returned a signature of %d bytes instead of %d", len(b), 2*c.curve.size)
		}
		made = b
		return nil
	})
	if err != nil {
		return nil, err
	}
	return made, nil
}

// Close ends the session. A token that hangs is left alone, with what it uses.
func (c *Credential) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mod == nil || c.hangs {
		return nil
	}
	var err error
	if c.s != nil {
		err = c.run(context.Background(), "close", func() error {
			c.s.close()
			return nil
		})
	}
	if !c.hangs {
		c.pin.Destroy()
		ctx, cancel := context.WithTimeout(context.Background(), c.timeout)
		defer cancel()
		c.mod.release(ctx)
	}
	c.mod, c.s, c.broken = nil, nil, invalidf("the credential is closed")
	return err
}

// inside runs f, which calls the library. After a call that did not return, or a PIN
// that was refused, there is no other one.
func (c *Credential) inside(ctx context.Context, op string, f func() error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken != nil {
		return c.broken
	}
	err := c.run(ctx, op, f)
	if c.hangs || errors.Is(err, ErrPIN) {
		c.broken = err
	}
	return err
}

// run runs f within the deadline; a call that is later is left behind.
func (c *Credential) run(ctx context.Context, op string, f func() error) error {
	mod, done := c.mod, make(chan error, 1)
	go func() {
		err := mod.enter(c.timeout)
		if err == nil {
			err = f()
			mod.leave()
		}
		done <- err
	}()
	late := time.NewTimer(c.timeout)
	defer late.Stop()
	var why error
	select {
	case err := <-done:
		return classify(op, err)
	case <-ctx.Done():
		why = contextError(op, ctx.Err())
	case <-late.C:
		why = unavailablef("%s: the token did not answer within %s", op, c.timeout)
	}
	c.hangs = true
	mod.abandoned.Add(1)
	go func() {
		<-done
		mod.abandoned.Add(-1)
	}()
	return why
}

// connect opens a session with the token and logs in.
func (c *Credential) connect(u *CredentialURI) error {
	slot, ti, err := findSlot(c.mod.p11, &u.URI)
	if err != nil {
		return err
	}
	c.info = CredentialInfo{Token: clean(ti.Label), Serial: clean(ti.SerialNumber), Manufacturer: clean(ti.ManufacturerID), Model: clean(ti.Model)}
	switch {
	case ti.Flags&pkcs11.CKF_PROTECTED_AUTHENTICATION_PATH != 0:
		return fmt.Errorf("%w: the token takes its PIN on a pad of its own", ErrUnsupported)
	case ti.Flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return fmt.Errorf("%w: the PIN is locked; unlock it with the tool of the token's maker", ErrPIN)
	}
	h, err := c.mod.p11.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return fmt.Errorf("C_OpenSession: %w", err)
	}
	c.s = &session{p11: c.mod.p11, fn: c.mod.fn, h: h, slot: slot, gen: c.mod.gen}
	if ti.Flags&pkcs11.CKF_LOGIN_REQUIRED == 0 {
		return nil
	}
	return c.login(pkcs11.CKU_USER)
}

func (c *Credential) login(user uint) error {
	pin := c.pin.Reveal()
	// The string shares the locked memory, so that no copy stays on the Go heap.
	err := c.s.p11.Login(c.s.h, user, unsafe.String(unsafe.SliceData(pin), len(pin)))
	switch {
	case err == nil, user == pkcs11.CKU_USER && isRV(err, pkcs11.CKR_USER_ALREADY_LOGGED_IN):
		return nil
	case isPIN(err):
		return fmt.Errorf("%w: C_Login: %w (it is not sent again: after a few wrong ones the token locks it)", ErrPIN, err)
	}
	return fmt.Errorf("C_Login: %w", err)
}

// bind finds the key and its public half.
func (c *Credential) bind(u *CredentialURI) error {
	found, err := c.s.find(u.template(pkcs11.CKO_PRIVATE_KEY, pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC)))
	switch {
	case err != nil:
		return err
	case len(found) == 0:
		return fmt.Errorf("%w: no EC private key in the token matches %s", ErrNotProvisioned, u)
	case len(found) > 1:
		return invalidf("%d EC private keys in the token match %s: add id or object", len(found), u)
	}
	c.key = found[0]
	if err := c.describe(); err != nil {
		return err
	}
	return c.findPublic()
}

// template matches objects of a class that the URI names.
func (u *CredentialURI) template(class uint, more ...*pkcs11.Attribute) []*pkcs11.Attribute {
	t := append([]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, class)}, more...)
	if u.Object != "" {
		t = append(t, pkcs11.NewAttribute(pkcs11.CKA_LABEL, u.Object))
	}
	if u.ID != "" {
		t = append(t, pkcs11.NewAttribute(pkcs11.CKA_ID, []byte(u.ID)))
	}
	return t
}

// describe reads what the token says of the private key. An attribute that it does not
// have counts as false.
func (c *Credential) describe() error {
	var err error
	read := func(typ uint) []byte {
		b, e := c.s.attribute(c.key, typ)
		if e != nil && !isRV(e, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID, pkcs11.CKR_ATTRIBUTE_SENSITIVE) {
			err = errors.Join(err, e)
		}
		return b
	}
	yes := func(typ uint) bool { b := read(typ); return len(b) == 1 && b[0] != 0 }
	c.info.Label, c.info.ID = string(read(pkcs11.CKA_LABEL)), read(pkcs11.CKA_ID)
	c.info.Sensitive, c.info.Local = yes(pkcs11.CKA_SENSITIVE), yes(pkcs11.CKA_LOCAL)
	c.info.NeverExtractable = yes(pkcs11.CKA_NEVER_EXTRACTABLE) && !yes(pkcs11.CKA_EXTRACTABLE)
	c.info.AlwaysAuthenticate = yes(pkcs11.CKA_ALWAYS_AUTHENTICATE)
	return err
}

// findPublic reads the public key: of the object of the same CKA_ID, or of the
// certificate of that id.
func (c *Credential) findPublic() error {
	if len(c.info.ID) == 0 {
		return invalidf("the private key has no CKA_ID, so its public key cannot be found")
	}
	same := func(class uint) ([]pkcs11.ObjectHandle, error) {
		return c.s.find([]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, class), pkcs11.NewAttribute(pkcs11.CKA_ID, c.info.ID)})
	}
	keys, err := same(pkcs11.CKO_PUBLIC_KEY)
	if err != nil {
		return err
	}
	if len(keys) == 1 {
		c.info.PublicFrom = "public key"
		return c.readPublic(keys[0])
	}
	certs, err := same(pkcs11.CKO_CERTIFICATE)
	if err != nil {
		return err
	}
	if len(keys) > 1 || len(certs) != 1 {
		return invalidf("the token has %d public keys and %d certificates with the private key's CKA_ID; one of a kind is needed", len(keys), len(certs))
	}
	c.info.PublicFrom = "certificate"
	der, err := c.s.attribute(certs[0], pkcs11.CKA_VALUE)
	if err != nil {
		return err
	}
	return c.readCertificate(der)
}

func (c *Credential) readPublic(o pkcs11.ObjectHandle) error {
	oid, err := c.s.attribute(o, pkcs11.CKA_EC_PARAMS)
	if err != nil {
		return err
	}
	for _, crv := range curves {
		if !bytes.Equal(oid, crv.oid) {
			continue
		}
		v, err := c.s.attribute(o, pkcs11.CKA_EC_POINT)
		if err != nil {
			return err
		}
		point, err := decodePoint(v, crv)
		if err != nil {
			return err
		}
		return c.setPublic(crv, point)
	}
	return fmt.Errorf("%w: the key is on another curve than P-256 and P-384", ErrUnsupported)
}

func (c *Credential) readCertificate(der []byte) error {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return invalidf("the certificate beside the private key cannot be read")
	}
	if k, ok := cert.PublicKey.(*ecdsa.PublicKey); ok {
		for _, crv := range curves {
			if k.Curve != crv.ec {
				continue
			}
			point, err := k.Bytes()
			if err != nil {
				return invalidf("the certificate beside the private key holds no point on %s", crv.name)
			}
			return c.setPublic(crv, point)
		}
	}
	return fmt.Errorf("%w: the certificate's key is not on P-256 or P-384", ErrUnsupported)
}

func (c *Credential) setPublic(crv curve, point []byte) error {
	if _, err := ecdsa.ParseUncompressedPublicKey(crv.ec, point); err != nil {
		return invalidf("the token's public key is no point on %s", crv.name)
	}
	c.curve, c.public, c.info.Curve = crv, bytes.Clone(point), crv.name
	return nil
}
