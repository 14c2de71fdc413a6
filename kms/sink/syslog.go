package sink

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strconv"
	"syscall"
	"time"

	"github.com/conclave-kms/conclave/kms/audit"
)

// Priorities of RFC 5424 section 6.2.1: facility 13, log audit.
const (
	priorityOK      = 13*8 + 6 // informational
	priorityRefused = 13*8 + 4 // warning
)

// syslog sends a message of RFC 5424 for each entry, whose text is the entry's JSON:
// a datagram each, or over a stream with octet counting (RFC 6587 section 3.4.1, and
// RFC 5425 over TLS).
type syslog struct {
	network, address string
	tls              *tls.Config // nil: none
	host             string
	conn             net.Conn
}

// ParseSyslog checks the address of a syslog server: unix:///dev/log, udp://HOST:PORT,
// tcp://HOST:PORT or tls://HOST:PORT.
func ParseSyslog(address string) (scheme, target string, err error) {
	u, err := url.Parse(address)
	if err != nil {
		return "", "", fmt.Errorf("%q is not an address such as udp://log.example:514", address)
	}
	switch u.Scheme {
	case "unix":
		if u.Host == "" && u.Path != "" {
			return u.Scheme, u.Path, nil
		}
	case "udp", "tcp", "tls":
		if u.Hostname() != "" && u.Port() != "" && u.Path == "" && u.User == nil {
			return u.Scheme, u.Host, nil
		}
	}
	return "", "", fmt.Errorf("%q is not unix:///PATH, udp://HOST:PORT, tcp://HOST:PORT or tls://HOST:PORT", address)
}

// Syslog begins a sink that sends to a syslog server; config is for tls addresses.
func Syslog(address string, config *tls.Config, log *slog.Logger) (*Queue, error) {
	scheme, target, err := ParseSyslog(address)
	if err != nil {
		return nil, err
	}
	w := &syslog{network: scheme, address: target}
	switch scheme {
	case "unix":
		w.network = "unixgram"
	case "tls":
		w.network, w.tls = "tcp", config
		if config == nil {
			w.tls = &tls.Config{MinVersion: tls.VersionTLS13}
		}
	}
	if w.host, err = os.Hostname(); err != nil || w.host == "" {
		w.host = "-"
	}
	return start("syslog", w, log, queueLength, firstRetry), nil
}

func (w *syslog) stream() bool { return w.network == "tcp" }

func (w *syslog) connect(ctx context.Context) (err error) {
	if w.conn != nil {
		return nil
	}
	if w.tls != nil {
		w.conn, err = (&tls.Dialer{Config: w.tls}).DialContext(ctx, w.network, w.address)
	} else {
		w.conn, err = new(net.Dialer).DialContext(ctx, w.network, w.address)
	}
	if err != nil {
		w.conn = nil
	}
	return err
}

func (w *syslog) write(ctx context.Context, entries []audit.Entry) (lost int, err error) {
	if err := w.connect(ctx); err != nil {
		return 0, err
	}
	deadline, _ := ctx.Deadline()
	err = w.conn.SetDeadline(deadline)
	var b bytes.Buffer
	for _, e := range entries {
		if err != nil {
			break
		}
		m, encodeErr := w.message(e)
		if encodeErr != nil {
			return 0, errors.Join(errRefused, encodeErr)
		}
		if w.stream() {
			b.WriteString(strconv.Itoa(len(m)) + " ")
			b.Write(m)
			continue
		}
		if _, err = w.conn.Write(m); errors.Is(err, syscall.EMSGSIZE) {
			lost, err = lost+1, nil
		}
	}
	if err == nil && w.stream() {
		_, err = w.conn.Write(b.Bytes())
	}
	if err != nil {
		w.conn.Close()
		w.conn = nil
	}
	return lost, err
}

// message is <PRI>1 TIMESTAMP HOSTNAME APP-NAME PROCID MSGID - MSG.
func (w *syslog) message(e audit.Entry) ([]byte, error) {
	text, err := json.Marshal(e)
	if err != nil {
		return nil, err
	}
	priority := priorityOK
	if e.Outcome != "ok" {
		priority = priorityRefused
	}
	at := time.UnixMilli(e.Time).UTC().Format("2006-01-02T15:04:05.000Z")
	return append(fmt.Appendf(nil, "<%d>1 %s %s conclaved %d access - ", priority, at, w.host, os.Getpid()), text...), nil
}

func (w *syslog) close() error {
	if w.conn == nil {
		return nil
	}
	return w.conn.Close()
}
