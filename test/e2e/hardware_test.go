package e2e

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

// hardRing is a keyring of protection hardware with a key for every purpose.
type hardRing struct {
	site
	name      string
	residency []string
	generated string // where its keys are made
}

// hardKeys are the keys of a hardRing; the EC curves are both there.
var hardKeys = []struct {
	name    string
	purpose kms.Purpose
	alg     kms.Algorithm
}{
	{"data", kms.Encrypt, ""}, {"tags", kms.MAC, ""},
	{"p256", kms.Sign, kms.ECDSAP256}, {"p384", kms.Sign, kms.ECDSAP384},
}

func (s site) hardRing(generated string, residency ...string) hardRing {
	s.t.Helper()
	h := hardRing{s, unique("hard"), residency, generated}
	kr, err := s.client("fr", "operator").CreateKeyring(s.t.Context(), wire.CreateKeyringRequest{
		Name: h.name, Residency: residency, Policy: "keys", Protection: string(kms.Hardware),
	})
	if err != nil {
		s.t.Fatalf("create a keyring of protection hardware at %v: %v", residency, err)
	}
	if kr.Protection != string(kms.Hardware) || kr.KEK != 0 || len(kr.Nodes) != len(residency) {
		s.t.Errorf("keyring %+v", kr)
	}
	for _, k := range hardKeys {
		_, err := s.client("fr", "operator").CreateKey(s.t.Context(), h.name, wire.CreateKeyRequest{Name: k.name, Purpose: string(k.purpose), Algorithm: string(k.alg)})
		if err != nil {
			s.t.Fatalf("create %s/%s: %v", h.name, k.name, err)
		}
	}
	s.settled()
	return h
}

// versions checks what is said of a key's versions, of which n is the latest.
func (h hardRing) versions(key string, n int) {
	h.t.Helper()
	k, err := h.client("jp", "operator").Key(h.name, key).Describe(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	if k.Protection != string(kms.Hardware) || len(k.Versions) != n {
		h.t.Fatalf("key %+v", k)
	}
	for _, v := range k.Versions {
		if v.Generated != h.generated || v.KEK != 0 {
			h.t.Errorf("version %d of %s/%s: generated %q, KEK %d; wanted %q and none", v.Version, h.name, key, v.Generated, v.KEK, h.generated)
		}
		if v.Version > 1 && (len(v.Receipts) != len(h.residency) || slices.ContainsFunc(v.Receipts, func(r wire.Receipt) bool { return !r.Received })) {
			h.t.Errorf("version %d of %s/%s: receipts %+v", v.Version, h.name, key, v.Receipts)
		}
	}
}

// works uses every key at one site and opens or verifies the result at every one.
func (h hardRing) works(at string) {
	h.t.Helper()
	ctx, t := h.t.Context(), h.t
	from := h.client(at, "service")
	ct := h.encrypt(at, h.name, "data", "made at "+at)
	dk, err := from.Key(h.name, "data").DataKey(ctx, wire.DataKeyRequest{})
	if err != nil {
		t.Fatalf("data key at %s: %v", at, err)
	}
	long := wire.Secret(strings.Repeat("m", wire.MaxPlaintext))
	mac, err := from.Key(h.name, "tags").MAC(ctx, wire.MACRequest{Message: long})
	if err != nil {
		t.Fatalf("MAC of %d bytes at %s: %v", len(long), at, err)
	}
	sigs := map[string]wire.SignResponse{}
	for _, key := range []string{"p256", "p384"} {
		if sigs[key], err = from.Key(h.name, key).Sign(ctx, wire.SignRequest{Message: wire.Secret("m")}); err != nil {
			t.Fatalf("sign with %s at %s: %v", key, at, err)
		}
	}
	for _, other := range h.residency {
		h.decrypts(other, h.name, "data", ct, "made at "+at)
		to := h.client(other, "service")
		d, err := to.Key(h.name, "data").Decrypt(ctx, wire.DecryptRequest{Ciphertext: dk.Wrapped})
		if err != nil || string(d.Plaintext) != string(dk.Plaintext) {
			t.Errorf("the data key of %s at %s: %v", at, other, err)
		}
		v, err := to.Key(h.name, "tags").VerifyMAC(ctx, wire.VerifyMACRequest{Message: long, MAC: mac.MAC})
		if err != nil || !v.Valid {
			t.Errorf("the MAC of %s at %s: valid %v, %v", at, other, v.Valid, err)
		}
		for key, sig := range sigs {
			v, err := to.Key(h.name, key).Verify(ctx, wire.VerifyRequest{Message: wire.Secret("m"), Signature: sig.Signature})
			if err != nil || !v.Valid {
				t.Errorf("the signature by %s of %s at %s: valid %v, %v", key, at, other, v.Valid, err)
			}
		}
	}
}

// proven wants evidence of the rotation that verifies, from a node that is not
// resident where there is one.
func (h hardRing) proven(p wire.Proposal) {
	h.t.Helper()
	b, err := h.client("jp", "operator").Evidence(h.t.Context(), p.ID)
	if err != nil {
		h.t.Fatal(err)
	}
	e, err := audit.ParseEvidence(b)
	if err != nil {
		h.t.Fatal(err)
	}
	if _, err := audit.VerifyEvidence(e, h.c.Vars["CONCLAVE_CLUSTER"]); err != nil {
		h.t.Errorf("evidence of the rotation %s: %v", p.ID, err)
	}
}

// TestHardwareKeyrings has keys of protection hardware in SoftHSM tokens alone,
// which generate them, and in tokens and a TPM, for which they are made on the host.
func TestHardwareKeyrings(t *testing.T) {
	s := site{t, cluster(t)}
	for _, h := range []hardRing{s.hardRing("device", "de", "fr"), s.hardRing("host", "de", "fr", "jp")} {
		for _, at := range h.residency {
			h.works(at)
		}
		old := h.encrypt("de", h.name, "data", "version 1")
		for _, k := range hardKeys {
			h.versions(k.name, 1)
			p := s.rotate(h.name, k.name, 2)
			h.versions(k.name, 2)
			h.proven(p)
		}
		for _, at := range h.residency {
			h.works(at)
			h.decrypts(at, h.name, "data", old, "version 1")
		}
		for _, at := range h.residency { // every device has to load the keys again
			n := s.c.Nodes[at]
			if err := n.Kill(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := n.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		s.settled()
		for _, at := range h.residency {
			h.works(at)
			h.decrypts(at, h.name, "data", old, "version 1")
		}
		h.refuses()
		h.ends()
	}
}

// refuses asks for what keys in a device do not do.
func (h hardRing) refuses() {
	t, ctx := h.t, h.t.Context()
	t.Helper()
	_, err := h.client("fr", "operator").CreateKey(ctx, h.name, wire.CreateKeyRequest{Name: "ed", Purpose: string(kms.Sign), Algorithm: string(kms.Ed25519)})
	if refused(t, "an Ed25519 key", err, kms.Invalid); err != nil && !strings.Contains(err.Error(), "ecdsa") {
		t.Errorf("%q does not say what to use", err)
	}
	svc := h.client("fr", "service")
	_, err = svc.Key(h.name, "tags").MAC(ctx, wire.MACRequest{Message: wire.Secret("\x00\x00\x00\x01conclave/check-value/2\x00")})
	refused(t, "a MAC that would be a check value", err, kms.Invalid)
	_, err = svc.Key(h.name, "p256").Sign(ctx, wire.SignRequest{Message: wire.Secret(kms.ReceiptPrefix + "x")})
	refused(t, "a signature that would be a receipt", err, kms.Invalid)
	if !slices.Contains(h.residency, "jp") {
		cl, err := h.c.ClientAt("jp", "fr", "service")
		if err != nil {
			t.Fatal(err)
		}
		_, err = cl.Key(h.name, "data").Encrypt(ctx, wire.EncryptRequest{Plaintext: wire.Secret("x")})
		refused(t, "a node that is not resident", err, kms.NotResident)
	}
}

// ends suspends a key, which no device then uses, and approves its destruction.
func (h hardRing) ends() {
	t, ctx := h.t, h.t.Context()
	t.Helper()
	p := h.propose(kms.ActionDestroy, h.name, "p256")
	for _, id := range []string{"fr-1", "de-1", "jp-1"} {
		if p.Met {
			break
		}
		p = h.approve(h.custodian(id), p)
	}
	if !p.Met || p.Progress != "waiting" {
		t.Errorf("the destruction of a key of protection hardware: %s", p.Summary)
	}
	h.approve(h.custodian("fr-1"), h.propose(kms.ActionSuspend, h.name, "tags"))
	for _, at := range h.residency {
		err := h.suspended(at)
		if err != nil {
			t.Errorf("suspend at %s: %v", at, err)
		}
		_, err = h.client(at, "service").Key(h.name, "tags").MAC(ctx, wire.MACRequest{Message: wire.Secret("m")})
		refused(t, "a suspended key at "+at, err, kms.Conflict)
	}
}

// suspended waits until a site's node knows that the key is suspended.
func (h hardRing) suspended(at string) error {
	cl := h.client(at, "operator")
	return harness.Within(h.t.Context(), time.Minute, "the key is suspended", func(ctx context.Context) error {
		k, err := cl.Key(h.name, "tags").Describe(ctx)
		if err == nil && !k.Suspended {
			err = errors.New("it is not")
		}
		return err
	})
}
