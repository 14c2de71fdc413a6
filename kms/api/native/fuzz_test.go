package native

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"errors"
	"net/url"
	"reflect"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
)

// FuzzDecode holds that a body is read in one form at most, that what is read
// comes back the same, and that every refusal is the caller's fault.
func FuzzDecode(f *testing.F) {
	for _, s := range []string{
		`{"plaintext":"aGk=","context":{"a":"b"}}`, `{"items":[{"plaintext":""}]}`, ` {"items" : [] }`, `{"ITEMS":[{}]}`,
		`{"it\u0065ms":[]}`, `{}`, `null`, `{"plaintext":"aGk="}}`, `{"items":1}`, `{"plaintext":"aGk=","plaintext":"aGo="}`, "{\"a\xff\":1}", `[`,
	} {
		f.Add([]byte(s))
	}
	required := requiredBytes(reflect.TypeFor[wire.EncryptRequest]())
	f.Fuzz(func(t *testing.T, body []byte) {
		one, errOne := decode[wire.EncryptRequest](body)
		many, errMany := decode[wire.Batch[wire.EncryptRequest]](body)
		for _, err := range []error{errOne, errMany} {
			if err != nil && !errors.Is(err, kms.Invalid) {
				t.Fatalf("%q: %v", body, err)
			}
		}
		if errOne == nil && errMany == nil && (one.Plaintext != nil || one.Context != nil || many.Items != nil) {
			t.Fatalf("%q is an item and a batch", body)
		}
		if isBatch(body) && errOne == nil {
			t.Fatalf("%q is a batch and was read as an item", body)
		}
		if errOne != nil || checkRequired(one, required) != nil {
			return
		}
		b, err := json.Marshal(one)
		if err != nil {
			t.Fatal(err)
		}
		again, err := decode[wire.EncryptRequest](b)
		if err != nil || !bytes.Equal(again.Plaintext, one.Plaintext) || len(again.Context) != len(one.Context) {
			t.Fatalf("%q came back as %q: %v", body, b, err)
		}
	})
}

// FuzzAuthenticate holds that no URI SAN alone, without a signature of a CA,
// makes an identity.
func FuzzAuthenticate(f *testing.F) {
	for _, s := range []string{
		"spiffe://fr.example/service/test", "spiffe://fr.example/node/node-fr-1", "spiffe://FR.example/service/x", "spiffe://fr.example:1/a/b",
		"spiffe://fr.example/service/../operator/x", "spiffe://fr.example/service/%2e%2e", "spiffe:///a/b", "", "spiffe://u@fr.example/service/x?q#f",
	} {
		f.Add(s)
	}
	w := newWorld(f, options{})
	f.Fuzz(func(t *testing.T, s string) {
		u, err := url.Parse(s)
		if err != nil {
			return
		}
		id, err := w.engine.Authenticate([]*x509.Certificate{{URIs: []*url.URL{u}}})
		if !errors.Is(err, kms.Unauthenticated) || id != (kms.Identity{}) {
			t.Fatalf("%q: %v, %v", s, id, err)
		}
	})
}
