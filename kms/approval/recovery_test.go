package approval

import (
	"bytes"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/pqc"
)

func kemKey(t testing.TB) []byte {
	k, err := pqc.GenerateKey(pqc.CustodianKEM)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Destroy()
	return k.PublicKey().Bytes()
}

func sampleRecovery(t testing.TB) RecoveryParams {
	p := RecoveryParams{
		Residency: []string{"de", "fr"}, Suite: uint16(pqc.CustodianKEM), PublicKey: kemKey(t), Nonce: make([]byte, NonceSize), Threshold: 2, Sites: 2,
	}
	for _, id := range []string{"de-1", "fr-1", "fr-2"} {
		p.Holders = append(p.Holders, RecoveryHolder{
			Custodian: id, Site: id[:2], Suite: uint16(pqc.CustodianKEM), KEM: kemKey(t), Credential: "c", Possession: []byte{1}, Sealed: []byte{1}, Commitment: make([]byte, 32),
		})
	}
	return p
}

func sampleCeremony(t testing.TB) Ceremony {
	s, _ := pqc.Lookup(pqc.MLDSA65Ed25519)
	return Ceremony{
		Domain: CeremonyDomain, Cluster: "00112233445566778899aabbccddeeff", Recovery: "paris", Number: 1, Nonce: make([]byte, NonceSize),
		Created: 1767225600000, Expires: 1767229200000, Reason: "fire", Suite: uint16(pqc.CustodianKEM), KEM: kemKey(t), Signing: make([]byte, s.PublicKeySize),
		Recipients: []CeremonyRecipient{{Node: "fr-a", Root: 2, Agreement: make([]byte, 32)}},
	}
}

func TestRecoveryParamsRefused(t *testing.T) {
	good := sampleRecovery(t)
	if got, err := ParseRecoveryParams(good.Marshal()); err != nil || !bytes.Equal(got.Marshal(), good.Marshal()) {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*RecoveryParams){
		"no residency":          func(p *RecoveryParams) { p.Residency = nil },
		"unsorted residency":    func(p *RecoveryParams) { p.Residency = []string{"fr", "de"} },
		"another suite":         func(p *RecoveryParams) { p.Suite = uint16(pqc.XWing) },
		"a signature suite":     func(p *RecoveryParams) { p.Suite = uint16(pqc.Ed25519) },
		"no nonce":              func(p *RecoveryParams) { p.Nonce = nil },
		"no threshold":          func(p *RecoveryParams) { p.Threshold = 0 },
		"no sites":              func(p *RecoveryParams) { p.Sites = 0 },
		"one site":              func(p *RecoveryParams) { p.Sites = 1 },
		"more sites":            func(p *RecoveryParams) { p.Sites, p.Threshold = 3, 3 },
		"more than holders":     func(p *RecoveryParams) { p.Threshold = 4 },
		"fewer than sites":      func(p *RecoveryParams) { p.Threshold = 1 },
		"no holders":            func(p *RecoveryParams) { p.Holders = nil },
		"a holder twice":        func(p *RecoveryParams) { p.Holders[1].Custodian = "de-1" },
		"a KEM key twice":       func(p *RecoveryParams) { p.Holders[1].KEM = p.Holders[0].KEM },
		"a short KEM key":       func(p *RecoveryParams) { p.Holders[1].KEM = p.Holders[1].KEM[1:] },
		"no share":              func(p *RecoveryParams) { p.Holders[1].Sealed = nil },
		"no commitment":         func(p *RecoveryParams) { p.Holders[1].Commitment = nil },
		"no possession":         func(p *RecoveryParams) { p.Holders[1].Possession = nil },
		"a holder without site": func(p *RecoveryParams) { p.Holders[1].Site = "" },
	} {
		p := sampleRecovery(t)
		change(&p)
		if _, err := ParseRecoveryParams(p.Marshal()); kms.KindOf(err) != kms.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCeremonyRefused(t *testing.T) {
	if _, err := ParseCeremony(sampleCeremony(t).Marshal()); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Ceremony){
		"domain":             func(c *Ceremony) { c.Domain = "conclave/proposal/v1" },
		"cluster":            func(c *Ceremony) { c.Cluster = "" },
		"number":             func(c *Ceremony) { c.Number = 0 },
		"expired":            func(c *Ceremony) { c.Expires = c.Created },
		"too long":           func(c *Ceremony) { c.Expires = c.Created + MaxCeremonyLifetime + 1 },
		"no reason":          func(c *Ceremony) { c.Reason = "" },
		"a hidden reason":    func(c *Ceremony) { c.Reason = "fire\u202e" },
		"no key":             func(c *Ceremony) { c.KEM = nil },
		"no signing key":     func(c *Ceremony) { c.Signing = nil },
		"no recipient":       func(c *Ceremony) { c.Recipients = nil },
		"a recipient twice":  func(c *Ceremony) { c.Recipients = append(c.Recipients, c.Recipients[0]) },
		"no root":            func(c *Ceremony) { c.Recipients[0].Root = 0 },
		"no hash of its key": func(c *Ceremony) { c.Recipients[0].Agreement = nil },
	} {
		c := sampleCeremony(t)
		change(&c)
		if _, err := ParseCeremony(c.Marshal()); kms.KindOf(err) != kms.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParseRecovery(f *testing.F) {
	f.Add(sampleRecovery(f).Marshal())
	f.Add(sampleCeremony(f).Marshal())
	f.Add([]byte{0xa0})
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, err := ParseRecoveryParams(b); err == nil && !bytes.Equal(p.Marshal(), b) {
			t.Error("accepted parameters that it does not write")
		}
		if c, err := ParseCeremony(b); err == nil && !bytes.Equal(c.Marshal(), b) {
			t.Error("accepted a ceremony that it does not write")
		}
	})
}
