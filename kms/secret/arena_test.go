package secret

import (
	"bufio"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"unsafe"
)

// TestMemoryFlags asks the kernel whether a secret's memory is locked (lo),
// kept out of core dumps (dd) and wiped in a child process (wf); see
// proc_pid_smaps(5).
func TestMemoryFlags(t *testing.T) {
	s := must(t)(New(32))
	defer s.Destroy()
	flags := vmFlags(t, uintptr(unsafe.Pointer(&s.Reveal()[0])))
	for _, want := range []string{"lo", "dd", "wf"} {
		if !slices.Contains(flags, want) {
			t.Errorf("flag %q is missing from %v", want, flags)
		}
	}
	if slices.Contains(flags, "ex") {
		t.Error("the memory is executable")
	}
}

// vmFlags returns the flags of the mapping that holds an address.
func vmFlags(t *testing.T, addr uintptr) []string {
	t.Helper()
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	inside := false
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var from, to uintptr
		if n, _ := fmt.Sscanf(lines.Text(), "%x-%x ", &from, &to); n == 2 {
			inside = from <= addr && addr < to
		}
		if rest, ok := strings.CutPrefix(lines.Text(), "VmFlags:"); ok && inside {
			return strings.Fields(rest)
		}
	}
	t.Fatal("the mapping is not in /proc/self/smaps")
	return nil
}

func TestClass(t *testing.T) {
	for n, want := range map[int]int{1: 32, 32: 32, 33: 64, 64: 64, 65: 128, 1 << 20: 1 << 20} {
		if got := class(n); got != want {
			t.Errorf("class(%d) = %d, want %d", n, got, want)
		}
	}
}
