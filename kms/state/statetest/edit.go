package statetest

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"

	"github.com/fxamacker/cbor/v2"

	"github.com/conclave-kms/conclave/kms/state"
)

// Editor makes random changes to what is encoded, field by field.
type Editor struct{ R *rand.Rand }

// Pick returns one of a list, which must not be empty.
func Pick[T any](r *rand.Rand, l []T) T { return l[r.IntN(len(l))] }

var loose = func() cbor.DecMode {
	m, err := cbor.DecOptions{DefaultMapType: reflect.TypeFor[map[string]any]()}.DecMode()
	if err != nil {
		panic(err) // constant options
	}
	return m
}()

// Loose decodes a canonical encoding without knowing what it is: into maps with text
// keys, lists, texts, bytes, numbers and truth values.
func Loose(b []byte) (v any, err error) {
	err = loose.Unmarshal(b, &v)
	return v, err
}

// names that a text may be changed into.
var names = []string{
	"", "x", "de", "fr", "jp", "fr-1", "de-2", "node-de-1", "node-fr-1", "node-jp-1", "standard", "governance", "coalition", "europe", "vault",
	"host", "software", "hardware", "reject", "approve",
}

// Change returns another value of the same kind, changed in one place; maps are
// changed in place.
func (ed Editor) Change(v any) any {
	switch v := v.(type) {
	case string:
		if ed.R.IntN(2) == 0 || v == "" {
			return Pick(ed.R, names)
		}
		b := []byte(v)
		b[ed.R.IntN(len(b))] = "abc019-/"[ed.R.IntN(8)]
		return string(b)
	case []byte:
		return ed.Bytes(v)
	case uint64:
		return Pick(ed.R, []any{v + 1, v - min(v, 1), uint64(0), v / 2, v + 3_600_000, v - min(v, 3*uint64(state.Window))})
	case int64:
		return Pick(ed.R, []any{v + 1, -v})
	case bool:
		return !v
	case []any:
		return ed.list(v)
	case map[string]any:
		if len(v) == 0 {
			return map[string]any{"x": true}
		}
		keys := make([]string, 0, len(v))
		for k := range v {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		k := Pick(ed.R, keys)
		v[k] = ed.Change(v[k])
		return v
	}
	panic(fmt.Sprintf("statetest: %T in an encoding", v)) // impossible: canon has no others
}

// Bytes returns other bytes.
func (ed Editor) Bytes(b []byte) []byte {
	if len(b) == 0 {
		return []byte{1}
	}
	switch ed.R.IntN(6) {
	case 0:
		return nil
	case 1:
		return b[:len(b)-1]
	case 2:
		return append(slices.Clone(b), 0)
	}
	b = slices.Clone(b)
	b[ed.R.IntN(len(b))] ^= 1 << ed.R.IntN(8)
	return b
}

func (ed Editor) list(l []any) any {
	if len(l) == 0 {
		return []any{"x"}
	}
	i := ed.R.IntN(len(l))
	l = slices.Clone(l)
	switch ed.R.IntN(4) {
	case 0:
		return slices.Delete(l, i, i+1)
	case 1:
		return slices.Insert(l, i, l[i])
	case 2:
		slices.Reverse(l)
		return l
	}
	l[i] = ed.Change(l[i])
	return l
}
