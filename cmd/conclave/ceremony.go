package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/recovery"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

// The files of a ceremony.
const (
	ceremonyFile       = "ceremony"
	transcriptFile     = "transcript.json"
	contributionSuffix = ".contribution"

	ceremonyPoll = 500 * time.Millisecond // how often run looks for contributions
)

func (a *app) ceremonyCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "ceremony", Short: "Bring keys back, with custodians' shares, to new hardware",
		Long: `A recovery ceremony brings the key-encryption keys of a residency back when every device
of it is gone. First prepare and have approved a new hardware root for a node of it
(conclaved rekey prepare, conclave node rekey). Then somebody trusted with it runs
conclave ceremony run; each custodian runs conclave ceremony contribute, where their key
file is; the files may travel by any way, for shares in them are sealed. When enough have
contributed, run puts the recovery key together in locked memory, seals the keys to the
new roots, hands them to the cluster, writes the signed transcript, and wipes the rest.`}
	cmd.AddCommand(a.ceremonyRunCommand(), a.ceremonyShowCommand(), a.ceremonyContributeCommand(), a.ceremonyVerifyCommand())
	return cmd
}

func (a *app) ceremonyRunCommand() *cobra.Command {
	var dir, reason string
	var number uint64
	var lifetime time.Duration
	var trust bool
	cmd := &cobra.Command{
		Use:   "run NAME --dir DIR --reason TEXT",
		Short: "Coordinate a ceremony for the recovery key NAME, from beginning to end",
		Long: `Coordinate a ceremony for the recovery key NAME. It writes DIR/ceremony for the
custodians and waits until enough of their contributions lie in DIR as ` + "*" + contributionSuffix + ` files.
The ceremony's keys exist in this process alone: when it ends, begin another ceremony.

What the node says of the recovery key and of the next hardware roots is held against the
signatures of the custodians who approved them. Read the ceremony's identifier, which
ceremony show prints, to the custodians: whoever else sends them a document wants their shares.`,
		Args: arguments("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if dir == "" || reason == "" {
				return usagef("--dir and --reason are needed: where the files go, and why; custodians sign it")
			}
			if err := os.MkdirAll(dir, 0o700); err != nil {
				return err
			}
			return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
				o, k, err := occasion(ctx, c, args[0], number, trust)
				if err != nil {
					return err
				}
				o.Reason, o.Created, o.Lifetime = reason, time.Now(), lifetime
				co, err := recovery.Begin(o)
				if err != nil {
					return err
				}
				defer co.Destroy()
				if err := create(filepath.Join(dir, ceremonyFile), co.Document(), 0o644); err != nil {
					return err
				}
				fmt.Fprintf(cmd.ErrOrStderr(), "ceremony %s written to %s; waiting for contributions: %d shares from at least %d sites\n"+
					"each custodian, with that file, when you have read the identifier to them: conclave ceremony contribute ceremony --custodian ID --custodian-key FILE --out ID%s\n",
					approval.ProposalID(co.Document()), filepath.Join(dir, ceremonyFile), k.Threshold, k.Sites, contributionSuffix)
				return a.coordinate(cmd, c, co, dir, k, o.Created.Add(lifetime))
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&dir, "dir", "", "`DIR` for the files of the ceremony")
	f.StringVar(&reason, "reason", "", "`TEXT`: why; part of what custodians sign")
	f.Uint64Var(&number, "number", 0, "`N` of the recovery key (default: the one in use)")
	f.DurationVar(&lifetime, "lifetime", 24*time.Hour, "give up after this time, 7 days at most")
	trustNode(f, &trust)
	return cmd
}

// occasion asks the cluster what a ceremony would be about, and verifies that custodians
// have approved it unless the node is trusted.
func occasion(ctx context.Context, c *client.Client, name string, number uint64, trust bool) (recovery.Occasion, wire.RecoveryKey, error) {
	st, err := c.Status(ctx)
	if err != nil {
		return recovery.Occasion{}, wire.RecoveryKey{}, err
	}
	k, p, err := recoveryKey(ctx, c, name, number)
	if err != nil {
		return recovery.Occasion{}, k, err
	}
	if len(k.Roots) == 0 {
		return recovery.Occasion{}, k, &kms.Error{Kind: kms.Conflict, Msg: "no node at " + strings.Join(k.Residency, ", ") + " is to have a new hardware root, so there is nothing to bring the keys back to",
			Fix: "prepare one (conclaved rekey prepare) and have it approved (conclave node rekey), then begin the ceremony"}
	}
	if len(k.KEKs) == 0 {
		return recovery.Occasion{}, k, kms.Errorf(kms.NotFound, "nothing was ever sealed to recovery key %s number %d", k.Name, k.Number)
	}
	if !trust {
		if err := approvedByCustodians(ctx, c.Evidence, st.Cluster, k, p); err != nil {
			return recovery.Occasion{}, k, err
		}
	}
	o := recovery.Occasion{Cluster: st.Cluster, Name: k.Name, Number: k.Number, Params: p}
	for _, r := range k.Roots {
		o.Roots = append(o.Roots, recovery.Root{Number: r.Root, Recipient: keyring.Recipient{Node: r.Node, Suite: r.Suite, PublicKey: r.Agreement}})
	}
	return o, k, nil
}

// coordinate waits for contributions, restores, and writes the transcript.
func (a *app) coordinate(cmd *cobra.Command, c *client.Client, co *recovery.Coordinator, dir string, k wire.RecoveryKey, until time.Time) error {
	seen := map[string]bool{}
	tick := time.NewTicker(ceremonyPoll)
	defer tick.Stop()
	for co.Missing() != "" {
		if time.Now().After(until) {
			return kms.Errorf(kms.Expired, "the ceremony has expired with %s; begin another one", co.Missing())
		}
		paths, err := filepath.Glob(filepath.Join(dir, "*"+contributionSuffix))
		if err != nil {
			return err
		}
		for _, path := range paths {
			if seen[path] {
				continue
			}
			seen[path] = true
			if who, err := addContribution(cmd.Context(), c, co, path); err != nil { // another one may be good
				fmt.Fprintf(cmd.ErrOrStderr(), "not taken: %s: %s\n", path, visible(err.Error()))
			} else {
				fmt.Fprintf(cmd.ErrOrStderr(), "custodian %s has contributed: %s\n", who, or(co.Missing(), "that is enough"))
			}
		}
		if co.Missing() == "" {
			break
		}
		select {
		case <-cmd.Context().Done():
			return cmd.Context().Err()
		case <-tick.C:
		}
	}
	return a.finish(cmd, c, co, dir, k)
}

func addContribution(ctx context.Context, c *client.Client, co *recovery.Coordinator, path string) (string, error) {
	x, err := readJSON[approval.Contribution](path, "contribution that conclave ceremony contribute writes")
	if err != nil {
		return "", err
	}
	who, err := custodianRecord(ctx, c, x.Custodian)
	if err != nil {
		return "", err
	}
	return who.ID, co.Add(x, who)
}

func (a *app) finish(cmd *cobra.Command, c *client.Client, co *recovery.Coordinator, dir string, k wire.RecoveryKey) error {
	var lost []recovery.Lost
	for _, x := range k.KEKs {
		l := recovery.Lost{Keyring: x.Keyring, Version: x.Version, Checks: map[string][]byte{}}
		for _, s := range x.Copies {
			l.Copies = append(l.Copies, s.Sealed)
		}
		for _, s := range x.Checks {
			l.Checks[s.Node] = s.Hash
		}
		lost = append(lost, l)
	}
	restored, err := co.Restore(lost)
	if err != nil {
		return err
	}
	t, err := co.Transcript(restored)
	if err != nil {
		return err
	}
	co.Destroy()
	b, err := json.MarshalIndent(t, "", "  ")
	if err != nil {
		return err
	}
	path := filepath.Join(dir, transcriptFile)
	if err := create(path, append(b, '\n'), 0o644); err != nil {
		return err
	}
	req := wire.RestoreRequest{Ceremony: t.Ceremony}
	for _, x := range t.Contributions {
		s := x.Consent()
		req.Consents = append(req.Consents, wire.Consent{Custodian: s.Custodian, Credential: s.Credential, Share: s.Share, Signature: s.Signature})
	}
	for _, x := range restored {
		req.Restored = append(req.Restored, wire.Restored{Node: x.Node, Root: x.Root, Keyring: x.Keyring, Version: x.Version, Sealed: x.Sealed, Signature: x.Signature})
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
	defer cancel()
	r, err := c.Restore(ctx, req)
	if err != nil {
		return err
	}
	v := struct {
		Transcript string `json:"transcript"`
		Restored   int    `json:"restored"`
		Taken      int    `json:"taken"`
	}{path, len(restored), r.Taken}
	return a.show(cmd, v, func(w io.Writer) {
		row(w, "brought back", fmt.Sprintf("%d copies of key-encryption keys, of which the cluster took %d", v.Restored, v.Taken))
		row(w, "transcript", path)
		row(w, "next", "the nodes adopt their new hardware roots by themselves when they run with the new devices")
	})
}

func readCeremony(path string) ([]byte, approval.Ceremony, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, approval.Ceremony{}, usageError{err}
	}
	doc, err := approval.ParseCeremony(b)
	if err != nil {
		err = usageError{fmt.Errorf("%s is damaged, or no ceremony that conclave ceremony run writes: %w", path, err)}
	}
	return b, doc, err
}

func showCeremony(w io.Writer, b []byte, doc approval.Ceremony) {
	row(w, "ceremony", doc.ID())
	row(w, "cluster", doc.Cluster)
	row(w, "recovery key", fmt.Sprintf("%s, number %d", doc.Recovery, doc.Number))
	row(w, "reason", fmt.Sprintf("%q", doc.Reason))
	row(w, "created", when(time.UnixMilli(doc.Created)))
	row(w, "expires", when(time.UnixMilli(doc.Expires)))
	row(w, "shares go to", pqc.Fingerprint(doc.KEM))
	row(w, "signed by", pqc.Fingerprint(doc.Signing))
	for _, r := range doc.Recipients {
		row(w, "keys go to", fmt.Sprintf("node %s, hardware root number %d, agreement key SHA-256 %x", r.Node, r.Root, r.Agreement))
	}
	row(w, "signed bytes", fmt.Sprintf("%d bytes, SHA-256 %x", len(b), sha256.Sum256(b)))
}

func (a *app) ceremonyShowCommand() *cobra.Command {
	return &cobra.Command{
		Use: "show FILE", Short: "Show what a ceremony is for, from its own bytes", Args: arguments("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			b, doc, err := readCeremony(args[0])
			if err != nil {
				return err
			}
			return a.show(cmd, doc, func(w io.Writer) { showCeremony(w, b, doc) })
		},
	}
}

func (a *app) ceremonyContributeCommand() *cobra.Command {
	var by custodianKey
	var out string
	var trust, yes bool
	cmd := &cobra.Command{
		Use:   "contribute FILE --custodian ID --custodian-key FILE --out FILE",
		Short: "Give your share to a ceremony",
		Long: `Give your share to the ceremony whose document FILE is. The command first holds it
against the cluster: the roots that are to get the keys must be those that custodians
have approved, by their signatures. It shows the document and asks; then it opens your share
with your key file, seals it to the ceremony's key, and signs that with the document.

Who holds the ceremony's key gets the shares: compare its identifier with the one that
the coordinator reads to you, by another way than the one on which FILE came.`,
		Args: arguments("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if out == "" {
				return usagef("--out is missing: the contribution to write, a file *%s in the coordinator's directory", contributionSuffix)
			}
			b, doc, err := readCeremony(args[0])
			if err != nil {
				return err
			}
			key, err := by.open(cmd)
			if err != nil {
				return err
			}
			defer key.Destroy()
			return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
				o, k, err := occasion(ctx, c, doc.Recovery, doc.Number, trust)
				if err != nil {
					return err
				}
				if err := approvedRoots(doc, o, k); err != nil {
					return err
				}
				if !yes {
					question := "Does the coordinator read the same ceremony to you, and do you give your share to it?"
					if err := a.ask(cmd, func(w io.Writer) { showCeremony(w, b, doc) }, question, "no share was given"); err != nil {
						return err
					}
				}
				x, err := recovery.Contribute(b, o.Params, by.custodian, key, time.Now())
				if err != nil {
					return err
				}
				j, err := json.Marshal(x)
				if err != nil {
					return err
				}
				if err := createWhole(out, append(j, '\n')); err != nil {
					return err
				}
				v := struct {
					File      string `json:"file"`
					Ceremony  string `json:"ceremony"`
					Custodian string `json:"custodian"`
				}{out, doc.ID(), by.custodian}
				return a.show(cmd, v, func(w io.Writer) {
					row(w, "contribution", out+", of custodian "+by.custodian+" to ceremony "+doc.ID())
					row(w, "next", "put it beside the coordinator's ceremony file; the share in it is sealed")
				})
			})
		},
	}
	cmd.Flags().StringVar(&out, "out", "", "`FILE` to write, DIR/ID"+contributionSuffix)
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask before the share is given")
	trustNode(cmd.Flags(), &trust)
	by.flags(cmd)
	return cmd
}

// createWhole writes a file that must not exist yet so that nobody sees half of it.
func createWhole(path string, b []byte) error {
	tmp := path + ".part"
	if err := create(tmp, b, 0o644); err != nil {
		return err
	}
	err := os.Link(tmp, path)
	if errors.Is(err, os.ErrExist) {
		err = exists(path, err)
	}
	return errors.Join(err, os.Remove(tmp))
}

// approvedRoots refuses a ceremony for other hardware than the cluster's custodians have
// approved.
func approvedRoots(doc approval.Ceremony, o recovery.Occasion, k wire.RecoveryKey) error {
	if doc.Cluster != o.Cluster {
		return kms.Errorf(kms.Denied, "the ceremony is of another cluster")
	}
	for _, r := range doc.Recipients {
		ok := false
		for _, x := range k.Roots {
			sum := sha256.Sum256(x.Agreement)
			ok = ok || x.Node == r.Node && x.Root == r.Root && bytes.Equal(sum[:], r.Agreement)
		}
		if !ok {
			return &kms.Error{Kind: kms.Denied, Msg: fmt.Sprintf("the ceremony would give the keys to hardware root number %d of node %s, which the custodians have not approved in this form", r.Root, r.Node),
				Fix: "give nothing to it, and ask who made it"}
		}
	}
	return nil
}
