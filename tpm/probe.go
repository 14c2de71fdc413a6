package tpm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// ProbeReport says what a TPM can do, and what Conclave would use of it. Nothing in
// it is secret.
type ProbeReport struct {
	TPM         ProbeTPM        `json:"tpm"`
	Curves      []string        `json:"curves"`
	PCRBanks    []string        `json:"pcr_banks"`
	Limits      ProbeLimits     `json:"limits"`
	Lockout     ProbeLockout    `json:"lockout"`
	Endorsement []ProbeEK       `json:"endorsement"`
	Quirks      []string        `json:"quirks"`
	Functions   []ProbeFunction `json:"functions"`
	Keys        ProbeKeys       `json:"keys"`
	Levels      []ProbeLevel    `json:"levels"`
	// Root: Conclave could have this TPM as a node's hardware root. If not, Reason
	// says why.
	Root   bool   `json:"root"`
	Reason string `json:"reason,omitempty"`
}

// ProbeTPM is what the TPM says of itself.
type ProbeTPM struct {
	Path         string `json:"path"`
	Manufacturer string `json:"manufacturer"` // TCG vendor id
	Vendor       string `json:"vendor"`       // its vendor string
	Firmware     string `json:"firmware"`
	Revision     string `json:"revision"` // of the TPM 2.0 Library specification
}

// ProbeLimits are what fits into the TPM now; a software TPM in use has less free.
type ProbeLimits struct {
	TransientFree  uint32 `json:"transient_free"`  // loaded keys
	SessionsFree   uint32 `json:"sessions_free"`   // loaded sessions
	PersistentFree uint32 `json:"persistent_free"` // at the least
	Buffer         uint32 `json:"buffer"`          // bytes of a TPM2B_MAX_BUFFER
}

// ProbeLockout is the dictionary attack protection and what is set.
type ProbeLockout struct {
	Failures        uint32 `json:"failures"`
	MaxFailures     uint32 `json:"max_failures"`
	IntervalSeconds uint32 `json:"interval_seconds"` // after which one failure is forgotten
	RecoverySeconds uint32 `json:"recovery_seconds"` // of the lockout authorization
	Locked          bool   `json:"locked"`
	OwnerSet        bool   `json:"owner_set"`
	LockoutSet      bool   `json:"lockout_set"`
	EndorsementSet  bool   `json:"endorsement_set"`
}

// ProbeEK is an endorsement key of the TCG's EK Credential Profile.
type ProbeEK struct {
	Handle      uint32    `json:"handle"`
	Key         string    `json:"key"`
	Persistent  bool      `json:"persistent"`
	Certificate bool      `json:"certificate"`
	Issuer      string    `json:"issuer,omitempty"`
	NotAfter    time.Time `json:"not_after,omitzero"`
}

// ProbeFunction is one thing that was tried.
type ProbeFunction struct {
	Name   string `json:"name"`
	Works  bool   `json:"works"`
	Found  string `json:"found"` // what trying it showed
	Use    string `json:"use"`   // what Conclave uses it for
	Needed bool   `json:"needed"`
}

// ProbeKeys says whether the device keys are there.
type ProbeKeys struct {
	Base        uint32   `json:"base"` // the first handle
	Curve       string   `json:"curve"`
	Provisioned bool     `json:"provisioned"`
	Missing     []string `json:"missing,omitempty"`
	Problem     string   `json:"problem,omitempty"`
	Signing     []byte   `json:"signing,omitempty"` // the signing key's public point, uncompressed
}

// ProbeLevel is a protection level.
type ProbeLevel struct {
	Level     string   `json:"level"` // software or hardware
	Supported bool     `json:"supported"`
	Why       string   `json:"why,omitempty"` // not
	How       []string `json:"how,omitempty"`
}

// prober makes a report, on a connection of its own for each step: others have
// their turn in between, and what they have loaded stays.
type prober struct {
	cfg    Config
	suite  *suite
	link   link
	report ProbeReport
}

// errBusy explains a TPM that takes a connection and says nothing.
var errBusy = errors.New("it took the connection and did not answer in time: another process holds it (a software TPM serves one connection at a time), or it hangs")

// Probe finds out what a TPM can do by trying it with transient keys of the null
// hierarchy, which nobody else can use and which are flushed at once. It needs
// neither keys nor an authorization value (Config.AuthFile may be empty), and leaves
// what others have loaded alone. Errors: ErrInvalid, ErrUnavailable, also of a TPM
// that is busy with another process.
func Probe(ctx context.Context, cfg Config) (ProbeReport, error) {
	if cfg.AuthFile == "" {
		cfg.AuthFile = os.DevNull // never read here
	}
	cfg, err := cfg.withDefaults()
	if err != nil {
		return ProbeReport{}, err
	}
	l, err := newLink(cfg.Path)
	if err != nil {
		return ProbeReport{}, err
	}
	defer l.reset()
	p := &prober{cfg: cfg, suite: suiteOf(cfg.Curve), link: l}
	for _, step := range []func(*conn) error{p.identify, p.limits, p.endorsements, p.keys} {
		if err := p.with(ctx, step); err != nil {
			return p.report, err
		}
	}
	for _, t := range p.trials() {
		if err := p.try(ctx, t); err != nil {
			return p.report, err
		}
	}
	p.judge()
	return p.report, nil
}

// with runs fn on a connection.
func (p *prober) with(ctx context.Context, fn func(*conn) error) error {
	if ctx.Err() != nil {
		return ended(ctx, "probe")
	}
	deadline := time.Now().Add(p.cfg.CallTimeout)
	c := &conn{link: p.link, deadline: deadline}
	defer c.wipe()
	if err := p.link.open(deadline); err != nil {
		c.fail(err)
		return c.err
	}
	err := c.startup() // one that runs already refuses, which is no failure
	if err == nil {
		err = fn(c)
	}
	if c.err != nil {
		p.link.reset()
		if errors.Is(err, os.ErrDeadlineExceeded) || time.Now().After(deadline) {
			return fmt.Errorf("tpm: %w: %s: %w", ErrUnavailable, p.cfg.Path, errBusy)
		}
		return c.err
	}
	p.link.release()
	return classify("probe", err)
}

// try makes a trial; only a TPM that does not answer is an error.
func (p *prober) try(ctx context.Context, t trial) error {
	f := ProbeFunction{Name: t.name, Use: t.use, Needed: t.needed}
	var refused error
	err := p.with(ctx, func(c *conn) error {
		f.Found, refused = t.run(c)
		if refused != nil && (errors.Is(refused, tpm2.TPMRCObjectMemory) || errors.Is(refused, tpm2.TPMRCSessionMemory) ||
			errors.Is(refused, tpm2.TPMRCObjectHandles) || errors.Is(refused, tpm2.TPMRCSessionHandles)) {
			refused = fmt.Errorf("no room: the TPM is full of what other processes have loaded (%w)", refused)
		}
		return nil
	})
	if err != nil {
		return err
	}
	f.Works = refused == nil
	if refused != nil {
		f.Found = strings.TrimPrefix(refused.Error(), "tpm: ")
	}
	p.report.Functions = append(p.report.Functions, f)
	return nil
}

// text reads properties that hold four characters each.
func (c *conn) text(properties ...tpm2.TPMPT) (string, error) {
	var b []byte
	for _, p := range properties {
		v, err := c.property(p)
		if err != nil {
			return "", err
		}
		b = append(b, byte(v>>24), byte(v>>16), byte(v>>8), byte(v))
	}
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return -1
		}
		return r
	}, string(b))), nil
}

func (p *prober) identify(c *conn) error {
	t := &p.report.TPM
	t.Path = p.cfg.Path
	var err error
	if t.Manufacturer, err = c.text(tpm2.TPMPTManufacturer); err != nil {
		return err
	}
	if t.Vendor, err = c.text(tpm2.TPMPTVendorString1, tpm2.TPMPTVendorString2, tpm2.TPMPTVendorString3, tpm2.TPMPTVendorString4); err != nil {
		return err
	}
	var v [3]uint32
	for i, pt := range []tpm2.TPMPT{tpm2.TPMPTFirmwareVersion1, tpm2.TPMPTFirmwareVersion2, tpm2.TPMPTRevision} {
		if v[i], err = c.property(pt); err != nil {
			return err
		}
	}
	t.Vendor = strings.Join(strings.Fields(t.Vendor), " ")
	t.Firmware = fmt.Sprintf("%d.%d.%d.%d", v[0]>>16, v[0]&0xffff, v[1]>>16, v[1]&0xffff)
	t.Revision = fmt.Sprintf("%d.%02d", v[2]/100, v[2]%100)
	p.report.Quirks = []string{}
	if strings.Contains(strings.ToUpper(t.Vendor), "SW") && t.Manufacturer == "IBM" {
		p.report.Quirks = append(p.report.Quirks, "swtpm or another software TPM: its state lies in files; for development and tests")
	}
	if p.link.exclusive() {
		p.report.Quirks = append(p.report.Quirks, "a socket has no resource manager: the TPM must belong to one node alone, which flushes what others leave behind")
	}
	return nil
}

// capability reads one capability.
func (c *conn) capability(what tpm2.TPMCap, first uint32) (tpm2.TPMUCapabilities, error) {
	rsp, err := (tpm2.GetCapability{Capability: what, Property: first, PropertyCount: 256}).Execute(c)
	if err != nil {
		return tpm2.TPMUCapabilities{}, err
	}
	return rsp.CapabilityData.Data, nil
}

var curveNames = map[tpm2.TPMECCCurve]string{
	tpm2.TPMECCNistP192: "P-192", tpm2.TPMECCNistP224: "P-224", tpm2.TPMECCNistP256: "P-256", tpm2.TPMECCNistP384: "P-384",
	tpm2.TPMECCNistP521: "P-521", tpm2.TPMECCBNP256: "BN-256", tpm2.TPMECCBNP638: "BN-638", tpm2.TPMECCSM2P256: "SM2",
}

var bankNames = map[tpm2.TPMIAlgHash]string{
	tpm2.TPMAlgSHA1: "SHA-1", tpm2.TPMAlgSHA256: "SHA-256", tpm2.TPMAlgSHA384: "SHA-384", tpm2.TPMAlgSHA512: "SHA-512",
}

func (p *prober) limits(c *conn) error {
	caps, err := c.capability(tpm2.TPMCapECCCurves, 0)
	if err != nil {
		return err
	}
	curves, err := caps.ECCCurves()
	if err != nil {
		return err
	}
	for _, id := range curves.ECCCurves {
		p.report.Curves = append(p.report.Curves, nameOr(curveNames, id, uint32(id)))
	}
	if caps, err = c.capability(tpm2.TPMCapPCRs, 0); err != nil {
		return err
	}
	banks, err := caps.AssignedPCR()
	if err != nil {
		return err
	}
	for _, b := range banks.PCRSelections {
		if strings.Trim(string(b.PCRSelect), "\x00") != "" {
			p.report.PCRBanks = append(p.report.PCRBanks, nameOr(bankNames, b.Hash, uint32(b.Hash)))
		}
	}
	var perm uint32
	l, lo := &p.report.Limits, &p.report.Lockout
	for _, x := range []struct {
		to *uint32
		pt tpm2.TPMPT
	}{
		{&l.TransientFree, tpm2.TPMPTHRTransientAvail}, {&l.SessionsFree, tpm2.TPMPTHRLoadedAvail}, {&l.PersistentFree, tpm2.TPMPTHRPersistentAvail},
		{&l.Buffer, tpm2.TPMPTInputBuffer}, {&lo.Failures, tpm2.TPMPTLockoutCounter}, {&lo.MaxFailures, tpm2.TPMPTMaxAuthFail},
		{&lo.IntervalSeconds, tpm2.TPMPTLockoutInterval}, {&lo.RecoverySeconds, tpm2.TPMPTLockoutRecovery}, {&perm, tpm2.TPMPTPermanent},
	} {
		if *x.to, err = c.property(x.pt); err != nil {
			return err
		}
	}
	lo.OwnerSet, lo.EndorsementSet = perm&permOwnerAuthSet != 0, perm&(1<<1) != 0
	lo.LockoutSet, lo.Locked = perm&permLockoutAuthSet != 0, perm&(1<<9) != 0
	return nil
}

func nameOr[K comparable](names map[K]string, k K, number uint32) string {
	if n, ok := names[k]; ok {
		return n
	}
	return fmt.Sprintf("%#x", number)
}

func (p *prober) endorsements(c *conn) error {
	p.report.Endorsement = []ProbeEK{}
	for _, slot := range ekSlots() {
		ek := ProbeEK{Handle: uint32(slot.handle), Key: "RSA-2048"}
		if slot.template.Type == tpm2.TPMAlgECC {
			ek.Key = "P-384"
		}
		_, err := c.readObject(slot.handle)
		switch {
		case err == nil:
			ek.Persistent = true
		case !saidNo(c, err):
			return err
		}
		cert, err := c.certificate(slot.cert)
		if err != nil {
			return err
		}
		if cert != nil {
			ek.Certificate, ek.Issuer, ek.NotAfter = true, cert.Issuer.String(), cert.NotAfter
		}
		if ek.Persistent || ek.Certificate {
			p.report.Endorsement = append(p.report.Endorsement, ek)
		}
	}
	return nil
}
