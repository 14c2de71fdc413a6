package tpm

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"errors"
	"sync/atomic"

	"github.com/google/go-tpm/tpm2"
)

// MaxMessage is the longest message that a loaded HMAC key takes, in bytes.
const MaxMessage = 64 << 10

var (
	// errImport is the one answer to every key blob that does not open.
	errImport = invalid("the key blob does not open with this TPM for this use")
	// errUnloaded answers the use of a key after unload.
	errUnloaded = invalid("the key was unloaded")
)

// importedKey is a key from outside. After TPM2_Import the TPM's own wrapping of
// it is all that is needed to load it again.
type importedKey struct {
	pub, private, name []byte
	unloaded           atomic.Bool
}

// keptKey is an imported key that stays loaded between calls, and the session
// for its use.
type keptKey struct {
	key     *importedKey
	obj     object
	session tpm2.Session
}

// ImportKey returns how others wrap a key for this TPM: ImportKind
// and the marshalled TPMT_PUBLIC of the storage key, for WrapHMAC and WrapSigner.
func (d *Device) ImportKey() (kind string, public []byte) {
	return ImportKind, bytes.Clone(d.importPub)
}

// LoadHMAC imports a key that WrapHMAC wrapped for this TPM. mac returns the
// HMAC-SHA-256, 32 bytes, of a message of at most MaxMessage bytes. It loads the key
// again by itself when the TPM lost it, for instance in a restart. unload lets
// go of the key and may be called more than once; mac is refused with ErrInvalid
// from then on. A blob that was altered, or made for another TPM or use, is
// ErrInvalid.
func (d *Device) LoadHMAC(ctx context.Context, blob []byte) (mac func(ctx context.Context, message []byte) ([]byte, error), unload func(), err error) {
	k, err := d.importBlob(ctx, importHMAC, blob)
	if err != nil {
		return nil, nil, err
	}
	mac = func(ctx context.Context, message []byte) ([]byte, error) { return d.mac(ctx, k, message) }
	return mac, func() { d.unload(k) }, nil
}

// LoadSigner imports an ECDSA key on P-256 or P-384 that WrapSigner wrapped for
// this TPM. sign takes a SHA-256 or SHA-384 digest, of the curve's length, and
// returns r and s, each left-padded to the field length. The rest is as in
// LoadHMAC.
func (d *Device) LoadSigner(ctx context.Context, curve ecdh.Curve, blob []byte) (sign func(ctx context.Context, digest []byte) ([]byte, error), unload func(), err error) {
	kind, ok := signerType(curve)
	if !ok {
		return nil, nil, invalid("a signing key is on P-256 or P-384")
	}
	k, err := d.importBlob(ctx, kind, blob)
	if err != nil {
		return nil, nil, err
	}
	on := kind.signer()
	sign = func(ctx context.Context, digest []byte) ([]byte, error) { return d.signWith(ctx, k, on, digest) }
	return sign, func() { d.unload(k) }, nil
}

func (d *Device) importBlob(ctx context.Context, kind importType, blob []byte) (*importedKey, error) {
	b, ok := d.suite.parseImport(bytes.Clone(blob))
	if !ok || b.kind != kind {
		return nil, errImport
	}
	return do(ctx, d, call[*importedKey]{op: "import", fn: func(c *conn) (*importedKey, error) { return d.importObject(c, b) }})
}

// importObject imports a key and gives it the authorization value of the
// others, which whoever wrapped it could not know.
func (d *Device) importObject(c *conn, b *importBlob) (*importedKey, error) {
	k := &importedKey{pub: b.pub, name: d.suite.objectName(b.pub)}
	var obj *object
	err := d.withKeyAuth(c, encryptInOut(), func(s tpm2.Session) error {
		rsp, err := (tpm2.Import{
			ParentHandle: d.storage.auth(s),
			ObjectPublic: tpm2.BytesAs2B[tpm2.TPMTPublic](b.pub),
			Duplicate:    tpm2.TPM2BPrivate{Buffer: b.duplicate},
			InSymSeed:    tpm2.TPM2BEncryptedSecret{Buffer: b.point},
			Symmetric:    tpm2.TPMTSymDef{Algorithm: tpm2.TPMAlgNull},
		}).Execute(c)
		if err != nil {
			return refusedBlob(err, errImport)
		}
		k.private = rsp.OutPrivate.Buffer
		obj, err = d.loadObject(c, s, k)
		return err
	})
	if err != nil {
		return nil, err
	}
	defer c.flush(obj.handle)
	if k.private, err = d.takeOver(c, obj); err != nil {
		return nil, err
	}
	return k, nil
}

// takeOver gives a key with the empty authorization value that of the others and
// returns its new private area.
func (d *Device) takeOver(c *conn, obj *object) (private []byte, err error) {
	err = c.withSession(d.storage, func(s tpm2.Session) error {
		rsp, err := (tpm2.ObjectChangeAuth{
			ObjectHandle: obj.auth(s),
			ParentHandle: d.storage.named(),
			NewAuth:      tpm2.TPM2BAuth{Buffer: d.auth.key.Reveal()},
		}).Execute(c)
		if err != nil {
			return err
		}
		private = bytes.Clone(rsp.OutPrivate.Buffer) // the response is wiped at the end of the call
		return nil
	}, encryptInOut())
	return private, err
}

func (d *Device) loadObject(c *conn, s tpm2.Session, k *importedKey) (*object, error) {
	rsp, err := (tpm2.Load{
		ParentHandle: d.storage.auth(s),
		InPrivate:    tpm2.TPM2BPrivate{Buffer: k.private},
		InPublic:     tpm2.BytesAs2B[tpm2.TPMTPublic](k.pub),
	}).Execute(c)
	if err != nil {
		return nil, refusedBlob(err, errImport)
	}
	if !bytes.Equal(rsp.Name.Buffer, k.name) {
		c.flush(rsp.ObjectHandle)
		return nil, unavailable("the TPM loaded another object than asked for")
	}
	return &object{handle: rsp.ObjectHandle, name: tpm2.TPM2BName{Buffer: k.name}}, nil
}

// use runs a command with an imported key, which it loads unless it is the one
// that is kept. A kept key that the TPM refuses, because it restarted or because
// somebody flushed or replaced the object or the session, is loaded again. After
// any failure nothing is kept: the nonces of the session may have parted.
func (d *Device) use(c *conn, k *importedKey, crypt tpm2.AuthOption, fn func(*object, tpm2.Session) error) error {
	if k.unloaded.Load() {
		return errUnloaded
	}
	with := func() error {
		kept, err := d.keep(c, k, crypt)
		if err == nil {
			err = fn(&kept.obj, kept.session)
		}
		if err != nil {
			d.letGo(c)
		}
		return err
	}
	before := d.kept.Load()
	err := with()
	var refused tpm2.TPMRC
	if before != nil && before.key == k && c.err == nil && errors.As(err, &refused) && !distrusts(err) {
		err = with()
	}
	if k.unloaded.Load() { // while this call ran
		d.letGo(c)
	}
	return err
}

// keep makes k the one key that stays loaded, with a session for it: a TPM may
// have three slots, and TPM2_Load of another key or TPM2_Create needs two of them.
func (d *Device) keep(c *conn, k *importedKey, crypt tpm2.AuthOption) (*keptKey, error) {
	if kept := d.kept.Load(); kept != nil && kept.key == k {
		return kept, nil
	}
	d.letGo(c)
	s, err := c.startSession(d.storage, crypt, tpm2.Auth(d.auth.key.Reveal()))
	if err != nil {
		return nil, err
	}
	o, err := d.loadObject(c, s, k)
	if err != nil {
		c.flush(s.Handle())
		return nil, err
	}
	kept := &keptKey{k, *o, s}
	d.kept.Store(kept)
	return kept, nil
}

// letGo flushes the kept key and its session, if any. That they are gone already
// is no failure.
func (d *Device) letGo(c *conn) {
	kept := d.kept.Swap(nil)
	if kept == nil {
		return
	}
	for _, h := range []tpm2.TPMHandle{kept.obj.handle, kept.session.Handle()} {
		if c.err != nil {
			return
		}
		_, err := (tpm2.FlushContext{FlushHandle: h}).Execute(c)
		if err != nil && !errors.Is(err, tpm2.TPMRCHandle) {
			c.fail(errors.New("flushing a handle failed"))
		}
	}
}

// unload makes the key unusable and flushes it if it is the kept one. It waits
// at most for its turn and the call.
func (d *Device) unload(k *importedKey) {
	k.unloaded.Store(true)
	if kept := d.kept.Load(); kept == nil || kept.key != k {
		return // a call that is loading it flushes it itself
	}
	// A TPM that does not answer now loses the key with its connection.
	_ = d.run(context.Background(), "unload", func(c *conn) error {
		if kept := d.kept.Load(); kept != nil && kept.key == k {
			d.letGo(c)
		}
		return nil
	})
}

func (d *Device) signWith(ctx context.Context, k *importedKey, on *suite, digest []byte) ([]byte, error) {
	if len(digest) != on.digest {
		return nil, invalid("the digest has %d bytes, %s signs %d", len(digest), on.name, on.digest)
	}
	if k.unloaded.Load() {
		return nil, errUnloaded
	}
	in := bytes.Clone(digest)
	return do(ctx, d, call[[]byte]{op: "sign", fn: func(c *conn) (sig []byte, err error) {
		err = d.use(c, k, encryptIn(), func(o *object, s tpm2.Session) (err error) {
			sig, err = on.ecdsa(c, o.auth(s), in)
			return err
		})
		return sig, err
	}})
}

// storagePublic is the storage key's public area with a full-length point.
func (d *Device) storagePublic() ([]byte, error) {
	pub, err := d.suite.publicKey(d.storage)
	if err != nil {
		return nil, err
	}
	area := d.suite.storage()
	area.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, eccPoint(d.suite, pub))
	return tpm2.Marshal(area), nil
}
