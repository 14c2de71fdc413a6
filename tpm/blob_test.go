package tpm

import (
	"bytes"
	"crypto/ecdh"
	"testing"

	"github.com/google/go-tpm/tpm2"
)

// sealedPub is the public area of a sealed object with a given attribute word.
func sealedPub(s *suite, change func(*tpm2.TPMTPublic)) []byte {
	pub := s.sealed()
	pub.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgKeyedHash, &tpm2.TPM2BDigest{Buffer: bytes.Repeat([]byte{7}, s.digest)})
	if change != nil {
		change(&pub)
	}
	return tpm2.Marshal(pub)
}

func TestParseBlob(t *testing.T) {
	priv := bytes.Repeat([]byte{9}, 200)
	for _, s := range []*suite{suiteOf(ecdh.P384()), suiteOf(ecdh.P256())} {
		good := sealedPub(s, nil)
		pub, got, ok := s.parseBlob(encodeBlob(good, priv))
		if !ok || !bytes.Equal(pub, good) || !bytes.Equal(got, priv) {
			t.Fatalf("%s: a right blob is refused", s.name)
		}
		for name, change := range map[string]func(*tpm2.TPMTPublic){
			"importable": func(p *tpm2.TPMTPublic) { p.ObjectAttributes.FixedTPM, p.ObjectAttributes.FixedParent = false, false },
			"signs":      func(p *tpm2.TPMTPublic) { p.ObjectAttributes.SignEncrypt = true },
			"no auth":    func(p *tpm2.TPMTPublic) { p.ObjectAttributes.UserWithAuth = false },
			"under DA":   func(p *tpm2.TPMTPublic) { p.ObjectAttributes.NoDA = false },
			"policy":     func(p *tpm2.TPMTPublic) { p.AuthPolicy.Buffer = make([]byte, s.digest) },
			"name":       func(p *tpm2.TPMTPublic) { p.NameAlg = tpm2.TPMAlgSHA512 },
			"unique":     func(p *tpm2.TPMTPublic) { p.Unique = s.sealed().Unique },
		} {
			if _, _, ok := s.parseBlob(encodeBlob(sealedPub(s, change), priv)); ok {
				t.Errorf("%s: a public area is accepted: %s", s.name, name)
			}
		}
		for name, b := range map[string][]byte{
			"empty":         nil,
			"version 0":     append([]byte{0}, encodeBlob(good, priv)[1:]...),
			"version 2":     append([]byte{2}, encodeBlob(good, priv)[1:]...),
			"no private":    encodeBlob(good, nil),
			"long private":  encodeBlob(good, make([]byte, maxPrivate+1)),
			"trailing byte": append(encodeBlob(good, priv), 0),
		} {
			if _, _, ok := s.parseBlob(b); ok {
				t.Errorf("%s: accepted: %s", s.name, name)
			}
		}
	}
}

func FuzzParseBlob(f *testing.F) {
	suites := []*suite{suiteOf(ecdh.P384()), suiteOf(ecdh.P256())}
	for _, s := range suites {
		f.Add(encodeBlob(sealedPub(s, nil), []byte("private")))
		f.Add(encodeBlob(sealedPub(s, func(p *tpm2.TPMTPublic) { p.ObjectAttributes.FixedTPM = false }), []byte("private")))
	}
	f.Add([]byte{})
	f.Add([]byte{1, 0, 0, 0, 0})
	f.Add([]byte{1, 0xff, 0xff, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, s := range suites {
			pub, priv, ok := s.parseBlob(b)
			if !ok {
				continue
			}
			if !bytes.Equal(encodeBlob(pub, priv), b) {
				t.Error("an accepted blob does not encode to itself")
			}
			got, err := tpm2.Unmarshal[tpm2.TPMTPublic](pub)
			if err != nil || !sameTemplate(*got, s.sealed()) {
				t.Errorf("an accepted public area is not that of a sealed object: %v", err)
			}
		}
	})
}
