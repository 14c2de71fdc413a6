package native

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	jsonv1 "github.com/go-json-experiment/json/v1"

	"github.com/conclave-kms/conclave/kms"
)

const decodeFix = "see GET /v1/openapi.json"

// strict refuses fields that an operation does not have. Names given twice, names
// in another case and text that is not UTF-8 are refused by default (RFC 7493).
var strict = json.RejectUnknownMembers(true)

// decode reads one JSON object.
func decode[Q any](body []byte) (*Q, error) {
	q := new(Q)
	if b := bytes.TrimLeft(body, " \t\r\n"); len(b) == 0 || b[0] != '{' {
		return nil, &kms.Error{Kind: kms.Invalid, Msg: "the request body is not a JSON object", Fix: decodeFix}
	}
	if err := json.Unmarshal(body, q, strict); err != nil {
		return nil, kms.Wrap(kms.Invalid, err, "the request body is not the JSON that this operation takes: "+jsonFault(err), decodeFix)
	}
	return q, nil
}

// plain writes answers as their tags mean it in encoding/json, maps in order; a
// list that is empty is [], never null.
var plain = json.JoinOptions(jsonv1.OmitEmptyWithLegacySemantics(true), json.Deterministic(true))

func encode(v any) ([]byte, error) { return json.Marshal(v, plain) }

// kinds of JSON values in words.
var kinds = map[jsontext.Kind]string{'n': "null", 'f': "boolean", 't': "boolean", '"': "string", '0': "number", '{': "object", '[': "array"}

// jsonFault says what is wrong with a body in JSON's words, without Go's types
// and without values.
func jsonFault(err error) string {
	var semantic *json.SemanticError
	var syntactic *jsontext.SyntacticError
	var encoding base64.CorruptInputError
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		return "it ends too early"
	case errors.As(err, &syntactic):
		switch {
		case errors.Is(err, jsontext.ErrDuplicateName):
			return "field " + field(syntactic.JSONPointer) + " is there twice"
		case strings.HasSuffix(syntactic.Err.Error(), "after top-level value"):
			return "it goes on after its JSON object"
		}
		return fmt.Sprintf("it is not JSON (at byte %d)", syntactic.ByteOffset)
	case errors.As(err, &encoding):
		return fmt.Sprintf("a byte string is not base64 (at its byte %d)", int64(encoding))
	case errors.As(err, &semantic) && errors.Is(err, json.ErrUnknownName):
		return "unknown field " + strconv.Quote(field(semantic.JSONPointer))
	case errors.As(err, &semantic) && kinds[semantic.JSONKind] != "":
		return field(semantic.JSONPointer) + " must not be a " + kinds[semantic.JSONKind]
	}
	return "a value cannot be read"
}

// field names a place in the body as a person would, "items.3.plaintext".
func field(p jsontext.Pointer) string {
	name := strings.Join(strings.FieldsFunc(string(p), func(r rune) bool { return r == '/' }), ".")
	if len(name) > 100 {
		name = name[:100]
	}
	return strings.ToValidUTF8(name, "?")
}
