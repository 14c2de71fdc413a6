package fault

import (
	"os"

	"github.com/conclave-kms/conclave/test/harness"
)

// helperEnv makes the test program run one of helpers in place of the tests, for
// what must happen in a process of its own.
const helperEnv = "CONCLAVE_FAULT_HELPER"

var helpers = map[string]func() int{}

// tpm returns jp's software TPM.
func (w *world) tpm() *harness.SoftTPM {
	w.t.Helper()
	s, err := w.c.SoftTPM()
	w.do(err)
	return s
}

// mark is the present end of a node's log; since returns what was logged after it.
func (w *world) mark(site string) int64 {
	w.t.Helper()
	st, err := os.Stat(w.c.Nodes[site].Log)
	w.do(err)
	return st.Size()
}

func (w *world) since(site string, mark int64) string {
	w.t.Helper()
	b, err := os.ReadFile(w.c.Nodes[site].Log)
	w.do(err)
	return string(b[mark:])
}
