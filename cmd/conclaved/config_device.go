package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms/secret"
)

// DeviceConfig says where the hardware root is.
type DeviceConfig struct {
	Type        string   `toml:"type"` // "pkcs11" or "tpm"
	Curve       string   `toml:"curve"`
	CallTimeout Duration `toml:"call_timeout"`

	URI          string   `toml:"uri"`           // pkcs11: RFC 7512, with pin-source
	URIs         []string `toml:"uris"`          // pkcs11: in place of uri, several slots or modules with the same keys
	PINFD        int      `toml:"pin_fd"`        // pkcs11: inherited descriptor with the PIN, in place of the URI's pin-source
	Label        string   `toml:"label"`         // pkcs11: prefix of the device keys' labels; default "conclave"
	Isolate      *bool    `toml:"isolate"`       // pkcs11: the library in a process of its own
	SoftHSMConf  string   `toml:"softhsm_conf"`  // pkcs11: SoftHSM's configuration file, for SoftHSM only
	SoftHSMConfs []string `toml:"softhsm_confs"` // pkcs11: one for each of uris, for SoftHSM only
	// pkcs11: a file of the vendor's that attests the device keys; it goes into the node card as it is.
	VendorAttestation string `toml:"vendor_attestation"`

	pin *secret.Bytes // from PINFD, which can be read once

	Path      string `toml:"path"`       // tpm: /dev/tpmrm0 or unix:SOCKET
	AuthFile  string `toml:"auth_file"`  // tpm: file of mode 0600 with the authorisation secret, or fd:N
	OwnerFile string `toml:"owner_file"` // tpm: the same for owner and lockout, where it is not that of auth_file
	PCRs      []int  `toml:"pcrs"`       // tpm: registers whose values the device keys are bound to
	EKChain   string `toml:"ek_chain"`   // tpm: certificates (PEM) between the EK's and the vendor's, where the TPM does not hold them
}

const (
	defaultCurve       = "P-384"
	defaultCallTimeout = 10 * time.Second
	// isolateByDefault follows from what isolation costs: hsm/child/DESIGN.md.
	isolateByDefault = false
	maxMembers       = 16
)

func (c *DeviceConfig) setDefaults() {
	if c.Curve == "" {
		c.Curve = defaultCurve
	}
	if c.CallTimeout.Duration == 0 {
		c.CallTimeout.Duration = defaultCallTimeout
	}
}

// isolated reports whether PKCS#11 libraries run in processes of their own.
func (c DeviceConfig) isolated() bool {
	if c.Isolate == nil {
		return isolateByDefault
	}
	return *c.Isolate
}

// paths are the fields that are relative to the configuration file.
func (c *DeviceConfig) paths() []*string {
	paths := []*string{&c.SoftHSMConf, &c.AuthFile, &c.OwnerFile, &c.EKChain, &c.VendorAttestation}
	for i := range c.SoftHSMConfs {
		paths = append(paths, &c.SoftHSMConfs[i])
	}
	return paths
}

// check returns the first field of the table that is wrong and why.
func (c DeviceConfig) check(table string) (field, why string) {
	switch c.Type {
	case "pkcs11":
		field, why = c.checkPKCS11()
	case "tpm":
		field, why = c.checkTPM()
	case "":
		field, why = "type", `missing: "pkcs11" or "tpm"`
	default:
		field, why = "type", fmt.Sprintf("%q is not \"pkcs11\" or \"tpm\"", c.Type)
	}
	if field == "" && c.Curve != "P-384" && c.Curve != "P-256" {
		field, why = "curve", fmt.Sprintf("%q is not \"P-384\" or \"P-256\"", c.Curve)
	}
	if field == "" {
		return "", ""
	}
	return table + "." + field, why
}

func (c DeviceConfig) checkPKCS11() (field, why string) {
	switch {
	case c.URI == "" && c.URIs == nil:
		return "uri", "missing: a PKCS#11 URI (RFC 7512) with module-path and pin-source; or several in uris"
	case c.URI != "" && c.URIs != nil:
		return "uris", "there is uri too: leave one of them out"
	case c.URIs != nil && len(c.URIs) < 2:
		return "uris", fmt.Sprintf("%d members make no group: at least 2, or uri for one", len(c.URIs))
	case len(c.URIs) > maxMembers:
		return "uris", fmt.Sprintf("%d members: at most %d", len(c.URIs), maxMembers)
	case c.SoftHSMConfs != nil && len(c.SoftHSMConfs) != len(c.URIs):
		return "softhsm_confs", fmt.Sprintf("%d files for %d members of uris: one for each", len(c.SoftHSMConfs), len(c.URIs))
	case c.SoftHSMConfs != nil && c.SoftHSMConf != "":
		return "softhsm_confs", "there is softhsm_conf too: leave one of them out"
	}
	for i, u := range c.URIs {
		if !strings.HasPrefix(u, "pkcs11:") {
			return "uris", fmt.Sprintf("member %d is not a PKCS#11 URI (RFC 7512)", i+1)
		}
		for j := range i {
			if c.URIs[j] == u && c.SoftHSMConfs == nil {
				return "uris", fmt.Sprintf("members %d and %d are the same", j+1, i+1)
			}
		}
	}
	for _, f := range []struct {
		field string
		set   bool
	}{{"path", c.Path != ""}, {"auth_file", c.AuthFile != ""}, {"owner_file", c.OwnerFile != ""}, {"pcrs", c.PCRs != nil}, {"ek_chain", c.EKChain != ""}} {
		if f.set {
			return f.field, `it is for type "tpm" only`
		}
	}
	return "", ""
}

func (c DeviceConfig) checkTPM() (field, why string) {
	switch {
	case c.Path == "":
		return "path", "missing: /dev/tpmrm0 or unix:SOCKET"
	case c.AuthFile == "":
		return "auth_file", "missing: a file of mode 0600 with the TPM's authorisation secret"
	}
	for _, f := range []struct {
		field string
		set   bool
	}{{"uri", c.URI != ""}, {"uris", c.URIs != nil}, {"pin_fd", c.PINFD != 0}, {"label", c.Label != ""}, {"isolate", c.Isolate != nil},
		{"softhsm_conf", c.SoftHSMConf != ""}, {"softhsm_confs", c.SoftHSMConfs != nil}, {"vendor_attestation", c.VendorAttestation != ""}} {
		if f.set {
			return f.field, `it is for type "pkcs11" only`
		}
	}
	seen := map[int]bool{}
	for _, i := range c.PCRs {
		if i < 0 || i > 23 || seen[i] {
			return "pcrs", fmt.Sprintf("%d is not a register from 0 to 23, each once", i)
		}
		seen[i] = true
	}
	if c.PCRs != nil && len(c.PCRs) == 0 {
		return "pcrs", "an empty list binds to nothing: leave it out"
	}
	return "", ""
}
