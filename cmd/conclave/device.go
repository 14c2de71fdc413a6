package main

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/tpm"
)

func (a *app) deviceCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "device",
		Short: "Find out what an HSM or TPM on this machine can do, and how fast",
		Long: `Find out what an HSM or TPM on this machine can do for Conclave, and how fast.
These commands speak to the device itself and need no node. Name it by one of

  --config conclaved.toml [--next]   the [device] (or [next_device]) of a node's configuration
  --uri 'pkcs11:token=T?module-path=LIBRARY' --pin-file FILE
  --tpm /dev/tpmrm0                  or unix:SOCKET`,
	}
	cmd.AddCommand(a.deviceProbeCommand(), a.deviceBenchCommand())
	return cmd
}

// deviceFlags name a device.
type deviceFlags struct {
	config              string
	next                bool
	uri, pinFile, label string
	softHSMConf         string
	tpm                 string
	curve               string
}

func (d *deviceFlags) add(cmd *cobra.Command) {
	cmd.Args = arguments("")
	f := cmd.Flags()
	f.StringVarP(&d.config, "config", "c", "", "`FILE`: the configuration of a node, conclaved.toml")
	f.BoolVar(&d.next, "next", false, "the configuration's [next_device] in place of [device]")
	f.StringVar(&d.uri, "uri", "", "PKCS#11 `URI` (RFC 7512) with token or serial, and module-path")
	f.StringVar(&d.pinFile, "pin-file", "", "`FILE` with the user PIN, where the URI has no pin-source (default: ask)")
	f.StringVar(&d.softHSMConf, "softhsm-conf", "", "SoftHSM's configuration `FILE`, for SoftHSM only")
	f.StringVar(&d.label, "label", "", "prefix of the device keys' labels (default \""+hsm.DefaultLabel+"\")")
	f.StringVar(&d.tpm, "tpm", "", "`PATH` of a TPM: /dev/tpmrm0 or unix:SOCKET")
	f.StringVar(&d.curve, "curve", "", "`CURVE` of the device keys: P-384 or P-256 (default P-384, or the configuration's)")
}

// deviceConfig is the section [device] of conclaved.toml. The last fields say nothing
// of which device it is; they stand here so that any other is a mistake.
type deviceConfig struct {
	Type         string   `toml:"type"`
	Curve        string   `toml:"curve"`
	CallTimeout  string   `toml:"call_timeout"`
	URI          string   `toml:"uri"`
	URIs         []string `toml:"uris"`
	PINFD        int      `toml:"pin_fd"`
	Label        string   `toml:"label"`
	SoftHSMConf  string   `toml:"softhsm_conf"`
	SoftHSMConfs []string `toml:"softhsm_confs"`
	Path         string   `toml:"path"`
	PCRs         []int    `toml:"pcrs"`

	Isolate           bool   `toml:"isolate"`
	VendorAttestation string `toml:"vendor_attestation"`
	AuthFile          string `toml:"auth_file"`
	OwnerFile         string `toml:"owner_file"`
	EKChain           string `toml:"ek_chain"`
}

// target is a device to look at: one of the two is set.
type target struct {
	hsm *hsm.Config
	tpm *tpm.Config
}

// targets resolves the flags. destroy wipes what was asked for on the way.
func (d *deviceFlags) targets(cmd *cobra.Command) (list []target, destroy func(), err error) {
	destroy = func() {}
	named := 0
	for _, set := range []bool{d.config != "", d.uri != "", d.tpm != ""} {
		if set {
			named++
		}
	}
	if named != 1 {
		return nil, destroy, usagef("name one device: --config FILE, or --uri URI, or --tpm PATH; see: %s --help", cmd.CommandPath())
	}
	if d.next && d.config == "" {
		return nil, destroy, usagef("--next goes with --config")
	}
	c := deviceConfig{Type: "pkcs11", URI: d.uri, Label: d.label, SoftHSMConf: d.softHSMConf}
	if d.tpm != "" {
		c.Type, c.Path = "tpm", d.tpm
	}
	if d.config != "" {
		if c, err = readDeviceConfig(d.config, d.next); err != nil {
			return nil, destroy, err
		}
	}
	if d.curve != "" {
		c.Curve = d.curve
	}
	list, err = c.targets()
	if err != nil {
		return nil, destroy, err
	}
	pin, err := d.pin(cmd, c, list)
	if err != nil {
		return nil, destroy, err
	}
	return list, pin.Destroy, nil
}

// pin gives the devices the PIN where their URIs do not say where it is.
func (d *deviceFlags) pin(cmd *cobra.Command, c deviceConfig, list []target) (pin *secret.Bytes, err error) {
	for _, t := range list {
		if t.hsm == nil {
			continue
		}
		u, err := hsm.ParseURI(t.hsm.URI)
		if err != nil {
			return pin, usagef("%w", err)
		}
		switch {
		case u.PINSource != "":
		case d.pinFile != "":
			t.hsm.PINFile = d.pinFile
		case c.PINFD != 0 || !term.IsTerminal(int(os.Stdin.Fd())):
			return pin, usagef("the PIN is missing: give --pin-file, or a pin-source in the URI")
		default:
			if pin == nil {
				fmt.Fprintf(cmd.ErrOrStderr(), "User PIN of token %q: ", u.Token)
				b, err := term.ReadPassword(int(os.Stdin.Fd()))
				fmt.Fprintln(cmd.ErrOrStderr())
				if err != nil {
					return nil, err
				}
				if pin, err = secret.Move(b); err != nil {
					return nil, err
				}
			}
			t.hsm.PIN = pin
		}
	}
	return pin, nil
}

// readDeviceConfig reads a section of conclaved.toml; other sections are conclaved's.
func readDeviceConfig(path string, next bool) (deviceConfig, error) {
	section := "device"
	if next {
		section = "next_device"
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return deviceConfig{}, err
	}
	var file map[string]any
	if err := toml.Unmarshal(b, &file); err != nil {
		return deviceConfig{}, fmt.Errorf("%s: %w", path, err)
	}
	part, ok := file[section].(map[string]any)
	if !ok {
		return deviceConfig{}, fmt.Errorf("%s has no section [%s]", path, section)
	}
	if b, err = toml.Marshal(part); err != nil {
		return deviceConfig{}, err
	}
	var c deviceConfig
	if err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(&c); err != nil {
		var unknown *toml.StrictMissingError
		if errors.As(err, &unknown) && len(unknown.Errors) > 0 {
			err = fmt.Errorf("%s: no such field", strings.Join(unknown.Errors[0].Key(), "."))
		}
		return c, fmt.Errorf("%s: [%s]: %w", path, section, err)
	}
	paths := []*string{&c.SoftHSMConf}
	for i := range c.SoftHSMConfs {
		paths = append(paths, &c.SoftHSMConfs[i])
	}
	for _, p := range paths {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(filepath.Dir(path), *p)
		}
	}
	return c, nil
}

func (c deviceConfig) targets() ([]target, error) {
	curve, ok := map[string]ecdh.Curve{"": ecdh.P384(), "P-384": ecdh.P384(), "P-256": ecdh.P256()}[c.Curve]
	if !ok {
		return nil, usagef("curve %q is not P-384 or P-256", c.Curve)
	}
	var timeout time.Duration
	if c.CallTimeout != "" {
		var err error
		if timeout, err = time.ParseDuration(c.CallTimeout); err != nil {
			return nil, fmt.Errorf("call_timeout: %w", err)
		}
	}
	switch c.Type {
	case "tpm":
		return []target{{tpm: &tpm.Config{Path: c.Path, PCRs: c.PCRs, Curve: curve, CallTimeout: timeout}}}, nil
	case "pkcs11":
		var list []target
		uris := c.URIs
		if c.URI != "" {
			uris = append([]string{c.URI}, uris...)
		}
		for i, u := range uris {
			t := &hsm.Config{URI: u, Label: c.Label, Curve: curve, CallTimeout: timeout, SoftHSMConf: c.SoftHSMConf}
			if i < len(c.SoftHSMConfs) {
				t.SoftHSMConf = c.SoftHSMConfs[i]
			}
			list = append(list, target{hsm: t})
		}
		if len(list) == 0 {
			return nil, errors.New("the configuration names no PKCS#11 URI")
		}
		return list, nil
	}
	return nil, fmt.Errorf("device type %q is not pkcs11 or tpm", c.Type)
}

// probed is the report on one device: one of the two is set.
type probed struct {
	PKCS11 *hsm.ProbeReport `json:"pkcs11,omitempty"`
	TPM    *tpm.ProbeReport `json:"tpm,omitempty"`
}

func (a *app) deviceProbeCommand() *cobra.Command {
	var d deviceFlags
	cmd := &cobra.Command{
		Use:   "probe",
		Short: "Print what a device can do, what Conclave would use it for, and which protection levels it supports",
		Long: `Print what a device can do, what Conclave would use of it, whether its keys are
provisioned, and which protection levels it supports.

Everything is tried with passing keys that end with this command: nothing is left in
the device, no key of it is used, and it works before conclaved init as well as on a
device that a running node uses. The exit code is 1 when the device, or a member of
uris, cannot be a node's hardware root or cannot be reached; the reason is printed.`,
		Example: `  conclave device probe --config /etc/conclave/conclaved.toml
  conclave device probe --uri 'pkcs11:token=conclave?module-path=/usr/lib/softhsm/libsofthsm2.so' --pin-file pin
  conclave device probe --tpm /dev/tpmrm0`,
	}
	d.add(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		list, destroy, err := d.targets(cmd)
		if err != nil {
			return err
		}
		defer destroy()
		var out []probed
		var unfit []error
		for i, t := range list {
			p, reason, err := t.probe(cmd.Context())
			if err == nil {
				out = append(out, p)
				if reason == "" {
					continue
				}
				err = errors.New(reason)
			}
			if len(list) > 1 {
				err = fmt.Errorf("member %d of uris: %w", i+1, err)
			}
			unfit = append(unfit, err)
		}
		if len(out) == 0 {
			return errors.Join(unfit...)
		}
		err = a.show(cmd, out, func(w io.Writer) {
			for i, p := range out {
				if i > 0 {
					row(w)
				}
				p.table(w)
			}
		})
		return errors.Join(err, errors.Join(unfit...))
	}
	return cmd
}

// probe makes a report; reason is why the device cannot be a root.
func (t target) probe(ctx context.Context) (p probed, reason string, err error) {
	if t.tpm != nil {
		r, err := tpm.Probe(ctx, *t.tpm)
		return probed{TPM: &r}, r.Reason, err
	}
	r, err := hsm.Probe(ctx, *t.hsm)
	return probed{PKCS11: &r}, r.Reason, err
}

// measured is a rate of one device.
type measured struct {
	Device    string  `json:"device"`
	Name      string  `json:"name"`
	Sessions  int     `json:"sessions"`
	PerSecond float64 `json:"per_second"`
	Micros    float64 `json:"microseconds"`
	Count     int     `json:"count"`
	Problem   string  `json:"problem,omitempty"`
}

func (a *app) deviceBenchCommand() *cobra.Command {
	var d deviceFlags
	var each time.Duration
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure how fast a device is",
		Long: `Measure how often a second a device does what Conclave asks of it: on one session, and
on an HSM also on eight at once. It uses the device keys of an HSM where they are
provisioned, passing keys elsewhere, and leaves nothing behind. A device that a node
uses meanwhile is slower, for both. The library runs in this process: what isolate = true
costs a node is not in the figures.`,
		Example: "  conclave device bench --config /etc/conclave/conclaved.toml --for 3s",
	}
	d.add(cmd)
	cmd.Flags().DurationVar(&each, "for", time.Second, "how long each measurement takes, at most half of the call timeout")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if each <= 0 {
			return usagef("--for %v is not a time above 0", each)
		}
		list, destroy, err := d.targets(cmd)
		if err != nil {
			return err
		}
		defer destroy()
		var all []measured
		for _, t := range list {
			some, err := t.measure(cmd.Context(), each, progress(cmd.ErrOrStderr()))
			if err != nil {
				return err
			}
			all = append(all, some...)
		}
		return a.show(cmd, all, func(w io.Writer) { measuredTable(w, all, len(list) > 1) })
	}
	return cmd
}

func (t target) measure(ctx context.Context, each time.Duration, announce func(string)) (all []measured, err error) {
	if t.tpm != nil {
		rates, err := tpm.Measure(ctx, *t.tpm, each, announce)
		announce("")
		for _, r := range rates {
			all = append(all, measured{t.tpm.Path, r.Name, 1, r.PerSecond, r.Micros, r.Count, r.Problem})
		}
		return all, err
	}
	rates, err := hsm.Measure(ctx, *t.hsm, each, announce)
	announce("")
	name := t.hsm.URI
	if u, err := hsm.ParseURI(t.hsm.URI); err == nil {
		name = u.Token + u.Serial
	}
	for _, r := range rates {
		all = append(all, measured{name, r.Name, r.Sessions, r.PerSecond, r.Micros, r.Count, r.Problem})
	}
	return all, err
}

// progress shows on a terminal what is being measured; "" ends it.
func progress(w io.Writer) func(string) {
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return func(string) {}
	}
	n := 0
	return func(what string) {
		if what == "" {
			fmt.Fprint(w, "\r\x1b[K")
			return
		}
		n++
		fmt.Fprintf(w, "\r\x1b[Kmeasuring (%d): %s", n, visible(what))
	}
}
