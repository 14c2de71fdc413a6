package sink

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms/audit"
)

// header is that of RFC 5424 section 6.
var header = regexp.MustCompile(`^<1(?:10|08)>1 2026-01-01T00:00:00\.\d{3}Z \S+ conclaved \d+ access - (\{.*\})$`)

func checkMessage(t *testing.T, m string, want audit.Entry) {
	t.Helper()
	found := header.FindStringSubmatch(m)
	if found == nil {
		t.Fatalf("%q is no message of RFC 5424", m)
	}
	var e audit.Entry
	if err := json.Unmarshal([]byte(found[1]), &e); err != nil || e.Count != want.Count {
		t.Errorf("%q: %v", m, err)
	}
	if refused := want.Outcome != "ok"; refused != strings.HasPrefix(m, "<108>") {
		t.Errorf("the priority of outcome %s is in %q", want.Outcome, m[:5])
	}
}

func TestSyslogDatagrams(t *testing.T) {
	for _, network := range []string{"udp", "unixgram"} {
		address := "127.0.0.1:0"
		if network == "unixgram" {
			address = filepath.Join(t.TempDir(), "log")
		}
		server, err := net.ListenPacket(network, address)
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		scheme := map[string]string{"udp": "udp://", "unixgram": "unix://"}[network]
		q, err := Syslog(scheme+server.LocalAddr().String(), nil, quiet)
		if err != nil {
			t.Fatal(err)
		}
		denied, long := entry(2), entry(1)
		denied.Outcome = "denied"
		long.Request = strings.Repeat("x", 1<<20) // no datagram
		for _, e := range []audit.Entry{entry(0), long, denied} {
			q.Put(e)
		}
		if err := q.Close(); err != nil || q.Sent() != 2 || q.Dropped() != 1 {
			t.Errorf("%s: %d sent, %d dropped, %v", network, q.Sent(), q.Dropped(), err)
		}
		buf := make([]byte, 64<<10)
		for _, want := range []audit.Entry{entry(0), denied} {
			n, _, err := server.ReadFrom(buf)
			if err != nil {
				t.Fatal(err)
			}
			checkMessage(t, string(buf[:n]), want)
		}
	}
}

// TestSyslogStream has a server that hangs up once.
func TestSyslogStream(t *testing.T) {
	server, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	w := &syslog{network: "tcp", address: server.Addr().String(), host: "h"}
	for range 2 {
		if _, err := w.write(t.Context(), []audit.Entry{entry(0), entry(1)}); err != nil {
			t.Fatal(err)
		}
		conn, err := server.Accept()
		if err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(conn)
		for i := range 2 {
			length := 0
			for c, _ := r.ReadByte(); c != ' '; c, _ = r.ReadByte() { // octet counting
				length = 10*length + int(c-'0')
			}
			m := make([]byte, length)
			if _, err := io.ReadFull(r, m); err != nil {
				t.Fatal(err)
			}
			checkMessage(t, string(m), entry(i))
		}
		conn.Close()
		w.conn.Close() // what the next write finds
		if _, err := w.write(t.Context(), []audit.Entry{entry(9)}); err == nil {
			t.Fatal("written to a connection that is closed")
		}
	}
}

func TestAddresses(t *testing.T) {
	for address, ok := range map[string]bool{
		"unix:///dev/log": true, "udp://log.example:514": true, "tcp://[::1]:601": true, "tls://log.example:6514": true,
		"": false, "unix://dev/log": false, "udp://log.example": false, "udp://:514": false, "http://log.example:80": false, "tcp://u@h:1": false, "tcp://h:1/x": false,
	} {
		if _, _, err := ParseSyslog(address); (err == nil) != ok {
			t.Errorf("%q: %v", address, err)
		}
	}
	for endpoint, ok := range map[string]bool{
		"https://c.example:4318/v1/logs": true, "http://127.0.0.1:4318/v1/logs": true,
		"": false, "https://c.example": false, "https://c.example/": false, "ftp://c.example/x": false, "https://u:p@c.example/v1/logs": false, "/v1/logs": false,
	} {
		if err := ParseEndpoint(endpoint); (err == nil) != ok {
			t.Errorf("%q: %v", endpoint, err)
		}
	}
}

func TestOTLP(t *testing.T) {
	answers := make(chan int, 10)
	var got []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		status := <-answers
		if status == http.StatusOK {
			got = append(got, string(b))
		}
		if r.Method != http.MethodPost || r.Header.Get("Content-Type") != "application/json" || r.URL.Path != "/v1/logs" {
			status = http.StatusTeapot
		}
		w.WriteHeader(status)
		io.WriteString(w, `{"partialSuccess":{"rejectedLogRecords":"1"}}`)
	}))
	defer server.Close()
	w := &otlp{endpoint: server.URL + "/v1/logs", client: server.Client()}
	for _, c := range []struct {
		answer  int
		refused bool
		ok      bool
	}{{503, false, false}, {429, false, false}, {400, true, false}, {302, true, false}, {200, false, true}} {
		answers <- c.answer
		lost, err := w.write(t.Context(), []audit.Entry{entry(0), entry(1)})
		if (err == nil) != c.ok || errors.Is(err, errRefused) != c.refused || c.ok && lost != 1 {
			t.Errorf("%d: %d lost, %v", c.answer, lost, err)
		}
	}
	// The shape is that of the examples of opentelemetry-proto (examples/logs.json).
	var logs struct {
		ResourceLogs []struct {
			Resource  struct{ Attributes []otlpAttribute }
			ScopeLogs []struct {
				Scope      struct{ Name string }
				LogRecords []struct {
					TimeUnixNano   string
					SeverityNumber int
					Body           struct{ StringValue string }
					Attributes     []otlpAttribute
				}
			}
		}
	}
	if err := json.Unmarshal([]byte(got[0]), &logs); err != nil {
		t.Fatal(err)
	}
	records := logs.ResourceLogs[0].ScopeLogs[0].LogRecords
	if len(records) != 2 || records[0].TimeUnixNano != "1767225600123000000" || records[0].SeverityNumber != 9 || records[0].Body.StringValue != "encrypt coalition/orders: ok" {
		t.Errorf("%+v", records)
	}
	if !slices.ContainsFunc(records[0].Attributes, func(a otlpAttribute) bool {
		return a.Key == "conclave.context.table" && a.Value.String != nil && *a.Value.String == "orders"
	}) {
		t.Errorf("the encryption context is not in %v", records[0].Attributes)
	}
	if _, err := OTLP("nowhere", nil, quiet); err == nil {
		t.Error("an endpoint that is none")
	}
	q, err := OTLP(server.URL+"/v1/logs", nil, quiet)
	if err != nil {
		t.Fatal(err)
	}
	answers <- 200
	q.Put(entry(3))
	if err := q.Close(); err != nil || q.Sent()+q.Dropped() != 1 {
		t.Errorf("%d sent, %v", q.Sent(), err)
	}
}
