package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

func (a *app) custodianCardCommand() *cobra.Command {
	var id, cluster, out string
	var by signerFlags
	cmd := &cobra.Command{
		Use:   "card --custodian ID --cluster ID {--custodian-key FILE | --credential URI} --out FILE",
		Short: "Write a card by which a key is enrolled: the public key, and the proof that its holder has it",
		Long: `Write a card for conclave custodian add or add-key: the public key, signed by itself for
this custodian and this cluster. It needs no network and holds no secret.`,
		Args: arguments(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if id == "" || cluster == "" || out == "" {
				return usagef("--custodian, --cluster and --out are needed: the custodian's name, the cluster's identity (conclave status), and the file to write")
			}
			if err := by.check(); err != nil {
				return err
			}
			if err := kms.CheckName("custodian", id); err != nil {
				return usageError{err}
			}
			key, err := by.open(cmd)
			if err != nil {
				return err
			}
			defer key.Close()
			c := approval.Card{Format: 1, Cluster: cluster, Custodian: id, Suite: uint16(key.Suite()), PublicKey: key.PublicKey()}
			if c.Signature, err = key.Sign(cmd.Context(), approval.CredentialCard(cluster, id, c.Credential()), approval.CredentialContext); err != nil {
				return err
			}
			if _, err := approval.ParseCard(c.Marshal()); err != nil {
				return err
			}
			if err := create(out, c.Marshal(), 0o644); err != nil {
				return err
			}
			v := struct {
				File        string `json:"file"`
				Custodian   string `json:"custodian"`
				Cluster     string `json:"cluster"`
				Fingerprint string `json:"fingerprint"`
			}{out, id, cluster, c.Credential().ID}
			return a.show(cmd, v, func(w io.Writer) {
				row(w, "card", v.File)
				row(w, "custodian", v.Custodian)
				row(w, "cluster", v.Cluster)
				row(w, "fingerprint", v.Fingerprint)
			})
		},
	}
	by.flags(cmd)
	f := cmd.Flags()
	f.StringVar(&id, "custodian", "", "`ID` of the custodian")
	f.StringVar(&cluster, "cluster", "", "`ID` of the cluster, 32 hexadecimal digits")
	f.StringVar(&out, "out", "", "card `FILE` to write")
	return cmd
}

// readKey reads a card, or a bare public key, that is to be enrolled.
func readKey(path, custodian string) (wire.Credential, *wire.Possession, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return wire.Credential{}, nil, err
	}
	if k, err := parsePublic(b); err == nil {
		return k, nil, nil
	}
	c, err := approval.ParseCard(b)
	if err != nil {
		return wire.Credential{}, nil, fmt.Errorf("%s is neither a card (conclave custodian card) nor a public key: %w", path, err)
	}
	if c.Custodian != custodian {
		return wire.Credential{}, nil, fmt.Errorf("%s is a card of custodian %s, not of %s", path, c.Custodian, custodian)
	}
	k := c.Credential()
	return wire.Credential{ID: k.ID, Suite: k.Suite, PublicKey: k.PublicKey}, &wire.Possession{Credential: k.ID, Signature: c.Signature}, nil
}

// readPublic reads a public key file.
func readPublic(path string) (wire.Credential, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return wire.Credential{}, err
	}
	k, err := parsePublic(b)
	if err != nil {
		err = fmt.Errorf("%s: %w", path, err)
	}
	return k, err
}

func parsePublic(b []byte) (wire.Credential, error) {
	suite, pub, err := pqc.ParsePublic(b)
	return wire.Credential{ID: pqc.Fingerprint(pub), Suite: uint16(suite), PublicKey: pub}, err
}

// withKeys adds the keys of files to the custodian's in the parameters.
func withKeys(p *wire.ProposalParameters, files []string) error {
	for _, path := range files {
		k, proof, err := readKey(path, p.Custodian.ID)
		if err != nil {
			return usageError{err}
		}
		if slices.ContainsFunc(p.Custodian.Credentials, func(o wire.Credential) bool { return o.ID == k.ID }) {
			return usagef("%s: custodian %s has that key already", path, p.Custodian.ID)
		}
		p.Custodian.Credentials = append(p.Custodian.Credentials, k)
		if proof != nil {
			p.Possession = append(p.Possession, *proof)
		}
	}
	slices.SortFunc(p.Custodian.Credentials, func(x, y wire.Credential) int { return strings.Compare(x.ID, y.ID) })
	return nil
}

// custodianAddCommand proposes a custodian, or other keys for one.
func (a *app) custodianAddCommand() *cobra.Command {
	var site string
	var keys []string
	var by proposing
	cmd := &cobra.Command{
		Use:   "add ID --site SITE --key FILE... --reason TEXT",
		Short: "Propose that a custodian is enrolled, or gets other keys",
		Long: `Propose that a custodian of a site is enrolled with keys. FILE is a card that conclave
custodian card has written, which proves that the custodian has the key; a bare public
key is taken only while some node's release does not know such proofs. For a custodian
who is there already these keys take the place of all that were; see add-key and
remove-key. The first custodians of a new site come so too.`,
		Args: arguments("ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if site == "" || len(keys) == 0 {
				return usagef("--site and --key are needed: whose custodian it is, and the card from conclave custodian card")
			}
			if err := by.check(); err != nil {
				return err
			}
			p := wire.ProposalParameters{Custodian: &wire.Custodian{ID: args[0], Site: site}}
			if err := withKeys(&p, keys); err != nil {
				return err
			}
			return a.propose(cmd, kms.ActionCustodian, approval.CustodianTarget(args[0]), p, by)
		},
	}
	cmd.Flags().StringVar(&site, "site", "", "the custodian's `SITE`")
	cmd.Flags().StringArrayVar(&keys, "key", nil, "card or public key `FILE`; may be repeated")
	by.flags(cmd)
	return cmd
}

// changeOf is a command that proposes another record of a custodian, made from the one
// that the cluster shows.
func (a *app) changeOf(use, short, long string, flags func(*cobra.Command), change func(p *wire.ProposalParameters) error) *cobra.Command {
	var by proposing
	cmd := &cobra.Command{
		Use: use, Short: short, Long: long, Args: arguments("ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := by.check(); err != nil {
				return err
			}
			var p wire.ProposalParameters
			err := a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
				record, err := shownCustodian(ctx, c, args[0])
				if err == nil {
					p.Custodian = &wire.Custodian{ID: record.ID, Site: record.Site, Credentials: record.Credentials, Revoked: record.Revoked}
					err = change(&p)
				}
				return err
			})
			if err != nil {
				return err
			}
			return a.propose(cmd, kms.ActionCustodian, approval.CustodianTarget(args[0]), p, by)
		},
	}
	flags(cmd)
	by.flags(cmd)
	return cmd
}

func shownCustodian(ctx context.Context, c *client.Client, id string) (wire.Custodian, error) {
	all, err := c.Custodians(ctx)
	if err != nil {
		return wire.Custodian{}, err
	}
	for _, x := range all {
		if x.ID == id {
			return x, nil
		}
	}
	return wire.Custodian{}, &kms.Error{Kind: kms.NotFound, Msg: fmt.Sprintf("there is no custodian %q", id), Fix: "see: conclave custodian list"}
}

func (a *app) custodianAddKeyCommand() *cobra.Command {
	var keys []string
	return a.changeOf("add-key ID --key CARD... --reason TEXT", "Propose that a custodian gets one more key",
		"Propose that a custodian gets one more key, and keeps those that are there. CARD is what\nconclave custodian card has written.",
		func(cmd *cobra.Command) {
			cmd.Flags().StringArrayVar(&keys, "key", nil, "card `FILE`; may be repeated")
		},
		func(p *wire.ProposalParameters) error {
			if len(keys) == 0 {
				return usagef("--key is missing: the card from conclave custodian card")
			}
			return withKeys(p, keys)
		})
}

func (a *app) custodianRemoveKeyCommand() *cobra.Command {
	var key string
	return a.changeOf("remove-key ID --key FINGERPRINT --reason TEXT", "Propose that a custodian loses one key",
		"Propose that a custodian loses one key for good, and keeps the others.",
		func(cmd *cobra.Command) {
			cmd.Flags().StringVar(&key, "key", "", "`FINGERPRINT` of the key; see: conclave custodian list")
		},
		func(p *wire.ProposalParameters) error {
			n := len(p.Custodian.Credentials)
			p.Custodian.Credentials = slices.DeleteFunc(p.Custodian.Credentials, func(k wire.Credential) bool { return k.ID == key })
			switch {
			case len(p.Custodian.Credentials) == n:
				return usagef("custodian %s has no key %q; see: conclave custodian list", p.Custodian.ID, key)
			case n == 1:
				return usagef("it is the only key of custodian %s; give another one first (add-key), or revoke the custodian", p.Custodian.ID)
			}
			return nil
		})
}

func (a *app) custodianRestoreCommand() *cobra.Command {
	return a.changeOf("restore ID --reason TEXT", "Propose that a custodian's suspended keys count again",
		`Propose that all suspended keys of a custodian count again. It takes the quorum of the
governance policy for custodians, and nobody of the custodian's own site: a thief
there may have suspended everybody. To take a stolen key away for good see remove-key
and revoke.`,
		func(*cobra.Command) {},
		func(p *wire.ProposalParameters) error {
			for i, k := range p.Custodian.Credentials {
				if k.Suspended {
					p.Restore = append(p.Restore, k.ID)
				}
				p.Custodian.Credentials[i].Suspended = false
			}
			if len(p.Restore) == 0 {
				return usagef("no key of custodian %s is suspended", p.Custodian.ID)
			}
			return nil
		})
}

// custodianRevokeCommand proposes that a custodian's approvals count no more.
func (a *app) custodianRevokeCommand() *cobra.Command {
	return a.changeOf("revoke ID --reason TEXT", "Propose that a custodian is revoked for good",
		`Propose that a custodian is revoked for good: their approvals count no more, not even
those of open proposals, and the name does not come back.`,
		func(*cobra.Command) {},
		func(p *wire.ProposalParameters) error {
			p.Custodian.Revoked = true
			return nil
		})
}

// custodianSuspendCommand suspends a colleague's credential at once.
func (a *app) custodianSuspendCommand() *cobra.Command {
	var key, reason string
	var by signerFlags
	var yes bool
	cmd := &cobra.Command{
		Use:   "suspend ID --key FINGERPRINT --reason TEXT {--custodian-key FILE | --credential URI}",
		Short: "Suspend a lost key of a custodian of your own site, at once",
		Long: `Suspend a lost key of a custodian, at once and alone: any custodian of the same site can,
with a key of their own. What the key has signed and will sign counts no more, in open
proposals too, until a quorum restores it (conclave custodian restore). It is refused
where without you nobody could restore it.`,
		Args: arguments("ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if key == "" || reason == "" {
				return usagef("--key and --reason are needed: the fingerprint of the lost key (conclave custodian list), and why")
			}
			if err := by.check(); err != nil {
				return err
			}
			return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
				if err := a.recognise(ctx, cmd, c); err != nil {
					return err
				}
				s, err := a.suspension(ctx, cmd, c, args[0], key, reason, &by, yes)
				if err != nil {
					return err
				}
				after, err := c.SuspendCredential(ctx, args[0], wire.SuspendRequest{Statement: wire.Suspension(s)})
				if err != nil {
					return err
				}
				return a.show(cmd, after, func(w io.Writer) { custodianTable(w, []wire.Custodian{after}) })
			})
		},
	}
	by.flags(cmd)
	f := cmd.Flags()
	f.StringVar(&key, "key", "", "`FINGERPRINT` of the lost key")
	f.StringVar(&reason, "reason", "", "`TEXT`: why; it is recorded for good")
	f.BoolVarP(&yes, "yes", "y", false, "do not ask before signing")
	return cmd
}

// suspension shows what is to be suspended, asks, and signs.
func (a *app) suspension(ctx context.Context, cmd *cobra.Command, c *client.Client, id, key, reason string, by *signerFlags, yes bool) (approval.Suspension, error) {
	status, err := c.Status(ctx)
	if err != nil {
		return approval.Suspension{}, err
	}
	list, err := c.Custodians(ctx)
	if err != nil {
		return approval.Suspension{}, err
	}
	i := slices.IndexFunc(list, func(x wire.Custodian) bool { return x.ID == id })
	if i < 0 || !slices.ContainsFunc(list[i].Credentials, func(k wire.Credential) bool { return k.ID == key }) {
		return approval.Suspension{}, &kms.Error{Kind: kms.NotFound, Msg: fmt.Sprintf("there is no custodian %q with the key %s", id, key), Fix: "see: conclave custodian list"}
	}
	s := approval.Suspension{Cluster: status.Lineage, Custodian: id, Credential: key, Revision: list[i].Revision, Reason: reason}
	table := func(w io.Writer) {
		row(w, "to suspend", key)
		row(w, "of custodian", fmt.Sprintf("%s of site %s, revision %d", id, list[i].Site, s.Revision))
		row(w, "in cluster", s.Cluster)
		row(w, "reason", fmt.Sprintf("%q", reason))
	}
	if !yes {
		if err := a.ask(cmd, table, "Suspend this key?", "nothing was signed"); err != nil {
			return s, err
		}
	}
	owner := approval.Carry(status.Cluster, nil, recordsOf(list)).Owner
	_, _, s.Signature, err = signAs(cmd, by, approval.SuspensionContext, owner, func(who, credential string) []byte {
		s.By, s.With = who, credential
		return s.Message()
	})
	return s, err
}
