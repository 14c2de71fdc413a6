package engine

import (
	"path/filepath"
	"syscall"
	"testing"

	dto "github.com/prometheus/client_model/go"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/wire"
)

func check0(t testing.TB, reg *prometheus.Registry) []*dto.MetricFamily {
	t.Helper()
	return check[[]*dto.MetricFamily](t)(reg.Gather())
}

func benchWorld(b *testing.B) (*testNode, Caller) {
	w := newWorld(b, "")
	w.keyring("r", "fr", "de", "jp")
	w.key("r", "data", kms.Encrypt)
	for _, n := range w.nodes {
		n.log.discard = true
	}
	return w.at("fr"), caller("service", "fr")
}

// cpu reports the processor time of the whole process per operation, which other
// processes do not disturb as they do the time on the wall.
func cpu(b *testing.B) func() {
	now := func() int64 {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return u.Utime.Nano() + u.Stime.Nano()
	}
	start := now()
	return func() { b.ReportMetric(float64(now()-start)/float64(b.N), "cpu-ns/op") }
}

// The whole path of a request but for the access log, whose entry is encoded and
// thrown away.
func BenchmarkEncrypt1KiB(b *testing.B) {
	n, svc := benchWorld(b)
	q := wire.EncryptRequest{Plaintext: make([]byte, 1024), Context: wire.Context{"tenant": "a", "object": "7"}}
	b.ReportAllocs()
	report := cpu(b)
	for b.Loop() {
		if _, err := n.engine.Encrypt(bg, svc, "r", "data", q); err != nil {
			b.Fatal(err)
		}
	}
	report()
}

func BenchmarkDecrypt1KiB(b *testing.B) {
	n, svc := benchWorld(b)
	r := check[wire.EncryptResponse](b)(n.engine.Encrypt(bg, svc, "r", "data", wire.EncryptRequest{Plaintext: make([]byte, 1024)}))
	q := wire.DecryptRequest{Ciphertext: r.Ciphertext}
	b.ReportAllocs()
	report := cpu(b)
	for b.Loop() {
		if _, err := n.engine.Decrypt(bg, svc, "r", "data", q); err != nil {
			b.Fatal(err)
		}
	}
	report()
}

func BenchmarkEncryptBatch256(b *testing.B) {
	n, svc := benchWorld(b)
	q := wire.Batch[wire.EncryptRequest]{Items: make([]wire.EncryptRequest, 256)}
	for i := range q.Items {
		q.Items[i].Plaintext = make([]byte, 1024)
	}
	b.ReportAllocs()
	report := cpu(b)
	for b.Loop() {
		if _, err := n.engine.EncryptBatch(bg, svc, "r", "data", q); err != nil {
			b.Fatal(err)
		}
	}
	report()
}

// With the real access log, as many goroutines as GOMAXPROCS*64 waiting for one
// group commit after the other.
func BenchmarkEncrypt1KiBDurable(b *testing.B) {
	n, svc := benchWorld(b)
	l := check[*audit.Log](b)(audit.Open(filepath.Join(b.TempDir(), "log"), audit.Options{}))
	defer l.Close()
	cfg := n.engine.cfg
	cfg.Log = l
	e := check[*Engine](b)(New(cfg))
	q := wire.EncryptRequest{Plaintext: make([]byte, 1024)}
	b.SetParallelism(64)
	b.ReportAllocs()
	report := cpu(b)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := e.Encrypt(bg, svc, "r", "data", q); err != nil {
				b.Error(err)
				return
			}
		}
	})
	report()
}
