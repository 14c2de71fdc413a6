package state

import (
	"bytes"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

// TypeImportKey is the type of ImportKey.
const TypeImportKey Type = 37

// ImportKey makes the key that an authorised proposal asks for, of material that its
// owner has sealed to the origin node. That what is wrapped is what was sealed rests on
// that node; the public key of a sign key stands in the proposal.
type ImportKey struct {
	Proposal string    `cbor:"proposal"`
	Key      CreateKey `cbor:"key"`
}

// Type implements Command.
func (ImportKey) Type() Type { return TypeImportKey }

func (c ImportKey) validate(e Envelope) error {
	if err := checkProposalID(c.Proposal); err != nil {
		return err
	}
	if e.Principal != "" {
		return kms.Errorf(kms.Invalid, "import: a node does it on nobody's behalf")
	}
	if c.Key.Generated == kms.InDevice {
		return kms.Errorf(kms.Invalid, "import: the material comes from outside, not from a device")
	}
	return c.Key.validate(e)
}

// validateErased is validate for a command without its material.
func (c ImportKey) validateErased() error {
	c.Key.Wrapped, c.Key.Copies = placeholder(c.Key.Generated)
	return c.validate(Envelope{})
}

func (ImportKey) verify(*tx) error { return nil }

func (c ImportKey) apply(t *tx) error {
	k, err := t.keyringFor(c.Key.Keyring)
	if err != nil {
		return err
	}
	p, err := t.executable(c.Proposal)
	if err != nil {
		return err
	}
	if p.Content.Action != kms.ActionImport || p.Content.Target != approval.KeyTarget(c.Key.Keyring, c.Key.Name) {
		return kms.Errorf(kms.Conflict, "proposal %s is not to import %s", p.ID, kms.KeyPath(c.Key.Keyring, c.Key.Name))
	}
	params, err := p.Content.ImportParams()
	if err != nil {
		return err
	}
	if err := c.Asked(t.env.Origin, params); err != nil {
		return err
	}
	if err := t.checkNewKey(k, c.Key); err != nil {
		return err
	}
	t.execute(p)
	t.putKey(c.Key, p.Content.Proposer, p.ID)
	t.voidTarget(p.Content.Target)
	t.event(Event{Type: EventKeyCreated, Keyring: c.Key.Keyring, Key: c.Key.Name, Version: 1, Proposal: p.ID, Node: t.env.Origin})
	return nil
}

// Asked checks that the key is the one which the proposal's parameters ask for and that
// the origin is the node to which the material was sealed. Errors: kms.Conflict.
func (c ImportKey) Asked(origin string, p approval.ImportParams) error {
	k := c.Key
	switch {
	case origin != p.Node:
		return kms.Errorf(kms.Conflict, "the material is sealed to node %s, not to %s", p.Node, origin)
	case k.Purpose != p.Purpose || k.Algorithm != p.Algorithm || k.RotationPeriod != p.RotationPeriod:
		return kms.Errorf(kms.Conflict, "proposal %s asks for another purpose, algorithm or rotation period", c.Proposal)
	case !bytes.Equal(k.PublicKey, p.PublicKey):
		return kms.Errorf(kms.Conflict, "proposal %s asks for the key with another public key", c.Proposal)
	}
	return nil
}

// importable checks what can be known of an import before its material is there.
func (t *tx) importable(keyring, name string, p approval.Proposal) error {
	r := t.reader()
	k, ok := r.keyring(keyring)
	if !ok {
		return kms.Errorf(kms.NotFound, "there is no keyring %s", keyring)
	}
	params, err := p.ImportParams()
	if err != nil {
		return err
	}
	if _, ok := search(r.residents(k.Residency), func(n Node) bool { return n.ID == params.Node }); !ok {
		return kms.Errorf(kms.Conflict, "node %s cannot open keyring %s, so material for it is not sealed to that node", params.Node, keyring)
	}
	if err := checkPublicKey(params.Algorithm, params.PublicKey); err != nil {
		return err
	}
	if _, exists := r.key(keyring, name); exists {
		return kms.Errorf(kms.Exists, "key %s exists", kms.KeyPath(keyring, name))
	}
	if err := r.allowMaterial(k, params.Algorithm); err != nil {
		return err
	}
	if k.Protection == kms.Hardware {
		return hardwareAlgorithm(k, params.Algorithm)
	}
	return nil
}

// bringsVersion reports whether a proposal is carried out by a command that brings
// material, and which goes with it.
func (p Proposal) bringsVersion() bool {
	return p.Content.Action == kms.ActionImport || p.Content.Action == kms.ActionRotate && !p.kekTarget()
}
