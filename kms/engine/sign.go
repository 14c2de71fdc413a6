package engine

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/pem"
	"errors"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

// Sign signs under the primary version.
func (e *Engine) Sign(ctx context.Context, c Caller, ring, key string, q wire.SignRequest) (wire.SignResponse, error) {
	return one(ctx, e, c, ActSign, ring, key, q, sign)
}

// SignBatch is Sign for several items.
func (e *Engine) SignBatch(ctx context.Context, c Caller, ring, key string, b wire.Batch[wire.SignRequest]) (wire.BatchResult[wire.SignResponse], error) {
	return many(ctx, e, c, ActSign, ring, key, b, sign)
}

// Verify says whether a signature is right, at any node: it needs the public key
// alone. A wrong one is an answer, no error.
func (e *Engine) Verify(ctx context.Context, c Caller, ring, key string, q wire.VerifyRequest) (wire.VerifyResponse, error) {
	return one(ctx, e, c, ActVerify, ring, key, q, verify)
}

// VerifyBatch is Verify for several items.
func (e *Engine) VerifyBatch(ctx context.Context, c Caller, ring, key string, b wire.Batch[wire.VerifyRequest]) (wire.BatchResult[wire.VerifyResponse], error) {
	return many(ctx, e, c, ActVerify, ring, key, b, verify)
}

// PublicKey returns the public key of an active version, 0 for the primary, at
// any node.
func (e *Engine) PublicKey(ctx context.Context, c Caller, ring, key string, version uint32) (wire.PublicKeyResponse, error) {
	return one(ctx, e, c, ActPublicKey, ring, key, version, publicKey)
}

// Export seals a data key or the material of an active version to a recipient.
// The latter is the action ActExportMaterial, which the default access policy
// gives to nobody.
func (e *Engine) Export(ctx context.Context, c Caller, ring, key string, q wire.ExportRequest) (wire.ExportResponse, error) {
	return one(ctx, e, c, exportAction(q), ring, key, q, exportFor(c))
}

// ExportBatch is Export for several items, all data keys or all versions.
func (e *Engine) ExportBatch(ctx context.Context, c Caller, ring, key string, b wire.Batch[wire.ExportRequest]) (wire.BatchResult[wire.ExportResponse], error) {
	act := ActExport
	for _, q := range b.Items {
		if exportAction(q) == ActExportMaterial {
			act = ActExportMaterial // of the two what is permitted to fewer
		}
	}
	return many(ctx, e, c, act, ring, key, b, exportFor(c))
}

func exportAction(q wire.ExportRequest) Action {
	if len(q.Wrapped) == 0 {
		return ActExportMaterial
	}
	return ActExport
}

func sign(u *use, it *item, q wire.SignRequest) (wire.SignResponse, error) {
	if err := checkSize("the message", len(q.Message)); err != nil {
		return wire.SignResponse{}, err
	}
	m, n, err := u.primaryMaterial()
	it.version = n
	if err != nil {
		return wire.SignResponse{}, err
	}
	s, err := m.Sign(u.ctx, q.Message)
	if err != nil {
		return wire.SignResponse{}, err
	}
	return wire.SignResponse{Signature: s, Algorithm: string(u.key.Algorithm), KeyVersion: n}, nil
}

func verify(u *use, it *item, q wire.VerifyRequest) (wire.VerifyResponse, error) {
	if err := checkSize("the message", len(q.Message)); err != nil {
		return wire.VerifyResponse{}, err
	}
	n, err := u.chosen(q.KeyVersion)
	it.version = n
	if err != nil {
		return wire.VerifyResponse{}, err
	}
	v, err := u.public(n)
	if err != nil {
		return wire.VerifyResponse{}, err
	}
	err = keyring.Verify(u.key.Algorithm, v.PublicKey, q.Message, q.Signature)
	if err != nil && !errors.Is(err, kms.BadSignature) {
		return wire.VerifyResponse{}, err
	}
	return wire.VerifyResponse{Valid: err == nil, KeyVersion: n}, nil
}

func publicKey(u *use, it *item, version uint32) (wire.PublicKeyResponse, error) {
	n, err := u.chosen(version)
	it.version = n
	if err != nil {
		return wire.PublicKeyResponse{}, err
	}
	v, err := u.public(n)
	if err != nil {
		return wire.PublicKeyResponse{}, err
	}
	text, err := publicPEM(u.key.Algorithm, v.PublicKey)
	if err != nil {
		return wire.PublicKeyResponse{}, err
	}
	return wire.PublicKeyResponse{
		PublicKey: v.PublicKey, PEM: text, Algorithm: string(u.key.Algorithm), KeyVersion: n, State: string(v.State),
	}, nil
}

// public returns a version whose public key is to be used.
func (u *use) public(n uint32) (state.Version, error) {
	v, err := u.version(n)
	if err == nil {
		note(u.e.uses.of(u.id, n), u.hour)
	}
	return v, err
}

// publicPEM returns a stored public key as SubjectPublicKeyInfo in PEM.
func publicPEM(a kms.Algorithm, b []byte) (string, error) {
	var pub any
	var err error
	switch a {
	case kms.ECDSAP256:
		pub, err = ecdsa.ParseUncompressedPublicKey(elliptic.P256(), b)
	case kms.ECDSAP384:
		pub, err = ecdsa.ParseUncompressedPublicKey(elliptic.P384(), b)
	case kms.Ed25519:
		if len(b) != ed25519.PublicKeySize {
			err = errors.New("wrong length")
		}
		pub = ed25519.PublicKey(b)
	default:
		err = errors.New("no public key")
	}
	if err != nil {
		return "", kms.Wrap(kms.Internal, err, "the stored public key cannot be read", "")
	}
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return "", kms.Wrap(kms.Internal, err, "the stored public key cannot be encoded", "")
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})), nil
}

// exportFor returns the export of an item to the recipient it names, bound to
// the caller.
func exportFor(c Caller) func(*use, *item, wire.ExportRequest) (wire.ExportResponse, error) {
	return func(u *use, it *item, q wire.ExportRequest) (wire.ExportResponse, error) {
		if exportAction(q) != u.rq.act {
			return wire.ExportResponse{}, kms.Errorf(kms.Invalid, "a batch exports either data keys or versions of the key, not both")
		}
		suite, ok := pqc.ByName(q.RecipientSuite)
		if !ok || suite.Kind != pqc.KEM {
			return wire.ExportResponse{}, kms.Errorf(kms.Invalid, "recipient_suite %q is none of %v, %v, %v",
				q.RecipientSuite, pqc.MLKEM1024P384, pqc.MLKEM768P256, pqc.XWing)
		}
		pub, err := pqc.ParsePublicKey(suite.ID, q.RecipientPublicKey)
		if err != nil {
			return wire.ExportResponse{}, kms.Wrap(kms.Invalid, err, "recipient_public_key is not a public key of "+suite.Name, "")
		}
		payload, kind, err := exported(u, it, q)
		if err != nil {
			return wire.ExportResponse{}, err
		}
		defer payload.Destroy()
		r := wire.ExportResponse{
			Suite: suite.Name, Cluster: u.st.Cluster(), KeyID: u.id.String(), KeyVersion: it.version,
			Kind: kind, Identity: c.Identity.String(),
		}
		aad := wire.ExportAAD(r.Cluster, r.KeyID, r.KeyVersion, r.Kind, r.Identity)
		if r.Sealed, err = pub.Seal([]byte(wire.ExportInfo), aad, payload.Reveal()); err != nil {
			return wire.ExportResponse{}, kms.Wrap(kms.Internal, err, "sealing to the recipient failed", "")
		}
		return r, nil
	}
}

// exported returns what an export request asks for, and its kind.
func exported(u *use, it *item, q wire.ExportRequest) (*secret.Bytes, string, error) {
	if (len(q.Wrapped) > 0) == (q.Version > 0) {
		return nil, "", kms.Errorf(kms.Invalid, "give either wrapped or version")
	}
	if len(q.Wrapped) > 0 {
		p, err := open(u, it, q.Context, q.Wrapped)
		if err != nil {
			return nil, "", err
		}
		s, err := secret.Move(p)
		return s, wire.ExportDataKey, err
	}
	it.version = q.Version
	if u.ring.Protection == kms.Hardware {
		return nil, "", keyring.ErrNoExport
	}
	m, err := u.material(q.Version)
	if err != nil {
		return nil, "", err
	}
	s, err := m.Export()
	return s, wire.ExportMaterial, err
}
