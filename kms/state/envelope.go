package state

import (
	"errors"
	"fmt"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
)

// CommandDomain is the domain string in every envelope, and CommandContext the
// signature context under which the origin node's device signs
// pqc.Digest(signing suite, envelope bytes, CommandContext).
const (
	CommandDomain  = "conclave/command/v1"
	CommandContext = "conclave/command/v1"
)

// CommandVersion is the version of every command of this program.
const CommandVersion uint16 = 1

// ErrUnknownCommand reports a command type or version that this program does not
// know. A node to which a member sent one must stop: others may know it.
var ErrUnknownCommand = errors.New("state: unknown command type or version")

// Envelope is what a node signs. Times are Unix milliseconds.
type Envelope struct {
	Domain      string `cbor:"domain"`      // CommandDomain
	Cluster     string `cbor:"cluster"`     // kms.ClusterID of the genesis
	Type        Type   `cbor:"type"`        // of Payload
	Version     uint16 `cbor:"version"`     // of Payload
	Origin      string `cbor:"origin"`      // node that signs
	Time        int64  `cbor:"time"`        // when the origin signed
	Nonce       []byte `cbor:"nonce"`       // 16 random bytes
	Principal   string `cbor:"principal"`   // SPIFFE ID on whose behalf, "" for the node's own acts
	Expect      uint64 `cbor:"expect"`      // revision of what is changed, 0 for creation and where it does not apply
	Idempotency []byte `cbor:"idempotency"` // nil or 32 bytes, derived from the principal and its key
	Request     []byte `cbor:"request"`     // nil or the 32-byte hash of the request
	Payload     []byte `cbor:"payload"`     // canonical encoding of the command
}

type signedCommand struct {
	Envelope  []byte `cbor:"envelope"`
	Signature []byte `cbor:"signature"`
}

// NewEnvelope returns an envelope with Domain, Type, Version and Payload set.
func NewEnvelope(cmd Command) Envelope {
	return Envelope{Domain: CommandDomain, Type: cmd.Type(), Version: CommandVersion, Payload: canon.Marshal(cmd)}
}

// Marshal returns the bytes to sign.
func (e Envelope) Marshal() []byte { return canon.Marshal(e) }

// Join returns the signed command that goes into the log. The signature is r‖s of
// the origin's signing suite.
func Join(envelope, signature []byte) []byte {
	return canon.Marshal(signedCommand{envelope, signature})
}

// Split undoes Join. Errors: kms.TooLarge, kms.Invalid.
func Split(raw []byte) (envelope, signature []byte, err error) {
	if len(raw) > MaxCommand {
		return nil, nil, kms.Errorf(kms.TooLarge, "the command has %d bytes; the limit is %d", len(raw), MaxCommand)
	}
	var c signedCommand
	if err := canon.Unmarshal(raw, &c); err != nil {
		return nil, nil, kms.Wrap(kms.Invalid, err, "the signed command is not in canonical form", "")
	}
	if len(c.Envelope) == 0 || len(c.Signature) == 0 || len(c.Signature) > MaxSignature {
		return nil, nil, kms.Errorf(kms.Invalid, "the command has no envelope or no usable signature")
	}
	return c.Envelope, c.Signature, nil
}

// ParseEnvelope decodes and validates an envelope and its command. Errors:
// kms.TooLarge, kms.Invalid; ErrUnknownCommand (with the envelope) when only the
// type or version is unknown.
func ParseEnvelope(b []byte) (Envelope, Command, error) {
	e, err := parseEnvelope(b)
	if err != nil {
		return Envelope{}, nil, err
	}
	cmd, err := parseCommand(e)
	if err != nil {
		return e, nil, err
	}
	return e, cmd, nil
}

// parseEnvelope decodes the envelope alone and validates its shape.
func parseEnvelope(b []byte) (Envelope, error) {
	if len(b) > MaxCommand {
		return Envelope{}, kms.Errorf(kms.TooLarge, "the envelope has %d bytes; the limit is %d", len(b), MaxCommand)
	}
	var e Envelope
	if err := canon.Unmarshal(b, &e); err != nil {
		return Envelope{}, kms.Wrap(kms.Invalid, err, "the envelope is not in canonical form", "")
	}
	if err := e.validate(); err != nil {
		return Envelope{}, err
	}
	return e, nil
}

func (e Envelope) validate() error {
	bad := func(format string, args ...any) error {
		return kms.Errorf(kms.Invalid, "envelope: %s", fmt.Sprintf(format, args...))
	}
	switch {
	case e.Domain != CommandDomain:
		return bad("the domain is not %q", CommandDomain)
	case len(e.Nonce) != NonceSize:
		return bad("the nonce has %d bytes, not %d", len(e.Nonce), NonceSize)
	case e.Time <= 0 || e.Time > maxTime:
		return bad("the time is out of range")
	case len(e.Idempotency) != 0 && len(e.Idempotency) != HashSize:
		return bad("the idempotency key has %d bytes, not %d", len(e.Idempotency), HashSize)
	case len(e.Request) != 0 && len(e.Request) != HashSize:
		return bad("the request hash has %d bytes, not %d", len(e.Request), HashSize)
	case len(e.Idempotency) != 0 && len(e.Request) == 0:
		return bad("an idempotency key needs the hash of the request")
	}
	if err := kms.CheckName("origin", e.Origin); err != nil {
		return bad("%v", err)
	}
	if e.Principal != "" {
		if _, err := kms.ParseIdentity(e.Principal); err != nil {
			return bad("principal: %v", err)
		}
	}
	return nil
}

// operation is a command that this program can carry out, in three steps.
type operation interface {
	Command
	validate(e Envelope) error // shape alone
	verify(t *tx) error        // signatures other than the envelope's
	apply(t *tx) error         // the change itself
}

// decoders are the kinds of commands that this program can carry out. A new kind is a
// line here: it is announced by itself (releases.go) and taken once all nodes know it.
var decoders = map[CommandKind]func(Envelope) (operation, error){
	{TypeTick, 1}:           decode[Tick],
	{TypeCreateKeyring, 1}:  decode[CreateKeyring],
	{TypeCreateKey, 1}:      decode[CreateKey],
	{TypeOpenProposal, 1}:   decode[OpenProposal],
	{TypeVote, 1}:           decode[CastVote],
	{TypeExecute, 1}:        decode[Execute],
	{TypeCommitRotation, 1}: decode[CommitRotation],
	{TypeReceipt, 1}:        decode[GiveReceipt],
	{TypeReseal, 1}:         decode[Reseal],
	{TypeAdoptRoot, 1}:      decode[AdoptRoot],
	{TypeRefuseCopy, 1}:     decode[RefuseCopy],
	{TypeConfirmMembers, 1}: decode[ConfirmMembers],
	{TypeCommitKEK, 1}:      decode[CommitKEK],
	{TypeRewrap, 1}:         decode[Rewrap],
	{TypeConfirmRewrap, 1}:  decode[ConfirmRewrap],
	{TypeRefuseRewrap, 1}:   decode[RefuseRewrap],
	{TypeRetireKEK, 1}:      decode[RetireKEK],
	{TypeAnnounce, 1}:       decode[Announce],
	{TypeSealRecovery, 1}:   decode[SealRecovery],
	{TypeRestoreCopy, 1}:    decode[RestoreCopy],
	{TypeKeepSeed, 1}:       decode[KeepSeed],
	{TypeReportUse, 1}:      decode[ReportUse],
	{TypeImportKey, 1}:      decode[ImportKey],

	{TypeSuspendCredential, 1}:               decode[SuspendCredential],
	{TypeFeature, uint16(FeatureRules)}:      decode[feature],
	{TypeFeature, uint16(FeatureImport)}:     decode[feature],
	{TypeFeature, uint16(FeatureRetirement)}: decode[feature],
	{TypeFeature, uint16(FeatureActivate)}:   decode[feature],
	{TypeFeature, uint16(FeatureForbid)}:     decode[feature],
	{TypeFeature, uint16(FeatureSchedule)}:   decode[feature],
	{TypeRegisterWitness, 1}:                 decode[RegisterWitness],
	{TypeSubmitCheckpoint, 1}:                decode[SubmitCheckpoint],
	{TypeCosign, 1}:                          decode[Cosign],
}

// parseCommand decodes the payload and validates its shape.
func parseCommand(e Envelope) (operation, error) {
	decoder, known := decoders[CommandKind{e.Type, e.Version}]
	if !known {
		return nil, fmt.Errorf("%w: type %d version %d", ErrUnknownCommand, e.Type, e.Version)
	}
	op, err := decoder(e)
	if err != nil {
		return nil, err
	}
	return op, op.validate(e)
}

func decode[T operation](e Envelope) (operation, error) {
	var c T
	if err := canon.Unmarshal(e.Payload, &c); err != nil {
		return nil, kms.Wrap(kms.Invalid, err, fmt.Sprintf("the payload is not a command of type %d in canonical form", e.Type), "")
	}
	return c, nil
}

// noExpect refuses a revision where a command has none to expect.
func noExpect(e Envelope) error {
	if e.Expect != 0 {
		return kms.Errorf(kms.Invalid, "envelope: expect must be 0 for this command")
	}
	return nil
}
