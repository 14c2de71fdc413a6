package fault

import (
	"context"
	"os"
	"path/filepath"
)

// faults is the matrix. Every one meets every protection level.
var faults = []fault{
	{
		name: "the token directory is moved away and back", victim: "fr",
		strike: func(w *world) { w.do(os.Rename(w.tokens(), w.tokens()+".away")) },
		repair: func(w *world) { w.do(os.Rename(w.tokens()+".away", w.tokens())) },
		ready:  []string{"token"}, api: []string{"device"}, log: []string{"token"},
	},
	{
		name: "the token is pulled out", victim: "fr",
		strike: func(w *world) { w.shim.begin(w.t, "gone") },
		repair: func(w *world) { w.shim.end(w.t, "gone") },
		ready:  []string{"CKR_DEVICE_REMOVED"}, api: []string{"device"}, log: []string{"CKR_DEVICE_REMOVED"},
	},
	{
		name: "the library hangs", victim: "fr",
		strike: func(w *world) { w.shim.begin(w.t, "hang") },
		repair: func(w *world) { w.shim.end(w.t, "hang") },
		ready:  []string{"no answer within"}, api: []string{"device"}, log: []string{"no answer within"},
	},
	{
		name: "the library crashes in the node's process", victim: "fr", effect: dead,
		strike: func(w *world) { w.shim.begin(w.t, "crash") }, // the node's own clock calls it within seconds
		repair: func(*world) {},
		api:    []string{"cannot be reached"}, log: []string{"SIGSEGV"},
	},
	{
		name: "the PIN is wrong at the start", victim: "fr", effect: dead,
		strike: func(w *world) { w.restartWith("fr", func() { w.writePIN("00000000") }) },
		repair: func(w *world) { w.restorePIN() },
		api:    []string{"cannot be reached"}, log: []string{"PIN refused"},
	},
	{
		name: "the library is missing at the start", victim: "fr", effect: dead,
		strike: func(w *world) {
			w.restartWith("fr", func() { w.do(os.Rename(w.shim.library, w.shim.library+".away")) })
		},
		repair: func(w *world) { w.do(os.Rename(w.shim.library+".away", w.shim.library)) },
		api:    []string{"cannot be reached"}, log: []string{"PKCS#11 library not usable"},
	},
	{
		name: "the PIN is changed on the token and later in the file", victim: "fr",
		strike: func(w *world) { w.changePIN() },
		repair: func(w *world) { w.do(os.Rename(w.newPIN(), w.pinFile())) },
		ready:  []string{"PIN refused"}, api: []string{"device"}, log: []string{"PIN refused"},
	},
	{
		name: "the TPM dies and is started again", victim: "jp",
		strike: func(w *world) { w.do(w.tpm().Kill(context.Background())) },
		repair: func(w *world) { w.do(w.tpm().Start(context.Background())) },
		ready:  []string{"TPM unavailable"}, api: []string{"device"}, log: []string{"TPM unavailable"},
	},
	{
		name: "the TPM hangs and goes on", victim: "jp",
		strike: func(w *world) { w.do(w.tpm().Pause(context.Background())) },
		repair: func(w *world) { w.do(w.tpm().Resume()) },
		ready:  []string{"TPM unavailable"}, api: []string{"device"}, log: []string{"TPM unavailable"},
	},
	{
		name: "the TPM is cleared", victim: "jp",
		strike: func(w *world) { w.saveTPM(); w.clearTPM() },
		repair: func(w *world) { w.restoreTPM() },
		ready:  []string{"TPM not provisioned", "unsafe"}, api: []string{"device"}, log: []string{"TPM not provisioned", "unsafe"},
	},
	{
		name: "somebody else drives the TPM into its dictionary attack lockout", victim: "jp", effect: harmless,
		strike: func(w *world) { w.saveTPM(); w.lockOutTPM() },
		repair: func(w *world) { w.restoreTPM() },
	},
}

// tokensOf is the directory in which a site's SoftHSM keeps its token.
func (w *world) tokensOf(site string) string {
	return filepath.Join(w.c.Nodes[site].Dir, "token", "tokens")
}

// tokens is that of fr.
func (w *world) tokens() string { return w.tokensOf("fr") }

func (w *world) pinFile() string { return filepath.Join(w.c.Nodes["fr"].Dir, "pin") }

// restartWith ends a node, changes something, and starts it without waiting for more.
func (w *world) restartWith(site string, change func()) {
	w.t.Helper()
	n := w.c.Nodes[site]
	w.do(n.Kill(context.Background()))
	change()
	w.do(n.Launch())
}

// writePIN replaces the PIN in fr's file and keeps the right one beside it.
func (w *world) writePIN(pin string) {
	w.t.Helper()
	w.do(os.Rename(w.pinFile(), w.pinFile()+".right"))
	w.do(os.WriteFile(w.pinFile(), []byte(pin), 0o600))
}

func (w *world) restorePIN() {
	w.t.Helper()
	w.do(os.Rename(w.pinFile()+".right", w.pinFile()))
}
