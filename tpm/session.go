package tpm

import (
	"bytes"

	"github.com/google/go-tpm/tpm2"
)

// object is a key in the TPM: its handle, public area and name.
type object struct {
	handle tpm2.TPMHandle
	public tpm2.TPMTPublic
	name   tpm2.TPM2BName
}

// auth is the handle as the authorized handle of a command.
func (o *object) auth(s tpm2.Session) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: o.handle, Name: o.name, Auth: s}
}

func (o *object) named() tpm2.NamedHandle {
	return tpm2.NamedHandle{Handle: o.handle, Name: o.name}
}

// readObject reads the public area at a handle and checks that the name is
// its digest (TPM 2.0 Part 1, 16).
func (c *conn) readObject(h tpm2.TPMHandle) (*object, error) {
	rsp, err := (tpm2.ReadPublic{ObjectHandle: h}).Execute(c)
	if err != nil {
		return nil, err
	}
	pub, err := rsp.OutPublic.Contents()
	if err != nil {
		return nil, err
	}
	name, err := tpm2.ObjectName(pub)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(name.Buffer, rsp.Name.Buffer) {
		return nil, unsafe("the name of object %#x is not the digest of its public area", uint32(h))
	}
	return &object{handle: h, public: *pub, name: *name}, nil
}

// What a session encrypts. A command takes encryption of its first parameter
// only where that is a sized buffer (TPM 2.0 Part 1, 21).
func encryptInOut() tpm2.AuthOption { return tpm2.AESEncryption(128, tpm2.EncryptInOut) }
func encryptIn() tpm2.AuthOption    { return tpm2.AESEncryption(128, tpm2.EncryptIn) }
func encryptOut() tpm2.AuthOption   { return tpm2.AESEncryption(128, tpm2.EncryptOut) }

// withSession runs fn with an HMAC session salted by the given key and flushes
// the session afterwards.
func (c *conn) withSession(salt *object, fn func(tpm2.Session) error, opts ...tpm2.AuthOption) error {
	s, err := c.startSession(salt, opts...)
	if err != nil {
		return err
	}
	defer c.flush(s.Handle())
	return fn(s)
}

// startSession starts an HMAC session salted by the given key.
func (c *conn) startSession(salt *object, opts ...tpm2.AuthOption) (tpm2.Session, error) {
	opts = append([]tpm2.AuthOption{tpm2.Salted(salt.handle, salt.public)}, opts...)
	s, _, err := tpm2.HMACSession(c, tpm2.TPMAlgSHA256, 16, opts...)
	return s, err
}

// newAuthSession authorizes a command that changes the authorization value of
// its own handle: the TPM authenticates the response with the new value
// (TPM 2.0 Part 1, 19.6.5). auth is the buffer given to tpm2.Auth; all zero
// means the empty authorization value.
type newAuthSession struct {
	tpm2.Session
	auth, next []byte
}

func (s *newAuthSession) Validate(rc tpm2.TPMRC, cc tpm2.TPMCC, parms []byte, names []tpm2.TPM2BName, i int, a *tpm2.TPMSAuthResponse) error {
	copy(s.auth, s.next)
	return s.Session.Validate(rc, cc, parms, names, i, a)
}
