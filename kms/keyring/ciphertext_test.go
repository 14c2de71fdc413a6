package keyring

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
)

func TestFormat1KnownAnswers(t *testing.T) {
	for _, v := range loadVectors(t).Messages {
		t.Run(v.Name, func(t *testing.T) {
			header := v.Ciphertext[:headerSize]
			if got := messageSecretInput(header); !bytes.Equal(got, v.MessageSecretInput) {
				t.Errorf("message secret input is %x", got)
			}
			src := memoryHMAC{v.Key.secret(t)}
			ms := must[[]byte](t)(src.HMAC(bg, nil, v.MessageSecretInput))
			if !bytes.Equal(ms, v.MessageSecret) {
				t.Error("message secret is another")
			}
			aad := must[[]byte](t)(appendContext(header, v.Context))
			if !bytes.Equal(aad, v.AAD) {
				t.Errorf("AAD is %x", aad)
			}
			var keys messageKeys
			keys.derive(ms, aad)
			if !bytes.Equal(keys.key(), v.MessageKey) || !bytes.Equal(keys.commitment(), v.Commitment) {
				t.Error("message key or commitment is another")
			}
			got := must[[]byte](t)(open(bg, src, v.KeyID.keyID(t), v.Version, v.Context, v.Ciphertext))
			if !bytes.Equal(got, v.Plaintext) {
				t.Error("plaintext is another")
			}
			h := must[Header](t)(ParseHeader(v.Ciphertext))
			if h.KeyID != v.KeyID.keyID(t) || h.Version != v.Version || h.Suite != 0xC201 {
				t.Errorf("header is %+v", h)
			}
		})
	}
}

func TestRoundTrip(t *testing.T) {
	m := newKey(t, kms.AES256GCM, 1)
	for _, n := range []int{0, 1, 15, 16, 17, 1024, 64 << 10, MaxPlaintext} {
		for _, context := range []Context{nil, {}, {"service": "payroll"}, {"a": "", "b": strings.Repeat("x", 4000)}} {
			plaintext := bytes.Repeat([]byte{0x5a}, n)
			ct := must[[]byte](t)(m.Encrypt(bg, context, plaintext))
			if len(ct) != n+Overhead || cap(ct) != len(ct) {
				t.Fatalf("%d bytes became %d (capacity %d), Overhead says %d", n, len(ct), cap(ct), n+Overhead)
			}
			if got := must[[]byte](t)(m.Decrypt(bg, context, ct)); got == nil || !bytes.Equal(got, plaintext) {
				t.Fatal("decrypted something else")
			}
		}
	}
	if _, err := m.Encrypt(bg, nil, make([]byte, MaxPlaintext+1)); kms.KindOf(err) != kms.TooLarge {
		t.Errorf("a plaintext that is too long: %v", err)
	}
	ct := must[[]byte](t)(m.Encrypt(bg, nil, []byte("nil and empty are the same")))
	must[[]byte](t)(m.Decrypt(bg, Context{}, ct))
}

func TestNonceIsFresh(t *testing.T) {
	m := newKey(t, kms.AES256GCM, 1)
	seen := map[string]bool{}
	for range 1000 {
		ct := must[[]byte](t)(m.Encrypt(bg, nil, nil))
		nonce := string(ct[headerSize-nonceSize : headerSize])
		if seen[nonce] || nonce == strings.Repeat("\x00", nonceSize) {
			t.Fatal("a nonce came twice, or is zero")
		}
		seen[nonce] = true
	}
}

// TestEveryBitFlip flips each bit of a ciphertext in turn.
func TestEveryBitFlip(t *testing.T) {
	m := newKey(t, kms.AES256GCM, 1)
	context := Context{"service": "payroll"}
	ct := must[[]byte](t)(m.Encrypt(bg, context, []byte("thirty-one bytes of plain text.")))
	for i := range ct {
		for bit := range 8 {
			b := bytes.Clone(ct)
			b[i] ^= 1 << bit
			got, err := m.Decrypt(bg, context, b)
			wantErrOpen(t, fmt.Sprintf("byte %d bit %d", i, bit), err)
			if got != nil {
				t.Fatal("plaintext came with the error")
			}
		}
	}
}

func TestDecryptRefuses(t *testing.T) {
	m := newKey(t, kms.AES256GCM, 1)
	context := Context{"a": "1", "b": "2"}
	ct := must[[]byte](t)(m.Encrypt(bg, context, []byte("secret")))
	for n := range len(ct) {
		_, err := m.Decrypt(bg, context, ct[:n])
		wantErrOpen(t, fmt.Sprint("cut to ", n), err)
	}
	_, err := m.Decrypt(bg, context, append(bytes.Clone(ct), 0))
	wantErrOpen(t, "extended", err)
	_, err = m.Decrypt(bg, context, append(bytes.Clone(ct), make([]byte, MaxPlaintext)...))
	wantErrOpen(t, "too long", err)
	for what, c := range map[string]Context{
		"no context": nil, "a pair less": {"a": "1"}, "a pair more": {"a": "1", "b": "2", "c": ""}, "another value": {"a": "1", "b": "3"},
		"another name": {"a": "1", "B": "2"}, "swapped": {"a": "2", "b": "1"}, "shifted": {"a": "1b", "": "2"},
		"not UTF-8": {"a": "1", "b": "\xff"}, "too long": {"a": strings.Repeat("x", MaxContext)},
	} {
		_, err := m.Decrypt(bg, c, ct)
		wantErrOpen(t, what, err)
	}
	_, err = newKey(t, kms.AES256GCM, 2).Decrypt(bg, context, ct)
	wantErrOpen(t, "another key with the same id", err)
	for what, change := range map[string]func(*KeyBinding){
		"another key id":  func(b *KeyBinding) { b.KeyID[3] ^= 1 },
		"another version": func(b *KeyBinding) { b.Version++ },
	} {
		b := bindingOf(kms.AES256GCM)
		change(&b)
		other := must[*Material](t)(NewMaterial(b, must[*secret.Bytes](t)(m.Export())))
		_, err := other.Decrypt(bg, context, ct)
		wantErrOpen(t, what, err)
		// The header alone is no protection: the key also derives another secret.
		relabelled := append(appendHeader(nil, b.KeyID, b.Version), ct[headerSize-nonceSize:]...)
		_, err = other.Decrypt(bg, context, relabelled)
		wantErrOpen(t, what+", relabelled", err)
		other.Destroy()
	}
	_, err = newKey(t, kms.HMACSHA256, 1).Decrypt(bg, context, ct)
	wantErrOpen(t, "a key of another purpose", err)
}

// TestSourceErrors wants the error of a key that cannot be reached to come
// through as it is: it says nothing of the ciphertext.
func TestSourceErrors(t *testing.T) {
	m := newKey(t, kms.AES256GCM, 1)
	ct := must[[]byte](t)(m.Encrypt(bg, nil, []byte("x")))
	src := failingHMAC{errBroken}
	if _, err := seal(bg, src, testID, 2, nil, nil); !errors.Is(err, errBroken) {
		t.Errorf("seal: %v", err)
	}
	if _, err := open(bg, src, testID, 2, nil, ct); !errors.Is(err, errBroken) {
		t.Errorf("open: %v", err)
	}
	_, err := seal(bg, failingHMAC{}, testID, 2, nil, nil)
	wantKind(t, "a source that returns nothing", err, kms.Internal)
}

func TestParseHeaderRefuses(t *testing.T) {
	good := append(appendHeader(nil, testID, 1), make([]byte, Overhead-headerSize+nonceSize)...)
	must[Header](t)(ParseHeader(good))
	for what, change := range map[string]func([]byte){
		"magic":     func(b []byte) { b[0] = 'X' },
		"format":    func(b []byte) { b[2] = 2 },
		"suite":     func(b []byte) { b[4]++ },
		"version 0": func(b []byte) { binary.BigEndian.PutUint32(b[21:], 0) },
	} {
		b := bytes.Clone(good)
		change(b)
		_, err := ParseHeader(b)
		wantErrOpen(t, what, err)
	}
	for n := range good {
		_, err := ParseHeader(good[:n])
		wantErrOpen(t, fmt.Sprint("cut to ", n), err)
	}
}

// decodeContext is the inverse of EncodeContext, written for the tests.
func decodeContext(b []byte) (Context, bool) {
	next := func(n int) ([]byte, bool) {
		if len(b) < n {
			return nil, false
		}
		head := b[:n]
		b = b[n:]
		return head, true
	}
	number := func() (int, bool) {
		n, ok := next(2)
		if !ok {
			return 0, false
		}
		return int(binary.BigEndian.Uint16(n)), true
	}
	text := func() (string, bool) {
		n, ok := number()
		if !ok {
			return "", false
		}
		s, ok := next(n)
		return string(s), ok
	}
	pairs, ok := number()
	if !ok {
		return nil, false
	}
	c := Context{}
	last := ""
	for range pairs {
		name, ok1 := text()
		value, ok2 := text()
		if !ok1 || !ok2 || name <= last {
			return nil, false
		}
		c[name], last = value, name
	}
	return c, len(b) == 0
}

func equalContext(a, b Context) bool {
	if len(a) != len(b) {
		return false
	}
	for k, v := range a {
		if w, ok := b[k]; !ok || v != w {
			return false
		}
	}
	return true
}

func TestEncodeContext(t *testing.T) {
	for _, v := range []struct {
		c    Context
		want string
	}{
		{nil, "\x00\x00"},
		{Context{}, "\x00\x00"},
		{Context{"b": "", "a": "xy"}, "\x00\x02\x00\x01a\x00\x02xy\x00\x01b\x00\x00"},
		{Context{"a": "1", "B": "2"}, "\x00\x02\x00\x01B\x00\x012\x00\x01a\x00\x011"},
	} {
		if got := must[[]byte](t)(EncodeContext(v.c)); string(got) != v.want {
			t.Errorf("%v encodes to %q, want %q", v.c, got, v.want)
		}
	}
	most := Context{}
	for i := range MaxContextPairs {
		most[fmt.Sprint("name-", i)] = "v"
	}
	must[[]byte](t)(EncodeContext(most))
	most["one more"] = ""
	_, err := EncodeContext(most)
	wantKind(t, "a pair too many", err, kms.TooLarge)
	longest := Context{"n": strings.Repeat("v", MaxContext-2-4-1)}
	if b := must[[]byte](t)(EncodeContext(longest)); len(b) != MaxContext {
		t.Errorf("the longest context has %d bytes", len(b))
	}
	longest["n"] += "v"
	_, err = EncodeContext(longest)
	wantKind(t, "a byte too many", err, kms.TooLarge)
	for what, c := range map[string]Context{"no name": {"": "v"}, "name not UTF-8": {"\xff": "v"}, "value not UTF-8": {"n": "\xff"}} {
		_, err := EncodeContext(c)
		wantKind(t, what, err, kms.Invalid)
	}
}

func TestEncodeContextProperty(t *testing.T) {
	text := rapid.StringN(0, 20, 60)
	contexts := rapid.MapOfN(text.Filter(func(s string) bool { return s != "" }), text, 0, 12)
	rapid.Check(t, func(t *rapid.T) {
		a, b := Context(contexts.Draw(t, "a")), Context(contexts.Draw(t, "b"))
		ea, err := EncodeContext(a)
		if err != nil {
			t.Fatal(err)
		}
		eb, err := EncodeContext(b)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(ea, eb) != equalContext(a, b) {
			t.Fatal("two contexts share an encoding, or one has two")
		}
		if back, ok := decodeContext(ea); !ok || !equalContext(back, a) {
			t.Fatal("the encoding does not say what was encoded")
		}
	})
}
