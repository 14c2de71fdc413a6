package attest

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"strings"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/pqc"
)

// verify holds that the three device keys are the subject's, that the attestation
// key certified them, and that the quote names the subject; it reports how far the
// attestation key leads to a TPM.
func (t *TPM) verify(s Subject, c Context, r *Report) error {
	ek, err := t.endorsementKey(c)
	if err != nil {
		return err
	}
	ak, err := t.attestationKey()
	if err != nil {
		return err
	}
	keys, err := t.deviceKeys(ak, Qualifying(s))
	if err != nil {
		return err
	}
	if err := keys.match(s); err != nil {
		return err
	}
	quoted, err := t.Quote.verify(ak, Qualifying(s))
	if err != nil {
		return err
	}
	var witness *Subject
	if t.Witness != nil {
		by, err := t.Witness.verify(t, s, c)
		if err != nil {
			return err
		}
		witness = &by
	}
	t.report(r, ek, keys, witness, quoted)
	return nil
}

// report says what follows. Without vendor and witness anybody could have made all
// of it in software, so that nothing is proven.
func (t *TPM) report(r *Report, ek endorsement, keys deviceKeys, witness *Subject, quoted string) {
	r.Attested = ek.vendor != nil && witness != nil
	say := r.claimed
	if r.Attested {
		say = r.proven
	}
	say("its storage, agreement and signing key were made in one TPM and cannot leave it: its attestation key certified them")
	say("%s", ek.describe())
	if witness != nil {
		say("attestation key and endorsement key are in one TPM: node %s of site %s challenged it and got the answer", witness.Node, witness.Site)
	}
	for _, p := range keys.policies() {
		say("%s", p)
	}
	say("when the document was made, %s", quoted)
	switch {
	case ek.cert == nil:
		r.claimed("all of this could be software: the TPM has no endorsement key certificate")
	case ek.vendor == nil:
		r.claimed("all of this could be software: the endorsement key certificate leads to none of the vendors in the genesis document (%q)", ek.why.Error())
	}
	if witness == nil {
		r.claimed("the attestation key could be software: no node of another site has challenged the TPM")
	}
	r.claimed("the ML-KEM half of its agreement key is kept wrapped by the device and used in locked memory")
}

// deviceKeys are the node's keys as the TPM shows them.
type deviceKeys struct{ storage, agreement, signing key }

// deviceKeys checks that the keys are what they are for and that the attestation
// key has certified them, for the node that qualifying names.
func (t *TPM) deviceKeys(ak key, qualifying []byte) (k deviceKeys, err error) {
	for _, x := range []struct {
		what string
		from Certified
		to   *key
		ok   func(tpm2.TPMAObject) bool
	}{
		{"storage", t.Storage, &k.storage, func(a tpm2.TPMAObject) bool { return a.Restricted && a.Decrypt && !a.SignEncrypt }},
		{"agreement", t.Agreement, &k.agreement, func(a tpm2.TPMAObject) bool { return !a.Restricted && a.Decrypt && !a.SignEncrypt }},
		{"signing", t.Signing, &k.signing, func(a tpm2.TPMAObject) bool { return !a.Restricted && !a.Decrypt && a.SignEncrypt }},
	} {
		if *x.to, err = readKey(x.what, x.from.Public); err != nil {
			return k, err
		}
		if !x.ok(x.to.public.ObjectAttributes) {
			return k, invalid("the %s key may be used for something else than that", x.what)
		}
		if err := x.from.verify(x.what, ak, x.to.name, qualifying); err != nil {
			return k, err
		}
	}
	return k, nil
}

// verify checks the certification of a key with the given name.
func (c Certified) verify(what string, ak key, name, qualifying []byte) error {
	a, err := ak.statement("certification of the "+what+" key", c.Attest, c.Signature)
	if err != nil {
		return err
	}
	info, err := a.Attested.Certify()
	if err != nil || a.Type != tpm2.TPMSTAttestCertify {
		return invalid("the certification of the %s key is a statement of another type", what)
	}
	if !bytes.Equal(info.Name.Buffer, name) {
		return invalid("the certification of the %s key is of another key", what)
	}
	if !bytes.Equal(a.ExtraData.Buffer, qualifying) {
		return invalid("the certification of the %s key was made for another node or for other keys", what)
	}
	return nil
}

// match compares the keys with those of the subject.
func (k deviceKeys) match(s Subject) error {
	suite, ok := pqc.Lookup(pqc.SuiteID(s.SigningSuite))
	if !ok || suite.Kind != pqc.Signature || len(s.Signing) != suite.PublicKeySize || !bytes.Equal(k.signing.point, s.Signing) {
		return invalid("the signing key is not the node's")
	}
	if !bytes.HasSuffix(s.Agreement, k.agreement.point) || bytes.Equal(s.Agreement, k.agreement.point) {
		return invalid("the agreement key is not the classical half of the node's")
	}
	if s.ImportKind == "" && len(s.Import) == 0 {
		return nil
	}
	if s.ImportKind != kms.ImportTPM {
		return invalid("keys for the node are wrapped as %q, which is not for a TPM", s.ImportKind)
	}
	imports, err := decode[tpm2.TPMTPublic](s.Import)
	if err != nil || !sameKey(imports, k.storage) {
		return invalid("the key to which others wrap for the node is not its storage key")
	}
	return nil
}

// sameKey compares public areas; points may have leading zeros.
func sameKey(pub *tpm2.TPMTPublic, k key) bool {
	point, err := pointOf(pub)
	if err != nil || !bytes.Equal(point, k.point) {
		return false
	}
	a := *pub
	a.Unique = k.public.Unique
	return bytes.Equal(tpm2.Marshal(&a), tpm2.Marshal(k.public))
}

// policies say which keys can be used only under an authorization policy. What the
// policy is does not follow from its digest.
func (k deviceKeys) policies() (out []string) {
	for _, x := range []struct {
		what string
		key
	}{{"storage", k.storage}, {"agreement", k.agreement}, {"signing", k.signing}} {
		if digest := x.public.AuthPolicy.Buffer; len(digest) > 0 && !x.public.ObjectAttributes.UserWithAuth {
			out = append(out, fmt.Sprintf("its %s key can be used only under the TPM's authorization policy %x", x.what, digest))
		}
	}
	return out
}

// verify checks the quote and returns its words for the report.
func (q Quoted) verify(ak key, qualifying []byte) (string, error) {
	a, err := ak.statement("quote", q.Attest, q.Signature)
	if err != nil {
		return "", err
	}
	info, err := a.Attested.Quote()
	if err != nil || a.Type != tpm2.TPMSTAttestQuote {
		return "", invalid("the quote is a statement of another type")
	}
	if !bytes.Equal(a.ExtraData.Buffer, qualifying) {
		return "", invalid("the quote was made for another node or for other keys")
	}
	var bits [maxPCR/8 + 1]byte
	scheme, err := ak.public.Parameters.ECCDetail()
	if err != nil {
		return "", invalid("the attestation key is not an elliptic curve key")
	}
	bound, err := scheme.Scheme.Details.ECDSA()
	if err != nil {
		return "", invalid("the attestation key has no scheme")
	}
	h := newHash(bound.HashAlg) // statement has checked it
	all := sha256.New()
	for _, p := range q.PCRs {
		bits[p.Index/8] |= 1 << (p.Index % 8)
		_, _ = h.Write(p.Value)
		_, _ = all.Write(p.Value)
	}
	if !selects(info.PCRSelect, bits[:]) || !bytes.Equal(info.PCRDigest.Buffer, h.Sum(nil)) {
		return "", invalid("the quote is of other registers or values than the document lists")
	}
	if len(q.PCRs) == 0 {
		return "no platform register was quoted", nil
	}
	return fmt.Sprintf("the platform registers (PCR %s; SHA-256 bank) had values whose SHA-256 is %x", ranges(q.PCRs), all.Sum(nil)), nil
}

// ranges writes the registers as "0-7, 14".
func ranges(pcrs []PCR) string {
	var out []string
	for i := 0; i < len(pcrs); {
		j := i
		for j+1 < len(pcrs) && pcrs[j+1].Index == pcrs[j].Index+1 {
			j++
		}
		word := fmt.Sprint(pcrs[i].Index)
		if j > i {
			word = fmt.Sprintf("%d-%d", pcrs[i].Index, pcrs[j].Index)
		}
		out = append(out, word)
		i = j + 1
	}
	return strings.Join(out, ", ")
}

// selects reports whether l is the selection bits of the SHA-256 bank and no other.
func selects(l tpm2.TPMLPCRSelection, bits []byte) bool {
	var got [maxPCR/8 + 1]byte
	for _, s := range l.PCRSelections {
		for i, b := range s.PCRSelect {
			if b == 0 {
				continue
			}
			if s.Hash != tpm2.TPMAlgSHA256 || i >= len(got) {
				return false
			}
			got[i] |= b
		}
	}
	return bytes.Equal(got[:], bits)
}
