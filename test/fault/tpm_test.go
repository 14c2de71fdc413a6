package fault

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/conclave-kms/conclave/test/harness"
)

// tpm returns jp's software TPM.
func (w *world) tpm() *harness.SoftTPM {
	w.t.Helper()
	s, err := w.c.SoftTPM()
	w.do(err)
	return s
}

func (w *world) tpmState() string { return filepath.Join(w.tpm().Dir, "tpm2-00.permall") }

// saveTPM keeps a copy of the TPM's state, which restoreTPM puts back: with a TPM
// of silicon a cleared one is replaced by the node's next root (rekey).
func (w *world) saveTPM() {
	w.t.Helper()
	b, err := os.ReadFile(w.tpmState())
	w.do(err)
	w.do(os.WriteFile(w.tpmState()+".kept", b, 0o600))
}

func (w *world) restoreTPM() {
	w.t.Helper()
	s := w.tpm()
	w.do(s.Kill(context.Background()))
	w.do(os.Rename(w.tpmState()+".kept", w.tpmState()))
	w.do(s.Start(context.Background()))
}

// beside runs f with a connection to the TPM beside the node's.
func (w *world) beside(f func(transport.TPM) error) {
	w.t.Helper()
	socket, err := w.c.Nodes["jp"].Setting("device.path")
	w.do(err)
	var link transport.TPMCloser
	w.eventually(recovery, "a connection to the TPM", func(context.Context) (err error) {
		link, err = linuxudstpm.Open(socket[len("unix:"):])
		return err
	})
	defer link.Close()
	w.do(f(link))
}

// clearTPM does what firmware does on an owner's word: the platform clears the
// TPM, and with it all keys of the owner.
func (w *world) clearTPM() {
	w.t.Helper()
	w.beside(func(link transport.TPM) error {
		_, err := tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHPlatform, Auth: tpm2.PasswordAuth(nil)}}.Execute(link)
		return err
	})
}

// lockOutTPM gives wrong authorizations for a key that is subject to dictionary
// attack protection, until the TPM takes none any more.
func (w *world) lockOutTPM() {
	w.t.Helper()
	w.beside(func(link transport.TPM) error {
		create := tpm2.CreatePrimary{
			PrimaryHandle: tpm2.TPMRHNull,
			InSensitive:   tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{UserAuth: tpm2.TPM2BAuth{Buffer: []byte("right")}}},
			InPublic: tpm2.New2B(tpm2.TPMTPublic{
				Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
				ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, SignEncrypt: true},
				Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgKeyedHash, &tpm2.TPMSKeyedHashParms{Scheme: tpm2.TPMTKeyedHashScheme{
					Scheme: tpm2.TPMAlgHMAC, Details: tpm2.NewTPMUSchemeKeyedHash(tpm2.TPMAlgHMAC, &tpm2.TPMSSchemeHMAC{HashAlg: tpm2.TPMAlgSHA256}),
				}}),
			}),
		}
		key, err := create.Execute(link)
		if err != nil {
			return err
		}
		defer func() { _, _ = tpm2.FlushContext{FlushHandle: key.ObjectHandle}.Execute(link) }()
		for range 100 {
			if errors.Is(err, tpm2.TPMRCReferenceH0) { // the node has cleared away what it does not know
				again, err := create.Execute(link)
				if err != nil {
					return err
				}
				key = again
			}
			_, err = tpm2.Hmac{
				Handle:  tpm2.AuthHandle{Handle: key.ObjectHandle, Name: key.Name, Auth: tpm2.PasswordAuth([]byte("wrong"))},
				Buffer:  tpm2.TPM2BMaxBuffer{Buffer: []byte("x")},
				HashAlg: tpm2.TPMAlgSHA256,
			}.Execute(link)
			if errors.Is(err, tpm2.TPMRCLockout) {
				return nil
			}
		}
		return errors.Join(errors.New("the TPM does not lock out"), err)
	})
}
