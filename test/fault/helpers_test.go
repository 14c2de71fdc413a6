package fault

import "os"

// helperEnv makes the test program run one of helpers in place of the tests, for
// what must happen in a process of its own.
const helperEnv = "CONCLAVE_FAULT_HELPER"

var helpers = map[string]func() int{}

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
