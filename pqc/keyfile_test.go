package pqc

import (
	"bytes"
	"encoding/base64"
	"errors"
	"slices"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/conclave-kms/conclave/kms/secret"
)

var cheap = KeyFileOptions{WorkFactor: MinWorkFactor}

func newKeyFile(t testing.TB, passphrase string) (*HybridKey, []byte) {
	t.Helper()
	k := must[*HybridKey](t)(GenerateHybrid(nil))
	return k, must[[]byte](t)(EncryptKeyFile(k, mustSecret(t, []byte(passphrase)), cheap))
}

func TestKeyFileRoundTrip(t *testing.T) {
	k, file := newKeyFile(t, "correct horse")
	if !bytes.HasPrefix(file, []byte("-----BEGIN AGE ENCRYPTED FILE-----\n")) {
		t.Error("the file is not armoured")
	}
	if bytes.Contains(file, []byte("conclave-custodian-secret")) {
		t.Error("the payload is in the clear")
	}
	got := must[*HybridKey](t)(DecryptKeyFile(file, mustSecret(t, []byte("correct horse"))))
	if !bytes.Equal(got.PublicKey(), k.PublicKey()) {
		t.Fatal("another key came back")
	}
	sig := must[[]byte](t)(got.Sign([]byte("m"), []byte("c")))
	if err := VerifyHybrid(k.PublicKey(), []byte("m"), []byte("c"), sig); err != nil {
		t.Error(err)
	}
}

func TestKeyFileDefaultWorkFactor(t *testing.T) {
	k := must[*HybridKey](t)(GenerateHybrid(nil))
	file := must[[]byte](t)(EncryptKeyFile(k, mustSecret(t, []byte("p")), KeyFileOptions{}))
	raw := bytes.Join(bytes.Split(file, []byte("\n"))[1:4], nil)
	header := must[[]byte](t)(base64.StdEncoding.DecodeString(string(raw)))
	line, _, _ := strings.Cut(strings.SplitN(string(header), "\n", 2)[1], "\n")
	if !strings.HasPrefix(line, "-> scrypt ") || !strings.HasSuffix(line, " 18") {
		t.Errorf("the stanza is %q", line)
	}
	if _, err := decryptKeyFile(file, mustSecret(t, []byte("p")), 17); !errors.Is(err, ErrKeyFile) {
		t.Errorf("a work factor above the limit: %v", err)
	}
}

func TestKeyFileWrongPassphrase(t *testing.T) {
	_, file := newKeyFile(t, "correct horse")
	for _, p := range []string{"wrong", "correct horse ", ""} {
		if _, err := DecryptKeyFile(file, mustSecret(t, []byte(p))); !errors.Is(err, ErrPassphrase) || errors.Is(err, ErrKeyFile) {
			t.Errorf("%q: %v", p, err)
		}
	}
	if _, err := DecryptKeyFile(file, nil); !errors.Is(err, ErrPassphrase) {
		t.Errorf("no passphrase: %v", err)
	}
}

func TestKeyFileCorrupted(t *testing.T) {
	pass := mustSecret(t, []byte("p"))
	_, file := newKeyFile(t, "p")
	refuse := func(what string, b []byte) {
		t.Helper()
		k, err := DecryptKeyFile(b, pass)
		if k != nil || (!errors.Is(err, ErrKeyFile) && !errors.Is(err, ErrPassphrase)) {
			t.Errorf("%s: %v", what, err)
		}
	}
	expectKeyFile := func(what string, b []byte) {
		t.Helper()
		if _, err := DecryptKeyFile(b, pass); !errors.Is(err, ErrKeyFile) {
			t.Errorf("%s: %v", what, err)
		}
	}
	expectKeyFile("empty", nil)
	expectKeyFile("not armoured", []byte("age-encryption.org/v1\n"))
	expectKeyFile("cut", file[:len(file)/2])
	expectKeyFile("too long", bytes.Repeat([]byte("\n"), maxKeyFile+1))
	expectKeyFile("text after it", append(bytes.Clone(file), "more"...))
	lines := bytes.Split(file, []byte("\n"))
	for i := range lines[:len(lines)-2] {
		b := slices.Clone(lines)
		b[i] = bytes.Clone(b[i])
		swapCase(b[i], len(b[i])/2)
		refuse("damaged line", bytes.Join(b, []byte("\n")))
	}
	// The last line before the footer is payload: the damage is the file's.
	b := slices.Clone(lines)
	last := bytes.Clone(b[len(b)-3])
	swapCase(last, 0)
	b[len(b)-3] = last
	expectKeyFile("damaged payload", bytes.Join(b, []byte("\n")))
}

// swapCase changes one base64 letter, at i or after it.
func swapCase(b []byte, i int) {
	for ; i < len(b); i++ {
		if b[i] >= 'a' && b[i] <= 'z' || b[i] >= 'A' && b[i] <= 'Z' {
			b[i] ^= 0x20
			return
		}
	}
}

// modelPayload is a valid payload in ordinary memory.
func modelPayload(t testing.TB) []byte {
	t.Helper()
	seed := mustSecret(t, make([]byte, HybridSeedSize))
	defer seed.Destroy()
	p := must[*secret.Bytes](t)(keyFilePayload(seed))
	defer p.Destroy()
	return bytes.Clone(p.Reveal())
}

// Files that age can open but that are not key files.
func TestKeyFileOtherContents(t *testing.T) {
	pass := mustSecret(t, []byte("p"))
	good := modelPayload(t)
	seal := func(r age.Recipient, payload []byte) []byte {
		t.Helper()
		return must[[]byte](t)(encryptArmored(r, payload))
	}
	recipient := must[*age.ScryptRecipient](t)(age.NewScryptRecipient("p"))
	recipient.SetWorkFactor(MinWorkFactor)
	if _, err := DecryptKeyFile(seal(recipient, good), pass); err != nil {
		t.Fatalf("the model payload does not open: %v", err)
	}
	version := bytes.Replace(good, []byte("secret-1"), []byte("secret-2"), 1)
	suite := bytes.Clone(good)
	suite[len(keyFileMagic)+1] ^= 1
	identity := must[*age.X25519Identity](t)(age.GenerateX25519Identity())
	for name, file := range map[string][]byte{
		"empty payload":        seal(recipient, nil),
		"short payload":        seal(recipient, good[:len(good)-1]),
		"long payload":         seal(recipient, append(bytes.Clone(good), 0)),
		"another version":      seal(recipient, version),
		"another suite":        seal(recipient, suite),
		"no passphrase at all": seal(identity.Recipient(), good),
	} {
		if _, err := DecryptKeyFile(file, pass); !errors.Is(err, ErrKeyFile) || errors.Is(err, ErrPassphrase) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestEncryptKeyFileRefuses(t *testing.T) {
	k := must[*HybridKey](t)(GenerateHybrid(nil))
	pass := mustSecret(t, []byte("p"))
	for _, n := range []int{-1, 1, MinWorkFactor - 1, MaxWorkFactor + 1, 31} {
		if _, err := EncryptKeyFile(k, pass, KeyFileOptions{WorkFactor: n}); err == nil {
			t.Errorf("accepted work factor %d", n)
		}
	}
	if _, err := EncryptKeyFile(k, mustSecret(t, nil), cheap); !errors.Is(err, ErrPassphrase) {
		t.Errorf("empty passphrase: %v", err)
	}
	k.Destroy()
	if _, err := EncryptKeyFile(k, pass, cheap); !errors.Is(err, ErrKey) {
		t.Errorf("destroyed key: %v", err)
	}
}

func TestPublicLine(t *testing.T) {
	k := must[*HybridKey](t)(GenerateHybrid(nil))
	line := must[[]byte](t)(MarshalPublic(MLDSA65Ed25519, k.PublicKey()))
	if bytes.Count(line, []byte("\n")) != 1 || !bytes.HasPrefix(line, []byte("conclave-custodian-key-1 ")) {
		t.Error("not one line of the promised form")
	}
	for _, b := range [][]byte{line, bytes.TrimSpace(line)} {
		if suite, got, err := ParsePublic(b); err != nil || suite != MLDSA65Ed25519 || !bytes.Equal(got, k.PublicKey()) {
			t.Errorf("another key came back: %v, %v", suite, err)
		}
	}
	text := bytes.TrimSpace(line)
	other := bytes.Clone(text)
	other[len("conclave-custodian-key-1 ")] = 'A'
	for name, b := range map[string][]byte{
		"empty":         nil,
		"only the name": []byte("conclave-custodian-key-1 "),
		"other version": bytes.Replace(text, []byte("key-1"), []byte("key-2"), 1),
		"two newlines":  append(bytes.Clone(line), '\n'),
		"carriage":      append(bytes.Clone(text), '\r', '\n'),
		"leading space": append([]byte(" "), text...),
		"comment":       append(bytes.Clone(text), " fr-1"...),
		"short":         text[:len(text)-4],
		"line break":    append(append(bytes.Clone(text[:100]), '\n'), text[101:]...),
		"other suite":   other,
		"not base64":    append(bytes.Clone(text[:len(text)-1]), '!'),
	} {
		if _, _, err := ParsePublic(b); !errors.Is(err, ErrKeyFile) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := MarshalPublic(MLDSA65Ed25519, k.PublicKey()[1:]); !errors.Is(err, ErrPublicKey) {
		t.Error(err)
	}
	if _, err := MarshalPublic(MLKEM1024P384, k.PublicKey()); !errors.Is(err, ErrSuite) {
		t.Error(err)
	}
	for _, suite := range []SuiteID{ECDSAP256SHA256, ECDSAP384SHA384, Ed25519} {
		s, _ := Lookup(suite)
		pub := bytes.Repeat([]byte{4}, s.PublicKeySize)
		got, b, err := ParsePublic(must[[]byte](t)(MarshalPublic(suite, pub)))
		if err != nil || got != suite || !bytes.Equal(b, pub) {
			t.Errorf("%v: %v, %v", suite, got, err)
		}
	}
}

func TestFingerprint(t *testing.T) {
	// SHA-256 of nothing, from FIPS 180-4's well-known answer e3b0c442...
	if got := Fingerprint(nil); got != "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU" {
		t.Error(got)
	}
}
