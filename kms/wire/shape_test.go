package wire

import (
	"encoding/json"
	"errors"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
)

// messages are the bodies of the API; what they hold is found from them.
var messages = []any{
	Health{}, Ready{}, Status{}, Nodes{}, Sites{}, Custodians{}, Policies{}, Keyrings{}, CreateKeyringRequest{}, Keys{}, CreateKeyRequest{}, ImportKeyRequest{},
	Recoveries{}, Checkpoints{}, RecoveryKeys{}, RestoreRequest{}, RestoreResponse{}, Proposals{}, OpenProposalRequest{}, VoteRequest{}, SuspendRequest{}, Problem{},
	EncryptRequest{}, EncryptResponse{}, DecryptRequest{}, DecryptResponse{}, RewrapRequest{}, DataKeyRequest{}, DataKeyResponse{},
	WrappedDataKeyResponse{}, MACRequest{}, MACResponse{}, VerifyMACRequest{}, VerifyResponse{}, SignRequest{}, SignResponse{}, VerifyRequest{},
	PublicKeyResponse{}, ExportRequest{}, ExportResponse{}, Batch[MACRequest]{}, BatchResult[MACResponse]{},
}

// TestFieldNames holds the conventions of the package comment for every field:
// a name in lower case, instants that vanish when they do not apply, durations
// whose unit is in the name.
func TestFieldNames(t *testing.T) {
	name := regexp.MustCompile(`^[a-z]+(_[a-z]+)*$`)
	seen := map[reflect.Type]bool{}
	var visit func(t reflect.Type)
	visit = func(typ reflect.Type) {
		for typ.Kind() == reflect.Slice || typ.Kind() == reflect.Pointer {
			typ = typ.Elem()
		}
		if typ.Kind() != reflect.Struct || seen[typ] || typ == reflect.TypeFor[time.Time]() {
			return
		}
		seen[typ] = true
		names := map[string]bool{}
		for i := range typ.NumField() {
			f := typ.Field(i)
			tag, options, _ := strings.Cut(f.Tag.Get("json"), ",")
			where := typ.Name() + "." + f.Name
			if !name.MatchString(tag) || names[tag] {
				t.Errorf("%s is called %q", where, tag)
			}
			names[tag] = true
			if f.Type == reflect.TypeFor[time.Duration]() {
				t.Errorf("%s is a Go duration; give milliseconds", where)
			}
			if strings.HasSuffix(f.Name, "MS") != strings.HasSuffix(tag, "_ms") {
				t.Errorf("%s is called %q", where, tag)
			}
			if f.Type == reflect.TypeFor[time.Time]() && strings.Contains(options, "omitempty") {
				t.Errorf("%s: omitempty never omits an instant; use omitzero", where)
			}
			if sensitive := regexp.MustCompile(`^(Plaintext|Message)$`).MatchString(f.Name); sensitive != (f.Type == reflect.TypeFor[Secret]()) {
				t.Errorf("%s is a %v", where, f.Type)
			}
			visit(f.Type)
		}
	}
	for _, m := range messages {
		visit(reflect.TypeOf(m))
	}
	if len(seen) < 40 {
		t.Errorf("only %d structs were seen", len(seen))
	}
}

// TestKnownAnswers holds bodies word for word: they are what other programs see.
func TestKnownAnswers(t *testing.T) {
	at := time.UnixMilli(1767225600123).UTC()
	const nextRoot = `{"node":{"root":{"suite":81,"agreement":"AQ==","signing_suite":2,"signing":"Ag==","device":"d"},"possession":"Aw=="}}`
	next := NextRoot{Root: NodeRoot{Suite: 81, Agreement: []byte{1}, SigningSuite: 2, Signing: []byte{2}, Device: "d"}, Possession: []byte{3}}
	for want, v := range map[string]any{
		`{"plaintext":"aGk="}`:                                                                             EncryptRequest{Plaintext: Secret("hi")},
		`{"plaintext":"aGk=","context":{"a":"b"}}`:                                                         EncryptRequest{Plaintext: Secret("hi"), Context: Context{"a": "b"}},
		`{"items":[{"message":"aGk="}]}`:                                                                   Batch[MACRequest]{Items: []MACRequest{{Secret("hi")}}},
		`{"items":[{"result":{"mac":"AA==","key_version":1}}]}`:                                            BatchResult[MACResponse]{Items: []Item[MACResponse]{{Result: &MACResponse{[]byte{0}, 1}}}},
		`{"action":"rotate","target":"key/a/b","reason":"due"}`:                                            OpenProposalRequest{Action: "rotate", Target: "key/a/b", Reason: "due"},
		`{"name":"k","purpose":"mac"}`:                                                                     CreateKeyRequest{Name: "k", Purpose: "mac"},
		`{"version":1,"state":"active","kek":1,"created":"2026-01-01T00:00:00.123Z"}`:                      KeyVersion{Version: 1, State: "active", KEK: 1, Created: at},
		`{"version":2,"state":"active","kek":0,"generated":"device","created":"2026-01-01T00:00:00.123Z"}`: KeyVersion{Version: 2, State: "active", Generated: "device", Created: at},
		`{"action":"node","target":"node/a","parameters":` + nextRoot + `,"reason":"due"}`:                 OpenProposalRequest{Action: "node", Target: "node/a", Reason: "due", Parameters: ProposalParameters{Node: &next}},
		`{"action":"policy","target":"policy/a","parameters":{"attested":false},"reason":"x"}`:             OpenProposalRequest{Action: "policy", Target: "policy/a", Reason: "x", Parameters: ProposalParameters{Attested: new(bool)}},
		`{"root":2,"device":"d","proposal":"p","sealed":3,"missing":1}`:                                    Replacing{Root: 2, Device: "d", Proposal: "p", Sealed: 3, Missing: 1},
		`{"ready":true}`: Ready{Ready: true},
	} {
		b, err := json.Marshal(v)
		if err != nil || string(b) != want {
			t.Errorf("%s, %v; want %s", b, err, want)
		}
	}
}

// FuzzProblem holds that whatever a server sends as a problem becomes an error
// of a kind that exists.
func FuzzProblem(f *testing.F) {
	for _, s := range []string{`{}`, `{"type":"urn:conclave:problem:not-found","title":"x"}`, `{"type":"urn:conclave:problem:kind-0"}`, `{"type":"urn:conclave:problem:"}`, `{"type":1}`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var p Problem
		if json.Unmarshal([]byte(s), &p) != nil {
			return
		}
		var e *kms.Error
		if err := p.Err(); !errors.As(err, &e) || strings.HasPrefix(e.Kind.String(), "kind-") || kms.KindOf(err) != p.Kind() {
			t.Errorf("%q: %v", s, p.Kind())
		}
		if again := NewProblem(p.Err(), p.Instance); again.Kind() != p.Kind() {
			t.Errorf("%q: %v became %v", s, p.Kind(), again.Kind())
		}
	})
}
