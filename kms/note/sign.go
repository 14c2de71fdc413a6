package note

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"slices"

	"golang.org/x/mod/sumdb/note"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/pqc"
)

// HardwareContext is the signature context (pqc.Digest) of hardware keys under a
// checkpoint's text.
const HardwareContext = "conclave/checkpoint/v1"

// Signature types of C2SP's signed-note; hardwareLabel follows the type in the key id.
const (
	typeMLDSA44   = 0x06
	typeOwn       = 0xff
	hardwareLabel = "conclave-kms.hardware-ecdsa/v1"
)

// cosignLabel begins what ML-DSA-44 signs (tlog-cosignature).
const cosignLabel = "subtree/v1\n\x00"

// Witness is who signs checkpoints: a node with its keys.
type Witness struct {
	Name         string      // KeyName
	SigningSuite pqc.SuiteID // ECDSA suite of Signing
	Signing      []byte      // hardware signing key, SEC1 uncompressed
	MLDSA        []byte      // ML-DSA-44 public key
}

// Signature is a witness's pair of signatures under a checkpoint.
type Signature struct {
	Time     uint64 `cbor:"time"`     // of the ML-DSA signature, Unix seconds
	Hardware []byte `cbor:"hardware"` // ECDSA r‖s over the text
	MLDSA    []byte `cbor:"mldsa"`    // ML-DSA-44 over CosignedMessage
}

// HardwareDigest returns what the device of a witness signs: pqc.Digest of the text.
// Errors: pqc.ErrSuite.
func HardwareDigest(suite pqc.SuiteID, c Checkpoint) ([]byte, error) {
	return pqc.Digest(suite, c.Marshal(), []byte(HardwareContext))
}

// CosignedMessage returns what the ML-DSA-44 key of the witness with the given name
// signs at a time, with an empty context: tlog-cosignature's cosigned_message.
func CosignedMessage(name string, time uint64, c Checkpoint) []byte {
	b := []byte(cosignLabel)
	b = append(append(b, byte(len(name))), name...)
	b = binary.BigEndian.AppendUint64(b, time)
	b = append(append(b, byte(len(c.Origin))), c.Origin...)
	b = binary.BigEndian.AppendUint64(b, 0)
	b = binary.BigEndian.AppendUint64(b, c.Size)
	return append(b, c.Root...)
}

// Verify checks both signatures of a pair. Errors: kms.Invalid for a checkpoint or a
// witness of no usable form, kms.BadSignature.
func (w Witness) Verify(c Checkpoint, s Signature) error {
	if err := c.Validate(); err != nil {
		return err
	}
	if !validName(w.Name) || s.Time == 0 || s.Time > 1<<63-1 {
		return kms.Errorf(kms.Invalid, "checkpoint: the witness's name or the time of its signature is out of range")
	}
	if err := pqc.Verify(w.SigningSuite, w.Signing, c.Marshal(), []byte(HardwareContext), s.Hardware); err != nil {
		return kms.Wrap(kms.BadSignature, err, "checkpoint: the hardware key's signature by "+w.Name+" does not verify", "")
	}
	if err := pqc.VerifyMLDSA44(w.MLDSA, CosignedMessage(w.Name, s.Time, c), nil, s.MLDSA); err != nil {
		return kms.Wrap(kms.BadSignature, err, "checkpoint: the ML-DSA-44 signature by "+w.Name+" does not verify", "")
	}
	return nil
}

// keyID is the key id of signed-note.
func keyID(name string, kind byte, key ...[]byte) uint32 {
	b := append([]byte(name), '\n', kind)
	sum := sha256.Sum256(append(b, slices.Concat(key...)...))
	return binary.BigEndian.Uint32(sum[:])
}

func (w Witness) hardwareID() uint32 {
	return keyID(w.Name, typeOwn, []byte(hardwareLabel), binary.BigEndian.AppendUint16(nil, uint16(w.SigningSuite)), w.Signing)
}

func (w Witness) mldsaID() uint32 { return keyID(w.Name, typeMLDSA44, w.MLDSA) }

// line is a note's signature line.
func line(name string, id uint32, sig []byte) note.Signature {
	b := append(binary.BigEndian.AppendUint32(nil, id), sig...)
	return note.Signature{Name: name, Hash: id, Base64: base64.StdEncoding.EncodeToString(b)}
}

// Signed is a pair with the witness that made it.
type Signed struct {
	Witness   Witness
	Signature Signature
}

// Join returns the signed note: the text with two lines for each pair, which are not
// verified. Errors: kms.Invalid for a checkpoint or a name of no usable form.
func Join(c Checkpoint, pairs ...Signed) ([]byte, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	n := &note.Note{Text: string(c.Marshal())}
	for _, p := range pairs {
		timed := append(binary.BigEndian.AppendUint64(nil, p.Signature.Time), p.Signature.MLDSA...)
		n.Sigs = append(n.Sigs, line(p.Witness.Name, p.Witness.hardwareID(), p.Signature.Hardware), line(p.Witness.Name, p.Witness.mldsaID(), timed))
	}
	b, err := note.Sign(n)
	if err != nil {
		return nil, kms.Wrap(kms.Invalid, err, "checkpoint: it cannot be written as a note", "")
	}
	return b, nil
}

// verifier is one key of a witness as sumdb/note wants it.
type verifier struct {
	name   string
	id     uint32
	verify func(text, sig []byte) bool
}

func (v verifier) Name() string                 { return v.name }
func (v verifier) KeyHash() uint32              { return v.id }
func (v verifier) Verify(text, sig []byte) bool { return v.verify(text, sig) }

func (w Witness) verifiers() []note.Verifier {
	return []note.Verifier{
		verifier{w.Name, w.hardwareID(), func(text, sig []byte) bool {
			return pqc.Verify(w.SigningSuite, w.Signing, text, []byte(HardwareContext), sig) == nil
		}},
		verifier{w.Name, w.mldsaID(), func(text, sig []byte) bool {
			c, err := Parse(text)
			if err != nil || len(sig) < 8 || len(w.Name) > MaxName {
				return false
			}
			return pqc.VerifyMLDSA44(w.MLDSA, CosignedMessage(w.Name, binary.BigEndian.Uint64(sig), c), nil, sig[8:]) == nil
		}},
	}
}

// Open parses a signed note and verifies every signature of a known witness in it: one
// that does not verify makes the note invalid, lines of unknown keys are passed over. It
// returns the checkpoint and the names of the witnesses of whom both lines are there.
// Errors: kms.Invalid; kms.BadSignature also when no known witness has signed.
func Open(b []byte, known ...Witness) (Checkpoint, []string, error) {
	var list []note.Verifier
	for _, w := range known {
		list = append(list, w.verifiers()...)
	}
	n, err := note.Open(b, note.VerifierList(list...))
	if err != nil {
		return Checkpoint{}, nil, kms.Wrap(kms.BadSignature, err, "checkpoint: the signed note does not verify", "")
	}
	for _, s := range n.Sigs { // sumdb/note passes over the spare bits of the last character
		if sig, err := base64.StdEncoding.Strict().DecodeString(s.Base64); err != nil || base64.StdEncoding.EncodeToString(sig) != s.Base64 {
			return Checkpoint{}, nil, kms.Errorf(kms.BadSignature, "checkpoint: a signature line of %s is not in canonical base64", s.Name)
		}
	}
	c, err := Parse([]byte(n.Text))
	if err != nil {
		return Checkpoint{}, nil, err
	}
	var names []string
	for _, w := range known {
		has := func(id uint32) bool {
			return slices.ContainsFunc(n.Sigs, func(s note.Signature) bool { return s.Name == w.Name && s.Hash == id })
		}
		if has(w.hardwareID()) && has(w.mldsaID()) {
			names = append(names, w.Name)
		}
	}
	if len(names) == 0 {
		return Checkpoint{}, nil, kms.Errorf(kms.BadSignature, "checkpoint: no known witness has signed it with both keys")
	}
	return c, names, nil
}
