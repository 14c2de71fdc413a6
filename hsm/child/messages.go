package child

import (
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/binary"
	"time"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/fxamacker/cbor/v2"
)

// Curves by number, in arg.
const (
	curveNone byte = iota
	curveP256
	curveP384
	curveOther
)

func curveNumber(c ecdh.Curve) byte {
	switch c {
	case nil:
		return curveNone
	case ecdh.P256():
		return curveP256
	case ecdh.P384():
		return curveP384
	}
	return curveOther
}

// curveOf returns a curve that a device refuses where the number is not that of one
// that it may take.
func curveOf(n byte) ecdh.Curve {
	switch n {
	case curveNone:
		return nil
	case curveP256:
		return ecdh.P256()
	case curveP384:
		return ecdh.P384()
	}
	return ecdh.X25519()
}

// limits are the numbers of an hsm.Config.
type limits struct {
	timeout          time.Duration
	sessions, loaded int
}

func (l limits) bytes() []byte {
	b := binary.BigEndian.AppendUint64(nil, uint64(l.timeout))
	b = binary.BigEndian.AppendUint32(b, uint32(l.sessions))
	return binary.BigEndian.AppendUint32(b, uint32(l.loaded))
}

func parseLimits(b []byte) (limits, error) {
	if len(b) != 16 {
		return limits{}, errFrame
	}
	return limits{time.Duration(binary.BigEndian.Uint64(b)), int(binary.BigEndian.Uint32(b[8:])), int(binary.BigEndian.Uint32(b[12:]))}, nil
}

// identityReply is the answer to opOpen.
func identityReply(d *hsm.Device) (message, error) {
	signing, err := d.SigningKey().Bytes()
	if err != nil {
		return message{}, err
	}
	kind, public := d.ImportKey()
	hmac, signer := d.Generates()
	return request(opReply, 0, d.AgreementKey().Bytes(), signing, []byte(d.Describe()), []byte(kind), public, []byte{flag(hmac) | flag(signer)<<1}), nil
}

func flag(b bool) byte {
	if b {
		return 1
	}
	return 0
}

func parseIdentity(m message) (identity, error) {
	if m.n != 6 || len(m.parts[5]) != 1 || m.parts[5][0] > 3 {
		return identity{}, errFrame
	}
	id := identity{description: printable(string(m.parts[2]), maxErrorText), importKind: string(m.parts[3]),
		importKey: append([]byte(nil), m.parts[4]...), hmac: m.parts[5][0]&1 != 0, signer: m.parts[5][0]&2 != 0}
	c, ec := ecdh.P384(), elliptic.P384()
	if len(m.parts[0]) == 65 {
		c, ec = ecdh.P256(), elliptic.P256()
	}
	var err error
	if id.agreement, err = c.NewPublicKey(m.parts[0]); err != nil {
		return identity{}, errFrame
	}
	if id.signing, err = ecdsa.ParseUncompressedPublicKey(ec, m.parts[1]); err != nil {
		return identity{}, errFrame
	}
	return id, nil
}

// Attributes cross as CBOR.

func encodeAttributes(all []hsm.KeyAttributes) ([]byte, error) { return cbor.Marshal(all) }

var strictCBOR = func() cbor.DecMode {
	m, err := cbor.DecOptions{DupMapKey: cbor.DupMapKeyEnforcedAPF, IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden,
		ExtraReturnErrors: cbor.ExtraDecErrorUnknownField, MaxNestedLevels: 8, MaxArrayElements: 64, MaxMapPairs: 64}.DecMode()
	if err != nil {
		panic(err) // the options above are constants
	}
	return m
}()

func decodeAttributes(b []byte) ([]hsm.KeyAttributes, error) {
	var all []hsm.KeyAttributes
	if strictCBOR.Unmarshal(b, &all) != nil {
		return nil, errFrame
	}
	return all, nil
}
