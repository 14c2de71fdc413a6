package native

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// document parses the API's OpenAPI document.
func document(t testing.TB) object {
	t.Helper()
	var doc object
	s := New(Config{Metrics: http.NotFoundHandler()})
	if err := json.Unmarshal(s.openapi, &doc); err != nil {
		t.Fatal(err)
	}
	return doc
}

// at walks a document along keys.
func at(t testing.TB, v any, path ...string) any {
	t.Helper()
	for i, k := range path {
		m, ok := v.(object)
		if !ok || m[k] == nil {
			t.Fatalf("the document has no %s", strings.Join(path[:i+1], " > "))
		}
		v = m[k]
	}
	return v
}

// operations calls f for every operation of the document.
func operations(t testing.TB, doc object, f func(method, path string, op object)) {
	for path, item := range at(t, doc, "paths").(object) {
		for method, op := range item.(object) {
			f(strings.ToUpper(method), path, op.(object))
		}
	}
}

func TestDocumentAndRoutesAgree(t *testing.T) {
	table := append(routes(), metricsRoute(nil))
	doc := document(t)
	served := map[string]route{}
	for _, r := range table {
		served[r.method+" "+r.pattern] = r
	}
	if len(served) != len(table) || len(table) < 30 {
		t.Errorf("%d routes, %d of them different", len(table), len(served))
	}
	operations(t, doc, func(method, path string, op object) {
		r, ok := served[method+" "+path]
		if !ok {
			t.Errorf("%s %s is documented and not served", method, path)
			return
		}
		delete(served, method+" "+path)
		if op["operationId"] != r.id || op["summary"] != r.summary {
			t.Errorf("%s %s: %v, %v", method, path, op["operationId"], op["summary"])
		}
		if _, has := op["requestBody"]; has != (r.request != nil) {
			t.Errorf("%s %s: request body documented: %v", method, path, has)
		}
	})
	for r := range served {
		t.Errorf("%s is served and not documented", r)
	}
}

// TestDocumentIsOpenAPI holds the document against the parts of OpenAPI 3.1.0
// that it uses (sections 4.8.1 to 4.8.24).
func TestDocumentIsOpenAPI(t *testing.T) {
	doc := document(t)
	if v := at(t, doc, "openapi"); v != "3.1.0" {
		t.Errorf("openapi %v", v)
	}
	at(t, doc, "info", "title")
	at(t, doc, "info", "version")
	onlyKeys(t, "document", doc, "openapi", "info", "paths", "components", "security")
	schemes := at(t, doc, "components", "securitySchemes").(object)
	if typ := at(t, schemes, "mutualTLS", "type"); typ != "mutualTLS" {
		t.Errorf("security scheme of type %v", typ)
	}
	for _, alternative := range at(t, doc, "security").([]any) {
		for name := range alternative.(object) {
			at(t, schemes, name)
		}
	}
	component := regexp.MustCompile(`^[a-zA-Z0-9._-]+$`)
	for name, schema := range at(t, doc, "components", "schemas").(object) {
		if !component.MatchString(name) {
			t.Errorf("component %q has no allowed name", name)
		}
		checkSchema(t, doc, name, schema)
	}
	ids := map[any]string{}
	operations(t, doc, func(method, path string, op object) {
		where := method + " " + path
		if other, twice := ids[op["operationId"]]; twice || op["operationId"] == nil {
			t.Errorf("%s: operationId %v also of %q", where, op["operationId"], other)
		}
		ids[op["operationId"]] = where
		checkOperation(t, doc, where, path, op)
	})
}

func checkOperation(t *testing.T, doc object, where, path string, op object) {
	t.Helper()
	onlyKeys(t, where, op, "operationId", "summary", "parameters", "requestBody", "responses")
	templated := map[string]bool{}
	for _, m := range pathParameter.FindAllStringSubmatch(path, -1) {
		templated[m[1]] = true
	}
	if strings.Count(path, "{") != len(templated) {
		t.Errorf("%s: a template parameter is repeated or malformed", where)
	}
	parameters, _ := op["parameters"].([]any)
	seen := map[string]bool{}
	for _, p := range parameters {
		p := p.(object)
		name, in := p["name"].(string), p["in"].(string)
		if seen[in+name] || !slices.Contains([]string{"path", "query", "header"}, in) {
			t.Errorf("%s: parameter %s in %s", where, name, in)
		}
		seen[in+name] = true
		if in == "path" {
			if p["required"] != true || !templated[name] {
				t.Errorf("%s: path parameter %s is not required or not in the path", where, name)
			}
			delete(templated, name)
		}
		checkSchema(t, doc, where+" "+name, p["schema"])
	}
	for name := range templated {
		t.Errorf("%s: {%s} is not a parameter", where, name)
	}
	if body, ok := op["requestBody"].(object); ok {
		checkContent(t, doc, where, body)
	}
	responses := at(t, op, "responses").(object)
	for code, r := range responses {
		if code != "default" && !regexp.MustCompile(`^[1-5]\d\d$`).MatchString(code) {
			t.Errorf("%s: response %q", where, code)
		}
		at(t, r, "description")
		checkContent(t, doc, where+" "+code, r.(object))
	}
	at(t, responses, "200")
	at(t, responses, "default", "content", "application/problem+json")
}

func checkContent(t *testing.T, doc object, where string, v object) {
	t.Helper()
	content := at(t, v, "content").(object)
	if len(content) == 0 {
		t.Errorf("%s: no media type", where)
	}
	for mediaType, m := range content {
		checkSchema(t, doc, where+" "+mediaType, at(t, m, "schema"))
	}
}

// checkSchema checks a schema: known keywords, known types, resolvable
// references, required properties that exist.
func checkSchema(t *testing.T, doc object, where string, v any) {
	t.Helper()
	s, ok := v.(object)
	if !ok {
		t.Errorf("%s: the schema is %T", where, v)
		return
	}
	if ref, ok := s["$ref"].(string); ok {
		if len(s) != 1 {
			t.Errorf("%s: a reference with siblings", where)
		}
		resolve(t, doc, ref)
		return
	}
	onlyKeys(t, where, s, "type", "format", "contentEncoding", "properties", "additionalProperties", "required",
		"items", "minItems", "maxItems", "maxLength", "oneOf")
	if typ, has := s["type"]; has && !slices.Contains([]any{"string", "integer", "boolean", "object", "array"}, typ) {
		t.Errorf("%s: type %v", where, typ)
	}
	properties, _ := s["properties"].(object)
	for name, p := range properties {
		if name == "" {
			t.Errorf("%s: a property without a name", where)
		}
		checkSchema(t, doc, where+"."+name, p)
	}
	required, _ := s["required"].([]any)
	for _, name := range required {
		if _, ok := properties[name.(string)]; !ok {
			t.Errorf("%s: %v is required and no property", where, name)
		}
	}
	if s["type"] == "array" {
		checkSchema(t, doc, where+"[]", s["items"])
	}
	if more, ok := s["additionalProperties"].(object); ok {
		checkSchema(t, doc, where+".*", more)
	}
	alternatives, _ := s["oneOf"].([]any)
	for i, a := range alternatives {
		checkSchema(t, doc, fmt.Sprintf("%s|%d", where, i), a)
	}
}

func resolve(t testing.TB, doc object, ref string) any {
	t.Helper()
	path, ok := strings.CutPrefix(ref, "#/")
	if !ok {
		t.Fatalf("reference %q is not local", ref)
	}
	return at(t, doc, strings.Split(path, "/")...)
}

func onlyKeys(t *testing.T, where string, m object, allowed ...string) {
	t.Helper()
	for k := range m {
		if !slices.Contains(allowed, k) {
			t.Errorf("%s: %q is not a field of it", where, k)
		}
	}
}

// conforms reports what is wrong with a JSON value under a schema, "" if nothing.
func conforms(t testing.TB, doc object, schema, v any) string {
	s := schema.(object)
	if ref, ok := s["$ref"].(string); ok {
		return conforms(t, doc, resolve(t, doc, ref), v)
	}
	if alternatives, ok := s["oneOf"].([]any); ok {
		var why []string
		for _, a := range alternatives {
			if w := conforms(t, doc, a, v); w != "" {
				why = append(why, w)
			}
		}
		if len(why) == len(alternatives)-1 {
			return ""
		}
		return fmt.Sprintf("%d of %d alternatives: %v", len(alternatives)-len(why), len(alternatives), why)
	}
	switch s["type"] {
	case "object":
		return conformsObject(t, doc, s, v)
	case "array":
		l, ok := v.([]any)
		if !ok {
			return fmt.Sprintf("%v is no array", v)
		}
		for i, x := range l {
			if w := conforms(t, doc, s["items"], x); w != "" {
				return fmt.Sprintf("[%d]: %s", i, w)
			}
		}
	case "string":
		return conformsString(s, v)
	case "integer":
		if f, ok := v.(float64); !ok || f != float64(int64(f)) {
			return fmt.Sprintf("%v is no integer", v)
		}
	case "boolean":
		if _, ok := v.(bool); !ok {
			return fmt.Sprintf("%v is no boolean", v)
		}
	}
	return ""
}

func conformsObject(t testing.TB, doc object, s object, v any) string {
	m, ok := v.(object)
	if !ok {
		return fmt.Sprintf("%v is no object", v)
	}
	properties, known := s["properties"].(object)
	required, _ := s["required"].([]any)
	for _, name := range required {
		if _, ok := m[name.(string)]; !ok {
			return fmt.Sprintf("%s is missing", name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(m)) {
		p, ok := properties[name]
		if more, isSchema := s["additionalProperties"].(object); !ok && isSchema {
			p, ok = more, true
		}
		if !ok && known {
			return fmt.Sprintf("%s is not documented", name)
		}
		if !ok {
			continue
		}
		if w := conforms(t, doc, p, m[name]); w != "" {
			return name + ": " + w
		}
	}
	return ""
}

func conformsString(s object, v any) string {
	text, ok := v.(string)
	if !ok {
		return fmt.Sprintf("%v is no string", v)
	}
	if s["contentEncoding"] == "base64" {
		if _, err := base64.StdEncoding.DecodeString(text); err != nil {
			return fmt.Sprintf("%q: %v", text, err)
		}
	}
	if s["format"] == "date-time" {
		if at, err := time.Parse(time.RFC3339, text); err != nil || at.Location() != time.UTC {
			return fmt.Sprintf("%q is no instant in UTC", text)
		}
	}
	return ""
}

// TestConforms holds that the checks above can fail.
func TestConforms(t *testing.T) {
	doc := document(t)
	schema := object{"$ref": "#/components/schemas/EncryptResponse"}
	for body, ok := range map[string]bool{
		`{"ciphertext":"AAAA","key_version":1}`:            true,
		`{"ciphertext":null,"key_version":1}`:              false,
		`{"ciphertext":"A","key_version":1}`:               false,
		`{"ciphertext":"AAAA"}`:                            false,
		`{"ciphertext":"AAAA","key_version":1.5}`:          false,
		`{"ciphertext":"AAAA","key_version":"1"}`:          false,
		`{"ciphertext":"AAAA","key_version":1,"other":""}`: false,
		`[]`: false,
	} {
		var v any
		if err := json.Unmarshal([]byte(body), &v); err != nil {
			t.Fatal(err)
		}
		if why := conforms(t, doc, schema, v); (why == "") != ok {
			t.Errorf("%s: %q", body, why)
		}
	}
}
