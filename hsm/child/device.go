// Package child runs a PKCS#11 library in a process of its own, so that a library
// that crashes, aborts or hangs takes nothing else down. Open starts the process and
// returns a device with the methods of hsm.Device; Main is that process. DESIGN.md
// has the protocol and what it costs.
package child

import (
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms/secret"
)

// Config says which program to run and what it opens.
type Config struct {
	// Command is the program that calls Main, and its arguments. It inherits the
	// environment; configuration and PIN go through a descriptor.
	Command []string
	// HSM is the device. Its PIN is read once, by the parent. Where it comes from a
	// file, the file is read again after the token has refused it.
	HSM hsm.Config
	// Log gets what the library writes to standard error, deaths and restarts. nil: nothing.
	Log *slog.Logger
}

// underWay is how many requests may be under way for each session of the device: one
// is in the library, the others are where it finds them at once.
const underWay = 2

// startLimit bounds the start-up self test. On a slow device it takes a while; the
// library's own calls have their deadline besides.
const startLimit = 5 * time.Minute

// Device is a hardware root whose library runs in a child process. Calls that are
// under way when the process dies return hsm.ErrUnavailable, which names the cause;
// so do those that come before it has been started again, in the background. A call
// without an answer past its deadline gets the process killed.
type Device struct {
	command []string
	config  hsm.Config // as given
	uri     string     // without the source of the PIN
	pinFile bool       // the PIN comes from a file
	timeout time.Duration
	slots   int
	log     *slog.Logger
	id      identity
	keys    atomic.Uint64 // numbers of loaded keys

	pin     *secret.Bytes // the one in use; supervise's once Open has returned
	refused []*secret.Bytes
	trouble chan struct{} // the token has refused the PIN

	stop   context.CancelFunc
	wg     sync.WaitGroup
	closed chan struct{}

	mu      sync.Mutex
	closing bool
	now     current
	state   atomic.Pointer[current] // now, for readers
}

// current is what calls go to: a process, or the reason why there is none.
type current struct {
	g   *generation
	err error
}

// Open starts the process, opens the device in it and returns when its self test has
// passed. Errors are those of hsm.Open.
func Open(ctx context.Context, cfg Config) (*Device, error) {
	if len(cfg.Command) == 0 {
		return nil, invalidf("no command for the PKCS#11 process")
	}
	held, err := cfg.HSM.Hold()
	if err != nil {
		return nil, err
	}
	d := &Device{command: cfg.Command, config: cfg.HSM, timeout: cfg.HSM.CallTimeout, slots: cfg.HSM.MaxSessions, log: cfg.Log,
		pin: held.PIN, trouble: make(chan struct{}, 1), closed: make(chan struct{})}
	u, err := hsm.ParseURI(cfg.HSM.URI)
	d.pinFile = err == nil && (cfg.HSM.PINFile != "" || u.PINSource != "")
	d.uri = held.URI
	if d.timeout == 0 {
		d.timeout = hsm.DefaultCallTimeout
	}
	if d.slots == 0 {
		d.slots = hsm.DefaultMaxSessions
	}
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	g, id, err := d.launch(ctx)
	if err != nil {
		held.PIN.Destroy()
		return nil, err
	}
	d.id = id
	d.set(current{g: g})
	ctx, d.stop = context.WithCancel(context.WithoutCancel(ctx))
	d.wg.Go(func() { d.supervise(ctx, g) })
	return d, nil
}

// generation is one life of the process.
type generation struct {
	*link
	p     *process
	ended chan struct{} // closed when the process is gone and all calls have been told

	whyMu sync.Mutex
	why   string // why it was killed
}

// launch starts a process and opens the device in it.
func (d *Device) launch(ctx context.Context) (*generation, identity, error) {
	p, err := startProcess(d.command, &logWriter{log: d.log, now: time.Now})
	if err != nil {
		return nil, identity{}, err
	}
	g := &generation{p: p, ended: make(chan struct{})}
	if g.link, err = newLink(p.conn, underWay*d.slots, d.timeout); err == nil {
		g.hopeless = g.kill
		g.note = d.notice
		err = g.link.start(g.lost)
	}
	if err != nil {
		p.kill()
		<-p.exited
		p.conn.Close()
		if g.link != nil {
			g.link.destroy()
		}
		return nil, identity{}, err
	}
	go func() {
		<-p.exited
		// A process that the library started may hold the other end open.
		_ = p.conn.SetReadDeadline(time.Now().Add(time.Second))
	}()
	var id identity
	err = g.call(ctx, d.opening(), startLimit, func(reply message) (err error) {
		id, err = parseIdentity(reply)
		return err
	})
	if err != nil {
		g.kill("it did not start")
		<-g.ended
		return nil, identity{}, err
	}
	return g, id, nil
}

// opening is the first request: what to open.
func (d *Device) opening() message {
	m := request(opOpen, protocol, []byte(d.uri), d.pin.Reveal(), []byte(d.config.Label), []byte(d.config.SoftHSMConf),
		limits{timeout: d.timeout + 2*grace(d.timeout), sessions: d.slots, loaded: d.config.MaxLoaded}.bytes())
	m.arg = curveNumber(d.config.Curve)
	return m
}

func (g *generation) kill(why string) {
	g.whyMu.Lock()
	if g.why == "" {
		g.why = why
	}
	g.whyMu.Unlock()
	g.p.kill()
}

// lost runs once, when nothing more comes from the process.
func (g *generation) lost(error) {
	g.p.kill() // it has closed the connection: mostly it has ended
	<-g.p.exited
	g.p.conn.Close()
	g.whyMu.Lock()
	why := g.why
	g.whyMu.Unlock()
	if why == "" {
		why = g.p.ending()
	}
	g.fail(unavailablef("the PKCS#11 process is gone: %s", why))
	close(g.ended)
}

// notice sees the errors that come from the process.
func (d *Device) notice(err error) {
	if errors.Is(err, hsm.ErrPIN) {
		select {
		case d.trouble <- struct{}{}:
		default:
		}
	}
}

// set makes calls go to c, unless the device has been closed.
func (d *Device) set(c current) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closing {
		return false
	}
	d.now = c
	d.state.Store(&c)
	return true
}

// PID is the number of the child process, 0 while there is none.
func (d *Device) PID() int {
	if g := d.state.Load().g; g != nil {
		return g.p.cmd.Process.Pid
	}
	return 0
}

// failure is what a call returns when there is no process, nil when there is one.
func (c *current) failure(ctx context.Context, o op) error {
	if c.err == nil {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return contextError(opNames[o], err)
	}
	return fmt.Errorf("%s: %w", opNames[o], c.err)
}

// call makes a request of the process that there is.
func (d *Device) call(ctx context.Context, m message, take func(reply message) error) error {
	c := d.state.Load()
	if err := c.failure(ctx, m.op); err != nil {
		return err
	}
	return c.g.call(ctx, m, d.timeout, take)
}

// Close ends the device and its process. It waits for calls under way as long as a
// call may take. Calls that come later are refused with hsm.ErrUnavailable. It may
// be called again.
func (d *Device) Close() error {
	d.mu.Lock()
	first := !d.closing
	d.closing = true
	g := d.now.g
	d.now = current{err: unavailablef("the device is closed")}
	d.state.Store(&d.now)
	d.mu.Unlock()
	if !first {
		<-d.closed
		return nil
	}
	d.stop()
	if g != nil {
		g.p.hangUp()
		timer := time.NewTimer(d.timeout)
		defer timer.Stop()
		select {
		case <-g.ended:
		case <-timer.C:
			g.kill("it did not end in time")
			<-g.ended
		}
	}
	d.wg.Wait()
	d.pin.Destroy()
	for _, p := range d.refused {
		p.Destroy()
	}
	close(d.closed)
	return nil
}

// identity is what a device is known by.
type identity struct {
	agreement    *ecdh.PublicKey
	signing      *ecdsa.PublicKey
	description  string
	importKind   string
	importKey    []byte
	hmac, signer bool // what it generates
}

// same reports whether the device has the same keys.
func (id identity) same(other identity) bool {
	return id.agreement.Equal(other.agreement) && id.signing.Equal(other.signing)
}

// AgreementKey returns the public half of the agreement key.
func (d *Device) AgreementKey() *ecdh.PublicKey { return d.id.agreement }

// SigningKey returns the public half of the signing key.
func (d *Device) SigningKey() *ecdsa.PublicKey {
	k := *d.id.signing
	return &k
}

// Describe is hsm.Device.Describe.
func (d *Device) Describe() string { return d.id.description + ", in a process of its own" }

// ImportKey is hsm.Device.ImportKey.
func (d *Device) ImportKey() (kind string, public []byte) {
	return d.id.importKind, append([]byte(nil), d.id.importKey...)
}

// Generates is hsm.Device.Generates.
func (d *Device) Generates() (hmac, signer bool) { return d.id.hmac, d.id.signer }
