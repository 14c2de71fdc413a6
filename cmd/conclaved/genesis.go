package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/engine"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

// genesisPlan is the file from which `conclaved genesis create` makes the
// genesis document. Paths are relative to it.
type genesisPlan struct {
	Name       string          `toml:"name"`
	Access     string          `toml:"access"`                  // Cedar policy set; default: the built-in one
	Vendors    []string        `toml:"vendors"`                 // PEM files: the TPM vendors that the founders trust
	Majority   string          `toml:"majority_site,omitempty"` // the site that may have a majority of the voters; default: none may
	Sites      []sitePlan      `toml:"site"`
	Nodes      []nodePlan      `toml:"node"`
	Custodians []custodianPlan `toml:"custodian"`
	Policies   []policyPlan    `toml:"policy"`
	Recovery   []recoveryPlan  `toml:"recovery,omitempty"`
}

type sitePlan struct {
	ID          string `toml:"id"`
	TrustDomain string `toml:"trust_domain"`
	CA          string `toml:"ca"` // PEM bundle
}

type nodePlan struct {
	Card    string `toml:"card"` // node.json as written by conclaved init
	Voter   bool   `toml:"voter"`
	Witness string `toml:"witness,omitempty"` // witness.json as written by conclaved attest witness; default: none
}

type custodianPlan struct {
	ID   string   `toml:"id"`
	Site string   `toml:"site"`
	Keys []string `toml:"keys"` // public key files of conclave custodian keygen
}

type policyPlan struct {
	Name     string     `toml:"name"`
	Attested bool       `toml:"attested,omitempty"` // keyrings under it: only on nodes whose hardware is attested
	Forbid   []string   `toml:"forbid,omitempty"`   // names of suites of which nothing new is made or enrolled
	Rules    []rulePlan `toml:"rule"`
}

type rulePlan struct {
	Actions            []string `toml:"actions"`
	Direct             []string `toml:"direct"`
	Approvals          uint32   `toml:"approvals"`
	Sites              uint32   `toml:"sites"`
	Required           []string `toml:"required"`
	ProposerMayApprove bool     `toml:"proposer_may_approve"`
	Delay              Duration `toml:"delay,omitzero"`
	Lifetime           Duration `toml:"lifetime,omitzero"`
	Veto               []string `toml:"veto"`

	Need      *wire.Group `toml:"need,omitempty"`      // as in the API: need, custodians, sites, groups
	NotBefore time.Time   `toml:"not_before,omitzero"` // nothing is carried out earlier
	Unused    Duration    `toml:"unused,omitzero"`     // deactivate, destroy: for how long a version must not have been used before
}

// build reads everything that the plan names.
func (p genesisPlan) build(dir string, now time.Time) (state.Genesis, error) {
	g := state.Genesis{Format: 1, Name: p.Name, Nonce: make([]byte, state.GenesisNonce), Created: now.UnixMilli(), Access: []byte(engine.DefaultAccess()), MajoritySite: p.Majority}
	if _, err := rand.Read(g.Nonce); err != nil {
		return g, err
	}
	at := func(path string) string {
		if filepath.IsAbs(path) {
			return path
		}
		return filepath.Join(dir, path)
	}
	if p.Access != "" {
		b, err := os.ReadFile(at(p.Access))
		if err != nil {
			return g, fmt.Errorf("access: %w", err)
		}
		g.Access = b
	}
	for _, path := range p.Vendors {
		roots, err := readCertificates(at(path))
		if err != nil {
			return g, fmt.Errorf("vendors: %w", err)
		}
		g.Vendors = append(g.Vendors, roots...)
	}
	for _, s := range p.Sites {
		cas, err := readCertificates(at(s.CA))
		if err != nil {
			return g, fmt.Errorf("site %s: ca: %w", s.ID, err)
		}
		g.Sites = append(g.Sites, state.Site{ID: s.ID, TrustDomain: s.TrustDomain, CAs: cas})
	}
	for _, n := range p.Nodes {
		node, err := n.build(at)
		if err != nil {
			return g, err
		}
		g.Nodes = append(g.Nodes, node)
	}
	for _, c := range p.Custodians {
		custodian, err := c.build(at)
		if err != nil {
			return g, fmt.Errorf("custodian %s: %w", c.ID, err)
		}
		g.Custodians = append(g.Custodians, custodian)
	}
	for _, pol := range p.Policies {
		policy, err := pol.build()
		if err != nil {
			return g, fmt.Errorf("policy %s: %w", pol.Name, err)
		}
		g.Policies = append(g.Policies, policy)
	}
	slices.SortFunc(g.Sites, func(a, b state.Site) int { return strings.Compare(a.ID, b.ID) })
	slices.SortFunc(g.Nodes, func(a, b state.Node) int { return strings.Compare(a.ID, b.ID) })
	slices.SortFunc(g.Custodians, func(a, b approval.Custodian) int { return strings.Compare(a.ID, b.ID) })
	slices.SortFunc(g.Policies, func(a, b approval.Policy) int { return strings.Compare(a.Name, b.Name) })
	if err := g.Validate(); err != nil {
		return g, err
	}
	if err := g.CheckFounding(); err != nil {
		return g, err
	}
	return g, p.checkRecovery(g)
}

func (n nodePlan) build(at func(string) string) (state.Node, error) {
	c, err := readCard(at(n.Card))
	if err != nil {
		return state.Node{}, err
	}
	if n.Witness != "" {
		if err := c.addWitness(at(n.Witness)); err != nil {
			return state.Node{}, err
		}
	}
	node, err := c.node()
	if err != nil {
		return state.Node{}, fmt.Errorf("%s: %w", n.Card, err)
	}
	node.Voter = n.Voter
	return node, nil
}

func (c custodianPlan) build(at func(string) string) (approval.Custodian, error) {
	out := approval.Custodian{ID: c.ID, Site: c.Site, Revision: 1}
	for _, path := range c.Keys {
		b, err := os.ReadFile(at(path))
		if err != nil {
			return out, err
		}
		suite, pub, err := pqc.ParsePublic(b)
		if err != nil {
			return out, fmt.Errorf("%s: %w", path, err)
		}
		out.Credentials = append(out.Credentials, approval.Credential{ID: pqc.Fingerprint(pub), Suite: uint16(suite), PublicKey: pub})
	}
	slices.SortFunc(out.Credentials, func(a, b approval.Credential) int { return strings.Compare(a.ID, b.ID) })
	return out, nil
}

func (p policyPlan) build() (approval.Policy, error) {
	forbid, err := engine.SuitesFromWire(p.Forbid)
	out := approval.Policy{Name: p.Name, Revision: 1, Attested: p.Attested, Forbid: forbid}
	for _, r := range p.Rules {
		for _, action := range r.Actions {
			rule := engine.RuleFromWire(wire.Rule{
				Action: action, Direct: r.Direct, Approvals: r.Approvals, Sites: r.Sites, Required: r.Required,
				ProposerMayApprove: r.ProposerMayApprove, DelayMS: r.Delay.Milliseconds(),
				LifetimeMS: r.Lifetime.Milliseconds(), Veto: r.Veto, Need: r.Need, UnusedMS: r.Unused.Milliseconds(), NotBefore: r.NotBefore,
			})
			out.Rules = append(out.Rules, rule)
		}
	}
	slices.SortFunc(out.Rules, func(a, b approval.Rule) int { return strings.Compare(string(a.Action), string(b.Action)) })
	return out, err
}

func readCertificates(path string) ([][]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var out [][]byte
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		if block.Type == "CERTIFICATE" {
			out = append(out, block.Bytes)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s holds no PEM certificate", path)
	}
	return out, nil
}

func readSignedGenesis(path string) (state.SignedGenesis, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return state.SignedGenesis{}, fmt.Errorf("the genesis document %s is missing: get the signed one from whoever founded the cluster, or make it with: conclaved genesis create", path)
	}
	if err != nil {
		return state.SignedGenesis{}, err
	}
	s, err := state.ParseSignedGenesis(b)
	if err != nil {
		return s, fmt.Errorf("%s is no signed genesis document, or damaged: %w; copy it from another node of the cluster", path, err)
	}
	return s, nil
}

func genesisCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "genesis",
		Short: "Make, sign and show the document that founds a cluster",
		Long: `The genesis document names the sites with their CAs, the nodes with their hardware
roots, the custodians and the policies. Its hash is the cluster's identity. Every
node signs it with the signing key in its device; a node runs only with a document
that all nodes have signed.

  1. at every site:  conclaved init         writes DATA_DIR/node.json, the node's card
     for nodes on a TPM, if policies are to ask for attested hardware:
                     conclaved attest       a node of another site witnesses the TPM
  2. at one site:    conclaved genesis create --plan genesis.toml --out genesis.cbor
  3. at every site:  conclaved genesis show genesis.cbor   and, if it is what was agreed,
                     conclaved genesis sign --config conclaved.toml --cluster ID genesis.cbor
  4. give the fully signed file to every node and start it: conclaved run
  5. propose the recovery keys: genesis create says how

No site may have a majority of the voters: it could decide alone, and without it nobody
could. Where that is meant, as with one site or for a trial, the plan says so by
majority_site = "SITE"; the document and genesis show say it, too. The governance policy
needs a rule for recover that custodians of two sites can meet.`,
	}
	cmd.AddCommand(genesisCreateCommand(), genesisSignCommand(), genesisShowCommand())
	return cmd
}

func genesisCreateCommand() *cobra.Command {
	var plan, out string
	cmd := &cobra.Command{
		Use:   "create --plan FILE --out FILE",
		Short: "Make an unsigned genesis document from a plan and the nodes' cards",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			b, err := os.ReadFile(plan)
			if err != nil {
				return err
			}
			var p genesisPlan
			if err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(&p); err != nil {
				return positioned(plan, err)
			}
			g, err := p.build(filepath.Dir(plan), time.Now())
			if err != nil {
				return fmt.Errorf("%s: %w", plan, err)
			}
			s := state.SignedGenesis{Genesis: g.Marshal()}
			if err := writeNew(out, s.Marshal(), 0o644); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "cluster %s: %s, to be signed by %d nodes\n", kms.ClusterID(s.Genesis), out, len(g.Nodes))
			p.firstActs(cmd.OutOrStdout())
			return nil
		},
	}
	cmd.Flags().StringVar(&plan, "plan", "genesis.toml", "the plan")
	cmd.Flags().StringVar(&out, "out", "genesis.cbor", "the document to write")
	return cmd
}

func genesisSignCommand() *cobra.Command {
	var config, cluster string
	cmd := &cobra.Command{
		Use:   "sign FILE",
		Short: "Add this node's signature, made in its device",
		Args:  oneFile,
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := readSignedGenesis(args[0])
			if err != nil {
				return err
			}
			if id := kms.ClusterID(s.Genesis); cluster != "" && cluster != id {
				return fmt.Errorf("%s is now the document of cluster %s, not of %s: read it with genesis show before you sign it", args[0], id, cluster)
			}
			cfg, err := loadConfig(config)
			if err != nil {
				return err
			}
			if s, err = signGenesis(cmd.Context(), cfg, s); err != nil {
				return err
			}
			if err := replaceFile(args[0], s.Marshal(), 0o644); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s has signed cluster %s\n", cfg.Node, kms.ClusterID(s.Genesis))
			return nil
		},
	}
	cmd.Flags().StringVarP(&config, "config", "c", "conclaved.toml", "configuration file")
	cmd.Flags().StringVar(&cluster, "cluster", "", "sign only this cluster's document, as genesis show named it")
	return cmd
}

// signGenesis adds the node's signature after checking that the document says
// of this node what its device holds.
func signGenesis(ctx context.Context, cfg Config, s state.SignedGenesis) (state.SignedGenesis, error) {
	g, err := state.ParseGenesis(s.Genesis)
	if err == nil {
		err = g.CheckFounding()
	}
	if err != nil {
		return s, err
	}
	dev, err := openDevice(ctx, cfg.Device)
	if err != nil {
		return s, err
	}
	defer dev.Close()
	root, err := loadRoot(ctx, dev, cfg)
	if err != nil {
		return s, err
	}
	i := slices.IndexFunc(g.Nodes, func(n state.Node) bool { return n.ID == cfg.Node })
	if i < 0 {
		return s, fmt.Errorf("the document does not name node %s", cfg.Node)
	}
	if err := sameRoot(g.Nodes[i], dev, root); err != nil {
		return s, err
	}
	_, suite := cfg.Device.suites()
	digest, err := pqc.Digest(suite, s.Genesis, []byte(state.GenesisContext))
	if err != nil {
		return s, err
	}
	sig, err := dev.Sign(ctx, digest)
	if err != nil {
		return s, err
	}
	s.Signatures = slices.DeleteFunc(slices.Clone(s.Signatures), func(n state.NodeSignature) bool { return n.Node == cfg.Node })
	s.Signatures = append(s.Signatures, state.NodeSignature{Node: cfg.Node, Signature: sig})
	slices.SortFunc(s.Signatures, func(a, b state.NodeSignature) int { return strings.Compare(a.Node, b.Node) })
	return s, nil
}
