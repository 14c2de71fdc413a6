package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
)

// offlineSigning adds to conclave sign what custodians do without a network:
// conclave sign --offline FILE.
func (a *app) offlineSigning(cmd *cobra.Command) *cobra.Command {
	var file, out string
	var approve, reject, yes bool
	var by signerFlags
	cmd.Use = "sign {KEYRING/KEY VALUE | --offline FILE}"
	cmd.Long += `

With --offline: sign a proposal as a custodian, on a computer without a network. FILE is
what conclave proposal export wrote. The proposal is shown, decoded from the exact bytes that
are signed, and the signed verdict goes into FILE, or --out; take that back to a computer with
a network and give it to conclave proposal submit. Nothing is read but FILE and the key.`
	cmd.Example = "  conclave sign --offline proposal.cbor --approve --custodian-key de-1.key"
	f := cmd.Flags()
	f.StringVar(&file, "offline", "", "`FILE` with an exported proposal to sign, without a network")
	f.BoolVar(&approve, "approve", false, "with --offline: approve")
	f.BoolVar(&reject, "reject", false, "with --offline: reject")
	f.StringVar(&out, "out", "", "with --offline: `FILE` to write, in place of changing the one that was given")
	f.BoolVarP(&yes, "yes", "y", false, "with --offline: do not ask before signing")
	by.flags(cmd)
	online, onlineArgs := cmd.RunE, cmd.Args
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if file == "" {
			return onlineArgs(cmd, args)
		}
		return arguments("")(cmd, args)
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if file == "" {
			for _, name := range append([]string{"approve", "reject", "out", "yes"}, signerFlagNames...) {
				if cmd.Flags().Changed(name) {
					return usagef("--%s goes with --offline FILE", name)
				}
			}
			return online(cmd, args)
		}
		if approve == reject {
			return usagef("give either --approve or --reject")
		}
		if err := by.check(); err != nil {
			return err
		}
		verdict := map[bool]approval.Verdict{true: approval.Approve, false: approval.Reject}[approve]
		return a.signOffline(cmd, file, out, verdict, &by, yes)
	}
	return cmd
}

func (a *app) signOffline(cmd *cobra.Command, file, out string, verdict approval.Verdict, by *signerFlags, yes bool) error {
	c, p, err := readCarried(file)
	if err != nil {
		return err
	}
	if !yes {
		question := map[approval.Verdict]string{approval.Approve: "Approve this?", approval.Reject: "Reject this?"}[verdict]
		if err := a.ask(cmd, func(w io.Writer) { carriedTable(w, c, p, time.Now()) }, question, "nothing was signed"); err != nil {
			return err
		}
	}
	s, err := cast(cmd, by, verdict, c.Proposal, c.Owner)
	if err != nil {
		return err
	}
	c = c.With(s)
	if out == "" {
		out, err = file, replace(file, c.Marshal())
	} else {
		err = create(out, c.Marshal(), 0o644)
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "%s: signed; where there is a network: conclave proposal submit %s\n", out, out)
	return a.showCarried(cmd, c, p)
}

func readCarried(path string) (approval.Carried, approval.Proposal, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return approval.Carried{}, approval.Proposal{}, kms.Wrap(kms.Invalid, err, err.Error(), "")
	}
	c, p, err := approval.ParseCarried(b)
	if err != nil {
		err = kms.Wrap(kms.KindOf(err), err, fmt.Sprintf("%s: %v", path, err), "give a file that conclave proposal export wrote")
	}
	return c, p, err
}

// carriedTable shows an exported proposal: what is signed, and apart from it what the
// file says beside.
func carriedTable(w io.Writer, c approval.Carried, p approval.Proposal, now time.Time) {
	showSigned(w, c.Proposal, p)
	row(w)
	row(w, "not signed", "founded as cluster "+c.Cluster+", says the file")
	if now.UnixMilli() >= p.Expires {
		row(w, "", "EXPIRED by this computer's clock, "+when(now))
	} else if now.UnixMilli() < p.Created {
		row(w, "", "dated IN THE FUTURE by this computer's clock, "+when(now))
	}
	for _, s := range c.Statements {
		row(w, "", fmt.Sprintf("%s of %s with %s, not verified here", s.Verdict, s.Custodian, s.Credential))
	}
}

// carriedInfo is what is printed of an exported proposal in JSON.
type carriedInfo struct {
	Cluster    string               `json:"cluster"`
	Signed     signedContent        `json:"signed"`
	Statements []approval.Statement `json:"statements"`
}

func (a *app) showCarried(cmd *cobra.Command, c approval.Carried, p approval.Proposal) error {
	signed, err := contentOf(c.Proposal)
	if err != nil {
		return err
	}
	return a.show(cmd, carriedInfo{c.Cluster, signed, c.Statements}, func(w io.Writer) { carriedTable(w, c, p, time.Now()) })
}

// signedContent is what custodians sign, decoded here from the exact bytes. conclave
// proposal show prints it, and conclave evidence verify prints the same of what the
// evidence holds.
type signedContent struct {
	ID         string            `json:"id"`
	Bytes      []byte            `json:"bytes"`
	Content    approval.Proposal `json:"content"`
	Parameters any               `json:"parameters"` // those of the action, decoded; null where it has none
}

func contentOf(b []byte) (signedContent, error) {
	p, err := approval.ParseProposal(b)
	if err != nil {
		return signedContent{}, err
	}
	params, err := decoded(p)
	return signedContent{approval.ProposalID(b), b, p, params}, err
}

func (a *app) proposalExportCommand() *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "export ID --out FILE",
		Short: "Write a proposal to a file, for custodians whose computer has no network",
		Long: `Write a proposal to a file: its exact bytes, and the custodians' names and the
fingerprints of their keys. A custodian signs it on a computer without a network with
conclave sign --offline FILE; the file then goes to conclave proposal submit.`,
		Args: arguments("ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if out == "" {
				return usagef("--out is missing: the file to write")
			}
			return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
				if err := a.recognise(ctx, cmd, c); err != nil {
					return err
				}
				w, content, err := fetchProposal(ctx, c, args[0])
				if err != nil {
					return err
				}
				status, err := c.Status(ctx)
				if err != nil {
					return err
				}
				list, err := c.Custodians(ctx)
				if err != nil {
					return err
				}
				file := approval.Carry(status.Cluster, w.Bytes, recordsOf(list))
				if _, _, err := approval.ParseCarried(file.Marshal()); err != nil {
					return err
				}
				if err := create(out, file.Marshal(), 0o644); err != nil {
					return err
				}
				return a.showCarried(cmd, file, content)
			})
		},
	}
	cmd.Flags().StringVar(&out, "out", "", "`FILE` to write")
	return cmd
}

// recordsOf are the custodians' records as a node shows them.
func recordsOf(list []wire.Custodian) []approval.Custodian {
	var all []approval.Custodian
	for _, c := range list {
		all = append(all, custodianFrom(c))
	}
	return all
}

func (a *app) proposalSubmitCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "submit FILE",
		Short: "Bring verdicts that were signed with conclave sign --offline to the cluster",
		Long: `Bring the verdicts in FILE, which conclave sign --offline has signed, to the cluster. It
verifies them as any other: FILE can go by any hands. Anybody who may vote by the
cluster's access policy may bring them. To bring them twice changes nothing.`,
		Args: arguments("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			file, _, err := readCarried(args[0])
			if err != nil {
				return err
			}
			if len(file.Statements) == 0 {
				return kms.Errorf(kms.Invalid, "%s: nobody has signed it yet; see: conclave sign --help", args[0])
			}
			return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
				if err := a.recognise(ctx, cmd, c); err != nil {
					return err
				}
				return a.submit(ctx, cmd, c, file)
			})
		},
	}
}

func (a *app) submit(ctx context.Context, cmd *cobra.Command, c *client.Client, file approval.Carried) error {
	after, _, err := fetchProposal(ctx, c, approval.ProposalID(file.Proposal))
	if err != nil {
		return err
	}
	for _, s := range file.Statements {
		v := wire.Statement{Proposal: s.Proposal, Verdict: string(s.Verdict), Custodian: s.Custodian, Credential: s.Credential, Signature: s.Signature}
		if after, err = c.Vote(ctx, s.Proposal, wire.VoteRequest{Statement: v}); err != nil {
			return fmt.Errorf("the verdict of %s: %w", s.Custodian, err)
		}
		if err := a.remember(ctx, cmd, c, v); err != nil {
			fmt.Fprintf(cmd.ErrOrStderr(), "note: the vote is recorded, but not remembered here: %s\n", visible(err.Error()))
		}
	}
	return a.show(cmd, after, func(w io.Writer) { proposalTable(w, []wire.Proposal{after}) })
}
