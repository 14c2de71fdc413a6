package hsm

import (
	"errors"
	"reflect"
	"strings"
	"testing"
)

func slot(n uint) *uint { return &n }

// Accepted forms; one follows an example of RFC 7512 section 3.
func TestParseURI(t *testing.T) {
	for s, want := range map[string]URI{
		"pkcs11:": {},
		"pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,%20Inc.;model=1.0": {Token: "The Software PKCS#11 Softtoken", Manufacturer: "Snake Oil, Inc.", Model: "1.0"},
		"pkcs11:token=a;serial=0b":                                           {Token: "a", Serial: "0b"},
		"pkcs11:slot-id=327":                                                 {SlotID: slot(327)},
		"pkcs11:token=%C3%A9&x?module-path=/a%20b.so":                        {Token: "é&x", ModulePath: "/a b.so"},
		"pkcs11:token=t?pin-source=/run/pin":                                 {Token: "t", PINSource: "/run/pin"},
		"pkcs11:token=t?pin-source=file:///run/pin":                          {Token: "t", PINSource: "/run/pin"},
		"pkcs11:token=t?pin-source=file://localhost/p%25":                    {Token: "t", PINSource: "/p%"},
		"pkcs11:model=m;manufacturer=f?module-path=/m.so&pin-source=file:/p": {Model: "m", Manufacturer: "f", ModulePath: "/m.so", PINSource: "/p"},
	} {
		got, err := ParseURI(s)
		if err != nil {
			t.Errorf("%s: %v", s, err)
		} else if !reflect.DeepEqual(*got, want) {
			t.Errorf("%s: %+v", s, *got)
		}
	}
}

func TestParseURIRefuses(t *testing.T) {
	for s, why := range map[string]string{
		"":                                    "begins with",
		"PKCS11:token=a":                      "begins with",
		"https://example":                     "begins with",
		"pkcs11:token":                        "without a value",
		"pkcs11:token=":                       "empty",
		"pkcs11:token=a;":                     "without a value",
		"pkcs11:token=a;token=a":              "twice",
		"pkcs11:token=a b":                    "escape",
		"pkcs11:token=%4":                     "escape",
		"pkcs11:token=%zz":                    "escape",
		"pkcs11:token=%+1":                    "escape",
		"pkcs11:token=a/b":                    "escape",
		"pkcs11:slot-id=-1":                   "decimal",
		"pkcs11:slot-id=007":                  "decimal",
		"pkcs11:object=key":                   "names an object",
		"pkcs11:id=%01":                       "names an object",
		"pkcs11:x-vendor=1":                   "not supported",
		"pkcs11:library-version=3":            "not supported",
		"pkcs11:token=a?":                     "without a value",
		"pkcs11:token=a?pin-value=hunter22":   "refused",
		"pkcs11:token=a;pin-value=hunter22":   "refused",
		"pkcs11:token=a?module-name=softhsm2": "not supported",
		"pkcs11:token=a?module-path=lib.so":   "absolute",
		"pkcs11:token=a?pin-source=|echo":     "absolute",
		"pkcs11:token=a?pin-source=file:pin":  "absolute",
		"pkcs11:token=a?pin-source=file://h/": "absolute",
		"pkcs11:token=a?token=a":              "twice",
		"pkcs11:" + strings.Repeat("a", 5000): "longer",
	} {
		_, err := ParseURI(s)
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), why) {
			t.Errorf("%.60s: %v, want %q", s, err, why)
		}
		if err != nil && strings.Contains(err.Error(), "hunter22") {
			t.Errorf("the error shows the PIN: %v", err)
		}
	}
}

// FuzzParseURI: what is accepted has a canonical form that means the same.
func FuzzParseURI(f *testing.F) {
	for _, s := range []string{"pkcs11:", "pkcs11:token=a;serial=1?module-path=/x.so&pin-source=file:/p",
		"pkcs11:token=%C3%A9%00;slot-id=0", "pkcs11:pin-value=1", "pkcs11:model=%25?pin-source=file://localhost/a", "x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseURI(s)
		if err != nil {
			if !errors.Is(err, ErrInvalid) || u != nil {
				t.Fatalf("%v", err)
			}
			return
		}
		again, err := ParseURI(u.String())
		if err != nil {
			t.Fatalf("%q -> %q: %v", s, u, err)
		}
		if !reflect.DeepEqual(u, again) || again.String() != u.String() {
			t.Fatalf("%q -> %q -> %q", s, u, again)
		}
	})
}
