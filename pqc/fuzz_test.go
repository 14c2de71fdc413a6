package pqc

import (
	"bytes"
	"errors"
	"testing"
)

func FuzzParsePublicKey(f *testing.F) {
	for _, id := range kemSuites {
		k, _ := newDeviceKey(f, id)
		b := k.PublicKey().Bytes()
		f.Add(uint16(id), b)
		f.Add(uint16(id), b[1:])
		f.Add(uint16(id), bytes.Repeat([]byte{0xff}, len(b)))
	}
	f.Add(uint16(Ed25519), []byte{})
	f.Fuzz(func(t *testing.T, id uint16, b []byte) {
		p, err := ParsePublicKey(SuiteID(id), b)
		if err != nil {
			if p != nil || (!errors.Is(err, ErrPublicKey) && !errors.Is(err, ErrSuite)) {
				t.Fatalf("error %v", err)
			}
			return
		}
		if !bytes.Equal(p.Bytes(), b) || uint16(p.Suite()) != id {
			t.Fatal("the key does not round-trip")
		}
		if _, err := p.Seal(nil, nil, []byte("x")); err != nil {
			t.Fatalf("an accepted key cannot be sealed to: %v", err)
		}
	})
}

func FuzzOpen(f *testing.F) {
	keys := map[SuiteID]*PrivateKey{}
	genuine := map[string]bool{}
	for _, id := range kemSuites {
		k, _ := newDeviceKey(f, id)
		keys[id] = k
		sealed := must[[]byte](f)(k.PublicKey().Seal([]byte("info"), []byte("aad"), []byte("secret")))
		genuine[string(sealed)] = true
		f.Add(uint16(id), sealed)
		f.Add(uint16(id), sealed[:len(sealed)-1])
		f.Add(uint16(id), make([]byte, len(sealed)))
	}
	f.Fuzz(func(t *testing.T, id uint16, sealed []byte) {
		k, ok := keys[SuiteID(id)]
		if !ok {
			return
		}
		_, err := k.Open([]byte("info"), []byte("aad"), sealed)
		if err == nil && !genuine[string(sealed)] {
			t.Fatal("opened what nobody sealed")
		}
		if err != nil && !errors.Is(err, ErrOpen) {
			t.Fatalf("error %v", err)
		}
	})
}

func FuzzVerify(f *testing.F) {
	type signed struct {
		suite                       uint16
		pub, message, context, sign string
	}
	genuine := map[signed]bool{}
	for _, id := range signatureSuites {
		pub, sign := newSigner(f, id)
		m, c := []byte("message"), []byte("context")
		sig := sign(m, c)
		genuine[signed{uint16(id), string(pub), string(m), string(c), string(sig)}] = true
		f.Add(uint16(id), pub, m, c, sig)
		f.Add(uint16(id), pub, m, c, sig[1:])
		f.Add(uint16(id), pub[1:], m, make([]byte, 256), sig)
		f.Add(uint16(id), make([]byte, len(pub)), m, c, make([]byte, len(sig)))
	}
	f.Fuzz(func(t *testing.T, id uint16, pub, message, context, sig []byte) {
		err := Verify(SuiteID(id), pub, message, context, sig)
		switch {
		case err == nil:
			// A key of low order that the fuzzer invents can verify; the keys of
			// the corpus verify only what was signed with them.
			for g := range genuine {
				if g.suite == id && g.pub == string(pub) && (g.message != string(message) || g.context != string(context)) {
					t.Fatal("verified what nobody signed")
				}
			}
		case !errors.Is(err, ErrSuite) && !errors.Is(err, ErrPublicKey) && !errors.Is(err, ErrContext) && !errors.Is(err, ErrSignature):
			t.Fatalf("error %v", err)
		}
	})
}

func FuzzKeyFile(f *testing.F) {
	_, file := newKeyFile(f, "p")
	f.Add(file)
	f.Add(file[:len(file)/2])
	f.Add([]byte("-----BEGIN AGE ENCRYPTED FILE-----\n-----END AGE ENCRYPTED FILE-----\n"))
	pass := mustSecret(f, []byte("p"))
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := decryptKeyFile(b, pass, MinWorkFactor)
		if err == nil {
			k.Destroy()
			return
		}
		if k != nil || (!errors.Is(err, ErrKeyFile) && !errors.Is(err, ErrPassphrase)) {
			t.Fatalf("error %v", err)
		}
	})
}

func FuzzKeyFilePayload(f *testing.F) {
	good := modelPayload(f)
	f.Add(good)
	f.Add(good[:len(good)-1])
	f.Add(append(bytes.Clone(good), 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := parseKeyFilePayload(b)
		if (err == nil) != (len(b) == keyFileLen && bytes.HasPrefix(b, good[:len(keyFileMagic)+2])) {
			t.Fatalf("%d bytes: error %v", len(b), err)
		}
		if err == nil {
			k.Destroy()
		} else if !errors.Is(err, ErrKeyFile) {
			t.Fatalf("error %v", err)
		}
	})
}

func FuzzPublicLine(f *testing.F) {
	k := must[*HybridKey](f)(GenerateHybrid(nil))
	line := must[[]byte](f)(MarshalPublic(MLDSA65Ed25519, k.PublicKey()))
	f.Add(line)
	f.Add(bytes.TrimSpace(line))
	f.Add(line[1:])
	f.Add([]byte("conclave-custodian-key-1 "))
	f.Fuzz(func(t *testing.T, b []byte) {
		suite, pub, err := ParsePublic(b)
		if err != nil {
			if pub != nil || !errors.Is(err, ErrKeyFile) {
				t.Fatalf("error %v", err)
			}
			return
		}
		again := must[[]byte](t)(MarshalPublic(suite, pub))
		if !bytes.Equal(bytes.TrimSuffix(again, []byte("\n")), bytes.TrimSuffix(b, []byte("\n"))) {
			t.Fatal("the line has a second form")
		}
	})
}
