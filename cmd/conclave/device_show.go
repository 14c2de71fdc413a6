package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/pqc"
	"github.com/conclave-kms/conclave/tpm"
)

func (p probed) table(w io.Writer) {
	if p.TPM != nil {
		tpmTable(w, *p.TPM)
		return
	}
	hsmTable(w, *p.PKCS11)
}

func hsmTable(w io.Writer, r hsm.ProbeReport) {
	t, l := r.Token, r.Library
	row(w, "token", fmt.Sprintf("%q: %s %s, serial %s, firmware %s, slot %d", t.Label, t.Manufacturer, t.Model, t.Serial, t.Firmware, t.Slot))
	row(w, "library", fmt.Sprintf("%s: %s, version %s, PKCS#11 %s", l.Path, l.Manufacturer, l.Version, l.Cryptoki))
	row(w, "profile", r.Profile)
	k := r.Keys
	row(w, "device keys", keysLine(fmt.Sprintf("%q on %s", k.Label, k.Curve), k.Provisioned, k.Missing, k.Problem, k.Signing))
	for _, l := range r.Levels {
		levelRows(w, l.Level, l.Supported, l.Why, l.How)
	}
	for _, q := range r.Quirks {
		row(w, "note", q)
	}
	row(w, "root", rootLine(r.Root))
	row(w)
	row(w, "FUNCTION", "MECHANISM", "LISTED", "WORKS", "FOUND", "USED FOR")
	for _, f := range r.Functions {
		mech := "-"
		if f.Number != 0 {
			mech = fmt.Sprintf("%#x", f.Number)
		}
		row(w, f.Name, mech, f.Listed, worksCell(f.Works, f.Needed), f.Found, f.Use)
	}
}

func tpmTable(w io.Writer, r tpm.ProbeReport) {
	t := r.TPM
	row(w, "TPM", fmt.Sprintf("%s: %s %s, firmware %s, TPM 2.0 revision %s", t.Path, t.Manufacturer, t.Vendor, t.Firmware, t.Revision))
	row(w, "curves", strings.Join(r.Curves, ", "))
	row(w, "PCR banks", strings.Join(r.PCRBanks, ", "))
	l, o := r.Limits, r.Lockout
	row(w, "free now", fmt.Sprintf("%d transient objects, %d sessions, %d persistent objects; buffer %d bytes", l.TransientFree, l.SessionsFree, l.PersistentFree, l.Buffer))
	locked := ""
	if o.Locked {
		locked = "LOCKED; "
	}
	row(w, "lockout", fmt.Sprintf("%s%d of %d failures, one forgotten every %d s, recovery %d s", locked, o.Failures, o.MaxFailures, o.IntervalSeconds, o.RecoverySeconds))
	row(w, "authorization", fmt.Sprintf("owner %s, lockout %s, endorsement %s", set(o.OwnerSet), set(o.LockoutSet), set(o.EndorsementSet)))
	for _, e := range r.Endorsement {
		cert := "no certificate"
		if e.Certificate {
			cert = "certificate by " + e.Issuer
		}
		row(w, "endorsement", fmt.Sprintf("%s at %#x, %s", e.Key, e.Handle, cert))
	}
	k := r.Keys
	row(w, "device keys", keysLine(fmt.Sprintf("at %#x on %s", k.Base, k.Curve), k.Provisioned, k.Missing, k.Problem, k.Signing))
	for _, l := range r.Levels {
		levelRows(w, l.Level, l.Supported, l.Why, l.How)
	}
	for _, q := range r.Quirks {
		row(w, "note", q)
	}
	row(w, "root", rootLine(r.Root))
	row(w)
	row(w, "FUNCTION", "WORKS", "FOUND", "USED FOR")
	for _, f := range r.Functions {
		row(w, f.Name, worksCell(f.Works, f.Needed), f.Found, f.Use)
	}
}

func set(b bool) string { return map[bool]string{true: "set", false: "not set"}[b] }

func worksCell(works, needed bool) string {
	switch {
	case works:
		return "yes"
	case needed:
		return "NO"
	}
	return "no"
}

func rootLine(ok bool) string {
	if ok {
		return "yes, it can be a node's hardware root"
	}
	return "NO, it cannot be a node's hardware root"
}

func keysLine(where string, provisioned bool, missing []string, problem string, signing []byte) string {
	switch {
	case problem != "":
		return where + ": " + problem
	case provisioned:
		return where + ": provisioned, signing key " + pqc.Fingerprint(signing)
	case len(missing) > 0 && len(signing) > 0:
		return where + ": missing " + strings.Join(missing, ", ")
	}
	return where + ": not provisioned; conclaved init makes them"
}

func levelRows(w io.Writer, level string, supported bool, why string, how []string) {
	name := "protection " + level
	if !supported {
		row(w, name, "no: "+why)
		return
	}
	row(w, name, "yes")
	for _, h := range how {
		row(w, "", h)
	}
}

func measuredTable(w io.Writer, all []measured, several bool) {
	head := []any{"OPERATION", "SESSIONS", "PER SECOND", "MICROSECONDS"}
	if several {
		head = append([]any{"DEVICE"}, head...)
	}
	row(w, head...)
	for _, m := range all {
		cells := []any{m.Name, m.Sessions, fmt.Sprintf("%.0f", m.PerSecond), fmt.Sprintf("%.0f", m.Micros)}
		if m.Problem != "" {
			cells = []any{m.Name, m.Sessions, "-", m.Problem}
		}
		if several {
			cells = append([]any{m.Device}, cells...)
		}
		row(w, cells...)
	}
}
