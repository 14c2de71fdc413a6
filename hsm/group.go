package hsm

import (
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/conclave-kms/conclave/kms/secret"
)

// Hold returns c with the PIN in it, read from its one source, in place of that
// source, so that c opens a token more than once even where the source is a
// descriptor. The caller destroys PIN. Errors: ErrInvalid, ErrPIN.
func (c Config) Hold() (Config, error) {
	s, err := c.settings()
	if err != nil {
		return Config{}, err
	}
	var pin *secret.Bytes
	if pin, err = c.readPIN(s.uri); err != nil {
		return Config{}, err
	}
	u := *s.uri
	u.PINSource = ""
	c.URI, c.PIN, c.PINFile, c.PINFD = u.String(), pin, "", 0
	return c, nil
}

// Member is a device of a Group: the methods of Device.
type Member interface {
	AgreementKey() *ecdh.PublicKey
	ECDH(ctx context.Context, peer *ecdh.PublicKey) ([]byte, error)
	SigningKey() *ecdsa.PublicKey
	Sign(ctx context.Context, digest []byte) ([]byte, error)
	Wrap(ctx context.Context, aad, key []byte) ([]byte, error)
	Unwrap(ctx context.Context, aad, wrapped []byte) (*secret.Bytes, error)
	Random(ctx context.Context, b []byte) error
	Check(ctx context.Context) error
	Describe() string
	Close() error
	ImportKey() (kind string, public []byte)
	LoadHMAC(ctx context.Context, blob []byte) (mac func(ctx context.Context, message []byte) ([]byte, error), unload func(), err error)
	LoadSigner(ctx context.Context, c ecdh.Curve, blob []byte) (sign func(ctx context.Context, digest []byte) ([]byte, error), unload func(), err error)
	Generates() (hmac, signer bool)
	GenerateHMAC(ctx context.Context, recipients [][]byte) (blobs [][]byte, mac func(ctx context.Context, message []byte) ([]byte, error), unload func(), err error)
	GenerateSigner(ctx context.Context, c ecdh.Curve, recipients [][]byte) (blobs [][]byte, public *ecdsa.PublicKey, sign func(ctx context.Context, digest []byte) ([]byte, error), unload func(), err error)
	Rewrap(ctx context.Context, blob []byte, recipient []byte) ([]byte, error)
	Attributes(ctx context.Context) ([]KeyAttributes, error)
}

// Opener opens one member of a group.
type Opener struct {
	Name string // for messages; not secret
	Open func(ctx context.Context) (Member, error)
}

// Group is one hardware root in several tokens that hold the same three keys, as the
// cloning of a vendor's HSMs makes them. Calls go to one member as long as it works
// and to the next one when it does not; a member that was down comes in again by
// itself. It is safe for concurrent use.
type Group struct {
	members []*member
	log     *slog.Logger
	first   atomic.Int32 // index of the member that calls go to
	stop    context.CancelFunc
	wg      sync.WaitGroup
	closed  atomic.Bool
	pins    []*secret.Bytes // of OpenGroup

	// Of the first member that opened; all others have the same.
	agreement *ecdh.PublicKey
	signing   *ecdsa.PublicKey
	kind      string
	public    []byte
}

// member is one token of a group.
type member struct {
	name string
	open func(ctx context.Context) (Member, error)
	wake chan struct{} // capacity 1: it has failed

	mu   sync.Mutex
	dev  Member // nil: it could not be opened yet
	down error  // why it is left out; nil for one that works
}

// Times of a member that is down.
const (
	groupDelay    = time.Second // before the first look at it; then twice as long each time
	groupMaxDelay = 10 * time.Second
)

// OpenGroup opens the tokens of all configurations, in this process, as one device.
// Errors are those of NewGroup.
func OpenGroup(ctx context.Context, cfgs []Config) (*Group, error) {
	var openers []Opener
	var pins []*secret.Bytes
	for i, c := range cfgs {
		// A member may be opened later, when the caller's PIN and its descriptor are
		// gone. A file stays where it is.
		if c.PIN != nil || c.PINFD != 0 {
			var err error
			if c, err = c.Hold(); err != nil {
				destroyAll(pins)
				return nil, fmt.Errorf("member %d: %w", i+1, err)
			}
			pins = append(pins, c.PIN)
		}
		openers = append(openers, Opener{fmt.Sprintf("%d (%s)", i+1, c.URI), func(ctx context.Context) (Member, error) {
			d, err := Open(ctx, c)
			if err != nil {
				return nil, err // and not a nil *Device in an interface
			}
			return d, nil
		}})
	}
	g, err := NewGroup(ctx, openers, nil)
	if err != nil {
		destroyAll(pins)
		return nil, err
	}
	g.pins = pins
	return g, nil
}

func destroyAll(all []*secret.Bytes) {
	for _, s := range all {
		s.Destroy()
	}
}

// NewGroup opens the members and checks that all have the same keys: equal public
// keys, and what one wraps the other unwraps. A member whose token, library or
// network is not there is left out until it is, as long as one member opens. Any
// other failure of a member refuses the group by the member's name: other keys
// (ErrInvalid), a wrong PIN, keys that are missing or unsafe. log gets what happens
// to members; nil: nothing.
func NewGroup(ctx context.Context, openers []Opener, log *slog.Logger) (*Group, error) {
	if len(openers) == 0 {
		return nil, invalidf("a group without members")
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	g := &Group{log: log}
	for _, o := range openers {
		g.members = append(g.members, &member{name: o.Name, open: o.Open, wake: make(chan struct{}, 1)})
	}
	if err := g.openAll(ctx); err != nil {
		g.closeMembers()
		return nil, err
	}
	ctx, g.stop = context.WithCancel(context.WithoutCancel(ctx))
	for _, m := range g.members {
		g.wg.Go(func() { g.tend(ctx, m) })
	}
	return g, nil
}

func (g *Group) openAll(ctx context.Context) error {
	var absent []error
	for _, m := range g.members {
		err := g.join(ctx, m)
		if err == nil {
			continue
		}
		err = fmt.Errorf("member %s: %w", m.name, err)
		if !absence(err) {
			return err
		}
		g.log.Warn("a member of the device group is absent", "member", m.name, "err", err)
		m.fail(err)
		absent = append(absent, err)
	}
	if len(absent) == len(g.members) {
		return memberErrors(absent)
	}
	return nil
}

// absence reports whether a member may be there later: its token, its library or
// the way to them is missing.
func absence(err error) bool {
	return errors.Is(err, ErrUnavailable) || errors.Is(err, ErrTokenNotFound) || errors.Is(err, ErrModule)
}

// join opens a member and lets it into the group.
func (g *Group) join(ctx context.Context, m *member) error {
	dev, err := m.open(ctx)
	if err != nil {
		return err
	}
	if err := g.compare(ctx, dev); err != nil {
		_ = dev.Close() // the refusal matters more
		return err
	}
	m.mu.Lock()
	m.dev, m.down = dev, nil
	m.mu.Unlock()
	return nil
}

// compare checks that a device has the keys of the group. The first one makes them.
func (g *Group) compare(ctx context.Context, dev Member) error {
	kind, public := dev.ImportKey()
	if g.agreement == nil {
		g.agreement, g.signing, g.kind, g.public = dev.AgreementKey(), dev.SigningKey(), kind, public
		return nil
	}
	switch {
	case !dev.AgreementKey().Equal(g.agreement):
		return invalidf("it has another agreement key than the group: clone the keys of one token to the others")
	case !dev.SigningKey().Equal(g.signing):
		return invalidf("it has another signing key than the group: clone the keys of one token to the others")
	case kind != g.kind || string(public) != string(g.public):
		return invalidf("it imports keys otherwise than the group: its firmware differs")
	}
	return g.compareWrapping(ctx, dev)
}

// compareWrapping has a member of the group wrap what dev then unwraps.
func (g *Group) compareWrapping(ctx context.Context, dev Member) error {
	aad, probe := []byte("conclave device group"), make([]byte, 32)
	wrapped, err := g.Wrap(ctx, aad, probe)
	if err != nil {
		return unavailablef("no member of the group can be asked for its wrapping key: %v", err)
	}
	got, err := dev.Unwrap(ctx, aad, wrapped)
	if errors.Is(err, ErrInvalid) {
		return invalidf("it has another wrapping key than the group: clone the keys of one token to the others")
	}
	got.Destroy()
	return err
}

// AgreementKey returns the public half of the agreement key.
func (g *Group) AgreementKey() *ecdh.PublicKey { return g.agreement }

// SigningKey returns the public half of the signing key.
func (g *Group) SigningKey() *ecdsa.PublicKey {
	k := *g.signing
	return &k
}

// ImportKey is Device.ImportKey.
func (g *Group) ImportKey() (kind string, public []byte) {
	return g.kind, append([]byte(nil), g.public...)
}

// Describe names the members for a person and says which are down, and why.
func (g *Group) Describe() string {
	var parts []string
	for _, m := range g.members {
		m.mu.Lock()
		text := "member " + m.name
		if m.dev != nil {
			text = m.dev.Describe()
		}
		if m.down != nil {
			text += " (down: " + m.down.Error() + ")"
		}
		m.mu.Unlock()
		parts = append(parts, text)
	}
	return fmt.Sprintf("group of %d: %s", len(parts), strings.Join(parts, "; "))
}

// Down returns what is wrong with each member that is down, by name; empty when all
// work.
func (g *Group) Down() map[string]error {
	down := map[string]error{}
	for _, m := range g.members {
		m.mu.Lock()
		if m.down != nil {
			down[m.name] = m.down
		}
		m.mu.Unlock()
	}
	return down
}

// Close closes all members. It may be called again.
func (g *Group) Close() error {
	g.closed.Store(true)
	g.stop()
	g.wg.Wait()
	defer destroyAll(g.pins)
	return g.closeMembers()
}

func (g *Group) closeMembers() error {
	var errs []error
	for _, m := range g.members {
		m.mu.Lock()
		dev := m.dev
		m.mu.Unlock()
		if dev != nil {
			if err := dev.Close(); err != nil {
				errs = append(errs, fmt.Errorf("member %s: %w", m.name, err))
			}
		}
	}
	return errors.Join(errs...)
}
