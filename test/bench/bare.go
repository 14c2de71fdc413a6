package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"

	"github.com/conclave-kms/conclave/kms/client"
)

// serveBare is the yardstick: Go's net/http with TLS 1.3, client certificates
// verified, answering a JSON document of the given size. spec is
// CERT,KEY,CA,SIZE. It prints its address and serves until it is killed.
func serveBare(spec string) error {
	parts := strings.Split(spec, ",")
	if len(parts) != 4 {
		return fmt.Errorf("-bare takes CERT,KEY,CA,SIZE")
	}
	cert, err := tls.LoadX509KeyPair(parts[0], parts[1])
	if err != nil {
		return err
	}
	pem, err := os.ReadFile(parts[2])
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	size, err := strconv.Atoi(parts[3])
	if err != nil {
		return err
	}
	answer, err := json.Marshal(map[string]string{"answer": string(bytes.Repeat([]byte("x"), max(size-13, 0)))})
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Printf("https://%s/\n", listener.Addr())
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(answer) // the client has gone
	})
	return http.Serve(tls.NewListener(listener, &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, ClientCAs: pool,
		ClientAuth: tls.RequireAndVerifyClientCert, CurvePreferences: client.HybridGroups(),
	}), handler)
}
