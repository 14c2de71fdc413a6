package canon

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/fxamacker/cbor/v2"
	"pgregory.net/rapid"
)

// inner and sample have every shape that signed things use.
type inner struct {
	ID   string `cbor:"id"`
	Hash []byte `cbor:"hash"`
}

type sample struct {
	Name    string            `cbor:"name"`
	Number  uint64            `cbor:"number"`
	Signed  int64             `cbor:"signed"`
	Small   uint32            `cbor:"small"`
	Flag    bool              `cbor:"flag"`
	Bytes   []byte            `cbor:"bytes"`
	List    []inner           `cbor:"list"`
	Strings []string          `cbor:"strings"`
	Map     map[string]string `cbor:"map"`
	Inner   inner             `cbor:"inner"`
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestKnownAnswers are examples of RFC 8949, appendix A, in deterministic form.
func TestKnownAnswers(t *testing.T) {
	for _, v := range []struct {
		value any
		want  string
	}{
		{0, "00"}, {23, "17"}, {24, "1818"}, {100, "1864"}, {1000, "1903e8"}, {1000000, "1a000f4240"}, {1000000000000, "1b000000e8d4a51000"},
		{uint64(math.MaxUint64), "1bffffffffffffffff"}, {-1, "20"}, {-100, "3863"}, {-1000, "3903e7"},
		{false, "f4"}, {true, "f5"}, {"", "60"}, {"IETF", "6449455446"}, {"\u00fc", "62c3bc"}, {[]byte{1, 2, 3, 4}, "4401020304"},
		{[]int{}, "80"}, {[]int{1, 2, 3}, "83010203"}, {map[string]string{}, "a0"},
		{map[string]string{"a": "A", "b": "B", "c": "C", "d": "D", "e": "E"}, "a56161614161626142616361436164614461656145"},
		{map[string]any{"a": 1, "b": []int{2, 3}}, "a26161016162820203"},
	} {
		if got := hex.EncodeToString(Marshal(v.value)); got != v.want {
			t.Errorf("%v encodes to %s, want %s", v.value, got, v.want)
		}
	}
}

// TestKeyOrder: bytewise order of the encoded keys (RFC 8949, section 4.2.1),
// so that a shorter key comes first.
func TestKeyOrder(t *testing.T) {
	got := Marshal(map[string]int{"aa": 1, "b": 2, "a": 3, "B": 4})
	if want := unhex(t, "a4 6142 04 6161 03 6162 02 626161 01"); !bytes.Equal(got, want) {
		t.Errorf("%x", got)
	}
	type fields struct {
		Long  int `cbor:"long"`
		Short int `cbor:"s"`
	}
	if got := Marshal(fields{1, 2}); !bytes.Equal(got, unhex(t, "a2 6173 02 646c6f6e67 01")) {
		t.Errorf("%x", got)
	}
}

func TestNilIsEmpty(t *testing.T) {
	full := sample{Bytes: []byte{}, List: []inner{}, Strings: []string{}, Map: map[string]string{}, Inner: inner{Hash: []byte{}}}
	b := Marshal(sample{})
	if !bytes.Equal(b, Marshal(full)) {
		t.Error("nil and empty differ")
	}
	var back sample
	if err := Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(Marshal(back), b) {
		t.Error("no round trip")
	}
}

type one struct {
	A uint64 `cbor:"a"`
}

type two struct {
	A uint64 `cbor:"a"`
	B []byte `cbor:"b"`
}

func TestRefuses(t *testing.T) {
	for _, v := range []struct {
		what, hex string
		into      any
	}{
		{"nothing", "", new(one)},
		{"trailing byte", "a1 6161 01 00", new(one)},
		{"cut short", "a1 6161", new(one)},
		{"unknown field", "a2 6161 01 6162 02", new(one)},
		{"unknown field alone", "a1 6162 02", new(one)},
		{"missing field", "a1 6161 01", new(two)},
		{"all fields missing", "a0", new(one)},
		{"another case of the name", "a1 6141 01", new(one)},
		{"duplicate field", "a2 6161 01 6161 01", new(one)},
		{"duplicate field, other value", "a2 6161 01 6161 02", new(one)},
		{"fields out of order", "a2 6162 40 6161 01", new(two)},
		{"number not in shortest form", "a1 6161 1801", new(one)},
		{"number in eight bytes", "a1 6161 1b0000000000000001", new(one)},
		{"length not in shortest form", "a1 7801 61 01", new(one)},
		{"map length not in shortest form", "b801 6161 01", new(one)},
		{"indefinite map", "bf 6161 01 ff", new(one)},
		{"indefinite byte string", "a2 6161 01 6162 5f 4101 ff", new(two)},
		{"tag", "a1 6161 c2 4101", new(one)},
		{"tag about all", "d9d9f7 a1 6161 01", new(one)},
		{"float for a number", "a1 6161 f93c00", new(one)},
		{"negative for unsigned", "a1 6161 20", new(one)},
		{"null for a number", "a1 6161 f6", new(one)},
		{"undefined for a number", "a1 6161 f7", new(one)},
		{"null for bytes", "a2 6161 01 6162 f6", new(two)},
		{"text for bytes", "a2 6161 01 6162 6178", new(two)},
		{"array of numbers for bytes", "a2 6161 01 6162 8101", new(two)},
		{"array for a struct", "81 01", new(one)},
		{"null for a struct", "f6", new(one)},
		{"not UTF-8", "62 c328", new(string)},
		{"not UTF-8 as a key", "a1 61ff 00", new(map[string]int)},
		{"duplicate key", "a2 6161 00 6161 00", new(map[string]int)},
		{"keys out of order", "a2 6162 00 6161 00", new(map[string]int)},
		{"number too large", "1b0000000100000000", new(uint32)},
		{"NaN", "f97e00", new(float64)},
		{"infinity", "f97c00", new(float64)},
		{"reserved length", "1c", new(uint64)},
		{"break alone", "ff", new(uint64)},
		{"length beyond the end", "9a ffffffff", new([]one)},
		{"byte string beyond the end", "5b 7fffffffffffffff", new([]byte)},
	} {
		if err := Unmarshal(unhex(t, v.hex), v.into); err == nil {
			t.Errorf("%s: accepted", v.what)
		}
	}
	// The same types take the one right encoding.
	if err := Unmarshal(unhex(t, "a2 6161 01 6162 40"), new(two)); err != nil {
		t.Error(err)
	}
}

func TestBounds(t *testing.T) {
	var b []byte
	if err := Unmarshal(Marshal(make([]byte, MaxSize)), &b); err == nil {
		t.Error("more than MaxSize accepted")
	}
	if err := Unmarshal(Marshal(make([]byte, MaxSize-5)), &b); err != nil {
		t.Error(err)
	}
	deep := append(bytes.Repeat([]byte{0x81}, 100_000), 0)
	var v any
	if err := Unmarshal(deep, &v); err == nil {
		t.Error("endless nesting accepted")
	}
	var list []uint64
	if err := Unmarshal(Marshal(make([]uint64, 100_001)), &list); err == nil {
		t.Error("a longer list than allowed accepted")
	}
}

func TestMarshalPanicsOnMistakes(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("a function has an encoding")
		}
	}()
	Marshal(func() {})
}

func TestUnmarshalErrors(t *testing.T) {
	err := Unmarshal([]byte{0xff}, new(one))
	if err == nil || !strings.HasPrefix(err.Error(), "canon: ") || errors.Unwrap(err) == nil {
		t.Errorf("error without origin: %v", err)
	}
}

func genInner() *rapid.Generator[inner] {
	return rapid.Custom(func(t *rapid.T) inner {
		return inner{ID: rapid.String().Draw(t, "id"), Hash: rapid.SliceOfN(rapid.Byte(), 0, 40).Draw(t, "hash")}
	})
}

// TestRoundTrip: every value has one encoding, which decodes to it; and two
// values that differ have different encodings.
func TestRoundTrip(t *testing.T) {
	gen := rapid.Custom(func(t *rapid.T) sample {
		return sample{
			Name: rapid.String().Draw(t, "name"), Number: rapid.Uint64().Draw(t, "number"), Signed: rapid.Int64().Draw(t, "signed"),
			Small: rapid.Uint32().Draw(t, "small"), Flag: rapid.Bool().Draw(t, "flag"), Bytes: rapid.SliceOf(rapid.Byte()).Draw(t, "bytes"),
			List: rapid.SliceOfN(genInner(), 0, 5).Draw(t, "list"), Strings: rapid.SliceOfN(rapid.String(), 0, 5).Draw(t, "strings"),
			Map: rapid.MapOfN(rapid.String(), rapid.String(), 0, 8).Draw(t, "map"), Inner: genInner().Draw(t, "inner"),
		}
	})
	rapid.Check(t, func(t *rapid.T) {
		v := gen.Draw(t, "v")
		b := Marshal(v)
		if !bytes.Equal(b, Marshal(v)) {
			t.Fatal("two encodings of one value")
		}
		var back sample
		if err := Unmarshal(b, &back); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(Marshal(back), b) {
			t.Fatal("no round trip")
		}
		for i := range b { // no other byte string decodes to the same value
			c := bytes.Clone(b)
			c[i] ^= byte(rapid.IntRange(1, 255).Draw(t, "flip"))
			var other sample
			if err := Unmarshal(c, &other); err == nil && bytes.Equal(Marshal(other), b) {
				t.Fatalf("a change of byte %d decodes to the same value", i)
			}
			if i > 64 {
				break
			}
		}
	})
}

// FuzzUnmarshal: what is accepted is exactly what Marshal writes, and never
// panics.
func FuzzUnmarshal(f *testing.F) {
	full := sample{Name: "n", Number: 1 << 40, Signed: -5, Small: 7, Flag: true, Bytes: []byte{1}, List: []inner{{"i", []byte{2}}},
		Strings: []string{"a", "b"}, Map: map[string]string{"k": "v"}, Inner: inner{ID: "x"}}
	f.Add(Marshal(full))
	f.Add(Marshal(sample{}))
	f.Add(Marshal(one{1}))
	f.Add([]byte{0xbf, 0x61, 0x61, 0x01, 0xff})
	f.Add([]byte{0x9a, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, into := range []any{new(sample), new(one), new(two), new([]inner), new(map[string]string), new(string), new(uint32)} {
			if err := Unmarshal(b, into); err != nil {
				continue
			}
			if !bytes.Equal(Marshal(into), b) {
				t.Fatalf("accepted bytes that Marshal does not write for %T", into)
			}
			if err := cbor.Wellformed(b); err != nil {
				t.Fatalf("accepted what is not CBOR: %v", err)
			}
		}
	})
}
