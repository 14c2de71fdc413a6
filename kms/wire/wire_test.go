package wire

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
)

func TestEveryKindHasAForm(t *testing.T) {
	for k := kms.Internal; !strings.HasPrefix(k.String(), "kind-"); k++ {
		p := NewProblem(kms.Errorf(k, "what"), "r1")
		if p.Kind() != k || p.Status < 400 || p.Title == "" || p.Instance != "r1" {
			t.Errorf("%v: %+v", k, p)
		}
		if !errors.Is(p.Err(), k) {
			t.Errorf("%v: the error does not come back: %v", k, p.Err())
		}
	}
}

func TestProblemHidesWhatIsInternal(t *testing.T) {
	for _, err := range []error{
		io.ErrUnexpectedEOF,
		fmt.Errorf("outer: %w", io.EOF),
		kms.Wrap(kms.Internal, io.EOF, "secret detail", ""),
	} {
		p := NewProblem(err, "")
		if p.Detail != "" || p.Status != 500 || p.Kind() != kms.Internal {
			t.Errorf("%v became %+v", err, p)
		}
	}
	p := NewProblem(fmt.Errorf("outer: %w", kms.Wrap(kms.Stale, io.EOF, "cut off", "wait")), "")
	if p.Detail != "cut off" || p.Fix != "wait" || p.Kind() != kms.Stale {
		t.Errorf("%+v", p)
	}
	if k := (Problem{Type: "about:blank"}).Kind(); k != kms.Internal {
		t.Errorf("a foreign type is of kind %v", k)
	}
}

func TestSecretIsRedactedButTravels(t *testing.T) {
	r := DataKeyResponse{Plaintext: []byte("very secret")}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%q", "%d"} {
		for _, v := range []any{r, r.Plaintext, &r} {
			if s := fmt.Sprintf(verb, v); strings.Contains(s, "very") || strings.Contains(s, "766572") || strings.Contains(s, "118 101") {
				t.Errorf("%s prints %s", verb, s)
			}
		}
	}
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var back DataKeyResponse
	if err := json.Unmarshal(b, &back); err != nil || string(back.Plaintext) != "very secret" {
		t.Errorf("%v after %s", err, b)
	}
}

func TestBatchCheck(t *testing.T) {
	for n, want := range map[int]kms.Kind{0: kms.Invalid, 1: 0, MaxBatch: 0, MaxBatch + 1: kms.TooLarge} {
		if got := kms.KindOf(Batch[MACRequest]{Items: make([]MACRequest, n)}.Check()); got != want {
			t.Errorf("%d items: %v, want %v", n, got, want)
		}
	}
}

func TestExportAADIsInjective(t *testing.T) {
	a := ExportAAD("c", "k", 1, ExportDataKey, "spiffe://a/b/c")
	if string(a) != "c\x00k\x001\x00datakey\x00spiffe://a/b/c\x00" {
		t.Errorf("%q", a)
	}
	if string(a) == string(ExportAAD("c", "k", 1, ExportMaterial, "spiffe://a/b/c")) {
		t.Error("the kind is not bound")
	}
}
