package hsm

import (
	"context"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"
)

// Provision generates the three device keys in the token. It refuses with
// ErrProvisioned when any of them is there already: nothing is ever replaced.
// The keys cannot be destroyed through this package, and where the token honours
// CKA_DESTROYABLE=false, only by initialising the token.
func Provision(ctx context.Context, cfg Config) error {
	d, err := attach(cfg)
	if err != nil {
		return err
	}
	if err = d.provision(ctx, role.templates); err == nil {
		err = d.confirm(ctx)
	}
	if e := d.Close(); err == nil {
		err = e
	}
	return err
}

// confirm makes the library read its storage anew and uses each key once. SoftHSM
// does not notice that a disk is full: it goes on with keys that were never written.
func (d *Device) confirm(ctx context.Context) error {
	err := d.reread(ctx)
	for _, test := range []func(context.Context) error{d.learn, d.testECDH, d.testSign, d.testWrap} {
		if err == nil {
			err = test(ctx)
		}
	}
	if err == nil || ctx.Err() != nil {
		return err
	}
	left := d.remove()
	if errors.Is(err, ErrNotProvisioned) || errors.Is(err, ErrUnavailable) {
		return fmt.Errorf("%w: the token did not keep the keys: is its disk full? (%v)%s", ErrUnavailable, err, left)
	}
	return fmt.Errorf("%w%s", err, left)
}

// reread initialises the library anew when no other device of the process uses it.
func (d *Device) reread(ctx context.Context) error {
	d.mod.mu.Lock()
	alone := d.mod.refs == 1
	d.mod.mu.Unlock()
	if !alone {
		return nil
	}
	return d.restart(ctx)
}

// remove destroys what there is of the device keys, where the token lets it, and
// says what it does not. The public objects that are left are of no use to anybody.
func (d *Device) remove() string {
	ctx, cancel := context.WithTimeout(context.Background(), d.set.timeout)
	defer cancel()
	left, err := call(ctx, d, callOptions{op: "remove the keys", rw: true, bare: true, once: true}, func(s *session) (int, error) {
		left := 0
		for _, r := range roles {
			found, err := s.find([]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, r.label(d.set.label))})
			if err != nil {
				return 0, err
			}
			for _, h := range found {
				if s.p11.DestroyObject(s.h, h) != nil {
					left++
				}
			}
		}
		return left, nil
	})
	switch {
	case err != nil:
		return "; what there is of them cannot be removed now: initialise the token anew"
	case left > 0:
		return fmt.Sprintf("; %d of their objects cannot be removed: provision under another label, or initialise the token anew", left)
	}
	return ""
}

// templateFunc is role.templates, or a looser one in tests.
type templateFunc func(r role, prefix string, crv curve, dl dialect) (pub, priv []*pkcs11.Attribute)

func (d *Device) provision(ctx context.Context, templates templateFunc) error {
	dl, err := call(ctx, d, callOptions{op: "provision", rw: true, bare: true, once: true}, func(s *session) (dialect, error) {
		if err := s.checkMechanisms(); err != nil {
			return dialect{}, err
		}
		if err := s.checkAbsent(d.set.label); err != nil {
			return dialect{}, err
		}
		return s.rehearse(d.set.label, templates)
	})
	if err != nil {
		return err
	}
	var made []string
	for _, r := range roles {
		_, err := call(ctx, d, callOptions{op: "generate the " + r.name + " key", rw: true, bare: true, once: true}, func(s *session) (struct{}, error) {
			pub, priv := templates(r, d.set.label, s.curve, dl)
			return struct{}{}, s.generate(r, pub, priv)
		})
		if err != nil && len(made) > 0 {
			return fmt.Errorf("%w (the token now holds %v and cannot be opened: provision under another label, or initialise the token anew)", err, made)
		}
		if err != nil {
			return err
		}
		made = append(made, r.label(d.set.label))
	}
	return nil
}

func (s *session) checkAbsent(prefix string) error {
	for _, r := range roles {
		got, err := s.find([]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, r.label(prefix))})
		if err != nil {
			return err
		}
		if len(got) > 0 {
			return fmt.Errorf("%w: the token holds an object called %q: open it, or provision under another label", ErrProvisioned, r.label(prefix))
		}
	}
	return nil
}

// rehearse generates the keys as session objects, so that a token that refuses
// a template does so before the first permanent key is made. It returns which
// of the newer attributes the token takes.
func (s *session) rehearse(prefix string, templates templateFunc) (dl dialect, err error) {
	for _, dl = range []dialect{{true, true}, {false, true}, {true, false}, {false, false}} {
		err = nil
		for _, r := range roles {
			pub, priv := templates(r, prefix, s.curve, dl)
			if err = s.generate(r, temporary(pub), temporary(priv)); err != nil {
				err = fmt.Errorf("the %s key: %w", r.name, err)
				break
			}
		}
		if err == nil {
			return dl, nil
		}
		if !isRV(err, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID, pkcs11.CKR_ATTRIBUTE_READ_ONLY, pkcs11.CKR_TEMPLATE_INCONSISTENT) {
			return dialect{}, err
		}
	}
	return dialect{}, errors.Join(ErrUnsupported, err)
}

// temporary replaces CKA_TOKEN in a template.
func temporary(t []*pkcs11.Attribute) []*pkcs11.Attribute {
	var out []*pkcs11.Attribute
	for _, a := range t {
		if a.Type == pkcs11.CKA_TOKEN {
			a = pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false)
		}
		out = append(out, a)
	}
	return out
}

func (s *session) generate(r role, pub, priv []*pkcs11.Attribute) error {
	mech := []*pkcs11.Mechanism{pkcs11.NewMechanism(r.generate, nil)}
	if pub == nil {
		if _, err := s.p11.GenerateKey(s.h, mech, priv); err != nil {
			return fmt.Errorf("C_GenerateKey: %w", err)
		}
		return nil
	}
	if _, _, err := s.p11.GenerateKeyPair(s.h, mech, pub, priv); err != nil {
		return fmt.Errorf("C_GenerateKeyPair: %w", err)
	}
	return nil
}
