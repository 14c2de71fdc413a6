package main

import (
	"fmt"
	"os"
	"strings"
	"syscall"
)

// overwriteFreed starts this program again, as the same process, with a Go runtime
// that overwrites objects when it frees them: expanded cipher keys and private keys of
// the standard library cannot be wiped by us. The runtime takes the setting at its start
// alone. An environment that has it, whatever its value, is left as it is.
func overwriteFreed() error {
	const name, setting = "GODEBUG", "clobberfree"
	env, set := os.LookupEnv(name)
	for _, kv := range strings.Split(env, ",") {
		if k, _, _ := strings.Cut(kv, "="); k == setting {
			return nil
		}
	}
	self, err := executable()
	if err != nil {
		return err
	}
	value := setting + "=1"
	if set && env != "" {
		value = env + "," + value
	}
	if err := os.Setenv(name, value); err != nil {
		return err
	}
	return fmt.Errorf("start again as %s: %w", self, syscall.Exec(self, os.Args, os.Environ()))
}
