package attest

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/kms"
)

// Object identifiers of the TCG EK credential profile.
var (
	oidSAN          = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidEKUsage      = asn1.ObjectIdentifier{2, 23, 133, 8, 1}
	oidManufacturer = asn1.ObjectIdentifier{2, 23, 133, 2, 1}
	oidModel        = asn1.ObjectIdentifier{2, 23, 133, 2, 2}
	oidVersion      = asn1.ObjectIdentifier{2, 23, 133, 2, 3}
)

const minRSA = 2048 // bits of an endorsement key

// endorsement is the endorsement key as the document shows it.
type endorsement struct {
	cert   *x509.Certificate // nil: none
	vendor *x509.Certificate // that the chain leads to; nil: none
	why    error             // there is no vendor
}

// endorsementKey parses certificate and public area, which must be of one key.
func (t *TPM) endorsementKey(c Context) (endorsement, error) {
	var e endorsement
	pub, err := decode[tpm2.TPMTPublic](t.EKPublic)
	if err != nil {
		return e, invalid("the endorsement key is not a TPMT_PUBLIC")
	}
	a := pub.ObjectAttributes
	if !a.FixedTPM || !a.FixedParent || !a.SensitiveDataOrigin || !a.Restricted || !a.Decrypt || a.SignEncrypt {
		return e, invalid("the endorsement key is not a restricted decryption key that is fixed to its TPM")
	}
	if len(t.EKCertificate) == 0 {
		if len(t.EKChain) > 0 {
			return e, invalid("there is a chain of certificates but no endorsement key certificate")
		}
		return e, nil
	}
	if e.cert, err = x509.ParseCertificate(t.EKCertificate); err != nil {
		return e, kms.Wrap(kms.Invalid, err, "the endorsement key certificate is not a DER certificate", "")
	}
	if !samePublic(pub, e.cert.PublicKey) {
		return e, invalid("the endorsement key certificate is of another key than the endorsement key")
	}
	if e.cert.IsCA {
		return e, invalid("the endorsement key certificate is that of a CA")
	}
	if len(e.cert.ExtKeyUsage)+len(e.cert.UnknownExtKeyUsage) > 0 && !slices.ContainsFunc(e.cert.UnknownExtKeyUsage, oidEKUsage.Equal) {
		return e, invalid("the endorsement key certificate is for other uses than an endorsement key (2.23.133.8.1)")
	}
	intermediates := x509.NewCertPool()
	for i, der := range t.EKChain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return e, kms.Wrap(kms.Invalid, err, fmt.Sprintf("certificate %d of the endorsement key's chain is not a DER certificate", i+1), "")
		}
		intermediates.AddCert(cert)
	}
	e.vendor, e.why = chain(e.cert, intermediates, c)
	return e, nil
}

// chain returns the vendor's certificate that the endorsement key's leads to. Its
// subject alternative name is critical where the subject is empty and names the
// TPM (a directoryName), which crypto/x509 leaves to its caller.
func chain(cert *x509.Certificate, intermediates *x509.CertPool, c Context) (*x509.Certificate, error) {
	if c.Time.IsZero() {
		return nil, fmt.Errorf("no time was given")
	}
	roots := x509.NewCertPool()
	for i, der := range c.Vendors {
		root, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("vendor certificate %d: %w", i+1, err)
		}
		roots.AddCert(root)
	}
	leaf := *cert
	leaf.UnhandledCriticalExtensions = slices.DeleteFunc(slices.Clone(cert.UnhandledCriticalExtensions), oidSAN.Equal)
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: c.Time, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return nil, err
	}
	return chains[0][len(chains[0])-1], nil
}

// samePublic reports whether a certificate's key is that of a public area.
func samePublic(pub *tpm2.TPMTPublic, key any) bool {
	switch k := key.(type) {
	case *rsa.PublicKey:
		if pub.Type != tpm2.TPMAlgRSA || k.N.BitLen() < minRSA {
			return false
		}
		parms, err1 := pub.Parameters.RSADetail()
		unique, err2 := pub.Unique.RSA()
		if err1 != nil || err2 != nil {
			return false
		}
		exponent := int(parms.Exponent)
		if exponent == 0 {
			exponent = 65537 // TPM 2.0 part 2, section 12.2.3.5
		}
		return exponent == k.E && slices.Equal(unique.Buffer, k.N.Bytes())
	case *ecdsa.PublicKey:
		point, err := pointOf(pub)
		if err != nil {
			return false
		}
		b, err := k.Bytes()
		return err == nil && slices.Equal(b, point)
	}
	return false
}

// describe says what the certificate does.
func (e endorsement) describe() string {
	if e.cert == nil {
		return "the endorsement key of the TPM has no certificate"
	}
	text := fmt.Sprintf("the TPM is %s: endorsement key certificate SHA-256 %x, issued by %q", maker(e.cert), sha256.Sum256(e.cert.Raw), e.cert.Issuer.String())
	if e.vendor == nil {
		return text
	}
	return fmt.Sprintf("%s, under the vendor certificate %q, SHA-256 %x, of the genesis document", text, e.vendor.Subject.String(), sha256.Sum256(e.vendor.Raw))
}

// maker reads the manufacturer, model and version of the TPM from the subject
// alternative name (TCG EK credential profile, section 3.2.9).
func maker(cert *x509.Certificate) string {
	found := map[string]string{}
	for _, ext := range cert.Extensions {
		if !ext.Id.Equal(oidSAN) {
			continue
		}
		for _, attr := range directoryNames(ext.Value) {
			if s, ok := attr.Value.(string); ok {
				found[attr.Type.String()] = s
			}
		}
	}
	name := found[oidManufacturer.String()]
	if name == "" {
		return "of a maker that the certificate does not name"
	}
	if b, err := hex.DecodeString(strings.TrimPrefix(name, "id:")); err == nil && strings.HasPrefix(name, "id:") {
		if ascii := strings.TrimRight(string(b), "\x00 "); plain(ascii) {
			name = ascii + " (" + name + ")"
		}
	}
	return fmt.Sprintf("made by %q, model %q, version %q", name, found[oidModel.String()], found[oidVersion.String()])
}

// directoryNames returns the attributes of the directory names in GeneralNames
// (RFC 5280, section 4.2.1.6); none of what is not that.
func directoryNames(der []byte) (out []pkix.AttributeTypeAndValue) {
	var names []asn1.RawValue
	if rest, err := asn1.Unmarshal(der, &names); err != nil || len(rest) > 0 {
		return nil
	}
	for _, n := range names {
		if n.Class != asn1.ClassContextSpecific || n.Tag != 4 {
			continue
		}
		var rdns pkix.RDNSequence
		if rest, err := asn1.Unmarshal(n.Bytes, &rdns); err != nil || len(rest) > 0 {
			continue
		}
		for _, set := range rdns {
			out = append(out, set...)
		}
	}
	return out
}
