package engine

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

func TestSignVerify(t *testing.T) {
	w := newWorld(t, DefaultAccess()+`permit (principal in Role::"service", action, resource);`)
	w.keyring("r", "fr", "de")
	msg := []byte("message")
	for _, alg := range []kms.Algorithm{kms.ECDSAP256, kms.ECDSAP384, kms.Ed25519} {
		name := string(alg)
		check[wire.Key](t)(w.at("fr").engine.CreateKey(bg, caller("operator", "fr"), "r", wire.CreateKeyRequest{Name: name, Purpose: "sign", Algorithm: name}))
		s := check[wire.SignResponse](t)(w.at("fr").engine.Sign(bg, caller("service", "fr"), "r", name, wire.SignRequest{Message: msg}))
		if s.Algorithm != name || s.KeyVersion != 1 {
			t.Errorf("%+v", s)
		}
		// Also where the keyring is not resident: the public key suffices.
		for _, site := range siteIDs {
			v := check[wire.VerifyResponse](t)(w.at(site).engine.Verify(bg, caller("service", site), "r", name, wire.VerifyRequest{Message: msg, Signature: s.Signature}))
			if !v.Valid {
				t.Errorf("%s at %s: not valid", name, site)
			}
		}
		v := check[wire.VerifyResponse](t)(w.at("de").engine.Verify(bg, caller("service", "de"), "r", name, wire.VerifyRequest{Message: []byte("other"), Signature: s.Signature}))
		if v.Valid {
			t.Errorf("%s: valid for another message", name)
		}
		pub := check[wire.PublicKeyResponse](t)(w.at("jp").engine.PublicKey(bg, caller("service", "jp"), "r", name, 0))
		block, _ := pem.Decode([]byte(pub.PEM))
		key := check[any](t)(x509.ParsePKIXPublicKey(block.Bytes))
		if k, ok := key.(*ecdsa.PublicKey); ok && alg == kms.ECDSAP256 {
			h := sha256.Sum256(msg)
			if !ecdsa.VerifyASN1(k, h[:], s.Signature) {
				t.Error("the standard library does not verify the signature with the PEM")
			}
		}
	}
	_, err := w.at("fr").engine.PublicKey(bg, caller("service", "fr"), "r", "ed25519", 2)
	wantKind(t, err, kms.NotFound)
}

func TestMAC(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("r", "fr", "de")
	w.key("r", "mac", kms.MAC)
	m := check[wire.MACResponse](t)(w.at("fr").engine.MAC(bg, caller("service", "fr"), "r", "mac", wire.MACRequest{Message: []byte("m")}))
	de, svc := w.at("de").engine, caller("service", "de")
	for i, q := range []wire.VerifyMACRequest{
		{Message: []byte("m"), MAC: m.MAC}, {Message: []byte("m"), MAC: m.MAC, KeyVersion: 1},
		{Message: []byte("n"), MAC: m.MAC}, {Message: []byte("m"), MAC: m.MAC[:31]}, {Message: []byte("m")},
	} {
		v := check[wire.VerifyResponse](t)(de.VerifyMAC(bg, svc, "r", "mac", q))
		if v.Valid != (i < 2) || v.KeyVersion != 1 {
			t.Errorf("%d: %+v", i, v)
		}
	}
	_, err := de.VerifyMAC(bg, svc, "r", "mac", wire.VerifyMACRequest{KeyVersion: 2})
	wantKind(t, err, kms.NotFound)
	b := check[wire.BatchResult[wire.VerifyResponse]](t)(de.VerifyMACBatch(bg, svc, "r", "mac", wire.Batch[wire.VerifyMACRequest]{Items: []wire.VerifyMACRequest{
		{Message: []byte("m"), MAC: m.MAC}, {Message: []byte("m"), KeyVersion: 7}}}))
	if !b.Items[0].Result.Valid || b.Items[1].Problem.Kind() != kms.NotFound || b.Items[1].Problem.Instance != "r-1" {
		t.Errorf("%+v", b)
	}
}

func TestExport(t *testing.T) {
	w := newWorld(t, DefaultAccess()+`permit (principal == Principal::"spiffe://fr.example/service/escrow", action == Action::"export-material", resource in Keyring::"r");`)
	w.keyring("r", "fr")
	w.key("r", "data", kms.Encrypt)
	e, svc := w.at("fr").engine, caller("service", "fr")
	ctx := wire.Context{"for": "radio"}
	dk := check[wire.DataKeyResponse](t)(e.DataKey(bg, svc, "r", "data", wire.DataKeyRequest{Context: ctx}))
	recipient := check[*pqc.SoftwareKey](t)(pqc.GenerateKey(pqc.MLKEM1024P384))
	defer recipient.Destroy()
	q := wire.ExportRequest{RecipientSuite: "MLKEM1024-P384", RecipientPublicKey: recipient.PublicKey().Bytes(), Wrapped: dk.Wrapped, Context: ctx}
	x := check[wire.ExportResponse](t)(e.Export(bg, svc, "r", "data", q))
	aad := wire.ExportAAD(x.Cluster, x.KeyID, x.KeyVersion, x.Kind, x.Identity)
	got := check[[]byte](t)(recipient.Open([]byte(wire.ExportInfo), aad, x.Sealed))
	if !bytes.Equal(got, dk.Plaintext) || x.Identity != svc.Identity.String() || x.Kind != wire.ExportDataKey {
		t.Errorf("the recipient did not get the data key: %+v", x.Kind)
	}
	if _, err := recipient.Open([]byte(wire.ExportInfo), wire.ExportAAD(x.Cluster, x.KeyID, x.KeyVersion, x.Kind, "spiffe://fr.example/service/other"), x.Sealed); err == nil {
		t.Error("the seal is not bound to the caller")
	}

	material := wire.ExportRequest{RecipientSuite: q.RecipientSuite, RecipientPublicKey: q.RecipientPublicKey, Version: 1}
	_, err := e.Export(bg, svc, "r", "data", material)
	wantKind(t, err, kms.Denied)
	escrow := svc
	escrow.Identity.Name = "escrow"
	m := check[wire.ExportResponse](t)(e.Export(bg, escrow, "r", "data", material))
	raw := check[[]byte](t)(recipient.Open([]byte(wire.ExportInfo), wire.ExportAAD(m.Cluster, m.KeyID, m.KeyVersion, m.Kind, m.Identity), m.Sealed))
	if len(raw) != 32 || m.Kind != wire.ExportMaterial {
		t.Errorf("%d bytes of material", len(raw))
	}
	if l := w.at("fr").log.last(); l.Action != "export-material" || l.Version != 1 {
		t.Errorf("logged %+v", l)
	}
	mixed := check[wire.BatchResult[wire.ExportResponse]](t)(e.ExportBatch(bg, escrow, "r", "data", wire.Batch[wire.ExportRequest]{Items: []wire.ExportRequest{material, q}}))
	if mixed.Items[0].Problem != nil || mixed.Items[1].Problem.Kind() != kms.Invalid {
		t.Errorf("%+v", mixed.Items)
	}

	for what, bad := range map[string]func(*wire.ExportRequest){
		"suite":    func(q *wire.ExportRequest) { q.RecipientSuite = "ECDSA-P256-SHA256" },
		"key":      func(q *wire.ExportRequest) { q.RecipientPublicKey = q.RecipientPublicKey[1:] },
		"both":     func(q *wire.ExportRequest) { q.Version = 1 },
		"no suite": func(q *wire.ExportRequest) { q.RecipientSuite = "" },
	} {
		b := q
		bad(&b)
		if _, err := e.Export(bg, svc, "r", "data", b); kms.KindOf(err) != kms.Invalid {
			t.Errorf("%s: %v", what, err)
		}
	}
	q.Context = nil
	if _, err := e.Export(bg, svc, "r", "data", q); err != kms.ErrOpen {
		t.Errorf("wrong context: %v", err)
	}
}
