package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

// payload is the size of the plaintext in bytes.
const payload = 1024

// limit is the most that encrypt at 16 clients may cost, as a ratio to the bare server.
const limit = 3.0

// target is a server under load.
type target struct {
	url  string
	pid  int
	tls  *tls.Config
	body []byte
}

// sample is what one measurement gave.
type sample struct {
	ops int
	cpu time.Duration // of the server
	lat time.Duration // mean
	per float64       // operations a second
}

func (s sample) perOp() time.Duration { return s.cpu / time.Duration(max(s.ops, 1)) }

func requests(ctx context.Context, c *harness.Cluster, span time.Duration) error {
	operator, err := c.Client("fr", "operator")
	if err != nil {
		return err
	}
	if _, err := operator.CreateKey(ctx, "coalition", wire.CreateKeyRequest{Name: "bench", Purpose: "encrypt"}); err != nil {
		return err
	}
	cert, key := c.Certificate("fr", "service")
	tlsConfig, err := client.LoadTLS(c.Vars["CONCLAVE_CACERT"], cert, key)
	if err != nil {
		return err
	}
	ops, err := operations(ctx, c)
	if err != nil {
		return err
	}
	fmt.Printf("\n%-10s %8s %12s %12s %12s %12s %8s\n", "operation", "clients", "ops/s", "latency", "CPU/op", "bare CPU/op", "ratio")
	for _, op := range ops {
		node := target{url: c.API("fr") + "/v1/keyrings/coalition/keys/bench/" + op.name, pid: c.Nodes["fr"].PID(), tls: tlsConfig, body: op.body}
		answer, err := once(ctx, node)
		if err != nil {
			return fmt.Errorf("%s: %w", op.name, err)
		}
		bare, stop, err := startBare(c, tlsConfig, op.body, len(answer))
		if err != nil {
			return err
		}
		for _, clients := range []int{1, 16, 64} {
			ratio, err := compare(ctx, op.name, node, bare, clients, span)
			if err != nil {
				stop()
				return err
			}
			if op.name == "encrypt" && clients == 16 && ratio > limit {
				stop()
				return fmt.Errorf("encrypt at 16 clients costs %.2f times the bare server's CPU, more than %.1f", ratio, limit)
			}
		}
		stop()
	}
	return nil
}

type operation struct {
	name string
	body []byte
}

func operations(ctx context.Context, c *harness.Cluster) ([]operation, error) {
	plaintext := make([]byte, payload)
	if _, err := rand.Read(plaintext); err != nil {
		return nil, err
	}
	encContext := map[string]string{"table": "orders", "row": "4711"}
	service, err := c.Client("fr", "service")
	if err != nil {
		return nil, err
	}
	ct, err := service.Key("coalition", "bench").Encrypt(ctx, wire.EncryptRequest{Plaintext: plaintext, Context: encContext})
	if err != nil {
		return nil, err
	}
	var ops []operation
	for _, o := range []struct {
		name string
		req  any
	}{
		{"encrypt", wire.EncryptRequest{Plaintext: plaintext, Context: encContext}},
		{"decrypt", wire.DecryptRequest{Ciphertext: ct.Ciphertext, Context: encContext}},
		{"datakey", wire.DataKeyRequest{Bytes: 32, Context: encContext}},
	} {
		b, err := json.Marshal(o.req)
		if err != nil {
			return nil, err
		}
		ops = append(ops, operation{o.name, b})
	}
	return ops, nil
}

// compare measures both servers in turns, so that a disturbance of the machine
// meets both.
func compare(ctx context.Context, name string, node, bare target, clients int, span time.Duration) (float64, error) {
	var n, b sample
	for range 2 {
		for _, m := range []struct {
			t   target
			sum *sample
		}{{bare, &b}, {node, &n}} {
			s, err := load(ctx, m.t, clients, span/2)
			if err != nil {
				return 0, fmt.Errorf("%s: %w", name, err)
			}
			m.sum.ops += s.ops
			m.sum.cpu += s.cpu
			m.sum.lat += s.lat / 2
			m.sum.per += s.per / 2
		}
	}
	ratio := float64(n.perOp()) / float64(b.perOp())
	fmt.Printf("%-10s %8d %12.0f %12s %12s %12s %8.2f\n", name, clients, n.per, n.lat.Round(time.Microsecond), n.perOp().Round(100*time.Nanosecond), b.perOp().Round(100*time.Nanosecond), ratio)
	return ratio, nil
}

func newClient(t target) *http.Client {
	return &http.Client{Transport: &http.Transport{TLSClientConfig: t.tls, MaxIdleConnsPerHost: 128}}
}

func send(ctx context.Context, h *http.Client, t target) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, t.url, bytes.NewReader(t.body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := h.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, b)
	}
	return b, err
}

func once(ctx context.Context, t target) ([]byte, error) {
	h := newClient(t)
	defer h.CloseIdleConnections()
	return send(ctx, h, t)
}

// load sends requests over warm connections for the span.
func load(ctx context.Context, t target, clients int, span time.Duration) (sample, error) {
	h := newClient(t)
	defer h.CloseIdleConnections()
	if _, err := drive(ctx, h, t, clients, span/10); err != nil { // handshakes and caches
		return sample{}, err
	}
	before, err := cpu(t.pid)
	if err != nil {
		return sample{}, err
	}
	begin := time.Now()
	ops, err := drive(ctx, h, t, clients, span)
	took := time.Since(begin)
	if err != nil {
		return sample{}, err
	}
	after, err := cpu(t.pid)
	if err != nil {
		return sample{}, err
	}
	return sample{ops: ops, cpu: after - before, lat: took * time.Duration(clients) / time.Duration(max(ops, 1)), per: float64(ops) / took.Seconds()}, nil
}

// drive runs the clients until the span is over and counts their requests.
func drive(ctx context.Context, h *http.Client, t target, clients int, span time.Duration) (int, error) {
	end := time.Now().Add(span)
	counts, errs := make([]int, clients), make([]error, clients)
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() {
			for time.Now().Before(end) {
				if _, errs[i] = send(ctx, h, t); errs[i] != nil {
					return
				}
				counts[i]++
			}
		})
	}
	wg.Wait()
	total := 0
	for i := range clients {
		if errs[i] != nil {
			return 0, errs[i]
		}
		total += counts[i]
	}
	return total, nil
}

// cpu reads a process's CPU clock: clock_getcpuclockid(3).
func cpu(pid int) (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|2), &ts); err != nil {
		return 0, fmt.Errorf("CPU clock of process %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}

// startBare starts this program as the bare server: the node's certificate, the
// same TLS settings, an answer of the same size, and nothing done for it.
func startBare(c *harness.Cluster, tlsConfig *tls.Config, body []byte, size int) (target, func(), error) {
	self, err := os.Executable()
	if err != nil {
		return target{}, nil, err
	}
	cert := c.Dir + "/fr/node.crt," + c.Dir + "/fr/node.key," + c.Vars["CONCLAVE_CACERT"] + "," + fmt.Sprint(size)
	cmd := exec.Command(self, "-bare", cert)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return target{}, nil, err
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return target{}, nil, err
	}
	stop := func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }
	line := make([]byte, 128)
	n, err := out.Read(line)
	if err != nil {
		stop()
		return target{}, nil, fmt.Errorf("bare server: %w", err)
	}
	return target{url: strings.TrimSpace(string(line[:n])), pid: cmd.Process.Pid, tls: tlsConfig, body: body}, stop, nil
}
