package hsm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/miekg/pkcs11"
)

// ProbeReport says what a token can do, and what Conclave would use of it. Nothing
// in it is secret.
type ProbeReport struct {
	Library ProbeLibrary `json:"library"`
	Token   ProbeToken   `json:"token"`
	// Profile names the module where it is known by its makers' names, and Quirks
	// what differs from the standard: found by probing, or known of the module where
	// no probe can find it.
	Profile   string          `json:"profile"`
	Quirks    []string        `json:"quirks"`
	Functions []ProbeFunction `json:"functions"`
	Keys      ProbeKeys       `json:"keys"`
	Levels    []ProbeLevel    `json:"levels"`
	// Root: Conclave could have this token as a node's hardware root. If not, Reason
	// says why.
	Root   bool   `json:"root"`
	Reason string `json:"reason,omitempty"`
}

// ProbeLibrary is what C_GetInfo says.
type ProbeLibrary struct {
	Path         string `json:"path"`
	Manufacturer string `json:"manufacturer"`
	Description  string `json:"description"`
	Version      string `json:"version"`
	Cryptoki     string `json:"cryptoki"`
}

// ProbeToken is what C_GetTokenInfo says.
type ProbeToken struct {
	Slot         uint   `json:"slot"`
	Label        string `json:"label"`
	Manufacturer string `json:"manufacturer"`
	Model        string `json:"model"`
	Serial       string `json:"serial"`
	Firmware     string `json:"firmware"`
	Hardware     string `json:"hardware"`
}

// ProbeFunction is one thing that was tried.
type ProbeFunction struct {
	Name   string `json:"name"`
	Number uint   `json:"number,omitempty"` // of the mechanism
	// Listed is what C_GetMechanismInfo says of it: "no", or the key sizes in the
	// mechanism's unit (bits for EC and RSA, bytes or bits for the others).
	Listed string `json:"listed"`
	Works  bool   `json:"works"`
	Found  string `json:"found"` // what trying it showed
	Use    string `json:"use"`   // what Conclave uses it for
	Needed bool   `json:"needed"`
}

// ProbeKeys says whether the device keys are there.
type ProbeKeys struct {
	Label       string   `json:"label"`
	Curve       string   `json:"curve"`
	Provisioned bool     `json:"provisioned"`
	Missing     []string `json:"missing,omitempty"` // of the three keys, when not all are there
	Problem     string   `json:"problem,omitempty"` // why keys that are there cannot be used
	Signing     []byte   `json:"signing,omitempty"` // the signing key's public point, uncompressed
}

// ProbeLevel is a protection level.
type ProbeLevel struct {
	Level     string   `json:"level"` // software or hardware
	Supported bool     `json:"supported"`
	Why       string   `json:"why,omitempty"` // not
	How       []string `json:"how,omitempty"` // what of it works how
}

// prober makes a report. All that it makes in the token are session objects.
type prober struct {
	d      *Device
	report ProbeReport

	mu   sync.Mutex // a call that was abandoned may still be writing
	know learned
}

// learned is what trials tell later ones.
type learned struct {
	dialect dialect
	imports *importProfile
	quirks  []string
}

func (p *prober) learned() learned {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.know
}

func (p *prober) learn(f func(*learned)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f(&p.know)
}

// quirk notes once what differs from the standard.
func (p *prober) quirk(s string) {
	p.learn(func(l *learned) {
		if !slices.Contains(l.quirks, s) {
			l.quirks = append(l.quirks, s)
		}
	})
}

// Probe finds out what the token of cfg can do by trying it. It needs no device
// keys: what it makes are session objects, which end with the call, so it leaves
// nothing in the token and does not disturb a node that uses it. Errors are those
// of Open where the token cannot be asked at all; a token that lacks something is
// reported in ProbeReport.Reason.
func Probe(ctx context.Context, cfg Config) (ProbeReport, error) {
	d, err := attach(cfg)
	if err != nil {
		return ProbeReport{}, err
	}
	p := &prober{d: d}
	err = p.run(ctx)
	if e := d.Close(); err == nil {
		err = e
	}
	return p.report, err
}

func (p *prober) run(ctx context.Context) error {
	for _, step := range []func(context.Context) error{p.identify, p.keys, p.functions} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	p.judge()
	return nil
}

// identify logs in and reads what library and token say of themselves.
func (p *prober) identify(ctx context.Context) error {
	id, err := call(ctx, p.d, callOptions{op: "probe", bare: true}, func(s *session) (id ProbeReport, err error) {
		li, err := s.p11.GetInfo()
		if err != nil {
			return id, fmt.Errorf("C_GetInfo: %w", err)
		}
		slot, ti, err := findSlot(s.p11, p.d.set.uri)
		if err != nil {
			return id, err
		}
		version := func(v pkcs11.Version) string { return fmt.Sprintf("%d.%d", v.Major, v.Minor) }
		id.Library = ProbeLibrary{Path: p.d.mod.path, Manufacturer: shown(li.ManufacturerID), Description: shown(li.LibraryDescription),
			Version: version(li.LibraryVersion), Cryptoki: version(li.CryptokiVersion)}
		id.Token = ProbeToken{Slot: slot, Label: clean(ti.Label), Manufacturer: shown(ti.ManufacturerID), Model: shown(ti.Model),
			Serial: shown(ti.SerialNumber), Firmware: version(ti.FirmwareVersion), Hardware: version(ti.HardwareVersion)}
		return id, nil
	})
	if err != nil {
		return err
	}
	p.report = id
	known := profileOf(p.report.Library, p.report.Token)
	p.report.Profile, p.report.Quirks = known.name, append([]string{}, known.quirks...)
	return nil
}

// keys looks for the device keys and checks their attributes.
func (p *prober) keys(ctx context.Context) error {
	k, err := call(ctx, p.d, callOptions{op: "probe", bare: true}, func(s *session) (ProbeKeys, error) {
		k := ProbeKeys{Label: p.d.set.label, Curve: p.d.set.curve.name}
		for _, r := range roles {
			if _, err := s.findKey(r, p.d.set.label, r.class); errors.Is(err, ErrNotProvisioned) {
				k.Missing = append(k.Missing, r.name)
			} else if err != nil && !errors.Is(err, ErrUnsafeToken) {
				return k, err
			}
		}
		if len(k.Missing) > 0 {
			return k, nil
		}
		err := s.inspect(p.d.set.label)
		switch {
		case errors.Is(err, ErrUnsafeToken), errors.Is(err, ErrInvalid), errors.Is(err, ErrNotProvisioned):
			k.Problem = err.Error()
			return k, nil
		case err != nil:
			return k, err
		}
		k.Provisioned = true
		k.Signing, err = s.point(s.keys.signingPub)
		return k, err
	})
	p.report.Keys = k
	return err
}

// inspect finds the device keys and checks their attributes.
func (s *session) inspect(prefix string) error {
	if err := s.findKeys(prefix); err != nil {
		return err
	}
	for _, k := range []struct {
		r role
		h pkcs11.ObjectHandle
	}{{agreementRole, s.keys.agreement}, {signingRole, s.keys.signing}, {wrappingRole, s.keys.wrapping}} {
		if err := s.checkAttributes(k.r, k.h); err != nil {
			return err
		}
	}
	return nil
}

// judge draws the conclusions.
func (p *prober) judge() {
	r := &p.report
	r.Quirks = append(r.Quirks, p.learned().quirks...)
	var missing []string
	for _, f := range r.Functions {
		if f.Needed && !f.Works {
			missing = append(missing, f.Name+" ("+f.Found+")")
		}
	}
	if r.Keys.Problem != "" {
		missing = append(missing, r.Keys.Problem)
	} else if n := len(r.Keys.Missing); n > 0 && n < len(roles) {
		missing = append(missing, fmt.Sprintf("the token holds some of the keys %q and not all: provision under another label, or initialise the token anew", r.Keys.Label))
	}
	r.Root = len(missing) == 0
	software := ProbeLevel{Level: "software", Supported: r.Root}
	if !r.Root {
		r.Reason = "what Conclave needs does not work: " + strings.Join(missing, "; ")
		software.Why = r.Reason
	}
	r.Levels = []ProbeLevel{software, p.hardwareLevel()}
}

// hardwareLevel says whether keys can be kept in this token, and how.
func (p *prober) hardwareLevel() ProbeLevel {
	l := ProbeLevel{Level: "hardware"}
	f := map[string]ProbeFunction{}
	for _, x := range p.report.Functions {
		f[x.Name] = x
	}
	if !p.report.Root {
		l.Why = "the token cannot be a root at all"
		return l
	}
	if imp := f[nameImportHMAC]; !imp.Works {
		l.Why = "keys cannot be imported: " + imp.Found
		return l
	}
	l.Supported = true
	l.How = append(l.How, "encrypt and mac keys: "+f[nameImportHMAC].Found)
	for _, x := range []struct{ what, name string }{
		{"ecdsa-p256 keys", nameImportP256}, {"ecdsa-p384 keys", nameImportP384},
	} {
		if f[x.name].Works {
			l.How = append(l.How, x.what+": "+f[x.name].Found)
		} else {
			l.How = append(l.How, x.what+": no, "+f[x.name].Found)
		}
	}
	for _, x := range []struct{ what, name string }{
		{"encrypt and mac keys", nameGenerateHMAC}, {"ecdsa keys", nameGenerateSigner},
	} {
		where := "born in the token and wrapped there for the others"
		if !f[x.name].Works {
			where = "drawn in locked memory of the node that creates them: " + f[x.name].Found
		}
		l.How = append(l.How, x.what+" are "+where)
	}
	return l
}

// profile is what is known of a module that no probe can find out.
type profile struct {
	name   string
	makers []string // parts of the manufacturer's name of library or token, lower case
	quirks []string
}

var profiles = []profile{
	{"SoftHSM", []string{"softhsm"}, []string{
		"SoftHSM is software: keys lie in files under the PIN alone; for development and tests",
		"the library reads SOFTHSM2_CONF once per process: two token directories in one process need a copy of the library each",
		"no lockout after wrong PINs",
	}},
	{"p11-kit proxy", []string{"pkcs#11 kit", "p11-kit"}, []string{
		"p11-kit 0.24 does not carry the parameters of AES-GCM and ECDH to a remote module: name the module itself",
	}},
	{"AWS CloudHSM", []string{"amazon", "cavium", "marvell"}, []string{
		"not tried by us: the manual says that AES-GCM puts in an IV of the HSM's own, which is honoured",
	}},
	{"Thales Luna", []string{"safenet", "gemalto", "thales"}, []string{
		"not tried by us: the manual says that in FIPS mode AES-GCM puts in an IV of the HSM's own, which is honoured",
	}},
}

func profileOf(l ProbeLibrary, t ProbeToken) profile {
	said := strings.ToLower(l.Manufacturer + "\x00" + t.Manufacturer + "\x00" + l.Description + "\x00" + t.Model)
	for _, p := range profiles {
		for _, m := range p.makers {
			if strings.Contains(said, m) {
				return p
			}
		}
	}
	return profile{name: "unknown module: everything below was probed"}
}
