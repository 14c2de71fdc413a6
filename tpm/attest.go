package tpm

import (
	"bytes"
	"context"

	"github.com/google/go-tpm/tpm2"
)

// maxQualifying is the longest qualifying data that every TPM takes.
const maxQualifying = 48

// Evidence is what a TPM says about itself and its keys. All structures are
// marshalled as in TPM 2.0 Part 2, without a length in front.
type Evidence struct {
	EKCertificate []byte   // DER; empty when the TPM has none
	EKChain       [][]byte // DER, as found in the TPM; mostly empty
	EKPublic      []byte   // TPMT_PUBLIC of the endorsement key
	AK            []byte   // TPMT_PUBLIC of the attestation key

	Storage, Agreement, Signing Certified
	Quote                       Quoted
}

// Certified is the attestation key's word that an object with this public area
// is in the TPM (TPM2_Certify).
type Certified struct {
	Public    []byte // TPMT_PUBLIC
	Attest    []byte // TPMS_ATTEST, type TPM_ST_ATTEST_CERTIFY
	Signature []byte // TPMT_SIGNATURE
}

// Quoted is the attestation key's word about the platform configuration registers
// (TPM2_Quote).
type Quoted struct {
	Attest    []byte         // TPMS_ATTEST, type TPM_ST_ATTEST_QUOTE
	Signature []byte         // TPMT_SIGNATURE
	PCRs      map[int][]byte // of the SHA-256 bank, as read; their digest is in Attest
}

// Attest has the attestation key certify the other keys and quote the
// registers 0 to 15 of the SHA-256 bank. qualifying, 1 to 48 bytes, stands as extraData
// in every attestation. A TPM without endorsement key certificate gives
// Evidence without one; a TPM without attestation key is ErrNotProvisioned.
func (d *Device) Attest(ctx context.Context, qualifying []byte) (Evidence, error) {
	if len(qualifying) < 1 || len(qualifying) > maxQualifying {
		return Evidence{}, invalid("qualifying data has 1 to %d bytes, not %d", maxQualifying, len(qualifying))
	}
	q := bytes.Clone(qualifying)
	return do(ctx, d, call[Evidence]{op: "attest", fn: func(c *conn) (Evidence, error) { return d.attest(c, q) }})
}

func (d *Device) attest(c *conn, qualifying []byte) (ev Evidence, err error) {
	if d.attestation == nil {
		return ev, errNoAttestation
	}
	d.letGo(c) // three sessions are all that some TPMs have
	ek, err := d.endorsementKey(c)
	if err != nil {
		return ev, err
	}
	ek.release(c)
	ev.EKCertificate, ev.EKPublic, ev.AK = ek.cert, tpm2.Marshal(ek.public), tpm2.Marshal(d.attestation.public)
	if ev.EKCertificate != nil {
		if ev.EKChain, err = c.certificateChain(); err != nil {
			return ev, err
		}
	}
	for _, k := range []struct {
		to  *Certified
		key *object
	}{{&ev.Storage, d.storage}, {&ev.Agreement, d.agreement}, {&ev.Signing, d.signing}} {
		if *k.to, err = d.certify(c, k.key, qualifying); err != nil {
			return ev, err
		}
	}
	ev.Quote, err = d.quote(c, qualifying)
	return ev, err
}

// noScheme leaves the scheme to the key, which has one.
func noScheme() tpm2.TPMTSigScheme { return tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull} }

// certify needs a session for each of its two keys: one cannot serve twice in a
// command.
func (d *Device) certify(c *conn, key *object, qualifying []byte) (out Certified, err error) {
	d.extend(c)
	err = d.withKeyAuth(c, tpm2.Audit(), func(subject tpm2.Session) error {
		return d.withKeyAuth(c, encryptIn(), func(signer tpm2.Session) error {
			rsp, err := (tpm2.Certify{
				ObjectHandle: key.auth(subject), SignHandle: d.attestation.auth(signer),
				QualifyingData: tpm2.TPM2BData{Buffer: qualifying}, InScheme: noScheme(),
			}).Execute(c)
			if err != nil {
				return err
			}
			out = Certified{tpm2.Marshal(key.public), bytes.Clone(rsp.CertifyInfo.Bytes()), tpm2.Marshal(rsp.Signature)}
			return nil
		})
	})
	return out, err
}

// quote reads the registers and has them quoted, again when one was extended in
// between.
func (d *Device) quote(c *conn, qualifying []byte) (Quoted, error) {
	all := make([]int, 16)
	for i := range all {
		all[i] = i
	}
	for range 3 {
		d.extend(c)
		values, err := c.readPCRs(all)
		if err != nil {
			return Quoted{}, err
		}
		q, digest, err := d.quoteOnce(c, all, qualifying)
		if err != nil {
			return Quoted{}, err
		}
		if bytes.Equal(digest, d.suite.pcrDigest(values)) {
			q.PCRs = values
			return q, nil
		}
	}
	return Quoted{}, unavailable("the platform configuration registers change all the time")
}

func (d *Device) quoteOnce(c *conn, pcrs []int, qualifying []byte) (q Quoted, digest []byte, err error) {
	err = d.withKeyAuth(c, encryptIn(), func(s tpm2.Session) error {
		rsp, err := (tpm2.Quote{
			SignHandle: d.attestation.auth(s), QualifyingData: tpm2.TPM2BData{Buffer: qualifying},
			InScheme: noScheme(), PCRSelect: selectPCRs(pcrs),
		}).Execute(c)
		if err != nil {
			return err
		}
		attested, err := rsp.Quoted.Contents()
		if err != nil {
			return err
		}
		info, err := attested.Attested.Quote()
		if err != nil {
			return err
		}
		digest = info.PCRDigest.Buffer
		q = Quoted{Attest: bytes.Clone(rsp.Quoted.Bytes()), Signature: tpm2.Marshal(rsp.Signature)}
		return nil
	})
	return q, digest, err
}
