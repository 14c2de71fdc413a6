package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/tpm"
)

// devSite is one site of the development cluster, with one node.
type devSite struct {
	id, device string
	cluster    int // port
	api        int // port
}

func (s devSite) node() string        { return s.id + "-1" }
func (s devSite) trustDomain() string { return s.id + ".example" }
func (s devSite) url() string         { return fmt.Sprintf("https://127.0.0.1:%d", s.api) }

// dev is a development cluster in one directory.
type dev struct {
	dir   string
	sites []devSite
	out   io.Writer
}

const devMarker = "conclave-dev.json"

func (d *dev) path(parts ...string) string {
	return filepath.Join(append([]string{d.dir}, parts...)...)
}

func devCommand() *cobra.Command {
	var dir string
	var keep bool
	cmd := &cobra.Command{
		Use:   "dev --dir DIR",
		Short: "Run a throw-away three-nation cluster on this machine",
		Long: `Run a development cluster: sites fr and de on SoftHSM tokens, site jp on a software TPM,
one node each, on loopback, with CAs, custodians, a keyring "coalition" that all three
can open and a keyring "europe" that only fr and de can open. When all is ready it
prints a line that begins with "ready" and writes DIR/env for a shell to source. It
runs until interrupted and takes its processes with it.

Without --keep the cluster is made anew; --keep goes on with the one in DIR.
Nothing here protects keys: tokens, TPM state, PINs and CA keys lie in DIR.`,
		Example: "  conclaved dev --dir /tmp/conclave &\n  . /tmp/conclave/env\n  conclave status",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dir == "" {
				return errors.New("--dir is missing: a directory for the cluster, for example --dir /tmp/conclave")
			}
			abs, err := filepath.Abs(dir)
			if err != nil {
				return err
			}
			return runDev(cmd.Context(), &dev{dir: abs, out: cmd.OutOrStdout()}, keep)
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "directory for everything that the cluster keeps")
	cmd.Flags().BoolVar(&keep, "keep", false, "go on with the cluster that is in the directory")
	return cmd
}

func runDev(ctx context.Context, d *dev, keep bool) error {
	started := time.Now()
	unlock, err := lockDir(d.dir)
	if err != nil {
		return err
	}
	defer unlock()
	fresh, err := d.prepare(keep)
	if err != nil {
		return err
	}
	softTPM, err := d.startDevices(ctx, fresh)
	if err != nil {
		return err
	}
	defer softTPM.Stop()
	if fresh {
		if err := d.found(ctx); err != nil {
			return err
		}
	}
	nodes, err := d.startNodes()
	if err != nil {
		return err
	}
	defer nodes.stop()
	env, err := d.writeEnv(nodes)
	if err != nil {
		return err
	}
	if err := d.settle(ctx, nodes, fresh); err != nil {
		return err
	}
	fmt.Fprintf(d.out, "ready in %.1f s: three sites, three nodes; . %s\n", time.Since(started).Seconds(), env)
	return nodes.wait(ctx, d.out)
}

// lockDir keeps a second development cluster out of a directory.
func lockDir(dir string) (unlock func(), err error) {
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(dir+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("a development cluster is running in %s already; stop it, or choose another --dir", dir)
	}
	return func() {
		_ = os.Remove(f.Name()) // while it is held: nobody else can have locked it
		f.Close()
	}, nil
}

// startDevices makes the SoftHSM tokens and the software TPM where that is due
// and starts the TPM.
func (d *dev) startDevices(ctx context.Context, fresh bool) (*tpm.SoftTPM, error) {
	if fresh {
		d.say("making two SoftHSM tokens and a software TPM")
		if err := d.makeDevices(ctx); err != nil {
			return nil, err
		}
	}
	softTPM, err := tpm.StartSoftTPM(ctx, d.path("jp", "swtpm"))
	if err != nil {
		return nil, err
	}
	// The socket can move between runs, so this configuration is written each time.
	err = d.writeConfig("jp", deviceSection{Type: "tpm", Path: "unix:" + softTPM.Socket, AuthFile: d.path("jp", "auth"), EKChain: devEKChain})
	if err != nil {
		return nil, errors.Join(err, softTPM.Stop())
	}
	return softTPM, nil
}

// settle waits until every node is ready and makes the keyrings.
func (d *dev) settle(ctx context.Context, nodes *processes, fresh bool) error {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	operator, err := d.client("fr", "operator")
	if err != nil {
		return err
	}
	defer operator.Close()
	for _, s := range d.sites {
		c, err := operator.At(s.url())
		if err != nil {
			return err
		}
		if err := until(ctx, nodes, s, func() error { return isReady(ctx, c) }); err != nil {
			return err
		}
	}
	if !fresh {
		return nil
	}
	d.say("creating the keyrings coalition (fr, de, jp) and europe (fr, de)")
	for _, k := range []wire.CreateKeyringRequest{
		{Name: "coalition", Residency: []string{"de", "fr", "jp"}, Policy: "keys", Receipts: string(kms.EveryNode)},
		{Name: "europe", Residency: []string{"de", "fr"}, Policy: "keys", Receipts: string(kms.EveryNode)},
	} {
		if _, err := operator.CreateKeyring(ctx, k); err != nil {
			return fmt.Errorf("create keyring %s: %w", k.Name, err)
		}
	}
	for _, s := range d.sites {
		c, err := operator.At(s.url())
		if err != nil {
			return err
		}
		if err := until(ctx, nodes, s, func() error { return owesNothing(ctx, c) }); err != nil {
			return err
		}
	}
	return nil
}

func isReady(ctx context.Context, c *client.Client) error {
	r, err := c.Ready(ctx)
	if err != nil {
		return err
	}
	if !r.Ready {
		return fmt.Errorf("not ready: %v", r.Reasons)
	}
	return nil
}

// owesNothing reports whether a node has the keyrings and has proved that it
// can open those that are resident there.
func owesNothing(ctx context.Context, c *client.Client) error {
	s, err := c.Status(ctx)
	if err != nil {
		return err
	}
	if s.Keys.Keyrings < 2 || s.Pending > 0 {
		return fmt.Errorf("%d of 2 keyrings, %d receipts owed", s.Keys.Keyrings, s.Pending)
	}
	return nil
}

// until repeats check until it succeeds, ctx ends or the site's node has died.
func until(ctx context.Context, nodes *processes, s devSite, check func() error) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-nodes.exited(s.id):
			return fmt.Errorf("node %s ended: %s", s.node(), nodes.lastWords(s.id))
		case <-ctx.Done():
			return fmt.Errorf("node %s: %w; its log is %s", s.node(), err, nodes.logFile(s.id))
		case <-tick.C:
		}
	}
}

func (d *dev) client(site, role string) (*client.Client, error) {
	tlsConfig, err := client.LoadTLS(d.path("ca", "bundle.pem"), d.path("clients", site+"-"+role+".crt"), d.path("clients", site+"-"+role+".key"))
	if err != nil {
		return nil, err
	}
	var addresses []string
	for _, s := range d.sites {
		if s.id == site {
			addresses = append(addresses, s.url())
		}
	}
	return client.New(client.Config{Addresses: addresses, TLS: tlsConfig, Attempts: 1, Timeout: 20 * time.Second})
}

func (d *dev) say(format string, args ...any) { fmt.Fprintf(d.out, format+"\n", args...) }

// executable is this program, to be started again as init, genesis and run.
func executable() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find this program: %w", err)
	}
	return self, nil
}
