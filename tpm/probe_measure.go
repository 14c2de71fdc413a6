package tpm

import (
	"context"
	"crypto/rand"
	"errors"
	"os"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// Rate is how often a TPM did something in a second.
type Rate struct {
	Name      string  `json:"name"`
	Count     int     `json:"count"`
	Seconds   float64 `json:"seconds"`
	PerSecond float64 `json:"per_second"`
	Micros    float64 `json:"microseconds"` // for one
	Problem   string  `json:"problem,omitempty"`
}

// measurement is one operation to repeat on a storage key and another key.
type measurement struct {
	name string
	key  func(p *prober, c *conn, storage *object) (*object, error) // nil: none
	run  func(p *prober, c *conn, storage, key *object) error
}

// Measure repeats each operation for about the given time, which the deadline of a
// call bounds, with the commands that a Device would send, on temporary keys as of
// Probe: a TPM is as fast with them as with its own. announce, which may be nil, is
// called before each measurement. What does not work is reported in Rate.Problem;
// errors are those of Probe.
func Measure(ctx context.Context, cfg Config, each time.Duration, announce func(name string)) ([]Rate, error) {
	if cfg.AuthFile == "" {
		cfg.AuthFile = os.DevNull // never read here
	}
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	l, err := newLink(cfg.Path)
	if err != nil {
		return nil, err
	}
	defer l.reset()
	p := &prober{cfg: cfg, suite: suiteOf(cfg.Curve), link: l}
	var rates []Rate
	for _, m := range measurements() {
		if announce != nil {
			announce(m.name)
		}
		r := Rate{Name: m.name}
		err := p.with(ctx, func(c *conn) error {
			if err := p.measure(ctx, c, m, min(each, cfg.CallTimeout/2), &r); err != nil {
				r.Problem = strings.TrimPrefix(err.Error(), "tpm: ")
			}
			return nil
		})
		if err == nil && ctx.Err() != nil {
			err = ended(ctx, "measure")
		}
		if err != nil {
			return rates, err
		}
		rates = append(rates, r)
	}
	return rates, nil
}

func (p *prober) measure(ctx context.Context, c *conn, m measurement, each time.Duration, r *Rate) error {
	storage, err := c.primary(p.suite.storage())
	if err != nil {
		return err
	}
	defer c.flush(storage.handle)
	var key *object
	if m.key != nil {
		if key, err = m.key(p, c, storage); err != nil {
			return err
		}
		defer c.flush(key.handle)
	}
	start := time.Now()
	for time.Since(start) < each && ctx.Err() == nil {
		c.deadline = time.Now().Add(p.cfg.CallTimeout)
		if err := m.run(p, c, storage, key); err != nil {
			r.Count = 0
			return err
		}
		c.wipe()
		r.Count++
	}
	if r.Count == 0 {
		return errors.New("not one in the time given")
	}
	r.Seconds = time.Since(start).Seconds()
	r.PerSecond = float64(r.Count) / r.Seconds
	r.Micros = 1e6 / r.PerSecond
	return nil
}

func measurements() []measurement {
	primary := func(template func(*suite) tpm2.TPMTPublic) func(*prober, *conn, *object) (*object, error) {
		return func(p *prober, c *conn, _ *object) (*object, error) { return c.primary(template(p.suite)) }
	}
	known := func(p *prober, c *conn, storage *object) (*object, error) {
		return p.loadImported(c, storage, wrapKnown)
	}
	return []measurement{
		{"ECDH", primary((*suite).agreement), (*prober).measureECDH},
		{"ECDSA signature", primary((*suite).signing), func(p *prober, c *conn, storage, key *object) error {
			return c.withSession(storage, func(s tpm2.Session) error {
				_, err := p.suite.ecdsa(c, key.auth(s), make([]byte, p.suite.digest))
				return err
			}, encryptIn(), tpm2.Auth(nil))
		}},
		{"random, 32 bytes", nil, func(_ *prober, c *conn, storage, _ *object) error {
			return c.withSession(storage, func(s tpm2.Session) error {
				_, err := (tpm2.GetRandom{BytesRequested: 32}).Execute(c, s)
				return err
			}, encryptOut())
		}},
		{"HMAC, key stays loaded", known, func(_ *prober, c *conn, _, key *object) error {
			return hmacOnce(c, key, noPassword())
		}},
		{"HMAC, new session", known, func(_ *prober, c *conn, storage, key *object) error {
			return c.withSession(storage, func(s tpm2.Session) error { return hmacOnce(c, key, s) }, encryptInOut(), tpm2.Auth(nil))
		}},
		{"import and load of an HMAC key", nil, func(p *prober, c *conn, storage, _ *object) error {
			o, err := p.loadImported(c, storage, wrapKnown)
			if err == nil {
				c.flush(o.handle)
			}
			return err
		}},
	}
}

func (p *prober) measureECDH(c *conn, storage, key *object) error {
	peer, err := p.suite.curve.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	return c.withSession(storage, func(s tpm2.Session) error {
		_, err := (tpm2.ECDHZGen{KeyHandle: key.auth(s), InPoint: tpm2.New2B(*eccPoint(p.suite, peer.PublicKey()))}).Execute(c)
		return err
	}, encryptInOut(), tpm2.Auth(nil))
}

func hmacOnce(c *conn, key *object, s tpm2.Session) error {
	_, err := (tpm2.Hmac{Handle: key.auth(s), Buffer: tpm2.TPM2BMaxBuffer{Buffer: make([]byte, 96)}, HashAlg: tpm2.TPMAlgSHA256}).Execute(c)
	return err
}
