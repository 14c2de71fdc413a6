package keyring

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
)

// TestRewrap moves key versions of every algorithm from one KEK version to another.
func TestRewrap(t *testing.T) {
	old, next := kekOf(t, 1), kekOf(t, 2)
	for _, a := range algorithms {
		b := bindingOf(a)
		to := b
		to.KEK = b.KEK + 1
		m := newKey(t, a, 3)
		material := must[*secret.Bytes](t)(m.Export())
		defer material.Destroy()
		wrapped := must[[]byte](t)(WrapMaterial(old, b, material))
		moved := must[[]byte](t)(Rewrap(old, next, b, to.KEK, wrapped))
		got := must[*secret.Bytes](t)(UnwrapMaterial(next, to, moved))
		if !got.Equal(material) {
			t.Errorf("%s: another material", a)
		}
		got.Destroy()
		_, err := UnwrapMaterial(old, b, moved)
		wantErrOpen(t, string(a)+" with the old KEK", err)
		_, err = Rewrap(next, old, b, to.KEK, wrapped)
		wantErrOpen(t, string(a)+" with the wrong KEK", err)
		_, err = Rewrap(old, next, to, to.KEK, wrapped)
		wantErrOpen(t, string(a)+" under another version", err)
		_, err = Rewrap(old, next, b, 0, wrapped)
		wantKind(t, string(a)+" to no version", err, kms.Invalid)
	}
}

func kekOf(t *testing.T, seed byte) *secret.Bytes {
	t.Helper()
	kek := must[*secret.Bytes](t)(GenerateKEK(bytes.Repeat([]byte{seed}, EntropySize)))
	t.Cleanup(kek.Destroy)
	return kek
}

// TestSameMaterial accepts what holds the same key, and nothing else.
func TestSameMaterial(t *testing.T) {
	const node = "fr-1"
	oldKEK, nextKEK := kekOf(t, 1), kekOf(t, 2)
	for _, a := range algorithms {
		b := bindingOf(a)
		m, other := newKey(t, a, 3), newKey(t, a, 4)
		material, another := must[*secret.Bytes](t)(m.Export()), must[*secret.Bytes](t)(other.Export())
		defer material.Destroy()
		defer another.Destroy()
		under := func(kek *secret.Bytes, version uint32, s *secret.Bytes) Wrapping {
			x := b
			x.KEK = version
			return Wrapping{kek, version, must[[]byte](t)(WrapMaterial(kek, x, s))}
		}
		public, check := m.PublicKey(), CheckHash(CheckValue(material, b.Cluster, b.Keyring, b.KeyID, b.Version, node))
		wrong := CheckHash(CheckValue(another, b.Cluster, b.Keyring, b.KeyID, b.Version, node))
		old, good, swapped := under(oldKEK, 1, material), under(nextKEK, 2, material), under(nextKEK, 2, another)
		garbage := Wrapping{nextKEK, 2, make([]byte, len(good.Wrapped))}
		shut := Wrapping{nil, 1, old.Wrapped}
		spoilt := Wrapping{oldKEK, 1, make([]byte, len(old.Wrapped))}
		for name, c := range map[string]struct {
			old, next     Wrapping
			check, public []byte
			ok            bool
		}{
			"the same":                           {old, good, check, public, true},
			"the same, of version 1":             {old, good, nil, public, true},
			"another key":                        {old, swapped, check, public, false},
			"another key with its own check":     {old, swapped, wrong, public, false},
			"another key and its own public key": {old, swapped, nil, other.PublicKey(), false},
			"garbage":                            {old, garbage, check, public, false},
			"nothing":                            {old, Wrapping{nextKEK, 2, nil}, check, public, false},
			"under another version":              {old, Wrapping{nextKEK, 3, good.Wrapped}, check, public, false},
			"no old KEK, as committed":           {shut, good, check, public, true},
			"no old KEK, not as committed":       {shut, swapped, check, other.PublicKey(), false},
			"no old KEK, nothing committed":      {shut, good, nil, public, true},
			"no old KEK, garbage":                {shut, garbage, nil, public, false},
			"old does not open, as committed":    {spoilt, good, check, public, true},
			"old does not open, not committed":   {spoilt, swapped, wrong[:31], public, false},
		} {
			err := SameMaterial(b, node, c.old, c.next, c.check, c.public)
			if c.ok && err != nil {
				t.Errorf("%s, %s: %v", a, name, err)
			}
			if !c.ok {
				wantErrOpen(t, string(a)+", "+name, err)
			}
		}
		if b.Purpose == kms.Sign {
			wantErrOpen(t, string(a)+": another public key", SameMaterial(b, node, old, good, check, other.PublicKey()))
		}
	}
}

// TestForgetKEK drops one KEK version and what was opened under it.
func TestForgetKEK(t *testing.T) {
	root, _ := newRoot(t, pqc.MLKEM768P256)
	c := must[*Cache](t)(NewCache(root, Limits{TTL: time.Hour, MaxKEKs: 10, MaxKeys: 10}))
	defer c.Purge()
	kek := kekOf(t, 1)
	for version := uint32(1); version <= 2; version++ {
		b := bindingOf(kms.AES256GCM)
		b.KEK = version
		material := must[*secret.Bytes](t)(newKey(t, kms.AES256GCM, 3).Export())
		wrapped := must[[]byte](t)(WrapMaterial(kek, b, material))
		material.Destroy()
		kb := KEKBinding{Cluster: b.Cluster, Keyring: b.Keyring, Version: version, Protection: kms.Software}
		pub := root.PublicKey()
		sealed := must[[]Sealed](t)(SealKEK([]Recipient{{"fr-1", uint16(pub.Suite()), pub.Bytes()}}, kb, kek))
		_, release, err := c.Key(context.Background(), KeyRef{KeyBinding: b, Node: "fr-1", Protection: kms.Software, Wrapped: wrapped}, sealed[0].Sealed)
		if err != nil {
			t.Fatal(err)
		}
		release()
	}
	if s := c.Stats(); s.KEKs != 2 || s.Keys != 2 {
		t.Fatalf("%+v", s)
	}
	c.ForgetKEK(bindingOf(kms.AES256GCM).Keyring, 1)
	if s := c.Stats(); s.KEKs != 1 || s.Keys != 1 {
		t.Errorf("after one was forgotten: %+v", s)
	}
	c.ForgetKEK("another", 2)
	if s := c.Stats(); s.KEKs != 1 || s.Keys != 1 {
		t.Errorf("after another keyring's was: %+v", s)
	}
}
