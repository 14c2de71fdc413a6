package keyring

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/pqc"
)

func BenchmarkEncrypt(b *testing.B) {
	m := newKey(b, kms.AES256GCM, 1)
	for _, n := range []int{32, 1 << 10, 64 << 10} {
		for _, c := range []Context{nil, {"service": "payroll", "tenant": "42"}} {
			b.Run(fmt.Sprintf("bytes=%d/pairs=%d", n, len(c)), func(b *testing.B) {
				plaintext := make([]byte, n)
				b.SetBytes(int64(n))
				b.ReportAllocs()
				for b.Loop() {
					if _, err := m.Encrypt(bg, c, plaintext); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

func BenchmarkDecrypt(b *testing.B) {
	m := newKey(b, kms.AES256GCM, 1)
	for _, n := range []int{32, 1 << 10, 64 << 10} {
		b.Run(fmt.Sprintf("bytes=%d", n), func(b *testing.B) {
			ct := must[[]byte](b)(m.Encrypt(bg, nil, make([]byte, n)))
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := m.Decrypt(bg, nil, ct); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkMAC(b *testing.B) {
	m := newKey(b, kms.HMACSHA256, 1)
	message := make([]byte, 256)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := m.MAC(bg, message); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSign(b *testing.B) {
	for _, a := range []kms.Algorithm{kms.ECDSAP256, kms.ECDSAP384, kms.Ed25519} {
		b.Run(string(a), func(b *testing.B) {
			m := newKey(b, a, 1)
			for b.Loop() {
				if _, err := m.Sign(bg, []byte("message")); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkCacheHit(b *testing.B) {
	n := newNode(b, Limits{TTL: time.Hour, MaxKEKs: 4, MaxKeys: 1024})
	refs := make([]KeyRef, 16)
	for i := range refs {
		refs[i] = n.key(b, byte(i+1))
		n.use(b, refs[i])
	}
	ctx := context.Background()
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for i := 0; pb.Next(); i++ {
			_, release, err := n.cache.Key(ctx, refs[i%len(refs)], n.sealed)
			if err != nil {
				b.Error(err)
				return
			}
			release()
		}
	})
}

// BenchmarkCacheMiss opens a key whose KEK is open.
func BenchmarkCacheMiss(b *testing.B) {
	n := newNode(b, Limits{TTL: time.Hour, MaxKEKs: 4, MaxKeys: 1})
	refs := []KeyRef{n.key(b, 1), n.key(b, 2)}
	ctx := context.Background()
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		_, release, err := n.cache.Key(ctx, refs[i%2], n.sealed)
		if err != nil {
			b.Fatal(err)
		}
		release()
	}
}

func BenchmarkOpenKEK(b *testing.B) {
	for _, suite := range []pqc.SuiteID{pqc.MLKEM768P256, pqc.MLKEM1024P384} {
		b.Run(suite.String(), func(b *testing.B) {
			r, _ := newRoot(b, suite)
			sealed := must[[]Sealed](b)(SealKEK([]Recipient{recipient("fr-1", r)}, testKEK, newKEK(b)))[0].Sealed
			for b.Loop() {
				kek, err := r.OpenKEK(context.Background(), at("fr-1"), sealed)
				if err != nil {
					b.Fatal(err)
				}
				kek.Destroy()
			}
		})
	}
}
