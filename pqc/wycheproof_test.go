package pqc

import (
	"bytes"
	"crypto"
	"crypto/mlkem"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/json"
	"errors"
	"io/fs"
	"testing"

	"github.com/c2sp/wycheproof"
	"github.com/cloudflare/circl/sign/mldsa/mldsa65"
)

// wycheproofFile is the part of a test vector file that these tests read.
type wycheproofFile struct {
	NumberOfTests int `json:"numberOfTests"`
	TestGroups    []struct {
		PublicKey   json.RawMessage `json:"publicKey"`
		PrivateSeed hexBytes        `json:"privateSeed"`
		Tests       []wycheproofCase
	} `json:"testGroups"`
}

type wycheproofCase struct {
	TcID    int      `json:"tcId"`
	Comment string   `json:"comment"`
	Flags   []string `json:"flags"`
	Result  string   `json:"result"`
	Seed    hexBytes `json:"seed"`
	EK      hexBytes `json:"ek"`
	C       hexBytes `json:"c"`
	K       hexBytes `json:"K"`
	Msg     hexBytes `json:"msg"`
	Ctx     hexBytes `json:"ctx"`
	Mu      hexBytes `json:"mu"`
	Rnd     hexBytes `json:"rnd"`
	Sig     hexBytes `json:"sig"`
}

// loadWycheproof reads a file of the module and fails if it is empty or holds
// another number of tests than it says.
func loadWycheproof(t *testing.T, name string) *wycheproofFile {
	t.Helper()
	b := must[[]byte](t)(fs.ReadFile(wycheproof.TestVectors, name))
	var f wycheproofFile
	if err := json.Unmarshal(b, &f); err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, g := range f.TestGroups {
		n += len(g.Tests)
	}
	if n == 0 || n != f.NumberOfTests {
		t.Fatalf("%s: %d tests, the file says %d", name, n, f.NumberOfTests)
	}
	return &f
}

// both fails unless the tests held accepted and refused cases.
func both(t *testing.T, valid, invalid int) {
	t.Helper()
	t.Logf("%d valid, %d invalid", valid, invalid)
	if valid == 0 || invalid == 0 {
		t.Error("only one kind of case was tested")
	}
}

var wycheproofKEMs = map[string]SuiteID{"768": MLKEM768P256, "1024": MLKEM1024P384}

func TestWycheproofMLKEM(t *testing.T) {
	for size, id := range wycheproofKEMs {
		t.Run(size, func(t *testing.T) {
			s := must[*kemSuite](t)(lookupKEM(id))
			valid, invalid := 0, 0
			for _, g := range loadWycheproof(t, "mlkem_"+size+"_test.json").TestGroups {
				for _, c := range g.Tests {
					ok := checkDecapsulation(s, c)
					if ok != (c.Result == "valid") {
						t.Errorf("test %d (%s): accepted %v, should be %s", c.TcID, c.Comment, ok, c.Result)
					}
					if ok {
						valid++
					} else {
						invalid++
					}
				}
			}
			both(t, valid, invalid)
		})
	}
}

// checkDecapsulation runs one case through the decapsulator as NewPrivateKey
// makes it.
func checkDecapsulation(s *kemSuite, c wycheproofCase) bool {
	d, err := newDecapsulator(s, c.Seed)
	if err != nil {
		return false
	}
	if c.EK != nil && !bytes.Equal(d.Encapsulator().Bytes(), c.EK) {
		return false
	}
	k, err := d.Decapsulate(c.C)
	return err == nil && bytes.Equal(k, c.K)
}

func TestWycheproofMLKEMKeyGeneration(t *testing.T) {
	for size, id := range wycheproofKEMs {
		t.Run(size, func(t *testing.T) {
			s := must[*kemSuite](t)(lookupKEM(id))
			for _, g := range loadWycheproof(t, "mlkem_"+size+"_keygen_seed_test.json").TestGroups {
				for _, c := range g.Tests {
					d, err := newDecapsulator(s, c.Seed)
					if (err == nil) != (c.Result == "valid") {
						t.Errorf("test %d: %v, should be %s", c.TcID, err, c.Result)
						continue
					}
					if err == nil && !bytes.Equal(d.Encapsulator().Bytes(), c.EK) {
						t.Errorf("test %d: another encapsulation key", c.TcID)
					}
				}
			}
		})
	}
}

// Encapsulation keys that are not canonical must not pass ParsePublicKey.
func TestWycheproofEncapsulationKeys(t *testing.T) {
	for size, id := range wycheproofKEMs {
		t.Run(size, func(t *testing.T) {
			k, _ := newDeviceKey(t, id)
			point := k.PublicKey().Bytes()[k.suite.pq.PublicKeySize():]
			valid, invalid := 0, 0
			for _, g := range loadWycheproof(t, "mlkem_"+size+"_encaps_test.json").TestGroups {
				for _, c := range g.Tests {
					_, err := ParsePublicKey(id, append(bytes.Clone(c.EK), point...))
					if (err == nil) != (c.Result == "valid") {
						t.Errorf("test %d (%s): %v, should be %s", c.TcID, c.Comment, err, c.Result)
					}
					if err == nil {
						valid++
					} else {
						invalid++
					}
				}
			}
			both(t, valid, invalid)
		})
	}
}

func TestWycheproofMLDSAVerify(t *testing.T) {
	valid, invalid := 0, 0
	for _, g := range loadWycheproof(t, "mldsa_65_verify_test.json").TestGroups {
		var pub hexBytes
		if err := json.Unmarshal(g.PublicKey, &pub); err != nil {
			t.Fatal(err)
		}
		for _, c := range g.Tests {
			// The lengths are checked before the call, as VerifyHybrid does.
			ok := len(pub) == mldsa65.PublicKeySize && len(c.Sig) == mldsa65.SignatureSize
			if ok {
				var pk mldsa65.PublicKey
				pk.Unpack((*[mldsa65.PublicKeySize]byte)(pub))
				ok = mldsa65.Verify(&pk, c.Msg, c.Ctx, c.Sig)
			}
			if ok != (c.Result == "valid") {
				t.Errorf("test %d (%s): verified %v, should be %s", c.TcID, c.Comment, ok, c.Result)
			}
			if ok {
				valid++
			} else {
				invalid++
			}
		}
	}
	both(t, valid, invalid)
}

// Keys from seeds and deterministic signatures with them.
func TestWycheproofMLDSASign(t *testing.T) {
	n := 0
	for _, g := range loadWycheproof(t, "mldsa_65_sign_seed_test.json").TestGroups {
		if len(g.PrivateSeed) != mldsa65.SeedSize {
			for _, c := range g.Tests {
				if c.Result == "valid" {
					t.Errorf("test %d: a valid case with a seed of %d bytes", c.TcID, len(g.PrivateSeed))
				}
			}
			continue
		}
		var pub hexBytes
		if err := json.Unmarshal(g.PublicKey, &pub); err != nil {
			t.Fatal(err)
		}
		pk, sk := mldsa65.NewKeyFromSeed((*[mldsa65.SeedSize]byte)(g.PrivateSeed))
		if !bytes.Equal(pk.Bytes(), pub) {
			t.Fatal("the seed gives another public key")
		}
		for _, c := range g.Tests {
			if c.Rnd != nil || (c.Msg == nil && c.Mu != nil) {
				continue // hedged with given randomness, or from mu: not our interface
			}
			sig := make([]byte, mldsa65.SignatureSize)
			err := mldsa65.SignTo(sk, c.Msg, c.Ctx, false, sig)
			if ok := err == nil && bytes.Equal(sig, c.Sig); ok != (c.Result == "valid") {
				t.Errorf("test %d (%s): %v, should be %s", c.TcID, c.Comment, ok, c.Result)
			}
			n++
		}
	}
	t.Logf("%d cases", n)
	if n == 0 {
		t.Error("no case was tested")
	}
}

func TestWycheproofECDSA(t *testing.T) {
	hash := map[SuiteID]func([]byte) []byte{
		ECDSAP256SHA256: func(m []byte) []byte { d := sha256.Sum256(m); return d[:] },
		ECDSAP384SHA384: func(m []byte) []byte { d := sha512.Sum384(m); return d[:] },
	}
	for name, id := range map[string]SuiteID{
		"ecdsa_secp256r1_sha256_p1363_test.json": ECDSAP256SHA256,
		"ecdsa_secp384r1_sha384_p1363_test.json": ECDSAP384SHA384,
	} {
		t.Run(id.String(), func(t *testing.T) {
			testWycheproofVerify(t, name, "uncompressed", id, func(pub, msg, sig []byte) error {
				return verifyECDSA(id, pub, hash[id](msg), sig)
			})
		})
	}
}

func TestWycheproofEd25519(t *testing.T) {
	testWycheproofVerify(t, "ed25519_test.json", "pk", Ed25519, verifyEd25519)
}

func testWycheproofVerify(t *testing.T, name, field string, id SuiteID, verify func(pub, msg, sig []byte) error) {
	t.Helper()
	s, _ := Lookup(id)
	valid, invalid := 0, 0
	for _, g := range loadWycheproof(t, name).TestGroups {
		var key map[string]json.RawMessage
		var pub hexBytes
		if err := errors.Join(json.Unmarshal(g.PublicKey, &key), json.Unmarshal(key[field], &pub)); err != nil {
			t.Fatal(err)
		}
		for _, c := range g.Tests {
			// The lengths are checked before the call, as Verify does.
			ok := len(pub) == s.PublicKeySize && len(c.Sig) == s.SignatureSize && verify(pub, c.Msg, c.Sig) == nil
			if ok != (c.Result == "valid") {
				t.Errorf("test %d (%s): verified %v, should be %s", c.TcID, c.Comment, ok, c.Result)
			}
			if ok {
				valid++
			} else {
				invalid++
			}
		}
	}
	both(t, valid, invalid)
}

// circl and the standard library make the same key of one seed and open each
// other's ciphertexts.
func TestMLKEMAgreesWithStandardLibrary(t *testing.T) {
	for _, id := range []SuiteID{MLKEM768P256, MLKEM1024P384} {
		t.Run(id.String(), func(t *testing.T) {
			for i := range 20 {
				seed := bytes.Repeat([]byte{byte(i)}, MLKEMSeedSize)
				s := must[*kemSuite](t)(lookupKEM(id))
				ours := must[*decapsulator](t)(newDecapsulator(s, seed))
				var theirs crypto.Decapsulator
				if id == MLKEM1024P384 {
					theirs = must[*mlkem.DecapsulationKey1024](t)(mlkem.NewDecapsulationKey1024(seed))
				} else {
					theirs = must[*mlkem.DecapsulationKey768](t)(mlkem.NewDecapsulationKey768(seed))
				}
				if !bytes.Equal(ours.Encapsulator().Bytes(), theirs.Encapsulator().Bytes()) {
					t.Fatal("the encapsulation keys differ")
				}
				k, ct := theirs.Encapsulator().Encapsulate()
				forged := bytes.Clone(ct)
				forged[0] ^= 1
				if !bytes.Equal(must[[]byte](t)(ours.Decapsulate(ct)), k) {
					t.Fatal("the shared secrets differ")
				}
				if !bytes.Equal(must[[]byte](t)(ours.Decapsulate(forged)), must[[]byte](t)(theirs.Decapsulate(forged))) {
					t.Fatal("the implicit rejections differ")
				}
			}
		})
	}
}
