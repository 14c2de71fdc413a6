package engine

import (
	"context"
	"crypto/rand"
	"errors"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/kms/wire"
)

// Every method below is a data operation on the key ring/key. Errors, beside
// those of the single operation: kms.Denied, kms.NotFound, kms.Conflict (the
// key's or version's state does not allow it), kms.Stale, kms.NotResident,
// kms.Unavailable (the device), kms.ReadOnly (the access log). The Batch form
// carries out up to wire.MaxBatch items; an item's failure is in its result.

// Encrypt encrypts under the primary version.
func (e *Engine) Encrypt(ctx context.Context, c Caller, ring, key string, q wire.EncryptRequest) (wire.EncryptResponse, error) {
	return one(ctx, e, c, ActEncrypt, ring, key, q, encrypt)
}

// EncryptBatch is Encrypt for several items.
func (e *Engine) EncryptBatch(ctx context.Context, c Caller, ring, key string, b wire.Batch[wire.EncryptRequest]) (wire.BatchResult[wire.EncryptResponse], error) {
	return many(ctx, e, c, ActEncrypt, ring, key, b, encrypt)
}

// Decrypt opens a ciphertext or wrapped data key of this key; whatever is wrong
// with it, the error is kms.ErrOpen.
func (e *Engine) Decrypt(ctx context.Context, c Caller, ring, key string, q wire.DecryptRequest) (wire.DecryptResponse, error) {
	return one(ctx, e, c, ActDecrypt, ring, key, q, decrypt)
}

// DecryptBatch is Decrypt for several items.
func (e *Engine) DecryptBatch(ctx context.Context, c Caller, ring, key string, b wire.Batch[wire.DecryptRequest]) (wire.BatchResult[wire.DecryptResponse], error) {
	return many(ctx, e, c, ActDecrypt, ring, key, b, decrypt)
}

// Rewrap moves a ciphertext or wrapped data key to the primary version without
// revealing what it holds.
func (e *Engine) Rewrap(ctx context.Context, c Caller, ring, key string, q wire.RewrapRequest) (wire.EncryptResponse, error) {
	return one(ctx, e, c, ActRewrap, ring, key, q, rewrap)
}

// RewrapBatch is Rewrap for several items.
func (e *Engine) RewrapBatch(ctx context.Context, c Caller, ring, key string, b wire.Batch[wire.RewrapRequest]) (wire.BatchResult[wire.EncryptResponse], error) {
	return many(ctx, e, c, ActRewrap, ring, key, b, rewrap)
}

// DataKey makes a data key and returns it both in the clear and wrapped.
func (e *Engine) DataKey(ctx context.Context, c Caller, ring, key string, q wire.DataKeyRequest) (wire.DataKeyResponse, error) {
	return one(ctx, e, c, ActDataKey, ring, key, q, dataKey)
}

// DataKeyBatch is DataKey for several items.
func (e *Engine) DataKeyBatch(ctx context.Context, c Caller, ring, key string, b wire.Batch[wire.DataKeyRequest]) (wire.BatchResult[wire.DataKeyResponse], error) {
	return many(ctx, e, c, ActDataKey, ring, key, b, dataKey)
}

// WrappedDataKey makes a data key and returns it wrapped only.
func (e *Engine) WrappedDataKey(ctx context.Context, c Caller, ring, key string, q wire.DataKeyRequest) (wire.WrappedDataKeyResponse, error) {
	return one(ctx, e, c, ActDataKeyWrapped, ring, key, q, wrappedDataKey)
}

// WrappedDataKeyBatch is WrappedDataKey for several items.
func (e *Engine) WrappedDataKeyBatch(ctx context.Context, c Caller, ring, key string, b wire.Batch[wire.DataKeyRequest]) (wire.BatchResult[wire.WrappedDataKeyResponse], error) {
	return many(ctx, e, c, ActDataKeyWrapped, ring, key, b, wrappedDataKey)
}

// MAC computes an HMAC under the primary version.
func (e *Engine) MAC(ctx context.Context, c Caller, ring, key string, q wire.MACRequest) (wire.MACResponse, error) {
	return one(ctx, e, c, ActMAC, ring, key, q, mac)
}

// MACBatch is MAC for several items.
func (e *Engine) MACBatch(ctx context.Context, c Caller, ring, key string, b wire.Batch[wire.MACRequest]) (wire.BatchResult[wire.MACResponse], error) {
	return many(ctx, e, c, ActMAC, ring, key, b, mac)
}

// VerifyMAC says whether an HMAC is right; a wrong one is an answer, no error.
func (e *Engine) VerifyMAC(ctx context.Context, c Caller, ring, key string, q wire.VerifyMACRequest) (wire.VerifyResponse, error) {
	return one(ctx, e, c, ActVerifyMAC, ring, key, q, verifyMAC)
}

// VerifyMACBatch is VerifyMAC for several items.
func (e *Engine) VerifyMACBatch(ctx context.Context, c Caller, ring, key string, b wire.Batch[wire.VerifyMACRequest]) (wire.BatchResult[wire.VerifyResponse], error) {
	return many(ctx, e, c, ActVerifyMAC, ring, key, b, verifyMAC)
}

func checkSize(what string, n int) error {
	if n > wire.MaxPlaintext {
		return kms.Errorf(kms.TooLarge, "%s has %d bytes; the limit is %d", what, n, wire.MaxPlaintext)
	}
	return nil
}

// see checks the item's encryption context and remembers it for the access log.
func (it *item) see(c wire.Context) error {
	if err := checkContext(c); err != nil {
		return err
	}
	it.context = c
	return nil
}

func encrypt(u *use, it *item, q wire.EncryptRequest) (wire.EncryptResponse, error) {
	if err := checkSize("the plaintext", len(q.Plaintext)); err != nil {
		return wire.EncryptResponse{}, err
	}
	return seal(u, it, q.Context, q.Plaintext)
}

// seal encrypts under the primary version.
func seal(u *use, it *item, context wire.Context, plaintext []byte) (wire.EncryptResponse, error) {
	if err := it.see(context); err != nil {
		return wire.EncryptResponse{}, err
	}
	m, n, err := u.primaryMaterial()
	it.version = n
	if err != nil {
		return wire.EncryptResponse{}, err
	}
	ct, err := m.Encrypt(u.ctx, context, plaintext)
	if err != nil {
		return wire.EncryptResponse{}, err
	}
	return wire.EncryptResponse{Ciphertext: ct, KeyVersion: n}, nil
}

// open decrypts with the version that the ciphertext names, if it is one of
// this key.
func open(u *use, it *item, context wire.Context, ciphertext []byte) ([]byte, error) {
	if err := it.see(context); err != nil {
		return nil, err
	}
	h, err := keyring.ParseHeader(ciphertext)
	if err != nil || h.KeyID != u.id {
		return nil, kms.ErrOpen
	}
	it.version = h.Version
	m, err := u.material(h.Version)
	if errors.Is(err, kms.NotFound) {
		return nil, kms.ErrOpen
	}
	if err != nil {
		return nil, err
	}
	return m.Decrypt(u.ctx, context, ciphertext)
}

func decrypt(u *use, it *item, q wire.DecryptRequest) (wire.DecryptResponse, error) {
	p, err := open(u, it, q.Context, q.Ciphertext)
	if err != nil {
		return wire.DecryptResponse{}, err
	}
	return wire.DecryptResponse{Plaintext: p, KeyVersion: it.version}, nil
}

func rewrap(u *use, it *item, q wire.RewrapRequest) (wire.EncryptResponse, error) {
	p, err := open(u, it, q.Context, q.Ciphertext)
	if err != nil {
		return wire.EncryptResponse{}, err
	}
	defer secret.Wipe(p)
	return seal(u, it, q.Context, p)
}

func dataKey(u *use, it *item, q wire.DataKeyRequest) (wire.DataKeyResponse, error) {
	n := q.Bytes
	switch n {
	case 0:
		n = 32
	case 16, 32, 64:
	default:
		return wire.DataKeyResponse{}, kms.Errorf(kms.Invalid, "a data key has 16, 32 or 64 bytes, not %d", n)
	}
	k := make([]byte, n)
	_, _ = rand.Read(k) // never fails: it ends the process instead
	w, err := seal(u, it, q.Context, k)
	if err != nil {
		secret.Wipe(k)
		return wire.DataKeyResponse{}, err
	}
	return wire.DataKeyResponse{Plaintext: k, Wrapped: w.Ciphertext, KeyVersion: w.KeyVersion}, nil
}

func wrappedDataKey(u *use, it *item, q wire.DataKeyRequest) (wire.WrappedDataKeyResponse, error) {
	r, err := dataKey(u, it, q)
	secret.Wipe(r.Plaintext)
	return wire.WrappedDataKeyResponse{Wrapped: r.Wrapped, KeyVersion: r.KeyVersion}, err
}

func mac(u *use, it *item, q wire.MACRequest) (wire.MACResponse, error) {
	if err := checkSize("the message", len(q.Message)); err != nil {
		return wire.MACResponse{}, err
	}
	m, n, err := u.primaryMaterial()
	it.version = n
	if err != nil {
		return wire.MACResponse{}, err
	}
	t, err := m.MAC(u.ctx, q.Message)
	if err != nil {
		return wire.MACResponse{}, err
	}
	return wire.MACResponse{MAC: t, KeyVersion: n}, nil
}

// chosen returns the version asked for, the primary for 0.
func (u *use) chosen(n uint32) (uint32, error) {
	if n == 0 {
		return u.primary()
	}
	return n, nil
}

func verifyMAC(u *use, it *item, q wire.VerifyMACRequest) (wire.VerifyResponse, error) {
	if err := checkSize("the message", len(q.Message)); err != nil {
		return wire.VerifyResponse{}, err
	}
	n, err := u.chosen(q.KeyVersion)
	it.version = n
	if err != nil {
		return wire.VerifyResponse{}, err
	}
	m, err := u.material(n)
	if err != nil {
		return wire.VerifyResponse{}, err
	}
	err = m.VerifyMAC(u.ctx, q.Message, q.MAC)
	if err != nil && !errors.Is(err, kms.OpenFailed) {
		return wire.VerifyResponse{}, err
	}
	return wire.VerifyResponse{Valid: err == nil, KeyVersion: n}, nil
}
