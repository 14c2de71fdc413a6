package approval

import (
	"crypto/x509"
	"fmt"

	"github.com/conclave-kms/conclave/kms"
)

// Limits of a site.
const (
	MaxCAs         = 16       // CA certificates
	MaxCertificate = 16 << 10 // bytes of one
)

// SiteParams decodes the parameters of the action site.
func (p Proposal) SiteParams() (SiteParams, error) { return params[SiteParams](p) }

// SiteTarget returns the target of a proposal about a site.
func SiteTarget(site string) string { return TargetSite + "/" + site }

func (p Proposal) validateSite() error {
	params, err := p.SiteParams()
	if err != nil {
		return err
	}
	return params.Validate()
}

// Validate checks the shape of the parameters: what the change has is there and well
// formed, and nothing else is. Errors: kms.Invalid.
func (s SiteParams) Validate() error {
	switch s.Change {
	case SiteAdd, SiteCAs, SiteRemove:
	default:
		return kms.Errorf(kms.Invalid, "the change %q of a site is none of %s, %s, %s", s.Change, SiteAdd, SiteCAs, SiteRemove)
	}
	if s.Change == SiteAdd {
		if err := CheckTrustDomain(s.TrustDomain); err != nil {
			return err
		}
	} else if s.TrustDomain != "" {
		return kms.Errorf(kms.Invalid, "a site keeps its trust domain; only a new one brings it")
	}
	if s.Change == SiteRemove {
		if len(s.CAs) != 0 {
			return kms.Errorf(kms.Invalid, "a site that is removed brings no CA certificates")
		}
		return nil
	}
	return CheckCAs(s.CAs)
}

// CheckTrustDomain checks that a string is the name of a SPIFFE trust domain. Errors:
// kms.Invalid.
func CheckTrustDomain(name string) error {
	id, err := kms.ParseIdentity("spiffe://" + name + "/node/x")
	if err != nil || id.TrustDomain != name {
		return kms.Errorf(kms.Invalid, "%q is not a trust domain name", name)
	}
	return nil
}

// CheckCAs checks a site's bundle: 1 to MaxCAs DER certificates of CAs. Errors:
// kms.Invalid.
func CheckCAs(cas [][]byte) error {
	if len(cas) == 0 || len(cas) > MaxCAs {
		return kms.Errorf(kms.Invalid, "there are %d CA certificates; a site needs 1 to %d", len(cas), MaxCAs)
	}
	for i, der := range cas {
		if len(der) > MaxCertificate {
			return kms.Errorf(kms.Invalid, "CA certificate %d is longer than %d bytes", i+1, MaxCertificate)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return kms.Wrap(kms.Invalid, err, fmt.Sprintf("CA certificate %d is not a DER certificate", i+1), "")
		}
		if !c.BasicConstraintsValid || !c.IsCA {
			return kms.Errorf(kms.Invalid, "certificate %d is not that of a CA", i+1)
		}
	}
	return nil
}
