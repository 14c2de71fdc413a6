package pqc

import (
	"bytes"
	"crypto/ecdh"
	"crypto/hpke"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/conclave-kms/conclave/kms/secret"
)

var kemSuites = []SuiteID{MLKEM768P256, MLKEM1024P384, XWing}

func eachKEM(t *testing.T, f func(t *testing.T, id SuiteID)) {
	t.Helper()
	for _, id := range kemSuites {
		t.Run(id.String(), func(t *testing.T) { f(t, id) })
	}
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func mustSecret(t testing.TB, b []byte) *secret.Bytes {
	t.Helper()
	return must[*secret.Bytes](t)(secret.Copy(b))
}

// device is a classical half that can count, fail and answer wrongly.
type device struct {
	ecdh.KeyExchanger
	calls  int
	err    error
	answer []byte
}

func (d *device) ECDH(peer *ecdh.PublicKey) ([]byte, error) {
	d.calls++
	if d.err != nil {
		return nil, d.err
	}
	if d.answer != nil {
		return d.answer, nil
	}
	return d.KeyExchanger.ECDH(peer)
}

// newDeviceKey returns a key whose classical half is a device.
func newDeviceKey(t testing.TB, id SuiteID) (*PrivateKey, *device) {
	t.Helper()
	s := must[*kemSuite](t)(lookupKEM(id))
	seed := must[*secret.Bytes](t)(GenerateSeed(nil))
	defer seed.Destroy()
	d := &device{KeyExchanger: must[*ecdh.PrivateKey](t)(s.curve.GenerateKey(rand.Reader))}
	return must[*PrivateKey](t)(NewPrivateKey(id, seed, d)), d
}

func TestSealOpen(t *testing.T) {
	eachKEM(t, func(t *testing.T, id SuiteID) {
		k, _ := newDeviceKey(t, id)
		s, _ := Lookup(id)
		pub := must[*PublicKey](t)(ParsePublicKey(id, k.PublicKey().Bytes()))
		if !pub.Equal(k.PublicKey()) || pub.Suite() != id || k.Suite() != id {
			t.Fatal("the parsed public key is another key")
		}
		for _, n := range []int{0, 1, 32, 4096} {
			plaintext := bytes.Repeat([]byte{7}, n)
			sealed := must[[]byte](t)(pub.Seal([]byte("info"), []byte("aad"), plaintext))
			if len(sealed) != n+s.Overhead {
				t.Fatalf("sealed %d bytes to %d, the table says %d", n, len(sealed), n+s.Overhead)
			}
			got := must[[]byte](t)(k.Open([]byte("info"), []byte("aad"), sealed))
			if !bytes.Equal(got, plaintext) {
				t.Fatal("opened something else than was sealed")
			}
		}
	})
}

func TestOpenRefusesTampering(t *testing.T) {
	eachKEM(t, func(t *testing.T, id SuiteID) {
		k, _ := newDeviceKey(t, id)
		sealed := must[[]byte](t)(k.PublicKey().Seal([]byte("info"), []byte("aad"), []byte("secret")))
		refuse := func(what string, info, aad, b []byte) {
			t.Helper()
			if got, err := k.Open(info, aad, b); !errors.Is(err, ErrOpen) || errors.Is(err, ErrDevice) || got != nil {
				t.Errorf("%s: got %d bytes, error %v", what, len(got), err)
			}
		}
		refuse("other info", []byte("inf0"), []byte("aad"), sealed)
		refuse("other aad", []byte("info"), nil, sealed)
		for i := 0; i < len(sealed); i += 1 + len(sealed)/97 {
			b := bytes.Clone(sealed)
			b[i] ^= 1
			refuse(fmt.Sprint("bit flipped in byte ", i), []byte("info"), []byte("aad"), b)
		}
		for _, n := range []int{0, 1, 2, 3, len(sealed) / 2, len(sealed) - 1} {
			refuse(fmt.Sprint("cut to ", n), []byte("info"), []byte("aad"), sealed[:n])
		}
		refuse("extended", []byte("info"), []byte("aad"), append(bytes.Clone(sealed), 0))
		for _, other := range kemSuites {
			if other != id {
				b := bytes.Clone(sealed)
				binary.BigEndian.PutUint16(b, uint16(other))
				refuse("relabelled as "+other.String(), []byte("info"), []byte("aad"), b)
			}
		}
		stranger, _ := newDeviceKey(t, id)
		if _, err := stranger.Open([]byte("info"), []byte("aad"), sealed); !errors.Is(err, ErrOpen) {
			t.Errorf("another key: %v", err)
		}
	})
}

func TestDeviceFailureIsNotForgery(t *testing.T) {
	eachKEM(t, func(t *testing.T, id SuiteID) {
		k, d := newDeviceKey(t, id)
		sealed := must[[]byte](t)(k.PublicKey().Seal(nil, nil, []byte("x")))
		expectDevice := func(what string, k *PrivateKey, cause error) {
			t.Helper()
			_, err := k.Open(nil, nil, sealed)
			if !errors.Is(err, ErrDevice) || errors.Is(err, ErrOpen) || (cause != nil && !errors.Is(err, cause)) {
				t.Errorf("%s: %v", what, err)
			}
		}
		gone := errors.New("device removed")
		expectDevice("error", k.WithExchanger(&device{KeyExchanger: d.KeyExchanger, err: gone}), gone)
		expectDevice("short secret", k.WithExchanger(&device{KeyExchanger: d.KeyExchanger, answer: []byte{1}}), nil)
		expectDevice("empty secret", k.WithExchanger(&device{KeyExchanger: d.KeyExchanger, answer: []byte{}}), nil)
		expectDevice("nil exchanger", k.WithExchanger(nil), nil)
		other, otherDevice := newDeviceKey(t, id)
		expectDevice("another key's exchanger", k.WithExchanger(otherDevice), nil)
		_ = other
		if _, err := k.Open(nil, nil, sealed); err != nil {
			t.Fatalf("the key itself no longer opens: %v", err)
		}
	})
}

// A forged point must not reach the device: its error would be taken for the
// device's.
func TestInvalidPointsNeverReachTheDevice(t *testing.T) {
	eachKEM(t, func(t *testing.T, id SuiteID) {
		k, d := newDeviceKey(t, id)
		s := k.suite
		sealed := must[[]byte](t)(k.PublicKey().Seal(nil, nil, []byte("x")))
		point := sealed[2+s.pqCt : 2+s.EncSize]
		bad := [][]byte{make([]byte, len(point)), bytes.Repeat([]byte{0xff}, len(point))}
		if id == XWing {
			// Points of low order and their non-canonical encodings (RFC 7748, section 7).
			one := make([]byte, 32)
			one[0] = 1
			minusOne := bytes.Repeat([]byte{0xff}, 32)
			minusOne[0], minusOne[31] = 0xec, 0x7f
			bad = [][]byte{make([]byte, 32), one, minusOne}
		} else {
			off := bytes.Clone(point)
			off[len(off)-1] ^= 1
			bad = append(bad, off)
		}
		d.calls = 0
		for i, b := range bad {
			forged := bytes.Clone(sealed)
			copy(forged[2+s.pqCt:], b)
			if _, err := k.Open(nil, nil, forged); !errors.Is(err, ErrOpen) {
				t.Errorf("point %d: %v", i, err)
			}
		}
		if d.calls != 0 {
			t.Errorf("the device was asked %d times", d.calls)
		}
	})
}

func TestNewPrivateKeyRefuses(t *testing.T) {
	p256 := must[*ecdh.PrivateKey](t)(ecdh.P256().GenerateKey(rand.Reader))
	seed := must[*secret.Bytes](t)(GenerateSeed(nil))
	short := mustSecret(t, make([]byte, 63))
	for name, c := range map[string]struct {
		suite SuiteID
		seed  *secret.Bytes
		t     KeyExchanger
		want  error
	}{
		"curve of another suite": {MLKEM1024P384, seed, p256, ErrKey},
		"no classical half":      {MLKEM768P256, seed, nil, ErrKey},
		"short seed":             {MLKEM768P256, short, p256, ErrKey},
		"no seed":                {MLKEM768P256, nil, p256, ErrKey},
		"signature suite":        {Ed25519, seed, p256, ErrSuite},
		"unknown suite":          {0x1234, seed, p256, ErrSuite},
	} {
		if _, err := NewPrivateKey(c.suite, c.seed, c.t); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestParsePublicKeyRefuses(t *testing.T) {
	eachKEM(t, func(t *testing.T, id SuiteID) {
		k, _ := newDeviceKey(t, id)
		b := k.PublicKey().Bytes()
		tooLarge := bytes.Clone(b)
		copy(tooLarge, []byte{0xff, 0xff, 0xff}) // coefficients above q
		cases := map[string][]byte{
			"empty": nil, "short": b[1:], "long": append(bytes.Clone(b), 0),
			"modulus": tooLarge,
			"no point": slices.Concat(b[:k.suite.PublicKeySize-(k.suite.EncSize-k.suite.pqCt)],
				make([]byte, k.suite.EncSize-k.suite.pqCt)),
		}
		for name, c := range cases {
			if _, err := ParsePublicKey(id, c); !errors.Is(err, ErrPublicKey) {
				t.Errorf("%s: %v", name, err)
			}
		}
		if _, err := ParsePublicKey(Ed25519, b); !errors.Is(err, ErrSuite) {
			t.Errorf("signature suite: %v", err)
		}
	})
}

func TestPublicKeyBytesAreACopy(t *testing.T) {
	k, _ := newDeviceKey(t, MLKEM768P256)
	b := k.PublicKey().Bytes()
	pub := must[*PublicKey](t)(ParsePublicKey(MLKEM768P256, b))
	clear(b)
	if !pub.Equal(k.PublicKey()) {
		t.Fatal("the key changed with the caller's slice")
	}
	if pub.Equal(nil) || (*PublicKey)(nil).Equal(pub) {
		t.Fatal("a key equals nil")
	}
}

func stdlibSuite(id SuiteID) (hpke.KEM, hpke.KDF) {
	switch id {
	case MLKEM768P256:
		return hpke.MLKEM768P256(), hpke.HKDFSHA256()
	case MLKEM1024P384:
		return hpke.MLKEM1024P384(), hpke.HKDFSHA384()
	default:
		return hpke.MLKEM768X25519(), hpke.HKDFSHA256()
	}
}

// What the standard library seals with its own types alone we open, and the
// reverse, also where both make the key from one seed.
func TestInteropWithStandardLibrary(t *testing.T) {
	info, aad, plaintext := []byte("info"), []byte("aad"), []byte("attack at dawn")
	eachKEM(t, func(t *testing.T, id SuiteID) {
		kem, kdf := stdlibSuite(id)

		t.Run("they seal, we open", func(t *testing.T) {
			k, _ := newDeviceKey(t, id)
			theirs := must[hpke.PublicKey](t)(kem.NewPublicKey(k.PublicKey().Bytes()))
			enc, sender, err := hpke.NewSender(theirs, kdf, hpke.AES256GCM(), info)
			if err != nil {
				t.Fatal(err)
			}
			ct := must[[]byte](t)(sender.Seal(aad, plaintext))
			sealed := slices.Concat(binary.BigEndian.AppendUint16(nil, kem.ID()), enc, ct)
			if got := must[[]byte](t)(k.Open(info, aad, sealed)); !bytes.Equal(got, plaintext) {
				t.Fatal("opened something else")
			}
		})
		t.Run("we seal, they open", func(t *testing.T) {
			theirs := must[hpke.PrivateKey](t)(kem.GenerateKey())
			ours := must[*PublicKey](t)(ParsePublicKey(id, theirs.PublicKey().Bytes()))
			sealed := must[[]byte](t)(ours.Seal(info, aad, plaintext))
			s, _ := Lookup(id)
			r := must[*hpke.Recipient](t)(hpke.NewRecipient(sealed[2:2+s.EncSize], theirs, kdf, hpke.AES256GCM(), info))
			if got := must[[]byte](t)(r.Open(aad, sealed[2+s.EncSize:])); !bytes.Equal(got, plaintext) {
				t.Fatal("opened something else")
			}
		})
		t.Run("one seed, one key", func(t *testing.T) {
			theirs := must[hpke.PrivateKey](t)(kem.GenerateKey())
			seed := must[[]byte](t)(theirs.Bytes())
			ours := must[*SoftwareKey](t)(NewSoftwareKey(id, mustSecret(t, seed)))
			if !bytes.Equal(ours.PublicKey().Bytes(), theirs.PublicKey().Bytes()) {
				t.Fatal("the public keys differ")
			}
		})
	})
}

func TestSoftwareKeyMarshal(t *testing.T) {
	eachKEM(t, func(t *testing.T, id SuiteID) {
		k := must[*SoftwareKey](t)(GenerateKey(id))
		b := must[*secret.Bytes](t)(k.Marshal())
		defer b.Destroy()
		again := must[*SoftwareKey](t)(ParseSoftwareKey(b))
		sealed := must[[]byte](t)(k.PublicKey().Seal(nil, nil, []byte("x")))
		if got := must[[]byte](t)(again.Open(nil, nil, sealed)); string(got) != "x" {
			t.Fatal("the marshalled key is another key")
		}
		for _, bad := range [][]byte{nil, b.Reveal()[1:], append(bytes.Clone(b.Reveal()), 0), slices.Concat([]byte{0xc1, 0x03}, b.Reveal()[2:])} {
			if _, err := ParseSoftwareKey(mustSecret(t, bad)); !errors.Is(err, ErrKey) && !errors.Is(err, ErrSuite) {
				t.Errorf("%d bytes: %v", len(bad), err)
			}
		}
		k.Destroy()
		k.Destroy()
		if _, err := k.Marshal(); !errors.Is(err, ErrKey) {
			t.Errorf("marshalled a destroyed key: %v", err)
		}
	})
	if _, err := GenerateKey(Ed25519); !errors.Is(err, ErrSuite) {
		t.Error(err)
	}
	if _, err := NewSoftwareKey(XWing, mustSecret(t, make([]byte, 31))); !errors.Is(err, ErrKey) {
		t.Error(err)
	}
}

func TestGenerateSeedReadsAll(t *testing.T) {
	seed := must[*secret.Bytes](t)(GenerateSeed(bytes.NewReader(bytes.Repeat([]byte{9}, 64))))
	defer seed.Destroy()
	if !bytes.Equal(seed.Reveal(), bytes.Repeat([]byte{9}, 64)) {
		t.Fatal("the seed is not what the reader gave")
	}
	if _, err := GenerateSeed(bytes.NewReader(make([]byte, 63))); err == nil {
		t.Fatal("accepted a reader that ended early")
	}
}

func TestConcurrentOpen(t *testing.T) {
	k := must[*SoftwareKey](t)(GenerateKey(MLKEM768P256))
	sealed := must[[]byte](t)(k.PublicKey().Seal(nil, nil, []byte("x")))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 5 {
				if _, err := k.Open(nil, nil, sealed); err != nil {
					t.Error(err)
				}
				if _, err := k.PublicKey().Seal(nil, nil, []byte("y")); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func TestDecapsulatorLengths(t *testing.T) {
	eachKEM(t, func(t *testing.T, id SuiteID) {
		k, _ := newDeviceKey(t, id)
		for _, n := range []int{0, 1, k.suite.pqCt - 1, k.suite.pqCt + 1} {
			if _, err := k.pq.Decapsulate(make([]byte, n)); !errors.Is(err, ErrOpen) {
				t.Errorf("%d bytes: %v", n, err)
			}
		}
		// FIPS 203 implicit rejection: a secret, and the same one every time.
		a := must[[]byte](t)(k.pq.Decapsulate(make([]byte, k.suite.pqCt)))
		b := must[[]byte](t)(k.pq.Decapsulate(make([]byte, k.suite.pqCt)))
		if len(a) != 32 || !bytes.Equal(a, b) {
			t.Error("implicit rejection is not deterministic")
		}
	})
}
