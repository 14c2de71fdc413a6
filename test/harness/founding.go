package harness

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sync/errgroup"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
)

// custodiansEach is how many custodians every site has: SITE-1 and SITE-2.
const custodiansEach = 2

// found makes everything that the nodes need to run.
func (c *Coalition) found(ctx context.Context, plan Plan) error {
	for _, p := range []string{"ca", "clients", "custodians"} {
		if err := os.MkdirAll(filepath.Join(c.Dir, p), 0o700); err != nil {
			return err
		}
	}
	siteIDs := slices.Sorted(maps.Keys(plan.Nodes))
	c.plan, c.authorities = plan, map[string]*authority{}
	var cas []string
	g, gctx := errgroup.WithContext(ctx)
	for _, site := range siteIDs {
		file := filepath.Join(c.Dir, "ca", site+".pem")
		cas = append(cas, file)
		ca, err := newAuthority(site+".example", file)
		if err != nil {
			return err
		}
		c.authorities[site] = ca
		for role, path := range roles {
			base := filepath.Join(c.Dir, "clients", site+"-"+role)
			if err := ca.issue("spiffe://"+site+".example/"+path, false, base+".crt", base+".key"); err != nil {
				return err
			}
		}
		for i := range plan.Nodes[site] {
			n, err := c.place(plan, ca, site, fmt.Sprintf("%s-%d", site, i+1))
			if err != nil {
				return err
			}
			c.Nodes = append(c.Nodes, n)
			g.Go(func() error { return c.equip(gctx, n) })
		}
		for i := range custodiansEach {
			g.Go(func() error { return c.newCustodian(fmt.Sprintf("%s-%d", site, i+1)) })
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if err := concat(filepath.Join(c.Dir, "ca", "bundle.pem"), cas...); err != nil {
		return err
	}
	return c.genesis(ctx, siteIDs)
}

// place gives a node its directory, addresses, certificate and configuration.
func (c *Coalition) place(plan Plan, ca *authority, site, id string) (*Node, error) {
	n := &Node{Site: site, ID: id, Dir: filepath.Join(c.Dir, id), program: c.Bin.Conclaved, found: "init"}
	if p := plan.Program[id]; p != "" {
		n.program = p
	}
	n.Config, n.Data, n.Log = filepath.Join(n.Dir, "conclaved.toml"), filepath.Join(n.Dir, "data"), filepath.Join(n.Dir, "log")
	if err := os.MkdirAll(n.Dir, 0o700); err != nil {
		return nil, err
	}
	if plan.DataDir != nil {
		var err error
		if n.Data, err = plan.DataDir(id, n.Dir); err != nil {
			return nil, err
		}
	}
	if err := ca.issue("spiffe://"+site+".example/node/"+id, true, filepath.Join(n.Dir, "node.crt"), filepath.Join(n.Dir, "node.key")); err != nil {
		return nil, err
	}
	listen, err := freePorts(2)
	if err != nil {
		return nil, err
	}
	n.API = "https://" + listen[1]
	cluster := maps.Clone(plan.Cluster)
	if cluster == nil {
		cluster = map[string]any{}
	}
	cluster["listen"] = listen[0]
	if !plan.Direct {
		if cluster["advertise"], err = c.Links.Front(id, listen[0]); err != nil {
			return nil, err
		}
	}
	b, err := toml.Marshal(map[string]any{
		"node": id, "site": site, "data_dir": n.Data, "genesis": filepath.Join(c.Dir, "genesis.cbor"),
		"tls":     map[string]any{"certificate": "node.crt", "key": "node.key"},
		"cluster": cluster,
		"api":     map[string]any{"listen": listen[1]},
	})
	if err != nil {
		return nil, err
	}
	n.check = c.readiness(n)
	return n, os.WriteFile(n.Config, b, 0o600)
}

// equip makes a node's token and its hardware root.
func (c *Coalition) equip(ctx context.Context, n *Node) error {
	pin, file, err := newSecret(filepath.Join(n.Dir, "pin"))
	if err != nil {
		return err
	}
	defer pin.Destroy()
	token, err := hsm.CreateSoftToken(ctx, filepath.Join(n.Dir, "token"), "conclave-"+n.ID, pin)
	if err != nil {
		return err
	}
	_, err = n.Configure(map[string]any{
		"device.type": "pkcs11", "device.uri": token.URI + "&pin-source=file:" + file, "device.softhsm_conf": token.ConfFile,
	})
	if err != nil {
		return err
	}
	return c.conclaved(ctx, n.found, "--config", n.Config)
}

// newCustodian writes a custodian's key file, its passphrase and the public key.
func (c *Coalition) newCustodian(id string) error {
	base := filepath.Join(c.Dir, "custodians", id)
	pass, _, err := newSecret(base + ".pass")
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
	if err := os.WriteFile(base, encrypted, 0o600); err != nil {
		return err
	}
	return os.WriteFile(base+".pub", public, 0o644)
}

// genesis has every node sign the genesis document. Rotations and resumptions take
// two approvals of two sites, a suspension one.
func (c *Coalition) genesis(ctx context.Context, siteIDs []string) error {
	type table = map[string]any
	rule := func(approvals, sites int, actions ...kms.Action) table {
		return table{"actions": actions, "approvals": approvals, "sites": sites, "lifetime": (72 * time.Hour).String()}
	}
	direct := func(action kms.Action) table {
		return table{"actions": []kms.Action{action}, "direct": []string{"operator"}}
	}
	destroy := rule(3, 2, kms.ActionDestroy)
	destroy["delay"], destroy["lifetime"] = (7 * 24 * time.Hour).String(), (28 * 24 * time.Hour).String()
	plan := table{"name": "coalition under test", "policy": []table{
		{"name": kms.Governance, "rule": []table{
			direct(kms.ActionKeyring), rule(3, 2, kms.ActionPolicy, kms.ActionCustodian, kms.ActionNode, kms.ActionSite, kms.ActionRecoveryKey, kms.ActionRecover),
		}},
		{"name": "keys", "rule": []table{
			direct(kms.ActionCreate), rule(2, 2, kms.ActionRotate, kms.ActionResume, kms.ActionDeactivate, kms.ActionCompromise),
			rule(1, 1, kms.ActionSuspend), destroy,
		}},
	}}
	var sites, nodes, custodians []table
	for _, s := range siteIDs {
		sites = append(sites, table{"id": s, "trust_domain": s + ".example", "ca": filepath.Join("ca", s+".pem")})
		for i := range custodiansEach {
			id := fmt.Sprintf("%s-%d", s, i+1)
			custodians = append(custodians, table{"id": id, "site": s, "keys": []string{filepath.Join("custodians", id+".pub")}})
		}
	}
	for _, n := range c.Nodes {
		nodes = append(nodes, table{"card": filepath.Join(n.Data, "node.json"), "voter": true})
	}
	plan["site"], plan["node"], plan["custodian"] = sites, nodes, custodians
	b, err := toml.Marshal(plan)
	if err != nil {
		return err
	}
	file, out := filepath.Join(c.Dir, "genesis.toml"), filepath.Join(c.Dir, "genesis.cbor")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		return err
	}
	if err := c.conclaved(ctx, "genesis", "create", "--plan", file, "--out", out); err != nil {
		return err
	}
	for _, n := range c.Nodes {
		if err := c.conclaved(ctx, "genesis", "sign", "--config", n.Config, out); err != nil {
			return err
		}
	}
	return nil
}

func (c *Coalition) conclaved(ctx context.Context, args ...string) error {
	r, err := Run(ctx, c.Bin.Conclaved, base(), nil, args...)
	if err == nil && r.Code != 0 {
		err = fmt.Errorf("conclaved %v: %s", args, r.Stderr)
	}
	return err
}

// newSecret draws 128 random bits as text and writes them to a file.
func newSecret(file string) (*secret.Bytes, string, error) {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails: it ends the process instead
	text := []byte(hex.EncodeToString(b))
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return nil, "", err
	}
	s, err := secret.Move(text)
	return s, file, err
}

// taken counts the ports that this process has tried.
var taken atomic.Uint32

// freePorts returns free addresses on loopback that stay free until a node listens there: below the
// range from which systems take the ports of outgoing connections, and of a part of it in which
// other processes of the tests seldom look.
func freePorts(n int) (addresses []string, err error) {
	const first, parts, size = 10_000, 100, 200
	for tries := 0; len(addresses) < n; tries++ {
		if tries > size {
			return nil, err
		}
		port := first + os.Getpid()%parts*size + int(taken.Add(1)%size)
		var l net.Listener
		if l, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err != nil {
			continue
		}
		defer l.Close() // at the end, so that all differ
		addresses = append(addresses, l.Addr().String())
	}
	return addresses, nil
}
