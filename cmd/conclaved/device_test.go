package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/hsm/child"
	"github.com/conclave-kms/conclave/hsm/hsmtest"
)

// TestOpenDevice opens a token in this process, in a process of its own, and with a
// clone as a group of both kinds. Whichever it is, the parts of a node find all they
// look for.
func TestOpenDevice(t *testing.T) {
	tok := hsmtest.New(t)
	dir := t.TempDir()
	base := DeviceConfig{Type: "pkcs11", URI: tok.URI + "&pin-source=file:" + tok.PINFile, SoftHSMConf: tok.ConfFile, CallTimeout: Duration{10 * time.Second}}
	base.setDefaults()
	ctx := context.Background()
	wrong := filepath.Join(dir, "wrong")
	if err := os.WriteFile(wrong, []byte("00000000"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, isolate := range []bool{false, true} {
		c := base
		c.URI, c.Isolate = tok.URI+"&pin-source=file:"+wrong, &isolate
		if _, err := openDevice(ctx, c); !errors.Is(err, hsm.ErrPIN) || !strings.Contains(err.Error(), wrong) || strings.Contains(err.Error(), "00000000") {
			t.Fatalf("wrong PIN, isolate %v: %v", isolate, err)
		}
	}
	if _, err := openDevice(ctx, base); !errors.Is(err, hsm.ErrNotProvisioned) || !strings.Contains(err.Error(), "conclaved init") {
		t.Fatalf("before: %v", err)
	}
	if err := provisionDevice(ctx, base); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(filepath.Join(dir, "tokens"), os.DirFS(tok.Tokens)); err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(dir, "softhsm2.conf")
	if err := os.WriteFile(conf, []byte("directories.tokendir = "+filepath.Join(dir, "tokens")+"\nobjectstore.backend = file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	lib, err := hsm.CopyLibrary(dir)
	if err != nil {
		t.Fatal(err)
	}
	u, err := hsm.ParseURI(base.URI)
	if err != nil {
		t.Fatal(err)
	}
	u.ModulePath = lib
	group := base
	group.URI, group.SoftHSMConf = "", ""
	group.URIs, group.SoftHSMConfs = []string{base.URI, u.String()}, []string{tok.ConfFile, conf}
	for name, c := range map[string]DeviceConfig{"one": base, "group": group} {
		for _, isolate := range []bool{false, true} {
			c.Isolate = &isolate
			if field, why := c.check("device"); field != "" {
				t.Fatalf("%s: %s: %s", name, field, why)
			}
			d, err := openDevice(ctx, c)
			if err != nil {
				t.Fatalf("%s, isolate %v: %v", name, isolate, err)
			}
			if err := d.Check(ctx); err != nil {
				t.Errorf("%s, isolate %v: %v", name, isolate, err)
			}
			if _, ok := d.(hsm.Member); !ok {
				t.Errorf("%s, isolate %v: methods are missing", name, isolate)
			}
			if apart := strings.Contains(d.Describe(), "in a process of its own"); apart != isolate {
				t.Errorf("%s, isolate %v: %s", name, isolate, d.Describe())
			}
			if err := d.Close(); err != nil {
				t.Errorf("%s, isolate %v: %v", name, isolate, err)
			}
		}
	}
	isolate := true
	base.Isolate, base.Label = &isolate, "other"
	if _, err := openDevice(ctx, base); !errors.Is(err, hsm.ErrNotProvisioned) || !strings.Contains(err.Error(), "conclaved init") {
		t.Errorf("other keys, in a child: %v", err)
	}
}

// Every kind of PKCS#11 device has the whole method set.
var _, _, _ hsm.Member = (*hsm.Device)(nil), (*child.Device)(nil), (*hsm.Group)(nil)
