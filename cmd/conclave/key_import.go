package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

// importing are the flags of conclave key import.
type importing struct {
	in, sealed, proposal string
	node, pin            string
	purpose, algorithm   string
	period               time.Duration
	by                   proposing
}

// keyImportCommand is `conclave key import`.
func (a *app) keyImportCommand() *cobra.Command {
	var i importing
	cmd := &cobra.Command{
		Use:   "import KEYRING/KEY {--in FILE --purpose PURPOSE --reason TEXT | --proposal ID} --sealed FILE",
		Short: "Bring a key of your own into the cluster (BYOK)",
		Long: `Bring a key of your own into the cluster, in two steps.

First, with --in: the key is sealed here to the hybrid post-quantum key of one node that
can open the keyring, for this cluster, keyring, key and algorithm alone, and written to
the file --sealed. The proposal that this opens names that file's hash, and a sign key's
public key. The key itself does not leave this computer.

Then, once the quorum of the keyring's policy has approved, with --proposal: the sealed
file goes to that node, which opens it, wraps it for the keyring and forgets it. Where the
policy lets you import alone, both steps are done at once.

--in is the key's bytes: 32 for aes256-gcm, hmac-sha256, ecdsa-p256 and ed25519 (the seed),
48 for ecdsa-p384; or for sign keys a PEM file without a passphrase (PKCS #8 or SEC 1). What no
random generator makes is refused. Later versions of the key, by rotation, are made in the
cluster. Whoever holds the original holds the key: destroy it, or keep it on purpose.

With --node-key the fingerprint of the node's key, which conclave node list -o json or the genesis
document gives you by another way, nobody between you and the node can put another in its place.`,
		Example: "  conclave key import coalition/legacy --in legacy.key --purpose encrypt --sealed legacy.sealed --reason 'moved from the old service'\n  conclave key import coalition/legacy --proposal 6bbd19e6bce4d2c660e6ba1cccff16a6 --sealed legacy.sealed",
		Args:    arguments("KEYRING/KEY"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ring, key := keyPath(args[0])
			switch {
			case i.sealed == "":
				return usagef("--sealed is missing: the file of the sealed key")
			case (i.in == "") == (i.proposal == ""):
				return usagef("give either --in, to propose the import, or --proposal, to carry it out")
			case i.proposal != "":
				return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error { return a.handIn(ctx, cmd, c, ring, key, i) })
			}
			if err := i.by.check(); err != nil {
				return err
			}
			return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error { return a.proposeImport(ctx, cmd, c, ring, key, i) })
		},
	}
	f := cmd.Flags()
	f.StringVar(&i.in, "in", "", "the key, from this `FILE`")
	f.StringVar(&i.sealed, "sealed", "", "the sealed key: written to this `FILE`, or read from it")
	f.StringVar(&i.proposal, "proposal", "", "`ID` of the approved proposal: hand the sealed key in")
	f.StringVar(&i.purpose, "purpose", "", "`PURPOSE`: encrypt, mac or sign")
	f.StringVar(&i.algorithm, "algorithm", "", "`ALGORITHM`: aes256-gcm; hmac-sha256; ecdsa-p256, ecdsa-p384, ed25519 (default: the purpose's first)")
	f.DurationVar(&i.period, "rotation-period", 0, "rotate this often, 0 for on request only")
	f.StringVar(&i.node, "node", "", "`NODE` to seal the key to (default: the one that answers, if it can open the keyring, else the keyring's first)")
	f.StringVar(&i.pin, "node-key", "", "refuse a node whose agreement key has another `FINGERPRINT` (SHA256:...)")
	i.by.flags(cmd)
	return cmd
}

// proposeImport seals the key, writes it down and opens the proposal.
func (a *app) proposeImport(ctx context.Context, cmd *cobra.Command, c *client.Client, ring, key string, i importing) error {
	purpose := kms.Purpose(i.purpose)
	offered := purpose.Algorithms()
	if len(offered) == 0 {
		return usagef("--purpose is missing, or none of encrypt, mac, sign")
	}
	algorithm := kms.Algorithm(or(i.algorithm, string(offered[0])))
	if !slices.Contains(offered, algorithm) {
		return usagef("--algorithm %s is not for --purpose %s", algorithm, purpose)
	}
	material, err := readMaterial(i.in, algorithm)
	if err != nil {
		return err
	}
	defer material.Destroy()
	public, err := keyring.CheckImport(algorithm, material)
	if err != nil {
		return fmt.Errorf("%s: %w", i.in, err)
	}
	if err := a.recognise(ctx, cmd, c); err != nil {
		return err
	}
	node, cluster, err := importNode(ctx, c, ring, i)
	if err != nil {
		return err
	}
	info, aad := approval.ImportBinding(cluster, ring, key, node.ID, purpose, algorithm)
	sealed, err := sealToNode(node, info, aad, material)
	if err != nil {
		return err
	}
	if err := create(i.sealed, sealed, 0o600); err != nil {
		return err
	}
	sum := sha256.Sum256(sealed)
	p, err := c.OpenProposal(ctx, i.by.request(kms.ActionImport, approval.KeyTarget(ring, key), wire.ProposalParameters{Import: &wire.ImportedKey{
		Node: node.ID, Purpose: string(purpose), Algorithm: string(algorithm), RotationPeriodMS: i.period.Milliseconds(), PublicKey: public, Sealed: sum[:],
	}}))
	if err != nil {
		if kms.KindOf(err) == kms.Unknown {
			return err // the proposal may be there, and asks for this very file
		}
		return errors.Join(err, os.Remove(i.sealed))
	}
	if p.Progress == string(state.Authorised) {
		i.proposal = p.ID
		return a.handIn(ctx, cmd, c, ring, key, i)
	}
	return a.show(cmd, p, func(w io.Writer) {
		opened(w, p)
		row(w, "The key is sealed to node "+node.ID+" ("+pqc.Fingerprint(node.Agreement)+") in "+i.sealed+". Once it is approved:")
		row(w, "conclave key import "+kms.KeyPath(ring, key)+" --proposal "+p.ID+" --sealed "+i.sealed)
	})
}

// importNode returns the node that a key is to be sealed to, and the cluster.
func importNode(ctx context.Context, c *client.Client, ring string, i importing) (wire.Node, string, error) {
	kr, err := c.Keyring(ctx, ring)
	if err != nil {
		return wire.Node{}, "", err
	}
	status, err := c.Status(ctx)
	if err != nil {
		return wire.Node{}, "", err
	}
	can := func(id string) bool {
		return slices.ContainsFunc(kr.Nodes, func(n wire.NodeAPI) bool { return n.ID == id })
	}
	id := i.node
	switch {
	case id == "" && can(status.Node):
		id = status.Node
	case id == "" && len(kr.Nodes) > 0:
		id = kr.Nodes[0].ID
	case !can(id):
		return wire.Node{}, "", usagef("node %q cannot open keyring %s; see: conclave keyring show %s", id, ring, ring)
	}
	nodes, err := c.Nodes(ctx)
	if err != nil {
		return wire.Node{}, "", err
	}
	at := slices.IndexFunc(nodes, func(n wire.Node) bool { return n.ID == id })
	if at < 0 {
		return wire.Node{}, "", kms.Errorf(kms.NotFound, "there is no node %s", id)
	}
	if got := pqc.Fingerprint(nodes[at].Agreement); i.pin != "" && got != i.pin {
		return wire.Node{}, "", kms.Errorf(kms.Denied, "the agreement key of node %s is shown as %s, not %s: nothing was sealed", id, got, i.pin)
	}
	return nodes[at], status.Cluster, nil
}

func sealToNode(n wire.Node, info, aad []byte, material *secret.Bytes) ([]byte, error) {
	suite, ok := pqc.ByName(n.Suite)
	if !ok {
		return nil, kms.Errorf(kms.Invalid, "node %s has an agreement key of the suite %q, which this program does not know", n.ID, n.Suite)
	}
	pub, err := pqc.ParsePublicKey(suite.ID, n.Agreement)
	if err != nil {
		return nil, kms.Wrap(kms.Invalid, err, "the agreement key of node "+n.ID+" is not one", "")
	}
	return pub.Seal(info, aad, material.Reveal())
}

// handIn sends the sealed key to its node.
func (a *app) handIn(ctx context.Context, cmd *cobra.Command, c *client.Client, ring, key string, i importing) error {
	sealed, err := os.ReadFile(i.sealed)
	if err != nil {
		return usageError{err}
	}
	k, err := c.ImportKey(ctx, ring, key, wire.ImportKeyRequest{Proposal: i.proposal, Sealed: sealed})
	if err != nil {
		return err
	}
	return a.show(cmd, k, func(w io.Writer) { keyTable(w, []wire.Key{k}) })
}

// readMaterial reads a key: its bytes as they are, or a sign key in PEM.
func readMaterial(path string, algorithm kms.Algorithm) (*secret.Bytes, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, usageError{err}
	}
	if !bytes.HasPrefix(bytes.TrimSpace(b), []byte("-----BEGIN ")) {
		return secret.Move(b)
	}
	defer secret.Wipe(b)
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, kms.Errorf(kms.Invalid, "%s: this is no PEM file", path)
	}
	defer secret.Wipe(block.Bytes)
	raw, err := rawKey(block, algorithm)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return secret.Move(raw)
}

// rawKey returns the bytes of a sign key in the form of its algorithm.
func rawKey(block *pem.Block, algorithm kms.Algorithm) ([]byte, error) {
	other := kms.Errorf(kms.Invalid, "it holds no private key of %s", algorithm)
	var key any
	var err error
	switch block.Type {
	case "PRIVATE KEY":
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	default:
		return nil, kms.Errorf(kms.Invalid, "a PEM file of the type %q is not taken; PRIVATE KEY and EC PRIVATE KEY are", block.Type)
	}
	if err != nil {
		return nil, other // no word of what is in it
	}
	switch k := key.(type) {
	case *ecdsa.PrivateKey:
		if k.Params().BitSize == map[kms.Algorithm]int{kms.ECDSAP256: 256, kms.ECDSAP384: 384}[algorithm] {
			return k.Bytes()
		}
	case ed25519.PrivateKey:
		if algorithm == kms.Ed25519 {
			return k.Seed(), nil
		}
	}
	return nil, other
}
