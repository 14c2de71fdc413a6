package native

import (
	"cmp"
	"encoding/json"
	"reflect"
	"regexp"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms/engine"
	"github.com/conclave-kms/conclave/kms/wire"
)

// object is a JSON object; encoding/json writes its fields in sorted order.
type object = map[string]any

// describe makes the OpenAPI 3.1 document of the routes.
func describe(table []route) []byte {
	d := &describer{schemas: object{}}
	paths := object{}
	for _, r := range table {
		item, ok := paths[r.pattern].(object)
		if !ok {
			item = object{}
			paths[r.pattern] = item
		}
		item[strings.ToLower(r.method)] = d.operation(r)
	}
	doc := object{
		"openapi": "3.1.0",
		"info": object{
			"title": "Conclave", "version": "1",
			"description": "Hardware-backed key management for coalitions. Byte strings are base64 (RFC 4648, section 4). Every request needs a client certificate with a SPIFFE ID. Writes take an Idempotency-Key header.",
		},
		"paths":      paths,
		"components": object{"schemas": d.schemas, "securitySchemes": object{"mutualTLS": object{"type": "mutualTLS"}}},
		"security":   []any{object{"mutualTLS": []any{}}},
	}
	b, err := json.MarshalIndent(doc, "", "  ")
	if err != nil {
		panic(err) // maps, strings and slices only
	}
	return b
}

type describer struct{ schemas object }

var pathParameter = regexp.MustCompile(`\{(\w+)\}`)

func (d *describer) operation(r route) object {
	op := object{
		"operationId": r.id, "summary": r.summary,
		"responses": object{
			"200":     object{"description": "done", "content": object{mediaType(r): object{"schema": d.answer(r)}}},
			"default": object{"description": "refused (RFC 9457)", "content": object{wire.ProblemType: object{"schema": d.schema(reflect.TypeFor[wire.Problem]())}}},
		},
	}
	var parameters []any
	for _, m := range pathParameter.FindAllStringSubmatch(r.pattern, -1) {
		parameters = append(parameters, object{"name": m[1], "in": "path", "required": true, "schema": object{"type": "string"}})
	}
	for _, q := range r.query {
		name, kind, _ := strings.Cut(q, ":")
		parameters = append(parameters, object{"name": name, "in": "query", "schema": object{"type": cmp.Or(kind, "integer")}})
	}
	if r.method == "GET" {
		parameters = append(parameters, object{"name": engine.LocalHeader, "in": "header", "schema": object{"type": "string"},
			"description": "local: answer from what this node knows, without asking the cluster whether it is still true"})
	}
	if r.request != nil && !r.batch {
		parameters = append(parameters, object{"name": "Idempotency-Key", "in": "header", "schema": object{"type": "string", "maxLength": 128}})
	}
	if parameters != nil {
		op["parameters"] = parameters
	}
	if r.request != nil {
		schema := any(d.schema(r.request))
		if r.batch {
			schema = object{"oneOf": []any{schema, object{"type": "object", "additionalProperties": false, "required": []string{"items"},
				"properties": object{"items": object{"type": "array", "minItems": 1, "maxItems": wire.MaxBatch, "items": d.schema(r.request)}}}}}
		}
		op["requestBody"] = object{"required": true, "content": object{"application/json": object{"schema": schema}}}
	}
	return op
}

func mediaType(r route) string {
	if r.response == reflect.TypeFor[stream]() {
		return "application/octet-stream"
	}
	if r.response == reflect.TypeFor[text]() {
		return "text/plain"
	}
	return "application/json"
}

// answer is the schema of a route's answer: of one item, or of a batch's result.
func (d *describer) answer(r route) any {
	one := d.schema(r.response)
	if !r.batch {
		return one
	}
	item := object{"type": "object", "properties": object{"result": one, "problem": d.schema(reflect.TypeFor[wire.Problem]())}}
	return object{"oneOf": []any{one, object{"type": "object", "required": []string{"items"}, "properties": object{"items": object{"type": "array", "items": item}}}}}
}

// schema describes a Go type; named structs go to the components.
func (d *describer) schema(t reflect.Type) object {
	switch {
	case t == reflect.TypeFor[time.Time]():
		return object{"type": "string", "format": "date-time"}
	case t == reflect.TypeFor[json.RawMessage]():
		return object{"type": "object"}
	}
	switch t.Kind() {
	case reflect.Pointer:
		return d.schema(t.Elem())
	case reflect.String:
		return object{"type": "string"}
	case reflect.Bool:
		return object{"type": "boolean"}
	case reflect.Int, reflect.Int64, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return object{"type": "integer"}
	case reflect.Map:
		return object{"type": "object", "additionalProperties": d.schema(t.Elem())}
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			return object{"type": "string", "contentEncoding": "base64"}
		}
		return object{"type": "array", "items": d.schema(t.Elem())}
	case reflect.Struct:
		return d.component(t)
	}
	panic("native: no schema for " + t.String()) // a new kind of field in package wire
}

func (d *describer) component(t reflect.Type) object {
	if t == reflect.TypeFor[ready]() {
		t = reflect.TypeFor[wire.Ready]()
	}
	ref := object{"$ref": "#/components/schemas/" + t.Name()}
	if _, ok := d.schemas[t.Name()]; ok {
		return ref
	}
	d.schemas[t.Name()] = nil // ends recursion
	properties, required := object{}, []string{}
	for f := range fields(t) {
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "-" || !f.IsExported() {
			continue
		}
		properties[name] = d.schema(f.Type)
		if !strings.Contains(options, "omit") {
			required = append(required, name)
		}
	}
	s := object{"type": "object", "properties": properties}
	if len(required) > 0 {
		s["required"] = required
	}
	d.schemas[t.Name()] = s
	return ref
}

func fields(t reflect.Type) func(func(reflect.StructField) bool) {
	return func(yield func(reflect.StructField) bool) {
		for i := range t.NumField() {
			if !yield(t.Field(i)) {
				return
			}
		}
	}
}
