package keyring

import (
	"bytes"
	"testing"

	"github.com/conclave-kms/conclave/kms"
)

func FuzzParseHeader(f *testing.F) {
	good := append(appendHeader(nil, testID, 1), make([]byte, Overhead-headerSize+nonceSize)...)
	f.Add(good)
	f.Add(good[:headerSize])
	f.Add([]byte("CV\x01\xc2\x01"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := ParseHeader(b)
		if err != nil {
			wantErrOpen(t, "refusal", err)
			return
		}
		if !bytes.HasPrefix(b, appendHeader(nil, h.KeyID, h.Version)) {
			t.Error("the header read is not the one that stands there")
		}
	})
}

func FuzzDecrypt(f *testing.F) {
	// A known answer, because the workers must agree on what is genuine.
	v := loadVectors(f).Messages[3]
	src, id, good := memoryHMAC{v.Key.secret(f)}, v.KeyID.keyID(f), []byte(v.Ciphertext)
	f.Add(good, "service", "payroll")
	f.Add(good[:len(good)-1], "service", "payroll")
	f.Add(good, "service", "")
	f.Add(appendHeader(nil, testID, 2), "", "")
	f.Fuzz(func(t *testing.T, b []byte, name, value string) {
		got, err := open(bg, src, id, v.Version, Context{name: value}, b)
		if err != nil {
			wantErrOpen(t, "refusal", err)
			return
		}
		if !bytes.Equal(b, good) || name != "service" || value != v.Context["service"] || !bytes.Equal(got, v.Plaintext) {
			t.Error("a forgery was decrypted")
		}
	})
}

func FuzzEncryptDecrypt(f *testing.F) {
	m := newKey(f, kms.AES256GCM, 1)
	f.Add([]byte("secret"), "n", "v")
	f.Add([]byte{}, "", "")
	f.Fuzz(func(t *testing.T, plaintext []byte, name, value string) {
		context := Context{name: value}
		ct, err := m.Encrypt(bg, context, plaintext)
		if err != nil {
			if _, cerr := EncodeContext(context); cerr == nil && len(plaintext) <= MaxPlaintext {
				t.Errorf("refused without reason: %v", err)
			}
			return
		}
		if got := must[[]byte](t)(m.Decrypt(bg, context, ct)); !bytes.Equal(got, plaintext) {
			t.Error("decrypted something else")
		}
	})
}

func FuzzEncodeContext(f *testing.F) {
	f.Add("a", "1", "b", "2")
	f.Add("a", "", "a", "x")
	f.Add("", "v", "\xff", "v")
	f.Fuzz(func(t *testing.T, n1, v1, n2, v2 string) {
		c := Context{n1: v1, n2: v2}
		b, err := EncodeContext(c)
		if err != nil {
			if k := kms.KindOf(err); k != kms.Invalid && k != kms.TooLarge {
				t.Errorf("refused with %v", err)
			}
			return
		}
		if back, ok := decodeContext(b); !ok || !equalContext(back, c) || len(b) > MaxContext {
			t.Error("the encoding does not say what was encoded")
		}
	})
}

func FuzzUnwrapMaterial(f *testing.F) {
	v := loadVectors(f).Wrapped[0]
	b := KeyBinding{Cluster: v.Cluster, Keyring: v.Keyring, KEK: v.KEKVersion, KeyID: v.KeyID.keyID(f), Version: v.Version, Algorithm: v.Algorithm, Purpose: v.Purpose}
	kek, material, good := v.KEK.secret(f), v.Material.secret(f), []byte(v.Wrapped)
	f.Add(good, b.Cluster, b.Keyring, b.KEK, b.Version)
	f.Add(good[1:], b.Cluster, b.Keyring, b.KEK, b.Version)
	f.Add(good, b.Cluster, "europe", b.KEK, b.Version)
	f.Fuzz(func(t *testing.T, wrapped []byte, cluster, keyring string, kekVersion, version uint32) {
		c := b
		c.Cluster, c.Keyring, c.KEK, c.Version = cluster, keyring, kekVersion, version
		got, err := UnwrapMaterial(kek, c, wrapped)
		if err != nil {
			wantErrOpen(t, "refusal", err)
			return
		}
		defer got.Destroy()
		if c != b || !bytes.Equal(wrapped, good) || !got.Equal(material) {
			t.Error("a forgery was unwrapped")
		}
	})
}

func FuzzVerify(f *testing.F) {
	for i, a := range []kms.Algorithm{kms.ECDSAP256, kms.ECDSAP384, kms.Ed25519} {
		m := newKey(f, a, 1)
		f.Add(byte(i), m.PublicKey(), []byte("m"), must[[]byte](f)(m.Sign(bg, []byte("m"))))
	}
	f.Fuzz(func(t *testing.T, which byte, public, message, sig []byte) {
		a := []kms.Algorithm{kms.ECDSAP256, kms.ECDSAP384, kms.Ed25519}[which%3]
		switch err := Verify(a, public, message, sig); kms.KindOf(err) {
		case 0, kms.BadSignature, kms.Invalid:
		default:
			t.Errorf("unexpected error %v", err)
		}
	})
}
