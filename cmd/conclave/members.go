package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
)

func memberTable(w io.Writer, v wire.Nodes) {
	nodeTable(w, v.Nodes)
	if v.Change != nil {
		row(w)
		row(w, "The change of members about node "+v.Change.Node+" is under way: proposal "+v.Change.Proposal)
	}
	if len(v.Removed) > 0 {
		row(w)
		row(w, "REMOVED", "SITE", "WHEN", "PROPOSAL", "COULD OPEN")
		for _, n := range v.Removed {
			row(w, n.ID, n.Site, when(n.Time), n.Proposal, or(strings.Join(n.Keyrings, ","), "-"))
		}
	}
}

// proposing are the flags of a command that opens a proposal.
type proposing struct {
	reason    string
	expires   time.Duration
	notBefore string
	release   time.Time // notBefore, read by check
}

func (p *proposing) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&p.reason, "reason", "", "`TEXT`: why; part of what custodians sign")
	f.DurationVar(&p.expires, "expires", 0, "give up after this time (default and most: the policy's lifetime)")
	f.StringVar(&p.notBefore, "not-before", "", "`TIME` before which it is not carried out, however early it is approved (RFC 3339, such as 2027-01-31T06:00:00Z)")
}

func (p *proposing) check() error {
	if p.reason == "" {
		return usagef("--reason is missing: custodians sign it with the proposal")
	}
	if p.notBefore == "" {
		return nil
	}
	var err error
	if p.release, err = time.Parse(time.RFC3339, p.notBefore); err != nil {
		return usagef("--not-before %q is no time such as 2027-01-31T06:00:00Z", p.notBefore)
	}
	return nil
}

func (p *proposing) request(action kms.Action, target string, params wire.ProposalParameters) wire.OpenProposalRequest {
	return wire.OpenProposalRequest{Action: string(action), Target: target, Reason: p.reason, Parameters: params, ExpiresInMS: p.expires.Milliseconds(), NotBefore: p.release}
}

// propose opens a proposal and shows it.
func (a *app) propose(cmd *cobra.Command, action kms.Action, target string, params wire.ProposalParameters, by proposing) error {
	req := by.request(action, target, params)
	return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
		p, err := c.OpenProposal(ctx, req)
		if err != nil {
			return err
		}
		return a.show(cmd, p, func(w io.Writer) { opened(w, p) })
	})
}

func (a *app) nodeJoinCommand() *cobra.Command {
	var card string
	var leave, wait bool
	var by proposing
	cmd := &cobra.Command{
		Use:   "join --card FILE --reason TEXT",
		Short: "Propose that a new node joins the cluster",
		Long: `Propose that a new node joins the cluster, as a member that does not vote.
FILE is node.json, which conclaved join has written at that node; it says which node of
which site it is. Once the quorum of the governance policy has approved, a custodian of
that site among them, start the node with conclaved run: it receives the state, the
other nodes seal their copies of its site's keys to its device, and it adopts them.
With --wait the command shows the progress until that has happened. To let it vote
then: conclave node promote.`,
		Example: "  conclave node join --card node.json --reason 'a second node for fr' --wait",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if card == "" {
				return usagef("--card is missing: node.json, which conclaved join has written at the node")
			}
			if err := by.check(); err != nil {
				return err
			}
			c, err := readNextCard(card)
			if err != nil {
				return usageError{err}
			}
			params, err := c.params(leave)
			if err != nil {
				return usageError{err}
			}
			n := params.Node
			n.Change, n.Site, n.Address, n.API = string(approval.NodeJoin), c.Site, c.Address, c.API
			if !wait {
				return a.propose(cmd, kms.ActionNode, approval.NodeTarget(c.Node), params, by)
			}
			return a.proposeRoot(cmd, params, by, c)
		},
	}
	f := cmd.Flags()
	f.StringVar(&card, "card", "", "the new node's card, node.json, from this `FILE`")
	f.BoolVar(&leave, "leave", false, "adopt the root although key versions of protection hardware cannot be moved to its device; the node cannot use those")
	f.BoolVar(&wait, "wait", false, "show the progress until the node has adopted its root")
	by.flags(cmd)
	return cmd
}

func (a *app) nodePromoteCommand() *cobra.Command {
	var by proposing
	cmd := &cobra.Command{
		Use:   "promote NODE --reason TEXT",
		Short: "Propose that a node becomes a voter",
		Long: `Propose that a node becomes a voter. It must have adopted its hardware root and be
running, and no site may get a majority of the voters by it. A custodian of the node's
own site must be among those who approve.`,
		Args: arguments("NODE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := by.check(); err != nil {
				return err
			}
			return a.propose(cmd, kms.ActionNode, approval.NodeTarget(args[0]), wire.ProposalParameters{Node: &wire.NextRoot{Change: string(approval.NodePromote)}}, by)
		},
	}
	by.flags(cmd)
	return cmd
}

func (a *app) nodeRemoveCommand() *cobra.Command {
	var leave bool
	var by proposing
	cmd := &cobra.Command{
		Use:   "remove NODE --reason TEXT",
		Short: "Propose that a node is removed for good",
		Long: `Propose that a node is removed for good: its name and its keys never come back; a
machine that is set up anew joins under another name. The quorum of the governance
policy decides, without the node's own site if need be. What it could open is opened by
the others as before; rotations of those keyrings are proposed, so that what comes
later is not under a key that its device holds.`,
		Args: arguments("NODE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := by.check(); err != nil {
				return err
			}
			return a.propose(cmd, kms.ActionNode, approval.NodeTarget(args[0]), wire.ProposalParameters{Node: &wire.NextRoot{Change: string(approval.NodeRemove), Leave: leave}}, by)
		},
	}
	cmd.Flags().BoolVar(&leave, "leave", false, "also if it is the last node that can open a keyring, whose keys ARE LOST then")
	by.flags(cmd)
	return cmd
}

func (a *app) siteCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "site", Short: "Look at the sites; propose to add or remove one, or to change its CAs"}
	cmd.AddCommand(
		look(a, &cobra.Command{Use: "list", Short: "List the sites"},
			func(ctx context.Context, c *client.Client, _ []string) ([]wire.Site, error) { return c.Sites(ctx) },
			siteTable),
		a.siteChangeCommand(approval.SiteAdd, "add SITE --trust-domain NAME --ca FILE --reason TEXT", "Propose a new site",
			`Propose a new site: a trust domain with the CAs that speak for it. Its first custodians
come by proposals of their own (conclave custodian add), and then its nodes (conclave node join).`),
		a.siteChangeCommand(approval.SiteCAs, "cas SITE --ca FILE --reason TEXT", "Propose another CA bundle for a site",
			`Propose another CA bundle for a site. FILE replaces the whole bundle: keep the old CA in
it until every certificate of the site, those of its nodes among them, is issued by a
new one. A custodian of the site must be among those who approve.`),
		a.siteChangeCommand(approval.SiteRemove, "remove SITE --reason TEXT", "Propose that a site is removed for good",
			`Propose that a site is removed for good. It must have no nodes and no custodians left,
no keyring may be resident there and no policy require it. Its name and its trust domain
never come back.`))
	return cmd
}

func siteTable(w io.Writer, sites []wire.Site) {
	row(w, "SITE", "TRUST DOMAIN", "CAS", "NODES")
	for _, s := range sites {
		row(w, s.ID, s.TrustDomain, len(s.CAs), or(strings.Join(s.Nodes, ","), "-"))
	}
}

func (a *app) siteChangeCommand(change approval.SiteChange, use, short, long string) *cobra.Command {
	var domain, ca string
	var by proposing
	cmd := &cobra.Command{
		Use: use, Short: short, Long: long, Args: arguments("SITE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := by.check(); err != nil {
				return err
			}
			params := approval.SiteParams{Change: change, TrustDomain: domain}
			if change != approval.SiteRemove {
				if ca == "" {
					return usagef("--ca is missing: a PEM file with the certificates of the CAs that may speak for the site")
				}
				var err error
				if params.CAs, err = readPEM(ca); err != nil {
					return usageError{err}
				}
			}
			if err := params.Validate(); err != nil {
				return usageError{err}
			}
			next := &wire.NextSite{Change: string(change), TrustDomain: domain, CAs: params.CAs}
			return a.propose(cmd, kms.ActionSite, approval.SiteTarget(args[0]), wire.ProposalParameters{Site: next}, by)
		},
	}
	if change == approval.SiteAdd {
		cmd.Flags().StringVar(&domain, "trust-domain", "", "SPIFFE trust domain `NAME`, which the site alone speaks for")
	}
	if change != approval.SiteRemove {
		cmd.Flags().StringVar(&ca, "ca", "", "PEM `FILE` with the certificates of the site's CAs")
	}
	by.flags(cmd)
	return cmd
}

// siteParameters are those of a site with the certificates as subjects and
// fingerprints.
func siteParameters(p approval.Proposal) (any, error) {
	s, err := p.SiteParams()
	if err != nil {
		return nil, err
	}
	v := struct {
		Change      approval.SiteChange `json:"change"`
		TrustDomain string              `json:"trust_domain,omitempty"`
		CAs         []string            `json:"cas,omitempty"`
	}{Change: s.Change, TrustDomain: s.TrustDomain}
	for _, der := range s.CAs {
		name, err := certificateName(der)
		if err != nil {
			return nil, err
		}
		v.CAs = append(v.CAs, name)
	}
	return v, nil
}

// nodeWarning says in words what a person must not overlook in a proposal about a node.
func nodeWarning(n approval.NodeParams) string {
	switch {
	case n.Change == approval.NodeRemove && n.Leave:
		return "the node goes for good, and that keys MAY BE LOST that it alone can open"
	case n.Change == approval.NodeRemove:
		return "the node goes for good"
	case n.Change == approval.NodeJoin && n.Leave:
		return fmt.Sprintf("its device will open the keys of SITE %s; the node may go without some keys of protection hardware", n.Site)
	case n.Change == approval.NodeJoin:
		return fmt.Sprintf("its device will open the keys of SITE %s", n.Site)
	case n.Leave:
		return "the node MAY LOSE KEYS of protection hardware"
	}
	return ""
}

func (a *app) nodeListCommand() *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Args: cobra.NoArgs,
		Short: "List the nodes, and those that were removed (-o json: the nodes)",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
				v, err := c.Members(ctx)
				if err != nil {
					return err
				}
				return a.show(cmd, v.Nodes, func(w io.Writer) { memberTable(w, v) })
			})
		},
	}
}
