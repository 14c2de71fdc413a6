package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

// bring imports a key of this process's own with the conclave command, by the node of a
// site, and returns it and the proposal.
func (s site) bring(at, ring, name string, purpose kms.Purpose, content []byte) (wire.Key, wire.Proposal) {
	t := s.t
	t.Helper()
	dir := t.TempDir()
	env := s.c.Env(at).With("CONCLAVE_MEMORY", filepath.Join(dir, "memory"))
	in, sealed := filepath.Join(dir, "key"), filepath.Join(dir, "sealed")
	if err := os.WriteFile(in, content, 0o600); err != nil {
		t.Fatal(err)
	}
	conclave := func(v any, args ...string) harness.Result {
		t.Helper()
		r, err := s.c.CLI(t.Context(), env, append(args, "--sealed", sealed, "-o", "json")...)
		if err == nil && v != nil {
			err = errors.Join(r.Err(), r.JSON(v))
		}
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	path := kms.KeyPath(ring, name)
	var p wire.Proposal
	conclave(&p, "key", "import", path, "--in", in, "--purpose", string(purpose), "--reason", "ours from before")
	if r := conclave(nil, "key", "import", path, "--proposal", p.ID); r.Code != 3 {
		t.Errorf("before it was approved: exit code %d, %s", r.Code, r.Stderr)
	}
	s.approve(s.custodian("fr-1"), p)
	s.approve(s.custodian("jp-1"), p)
	var k wire.Key
	conclave(&k, "key", "import", path, "--proposal", p.ID)
	if len(k.Versions) != 1 || k.Versions[0].Generated != string(kms.Imported) || k.Versions[0].Proposal != p.ID {
		t.Errorf("%+v", k)
	}
	return k, p
}

// TestImport brings keys into the cluster through a PKCS #11 token and a TPM, uses them
// at every site, and verifies the evidence.
func TestImport(t *testing.T) {
	s := site{t, cluster(t)}
	name := unique("import")
	material := random(32)
	mac := hmac.New(sha256.New, material)
	mac.Write([]byte("m"))
	own := mac.Sum(nil)
	_, p := s.bring("jp", "coalition", name, kms.MAC, material)
	s.settled()
	for _, at := range []string{"fr", "de", "jp"} {
		got, err := s.client(at, "service").Key("coalition", name).MAC(t.Context(), wire.MACRequest{Message: []byte("m")})
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.MAC, own) {
			t.Errorf("at %s the key is not what was brought", at)
		}
	}
	file := filepath.Join(t.TempDir(), "evidence")
	r, err := s.c.CLI(t.Context(), s.c.Env("fr"), "evidence", "get", p.ID, "--out", file)
	if err = errors.Join(err, r.Err()); err != nil {
		t.Fatal(err)
	}

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	s.bring("fr", "coalition", name+"-sign", kms.Sign, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	s.settled()
	sig, err := s.client("de", "service").Key("coalition", name+"-sign").Sign(t.Context(), wire.SignRequest{Message: []byte("m")})
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte("m"))
	if !ecdsa.VerifyASN1(&key.PublicKey, digest[:], sig.Signature) {
		t.Error("the signature is not by the key that was brought")
	}
}

// imported brings a key that must not be on any disk either.
func (h *hunt) imported(at, name string) {
	h.t.Helper()
	material := random(32)
	h.add("imported key "+name, material)
	h.s.bring(at, "coalition", name, kms.Encrypt, material)
}
