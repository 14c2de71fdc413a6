package tpm_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"errors"
	"math/big"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/tpm"
	"github.com/conclave-kms/conclave/tpm/tpmtest"
)

func unmarshal[T tpm2.Marshallable, P interface {
	*T
	tpm2.Unmarshallable
}](t *testing.T, b []byte) *T {
	t.Helper()
	v, err := tpm2.Unmarshal[T, P](b)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func nameOf(t *testing.T, public []byte) []byte {
	t.Helper()
	name, err := tpm2.ObjectName(unmarshal[tpm2.TPMTPublic](t, public))
	if err != nil {
		t.Fatal(err)
	}
	return name.Buffer
}

func publicKey(t *testing.T, public []byte) crypto.PublicKey {
	t.Helper()
	key, err := tpm2.Pub(*unmarshal[tpm2.TPMTPublic](t, public))
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// attested checks an attestation's signature, what made it and its qualifying data.
func attested(t *testing.T, ak *ecdsa.PublicKey, attest, signature, qualifying []byte) *tpm2.TPMSAttest {
	t.Helper()
	var digest []byte
	if h := sha512.Sum384(attest); ak.Curve.Params().BitSize == 384 {
		digest = h[:]
	} else {
		h := sha256.Sum256(attest)
		digest = h[:]
	}
	sig, err := unmarshal[tpm2.TPMTSignature](t, signature).Signature.ECDSA()
	if err != nil {
		t.Fatal(err)
	}
	if !ecdsa.Verify(ak, digest, new(big.Int).SetBytes(sig.SignatureR.Buffer), new(big.Int).SetBytes(sig.SignatureS.Buffer)) {
		t.Error("an attestation's signature does not verify")
	}
	a := unmarshal[tpm2.TPMSAttest](t, attest)
	if a.Magic != tpm2.TPMGeneratedValue || !bytes.Equal(a.ExtraData.Buffer, qualifying) {
		t.Errorf("magic %#x, extra data %x", a.Magic, a.ExtraData.Buffer)
	}
	return a
}

// checkEvidence verifies evidence as somebody at another site would.
func checkEvidence(t *testing.T, ev tpm.Evidence, qualifying []byte) {
	t.Helper()
	ak := unmarshal[tpm2.TPMTPublic](t, ev.AK)
	if a := ak.ObjectAttributes; !a.Restricted || !a.SignEncrypt || a.Decrypt || !a.FixedTPM || !a.FixedParent || !a.SensitiveDataOrigin {
		t.Errorf("attributes of the attestation key: %+v", a)
	}
	pub := publicKey(t, ev.AK).(*ecdsa.PublicKey)
	for what, c := range map[string]tpm.Certified{"storage": ev.Storage, "agreement": ev.Agreement, "signing": ev.Signing} {
		info, err := attested(t, pub, c.Attest, c.Signature, qualifying).Attested.Certify()
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(info.Name.Buffer, nameOf(t, c.Public)) {
			t.Errorf("%s key: another name is certified than that of its public area", what)
		}
	}
	info, err := attested(t, pub, ev.Quote.Attest, ev.Quote.Signature, qualifying).Attested.Quote()
	if err != nil {
		t.Fatal(err)
	}
	if len(ev.Quote.PCRs) != 16 {
		t.Fatalf("%d registers", len(ev.Quote.PCRs))
	}
	h := crypto.SHA384
	if pub.Curve.Params().BitSize == 256 {
		h = crypto.SHA256
	}
	sum := h.New()
	for i := range 16 {
		sum.Write(ev.Quote.PCRs[i])
	}
	if !bytes.Equal(info.PCRDigest.Buffer, sum.Sum(nil)) {
		t.Error("the quoted digest is not that of the registers")
	}
}

// checkCertificate verifies the endorsement key certificate against the root.
func checkCertificate(t *testing.T, ev tpm.Evidence, root []byte) {
	t.Helper()
	cert, err := x509.ParseCertificate(ev.EKCertificate)
	if err != nil {
		t.Fatal(err)
	}
	cert.UnhandledCriticalExtensions = nil // the TPM's maker and model, as a directory name
	ca, err := x509.ParseCertificate(root)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		t.Error(err)
	}
	if k := publicKey(t, ev.EKPublic).(interface{ Equal(crypto.PublicKey) bool }); !k.Equal(cert.PublicKey) {
		t.Error("the certificate is for another key")
	}
}

// activate is a whole challenge: secret, credential, proof.
func activate(t *testing.T, d *tpm.Device, ev tpm.Evidence) {
	t.Helper()
	secret := make([]byte, 32)
	rand.Read(secret)
	credential, encrypted, err := tpm.MakeCredential(ev.EKPublic, nameOf(t, ev.AK), secret)
	if err != nil {
		t.Fatal(err)
	}
	got, err := d.Activate(t.Context(), credential, encrypted)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, secret) {
		t.Error("another secret came back")
	}
}

func TestAttest(t *testing.T) {
	t.Parallel()
	onBothCurves(t, func(t *testing.T, d *tpm.Device) {
		qualifying := make([]byte, 32)
		rand.Read(qualifying)
		ev, err := d.Attest(t.Context(), qualifying)
		if err != nil {
			t.Fatal(err)
		}
		checkEvidence(t, ev, qualifying)
		if key := publicKey(t, ev.Signing.Public).(*ecdsa.PublicKey); !key.Equal(d.SigningKey()) {
			t.Error("another signing key is certified")
		}
		agreement, err := publicKey(t, ev.Agreement.Public).(*ecdsa.PublicKey).ECDH()
		if err != nil || !agreement.Equal(d.AgreementKey()) {
			t.Errorf("another agreement key is certified (%v)", err)
		}
		activate(t, d, ev)
		for _, n := range []int{0, 49} {
			if _, err := d.Attest(t.Context(), make([]byte, n)); !errors.Is(err, tpm.ErrInvalid) {
				t.Errorf("%d bytes of qualifying data: %v, want ErrInvalid", n, err)
			}
		}
	})
}

// TestEndorsementKeys attests with each endorsement key that there may be: the
// persistent ones, those made again from the seed, and one without certificate.
func TestEndorsementKeys(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	cfg := p.Config()
	d := p.Open(cfg)
	attest := func(what string, wantCert bool, wantType tpm2.TPMAlgID) {
		t.Helper()
		key, mac, _ := loadHMAC(t, d) // the kept key makes room
		checkHMAC(t, mac, key, []byte("m"))
		ev, err := d.Attest(t.Context(), []byte(what))
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		checkEvidence(t, ev, []byte(what))
		if (len(ev.EKCertificate) > 0) != wantCert {
			t.Errorf("%s: a certificate of %d bytes", what, len(ev.EKCertificate))
		}
		if wantCert {
			checkCertificate(t, ev, p.EndorsementRoot())
		}
		if pub := unmarshal[tpm2.TPMTPublic](t, ev.EKPublic); pub.Type != wantType {
			t.Errorf("%s: an endorsement key of type %#x", what, pub.Type)
		}
		checkHMAC(t, mac, key, []byte("m"))
		activate(t, d, ev)
		checkHMAC(t, mac, key, []byte("m"))
	}
	apply := func(f tpm.Fault) {
		t.Helper()
		if err := tpm.Apply(t.Context(), cfg, f); err != nil {
			t.Fatal(err)
		}
	}
	attest("P-384", true, tpm2.TPMAlgECC)
	apply(tpm.EvictHandle(0x81010016))
	attest("P-384 made again", true, tpm2.TPMAlgECC)
	apply(tpm.UndefinePlatform(0x01c00016))
	attest("RSA", true, tpm2.TPMAlgRSA)
	apply(tpm.EvictHandle(0x81010001))
	attest("RSA made again", true, tpm2.TPMAlgRSA)
	apply(tpm.UndefinePlatform(0x01c00002))
	attest("no certificate", false, tpm2.TPMAlgECC)
	if n := loaded(t, cfg); n != 2 {
		t.Errorf("%d transient objects and sessions are left, want the kept key and its session", n)
	}
	if n := dictionaryAttacks(t, cfg); n != 0 {
		t.Errorf("%d dictionary attacks counted", n)
	}
	direct(t, cfg, tpm2.HierarchyChangeAuth{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)}, NewAuth: tpm2.TPM2BAuth{Buffer: []byte("set")},
	})
	_, err := d.Attest(t.Context(), []byte("q"))
	wantErr(t, "endorsement authorization set", err, tpm.ErrAuth)
}

func TestActivateRefuses(t *testing.T) {
	t.Parallel()
	p, q := tpmtest.New(t), tpmtest.New(t)
	d, other := p.Open(p.Config()), q.Open(q.Config())
	ev, err := d.Attest(t.Context(), []byte("q"))
	if err != nil {
		t.Fatal(err)
	}
	secret := bytes.Repeat([]byte{7}, 32)
	credential, encrypted, err := tpm.MakeCredential(ev.EKPublic, nameOf(t, ev.AK), secret)
	if err != nil {
		t.Fatal(err)
	}
	refuse := func(what string, d *tpm.Device, credential, encrypted []byte) {
		t.Helper()
		got, err := d.Activate(t.Context(), credential, encrypted)
		if !errors.Is(err, tpm.ErrInvalid) || got != nil {
			t.Errorf("%s: %x, %v, want ErrInvalid", what, got, err)
		}
	}
	refuse("another TPM", other, credential, encrypted)
	forSigning, enc2, err := tpm.MakeCredential(ev.EKPublic, nameOf(t, ev.Signing.Public), secret)
	if err != nil {
		t.Fatal(err)
	}
	refuse("another key's name", d, forSigning, enc2)
	for i := 0; i < len(credential); i += 7 {
		bad := bytes.Clone(credential)
		bad[i] ^= 1
		refuse("altered credential", d, bad, encrypted)
	}
	for i := 0; i < len(encrypted); i += 7 {
		bad := bytes.Clone(encrypted)
		bad[i] ^= 1
		refuse("altered secret", d, credential, bad)
	}
	refuse("nothing", d, nil, nil)
	refuse("cut", d, credential[:20], encrypted[:20])
	refuse("too long", d, make([]byte, 10000), encrypted)
	if got, err := d.Activate(t.Context(), credential, encrypted); err != nil || !bytes.Equal(got, secret) {
		t.Errorf("the credential itself: %v", err)
	}
	if n := loaded(t, p.Config()); n != 0 {
		t.Errorf("%d transient objects and sessions are left", n)
	}
}

// TestNoAttestationKey: a TPM that an earlier version provisioned works without
// one, says so when asked to attest, and Provision adds it.
func TestNoAttestationKey(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	cfg := p.Config()
	if err := tpm.Provision(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if err := tpm.Apply(t.Context(), cfg, tpm.EvictKey(3)); err != nil {
		t.Fatal(err)
	}
	d, err := tpm.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := everything(t.Context(), d); err != nil {
		t.Error(err)
	}
	_, err = d.Attest(t.Context(), []byte("q"))
	wantErr(t, "Attest", err, tpm.ErrNotProvisioned)
	_, err = d.Activate(t.Context(), nil, nil)
	wantErr(t, "Activate", err, tpm.ErrNotProvisioned)
	if err := tpm.Provision(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if err := d.Check(t.Context()); err != nil {
		t.Errorf("the other keys have changed: %v", err)
	}
	again := p.Open(cfg)
	if !again.SigningKey().Equal(d.SigningKey()) {
		t.Error("another signing key")
	}
	if _, err := again.Attest(t.Context(), []byte("q")); err != nil {
		t.Error(err)
	}
}

func TestMakeCredentialRefuses(t *testing.T) {
	p := tpmtest.New(t)
	d := p.Open(p.Config())
	ev, err := d.Attest(t.Context(), []byte("q"))
	if err != nil {
		t.Fatal(err)
	}
	name := nameOf(t, ev.AK)
	for what, c := range map[string]struct{ ek, name, secret []byte }{
		"no key":             {nil, name, []byte("s")},
		"a key with more":    {append(bytes.Clone(ev.EKPublic), 0), name, []byte("s")},
		"a signing key":      {ev.Signing.Public, name, []byte("s")},
		"an agreement key":   {ev.Agreement.Public, name, []byte("s")},
		"no name":            {ev.EKPublic, nil, []byte("s")},
		"a handle as a name": {ev.EKPublic, []byte{0x81, 1, 0, 1}, []byte("s")},
		"a long name":        {ev.EKPublic, append(bytes.Clone(name), 0), []byte("s")},
		"no secret":          {ev.EKPublic, name, nil},
		"a long secret":      {ev.EKPublic, name, make([]byte, 49)},
	} {
		if _, _, err := tpm.MakeCredential(c.ek, c.name, c.secret); !errors.Is(err, tpm.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", what, err)
		}
	}
}

func FuzzMakeCredential(f *testing.F) {
	name := append([]byte{0, 0x0b}, make([]byte, 32)...)
	f.Add(tpm2.Marshal(tpm2.RSAEKTemplate), name)
	f.Add(tpm2.Marshal(tpm2.ECCEKTemplate), name)
	f.Add(tpm2.Marshal(tpm2.ECCSRKTemplate), []byte{})
	f.Fuzz(func(t *testing.T, ek, name []byte) {
		credential, encrypted, err := tpm.MakeCredential(ek, name, []byte("secret"))
		if err == nil && (len(credential) == 0 || len(encrypted) == 0) {
			t.Error("an empty credential")
		}
		if err != nil && !errors.Is(err, tpm.ErrInvalid) {
			t.Error(err)
		}
	})
}
