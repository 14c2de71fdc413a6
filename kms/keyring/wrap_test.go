package keyring

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
)

func TestWrapKnownAnswers(t *testing.T) {
	for _, v := range loadVectors(t).Wrapped {
		b := KeyBinding{Cluster: v.Cluster, Keyring: v.Keyring, KEK: v.KEKVersion, KeyID: v.KeyID.keyID(t), Version: v.Version, Algorithm: v.Algorithm, Purpose: v.Purpose}
		if !bytes.Equal(b.aad(), v.AAD) {
			t.Errorf("%s: AAD is %x", v.Algorithm, b.aad())
		}
		m := must[*secret.Bytes](t)(UnwrapMaterial(v.KEK.secret(t), b, v.Wrapped))
		if !bytes.Equal(m.Reveal(), v.Material) {
			t.Errorf("%s: unwrapped something else", v.Algorithm)
		}
		m.Destroy()
	}
}

// changed returns b with each field changed in turn.
func changed(b KeyBinding) map[string]KeyBinding {
	out := map[string]KeyBinding{}
	for what, change := range map[string]func(*KeyBinding){
		"cluster":   func(b *KeyBinding) { b.Cluster += "0" },
		"keyring":   func(b *KeyBinding) { b.Keyring = "europe" },
		"KEK":       func(b *KeyBinding) { b.KEK++ },
		"key id":    func(b *KeyBinding) { b.KeyID[15] ^= 0x80 },
		"version":   func(b *KeyBinding) { b.Version-- },
		"algorithm": func(b *KeyBinding) { b.Algorithm, b.Purpose = kms.HMACSHA256, kms.MAC },
		"purpose":   func(b *KeyBinding) { b.Purpose = kms.MAC },
		"nothing":   func(b *KeyBinding) { *b = KeyBinding{} },
	} {
		c := b
		change(&c)
		out[what] = c
	}
	return out
}

func TestWrapUnwrap(t *testing.T) {
	kek := must[*secret.Bytes](t)(GenerateKEK(make([]byte, EntropySize)))
	defer kek.Destroy()
	for _, a := range algorithms {
		material := must[*secret.Bytes](t)(newKey(t, a, 3).Export())
		defer material.Destroy()
		wrapped := must[[]byte](t)(WrapMaterial(kek, bindingOf(a), material))
		again := must[[]byte](t)(WrapMaterial(kek, bindingOf(a), material))
		if bytes.Equal(wrapped, again) {
			t.Errorf("%s: wrapping twice gives the same bytes", a)
		}
		got := must[*secret.Bytes](t)(UnwrapMaterial(kek, bindingOf(a), wrapped))
		if !got.Equal(material) {
			t.Errorf("%s: unwrapped something else", a)
		}
		got.Destroy()
		for i := range wrapped {
			b := bytes.Clone(wrapped)
			b[i] ^= 1
			_, err := UnwrapMaterial(kek, bindingOf(a), b)
			wantErrOpen(t, fmt.Sprintf("%s: byte %d", a, i), err)
			_, err = UnwrapMaterial(kek, bindingOf(a), wrapped[:i])
			wantErrOpen(t, fmt.Sprintf("%s: cut to %d", a, i), err)
		}
	}
	material := must[*secret.Bytes](t)(newKey(t, kms.AES256GCM, 3).Export())
	defer material.Destroy()
	wrapped := must[[]byte](t)(WrapMaterial(kek, bindingOf(kms.AES256GCM), material))
	for what, b := range changed(bindingOf(kms.AES256GCM)) {
		_, err := UnwrapMaterial(kek, b, wrapped)
		wantErrOpen(t, "another "+what, err)
	}
	other := must[*secret.Bytes](t)(GenerateKEK(bytes.Repeat([]byte{1}, EntropySize)))
	defer other.Destroy()
	_, err := UnwrapMaterial(other, bindingOf(kms.AES256GCM), wrapped)
	wantErrOpen(t, "another KEK", err)
	_, err = UnwrapMaterial(nil, bindingOf(kms.AES256GCM), wrapped)
	wantErrOpen(t, "no KEK", err)
}

func TestWrapRefuses(t *testing.T) {
	kek := must[*secret.Bytes](t)(GenerateKEK(make([]byte, EntropySize)))
	defer kek.Destroy()
	short := must[*secret.Bytes](t)(secret.New(16))
	defer short.Destroy()
	good := bindingOf(kms.AES256GCM)
	_, err := WrapMaterial(kek, good, short)
	wantKind(t, "material too short", err, kms.Invalid)
	_, err = WrapMaterial(short, good, kek)
	wantKind(t, "KEK too short", err, kms.Invalid)
	_, err = WrapMaterial(nil, good, kek)
	wantKind(t, "no KEK", err, kms.Invalid)
	for what, change := range map[string]func(*KeyBinding){
		"cluster": func(b *KeyBinding) { b.Cluster = "" }, "keyring": func(b *KeyBinding) { b.Keyring = "" },
		"KEK version": func(b *KeyBinding) { b.KEK = 0 }, "key id": func(b *KeyBinding) { b.KeyID = kms.KeyID{} },
		"version": func(b *KeyBinding) { b.Version = 0 }, "algorithm": func(b *KeyBinding) { b.Algorithm = "rot13" },
		"purpose": func(b *KeyBinding) { b.Purpose = "" }, "wrong purpose": func(b *KeyBinding) { b.Purpose = kms.Sign },
	} {
		b := good
		change(&b)
		_, err := WrapMaterial(kek, b, kek)
		wantKind(t, what, err, kms.Invalid)
	}
}
