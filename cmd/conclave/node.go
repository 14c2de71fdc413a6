package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

func (a *app) nodeCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "node", Short: "Look at the members of the cluster; propose that one joins, votes, goes, or gets another hardware root"}
	cmd.AddCommand(
		a.nodeListCommand(),
		look(a, &cobra.Command{Use: "show NODE", Short: "Show a node: what is proven of its hardware, and what it only claims"},
			func(ctx context.Context, c *client.Client, args []string) (wire.Node, error) {
				return findNode(ctx, c, args[0])
			},
			nodeDetail),
		a.nodeJoinCommand(), a.nodePromoteCommand(), a.nodeRemoveCommand(), a.nodeRekeyCommand(), a.nodeIntroduceCommand())
	return cmd
}

func findNode(ctx context.Context, c *client.Client, id string) (wire.Node, error) {
	nodes, err := c.Nodes(ctx)
	if err != nil {
		return wire.Node{}, err
	}
	i := slices.IndexFunc(nodes, func(n wire.Node) bool { return n.ID == id })
	if i < 0 {
		return wire.Node{}, kms.Errorf(kms.NotFound, "the cluster has no node %s; see: conclave node list", id)
	}
	return nodes[i], nil
}

func nodeTable(w io.Writer, nodes []wire.Node) {
	row(w, "NODE", "SITE", "VOTES", "ROOT", "ATTESTED", "LAST HEARD", "API", "DEVICE (as claimed)")
	for _, n := range nodes {
		root := fmt.Sprint(n.Root)
		if n.Root == 0 {
			root = "joins"
		}
		if n.Replacing != nil {
			root += fmt.Sprintf(", next %d", n.Replacing.Root)
		}
		row(w, n.ID, n.Site, yesNo(n.Voter), root, yesNo(n.Attested), when(n.LastHeard), n.API, shortDevice(n.Device))
	}
}

func yesNo(b bool) string { return map[bool]string{true: "yes", false: "no"}[b] }

// shortDevice leaves the make of a device's description; node show has all of it.
func shortDevice(s string) string {
	s, _, _ = strings.Cut(s, ",")
	return strings.Join(strings.Fields(s), " ")
}

func nodeDetail(w io.Writer, n wire.Node) {
	row(w, "node", n.ID+", site "+n.Site)
	row(w, "API", n.API)
	row(w, "address", n.Address)
	row(w, "voter", yesNo(n.Voter))
	row(w, "release", or(n.Release, "-"))
	row(w, "last heard", when(n.LastHeard))
	row(w, "device", n.Device)
	if n.Root == 0 {
		row(w, "root", "none yet: it joins")
	} else {
		row(w, "root", fmt.Sprintf("number %d", n.Root))
		row(w, "signing key", pqc.Fingerprint(n.Signing)+" ("+n.SigningSuite+")")
		row(w, "agreement key", pqc.Fingerprint(n.Agreement)+" ("+n.Suite+")")
	}
	row(w, "protections", or(strings.Join(n.Protections, ", "), "-"))
	row(w, "keys wrapped by", or(n.ImportKind, "-"))
	row(w, "attested", yesNo(n.Attested))
	for _, s := range n.Proven {
		row(w, "proven", s)
	}
	for _, s := range n.Claimed {
		row(w, "claimed", s)
	}
	for _, x := range n.Refused {
		what := "the KEK of keyring " + x.Keyring
		if x.Key != "" {
			what = "key " + kms.KeyPath(x.Keyring, x.Key)
		}
		row(w, "refused", fmt.Sprintf("by root number %d, %s: the copy of %s, version %d, that node %s sealed did not open, or held another key",
			x.Root, when(x.Time), what, x.Version, x.SealedBy))
	}
	if r := n.Replacing; r != nil {
		row(w)
		row(w, "next root", fmt.Sprintf("number %d, by proposal %s", r.Root, r.Proposal))
		row(w, "", r.Device)
		row(w, "progress", replacing(r))
	}
}

// replacing says how far a replacement is.
func replacing(r *wire.Replacing) string {
	s := fmt.Sprintf("%d copies sealed to it, %d missing", r.Sealed, r.Missing)
	if r.Note != "" {
		s += ": " + r.Note
	}
	return s
}

// nextCard is the part of next-node.json, which conclaved rekey prepare writes, that
// goes into a proposal.
type nextCard struct {
	Format       int    `json:"format"`
	Node         string `json:"node"`
	Site         string `json:"site"`
	Address      string `json:"address"`
	API          string `json:"api"`
	Suite        string `json:"suite"`
	Agreement    []byte `json:"agreement"`
	SigningSuite string `json:"signing_suite"`
	Signing      []byte `json:"signing"`
	Device       string `json:"device"`
	ImportKind   string `json:"import_kind"`
	Import       []byte `json:"import"`
	Attestation  []byte `json:"attestation"`
	Root         uint32 `json:"root"`
	Possession   []byte `json:"possession"`
}

func readNextCard(path string) (nextCard, error) {
	var c nextCard
	b, err := os.ReadFile(path)
	if err != nil {
		return c, err
	}
	if err := json.Unmarshal(b, &c); err != nil || c.Format != 1 {
		return c, fmt.Errorf("%s is damaged, or not a card of format 1 as conclaved rekey prepare and conclaved join write it; fetch it again from the node's data directory, or prepare again", path)
	}
	if c.Root == 0 || len(c.Possession) == 0 {
		return c, fmt.Errorf("%s is a card without proof of its key; give next-node.json, which conclaved rekey prepare writes, or the node.json of a new node, which conclaved join writes", path)
	}
	return c, nil
}

// params turns the card into the parameters of a proposal.
func (c nextCard) params(leave bool) (wire.ProposalParameters, error) {
	kem, ok := pqc.ByName(c.Suite)
	if !ok {
		return wire.ProposalParameters{}, fmt.Errorf("the card names the unknown suite %q", c.Suite)
	}
	sig, ok := pqc.ByName(c.SigningSuite)
	if !ok {
		return wire.ProposalParameters{}, fmt.Errorf("the card names the unknown suite %q", c.SigningSuite)
	}
	return wire.ProposalParameters{Node: &wire.NextRoot{
		Change: string(approval.NodeReplaceRoot),
		Root: wire.NodeRoot{Suite: uint16(kem.ID), Agreement: c.Agreement, SigningSuite: uint16(sig.ID), Signing: c.Signing,
			Device: c.Device, ImportKind: c.ImportKind, Import: c.Import, Attestation: c.Attestation},
		Possession: c.Possession, Leave: leave,
	}}, nil
}

func (a *app) nodeRekeyCommand() *cobra.Command {
	var card string
	var leave, wait bool
	var by proposing
	cmd := &cobra.Command{
		Use:   "rekey NODE --card FILE --reason TEXT",
		Short: "Propose that a node gets another HSM or TPM as its hardware root",
		Long: `Propose that a node gets another HSM or TPM as its hardware root.
FILE is next-node.json, which conclaved rekey prepare has written at that node. Once the
quorum of the governance policy has approved, a custodian of the node's own site among
them, the other nodes seal their copies of its keys to the new device, and the node
adopts it. With --wait the command shows the progress until that has happened.`,
		Example: "  conclave node rekey de-1 --card next-node.json --reason 'the old HSM is out of support' --wait",
		Args:    arguments("NODE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if card == "" {
				return usagef("--card is missing: next-node.json, which conclaved rekey prepare has written at the node")
			}
			if err := by.check(); err != nil {
				return err
			}
			c, err := readNextCard(card)
			if err != nil {
				return usageError{err}
			}
			if c.Node != args[0] {
				return usagef("%s is the card of node %s, not of %s", card, c.Node, args[0])
			}
			params, err := c.params(leave)
			if err != nil {
				return usageError{err}
			}
			if !wait {
				return a.propose(cmd, kms.ActionNode, approval.NodeTarget(c.Node), params, by)
			}
			return a.proposeRoot(cmd, params, by, c)
		},
	}
	by.flags(cmd)
	f := cmd.Flags()
	f.StringVar(&card, "card", "", "the next root's card, next-node.json, from this `FILE`")
	f.BoolVar(&leave, "leave", false, "adopt the root although key versions of protection hardware cannot be moved to it; the node cannot use those any more")
	f.BoolVar(&wait, "wait", false, "show the progress until the node has adopted the root")
	return cmd
}

// proposeRoot opens a proposal for a root and waits until the node has adopted it.
func (a *app) proposeRoot(cmd *cobra.Command, params wire.ProposalParameters, by proposing, c nextCard) error {
	req := by.request(kms.ActionNode, approval.NodeTarget(c.Node), params)
	return a.asOperator(cmd, func(ctx context.Context, cl *client.Client) error {
		p, err := cl.OpenProposal(ctx, req)
		if err != nil {
			return err
		}
		fmt.Fprintf(cmd.ErrOrStderr(), "proposal %s; custodians approve with: conclave proposal approve %s --custodian-key FILE\n", p.ID, p.ID)
		n, err := awaitRoot(ctx, cl, p.ID, c, cmd.ErrOrStderr())
		if err != nil {
			return err
		}
		return a.show(cmd, n, func(w io.Writer) { nodeDetail(w, n) })
	})
}

func opened(w io.Writer, p wire.Proposal) {
	proposalTable(w, []wire.Proposal{p})
	row(w)
	row(w, "Custodians approve with: conclave proposal approve "+p.ID+" --custodian-key FILE")
}

// pollEvery is between looks at a node that is waited for.
const pollEvery = time.Second

// awaitRoot waits until a node has adopted the root of the card, and tells about it.
func awaitRoot(ctx context.Context, cl *client.Client, proposal string, c nextCard, out io.Writer) (wire.Node, error) {
	said := ""
	for {
		n, what, err := rootProgress(ctx, cl, proposal, c)
		switch {
		case err == nil && what == "":
			return n, nil
		case ctx.Err() != nil:
			return n, kms.Errorf(kms.Unavailable, "the replacement goes on without this command; look at it with: conclave node show %s", c.Node)
		case kms.KindOf(err) == kms.Unavailable || kms.KindOf(err) == kms.Stale:
			what = "the cluster does not answer; asking again"
		case err != nil:
			return n, err
		}
		if what != said {
			fmt.Fprintln(out, visible(what))
			said = what
		}
		select {
		case <-ctx.Done():
		case <-time.After(pollEvery):
		}
	}
}

// rootProgress says what a node's root waits for; "" when it is adopted.
func rootProgress(ctx context.Context, cl *client.Client, proposal string, c nextCard) (wire.Node, string, error) {
	n, err := findNode(ctx, cl, c.Node)
	if err != nil && kms.KindOf(err) != kms.NotFound { // one that is to join is not there yet
		return n, "", err
	}
	if bytes.Equal(n.Signing, c.Signing) {
		return n, "", nil
	}
	if r := n.Replacing; r != nil && r.Proposal == proposal {
		return n, fmt.Sprintf("root %d: %s", r.Root, replacing(r)), nil
	}
	p, err := cl.Proposal(ctx, proposal)
	if err != nil {
		return n, "", err
	}
	switch p.Progress {
	case "rejected", "void", "expired":
		return n, "", kms.Errorf(kms.Conflict, "proposal %s is %s: %s", proposal, p.Progress, p.Summary)
	case "executed":
		if n.Replacing != nil {
			return n, "", kms.Errorf(kms.Conflict, "another root is to take its place: proposal %s", n.Replacing.Proposal)
		}
		return n, "executed", nil
	}
	return n, "proposal " + p.Progress + "; missing: " + or(strings.Join(p.Missing, ", "), "nothing"), nil
}
