// Package native is Conclave's own API: JSON over HTTPS under /v1, described by
// the OpenAPI document that it serves at /v1/openapi.json.
package native

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"path"
	"strings"
	"sync/atomic"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/engine"
	"github.com/conclave-kms/conclave/kms/wire"
)

// Time limits of one connection and one request.
const (
	HeaderTimeout  = 10 * time.Second
	ReadTimeout    = 30 * time.Second
	RequestTimeout = 60 * time.Second
	IdleTimeout    = 2 * time.Minute
)

// Config is what a Server is made of.
type Config struct {
	Engine  *engine.Engine
	Metrics http.Handler // nil: no /v1/metrics
	Logger  *slog.Logger // nil: discards
}

// Server is the native API as an http.Handler.
type Server struct {
	engine  *engine.Engine
	log     *slog.Logger
	mux     *http.ServeMux
	openapi []byte
}

// New builds the API's routes.
func New(cfg Config) *Server {
	s := &Server{engine: cfg.Engine, log: cfg.Logger, mux: http.NewServeMux()}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	table := routes()
	if cfg.Metrics != nil {
		table = append(table, metricsRoute(cfg.Metrics))
	}
	s.openapi = describe(table)
	methods := map[string][]string{}
	for _, r := range table {
		s.mux.Handle(r.method+" "+r.pattern, s.handle(r))
		methods[r.pattern] = append(methods[r.pattern], r.method)
	}
	for pattern, allowed := range methods {
		s.mux.Handle(pattern, s.wrongMethod(strings.Join(allowed, ", ")))
	}
	s.mux.HandleFunc("/", s.noRoute)
	return s
}

// HTTPServer returns the server for a listener, with its limits set.
func (s *Server) HTTPServer() *http.Server {
	return &http.Server{
		Handler:           s,
		ReadHeaderTimeout: HeaderTimeout,
		ReadTimeout:       ReadTimeout,
		WriteTimeout:      RequestTimeout + ReadTimeout,
		IdleTimeout:       IdleTimeout,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, new(peer))
		},
	}
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodConnect || r.URL.Path != path.Clean(r.URL.Path) {
		s.noRoute(w, r) // the mux would redirect, in HTML
		return
	}
	s.mux.ServeHTTP(w, r)
}

type connKey struct{}

// peer remembers the identity of a connection between two verifications of its
// certificate.
type peer struct{ last atomic.Pointer[verified] }

type verified struct {
	id    kms.Identity
	until time.Time
}

// reverify is how long a verification counts on an open connection: a
// certificate can expire, and a site's CAs can change, while it is open.
const reverify = time.Minute

func (s *Server) identify(r *http.Request) (kms.Identity, error) {
	if r.TLS == nil {
		return kms.Identity{}, kms.Errorf(kms.Unauthenticated, "mutual TLS is required")
	}
	p, ok := r.Context().Value(connKey{}).(*peer)
	if !ok {
		return s.engine.Authenticate(r.TLS.PeerCertificates)
	}
	now := time.Now()
	if v := p.last.Load(); v != nil && now.Before(v.until) {
		return v.id, nil
	}
	id, err := s.engine.Authenticate(r.TLS.PeerCertificates)
	if err == nil {
		p.last.Store(&verified{id, now.Add(reverify)})
	}
	return id, err
}

// Header values that every answer shares.
var (
	jsonType = []string{"application/json"}
	noStore  = []string{"no-store"}
)

// call is one request with what its handler needs. It carries the request's
// context, as http.Request carries its own.
type call struct {
	*http.Request
	ctx    context.Context
	engine *engine.Engine
	server *Server
	caller engine.Caller
	body   []byte
}

// Context returns the request's context; that of a write ends at RequestTimeout.
func (c *call) Context() context.Context { return c.ctx }

// handle is the path of every request: identify, bound, act, answer.
func (s *Server) handle(rt route) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id := begin(w, r)
		answer, err := s.act(rt, r, id, w)
		if err != nil {
			s.refuse(w, err, id)
			return
		}
		if h, ok := answer.(http.Handler); ok {
			h.ServeHTTP(w, r)
			return
		}
		status := http.StatusOK
		if st, ok := answer.(interface{ httpStatus() int }); ok {
			status = st.httpStatus()
		}
		s.write(w, status, answer)
	})
}

func (s *Server) act(rt route, r *http.Request, id string, w http.ResponseWriter) (any, error) {
	identity, err := s.identify(r)
	if err != nil {
		return nil, err
	}
	ctx := r.Context()
	if !rt.batch { // what a data operation may wait for, the device and the disk, has its own limits
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, RequestTimeout)
		defer cancel()
	}
	local, err := localView(r)
	if err != nil {
		return nil, err
	}
	c := &call{Request: r, ctx: ctx, engine: s.engine, server: s, caller: engine.Caller{Identity: identity, RequestID: id, IdempotencyKey: r.Header.Get("Idempotency-Key"), Local: local}}
	if rt.request != nil {
		if err := checkContentType(r); err != nil {
			return nil, err
		}
		if c.body, err = readBody(w, r); err != nil {
			return nil, err
		}
	}
	return rt.serve(c)
}

// localView reports whether the caller is content with what the node itself knows.
func localView(r *http.Request) (bool, error) {
	switch v := r.Header.Get(engine.LocalHeader); v {
	case "":
		return false, nil
	case "local":
		return true, nil
	default:
		return false, kms.Errorf(kms.Invalid, "the header %s is %.40q; it is \"local\" or left out", engine.LocalHeader, v)
	}
}

// checkContentType insists on JSON: a browser that holds a client certificate
// sends other types across origins without asking the server first.
func checkContentType(r *http.Request) error {
	t := r.Header.Get("Content-Type")
	if t == "application/json" {
		return nil
	}
	if m, _, err := mime.ParseMediaType(t); err == nil && m == "application/json" {
		return nil
	}
	return &statusError{http.StatusUnsupportedMediaType, &kms.Error{Kind: kms.Invalid,
		Msg: "the request body is not declared as JSON", Fix: "send Content-Type: application/json"}}
}

// statusError is an invalid request for which HTTP has a status of its own.
type statusError struct {
	status int
	err    *kms.Error
}

func (e *statusError) Error() string { return e.err.Error() }
func (e *statusError) Unwrap() error { return e.err }

func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	var body []byte
	var err error
	if n := r.ContentLength; n >= 0 && n <= wire.MaxBody {
		body = make([]byte, n)
		_, err = io.ReadFull(r.Body, body)
	} else {
		body, err = io.ReadAll(http.MaxBytesReader(w, r.Body, wire.MaxBody))
	}
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return nil, kms.Errorf(kms.TooLarge, "the request body exceeds %d bytes", tooLarge.Limit)
	case err != nil:
		return nil, kms.Wrap(kms.Invalid, err, "the request body cannot be read", "")
	}
	return body, nil
}

func (s *Server) refuse(w http.ResponseWriter, err error, id string) {
	p := wire.NewProblem(err, id)
	var own *statusError
	if errors.As(err, &own) {
		p.Status, p.Title = own.status, strings.ToLower(http.StatusText(own.status))
	}
	w.Header().Set("Content-Type", wire.ProblemType)
	if p.Status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	b, merr := encode(p)
	if merr != nil {
		b = []byte("{}") // a Problem is strings and an int: cannot happen
	}
	w.WriteHeader(p.Status)
	_, _ = w.Write(b) // the client has gone
}

func (s *Server) write(w http.ResponseWriter, status int, answer any) {
	b, ok := answer.(json.RawMessage)
	if !ok {
		var err error
		if b, err = encode(answer); err != nil {
			s.log.Error("answer cannot be encoded", "error", err)
			s.refuse(w, err, w.Header().Get("X-Request-Id"))
			return
		}
	}
	w.Header()["Content-Type"] = jsonType
	w.WriteHeader(status)
	_, _ = w.Write(b) // the client has gone
}

func (s *Server) noRoute(w http.ResponseWriter, r *http.Request) {
	s.refuse(w, &kms.Error{Kind: kms.NotFound, Msg: "there is no " + r.Method + " " + r.URL.Path, Fix: "see GET /v1/openapi.json"}, begin(w, r))
}

// wrongMethod answers for a path that is served with other methods.
func (s *Server) wrongMethod(allowed string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Allow", allowed)
		s.refuse(w, &statusError{http.StatusMethodNotAllowed, &kms.Error{Kind: kms.Invalid,
			Msg: r.URL.Path + " does not take " + r.Method, Fix: "use " + allowed}}, begin(w, r))
	})
}

// begin sets what every answer carries and returns the request's identifier.
func begin(w http.ResponseWriter, r *http.Request) string {
	id := requestID(r)
	w.Header().Set("X-Request-Id", id)
	w.Header()["Cache-Control"] = noStore
	return id
}

// requestID takes over the client's X-Request-Id where it is short and plain,
// and draws one otherwise.
func requestID(r *http.Request) string {
	id := r.Header.Get("X-Request-Id")
	ok := id != "" && len(id) <= engine.MaxRequestID
	for _, c := range []byte(id) {
		ok = ok && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_')
	}
	if ok {
		return id
	}
	b := make([]byte, 12)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return hex.EncodeToString(b)
}
