package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
)

// asOperator runs fn with a client of the administrator's identity.
func (a *app) asOperator(cmd *cobra.Command, fn func(ctx context.Context, c *client.Client) error) error {
	c, err := a.operator()
	if err != nil {
		return err
	}
	defer c.Close()
	return fn(cmd.Context(), c)
}

// look makes cmd a question to a node, asked as the operator.
func look[T any](a *app, cmd *cobra.Command, ask func(ctx context.Context, c *client.Client, args []string) (T, error), table func(io.Writer, T)) *cobra.Command {
	_, names, _ := strings.Cut(cmd.Use, " ")
	cmd.Args = arguments(names)
	if cmd.Name() == "list" {
		cmd.Aliases = []string{"ls"}
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
			v, err := ask(ctx, c, args)
			if err != nil {
				return err
			}
			return a.show(cmd, v, func(w io.Writer) { table(w, v) })
		})
	}
	return cmd
}

func (a *app) keyringCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "keyring", Short: "Create and look at keyrings"}
	cmd.AddCommand(a.keyringCreateCommand(), a.keyringListCommand(), a.keyringShowCommand(), a.keyringRotateCommand())
	return cmd
}

func (a *app) keyringCreateCommand() *cobra.Command {
	var req wire.CreateKeyringRequest
	var stale time.Duration
	cmd := &cobra.Command{
		Use:     "create NAME --residency SITE,SITE... --policy NAME",
		Short:   "Create a keyring that only the nodes of the given sites can open",
		Example: "  conclave keyring create europe --residency fr,de --policy keys\n  conclave keyring create vault --residency fr,de,jp --policy keys --protection hardware",
		Args:    arguments("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(req.Residency) == 0 {
				return usagef("--residency is missing: name the sites that may open the keyring, for example --residency fr,de")
			}
			if req.Policy == "" {
				return usagef("--policy is missing: name the approval policy of the keyring; see: conclave policy list")
			}
			req.Name, req.MaxStalenessMS = args[0], stale.Milliseconds()
			return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
				kr, err := c.CreateKeyring(ctx, req)
				if err != nil {
					return err
				}
				return a.show(cmd, kr, func(w io.Writer) { keyringTable(w, []wire.Keyring{kr}) })
			})
		},
	}
	f := cmd.Flags()
	f.StringSliceVar(&req.Residency, "residency", nil, "`SITES` that may open it, comma-separated")
	f.StringVar(&req.Policy, "policy", "", "`NAME` of the approval policy for its keys")
	f.StringVar(&req.Protection, "protection", "software", "protection `LEVEL`: software (keys in locked memory) or hardware (keys in the devices alone)")
	f.StringVar(&req.Receipts, "receipts", "every-node", "`WHO` must prove that a new version opens before it becomes primary: every-node or every-site")
	_ = cmd.RegisterFlagCompletionFunc("protection", cobra.FixedCompletions([]string{"software", "hardware"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("receipts", cobra.FixedCompletions([]string{"every-node", "every-site"}, cobra.ShellCompDirectiveNoFileComp))
	f.DurationVar(&stale, "max-staleness", 30*time.Second, "how long a cut-off node goes on serving it")
	f.BoolVar(&req.Survive, "survive", false, "a node cut off for longer still decrypts and verifies, until it restarts")
	return cmd
}

func (a *app) keyringListCommand() *cobra.Command {
	return look(a, &cobra.Command{Use: "list", Short: "List the keyrings"},
		func(ctx context.Context, c *client.Client, _ []string) ([]wire.Keyring, error) {
			return c.Keyrings(ctx)
		},
		keyringTable)
}

func (a *app) keyringShowCommand() *cobra.Command {
	return look(a, &cobra.Command{Use: "show KEYRING", Short: "Show a keyring"},
		func(ctx context.Context, c *client.Client, args []string) (wire.Keyring, error) {
			return c.Keyring(ctx, args[0])
		},
		keyringDetail)
}

func keyringTable(w io.Writer, list []wire.Keyring) {
	row(w, "KEYRING", "RESIDENCY", "PROTECTION", "POLICY", "KEK", "KEYS", "CREATED")
	for _, k := range list {
		row(w, k.Name, strings.Join(k.Residency, ","), k.Protection, k.Policy, kekVersion(k), k.Keys, when(k.Created))
	}
}

// kekVersion is the version of a keyring's KEK; with protection hardware there is none.
func kekVersion(k wire.Keyring) string {
	if k.KEK == 0 {
		return "-"
	}
	return fmt.Sprint(k.KEK)
}

func keyringDetail(w io.Writer, k wire.Keyring) {
	var nodes []string
	for _, n := range k.Nodes {
		nodes = append(nodes, n.ID+" ("+n.API+")")
	}
	row(w, "keyring", k.Name)
	row(w, "residency", strings.Join(k.Residency, ", "))
	row(w, "opened by", strings.Join(nodes, ", "))
	row(w, "protection", k.Protection)
	row(w, "policy", k.Policy)
	row(w, "receipts", k.Receipts)
	row(w, "max staleness", time.Duration(k.MaxStalenessMS)*time.Millisecond)
	row(w, "survive", k.Survive)
	row(w, "KEK version", kekVersion(k))
	row(w, "keys", k.Keys)
	row(w, "created", when(k.Created)+" by "+k.Creator)
	kekRotation(w, k)
}

func (a *app) keyCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "key", Short: "Create and look at keys; propose rotation, suspension and the rest"}
	cmd.AddCommand(a.keyCreateCommand(), a.keyImportCommand(), a.keyListCommand(), a.keyShowCommand(),
		a.proposeOnKey("rotate", "Propose a new version", false),
		a.proposeOnKey("activate", "Propose that a new version becomes primary without all its receipts", true),
		a.keyScheduleCommand(),
		a.proposeOnKey("suspend", "Propose that the key refuses every operation until it is resumed", false),
		a.proposeOnKey("resume", "Propose that a suspended key serves again", false),
		a.proposeOnKey("deactivate", "Propose that an old version stops decrypting", true),
		a.proposeOnKey("compromise", "Propose that a version is marked compromised", true),
		a.proposeOnKey("destroy", "Propose the destruction of a version, or of the whole key with --all", true))
	return cmd
}

func (a *app) keyScheduleCommand() *cobra.Command {
	var by proposing
	var period time.Duration
	cmd := &cobra.Command{
		Use:   "schedule KEYRING/KEY --rotation-period TIME --reason TEXT",
		Short: "Propose another rotation period for a key",
		Long: `Propose another rotation period for a key, counted from its last rotation; 0 for rotation
on request only. The keyring's policy needs a rule for schedule.`,
		Example: "  conclave key schedule coalition/db --rotation-period 2160h --reason 'as decided in the minutes of 3 March'",
		Args:    arguments("KEYRING/KEY"),
		RunE: func(cmd *cobra.Command, args []string) error {
			keyring, key := keyPath(args[0])
			if err := by.check(); err != nil {
				return err
			}
			if !cmd.Flags().Changed("rotation-period") {
				return usagef("--rotation-period is missing, 0 for on request only")
			}
			ms := period.Milliseconds()
			return a.propose(cmd, kms.ActionSchedule, approval.KeyTarget(keyring, key), wire.ProposalParameters{RotationPeriodMS: &ms}, by)
		},
	}
	by.flags(cmd)
	cmd.Flags().DurationVar(&period, "rotation-period", 0, "rotate this often, 0 for on request only")
	return cmd
}

func (a *app) keyCreateCommand() *cobra.Command {
	var req wire.CreateKeyRequest
	var period time.Duration
	cmd := &cobra.Command{
		Use:     "create KEYRING/KEY --purpose encrypt|mac|sign",
		Short:   "Create a key",
		Example: "  conclave key create coalition/db --purpose encrypt --rotation-period 2160h\n  conclave key create europe/seal --purpose sign --algorithm ecdsa-p384",
		Args:    arguments("KEYRING/KEY"),
		RunE: func(cmd *cobra.Command, args []string) error {
			keyring, name := keyPath(args[0])
			if req.Purpose == "" {
				return usagef("--purpose is missing: encrypt, mac or sign")
			}
			req.Name, req.RotationPeriodMS = name, period.Milliseconds()
			return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
				k, err := c.CreateKey(ctx, keyring, req)
				if err != nil {
					return err
				}
				return a.show(cmd, k, func(w io.Writer) { keyTable(w, []wire.Key{k}) })
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&req.Purpose, "purpose", "", "`PURPOSE`: encrypt, mac or sign")
	f.StringVar(&req.Algorithm, "algorithm", "", "`ALGORITHM`: aes256-gcm; hmac-sha256; ecdsa-p256, ecdsa-p384, ed25519 (default: the purpose's first)")
	f.DurationVar(&period, "rotation-period", 0, "rotate this often, 0 for on request only")
	return cmd
}

func (a *app) keyListCommand() *cobra.Command {
	return look(a, &cobra.Command{Use: "list KEYRING", Short: "List the keys of a keyring"},
		func(ctx context.Context, c *client.Client, args []string) ([]wire.Key, error) {
			return c.Keys(ctx, args[0])
		},
		keyTable)
}

func (a *app) keyShowCommand() *cobra.Command {
	return look(a, &cobra.Command{Use: "show KEYRING/KEY", Short: "Show a key, its versions and their receipts"},
		func(ctx context.Context, c *client.Client, args []string) (wire.Key, error) {
			return c.Key(keyPath(args[0])).Describe(ctx)
		},
		keyDetail)
}

func keyTable(w io.Writer, list []wire.Key) {
	row(w, "KEY", "PURPOSE", "ALGORITHM", "PRIMARY", "STATE", "NEXT ROTATION", "CREATED")
	for _, k := range list {
		row(w, kms.KeyPath(k.Keyring, k.Name), k.Purpose, k.Algorithm, k.Primary, keyState(k), nextRotation(k), when(k.Created))
	}
}

func keyState(k wire.Key) string {
	switch {
	case k.Suspended:
		return "suspended"
	case k.Primary == 0:
		return "destroyed"
	}
	return "active"
}

func nextRotation(k wire.Key) string {
	if k.Overdue {
		return "OVERDUE " + when(k.NextRotation)
	}
	return when(k.NextRotation)
}

func keyDetail(w io.Writer, k wire.Key) {
	row(w, "key", kms.KeyPath(k.Keyring, k.Name))
	row(w, "id", k.ID)
	row(w, "purpose", k.Purpose+", "+k.Algorithm)
	row(w, "protection", or(k.Protection, "-"))
	row(w, "state", keyState(k))
	row(w, "next rotation", nextRotation(k))
	row(w, "created", when(k.Created)+" by "+k.Creator)
	for _, id := range k.Proposals {
		row(w, "open proposal", id)
	}
	row(w)
	head := []any{"VERSION", "STATE", "PRIMARY", "CREATED", "ACTIVATED", "LAST USE", "RECEIPTS", "AUTHORISED BY"}
	made := k.Protection == string(kms.Hardware) || slices.ContainsFunc(k.Versions, func(v wire.KeyVersion) bool { return v.Generated != "" })
	if made {
		head = append(head, "MADE IN")
	}
	row(w, head...)
	for _, v := range k.Versions {
		var receipts []string
		for _, r := range v.Receipts {
			mark := "missing"
			if r.Received {
				mark = "ok"
			}
			receipts = append(receipts, r.Node+" "+mark)
		}
		cells := []any{v.Version, v.State, map[bool]string{true: "yes", false: "-"}[v.Primary], when(v.Created), when(v.Activated), lastUse(v.Use), or(strings.Join(receipts, ", "), "-"), or(v.Proposal, "-")}
		if made {
			cells = append(cells, madeIn(v))
		}
		row(w, cells...)
	}
}

// lastUse says what is known of the last use of a version, to the hour.
func lastUse(u *wire.VersionUse) string {
	switch {
	case u == nil:
		return "-"
	case !u.Known && u.Last.IsZero():
		return "not known: no word of " + strings.Join(u.Silent, ", ")
	case !u.Known:
		return "before " + when(u.Last) + " or later: no word of " + strings.Join(u.Silent, ", ")
	case u.Last.IsZero() || u.Last.Before(u.UnusedSince):
		return "none since " + when(u.UnusedSince)
	}
	return "before " + when(u.Last)
}

// madeIn says where the material of a version of protection hardware, or of an imported
// one, was generated.
func madeIn(v wire.KeyVersion) string {
	switch kms.Generated(v.Generated) {
	case kms.InDevice:
		return "device"
	case kms.OnHost:
		return "locked memory, then wiped"
	case kms.Imported:
		return "imported"
	}
	return or(v.Generated, "-")
}
