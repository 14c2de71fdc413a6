package fault

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/miekg/pkcs11"

	"github.com/conclave-kms/conclave/hsm"
)

func init() { helpers["pin"] = changePIN }

// newPIN is where the PIN lies that changePIN gives to fr's token, until it is
// brought into the node's own file.
func (w *world) newPIN() string { return w.pinFile() + ".new" }

// changePIN changes the PIN of fr's token by another process, as the token's owner
// does, and has the node's library forget its login.
func (w *world) changePIN() {
	w.t.Helper()
	raw := make([]byte, 8)
	_, _ = rand.Read(raw) // never fails (crypto/rand)
	w.do(os.WriteFile(w.newPIN(), []byte(hex.EncodeToString(raw)), 0o600))
	module, err := hsm.FindSoftHSM()
	w.do(err)
	cmd := exec.CommandContext(w.t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), helperEnv+"=pin", "FAULT_MODULE="+module, "FAULT_OLD="+w.pinFile(), "FAULT_NEW="+w.newPIN(),
		"SOFTHSM2_CONF="+filepath.Join(w.c.Nodes["fr"].Dir, "token", "softhsm2.conf"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		w.t.Fatalf("change the PIN: %v: %s", err, out)
	}
	w.shim.begin(w.t, "finalize")
	w.shim.carriedOut(w.t, "finalize")
}

// changePIN, the helper, runs in a process of its own, since it reads SOFTHSM2_CONF.
func changePIN() int {
	if err := setPIN(os.Getenv("FAULT_MODULE"), os.Getenv("FAULT_OLD"), os.Getenv("FAULT_NEW")); err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

func setPIN(module, oldFile, newFile string) error {
	from, err := os.ReadFile(oldFile)
	if err != nil {
		return err
	}
	to, err := os.ReadFile(newFile)
	if err != nil {
		return err
	}
	p := pkcs11.New(module)
	if p == nil {
		return fmt.Errorf("%s cannot be loaded", module)
	}
	if err := p.Initialize(); err != nil {
		return err
	}
	defer func() { _ = p.Finalize() }() // the process ends anyway
	slots, err := p.GetSlotList(true)
	if err != nil {
		return err
	}
	s, err := p.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return err
	}
	if err := p.Login(s, pkcs11.CKU_USER, string(from)); err != nil {
		return err
	}
	return p.SetPIN(s, string(from), string(to))
}
