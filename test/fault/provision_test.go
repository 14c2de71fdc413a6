package fault

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/hsm/hsmtest"
)

func init() { helpers["provision"] = provisionOnFullDisk }

// TestTokenDiskFull makes the device keys of a token on whose disk there is no
// room: it is refused and leaves no half of them, and when there is room they are
// made.
func TestTokenDiskFull(t *testing.T) {
	tok := hsmtest.New(t)
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), helperEnv+"=provision", "FAULT_URI="+tok.ChildURI, "FAULT_PIN="+tok.PINFile, "FAULT_CONF="+tok.ConfFile)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if !strings.Contains(string(out), "unavailable") {
		t.Errorf("on a full disk: %s", out)
	}
	if _, err := hsm.Open(t.Context(), tok.Config()); !errors.Is(err, hsm.ErrNotProvisioned) {
		t.Errorf("after provisioning without room: %v", err)
	}
	tok.Provision(t, tok.Config())
	if err := tok.Open(t, tok.Config()).Check(t.Context()); err != nil {
		t.Error(err)
	}
}

// roomForToken is enough for the token's own file, which every login rewrites, and
// too little for a key: SoftHSM loses a token whose file it cannot rewrite.
const roomForToken = 512

// provisionOnFullDisk runs in a process of its own, whose files cannot grow.
func provisionOnFullDisk() int {
	signal.Ignore(syscall.SIGXFSZ) // writes fail with EFBIG then
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: roomForToken, Max: roomForToken}); err != nil {
		fmt.Println("setrlimit:", err)
		return 1
	}
	err := hsm.Provision(context.Background(), hsm.Config{URI: os.Getenv("FAULT_URI"), PINFile: os.Getenv("FAULT_PIN"), SoftHSMConf: os.Getenv("FAULT_CONF")})
	if err == nil {
		fmt.Println("the keys were made without room for them")
		return 1
	}
	fmt.Println(err)
	return 0
}
