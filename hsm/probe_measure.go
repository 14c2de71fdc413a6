package hsm

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"errors"
	"sync"
	"time"

	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/miekg/pkcs11"
)

// Rate is how often a token did something in a second.
type Rate struct {
	Name      string  `json:"name"`
	Sessions  int     `json:"sessions"` // that did it at the same time
	Count     int     `json:"count"`
	Seconds   float64 `json:"seconds"`
	PerSecond float64 `json:"per_second"`
	Micros    float64 `json:"microseconds"` // for one, seen by one session
	Problem   string  `json:"problem,omitempty"`
}

// measurement is one operation to repeat. prepare runs on the session before the
// clock does.
type measurement struct {
	name    string
	prepare func(d *Device, s *session, p *importProfile) (func() error, error)
}

// Measure repeats each operation for about the given time, which a call's deadline
// bounds, on one session and on all that the configuration allows. It uses the
// device keys where they are there, and session keys like them where not, and
// leaves nothing in the token. announce, which may be nil, is called before each
// measurement. What does not work on this token is reported in Rate.Problem; errors
// are those of Probe.
func Measure(ctx context.Context, cfg Config, each time.Duration, announce func(name string)) ([]Rate, error) {
	d, err := attach(cfg)
	if err != nil {
		return nil, err
	}
	rates, err := d.measureAll(ctx, min(each, d.set.timeout/2), announce)
	if e := d.Close(); err == nil {
		err = e
	}
	return rates, err
}

func (d *Device) measureAll(ctx context.Context, each time.Duration, announce func(name string)) ([]Rate, error) {
	profile, err := call(ctx, d, callOptions{op: "probe", bare: true}, func(s *session) (*importProfile, error) {
		if err := s.ownOrTemporary(d); err != nil {
			return nil, err
		}
		p, err := s.probeImport()
		if errors.Is(err, ErrUnsupported) {
			return nil, nil
		}
		return p, err
	})
	if err != nil {
		return nil, err
	}
	var rates []Rate
	for _, m := range measurements() {
		for _, sessions := range []int{1, d.set.maxSessions} {
			if announce != nil {
				announce(m.name)
			}
			r := d.measure(ctx, m, profile, sessions, each)
			if ctx.Err() != nil {
				return nil, contextError("measure", ctx.Err())
			}
			rates = append(rates, r)
			if d.set.maxSessions == 1 {
				break
			}
		}
	}
	return rates, nil
}

// ownOrTemporary binds the session to the device keys, or to session keys where the
// token has none.
func (s *session) ownOrTemporary(d *Device) error {
	err := s.inspect(d.set.label)
	if !errors.Is(err, ErrNotProvisioned) {
		return err
	}
	dl, err := s.rehearse(probeLabel, role.templates)
	if err != nil {
		return err
	}
	s.keys, err = s.temporaryKeys(dl)
	return err
}

// measure runs one measurement on several sessions at once.
func (d *Device) measure(ctx context.Context, m measurement, p *importProfile, sessions int, each time.Duration) Rate {
	r := Rate{Name: m.name, Sessions: sessions}
	type done struct {
		count int
		took  time.Duration
	}
	var mu sync.Mutex
	var longest time.Duration
	var wg sync.WaitGroup
	for range sessions {
		wg.Go(func() {
			got, err := call(ctx, d, callOptions{op: m.name, bare: true, once: true, probe: true}, func(s *session) (done, error) {
				if err := s.ownOrTemporary(d); err != nil {
					return done{}, err
				}
				run, err := m.prepare(d, s, p)
				if err != nil {
					return done{}, err
				}
				n, start := 0, time.Now()
				for time.Since(start) < each {
					if err := run(); err != nil {
						return done{}, err
					}
					n++
				}
				return done{n, time.Since(start)}, nil
			})
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				r.Problem = err.Error()
				return
			}
			r.Count += got.count
			longest = max(longest, got.took)
		})
	}
	wg.Wait()
	if r.Problem != "" || longest == 0 {
		r.Count = 0
		return r
	}
	r.Seconds = longest.Seconds()
	r.PerSecond = float64(r.Count) / r.Seconds
	r.Micros = 1e6 * float64(sessions) / r.PerSecond
	return r
}

var errNoImports = errors.New("this token cannot import keys")

func measurements() []measurement {
	imported := func(m material, run func(s *session, h pkcs11.ObjectHandle) error) func(*Device, *session, *importProfile) (func() error, error) {
		return func(_ *Device, s *session, p *importProfile) (func() error, error) {
			h, err := s.loadKnown(m, p)
			return func() error { return run(s, h) }, err
		}
	}
	return []measurement{
		{"ECDH", func(_ *Device, s *session, _ *importProfile) (func() error, error) {
			_, peer, err := s.peer()
			if err != nil {
				return nil, err
			}
			point := peer.PublicKey().Bytes()
			return func() error {
				z, err := s.ecdh(s.keys.agreement, point)
				wipe(z)
				return err
			}, nil
		}},
		{"ECDSA signature", func(d *Device, s *session, _ *importProfile) (func() error, error) {
			digest := d.digest([]byte("conclave device bench"))
			return func() error { _, err := s.sign(s.keys.signing, digest); return err }, nil
		}},
		{"AES-GCM, 64 bytes", func(_ *Device, s *session, _ *importProfile) (func() error, error) {
			aad, plain := []byte("conclave device bench"), make([]byte, 64)
			return func() error { _, err := s.seal(aad, plain); return err }, nil
		}},
		{"random, 32 bytes", func(_ *Device, s *session, _ *importProfile) (func() error, error) {
			return func() error { _, err := s.random(32); return err }, nil
		}},
		{"HMAC under an imported key", imported(materialHMAC, func(s *session, h pkcs11.ObjectHandle) error {
			_, err := s.hmac(h, make([]byte, 96))
			return err
		})},
		{"load of an imported HMAC key", func(_ *Device, s *session, p *importProfile) (func() error, error) {
			in, err := s.wrappedKnown(materialHMAC, p)
			return func() error {
				h, err := s.load(in, *p, stays)
				if err == nil {
					s.destroy([]pkcs11.ObjectHandle{h})
				}
				return err
			}, err
		}},
		{"P-256 signature, imported key", imported(materialP256, func(s *session, h pkcs11.ObjectHandle) error {
			crv, err := materialP256.curve()
			if err == nil {
				_, err = s.signOn(crv, h, make([]byte, crv.digest))
			}
			return err
		})},
	}
}

// wrappedKnown wraps a key of this process for the session's agreement key.
func (s *session) wrappedKnown(m material, p *importProfile) (imported, error) {
	if p == nil {
		return imported{}, errNoImports
	}
	own, _, err := s.peer()
	if err != nil {
		return imported{}, err
	}
	plain, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		return imported{}, err
	}
	held, err := secret.Move(plain.Bytes())
	if err != nil {
		return imported{}, err
	}
	defer held.Destroy()
	var blob []byte
	if m == materialHMAC {
		blob, err = WrapHMAC(recipient{p.kdf, own}.bytes(), held, nil)
	} else {
		blob, err = WrapSigner(recipient{p.kdf, own}.bytes(), ecdh.P256(), held, nil)
	}
	if err != nil {
		return imported{}, err
	}
	return parseImport(blob, s.curve)
}

func (s *session) loadKnown(m material, p *importProfile) (pkcs11.ObjectHandle, error) {
	in, err := s.wrappedKnown(m, p)
	if err != nil {
		return 0, err
	}
	return s.load(in, *p, stays)
}
