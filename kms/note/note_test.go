package note

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
)

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// signer is a witness with its private keys.
type signer struct {
	Witness
	ec *ecdsa.PrivateKey
	pq *pqc.MLDSA44Key
}

func newSigner(t testing.TB, name string, suite pqc.SuiteID) *signer {
	t.Helper()
	curve := elliptic.P256()
	if suite == pqc.ECDSAP384SHA384 {
		curve = elliptic.P384()
	}
	ec := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(curve, rand.Reader))
	seed := must[*secret.Bytes](t)(pqc.GenerateMLDSA44Seed(nil))
	defer seed.Destroy()
	pq := must[*pqc.MLDSA44Key](t)(pqc.NewMLDSA44Key(seed))
	public := must[[]byte](t)(ec.PublicKey.Bytes())
	return &signer{Witness{Name: name, SigningSuite: suite, Signing: public, MLDSA: pq.PublicKey()}, ec, pq}
}

func (s *signer) sign(t testing.TB, c Checkpoint, time uint64) Signature {
	t.Helper()
	digest := must[[]byte](t)(HardwareDigest(s.SigningSuite, c))
	r, v, err := ecdsa.Sign(rand.Reader, s.ec, digest)
	if err != nil {
		t.Fatal(err)
	}
	n := (s.ec.Params().BitSize + 7) / 8
	sig := append(r.FillBytes(make([]byte, n)), v.FillBytes(make([]byte, n))...)
	return Signature{Time: time, Hardware: sig, MLDSA: must[[]byte](t)(s.pq.Sign(CosignedMessage(s.Name, time, c), nil))}
}

func sample() Checkpoint {
	root := sha256.Sum256([]byte("root"))
	return Checkpoint{Origin: Origin("00112233445566778899aabbccddeeff", AccessLog("fr-1")), Size: 20852163, Root: root[:], Extensions: []string{StateExtension(root[:])}}
}

// The text of c2sp.org/tlog-checkpoint's example.
func TestCheckpointExample(t *testing.T) {
	text := "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"
	c := must[Checkpoint](t)(Parse([]byte(text)))
	if c.Origin != "example.com/behind-the-sofa" || c.Size != 20852163 || hex.EncodeToString(c.Root) != "0ac5186a91863e8e1d90c808014aa89bf5da8e3ee1d9f07630f0378f68f1ab62" || len(c.Extensions) != 0 {
		t.Errorf("%+v", c)
	}
	if string(c.Marshal()) != text {
		t.Errorf("%q", c.Marshal())
	}
}

func TestParseRefuses(t *testing.T) {
	const root = "CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I="
	for _, text := range []string{
		"", "\n", "o\n1\n", "o\n1\n" + root, "o\n01\n" + root + "\n", "o\n+1\n" + root + "\n", "o\n-1\n" + root + "\n", "o\n18446744073709551616\n" + root + "\n",
		"\n1\n" + root + "\n", "o o\n1\n" + root + "\n", "o+o\n1\n" + root + "\n", "o\n1\n" + root + "\n\n", "o\n1\n" + root + "\nx\x01\n", "o\n1\n" + root + "\n\xff\n",
		"o\n1\n" + strings.Replace(root, "I=", "J=", 1) + "\n", "o\n1\n" + root[:40] + "\n", "o\n1\n\n", "o\r\n1\n" + root + "\n",
		strings.Repeat("o", MaxName+1) + "\n1\n" + root + "\n", "o\n1\n" + root + "\n" + strings.Repeat("x\n", MaxExtensions+1),
		"o\n1\n" + root + "\n" + strings.Repeat("x", MaxExtension+1) + "\n", strings.Repeat("x", 1<<20),
	} {
		if c, err := Parse([]byte(text)); !errors.Is(err, kms.Invalid) {
			t.Errorf("%.60q: %v, %v", text, c, err)
		}
	}
}

// What is signed is laid out as in c2sp.org/tlog-cosignature, byte for byte.
func TestCosignedMessage(t *testing.T) {
	c := Checkpoint{Origin: "log", Size: 0x0102, Root: bytes.Repeat([]byte{0xAA}, 32)}
	want := "737562747265652f76310a00" + "02" + "7731" + "0000000000000005" + "03" + "6c6f67" + "0000000000000000" + "0000000000000102" + strings.Repeat("aa", 32)
	if got := hex.EncodeToString(CosignedMessage("w1", 5, c)); got != want {
		t.Errorf("%s\n%s", got, want)
	}
}

func TestVerify(t *testing.T) {
	for _, suite := range []pqc.SuiteID{pqc.ECDSAP256SHA256, pqc.ECDSAP384SHA384} {
		s := newSigner(t, KeyName("00112233445566778899aabbccddeeff", "de-1"), suite)
		c := sample()
		sig := s.sign(t, c, 1700000000)
		if err := s.Verify(c, sig); err != nil {
			t.Fatal(err)
		}
		for name, alter := range map[string]func(w *Witness, c *Checkpoint, s *Signature){
			"origin":    func(_ *Witness, c *Checkpoint, _ *Signature) { c.Origin += "x" },
			"size":      func(_ *Witness, c *Checkpoint, _ *Signature) { c.Size-- },
			"root":      func(_ *Witness, c *Checkpoint, _ *Signature) { c.Root = bytes.Repeat([]byte{1}, 32) },
			"extension": func(_ *Witness, c *Checkpoint, _ *Signature) { c.Extensions = nil },
			"time":      func(_ *Witness, _ *Checkpoint, s *Signature) { s.Time++ },
			"hardware":  func(_ *Witness, _ *Checkpoint, s *Signature) { s.Hardware = bytes.Repeat([]byte{1}, len(s.Hardware)) },
			"mldsa":     func(_ *Witness, _ *Checkpoint, s *Signature) { s.MLDSA = make([]byte, len(s.MLDSA)) },
			"name":      func(w *Witness, _ *Checkpoint, _ *Signature) { w.Name += "x" },
			"key":       func(w *Witness, _ *Checkpoint, _ *Signature) { w.MLDSA = newSigner(t, "x", suite).MLDSA },
		} {
			w, c, sig := s.Witness, sample(), sig
			alter(&w, &c, &sig)
			if err := w.Verify(c, sig); !errors.Is(err, kms.BadSignature) {
				t.Errorf("another %s: %v", name, err)
			}
		}
		for name, alter := range map[string]func(w *Witness, c *Checkpoint, s *Signature){
			"no time":   func(_ *Witness, _ *Checkpoint, s *Signature) { s.Time = 0 },
			"no name":   func(w *Witness, _ *Checkpoint, _ *Signature) { w.Name = "" },
			"long name": func(w *Witness, _ *Checkpoint, _ *Signature) { w.Name = strings.Repeat("x", MaxName+1) },
			"no root":   func(_ *Witness, c *Checkpoint, _ *Signature) { c.Root = nil },
		} {
			w, c, sig := s.Witness, sample(), sig
			alter(&w, &c, &sig)
			if err := w.Verify(c, sig); !errors.Is(err, kms.Invalid) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

func TestNote(t *testing.T) {
	a, b := newSigner(t, KeyName("c", "fr-1"), pqc.ECDSAP384SHA384), newSigner(t, KeyName("c", "jp-1"), pqc.ECDSAP256SHA256)
	c := sample()
	signed := must[[]byte](t)(Join(c, Signed{a.Witness, a.sign(t, c, 1)}, Signed{b.Witness, b.sign(t, c, 2)}))
	got, names, err := Open(signed, a.Witness, b.Witness)
	if err != nil || len(names) != 2 || names[0] != a.Name || names[1] != b.Name || !bytes.Equal(got.Marshal(), c.Marshal()) {
		t.Fatalf("%v %v %v", got, names, err)
	}
	if _, names, err := Open(signed, b.Witness); err != nil || len(names) != 1 {
		t.Errorf("one known witness: %v %v", names, err)
	}
	if _, _, err := Open(signed, newSigner(t, a.Name, pqc.ECDSAP384SHA384).Witness); !errors.Is(err, kms.BadSignature) {
		t.Errorf("no known witness: %v", err)
	}
	// A line alone is no signature of a witness, and one that is wrong spoils the note.
	lines := strings.SplitAfter(string(signed), "\n")
	without := func(i int) []byte {
		return []byte(strings.Join(append(append([]string{}, lines[:i]...), lines[i+1:]...), ""))
	}
	first := len(lines) - 5 // four signature lines and what follows the last newline
	for i := range 4 {
		_, names, err := Open(without(first+i), a.Witness, b.Witness)
		if err != nil || len(names) != 1 {
			t.Errorf("without line %d: %v %v", i, names, err)
		}
	}
	ends := len(signed) - 2 // the last character, some of whose bits say nothing
	for i := 0; i < len(signed); i++ {
		if i%37 != 0 && i < ends-2 {
			continue
		}
		bad := bytes.Clone(signed)
		bad[i] ^= 1
		if c, names, err := Open(bad, a.Witness, b.Witness); err == nil && (len(names) == 2 || !bytes.Equal(c.Marshal(), sample().Marshal())) {
			t.Fatalf("with byte %d altered it is taken, signed by %v", i, names)
		}
	}
}

// The note in testdata was made by this package and verified with OpenSSL's ECDSA and
// ML-DSA-44, through Python's cryptography 48, by a program written after the
// specifications. It holds the format still.
func TestNoteVector(t *testing.T) {
	read := func(name string) []byte { return must[[]byte](t)(os.ReadFile("testdata/" + name)) }
	point := must[[]byte](t)(hex.DecodeString(strings.TrimSpace(string(read("hardware.hex")))))
	mldsa := must[[]byte](t)(hex.DecodeString(strings.TrimSpace(string(read("mldsa.hex")))))
	w := Witness{Name: KeyName("00112233445566778899aabbccddeeff", "de-1"), SigningSuite: pqc.ECDSAP384SHA384, Signing: point, MLDSA: mldsa}
	c, names, err := Open(read("checkpoint.note"), w)
	if err != nil || len(names) != 1 || !bytes.Equal(c.Marshal(), sample().Marshal()) {
		t.Errorf("%v %v %v", c, names, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(sample().Marshal())
	f.Add([]byte("o\n1\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\nx\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := Parse(text)
		if err == nil && (!bytes.Equal(c.Marshal(), text) || c.Validate() != nil) {
			t.Errorf("%q is taken for %q", text, c.Marshal())
		}
	})
}

func FuzzOpen(f *testing.F) {
	s := newSigner(f, "w", pqc.ECDSAP256SHA256)
	signed := must[[]byte](f)(Join(sample(), Signed{s.Witness, s.sign(f, sample(), 1)}))
	f.Add(signed)
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, _, err := Open(b, s.Witness); err == nil && !bytes.Equal(c.Marshal(), sample().Marshal()) {
			t.Error("another checkpoint is taken for signed")
		}
	})
}
