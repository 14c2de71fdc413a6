package engine

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"math"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

// Cluster is the replicated state as the engine needs it.
type Cluster interface {
	// State returns the state as applied here; it never blocks.
	State() *state.State
	// Propose submits a signed command and returns its outcome once it is
	// applied here. Errors: kms.Unavailable (certainly not applied), kms.Unknown.
	Propose(ctx context.Context, raw []byte) (state.Result, error)
	// Barrier returns when State has everything that the cluster had committed when
	// it was called. Error: kms.Unavailable.
	Barrier(ctx context.Context) error
	// Fresh is the age of the last proof that State is up to date, the longest
	// duration there is if there was none since the start.
	Fresh() time.Duration
}

// Signer is the node's signing key: a raw ECDSA signature r‖s of a digest.
type Signer interface {
	Sign(ctx context.Context, digest []byte) ([]byte, error)
}

// Device is the node's hardware as a source of randomness.
type Device interface {
	Random(ctx context.Context, b []byte) error
	Check(ctx context.Context) error
	Describe() string
}

// Log is the node's access log: Append returns when the entry is durable.
type Log interface {
	Append(ctx context.Context, e audit.Entry) error
}

// Config is what an Engine is made of. The fields of the first group are
// required.
type Config struct {
	Node    string // this node's id
	Cluster Cluster
	Cache   *keyring.Cache
	Root    *keyring.Root
	Signer  Signer
	Device  Device
	Log     Log

	// Importers wrap keys of protection hardware for the devices of other nodes, by
	// import kind; those of this node's own kind are best among them.
	Importers map[string]keyring.Importer
	// SigningSuite is that of Signer; 0: as the node's record says, which at a start
	// may be that of a hardware root which was replaced since.
	SigningSuite pqc.SuiteID
	// Seed, optional, is what the cluster keeps for this node in its backups.
	Seed *KeptSeed
	// Checkpoints, optional: without them the node neither submits nor cosigns any.
	Checkpoints *Checkpoints

	Now     func() time.Time     // default time.Now
	Logger  *slog.Logger         // default: discards
	Metrics *prometheus.Registry // nil: none
	Hold    func() error         // why the node must serve nothing, nil when it may; nil: it always may
	Raft    func() wire.Raft     // the consensus layer's view for Status; nil: none
	Version string               // of the program, for Status

	// Past, optional, reads this node's access log from a time on, and reports whether it
	// reaches back before that. With it the node knows what it used before it was stopped.
	Past func(since time.Time, f func(audit.Entry)) (reaches bool, err error)

	Certificate *x509.Certificate // this node's own, for Drift; nil: not known
}

// Engine carries out the use cases. It is safe for concurrent use.
type Engine struct {
	cfg       Config
	node      string
	agreement []byte // public key of this node's hardware root
	cluster   Cluster
	now       func() time.Time
	log       *slog.Logger
	access    access
	lookups   lookups
	catchUps  catchUps
	metrics   *metrics

	logFailed atomic.Bool // the access log can take no more entries
	device    deviceCheck
	inUse     inUse
	uses      uses
	started   time.Time
	standing  standing // alarms
	lags      lags
}

// New checks the configuration and returns an Engine. Errors: kms.Invalid.
func New(cfg Config) (*Engine, error) {
	if cfg.Cluster == nil || cfg.Signer == nil || cfg.Device == nil || cfg.Log == nil {
		return nil, kms.Errorf(kms.Invalid, "engine: cluster, signer, device and access log are required")
	}
	if cfg.Cache == nil || cfg.Root == nil {
		return nil, kms.Errorf(kms.Invalid, "engine: hardware root and key cache are required")
	}
	// A node that joined later stands in no state yet at a start from the genesis.
	if err := kms.CheckName("node", cfg.Node); err != nil {
		return nil, err
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	e := &Engine{
		cfg: cfg, node: cfg.Node, agreement: cfg.Root.PublicKey().Bytes(), cluster: cfg.Cluster,
		now: cfg.Now, log: cfg.Logger,
	}
	e.started = e.now()
	var err error
	if e.metrics, err = newMetrics(cfg.Metrics, e); err != nil {
		return nil, err
	}
	if _, err := e.access.load(cfg.Cluster.State()); err != nil {
		return nil, err
	}
	return e, nil
}

// Caller is who asks.
type Caller struct {
	Identity       kms.Identity
	RequestID      string // for logs and problems; at most MaxRequestID bytes
	IdempotencyKey string // of a write, may be empty; at most MaxIdempotencyKey bytes
	Local          bool   // a read is content with what this node knows, however old
}

// Limits of a Caller, in bytes.
const (
	MaxRequestID      = 64
	MaxIdempotencyKey = 128
)

func (c Caller) check() error {
	switch {
	case c.Identity.TrustDomain == "" || c.Identity.Role == "" || c.Identity.Name == "" || !plainText(c.principal(), kms.MaxIdentity):
		return kms.Errorf(kms.Unauthenticated, "the caller has no identity")
	case !plainText(c.RequestID, MaxRequestID):
		return kms.Errorf(kms.Invalid, "the request id is longer than %d bytes or not plain text", MaxRequestID)
	case len(c.IdempotencyKey) > MaxIdempotencyKey:
		return kms.Errorf(kms.Invalid, "the idempotency key is longer than %d bytes", MaxIdempotencyKey)
	}
	return nil
}

// principal is the caller's SPIFFE ID.
func (c Caller) principal() string {
	return "spiffe://" + c.Identity.TrustDomain + "/" + c.Identity.Role + "/" + c.Identity.Name
}

// plainText reports whether s is at most n bytes of visible ASCII, so that it
// can go into the access log as it is.
func plainText(s string, n int) bool {
	if len(s) > n {
		return false
	}
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// request is one request on its way: what the access log will say of it.
type request struct {
	caller  Caller
	act     Action
	logged  Action // what the access log calls it, where not act
	res     resource
	fresh   func() time.Duration // age of the state that the request acts on
	found   found                // the records of res
	about   string               // names in the log what res does not, e.g. what is to be created
	version uint32               // key version used, 0 for none or several
	context map[string]string    // encryption context
	anyOf   bool                 // f itself authorises, item by item
	view    bool                 // a read, which may be of this node's local view
	written bool                 // a change was made, or may have been
	count   int                  // items, 0 and 1 both mean one
	failed  int                  // items that failed

	caughtUp    bool // this node has tried to catch up for this request
	notCaughtUp error
}

// check refuses what must not reach the access log.
func (rq *request) check() error {
	if err := rq.caller.check(); err != nil {
		return err
	}
	return rq.res.check()
}

// do is the path of every request: catch up if it needs that, authorise, act, write
// the access log, answer. f acts; it runs only when the request is permitted, and a second
// time if it was refused by a state that turned out to be old.
func do[R any](ctx context.Context, e *Engine, rq *request, f func(st *state.State) (R, error)) (R, error) {
	started := e.now()
	var zero, r R
	err := rq.check()
	if err != nil {
		rq.res, rq.about = resource{}, ""
	} else {
		var st *state.State
		r, st, err = attend(e, rq, e.upToDate(ctx, rq), f)
		if rq.mayBeBehind(err) {
			if cerr := rq.catchUp(ctx, e); cerr != nil {
				err = notSure(err, cerr)
			} else if e.cluster.State() != st {
				r, _, err = attend(e, rq, nil, f)
			}
		}
	}
	err = e.plain(err)
	if lerr := e.record(ctx, rq, started, err); lerr != nil {
		if err == errLogFailed { // known before: nothing was done, and this says what helps
			lerr = err
		}
		e.metrics.count(rq.act, lerr, e.now().Sub(started))
		return zero, lerr
	}
	e.metrics.count(rq.act, err, e.now().Sub(started))
	if err != nil {
		return zero, err
	}
	return r, nil
}

// attend authorises a request and acts, unless there is an error already. It returns the
// state that it has seen, too.
func attend[R any](e *Engine, rq *request, err error, f func(st *state.State) (R, error)) (r R, st *state.State, _ error) {
	looked, age := e.now(), e.cluster.Fresh()
	st = e.cluster.State()            // after its age was taken, so that it is no older
	rq.fresh = func() time.Duration { // more than the longest duration there is would be negative
		return age + min(e.now().Sub(looked), neverFresh-age)
	}
	rq.res, rq.found = e.lookups.find(st, rq.res)
	if err == nil && e.logFailed.Load() {
		err = errLogFailed
	}
	if err == nil && rq.act != ActReadStatus {
		err = e.held()
	}
	if err == nil && !rq.anyOf {
		err = e.access.allow(st, rq.caller.Identity, rq.act, rq.res)
	}
	if err == nil {
		r, err = f(st)
	}
	if !atHand[rq.act] { // what data operations are refused they learn after catching up
		err = unproven(age, err)
	}
	return r, st, err
}

// neverFresh is what Cluster.Fresh says of a state that was never proven to be up
// to date since the node started.
const neverFresh = time.Duration(math.MaxInt64)

// unproven returns the error of a request. A node that has just started begins with
// the genesis, where nothing exists and nobody has rights yet: a refusal for such a
// reason would be taken for final, so the caller is told to ask again instead.
func unproven(age time.Duration, err error) error {
	if age < neverFresh || !errors.Is(err, kms.Denied) && !errors.Is(err, kms.NotFound) {
		return err
	}
	return kms.Wrap(kms.Unavailable, err, "this node has not caught up with the cluster since it started",
		"use another node, or try again in a moment; if it lasts, see GET /v1/ready")
}

// held returns why the node must serve nothing at the moment.
func (e *Engine) held() error {
	if e.cfg.Hold == nil {
		return nil
	}
	return e.cfg.Hold()
}

var errLogFailed error = &kms.Error{
	Kind: kms.ReadOnly,
	Msg:  "this node's access log cannot be written, so it refuses every request",
	Fix:  "use another node; the site's operator must free or repair the disk and restart this one",
}

// record writes the access log's entry and returns when it is durable. The
// caller's going away does not stop it.
func (e *Engine) record(ctx context.Context, rq *request, at time.Time, outcome error) error {
	entry := audit.Entry{
		Time: at.UnixMilli(), Node: e.node, Principal: rq.caller.principal(), Action: string(cmp.Or(rq.logged, rq.act)),
		Resource: rq.res.name(), Version: rq.version, Request: rq.caller.RequestID,
		Outcome: "ok", Context: rq.context, Count: max(rq.count, 1),
	}
	if rq.about != "" {
		entry.Resource = rq.about
	}
	if !plainText(entry.Principal, kms.MaxIdentity) {
		entry.Principal = ""
	}
	if !plainText(entry.Request, MaxRequestID) {
		entry.Request = ""
	}
	switch {
	case outcome != nil:
		entry.Outcome = kms.KindOf(outcome).String()
	case rq.failed > 0:
		entry.Outcome = "partial"
	}
	err := e.cfg.Log.Append(context.WithoutCancel(ctx), entry)
	if err == nil {
		return nil
	}
	if errors.Is(err, kms.ReadOnly) && !e.logFailed.Swap(true) {
		e.log.ErrorContext(ctx, "the access log cannot be written; refusing every request from now on", "error", err)
	}
	if rq.written {
		return kms.Wrap(kms.Unknown, err, "the access log cannot be written, so the answer is withheld; the change may have been made",
			"ask another node again with the same idempotency key")
	}
	return kms.Wrap(kms.ReadOnly, err, "the access log cannot be written, so the answer is withheld", "use another node")
}

// plain turns an error that is not ours into one that may leave.
func (e *Engine) plain(err error) error {
	if err == nil {
		return nil
	}
	var own *kms.Error
	if errors.As(err, &own) {
		return own
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return kms.Wrap(kms.Unavailable, err, "the request ended before it could be carried out", "try again with more time")
	}
	e.log.Error("internal error", "error", err)
	return kms.Wrap(kms.Internal, err, "internal error", "")
}
