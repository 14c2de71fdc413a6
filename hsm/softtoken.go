package hsm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/miekg/pkcs11"
)

// SoftToken is a SoftHSM token on disk, made by CreateSoftToken. A process uses
// it with SOFTHSM2_CONF=ConfFile in its environment and URI in its configuration.
type SoftToken struct {
	Dir      string // holds the configuration and the tokens
	ConfFile string // Dir/softhsm2.conf
	Module   string // the SoftHSM library
	Label    string
	Serial   string
	URI      string // token, serial and module-path; the PIN comes from elsewhere
}

// FindSoftHSM returns the path of the SoftHSM library: SOFTHSM2_MODULE, or the
// usual places. Without one it is ErrModule and names the package to install.
func FindSoftHSM() (string, error) {
	if p := os.Getenv("SOFTHSM2_MODULE"); p != "" {
		if _, err := os.Stat(p); err != nil {
			return "", fmt.Errorf("%w: SOFTHSM2_MODULE: %w: correct it, or unset it and install SoftHSM (Debian and Ubuntu: apt install softhsm2)", ErrModule, err)
		}
		return p, nil
	}
	for _, p := range []string{
		"/usr/lib/softhsm/libsofthsm2.so",
		"/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
		"/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
		"/usr/lib64/softhsm/libsofthsm2.so",
		"/usr/lib64/pkcs11/libsofthsm2.so",
		"/usr/local/lib/softhsm/libsofthsm2.so",
	} {
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%w: no libsofthsm2.so in the usual places: install SoftHSM (Debian and Ubuntu: apt install softhsm2; Fedora: softhsm), or set SOFTHSM2_MODULE", ErrModule)
}

// CreateSoftToken makes a SoftHSM token for development and tests: it writes
// dir/softhsm2.conf, makes dir/tokens and initialises a token with the user PIN
// (4 bytes or more) and a random security officer PIN that nobody keeps. dir is
// made with mode 0700 and must not hold a token yet.
//
// The library reads its configuration once per process, so a private copy of it
// does the work here and tokens in several directories can be made.
func CreateSoftToken(ctx context.Context, dir, label string, pin *secret.Bytes) (*SoftToken, error) {
	if label == "" || len(label) > 32 {
		return nil, invalidf("the token label has 1 to 32 bytes")
	}
	if err := checkPIN(pin.Reveal()); err != nil {
		return nil, err
	}
	module, err := FindSoftHSM()
	if err != nil {
		return nil, err
	}
	dir, err = filepath.Abs(dir)
	if err != nil {
		return nil, invalidf("%v", err)
	}
	t := &SoftToken{Dir: dir, ConfFile: filepath.Join(dir, "softhsm2.conf"), Module: module, Label: label}
	if err := t.write(); err != nil {
		return nil, err
	}
	copied := filepath.Join(dir, ".init-libsofthsm2.so")
	if err := copyFile(copied, module); err != nil {
		return nil, err
	}
	defer os.Remove(copied) // the mapping stays, the file is of no more use
	result := make(chan error, 1)
	go func() { result <- t.initialize(ctx, copied, pin) }()
	select {
	case err = <-result:
	case <-ctx.Done():
		<-result // local disk work of some 100 ms; pin is in use until then
		err = contextError("create token", ctx.Err())
	}
	if err != nil {
		return nil, err
	}
	t.URI = (&URI{Token: label, Serial: t.Serial, ModulePath: module}).String()
	return t, nil
}

// CopyLibrary copies the SoftHSM library into dir, in the place of an earlier
// copy, and returns the path. A process that needs several SoftHSM
// configurations loads a copy for each: module-path names the copy, and
// Config.SoftHSMConf the configuration.
func CopyLibrary(dir string) (string, error) {
	module, err := FindSoftHSM()
	if err != nil {
		return "", err
	}
	to := filepath.Join(dir, "libsofthsm2.so")
	return to, copyFile(to, module)
}

func (t *SoftToken) write() error {
	tokens := filepath.Join(t.Dir, "tokens")
	if strings.ContainsAny(t.Dir, "\n\r") {
		return invalidf("the token directory has a line break in its name")
	}
	if err := os.MkdirAll(t.Dir, 0o700); err != nil {
		return unavailablef("%v", err)
	}
	if err := os.Mkdir(tokens, 0o700); errors.Is(err, os.ErrExist) {
		return invalidf("%s is there already", tokens)
	} else if err != nil {
		return unavailablef("%v", err)
	}
	conf := "directories.tokendir = " + tokens + "\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n"
	if err := os.WriteFile(t.ConfFile, []byte(conf), 0o600); err != nil {
		return unavailablef("%v", err)
	}
	return nil
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrModule, err)
	}
	defer in.Close()
	// Never written over: a process may have the old file mapped.
	if err := os.Remove(to); err != nil && !errors.Is(err, os.ErrNotExist) {
		return unavailablef("%v", err)
	}
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o700)
	if err != nil {
		return unavailablef("%v", err)
	}
	_, err = io.Copy(out, in)
	if e := out.Close(); err == nil {
		err = e
	}
	if err != nil {
		return unavailablef("copy the library: %v", err)
	}
	return nil
}

// initialize runs C_InitToken and C_InitPIN. Doing so through the library keeps
// the PINs out of a command line.
func (t *SoftToken) initialize(ctx context.Context, lib string, pin *secret.Bytes) error {
	m, err := loadModule(lib, t.ConfFile)
	if err != nil {
		return err
	}
	m.retain()
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		m.release(ctx)
		forget(m)
	}()
	if err := m.enter(DefaultCallTimeout); err != nil {
		return err
	}
	defer m.leave()
	raw := make([]byte, 16)
	if _, err := rand.Read(raw); err != nil {
		return unavailablef("%v", err)
	}
	so := hex.EncodeToString(raw)
	secret.Wipe(raw)
	slot, err := freeSlot(m.p11)
	if err != nil {
		return err
	}
	if err := m.p11.InitToken(slot, so, t.Label); err != nil {
		return classify("C_InitToken", err)
	}
	slot, info, err := findSlot(m.p11, &URI{Token: t.Label})
	if err != nil {
		return err
	}
	t.Serial = clean(info.SerialNumber)
	return setUserPIN(m.p11, slot, so, string(pin.Reveal()))
}

func setUserPIN(p11 *pkcs11.Ctx, slot uint, so, pin string) error {
	h, err := p11.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return classify("C_OpenSession", err)
	}
	defer p11.CloseSession(h) // logs out too
	if err := p11.Login(h, pkcs11.CKU_SO, so); err != nil {
		return classify("C_Login", err)
	}
	if err := p11.InitPIN(h, pin); err != nil {
		return classify("C_InitPIN", err)
	}
	return nil
}

func freeSlot(p11 *pkcs11.Ctx) (uint, error) {
	slots, err := p11.GetSlotList(true)
	if err != nil {
		return 0, classify("C_GetSlotList", err)
	}
	for _, s := range slots {
		ti, err := p11.GetTokenInfo(s)
		if err == nil && ti.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			return s, nil
		}
	}
	return 0, unavailablef("SoftHSM shows no slot for a new token")
}
