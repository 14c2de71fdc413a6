package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/recovery"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

func (a *app) recoveryCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "recovery", Short: "Recovery keys: for the day on which every device of a residency is gone"}
	cmd.AddCommand(a.recoveryCardCommand(), a.recoveryCreateCommand(), a.recoveryCheckCommand(), a.recoveryListCommand())
	return cmd
}

// custodianKey are the flags of a command that a custodian runs with their key.
type custodianKey struct{ custodian, key, pass string }

func (k *custodianKey) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&k.custodian, "custodian", "", "`ID` of the custodian")
	f.StringVar(&k.key, "custodian-key", "", "the custodian's key `FILE`, from conclave custodian keygen")
	f.StringVar(&k.pass, "pass-file", "", "`FILE` with the passphrase (default: ask)")
}

func (k *custodianKey) open(cmd *cobra.Command) (*pqc.HybridKey, error) {
	if k.custodian == "" || k.key == "" {
		return nil, usagef("--custodian and --custodian-key are needed: who you are, and your key file. A custodian whose key is on a token alone has no key to which a share could be sealed: make a key file too (conclave custodian keygen) and have it enrolled")
	}
	key, _, err := openKeyFile(cmd, k.key, k.pass)
	return key, err
}

func (a *app) recoveryCardCommand() *cobra.Command {
	var by custodianKey
	var out string
	cmd := &cobra.Command{
		Use:   "card --custodian ID --custodian-key FILE --out FILE",
		Short: "Make a custodian's card: the key to which a share can be sealed",
		Long: `Make a custodian's card for whoever creates a recovery key. It holds the public half of
the KEM key that goes with the custodian's key file (every key file has one, also one
made by an older release), signed by the custodian for this cluster. Nothing in it is
secret.`,
		Args: arguments(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if out == "" {
				return usagef("--out is missing: the card to write")
			}
			key, err := by.open(cmd)
			if err != nil {
				return err
			}
			defer key.Destroy()
			return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
				st, err := c.Status(ctx)
				if err != nil {
					return err
				}
				who, err := custodianRecord(ctx, c, by.custodian)
				if err != nil {
					return err
				}
				card, err := recovery.NewCard(st.Cluster, who.ID, who.Site, key)
				if err != nil {
					return err
				}
				if err := card.VerifyCard(st.Cluster, who); err != nil {
					return kms.Wrap(kms.KindOf(err), err, "the key file is not one that the cluster knows of custodian "+who.ID, "have it enrolled first")
				}
				b, err := json.MarshalIndent(card, "", "  ")
				if err != nil {
					return err
				}
				if err := create(out, append(b, '\n'), 0o644); err != nil {
					return err
				}
				v := struct {
					File      string `json:"file"`
					Custodian string `json:"custodian"`
				}{out, who.ID}
				return a.show(cmd, v, func(w io.Writer) {
					row(w, "card", out+", of custodian "+who.ID)
					row(w, "next", "give it to whoever runs conclave recovery create; nothing in it is secret")
				})
			})
		},
	}
	cmd.Flags().StringVar(&out, "out", "", "`FILE` to write")
	by.flags(cmd)
	return cmd
}

// custodianRecord returns a custodian as the cluster knows them.
func custodianRecord(ctx context.Context, c *client.Client, id string) (approval.Custodian, error) {
	all, err := c.Custodians(ctx)
	if err != nil {
		return approval.Custodian{}, err
	}
	for _, x := range all {
		if x.ID == id {
			return custodianFrom(x), nil
		}
	}
	return approval.Custodian{}, kms.Errorf(kms.NotFound, "there is no custodian %q", id)
}

func custodianFrom(x wire.Custodian) approval.Custodian {
	out := approval.Custodian{ID: x.ID, Site: x.Site, Revoked: x.Revoked, Revision: x.Revision}
	for _, k := range x.Credentials {
		out.Credentials = append(out.Credentials, approval.Credential{ID: k.ID, Suite: k.Suite, PublicKey: k.PublicKey, Suspended: k.Suspended})
	}
	return out
}

func (a *app) recoveryCreateCommand() *cobra.Command {
	var residency, cards []string
	var threshold, sites int
	var by proposing
	cmd := &cobra.Command{
		Use:   "create NAME --residency SITES --threshold M --sites S --card FILE... --reason TEXT",
		Short: "Make a recovery key for a residency, split it among custodians, and propose it",
		Long: `Make a recovery key for all keyrings of protection software that are resident at
exactly these sites. Its secret half is split among the custodians whose cards are given:
any M of them from at least S sites can put it together, and fewer of either know nothing
of it. Each share is sealed to its custodian; nothing else of the secret half is kept.
Run it on a machine that all concerned trust, for it holds the secret for a moment.

The proposal needs the quorum of the governance policy and a custodian of every site of
the residency. After that the resident nodes seal every key-encryption key to the
recovery key, also those that come later. Keys of protection hardware cannot be
recovered: they never leave their devices.

Each custodian should see that their share opens: conclave recovery check.`,
		Example: "  conclave recovery create paris --residency fr --threshold 3 --sites 2 --card fr-1.card --card fr-2.card --card de-1.card --reason 'for a fire'",
		Args:    arguments("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := by.check(); err != nil {
				return err
			}
			if len(residency) == 0 || len(cards) == 0 {
				return usagef("--residency and --card are needed: the sites whose keys it is for, and the custodians' cards")
			}
			var holders []approval.RecoveryHolder
			for _, path := range cards {
				h, err := readJSON[approval.RecoveryHolder](path, "card that conclave recovery card writes")
				if err != nil {
					return usageError{err}
				}
				for _, other := range holders {
					if other.Custodian == h.Custodian {
						return usagef("%s is a second card of custodian %s", path, h.Custodian)
					}
				}
				holders = append(holders, h)
			}
			p, err := recovery.Deal(residency, pqc.CustodianKEM, threshold, sites, holders)
			if kms.KindOf(err) == kms.Invalid {
				return usageError{err}
			}
			if err != nil {
				return err
			}
			return a.propose(cmd, kms.ActionRecoveryKey, approval.RecoveryTarget(args[0]), wire.ProposalParameters{Recovery: p.Marshal()}, by)
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&residency, "residency", nil, "`SITES` of the keyrings, separated by commas")
	f.StringArrayVar(&cards, "card", nil, "`FILE` from conclave recovery card; one for each custodian")
	f.IntVar(&threshold, "threshold", 0, "shares that it takes, `M`")
	f.IntVar(&sites, "sites", 2, "sites among them that it takes, `S`, at least 2")
	by.flags(cmd)
	return cmd
}

// readJSON reads a file; what says what it must be.
func readJSON[T any](path, what string) (v T, err error) {
	f, err := os.Open(path)
	if err != nil {
		return v, err
	}
	defer f.Close()
	d := json.NewDecoder(io.LimitReader(f, 4<<20))
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil {
		return v, fmt.Errorf("%s is damaged, or no %s: %w", path, what, err)
	}
	return v, nil
}

// recoveryKey returns the recovery key of that name: of that number, or where it is 0
// the one in use.
func recoveryKey(ctx context.Context, c *client.Client, name string, number uint64) (wire.RecoveryKey, approval.RecoveryParams, error) {
	all, err := c.RecoveryKeys(ctx)
	if err != nil {
		return wire.RecoveryKey{}, approval.RecoveryParams{}, err
	}
	var found *wire.RecoveryKey
	for i, k := range all {
		if k.Name == name && (k.Number == number || number == 0) {
			found = &all[i] // they are sorted by number
		}
	}
	if found == nil {
		return wire.RecoveryKey{}, approval.RecoveryParams{}, &kms.Error{Kind: kms.NotFound, Msg: fmt.Sprintf("there is no such recovery key %q", name), Fix: "see: conclave recovery list"}
	}
	p, err := approval.ParseRecoveryParams(found.Params)
	return *found, p, err
}

func (a *app) recoveryCheckCommand() *cobra.Command {
	var by custodianKey
	cmd := &cobra.Command{
		Use:   "check NAME --custodian ID --custodian-key FILE",
		Short: "See that your share of a recovery key opens and is the one committed to",
		Args:  arguments("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			key, err := by.open(cmd)
			if err != nil {
				return err
			}
			defer key.Destroy()
			return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
				k, p, err := recoveryKey(ctx, c, args[0], 0)
				if err != nil {
					return err
				}
				share, err := recovery.OpenShare(p, by.custodian, key)
				if err != nil {
					return err
				}
				share.Destroy()
				v := struct {
					Recovery  string `json:"recovery"`
					Number    uint64 `json:"number"`
					Custodian string `json:"custodian"`
				}{k.Name, k.Number, by.custodian}
				return a.show(cmd, v, func(w io.Writer) {
					row(w, fmt.Sprintf("The share of custodian %s of recovery key %s number %d opens and is the one committed to.", by.custodian, k.Name, k.Number))
				})
			})
		},
	}
	by.flags(cmd)
	return cmd
}

func (a *app) recoveryListCommand() *cobra.Command {
	return look(a, &cobra.Command{Use: "list", Short: "List the recovery keys, their holders and what they open"},
		func(ctx context.Context, c *client.Client, _ []string) ([]wire.RecoveryKey, error) {
			return c.RecoveryKeys(ctx)
		},
		func(w io.Writer, list []wire.RecoveryKey) {
			row(w, "NAME", "NUMBER", "RESIDENCY", "TAKES", "HOLDERS", "OPENS")
			for _, k := range list {
				var holders, opens []string
				for _, h := range k.Holders {
					holders = append(holders, h.Custodian)
				}
				for _, x := range k.KEKs {
					var sites []string
					for _, c := range x.Copies {
						sites = append(sites, c.Site)
					}
					opens = append(opens, fmt.Sprintf("%s/%d (by %s)", x.Keyring, x.Version, strings.Join(sites, ",")))
				}
				row(w, k.Name, k.Number, strings.Join(k.Residency, ","), fmt.Sprintf("%d from %d sites", k.Threshold, k.Sites),
					strings.Join(holders, ","), or(strings.Join(opens, ", "), "nothing yet"))
			}
		})
}

// recoveryParameters are those of a recovery key, keys as fingerprints.
func recoveryParameters(p approval.Proposal) (any, error) {
	r, err := p.RecoveryParams()
	if err != nil {
		return nil, err
	}
	type holder struct {
		Custodian string `json:"custodian"`
		Site      string `json:"site"`
		KEM       string `json:"kem"`
	}
	v := struct {
		Opens     []string `json:"opens_all_keyrings_resident_at"`
		Key       string   `json:"key"`
		Suite     string   `json:"suite"`
		Threshold uint32   `json:"shares_needed"`
		Sites     uint32   `json:"sites_needed"`
		Holders   []holder `json:"holders"`
	}{Opens: r.Residency, Key: pqc.Fingerprint(r.PublicKey), Suite: pqc.SuiteID(r.Suite).String(), Threshold: r.Threshold, Sites: r.Sites}
	for _, h := range r.Holders {
		v.Holders = append(v.Holders, holder{h.Custodian, h.Site, pqc.Fingerprint(h.KEM)})
	}
	return v, nil
}
