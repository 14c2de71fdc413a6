package native

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/engine"
	"github.com/conclave-kms/conclave/kms/wire"
)

// discard is a response that nobody reads.
type discard struct{ header http.Header }

func (d *discard) Header() http.Header         { return d.header }
func (d *discard) Write(b []byte) (int, error) { return len(b), nil }
func (d *discard) WriteHeader(int)             {}

func encryptBody() []byte {
	return must(json.Marshal(wire.EncryptRequest{Plaintext: make([]byte, 1024)}))
}

// BenchmarkEncrypt1KiB has three parts that are to be compared: what the handler
// costs in all, what the engine costs in it, and what encoding/json costs.
func BenchmarkEncrypt1KiB(b *testing.B) {
	w := newWorld(b, options{})
	w.found()
	cert := w.certificate("fr", certOptions{spiffe: "spiffe://fr.example/service/test"})
	leaf := must(x509.ParseCertificate(cert.Certificate[0]))
	body := encryptBody()
	var ct wire.EncryptResponse

	b.Run("handler", func(b *testing.B) {
		ctx := w.server.HTTPServer().ConnContext(b.Context(), nil)
		state := &tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}}
		b.ReportAllocs()
		for b.Loop() {
			r := httptest.NewRequestWithContext(ctx, "POST", "/v1/keyrings/ring/keys/enc/encrypt", bytes.NewReader(body))
			r.TLS = state
			r.Header.Set("Content-Type", "application/json")
			w.server.ServeHTTP(&discard{http.Header{}}, r)
		}
	})
	b.Run("engine", func(b *testing.B) {
		caller := engine.Caller{Identity: kms.Identity{TrustDomain: "fr.example", Role: "service", Name: "test"}}
		b.ReportAllocs()
		for b.Loop() {
			var err error
			if ct, err = w.engine.Encrypt(b.Context(), caller, "ring", "enc", wire.EncryptRequest{Plaintext: make([]byte, 1024)}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("json", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := decode[wire.EncryptRequest](body); err != nil {
				b.Fatal(err)
			}
			if _, err := json.Marshal(ct); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("harness", func(b *testing.B) { // what the request of "handler" costs before it is served
		b.ReportAllocs()
		for b.Loop() {
			_ = httptest.NewRequestWithContext(b.Context(), "POST", "/v1/keyrings/ring/keys/enc/encrypt", bytes.NewReader(body))
		}
	})
}
