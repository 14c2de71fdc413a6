// Command conclaved is the daemon: one node of a Conclave cluster.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
)

// version is set by the linker.
var version = "unknown"

func main() {
	if len(os.Args) > 1 && os.Args[1] == "run" {
		if err := overwriteFreed(); err != nil {
			fmt.Fprintln(os.Stderr, "conclaved:", err)
			os.Exit(1)
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := rootCommand().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "conclaved:", err)
		os.Exit(1)
	}
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "conclaved",
		Short: "Run a node of a Conclave cluster",
		Long: `conclaved is one node of a Conclave cluster: it keeps a replica of the wrapped keys and
opens those of the keyrings that are resident at its site with its own HSM or TPM.

To try it out:            conclaved dev --dir /tmp/conclave
To found a real cluster:  conclaved init, conclaved genesis --help, conclaved run
To join a running one:    conclaved join --help`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       version,
	}
	root.AddCommand(runCommand(), initCommand(), genesisCommand(), joinCommand(), attestCommand(), rekeyCommand(), backupCommand(), auditCommand(), recoverCommand(), deviceCommand(), devCommand(), hsmChildCommand(), versionCommand())
	return root
}

// oneFile is cobra.ExactArgs(1) with the usage in the message.
func oneFile(cmd *cobra.Command, args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("%s takes one FILE; see: %s --help", cmd.CommandPath(), cmd.CommandPath())
	}
	return nil
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) {
			goVersion := ""
			if info, ok := debug.ReadBuildInfo(); ok {
				goVersion = " (" + info.GoVersion + ")"
			}
			fmt.Fprintln(cmd.OutOrStdout(), "conclaved "+version+goVersion)
		},
	}
}
