package hsm

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"fmt"
	"testing"

	"github.com/miekg/pkcs11"
)

// benchmark runs f on both curves, serially and from several goroutines.
func benchmark(b *testing.B, f func(d *Device) func() error) {
	for _, c := range []struct {
		name  string
		curve ecdh.Curve
	}{{"P-384", ecdh.P384()}, {"P-256", ecdh.P256()}} {
		tok := newToken(b)
		tok.cfg.Curve = c.curve
		if err := Provision(context.Background(), tok.cfg); err != nil {
			b.Fatal(err)
		}
		run := f(tok.open(b))
		b.Run(c.name, func(b *testing.B) {
			for b.Loop() {
				if err := run(); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(c.name+"/parallel", func(b *testing.B) {
			b.SetParallelism(4)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if err := run(); err != nil {
						b.Error(err)
					}
				}
			})
		})
	}
}

func BenchmarkECDH(b *testing.B) {
	benchmark(b, func(d *Device) func() error {
		peer, err := d.set.curve.ecdh.GenerateKey(rand.Reader)
		if err != nil {
			b.Fatal(err)
		}
		return func() error { _, err := d.ECDH(context.Background(), peer.PublicKey()); return err }
	})
}

func BenchmarkSign(b *testing.B) {
	benchmark(b, func(d *Device) func() error {
		digest := d.digest([]byte("m"))
		return func() error { _, err := d.Sign(context.Background(), digest); return err }
	})
}

func BenchmarkWrap(b *testing.B) {
	benchmark(b, func(d *Device) func() error {
		return func() error { _, err := d.Wrap(context.Background(), []byte("aad"), make([]byte, 64)); return err }
	})
}

func BenchmarkUnwrap(b *testing.B) {
	benchmark(b, func(d *Device) func() error {
		blob, err := d.Wrap(context.Background(), []byte("aad"), make([]byte, 64))
		if err != nil {
			b.Fatal(err)
		}
		return func() error {
			got, err := d.Unwrap(context.Background(), []byte("aad"), blob)
			got.Destroy()
			return err
		}
	})
}

func BenchmarkRandom(b *testing.B) {
	benchmark(b, func(d *Device) func() error {
		return func() error { return d.Random(context.Background(), make([]byte, 32)) }
	})
}

func BenchmarkOpen(b *testing.B) {
	tok, d := openNew(b)
	b.Run(fmt.Sprintf("self test of %d attacks", len(attacks(d.imports))), func(b *testing.B) {
		for b.Loop() {
			d, err := Open(context.Background(), tok.cfg)
			if err != nil {
				b.Fatal(err)
			}
			if err := d.Close(); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkHMAC compares the token's own rate, one session and nothing around it,
// with that of a closure.
func BenchmarkHMAC(b *testing.B) {
	_, d := openNew(b)
	message := make([]byte, 100)
	mac, unload, err := d.LoadHMAC(context.Background(), wrapFor(b, d, make([]byte, 32)))
	if err != nil {
		b.Fatal(err)
	}
	defer unload()
	b.Run("raw", func(b *testing.B) {
		_, err := call(context.Background(), d, callOptions{op: "raw"}, func(s *session) (struct{}, error) {
			_, public := d.ImportKey()
			to, err := parseRecipient(public)
			if err != nil {
				return struct{}{}, err
			}
			h, err := s.loadPlain(to, *d.imports, materialHMAC, make([]byte, 32))
			if err != nil {
				return struct{}{}, err
			}
			for b.Loop() {
				if _, err := s.hmac(h, message); err != nil {
					return struct{}{}, err
				}
			}
			s.destroy([]pkcs11.ObjectHandle{h})
			return struct{}{}, nil
		})
		if err != nil {
			b.Fatal(err)
		}
	})
	b.Run("closure", func(b *testing.B) {
		for b.Loop() {
			if _, err := mac(context.Background(), message); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("closure/parallel", func(b *testing.B) {
		b.SetParallelism(4)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if _, err := mac(context.Background(), message); err != nil {
					b.Error(err)
				}
			}
		})
	})
}

func BenchmarkLoadHMAC(b *testing.B) {
	benchmark(b, func(d *Device) func() error {
		blob := wrapFor(b, d, make([]byte, 32))
		return func() error {
			_, unload, err := d.LoadHMAC(context.Background(), blob)
			if err == nil {
				unload()
			}
			return err
		}
	})
}
