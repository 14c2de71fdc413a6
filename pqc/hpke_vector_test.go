package pqc

import (
	"bytes"
	"crypto/hpke"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"testing"
)

// hexBytes is a byte string written in hexadecimal in JSON.
type hexBytes []byte

func (h *hexBytes) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	d, err := hex.DecodeString(s)
	*h = d
	return err
}

type hpkeVector struct {
	KEM         uint16   `json:"kem_id"`
	KDF         uint16   `json:"kdf_id"`
	AEAD        uint16   `json:"aead_id"`
	Info        hexBytes `json:"info"`
	SkRm        hexBytes `json:"skRm"`
	PkRm        hexBytes `json:"pkRm"`
	Enc         hexBytes `json:"enc"`
	Encryptions []struct {
		AAD hexBytes `json:"aad"`
		CT  hexBytes `json:"ct"`
		PT  hexBytes `json:"pt"`
	} `json:"encryptions"`
}

// The vectors of draft-ietf-hpke-pq, through our private key: circl's ML-KEM
// and the wrapped exchange. Most vectors have another KDF or AEAD than our
// suites; the KEM under test is the same.
func TestHPKEKnownAnswers(t *testing.T) {
	var file struct{ Vectors []hpkeVector }
	loadVectors(t, "hpke-pq.json", &file)
	seen, exact := map[SuiteID]int{}, 0
	for _, v := range file.Vectors {
		id := SuiteID(v.KEM)
		seen[id]++
		t.Run(fmt.Sprintf("%v kdf %d aead %d", id, v.KDF, v.AEAD), func(t *testing.T) {
			k := must[*SoftwareKey](t)(NewSoftwareKey(id, mustSecret(t, v.SkRm)))
			if !bytes.Equal(k.PublicKey().Bytes(), v.PkRm) {
				t.Fatal("the public key is not the published one")
			}
			if len(v.Encryptions) == 0 {
				t.Fatal("a vector without encryptions")
			}
			kdf := must[hpke.KDF](t)(hpke.NewKDF(v.KDF))
			aead := must[hpke.AEAD](t)(hpke.NewAEAD(v.AEAD))
			x := &exchange{t: k.t, pub: k.pub.t, size: k.suite.zSize}
			priv := must[hpke.PrivateKey](t)(hpke.NewHybridPrivateKey(k.pq, x))
			r := must[*hpke.Recipient](t)(hpke.NewRecipient(v.Enc, priv, kdf, aead, v.Info))
			for i, e := range v.Encryptions {
				if got := must[[]byte](t)(r.Open(e.AAD, e.CT)); !bytes.Equal(got, e.PT) {
					t.Errorf("encryption %d: another plaintext", i)
				}
			}
			if v.KDF == k.suite.kdf.ID() && v.AEAD == hpke.AES256GCM().ID() {
				exact++
				e := v.Encryptions[0]
				sealed := slices.Concat(binary.BigEndian.AppendUint16(nil, v.KEM), v.Enc, e.CT)
				if got := must[[]byte](t)(k.Open(v.Info, e.AAD, sealed)); !bytes.Equal(got, e.PT) {
					t.Error("Open: another plaintext")
				}
				if _, err := k.Open(v.Info, nil, sealed); !errors.Is(err, ErrOpen) {
					t.Errorf("Open with another AAD: %v", err)
				}
			}
		})
	}
	for _, id := range kemSuites {
		if seen[id] == 0 {
			t.Errorf("no vector for %v", id)
		}
	}
	if exact == 0 {
		t.Error("no vector has exactly one of our suites")
	}
}
