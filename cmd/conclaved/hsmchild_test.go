package main

import (
	"fmt"
	"os"
	"testing"

	"github.com/conclave-kms/conclave/hsm/child"
)

// TestMain makes the test program its own PKCS#11 process: what opens a device in it
// runs /proc/self/exe.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == hsmChild {
		if err := child.Main(); err != nil {
			fmt.Fprintln(os.Stderr, "conclaved:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}
