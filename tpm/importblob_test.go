package tpm

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/kms/secret"
)

// target is a storage key in software: what ImportKey returns for it.
func target(t testing.TB, s *suite) []byte {
	t.Helper()
	key, err := s.curve.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	area := s.storage()
	area.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, eccPoint(s, key.PublicKey()))
	return tpm2.Marshal(area)
}

// blobsFor makes a key blob of each type.
func blobsFor(t testing.TB, s *suite, label []byte) map[importType][]byte {
	t.Helper()
	public := target(t, s)
	out := map[importType][]byte{}
	for kind, n := range map[importType]int{importHMAC: 32, importP256: 32, importP384: 48} {
		key, err := secret.Copy(bytes.Repeat([]byte{1}, n))
		if err != nil {
			t.Fatal(err)
		}
		defer key.Destroy()
		if kind == importHMAC {
			out[kind], err = WrapHMAC(public, key, label)
		} else {
			out[kind], err = WrapSigner(public, kind.signer().curve, key, label)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func TestParseImport(t *testing.T) {
	t.Parallel()
	both := []*suite{suiteOf(ecdh.P384()), suiteOf(ecdh.P256())}
	for i, s := range both {
		for _, label := range [][]byte{nil, {0}, bytes.Repeat([]byte{0xff}, maxLabel)} {
			for kind, b := range blobsFor(t, s, label) {
				p, ok := s.parseImport(b)
				if !ok || p.kind != kind || !bytes.Equal(p.label, label) || !bytes.Equal(p.encode(), b) {
					t.Fatalf("%s, type %d: a right blob is refused or changed", s.name, kind)
				}
				if _, ok := both[1-i].parseImport(b); ok {
					t.Errorf("%s, type %d: the other suite accepts the blob", s.name, kind)
				}
				refuseVariants(t, s, p)
				g := asGenerated(t, s, p)
				if _, ok := s.parseImport(g.encode()); !ok {
					t.Fatalf("%s, type %d: a right blob of version 3 is refused", s.name, kind)
				}
				refuseVariants(t, s, g)
				refuseNames(t, s, g)
			}
		}
	}
}

// asGenerated gives a blob the form of version 3, for two recipients.
func asGenerated(t testing.TB, s *suite, b *importBlob) *importBlob {
	t.Helper()
	names := namesOf([]recipient{{name: s.objectName(target(t, s))}, {name: s.objectName(target(t, s))}})
	pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](b.pub)
	if err != nil {
		t.Fatal(err)
	}
	template := s.generated(b.kind, names)
	pub.ObjectAttributes, pub.AuthPolicy = template.ObjectAttributes, template.AuthPolicy
	g := *b
	g.version, g.label, g.pub = generatedVersion, bytes.Join(names, nil), tpm2.Marshal(pub)
	return &g
}

// refuseNames changes the list of recipients.
func refuseNames(t *testing.T, s *suite, good *importBlob) {
	t.Helper()
	n := 2 + s.digest
	first, second := good.label[:n], good.label[n:]
	for name, names := range map[string][]byte{
		"none": nil, "one less": first, "the other way round": append(bytes.Clone(second), first...), "one twice": append(bytes.Clone(good.label), second...),
		"a cut one": good.label[:2*n-1], "too many": bytes.Repeat(first, MaxRecipients+1), "another algorithm": append([]byte{0, 4}, good.label[2:]...),
	} {
		b := *good
		b.label = names
		if _, ok := s.parseImport(b.encode()); ok {
			t.Errorf("%s, type %d: accepted names: %s", s.name, good.kind, name)
		}
	}
}

// refuseVariants changes a parsed blob in ways that keep its framing.
func refuseVariants(t *testing.T, s *suite, good *importBlob) {
	t.Helper()
	for name, change := range map[string]func(*importBlob){
		"type 0":          func(b *importBlob) { b.kind = 0 },
		"type 4":          func(b *importBlob) { b.kind = 4 },
		"another type":    func(b *importBlob) { b.kind = 1 + b.kind%3 },
		"another version": func(b *importBlob) { b.version ^= 1 },
		"version 4":       func(b *importBlob) { b.version = 4 },
		"another label":   func(b *importBlob) { b.label = append(bytes.Clone(b.label), 1)[len(b.label)/maxLabel:] },
		"a long label":    func(b *importBlob) { b.label = make([]byte, maxLabel+1) },
		"short duplicate": func(b *importBlob) { b.duplicate = b.duplicate[1:] },
		"long duplicate":  func(b *importBlob) { b.duplicate = append(bytes.Clone(b.duplicate), 0) },
		"no point":        func(b *importBlob) { b.point = nil },
		"point off curve": func(b *importBlob) { b.point = bytes.Clone(b.point); b.point[len(b.point)-1] ^= 1 },
		"long public":     func(b *importBlob) { b.pub = append(bytes.Clone(b.pub), 0) },
		"attributes": func(b *importBlob) {
			pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](b.pub)
			if err != nil {
				t.Fatal(err)
			}
			pub.ObjectAttributes.Decrypt = true
			b.pub = tpm2.Marshal(pub)
		},
		"policy": func(b *importBlob) {
			pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](b.pub)
			if err != nil {
				t.Fatal(err)
			}
			pub.AuthPolicy.Buffer = make([]byte, s.digest)
			b.pub = tpm2.Marshal(pub)
		},
	} {
		b := *good
		change(&b)
		if _, ok := s.parseImport(b.encode()); ok {
			t.Errorf("%s, type %d: accepted: %s", s.name, good.kind, name)
		}
	}
}

// TestWrapFresh: nothing in two blobs of one key shows that it is one key.
func TestWrapFresh(t *testing.T) {
	s := suiteOf(ecdh.P384())
	key, err := secret.Copy(make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	defer key.Destroy()
	public := target(t, s)
	var seen []*importBlob
	for range 2 {
		b, err := WrapHMAC(public, key, nil)
		if err != nil {
			t.Fatal(err)
		}
		p, ok := s.parseImport(b)
		if !ok {
			t.Fatal("refused")
		}
		seen = append(seen, p)
	}
	if bytes.Equal(seen[0].pub, seen[1].pub) || bytes.Equal(seen[0].point, seen[1].point) || bytes.Equal(seen[0].duplicate, seen[1].duplicate) {
		t.Error("a part of the blob repeats")
	}
}

func FuzzParseImport(f *testing.F) {
	suites := []*suite{suiteOf(ecdh.P384()), suiteOf(ecdh.P256())}
	for _, s := range suites {
		for _, b := range blobsFor(f, s, []byte("label")) {
			f.Add(b)
		}
	}
	for _, s := range suites {
		for _, b := range blobsFor(f, s, nil) {
			p, _ := s.parseImport(b)
			f.Add(asGenerated(f, s, p).encode())
		}
	}
	f.Add([]byte{})
	f.Add([]byte{2, 1, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{2, 3, 0xff, 0xff, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, s := range suites {
			p, ok := s.parseImport(b)
			if !ok {
				continue
			}
			if !bytes.Equal(p.encode(), b) {
				t.Error("an accepted blob does not encode to itself")
			}
			template, ok := s.templateOf(p)
			if a := template.ObjectAttributes; !ok || a.FixedTPM || a.FixedParent || a.Decrypt || a.Restricted || !a.NoDA || len(template.AuthPolicy.Buffer) == 0 {
				t.Errorf("attributes of an accepted public area: %+v", a)
			}
			pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](p.pub)
			if err != nil || !sameTemplate(*pub, template) {
				t.Errorf("an accepted public area is not that of an imported key: %v", err)
			}
		}
	})
}

func FuzzImportKey(f *testing.F) {
	for _, s := range []*suite{suiteOf(ecdh.P384()), suiteOf(ecdh.P256())} {
		f.Add(target(f, s))
	}
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		s, _, err := importTarget(b, nil)
		if err != nil {
			return
		}
		pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](b)
		if err != nil || !sameTemplate(*pub, s.storage()) || !bytes.Equal(tpm2.Marshal(pub), b) {
			t.Errorf("an accepted import key is not a storage key: %v", err)
		}
	})
}
