package fault

import (
	"context"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// faults is the matrix. Every one meets every protection level.
var faults = []fault{
	{
		name: "the token directory is moved away and back", victim: "fr",
		strike: func(w *world) { w.do(os.Rename(w.tokens(), w.tokens()+".away")) },
		repair: func(w *world) { w.do(os.Rename(w.tokens()+".away", w.tokens())) },
		ready:  []string{"device"}, api: []string{"device"}, log: []string{"token"},
	},
	{
		name: "the token is pulled out", victim: "fr",
		strike: func(w *world) { w.shim.begin(w.t, "gone") },
		repair: func(w *world) { w.shim.end(w.t, "gone") },
		ready:  []string{"device"}, api: []string{"device"}, log: []string{"CKR_DEVICE_REMOVED"},
	},
	{
		name: "the library hangs", victim: "fr",
		strike: func(w *world) { w.shim.begin(w.t, "hang") },
		repair: func(w *world) { w.shim.end(w.t, "hang") },
		ready:  []string{"device"}, api: []string{"device"}, log: []string{"no answer within"},
	},
	{
		name: "the TPM dies and is started again", victim: "jp",
		strike: func(w *world) { w.do(w.tpm().Kill(context.Background())) },
		repair: func(w *world) { w.do(w.tpm().Start(context.Background())) },
		ready:  []string{"device"}, api: []string{"device"}, log: []string{"no answer from the TPM"},
	},
	{
		name: "the TPM hangs and goes on", victim: "jp",
		strike: func(w *world) { w.do(w.tpm().Pause(context.Background())) },
		repair: func(w *world) { w.do(w.tpm().Resume()) },
		ready:  []string{"device"}, api: []string{"device"}, log: []string{"no answer from the TPM"},
	},
}

// tokens is the directory in which fr's SoftHSM keeps its token.
func (w *world) tokens() string { return filepath.Join(w.c.Nodes["fr"].Dir, "token", "tokens") }

var _ = syscall.SIGKILL
var _ testing.TB
