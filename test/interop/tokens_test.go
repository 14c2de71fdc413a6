package interop

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"slices"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
	"github.com/conclave-kms/conclave/pqc"
)

// token is a custodian's credential of a classical suite.
type token struct {
	suite  pqc.SuiteID
	public []byte
	key    crypto.Signer
}

func newToken(t *testing.T, suite pqc.SuiteID) token {
	t.Helper()
	if suite == pqc.Ed25519 {
		pub, key, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return token{suite, pub, key}
	}
	curve := elliptic.P256()
	if suite == pqc.ECDSAP384SHA384 {
		curve = elliptic.P384()
	}
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return token{suite, pub, key}
}

func (k token) credential() approval.Credential {
	return approval.Credential{ID: pqc.Fingerprint(k.public), Suite: uint16(k.suite), PublicKey: k.public}
}

func (k token) sign(t *testing.T, message, context []byte) []byte {
	t.Helper()
	if key, ok := k.key.(ed25519.PrivateKey); ok {
		tbs, err := pqc.ToBeSigned(message, context)
		if err != nil {
			t.Fatal(err)
		}
		return ed25519.Sign(key, tbs)
	}
	digest, err := pqc.Digest(k.suite, message, context)
	if err != nil {
		t.Fatal(err)
	}
	key := k.key.(*ecdsa.PrivateKey)
	r, s, err := ecdsa.Sign(rand.Reader, key, digest)
	if err != nil {
		t.Fatal(err)
	}
	size := (key.Curve.Params().BitSize + 7) / 8
	return append(r.FillBytes(make([]byte, size)), s.FillBytes(make([]byte, size))...)
}

// tokens has custodians whose credentials are of every suite.
func tokens(t *testing.T) *statetest.World {
	w := statetest.New(t, statetest.Options{})
	w.CreateKeyring("coalition", "de", "fr", "jp")
	w.CreateKey("coalition", "mail", kms.Encrypt)
	suites := []pqc.SuiteID{pqc.ECDSAP256SHA256, pqc.ECDSAP384SHA384, pqc.Ed25519}
	var keys []token
	for i, site := range []string{"de", "fr", "jp"} {
		k, id := newToken(t, suites[i]), site+"-1"
		keys = append(keys, k)
		record, _ := w.State().Custodian(id)
		record.Revision = 0
		record.Credentials = append(slices.Clone(record.Credentials), k.credential())
		slices.SortFunc(record.Credentials, func(a, b approval.Credential) int { return strings.Compare(a.ID, b.ID) })
		p := w.Propose(kms.ActionCustodian, "custodian/"+id, approval.CustodianParams{Custodian: record})
		w.Approve(p, "de-2", "fr-2", "jp-2")
		w.Execute(p)
	}
	for first := range keys {
		id := w.Propose(kms.ActionRotate, approval.KeyTarget("coalition", "mail"), nil)
		p, _ := w.State().Proposal(id)
		for _, i := range []int{first, (first + 1) % 3} {
			s := approval.Statement{Proposal: id, Verdict: approval.Approve, Custodian: []string{"de-1", "fr-1", "jp-1"}[i], Credential: keys[i].credential().ID}
			s.Signature = keys[i].sign(t, approval.Message(s.Verdict, p.Bytes), []byte(approval.Context))
			w.Do(w.FirstNode(), state.CastVote{Statement: s})
		}
		w.Commit(id)
		w.GiveReceipts()
	}
	return w
}
