package keyring

import (
	"cmp"
	"context"
	"crypto/ecdh"
	"errors"
	"runtime"
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
)

// Device is the agreement key of a hardware root.
type Device interface {
	AgreementKey() *ecdh.PublicKey
	ECDH(ctx context.Context, peer *ecdh.PublicKey) ([]byte, error)
}

// exchanger is the device's agreement key for the length of one call, whose
// context it carries because ecdh.KeyExchanger has no room for one.
type exchanger struct {
	ctx context.Context
	dev Device
	pub *ecdh.PublicKey
}

func (x exchanger) PublicKey() *ecdh.PublicKey { return x.pub }
func (x exchanger) Curve() ecdh.Curve          { return x.pub.Curve() }

func (x exchanger) ECDH(peer *ecdh.PublicKey) ([]byte, error) {
	if x.ctx == nil {
		return nil, errors.New("keyring: key exchange outside a call") // Root.OpenKEK always sets one
	}
	if err := x.ctx.Err(); err != nil {
		return nil, err
	}
	return x.dev.ECDH(x.ctx, peer)
}

// Root opens what was sealed to this node: the agreement key in its device
// joined with the ML-KEM key whose seed the device keeps wrapped. It is safe
// for concurrent use if the device is.
type Root struct {
	dev      Device
	hardware Hardware // dev, nil where it takes no keys
	pub      *ecdh.PublicKey
	priv     *pqc.PrivateKey
}

// NewRoot makes a Root for a KEM suite from the device and the 64-byte ML-KEM
// seed, which stays the caller's to destroy. A dev that is a Hardware (and a
// Generator, a Rewrapper) also holds the keys of protection hardware. kms.Invalid
// when device, suite and seed do not belong together.
func NewRoot(dev Device, suite pqc.SuiteID, seed *secret.Bytes) (*Root, error) {
	pub := dev.AgreementKey()
	if pub == nil {
		return nil, kms.Errorf(kms.Invalid, "the device has no agreement key; initialise it first")
	}
	priv, err := pqc.NewPrivateKey(suite, seed, exchanger{dev: dev, pub: pub})
	if err != nil {
		return nil, kms.Wrap(kms.Invalid, err, "the device's agreement key and the ML-KEM seed do not make a key of suite "+suite.String(), "check that the node's configuration names the device that it was initialised with")
	}
	hw, _ := dev.(Hardware)
	return &Root{dev: dev, hardware: hw, pub: pub, priv: priv}, nil
}

// PublicKey returns what KEKs are sealed to.
func (r *Root) PublicKey() *pqc.PublicKey { return r.priv.PublicKey() }

// KEKBinding is everything that a sealed copy of a KEK is bound to.
type KEKBinding struct {
	Cluster    string         // cluster id
	Keyring    string         // name
	Version    uint32         // of the KEK, from 1
	Node       string         // recipient; SealKEK sets it
	Protection kms.Protection // kms.Software
}

func (b KEKBinding) validate() error {
	if b.Cluster == "" || b.Keyring == "" || b.Version == 0 || b.Node == "" {
		return kms.Errorf(kms.Invalid, "KEK binding is incomplete: cluster, keyring, version and node are all needed")
	}
	if b.Protection != kms.Software {
		return kms.Errorf(kms.Invalid, "a keyring of protection %q has no KEK", string(b.Protection))
	}
	return nil
}

const (
	sealInfo = "conclave/kek/1/info"
	sealAAD  = "conclave/kek/1/aad"
)

// encode returns the canonical encoding of the binding under a domain string.
func (b KEKBinding) encode(domain string) []byte {
	return canon.Marshal(struct {
		Domain     string         `cbor:"domain"`
		Cluster    string         `cbor:"cluster"`
		Keyring    string         `cbor:"keyring"`
		Version    uint32         `cbor:"version"`
		Node       string         `cbor:"node"`
		Protection kms.Protection `cbor:"protection"`
	}{domain, b.Cluster, b.Keyring, b.Version, b.Node, b.Protection})
}

// OpenKEK opens this node's sealed copy of a KEK version; the caller destroys
// the KEK. A copy that was not made for exactly this binding and node is
// kms.ErrOpen; a device that does not answer, or ctx ending first, is
// kms.Unavailable with the cause wrapped.
func (r *Root) OpenKEK(ctx context.Context, b KEKBinding, sealed []byte) (*secret.Bytes, error) {
	if err := b.validate(); err != nil {
		return nil, err
	}
	priv := r.priv.WithExchanger(exchanger{ctx: ctx, dev: r.dev, pub: r.pub})
	kek, err := priv.Open(b.encode(sealInfo), b.encode(sealAAD), sealed)
	switch {
	case errors.Is(err, pqc.ErrDevice):
		return nil, deviceError(err, "open the KEK")
	case err != nil:
		return nil, kms.ErrOpen
	}
	if len(kek) != KEKSize {
		secret.Wipe(kek)
		return nil, kms.ErrOpen
	}
	s, err := secret.Move(kek)
	if err != nil {
		return nil, noMemory(err)
	}
	return s, nil
}

// Recipient is a node that a KEK is sealed to.
type Recipient struct {
	Node      string
	Suite     uint16 // pqc KEM suite
	PublicKey []byte // pqc.PublicKey.Bytes
}

// Sealed is one node's copy of a KEK.
type Sealed struct {
	Node   string
	Sealed []byte // pqc.PublicKey.Seal
}

// SealKEK seals a KEK to every recipient and returns the copies sorted by node.
// b.Node must be empty: each copy is bound to its own. No recipient, a
// recipient twice, or a public key that its suite does not accept is
// kms.Invalid.
func SealKEK(recipients []Recipient, b KEKBinding, kek *secret.Bytes) ([]Sealed, error) {
	if len(recipients) == 0 {
		return nil, kms.Errorf(kms.Invalid, "a KEK must be sealed to at least one node")
	}
	if b.Node != "" {
		return nil, kms.Errorf(kms.Invalid, "the binding of a KEK to seal already names node %q", b.Node)
	}
	if kek.Len() != KEKSize {
		return nil, kms.Errorf(kms.Invalid, "a KEK has %d bytes, not %d", KEKSize, kek.Len())
	}
	sorted := slices.SortedFunc(slices.Values(recipients), func(x, y Recipient) int { return cmp.Compare(x.Node, y.Node) })
	out := make([]Sealed, 0, len(sorted))
	for i, r := range sorted {
		if i > 0 && sorted[i-1].Node == r.Node {
			return nil, kms.Errorf(kms.Invalid, "node %q is named twice as a recipient", r.Node)
		}
		sealed, err := sealTo(r, b, kek)
		if err != nil {
			return nil, err
		}
		out = append(out, Sealed{Node: r.Node, Sealed: sealed})
	}
	return out, nil
}

func sealTo(r Recipient, b KEKBinding, kek *secret.Bytes) ([]byte, error) {
	b.Node = r.Node
	if err := b.validate(); err != nil {
		return nil, err
	}
	pub, err := pqc.ParsePublicKey(pqc.SuiteID(r.Suite), r.PublicKey)
	if err != nil {
		return nil, kms.Wrap(kms.Invalid, err, "the agreement key of node "+r.Node+" is not valid", "")
	}
	sealed, err := pub.Seal(b.encode(sealInfo), b.encode(sealAAD), kek.Reveal())
	runtime.KeepAlive(kek)
	if err != nil {
		return nil, kms.Wrap(kms.Internal, err, "sealing to node "+r.Node+" failed", "")
	}
	return sealed, nil
}
