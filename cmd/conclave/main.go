// Command conclave is the tool of operators, custodians, services and auditors.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
)

// version is set by the linker.
var version = "unknown"

func main() {
	// A custodian's key, or a recovery key, is nothing for a core file. Lowering a limit
	// never fails.
	_ = syscall.Setrlimit(syscall.RLIMIT_CORE, &syscall.Rlimit{})
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx))
}

// run returns the exit code: 0 done, 2 wrong usage, and for the rest one code for
// each family of errors, as the help of the root command lists them.
func run(ctx context.Context) int {
	root := rootCommand()
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintln(os.Stderr, "conclave:", visible(tell(err)))
	return exitCode(err)
}

// tell is an error in words. After an unknown outcome this program has forgotten the
// idempotency key when it ends: the person looks what became of it.
func tell(err error) string {
	var e *kms.Error
	if errors.As(err, &e) && e.Kind == kms.Unknown {
		return e.Msg + "; look whether it was (list, show) before you do it again"
	}
	return err.Error()
}

// usageError marks a mistake on the command line.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

func exitCode(err error) int {
	if errors.As(err, new(usageError)) {
		return 2
	}
	var e *kms.Error
	if !errors.As(err, &e) {
		return 1
	}
	switch e.Kind {
	case kms.Unauthenticated, kms.Denied, kms.NeedsApproval:
		return 3
	case kms.NotFound:
		return 4
	case kms.Exists, kms.Conflict, kms.Expired, kms.Replayed:
		return 5
	case kms.OpenFailed, kms.BadSignature:
		return 6
	case kms.Unavailable, kms.Stale, kms.ReadOnly, kms.NotResident:
		return 7
	case kms.Unknown:
		return 8
	}
	return 1
}

func rootCommand() *cobra.Command {
	a := &app{}
	root := &cobra.Command{
		Use:   "conclave",
		Short: "Use and govern the keys of a Conclave cluster",
		Long: `conclave is the tool of operators, custodians, services and auditors.

It connects with a client certificate; the environment says where and as whom:

  CONCLAVE_ADDR          https URLs of nodes, comma-separated, tried in this order
  CONCLAVE_CACERT        the sites' CA certificates (PEM)
  CONCLAVE_CLIENT_CERT   certificate and key used for operations on keys
  CONCLAVE_CLIENT_KEY
  CONCLAVE_ADMIN_CERT    certificate and key used to administer (keyrings, keys,
  CONCLAVE_ADMIN_KEY     proposals, status); default: the client's
  CONCLAVE_MEMORY        directory of what this person has seen of clusters

Exit codes: 0 done; 1 failed; 2 wrong usage; 3 not permitted; 4 not found;
5 conflict or expired; 6 does not open or verify; 7 unavailable, try again;
8 outcome unknown: it may have been done, look before you repeat it.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       version,
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usagef("%w; see: %s --help", err, cmd.CommandPath())
	})
	a.flags(root)
	root.AddGroup(&cobra.Group{ID: "use", Title: "Use keys:"}, &cobra.Group{ID: "govern", Title: "Govern keys:"}, &cobra.Group{ID: "look", Title: "Look:"})
	add := func(group string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add("use", a.encryptCommand(), a.decryptCommand(), a.rewrapCommand(), a.datakeyCommand(), a.macCommand(), a.verifyMACCommand(), a.signCommand(), a.verifyCommand(), a.publicKeyCommand(), a.exportCommand())
	add("govern", a.keyringCommand(), a.keyCommand(), a.proposalCommand(), a.custodianCommand(), a.backupCommand(), a.recoverCommand(), a.recoveryCommand(), a.ceremonyCommand())
	add("look", a.statusCommand(), a.nodeCommand(), a.siteCommand(), a.policyCommand(), a.evidenceCommand(), a.auditCommand(), a.memoryCommand(), a.deviceCommand(), a.driftCommand(), a.alarmsCommand())
	strict(root)
	root.SetUsageTemplate(strings.Replace(root.UsageTemplate(), "{{if .Runnable}}", "{{if and .Runnable (not .HasAvailableSubCommands)}}", 1))
	return root
}

// strict makes an unknown subcommand an error at every level; cobra prints the
// help of the level and succeeds.
func strict(c *cobra.Command) {
	for _, sub := range c.Commands() {
		strict(sub)
	}
	if !c.HasSubCommands() || c.Runnable() {
		return
	}
	c.Args, c.SuggestionsMinimumDistance = cobra.ArbitraryArgs, 2
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return cmd.Help()
		}
		hint := ""
		if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
			hint = fmt.Sprintf(", did you mean %q?", near[0])
		}
		return usagef("%s has no command %q%s; see: %s --help", cmd.CommandPath(), args[0], hint, cmd.CommandPath())
	}
}
