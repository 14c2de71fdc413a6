package hsm

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/asn1"
	"errors"
	"testing"
)

// FuzzParseBlob: a blob that parses is rebuilt from its parts byte for byte.
func FuzzParseBlob(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(make([]byte, overhead+1))
	f.Add(append([]byte{blobVersion}, make([]byte, overhead)...))
	f.Add(append([]byte{blobVersion}, make([]byte, overhead+MaxWrap)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseBlob(b)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		if !bytes.Equal(s.bytes(), b) || len(s.iv) != ivSize || len(s.box) <= tagSize || len(s.box) > tagSize+MaxWrap {
			t.Fatalf("%d bytes came apart wrongly", len(b))
		}
	})
}

// FuzzDecodePoint: a point is taken bare or as a DER octet string, nothing else.
func FuzzDecodePoint(f *testing.F) {
	crv, err := curveOf(ecdh.P256())
	if err != nil {
		f.Fatal(err)
	}
	k, err := crv.ecdh.GenerateKey(rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	p := k.PublicKey().Bytes()
	der, err := asn1.Marshal(p)
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range [][]byte{nil, {4}, p, der, der[:20], append(bytes.Clone(der), 0), {4, 0}, {4, 1, 4}} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, v []byte) {
		got, err := decodePoint(v, crv)
		if err != nil {
			if !errors.Is(err, ErrUnsafeToken) {
				t.Fatal(err)
			}
			return
		}
		der, err := asn1.Marshal(got)
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != 65 || got[0] != 4 || !bytes.Equal(v, got) && !bytes.Equal(v, der) {
			t.Fatalf("%x was taken for a point", v)
		}
	})
}

func TestShown(t *testing.T) {
	if got := shown("A\x1b[31mB\n  \x00"); got != "A?[31mB?" {
		t.Fatalf("%q", got)
	}
}
