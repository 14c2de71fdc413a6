package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	mathrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strings"
	"text/template"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sync/errgroup"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
	"github.com/conclave-kms/conclave/tpm"
)

// devState is DIR/conclave-dev.json: what a restart with --keep needs to know.
type devState struct {
	Format int            `json:"format"`
	Ports  map[string]int `json:"ports"` // "fr.cluster", "fr.api", ...
	Done   bool           `json:"done"`  // founded completely
}

// prepare makes the directory, or takes over the one that is there, and reports
// whether a cluster has to be founded.
func (d *dev) prepare(keep bool) (fresh bool, err error) {
	d.sites = []devSite{{id: "fr", device: "pkcs11"}, {id: "de", device: "pkcs11"}, {id: "jp", device: "tpm"}}
	old, err := os.ReadFile(d.path(devMarker))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		entries, err := os.ReadDir(d.dir)
		if err == nil && len(entries) > 0 {
			return false, fmt.Errorf("%s is not empty and holds no development cluster; choose another --dir", d.dir)
		}
	case err != nil:
		return false, err
	default:
		var st devState
		if err := strictJSON(old, &st); err != nil {
			return false, fmt.Errorf("%s: %w", d.path(devMarker), err)
		}
		if keep && st.Done {
			d.takePorts(st)
			return false, nil
		}
		if err := d.clear(); err != nil {
			return false, err
		}
	}
	if err := d.reservePorts(); err != nil {
		return false, err
	}
	for _, p := range []string{"ca", "clients", "custodians", "fr", "de", "jp"} {
		if err := os.MkdirAll(d.path(p), 0o700); err != nil {
			return false, err
		}
	}
	return true, d.save(false)
}

// clear removes a former development cluster: only what dev itself has made.
func (d *dev) clear() error {
	for _, p := range []string{"ca", "clients", "custodians", "fr", "de", "jp", "env", "genesis.toml", "genesis.cbor", devMarker} {
		if err := os.RemoveAll(d.path(p)); err != nil {
			return err
		}
	}
	return nil
}

func (d *dev) save(done bool) error {
	st := devState{Format: 1, Ports: map[string]int{}, Done: done}
	for _, s := range d.sites {
		st.Ports[s.id+".cluster"], st.Ports[s.id+".api"] = s.cluster, s.api
	}
	b, err := json.MarshalIndent(st, "", "  ")
	if err != nil {
		return err
	}
	return replaceFile(d.path(devMarker), append(b, '\n'), 0o600)
}

func (d *dev) takePorts(st devState) {
	for i, s := range d.sites {
		d.sites[i].cluster, d.sites[i].api = st.Ports[s.id+".cluster"], st.Ports[s.id+".api"]
	}
}

// reservePorts chooses free ports. They are below the range from which systems take the ports of outgoing
// connections, which would be in the way of one that is to be listened on a moment, or a restart, later.
func (d *dev) reservePorts() error {
	var held []net.Listener
	defer func() {
		for _, l := range held {
			l.Close()
		}
	}()
	port := func() (port int, err error) {
		for range 100 {
			var l net.Listener
			port = 10_000 + mathrand.IntN(20_000)
			if l, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
				held = append(held, l)
				return port, nil
			}
		}
		return 0, err
	}
	for i := range d.sites {
		var err error
		if d.sites[i].cluster, err = port(); err != nil {
			return err
		}
		if d.sites[i].api, err = port(); err != nil {
			return err
		}
	}
	return nil
}

// makeDevices makes the tokens of fr and de and the software TPM of jp, at once.
func (d *dev) makeDevices(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, site := range []string{"fr", "de"} {
		g.Go(func() error {
			text, err := randomText()
			if err != nil {
				return err
			}
			pin, err := secret.Move([]byte(text))
			if err != nil {
				return err
			}
			defer pin.Destroy()
			token, err := hsm.CreateSoftToken(ctx, d.path(site, "token"), "conclave-"+site, pin)
			if err != nil {
				return err
			}
			if err := writeNew(d.path(site, "pin"), pin.Reveal(), 0o600); err != nil {
				return err
			}
			return d.writeConfig(site, deviceSection{Type: "pkcs11", URI: token.URI + "&pin-source=file:" + d.path(site, "pin"), SoftHSMConf: token.ConfFile})
		})
	}
	g.Go(func() error {
		if err := tpm.SetupSoftTPM(ctx, d.path("jp", "swtpm")); err != nil {
			return err
		}
		return tpm.NewAuthFile(d.path("jp", "auth"))
	})
	return g.Wait()
}

// deviceSection is the part of a node's configuration that differs by device.
type deviceSection struct{ Type, URI, SoftHSMConf, Path, AuthFile, EKChain string }

var configTemplate = template.Must(template.New("config").Parse(`# A node of the development cluster. Paths are relative to this file.
node     = "{{.Node}}"
site     = "{{.Site}}"
data_dir = "data"
genesis  = "../genesis.cbor"

[tls]
certificate = "node.crt"
key         = "node.key"

[cluster]
listen = "127.0.0.1:{{.Cluster}}"
heartbeat = "1s"

[api]
listen = "127.0.0.1:{{.API}}"

[audit]
export = "export"

[device]
type = "{{.Device.Type}}"
{{- if .Device.URI}}
uri  = "{{.Device.URI}}"
softhsm_conf = "{{.Device.SoftHSMConf}}"
{{- else}}
path = "{{.Device.Path}}"
auth_file = "{{.Device.AuthFile}}"
ek_chain = "{{.Device.EKChain}}"
{{- end}}
`))

func (d *dev) writeConfig(site string, dev deviceSection) error {
	for _, s := range d.sites {
		if s.id != site {
			continue
		}
		var b bytes.Buffer
		err := configTemplate.Execute(&b, map[string]any{"Node": s.node(), "Site": s.id, "Cluster": s.cluster, "API": s.api, "Device": dev})
		if err != nil {
			return err
		}
		return replaceFile(d.path(site, "conclaved.toml"), b.Bytes(), 0o644)
	}
	return fmt.Errorf("no site %s", site)
}

// found makes CAs, certificates and custodians, initialises the nodes and has
// them sign the genesis document, with the same commands that operators use.
func (d *dev) found(ctx context.Context) error {
	d.say("making the hardware roots of fr-1, de-1 and jp-1")
	g, gctx := errgroup.WithContext(ctx)
	for _, s := range d.sites {
		g.Go(func() error {
			if err := d.makeCertificates(s); err != nil {
				return err
			}
			return d.self(gctx, "init", "--config", d.path(s.id, "conclaved.toml"))
		})
	}
	for _, c := range devCustodians() {
		g.Go(func() error { return d.makeCustodian(c) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if err := d.witness(ctx); err != nil {
		return err
	}
	var cas []string
	for _, s := range d.sites {
		cas = append(cas, d.path("ca", s.id+".pem"))
	}
	if err := concat(d.path("ca", "bundle.pem"), cas...); err != nil {
		return err
	}
	d.say("writing the genesis document; every node signs it")
	plan, err := toml.Marshal(d.plan())
	if err != nil {
		return err
	}
	if err := writeNew(d.path("genesis.toml"), plan, 0o644); err != nil {
		return err
	}
	if err := d.self(ctx, "genesis", "create", "--plan", d.path("genesis.toml"), "--out", d.path("genesis.cbor")); err != nil {
		return err
	}
	for _, s := range d.sites {
		if err := d.self(ctx, "genesis", "sign", "--config", d.path(s.id, "conclaved.toml"), d.path("genesis.cbor")); err != nil {
			return err
		}
	}
	return d.save(true)
}

// witness has fr's node put jp's TPM to the test.
func (d *dev) witness(ctx context.Context) error {
	d.say("fr-1 witnesses the TPM of jp-1")
	fr, jp := d.path("fr", "conclaved.toml"), d.path("jp", "conclaved.toml")
	challenge, answer := d.path("jp", "challenge.json"), d.path("jp", "answer.json")
	for _, step := range [][]string{
		{"challenge", "--config", fr, "--card", d.path("jp", "data", "node.json"), "-o", challenge},
		{"answer", "--config", jp, "--challenge", challenge, "-o", answer},
		{"witness", "--config", fr, "--answer", answer, "-o", d.path("jp", "witness.json")},
	} {
		if err := d.self(ctx, append([]string{"attest"}, step...)...); err != nil {
			return err
		}
	}
	return nil
}

// self runs this program with other arguments.
func (d *dev) self(ctx context.Context, args ...string) error {
	self, err := executable()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, self, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("conclaved %s: %s", strings.Join(args, " "), strings.TrimSpace(stderr.String()))
	}
	return nil
}

// devRoles are the identities that every site's CA issues.
var devRoles = map[string]string{"operator": "operator/admin", "service": "service/demo", "auditor": "auditor/demo", "custodian": "custodian/demo"}

func (d *dev) makeCertificates(s devSite) error {
	ca, err := newAuthority(s.trustDomain(), d.path("ca", s.id+".pem"), d.path("ca", s.id+".key"))
	if err != nil {
		return err
	}
	if err := ca.issue("spiffe://"+s.trustDomain()+"/node/"+s.node(), true, d.path(s.id, "node.crt"), d.path(s.id, "node.key")); err != nil {
		return err
	}
	for role, path := range devRoles {
		if err := ca.issue("spiffe://"+s.trustDomain()+"/"+path, false, d.path("clients", s.id+"-"+role+".crt"), d.path("clients", s.id+"-"+role+".key")); err != nil {
			return err
		}
	}
	return nil
}

func devCustodians() []custodianPlan {
	var out []custodianPlan
	for _, id := range []string{"fr-1", "fr-2", "de-1", "de-2", "jp-1", "jp-2"} {
		out = append(out, custodianPlan{ID: id, Site: id[:2], Keys: []string{"custodians/" + id + ".pub"}})
	}
	return out
}

// makeCustodian writes the key file and its passphrase. The passphrase is random
// and lies beside the file, so scrypt's cost would buy nothing here.
func (d *dev) makeCustodian(c custodianPlan) error {
	text, err := randomText()
	if err != nil {
		return err
	}
	pass, err := secret.Move([]byte(text))
	if err != nil {
		return err
	}
	defer pass.Destroy()
	key, err := pqc.GenerateHybrid(nil)
	if err != nil {
		return err
	}
	defer key.Destroy()
	encrypted, err := pqc.EncryptKeyFile(key, pass, pqc.KeyFileOptions{WorkFactor: pqc.MinWorkFactor})
	if err != nil {
		return err
	}
	public, err := pqc.MarshalPublic(pqc.MLDSA65Ed25519, key.PublicKey())
	if err != nil {
		return err
	}
	if err := writeNew(d.path("custodians", c.ID), encrypted, 0o600); err != nil {
		return err
	}
	if err := writeNew(d.path("custodians", c.ID+".pass"), pass.Reveal(), 0o600); err != nil {
		return err
	}
	return writeNew(d.path("custodians", c.ID+".pub"), public, 0o644)
}

// randomText returns 128 random bits in hexadecimal.
func randomText() (string, error) {
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		return "", err
	}
	return hex.EncodeToString(b), nil
}
