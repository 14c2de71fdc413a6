package tpm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/kms/secret"
)

// Where the TCG EK Credential Profile, version 2.3, puts endorsement keys, their
// certificates and the certificates of the authorities above them.
const (
	ekP384Handle tpm2.TPMHandle = 0x81010016 // template H-3
	ekP384Cert   tpm2.TPMHandle = 0x01c00016
	ekRSAHandle  tpm2.TPMHandle = 0x81010001 // template L-1
	ekRSACert    tpm2.TPMHandle = 0x01c00002
	ekChainFirst tpm2.TPMHandle = 0x01c00100
	ekChainLast  tpm2.TPMHandle = 0x01c001ff

	maxChainIndexes = 16
	maxChainLen     = 4
)

// ekPolicyC is PolicyC of the TCG EK Credential Profile for SHA-384: the policy
// is the one that an index of the platform's owner holds.
const ekPolicyC = "d6032ce61f2fb3c240eb3cf6a33237ef2b6a16f4293c22b455e261cffd217ad5b4947c2d73e63005eed2dc2b3593d165"

// ekSlot is one of the endorsement keys that a TPM may have.
type ekSlot struct {
	handle, cert tpm2.TPMHandle
	template     tpm2.TPMTPublic // to make it again where it is not persistent
}

// ekSlots lists them in the order of preference.
func ekSlots() [2]ekSlot {
	return [2]ekSlot{
		{ekP384Handle, ekP384Cert, ekP384Template()},
		{ekRSAHandle, ekRSACert, tpm2.RSAEKTemplate},
	}
}

// ekP384Template is template H-3.
func ekP384Template() tpm2.TPMTPublic {
	t := suiteOf(ecdh.P384()).storage()
	t.ObjectAttributes.NoDA, t.ObjectAttributes.AdminWithPolicy = false, true
	t.AuthPolicy.Buffer = ekPolicyB()
	return t
}

// ekPolicyA is the policy that asks for the endorsement authorization.
func ekPolicyA(alg tpm2.TPMIAlgHash) []byte {
	return policyDigest(alg, tpm2.PolicySecret{AuthHandle: tpm2.TPMRHEndorsement})
}

// ekBranches are PolicyA and PolicyC, of which PolicyB wants one.
func ekBranches() tpm2.TPMLDigest {
	c, err := hex.DecodeString(ekPolicyC)
	if err != nil {
		panic(err) // a constant
	}
	return tpm2.TPMLDigest{Digests: []tpm2.TPM2BDigest{{Buffer: ekPolicyA(tpm2.TPMAlgSHA384)}, {Buffer: c}}}
}

func ekPolicyB() []byte {
	return policyDigest(tpm2.TPMAlgSHA384, tpm2.PolicyOr{PHashList: ekBranches()})
}

// policyDigest computes the digest of a sequence of policy commands.
func policyDigest(alg tpm2.TPMIAlgHash, commands ...tpm2.PolicyCommand) []byte {
	p, err := tpm2.NewPolicyCalculator(alg)
	for _, cmd := range commands {
		if err == nil {
			err = cmd.Update(p)
		}
	}
	if err != nil {
		panic(err) // of commands that this package makes
	}
	return p.Hash().Digest
}

// endorsement is an endorsement key in use and its certificate, if it has one.
type endorsement struct {
	object
	transient bool
	cert      []byte
}

func (e *endorsement) release(c *conn) {
	if e.transient && c.err == nil {
		c.flush(e.handle)
	}
}

// endorsementKey finds the first endorsement key with a certificate, or else the
// first there is. The caller releases it.
func (d *Device) endorsementKey(c *conn) (*endorsement, error) {
	for _, slot := range ekSlots() {
		cert, err := c.certificate(slot.cert)
		if err != nil {
			return nil, err
		}
		if cert == nil {
			continue
		}
		ek, err := d.loadEK(c, slot)
		if err != nil {
			if saidNo(c, err) {
				continue
			}
			return nil, err
		}
		if certifies(cert, ek.public) {
			ek.cert = cert.Raw
			return ek, nil
		}
		ek.release(c)
	}
	for _, slot := range ekSlots() {
		o, err := c.readObject(slot.handle)
		if err == nil && isEndorsementKey(&o.public) {
			return &endorsement{object: *o}, nil
		}
		if err != nil && !saidNo(c, err) {
			return nil, err
		}
	}
	return d.loadEK(c, ekSlots()[0])
}

// loadEK takes the persistent endorsement key or makes it again from the
// endorsement seed.
func (d *Device) loadEK(c *conn, slot ekSlot) (*endorsement, error) {
	o, err := c.readObject(slot.handle)
	if err == nil && isEndorsementKey(&o.public) {
		return &endorsement{object: *o}, nil
	}
	if err != nil && !saidNo(c, err) {
		return nil, err
	}
	d.extend(c)
	rsp, err := (tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(slot.template),
	}).Execute(c)
	if err != nil {
		return nil, endorsementRefused(err)
	}
	if o, err = c.readObject(rsp.ObjectHandle); err != nil {
		c.flush(rsp.ObjectHandle)
		return nil, err
	}
	return &endorsement{object: *o, transient: true}, nil
}

func endorsementRefused(err error) error {
	if errors.Is(err, tpm2.TPMRCBadAuth) || errors.Is(err, tpm2.TPMRCAuthFail) {
		return fmt.Errorf("tpm: %w: the endorsement authorization is set; attestation needs it empty (tpm2_changeauth -c endorsement)", ErrAuth)
	}
	return err
}

// certificate reads a certificate from an index; nil when there is none that
// can be read.
func (c *conn) certificate(at tpm2.TPMHandle) (*x509.Certificate, error) {
	der, err := c.readNV(at)
	if err != nil {
		if saidNo(c, err) {
			return nil, nil
		}
		return nil, err
	}
	certs := splitCertificates(der)
	if len(certs) != 1 {
		return nil, nil
	}
	cert, err := x509.ParseCertificate(certs[0])
	if err != nil {
		return nil, nil
	}
	return cert, nil
}

// splitCertificates splits DER certificates that follow one another; filling
// bytes behind the last are left out.
func splitCertificates(b []byte) [][]byte {
	var out [][]byte
	for len(b) > 0 && b[0] == 0x30 && len(out) < maxChainLen {
		var raw asn1.RawValue
		rest, err := asn1.Unmarshal(b, &raw)
		if err != nil {
			break
		}
		out = append(out, bytes.Clone(raw.FullBytes))
		b = rest
	}
	return out
}

// certifies reports whether a certificate is for a key.
func certifies(cert *x509.Certificate, pub tpm2.TPMTPublic) bool {
	key, err := tpm2.Pub(pub)
	if err != nil {
		return false
	}
	k, ok := key.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(cert.PublicKey)
}

// certificateChain reads the certificates of the authorities, where the maker
// of the TPM left them in it.
func (c *conn) certificateChain() ([][]byte, error) {
	indexes, err := c.handles(ekChainFirst, maxChainIndexes)
	if err != nil {
		return nil, err
	}
	var all []byte
	for _, h := range indexes {
		if h < ekChainFirst || h > ekChainLast {
			break
		}
		part, err := c.readNV(h)
		if err != nil {
			if saidNo(c, err) {
				break
			}
			return nil, err
		}
		all = append(all, part...)
	}
	return splitCertificates(all), nil
}

// withEndorsement runs fn with a policy session that may use the endorsement
// key. It proves the endorsement authorization rather than the key's own
// authorization value: that is not subject to dictionary attack protection.
func (d *Device) withEndorsement(c *conn, ek *endorsement, fn func(tpm2.Session) error) error {
	alg := ek.public.NameAlg
	second := bytes.Equal(ek.public.AuthPolicy.Buffer, ekPolicyB())
	if !second && !bytes.Equal(ek.public.AuthPolicy.Buffer, ekPolicyA(alg)) {
		return unsafe("the endorsement key has another policy than the TCG EK Credential Profile gives it")
	}
	s, _, err := tpm2.PolicySession(c, alg, 16)
	if err != nil {
		return err
	}
	defer func() {
		if c.err == nil {
			c.flush(s.Handle())
		}
	}()
	_, err = (tpm2.PolicySecret{
		AuthHandle:    tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
		PolicySession: s.Handle(), NonceTPM: s.NonceTPM(),
	}).Execute(c)
	if err == nil && second {
		_, err = (tpm2.PolicyOr{PolicySession: s.Handle(), PHashList: ekBranches()}).Execute(c)
	}
	if err != nil {
		return endorsementRefused(err)
	}
	return fn(s)
}

// Activate opens what MakeCredential made for this TPM's endorsement key and
// the name of its attestation key, and returns the secret: proof that both are
// in this TPM (TPM2_ActivateCredential). The arguments are the content of
// TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET. A credential for another TPM or key
// is ErrInvalid; a TPM without attestation key is ErrNotProvisioned.
func (d *Device) Activate(ctx context.Context, credential, encryptedSecret []byte) ([]byte, error) {
	if len(credential) > maxPrivate || len(encryptedSecret) > maxPrivate {
		return nil, errCredential
	}
	credential, encryptedSecret = bytes.Clone(credential), bytes.Clone(encryptedSecret)
	return do(ctx, d, call[[]byte]{op: "activate credential", drop: secret.Wipe, fn: func(c *conn) (out []byte, err error) {
		if d.attestation == nil {
			return nil, errNoAttestation
		}
		d.letGo(c) // three sessions are all that some TPMs have
		ek, err := d.endorsementKey(c)
		if err != nil {
			return nil, err
		}
		defer ek.release(c)
		d.extend(c)
		err = d.withEndorsement(c, ek, func(policy tpm2.Session) error {
			return d.withKeyAuth(c, encryptInOut(), func(s tpm2.Session) error {
				rsp, err := (tpm2.ActivateCredential{
					ActivateHandle: d.attestation.auth(s), KeyHandle: ek.auth(policy),
					CredentialBlob: tpm2.TPM2BIDObject{Buffer: credential},
					Secret:         tpm2.TPM2BEncryptedSecret{Buffer: encryptedSecret},
				}).Execute(c)
				if err != nil {
					return refusedCredential(err)
				}
				out = bytes.Clone(rsp.CertInfo.Buffer)
				secret.Wipe(rsp.CertInfo.Buffer)
				return nil
			})
		})
		return out, err
	}})
}

var (
	// errCredential is the one answer to every credential that does not open.
	errCredential    = invalid("the credential is not for this TPM's endorsement key and attestation key")
	errNoAttestation = fmt.Errorf("tpm: %w: there is no attestation key beside the others; Provision adds it (conclaved init)", ErrNotProvisioned)
)

// refusedCredential is refusedBlob for credentials; a point off the curve and a
// ciphertext out of range are answered without naming a parameter.
func refusedCredential(err error) error {
	for _, rc := range []tpm2.TPMRC{tpm2.TPMRCECCPoint, tpm2.TPMRCValue, tpm2.TPMRCSize, tpm2.TPMRCNoResult} {
		if errors.Is(err, rc) {
			return errCredential
		}
	}
	return refusedBlob(err, errCredential)
}
