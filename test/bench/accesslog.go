package main

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"time"

	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

// keeps is the least of the throughput, at 64 clients, that is left by an access log
// that is durable, with its tiles, as a ratio to one sent to /dev/null.
const keeps = 0.80

// toNull sends the access log to /dev/null: no configuration can.
var toNull = harness.Patch{
	"kms/audit/access.go": {{Old: "		o.disk = osDisk{}\n", New: "		o.disk = nullDisk{}\n"}},
	"kms/audit/tiles.go":  {{Old: "if id.Level%8 != 0 || t.failed != nil {", New: "if id.Level%8 <= 8 {"}},
	"kms/audit/null.go": {{New: `package audit

import "os"

type nullDisk struct{}

type nullFile struct{ *os.File }

func (nullFile) Sync() error           { return nil }
func (nullFile) Truncate(int64) error  { return nil }

func (nullDisk) create(string, string, []byte) (file, error) { return nullDisk{}.resume("", "", 0) }

func (nullDisk) resume(string, string, int64) (file, error) {
	f, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	return nullFile{f}, err
}
`}},
}

// accessLog compares what two clusters encrypt through the API, in turns: one as
// shipped, one whose access logs are not kept.
func accessLog(ctx context.Context, shipped *harness.Cluster, dir string, span time.Duration) error {
	bin, err := toNull.Build(ctx, filepath.Join(dir, "null-bin"))
	if err != nil {
		return err
	}
	null, err := harness.Start(ctx, harness.Binaries{Conclaved: bin, Conclave: shipped.Bin.Conclave}, filepath.Join(dir, "null"), false)
	if err != nil {
		return err
	}
	defer null.Stop()
	targets := map[*harness.Cluster]target{}
	for _, c := range []*harness.Cluster{shipped, null} {
		if targets[c], err = encrypting(ctx, c); err != nil {
			return err
		}
	}
	const clients, turns = 64, 4
	var durable, without sample
	for range turns {
		for _, m := range []struct {
			c   *harness.Cluster
			sum *sample
		}{{null, &without}, {shipped, &durable}} {
			s, err := load(ctx, targets[m.c], clients, span/2)
			if err != nil {
				return err
			}
			m.sum.per += s.per / turns
			m.sum.ops += s.ops
			m.sum.cpu += s.cpu
		}
	}
	ratio := durable.per / without.per
	fmt.Printf("\n%-34s %8.0f /s, %.0f /s with it sent to /dev/null: %.2f (CPU/op %s, %s)\n", "encrypt, 64 clients, access log", durable.per, without.per, ratio,
		durable.perOp().Round(100*time.Nanosecond), without.perOp().Round(100*time.Nanosecond))
	if ratio < keeps {
		return fmt.Errorf("with a durable access log encryption keeps %.2f of the throughput, less than %.2f", ratio, keeps)
	}
	return nil
}

// encrypting makes a key at a cluster and returns requests to encrypt with it.
func encrypting(ctx context.Context, c *harness.Cluster) (target, error) {
	operator, err := c.Client("fr", "operator")
	if err != nil {
		return target{}, err
	}
	if _, err := operator.CreateKey(ctx, "coalition", wire.CreateKeyRequest{Name: "access-log", Purpose: "encrypt"}); err != nil {
		return target{}, err
	}
	cert, key := c.Certificate("fr", "service")
	tlsConfig, err := client.LoadTLS(c.Vars["CONCLAVE_CACERT"], cert, key)
	if err != nil {
		return target{}, err
	}
	body, err := json.Marshal(wire.EncryptRequest{Plaintext: make([]byte, payload), Context: map[string]string{"table": "orders", "row": "4711"}})
	return target{url: c.API("fr") + "/v1/keyrings/coalition/keys/access-log/encrypt", pid: c.Nodes["fr"].PID(), tls: tlsConfig, body: body}, err
}
