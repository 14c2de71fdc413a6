package tpm

import (
	"bytes"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/kms/secret"
)

// Defaults and bounds of Config.
const (
	// DefaultCallTimeout bounds one call on the TPM.
	DefaultCallTimeout = 10 * time.Second
	// DefaultPersistentBase is the first of four consecutive owner handles:
	// storage, agreement, signing and attestation key. It lies outside the ranges that
	// the TCG registry reserves for storage, endorsement and platform keys.
	DefaultPersistentBase uint32 = 0x81080000

	ownerHandleMin uint32 = 0x81000000
	ownerHandleMax uint32 = 0x817fffff

	authMinLen = 16
	authMaxLen = 4096
	authLen    = 32 // characters of an authorization value: a P-256 key takes no more
)

// Config says which TPM to use and how.
type Config struct {
	// Path is a resource manager device such as "/dev/tpmrm0", or
	// "unix:/path/of/socket" for a software TPM. A socket's TPM must belong to
	// this node alone: leftover sessions and transient objects are flushed.
	Path string
	// AuthFile holds the secret from which the owner, lockout and key
	// authorization values are derived: a regular file readable by its owner
	// only, or "fd:N" for an inherited file descriptor, read to its end once.
	// 16 to 4096 bytes after removal of one trailing newline; NewAuthFile makes one.
	AuthFile string
	// Curve is ecdh.P384() (also when nil) or ecdh.P256().
	Curve ecdh.Curve
	// CallTimeout bounds the wait for the TPM and then each call on it.
	// 0 means DefaultCallTimeout.
	CallTimeout time.Duration
	// PersistentBase is the first of four consecutive persistent handles in
	// the owner's range. 0 means DefaultPersistentBase.
	PersistentBase uint32
	// OwnerFile holds the secret of the owner and lockout authorization, in the
	// form of AuthFile, where that is to be kept apart from the node. Only
	// Provision and UpdatePCRPolicy read it. Empty means AuthFile.
	OwnerFile string
	// PCRs, when not empty, makes the agreement and the signing key usable only
	// while these platform configuration registers (0 to 23, SHA-256 bank) hold
	// approved values: those that Provision met, later those of UpdatePCRPolicy.
	PCRs []int
}

// withDefaults fills in defaults and checks the rest.
func (c Config) withDefaults() (Config, error) {
	if c.Curve == nil {
		c.Curve = ecdh.P384()
	}
	if c.CallTimeout == 0 {
		c.CallTimeout = DefaultCallTimeout
	}
	if c.PersistentBase == 0 {
		c.PersistentBase = DefaultPersistentBase
	}
	c.PCRs = slices.Compact(slices.Sorted(slices.Values(c.PCRs)))
	switch {
	case c.Path == "":
		return c, invalid("Path is empty: name a device such as /dev/tpmrm0 or unix:/path/of/socket")
	case c.AuthFile == "":
		return c, invalid("AuthFile is empty: name a file with the authorization secret")
	case c.Curve != ecdh.P384() && c.Curve != ecdh.P256():
		return c, invalid("Curve must be P-384 or P-256")
	case c.CallTimeout < 0:
		return c, invalid("CallTimeout is negative")
	case c.PersistentBase < ownerHandleMin || c.PersistentBase > ownerHandleMax-(keyCount-1):
		return c, invalid("PersistentBase %#x leaves the owner's range %#x to %#x", c.PersistentBase, ownerHandleMin, ownerHandleMax)
	case len(c.PCRs) > 0 && (c.PCRs[0] < 0 || c.PCRs[len(c.PCRs)-1] >= pcrCount):
		return c, invalid("PCRs must be 0 to %d, not %s", pcrCount-1, listPCRs(c.PCRs))
	case len(c.PCRs) > 0 && nvOwnerMin+tpm2.TPMHandle(c.PersistentBase&handleMask) >= nvOwnerMax:
		return c, invalid("PersistentBase %#x with PCRs must be below %#x", c.PersistentBase, ownerHandleMin+uint32(nvOwnerMax-nvOwnerMin))
	}
	return c, nil
}

// auths are the authorization values in use. Owner and lockout are nil unless the
// owner is at work.
type auths struct {
	owner, lockout, key *secret.Bytes
}

func (a *auths) destroy() {
	a.owner.Destroy()
	a.lockout.Destroy()
	a.key.Destroy()
}

// loadAuths reads the authorization secrets and derives the values.
func loadAuths(cfg Config, asOwner bool) (a *auths, err error) {
	root, err := readAuth("AuthFile", cfg.AuthFile)
	if err != nil {
		return nil, err
	}
	defer root.Destroy()
	owner := root
	if asOwner && cfg.OwnerFile != "" {
		if owner, err = readAuth("OwnerFile", cfg.OwnerFile); err != nil {
			return nil, err
		}
		defer owner.Destroy()
	}
	a = &auths{}
	a.key, err = deriveAuth(root, "conclave tpm v1 key auth")
	if err == nil && asOwner {
		a.owner, err = deriveAuth(owner, "conclave tpm v1 owner auth")
	}
	if err == nil && asOwner {
		a.lockout, err = deriveAuth(owner, "conclave tpm v1 lockout auth")
	}
	if err != nil {
		a.destroy()
		return nil, err
	}
	return a, nil
}

// deriveAuth takes 24 bytes from HKDF-SHA256 and writes them as 32 characters
// of base64. An authorization value must not end in a zero byte, which a TPM
// drops (TPM 2.0 Part 1, 19.6.5), and go-tpm v0.9.8 cuts it at the first zero
// byte wherever that is.
func deriveAuth(root *secret.Bytes, info string) (*secret.Bytes, error) {
	raw, err := hkdf.Key(sha256.New, root.Reveal(), nil, info, authLen/4*3)
	if err != nil {
		return nil, fmt.Errorf("tpm: deriving %s: %w", info, err)
	}
	defer secret.Wipe(raw)
	text := make([]byte, authLen)
	base64.RawURLEncoding.Encode(text, raw)
	return secret.Move(text)
}

// readAuth reads a secret; name is that of the configuration value, for errors.
func readAuth(name, from string) (*secret.Bytes, error) {
	f, err := openAuth(name, from)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	buf := make([]byte, authMaxLen+2)
	defer secret.Wipe(buf)
	n, err := io.ReadFull(f, buf)
	if err != nil && err != io.ErrUnexpectedEOF && err != io.EOF {
		return nil, invalid("reading %s: %v", name, err)
	}
	b := bytes.TrimSuffix(buf[:n], []byte("\n"))
	if len(b) < authMinLen || len(b) > authMaxLen {
		return nil, invalid("%s must hold %d to %d bytes", name, authMinLen, authMaxLen)
	}
	return secret.Copy(b)
}

func openAuth(name, from string) (*os.File, error) {
	if num, ok := strings.CutPrefix(from, "fd:"); ok {
		fd, err := strconv.ParseUint(num, 10, 16)
		if err != nil {
			return nil, invalid("%s: %q is not fd:N", name, from)
		}
		return os.NewFile(uintptr(fd), "auth descriptor"), nil
	}
	f, err := os.Open(from)
	if err != nil {
		return nil, invalid("%s: %v", name, err)
	}
	if err := checkAuthFile(name, f); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func checkAuthFile(name string, f *os.File) error {
	fi, err := f.Stat()
	if err != nil {
		return invalid("%s: %v", name, err)
	}
	if !fi.Mode().IsRegular() {
		return invalid("%s %s is not a regular file", name, f.Name())
	}
	if fi.Mode().Perm()&0o077 != 0 {
		return invalid("%s %s has mode %#o: others may read it; chmod 600", name, f.Name(), fi.Mode().Perm())
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return invalid("%s %s belongs to another user (uid %d)", name, f.Name(), st.Uid)
	}
	return nil
}

// NewAuthFile writes 32 random bytes in hexadecimal to a new file of mode 0600
// and syncs it. It never overwrites a file.
func NewAuthFile(path string) error {
	raw := make([]byte, 32)
	text := make([]byte, 65)
	defer secret.Wipe(raw)
	defer secret.Wipe(text)
	if _, err := rand.Read(raw); err != nil {
		return fmt.Errorf("tpm: auth file: %w", err)
	}
	hex.Encode(text, raw)
	text[64] = '\n'
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("tpm: auth file: %w", err)
	}
	_, err = f.Write(text)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("tpm: auth file %s: %w", filepath.Base(path), err)
	}
	return nil
}
