package tpm

import (
	"context"
	"crypto/ecdh"
	"crypto/subtle"
	"errors"
	"runtime"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/kms/secret"
)

// ECDH returns the raw shared secret Z of the agreement key and peer: the
// x-coordinate, left-padded to the field length (48 bytes for P-384, 32 for
// P-256; SP 800-56A 5.7.1.2). A peer on another curve is ErrInvalid.
func (d *Device) ECDH(ctx context.Context, peer *ecdh.PublicKey) ([]byte, error) {
	if peer == nil || peer.Curve() != d.suite.curve {
		return nil, invalid("the peer's key is not on %s", d.suite.name)
	}
	raw := peer.Bytes()[1:]
	n := d.suite.field
	point := tpm2.New2B(tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: raw[:n]},
		Y: tpm2.TPM2BECCParameter{Buffer: raw[n:]},
	})
	return do(ctx, d, call[[]byte]{op: "ECDH", drop: secret.Wipe, fn: func(c *conn) (z []byte, err error) {
		err = d.withDeviceKey(c, encryptInOut(), func(s tpm2.Session) error {
			rsp, err := (tpm2.ECDHZGen{KeyHandle: d.agreement.auth(s), InPoint: point}).Execute(c)
			if err != nil {
				return err
			}
			out, err := rsp.OutPoint.Contents()
			if err != nil {
				return err
			}
			defer secret.Wipe(out.X.Buffer)
			defer secret.Wipe(out.Y.Buffer)
			z = make([]byte, n)
			if !leftPad(z, out.X.Buffer) {
				return unavailable("ECDH: the TPM returned a coordinate of %d bytes", len(out.X.Buffer))
			}
			return nil
		})
		return z, err
	}})
}

// Sign returns the ECDSA signature of a digest, r and s each left-padded to the
// field length (96 bytes for P-384 with a SHA-384 digest, 64 for P-256 with
// SHA-256). A digest of another length is ErrInvalid.
func (d *Device) Sign(ctx context.Context, digest []byte) ([]byte, error) {
	if len(digest) != d.suite.digest {
		return nil, invalid("the digest has %d bytes, %s signs %d", len(digest), d.suite.name, d.suite.digest)
	}
	in := append([]byte(nil), digest...)
	return do(ctx, d, call[[]byte]{op: "sign", fn: func(c *conn) (sig []byte, err error) {
		err = d.withDeviceKey(c, encryptIn(), func(s tpm2.Session) error {
			sig, err = d.suite.ecdsa(c, d.signing.auth(s), in)
			return err
		})
		return sig, err
	}})
}

// ecdsa signs a digest with a key on the suite's curve.
func (s *suite) ecdsa(c *conn, key tpm2.AuthHandle, digest []byte) ([]byte, error) {
	rsp, err := (tpm2.Sign{
		KeyHandle: key,
		Digest:    tpm2.TPM2BDigest{Buffer: digest},
		InScheme: tpm2.TPMTSigScheme{
			Scheme:  tpm2.TPMAlgECDSA,
			Details: tpm2.NewTPMUSigScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSchemeHash{HashAlg: s.hash}),
		},
		Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck},
	}).Execute(c)
	if err != nil {
		return nil, err
	}
	ecc, err := rsp.Signature.Signature.ECDSA()
	if err != nil {
		return nil, err
	}
	sig := make([]byte, 2*s.field)
	if !leftPad(sig[:s.field], ecc.SignatureR.Buffer) || !leftPad(sig[s.field:], ecc.SignatureS.Buffer) {
		return nil, unavailable("sign: the TPM returned an overlong signature")
	}
	return sig, nil
}

// Wrap TPM-seals 1 to 96 bytes of key under the storage key, bound to aad. Only
// this TPM opens the result. Other lengths are ErrInvalid.
func (d *Device) Wrap(ctx context.Context, aad, key []byte) ([]byte, error) {
	if len(key) < 1 || len(key) > maxWrappedKey {
		return nil, invalid("a key to be wrapped has 1 to %d bytes, not %d", maxWrappedKey, len(key))
	}
	data, err := secret.Move(append(aadHash(aad), key...))
	if err != nil {
		return nil, err
	}
	return do(ctx, d, call[[]byte]{op: "wrap", after: data.Destroy, fn: func(c *conn) (blob []byte, err error) {
		err = d.withKeyAuth(c, encryptInOut(), func(s tpm2.Session) error {
			rsp, err := (tpm2.Create{
				ParentHandle: d.storage.auth(s),
				InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
					UserAuth: tpm2.TPM2BAuth{Buffer: d.auth.key.Reveal()},
					Data:     tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: data.Reveal()}),
				}},
				InPublic: tpm2.New2B(d.suite.sealed()),
			}).Execute(c)
			runtime.KeepAlive(data)
			if err != nil {
				return err
			}
			blob = encodeBlob(rsp.OutPublic.Bytes(), rsp.OutPrivate.Buffer)
			if _, _, ok := d.suite.parseBlob(blob); !ok {
				return unavailable("wrap: the TPM returned another object than asked for")
			}
			return nil
		})
		return blob, err
	}})
}

// errUnwrap is the one answer to every wrapped key that does not open.
var errUnwrap = invalid("the wrapped key does not open with this TPM and associated data")

// Unwrap opens what Wrap made with the same aad. A wrapped key that was
// altered, made by another TPM or bound to other aad is ErrInvalid, always with
// the same text. The caller destroys the result.
func (d *Device) Unwrap(ctx context.Context, aad, wrapped []byte) (*secret.Bytes, error) {
	pub, priv, ok := d.suite.parseBlob(append([]byte(nil), wrapped...))
	if !ok {
		return nil, errUnwrap
	}
	want := aadHash(aad)
	return do(ctx, d, call[*secret.Bytes]{op: "unwrap", drop: (*secret.Bytes).Destroy, fn: func(c *conn) (key *secret.Bytes, err error) {
		// TPM2_Unseal has no parameter to encrypt on the way in, and what
		// TPM2_Load gets is encrypted by the storage key already.
		err = d.withKeyAuth(c, encryptOut(), func(s tpm2.Session) error {
			loaded, err := (tpm2.Load{
				ParentHandle: d.storage.auth(s),
				InPrivate:    tpm2.TPM2BPrivate{Buffer: priv},
				InPublic:     tpm2.BytesAs2B[tpm2.TPMTPublic](pub),
			}).Execute(c)
			if err != nil {
				return refusedBlob(err, errUnwrap)
			}
			defer c.flush(loaded.ObjectHandle)
			item := object{handle: loaded.ObjectHandle, name: loaded.Name}
			rsp, err := (tpm2.Unseal{ItemHandle: item.auth(s)}).Execute(c)
			if errors.Is(err, tpm2.TPMRCBadAuth) || errors.Is(err, tpm2.TPMRCAuthFail) {
				return errUnwrap // sealed under our storage key, but not by us
			}
			if err != nil {
				return err
			}
			key, err = openSealed(rsp.OutData.Buffer, want)
			return err
		})
		return key, err
	}})
}

// openSealed checks the aad hash in front of the key and wipes data.
func openSealed(data, want []byte) (*secret.Bytes, error) {
	defer secret.Wipe(data)
	n := len(want)
	if len(data) <= n || len(data) > n+maxWrappedKey || subtle.ConstantTimeCompare(data[:n], want) != 1 {
		return nil, errUnwrap
	}
	return secret.Copy(data[n:])
}

// refusedBlob tells a private area that TPM2_Load or TPM2_Import refuses from
// other failures, and gives refused for it.
func refusedBlob(err, refused error) error {
	var f tpm2.TPMFmt1Error
	if errors.As(err, &f) {
		if onParameter, _ := f.Parameter(); onParameter {
			return refused
		}
		if errors.Is(err, tpm2.TPMRCIntegrity) || errors.Is(err, tpm2.TPMRCBinding) {
			return refused
		}
	}
	if errors.Is(err, tpm2.TPMRCSensitive) {
		return refused
	}
	return err
}

// A TPM returns at most 64 bytes a command, and lets other calls in between
// after so many commands.
const (
	randomChunk = 64
	randomBatch = 32
)

// Random fills b, of any length, from the TPM's random number generator.
func (d *Device) Random(ctx context.Context, b []byte) error {
	for len(b) > 0 {
		n := min(len(b), randomChunk*randomBatch)
		got, err := d.randomBatch(ctx, n)
		if err != nil {
			clear(b)
			return err
		}
		copy(b, got)
		secret.Wipe(got)
		b = b[n:]
	}
	return nil
}

func (d *Device) randomBatch(ctx context.Context, n int) ([]byte, error) {
	return do(ctx, d, call[[]byte]{op: "random", drop: secret.Wipe, fn: func(c *conn) ([]byte, error) {
		out := make([]byte, 0, n)
		err := c.withSession(d.storage, func(s tpm2.Session) error {
			for len(out) < n {
				rsp, err := (tpm2.GetRandom{BytesRequested: uint16(min(n-len(out), randomChunk))}).Execute(c, s)
				if err != nil {
					return err
				}
				got := rsp.RandomBytes.Buffer
				if len(got) == 0 || len(got) > n-len(out) {
					return unavailable("random: the TPM returned %d bytes", len(got))
				}
				out = append(out, got...)
				secret.Wipe(got)
			}
			return nil
		}, encryptOut())
		return out, err
	}})
}

// withKeyAuth runs fn with a session that proves knowledge of the keys'
// authorization value to the TPM, and of the TPM to us.
func (d *Device) withKeyAuth(c *conn, crypt tpm2.AuthOption, fn func(tpm2.Session) error) error {
	return c.withSession(d.storage, fn, crypt, tpm2.Auth(d.auth.key.Reveal()))
}
