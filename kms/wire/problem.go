package wire

import (
	"encoding/json"
	"errors"
	"net/http"
	"strings"

	"github.com/conclave-kms/conclave/kms"
)

// ProblemPrefix begins the type of every problem; the kind's name follows.
const ProblemPrefix = "urn:conclave:problem:"

// ProblemType is the media type of a problem (RFC 9457, section 3).
const ProblemType = "application/problem+json"

// Problem is an error on the wire: problem details (RFC 9457) and the next step.
type Problem struct {
	Type     string `json:"type"`               // ProblemPrefix and the name of a kms.Kind
	Title    string `json:"title"`              // the kind in a few words, the same for every occurrence
	Status   int    `json:"status"`             // HTTP status
	Detail   string `json:"detail,omitempty"`   // what happened, for the person who reads it
	Fix      string `json:"fix,omitempty"`      // what to do next
	Instance string `json:"instance,omitempty"` // identifier of the request, as in the access log
}

type problemForm struct {
	status int
	title  string
}

// problemForms is the one mapping from kinds to HTTP.
var problemForms = map[kms.Kind]problemForm{
	kms.Internal:        {http.StatusInternalServerError, "internal error"},
	kms.Invalid:         {http.StatusBadRequest, "invalid request"},
	kms.Unauthenticated: {http.StatusUnauthorized, "not authenticated"},
	kms.Denied:          {http.StatusForbidden, "not permitted"},
	kms.NotFound:        {http.StatusNotFound, "not found"},
	kms.Exists:          {http.StatusConflict, "exists already"},
	kms.Conflict:        {http.StatusConflict, "conflict with the present state"},
	kms.NeedsApproval:   {http.StatusForbidden, "a quorum must approve first"},
	kms.Expired:         {http.StatusGone, "expired"},
	kms.Replayed:        {http.StatusConflict, "seen before"},
	kms.BadSignature:    {http.StatusBadRequest, "signature does not verify"},
	kms.OpenFailed:      {http.StatusUnprocessableEntity, "cannot be opened"},
	kms.Unavailable:     {http.StatusServiceUnavailable, "unavailable"},
	kms.Stale:           {http.StatusServiceUnavailable, "this node is cut off"},
	kms.NotResident:     {http.StatusMisdirectedRequest, "not resident at this node"},
	kms.Unknown:         {http.StatusServiceUnavailable, "outcome unknown"},
	kms.TooLarge:        {http.StatusRequestEntityTooLarge, "too large"},
	kms.ReadOnly:        {http.StatusServiceUnavailable, "read-only"},
}

// HTTPStatus returns the HTTP status of a kind, 500 for one it does not know.
func HTTPStatus(k kms.Kind) int {
	if f, ok := problemForms[k]; ok {
		return f.status
	}
	return http.StatusInternalServerError
}

// NewProblem describes err. Only the message and next step of a *kms.Error are
// shown; any other error becomes an internal error without detail. instance is
// the request's identifier.
func NewProblem(err error, instance string) Problem {
	var e *kms.Error
	if !errors.As(err, &e) || e.Kind == kms.Internal {
		p := newProblem(kms.KindOf(err), instance)
		if p.Status == http.StatusInternalServerError {
			p.Fix = "report the request id to the site's operator; the node's log says more"
		}
		return p
	}
	p := newProblem(e.Kind, instance)
	p.Detail, p.Fix = e.Msg, e.Fix
	return p
}

func newProblem(k kms.Kind, instance string) Problem {
	f, ok := problemForms[k]
	if !ok {
		k, f = kms.Internal, problemForms[kms.Internal]
	}
	return Problem{Type: ProblemPrefix + k.String(), Title: f.title, Status: f.status, Instance: instance}
}

// Kind returns the kind that the problem's type names; without one it returns
// kms.Internal.
func (p Problem) Kind() kms.Kind {
	name, ok := strings.CutPrefix(p.Type, ProblemPrefix)
	if !ok {
		return kms.Internal
	}
	for k := range problemForms {
		if k.String() == name {
			return k
		}
	}
	return kms.Internal
}

// Err returns the problem as a *kms.Error, so that errors.Is works on both sides.
func (p Problem) Err() error {
	msg := p.Detail
	if msg == "" {
		msg = p.Title
	}
	return &kms.Error{Kind: p.Kind(), Msg: msg, Fix: p.Fix}
}

// Evidence is the evidence file of a proposal as raw JSON (kms/audit describes
// and verifies it).
type Evidence = json.RawMessage
