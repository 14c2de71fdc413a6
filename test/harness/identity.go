package harness

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms/client"
)

// Certificate returns the files of an identity of the cluster: roles are
// operator, service, auditor and custodian.
func (c *Cluster) Certificate(site, role string) (cert, key string) {
	base := filepath.Join(c.Dir, "clients", site+"-"+role)
	return base + ".crt", base + ".key"
}

// Client returns a client of one site's node with an identity of that site. It
// is shared and closed with the cluster.
func (c *Cluster) Client(site, role string) (*client.Client, error) {
	return c.ClientAt(site, site, role)
}

// ClientAt is Client for an identity of another site than the node's.
func (c *Cluster) ClientAt(node, site, role string) (*client.Client, error) {
	return c.shared([]string{node}, site, role)
}

// ClientAll returns a client that tries the nodes in the order given, fr, de, jp
// where none is.
func (c *Cluster) ClientAll(site, role string, nodes ...string) (*client.Client, error) {
	if len(nodes) == 0 {
		nodes = sites
	}
	return c.shared(nodes, site, role)
}

func (c *Cluster) shared(nodes []string, site, role string) (*client.Client, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	id := fmt.Sprint(nodes, site, role)
	if cl, ok := c.clients[id]; ok {
		return cl, nil
	}
	cl, err := c.newClient(nodes, site, role)
	if err != nil {
		return nil, err
	}
	c.clients[id] = cl
	return cl, nil
}

// ClientOnce returns a client that makes one try of at most the timeout, for
// errors to be looked at. The caller closes it.
func (c *Cluster) ClientOnce(site, role string, timeout time.Duration) (*client.Client, error) {
	cfg, err := c.config([]string{site}, site, role)
	if err != nil {
		return nil, err
	}
	cfg.Attempts, cfg.Timeout = 1, timeout
	return client.New(cfg)
}

func (c *Cluster) newClient(nodes []string, site, role string) (*client.Client, error) {
	cfg, err := c.config(nodes, site, role)
	if err != nil {
		return nil, err
	}
	return client.New(cfg)
}

func (c *Cluster) config(nodes []string, site, role string) (client.Config, error) {
	cert, key := c.Certificate(site, role)
	tlsConfig, err := client.LoadTLS(c.Vars["CONCLAVE_CACERT"], cert, key)
	if err != nil {
		return client.Config{}, err
	}
	cfg := client.Config{TLS: tlsConfig}
	for _, n := range nodes {
		cfg.Addresses = append(cfg.Addresses, c.API(n))
	}
	return cfg, nil
}

// API returns the https URL of a site's node.
func (c *Cluster) API(site string) string { return c.Vars["CONCLAVE_ADDR_"+strings.ToUpper(site)] }

// Env returns the environment in which the conclave command speaks to a site's
// node, as that site's service and operator.
func (c *Cluster) Env(site string) Env { return c.EnvAs(site, site) }

// EnvAs is Env for the identities of another site than the node's.
func (c *Cluster) EnvAs(node, site string) Env {
	cert, key := c.Certificate(site, "service")
	adminCert, adminKey := c.Certificate(site, "operator")
	return Env{
		"CONCLAVE_ADDR":        c.API(node),
		"CONCLAVE_CACERT":      c.Vars["CONCLAVE_CACERT"],
		"CONCLAVE_CLIENT_CERT": cert, "CONCLAVE_CLIENT_KEY": key,
		"CONCLAVE_ADMIN_CERT": adminCert, "CONCLAVE_ADMIN_KEY": adminKey,
	}
}

// CLI runs the conclave command in the environment env.
func (c *Cluster) CLI(ctx context.Context, env Env, args ...string) (Result, error) {
	return Run(ctx, c.Bin.Conclave, env, nil, args...)
}

// CustodianFiles returns the key file and the passphrase file of a custodian.
func (c *Cluster) CustodianFiles(id string) (key, pass string) {
	dir := c.Vars["CONCLAVE_CUSTODIANS_DIR"]
	return filepath.Join(dir, id), filepath.Join(dir, id+".pass")
}
