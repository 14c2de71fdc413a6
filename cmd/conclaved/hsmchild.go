package main

import (
	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/hsm/child"
)

// hsmChildCommand is the process that a node starts for each PKCS#11 library of its
// own when device.isolate is true.
func hsmChildCommand() *cobra.Command {
	return &cobra.Command{
		Use: hsmChild, Short: "Run a PKCS#11 library apart from the node; started by conclaved itself", Hidden: true, Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return child.Main() },
	}
}

const hsmChild = "hsm-child"
