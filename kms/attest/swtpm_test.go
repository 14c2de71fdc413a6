package attest_test

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/attest"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
	"github.com/conclave-kms/conclave/tpm"
	"github.com/conclave-kms/conclave/tpm/tpmtest"
)

// node is a node on a software TPM.
type node struct {
	dev     *tpm.Device
	root    []byte
	subject attest.Subject
}

func newNode(t *testing.T, id, site string, curve ecdh.Curve, pcrs ...int) node {
	t.Helper()
	soft := tpmtest.New(t)
	cfg := soft.Config()
	cfg.Curve, cfg.PCRs = curve, pcrs
	n := node{dev: soft.Open(cfg), root: soft.EndorsementRoot()}
	suite, sig := pqc.MLKEM1024P384, pqc.ECDSAP384SHA384
	if curve == ecdh.P256() {
		suite, sig = pqc.MLKEM768P256, pqc.ECDSAP256SHA256
	}
	signing, err := n.dev.SigningKey().Bytes()
	if err != nil {
		t.Fatal(err)
	}
	seed, err := pqc.GenerateSeed(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer seed.Destroy()
	agreement, err := pqc.NewPrivateKey(suite, seed, half{n.dev.AgreementKey()})
	if err != nil {
		t.Fatal(err)
	}
	n.subject = attest.Subject{Node: id, Site: site, SigningSuite: uint16(sig), Signing: signing, Agreement: agreement.PublicKey().Bytes()}
	n.subject.ImportKind, n.subject.Import = n.dev.ImportKey()
	return n
}

// half is the public half of the device's agreement key: nothing is opened here.
type half struct{ public *ecdh.PublicKey }

func (h half) Curve() ecdh.Curve                    { return h.public.Curve() }
func (h half) PublicKey() *ecdh.PublicKey           { return h.public }
func (h half) ECDH(*ecdh.PublicKey) ([]byte, error) { return nil, tpm.ErrInvalid }

// document has the TPM attest.
func (n node) document(t *testing.T, s attest.Subject) attest.TPM {
	t.Helper()
	ev, err := n.dev.Attest(t.Context(), attest.Qualifying(s))
	if err != nil {
		t.Fatal(err)
	}
	d := attest.TPM{
		EKCertificate: ev.EKCertificate, EKChain: ev.EKChain, EKPublic: ev.EKPublic, AK: ev.AK, Storage: attest.Certified(ev.Storage),
		Agreement: attest.Certified(ev.Agreement), Signing: attest.Certified(ev.Signing), Quote: attest.Quoted{Attest: ev.Quote.Attest, Signature: ev.Quote.Signature},
	}
	for i, v := range ev.Quote.PCRs {
		d.Quote.PCRs = append(d.Quote.PCRs, attest.PCR{Index: uint8(i), Value: v})
	}
	slices.SortFunc(d.Quote.PCRs, func(a, b attest.PCR) int { return int(a.Index) - int(b.Index) })
	return d
}

// witness challenges the TPM of n as a node of another site does.
func (n node) witness(t *testing.T, d attest.TPM, s attest.Subject, by attest.Subject, key *ecdsa.PrivateKey) attest.Witness {
	t.Helper()
	given := make([]byte, 32)
	if _, err := rand.Read(given); err != nil {
		t.Fatal(err)
	}
	name, err := d.AKName()
	if err != nil {
		t.Fatal(err)
	}
	credential, encrypted, err := tpm.MakeCredential(d.EKPublic, name, given)
	if err != nil {
		t.Fatal(err)
	}
	got, err := n.dev.Activate(t.Context(), credential, encrypted)
	if err != nil || !bytes.Equal(got, given) {
		t.Fatalf("the credential opened to something else, %v", err)
	}
	defer secret.Wipe(got)
	hash := sha256.Sum256(given)
	msg, err := attest.WitnessMessage(by.Node, s, &d, hash[:])
	if err != nil {
		t.Fatal(err)
	}
	digest, err := pqc.Digest(pqc.SuiteID(by.SigningSuite), msg, []byte(attest.WitnessContext))
	if err != nil {
		t.Fatal(err)
	}
	r, x, err := ecdsa.Sign(rand.Reader, key, digest)
	if err != nil {
		t.Fatal(err)
	}
	sig := make([]byte, 64)
	r.FillBytes(sig[:32])
	x.FillBytes(sig[32:])
	return attest.Witness{Node: by.Node, Secret: hash[:], Signature: sig}
}

func newWitness(t *testing.T) (attest.Subject, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signing, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return attest.Subject{Node: "fr-1", Site: "fr", SigningSuite: uint16(pqc.ECDSAP256SHA256), Signing: signing}, key
}

// TestSoftTPM goes the whole way with two software TPMs.
func TestSoftTPM(t *testing.T) {
	for _, curve := range []ecdh.Curve{ecdh.P256(), ecdh.P384()} {
		t.Run(curve.(interface{ String() string }).String(), func(t *testing.T) {
			jp, de := newNode(t, "jp-1", "jp", curve), newNode(t, "de-1", "de", curve)
			by, key := newWitness(t)
			c := attest.Context{Time: time.Now(), Vendors: [][]byte{jp.root}, Witness: func(id string) (attest.Subject, bool) { return by, id == by.Node }}
			d := jp.document(t, jp.subject)
			r, err := attest.Verify(d.Marshal(), jp.subject, c)
			if err != nil || r.Attested || len(r.Proven) != 1 {
				t.Fatalf("without a witness: %+v, %v", r, err)
			}
			w := jp.witness(t, d, jp.subject, by, key)
			d.Witness = &w
			doc := d.Marshal()
			r, err = attest.Verify(doc, jp.subject, c)
			if err != nil || !r.Attested {
				t.Fatalf("%+v, %v", r, err)
			}
			if all := strings.Join(r.Proven, "\n"); !strings.Contains(all, "fr-1 of site fr") || !strings.Contains(all, "swtpm-localca") || !strings.Contains(all, "PCR 0-15;") {
				t.Errorf("proven:\n%s", all)
			}
			t.Logf("%d bytes\n%s\n%s", len(doc), strings.Join(r.Proven, "\n"), strings.Join(r.Claimed, "\n"))
			refuseOthers(t, jp, de, d, c)

			other := c
			other.Vendors = [][]byte{de.root}
			if r, err := attest.Verify(doc, jp.subject, other); err != nil || r.Attested {
				t.Errorf("another vendor: %+v, %v", r, err)
			}
		})
	}
}

// TestBoundToRegisters: keys that are bound to platform registers are reported as
// such.
func TestBoundToRegisters(t *testing.T) {
	jp := newNode(t, "jp-1", "jp", ecdh.P256(), 0, 7)
	by, key := newWitness(t)
	d := jp.document(t, jp.subject)
	w := jp.witness(t, d, jp.subject, by, key)
	d.Witness = &w
	r, err := attest.Verify(d.Marshal(), jp.subject, attest.Context{
		Time: time.Now(), Vendors: [][]byte{jp.root}, Witness: func(id string) (attest.Subject, bool) { return by, id == by.Node },
	})
	if err != nil || !r.Attested {
		t.Fatalf("%+v, %v", r, err)
	}
	all := strings.Join(r.Proven, "\n")
	for _, what := range []string{"agreement", "signing"} {
		if !strings.Contains(all, "its "+what+" key can be used only under the TPM's authorization policy ") {
			t.Errorf("%s key: proven:\n%s", what, all)
		}
	}
}

// refuseOthers holds that the document of one node's TPM serves no other.
func refuseOthers(t *testing.T, jp, de node, d attest.TPM, c attest.Context) {
	t.Helper()
	for name, s := range map[string]attest.Subject{
		"the keys of another TPM":       {Node: "jp-1", Site: "jp", SigningSuite: de.subject.SigningSuite, Signing: de.subject.Signing, Agreement: de.subject.Agreement, ImportKind: de.subject.ImportKind, Import: de.subject.Import},
		"another node of the same name": de.subject,
		"another node":                  {Node: "jp-2", Site: "jp", SigningSuite: jp.subject.SigningSuite, Signing: jp.subject.Signing, Agreement: jp.subject.Agreement, ImportKind: jp.subject.ImportKind, Import: jp.subject.Import},
	} {
		if r, err := attest.Verify(d.Marshal(), s, c); err == nil {
			t.Errorf("%s: %+v", name, r)
		}
	}
	theirs := de.document(t, jp.subject)
	for name, f := range map[string]func(*attest.TPM){
		"the storage key of another TPM":     func(x *attest.TPM) { x.Storage = theirs.Storage },
		"the agreement key of another TPM":   func(x *attest.TPM) { x.Agreement = theirs.Agreement },
		"the signing key of another TPM":     func(x *attest.TPM) { x.Signing = theirs.Signing },
		"the quote of another TPM":           func(x *attest.TPM) { x.Quote = theirs.Quote },
		"the attestation key of another TPM": func(x *attest.TPM) { x.AK = theirs.AK },
		"the endorsement key of another TPM": func(x *attest.TPM) {
			x.EKCertificate, x.EKChain, x.EKPublic = theirs.EKCertificate, theirs.EKChain, theirs.EKPublic
		},
		"its certificate alone": func(x *attest.TPM) { x.EKCertificate = theirs.EKCertificate },
	} {
		x := d
		f(&x)
		if r, err := attest.Verify(x.Marshal(), jp.subject, c); err == nil {
			t.Errorf("%s: %+v", name, r)
		}
	}
	// The TPM of another node opens no challenge to this one.
	name, err := d.AKName()
	if err != nil {
		t.Fatal(err)
	}
	credential, encrypted, err := tpm.MakeCredential(d.EKPublic, name, make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := de.dev.Activate(t.Context(), credential, encrypted); err == nil {
		t.Error("another TPM opened the credential")
	}
}

// TestImportKind keeps the constant that this package cannot import.
func TestImportKind(t *testing.T) {
	if kms.ImportTPM != tpm.ImportKind {
		t.Errorf("%q, %q", kms.ImportTPM, tpm.ImportKind)
	}
}
