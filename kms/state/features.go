package state

import (
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

// TypeFeature is the type of kinds that are announced and never applied: each version
// of it stands for something new in a command that older programs know and could not
// parse. Its line in decoders is what announces it.
const TypeFeature Type = 29

// Feature is the version of the kind that stands for it. Numbers are part of the log:
// append only. 2 is for credentials, 3 for changes of keyrings, 5 for retirement.
type Feature uint16

// The features.
const (
	FeatureRules    Feature = 1 // approval.Rule.Need and NotBefore; who a proposer is not
	FeatureActivate Feature = 6 // kms.ActionActivate, as an action and in rules
	FeatureImport   Feature = 4 // kms.ActionImport, as an action and in rules
)

// feature is the command of every feature.
type feature struct{}

// Type implements Command.
func (feature) Type() Type { return TypeFeature }

func (feature) validate(e Envelope) error {
	return kms.Errorf(kms.Invalid, "command type %d version %d is announced only; there is none to carry out", e.Type, e.Version)
}

func (feature) verify(*tx) error { return nil }

func (feature) apply(t *tx) error { return feature{}.validate(t.env) }

// Knows reports whether every node has announced a feature.
func (s *State) Knows(f Feature) bool { return len(s.unaware(f)) == 0 }

func (s *State) unaware(f Feature) []string {
	return s.Lacking(CommandKind{Type: TypeFeature, Version: uint16(f)})
}

// need refuses what takes a feature that some node's program may not know, with the
// kind that such a program gives: it cannot parse the command. What stands in a
// snapshot was once applied.
func (t *tx) need(f Feature) error {
	if t.replay {
		return nil
	}
	if lacking := t.before.unaware(f); len(lacking) > 0 {
		return &kms.Error{Kind: kms.Invalid,
			Msg: "the release that node " + lacking[0] + " runs has not announced that it knows " + f.String(),
			Fix: "start the node, with a newer release if need be, or remove it"}
	}
	return nil
}

// String says what the feature is.
func (f Feature) String() string {
	switch f {
	case FeatureRules:
		return "groups and times of release in rules"
	}
	if a, ok := featureActions[f]; ok {
		return "the action " + string(a)
	}
	return "feature " + decimal(uint64(f))
}

// knowsContent refuses a proposal with fields that older programs cannot parse.
func (t *tx) knowsContent(p approval.Proposal) error {
	if err := t.knowsAction(p.Action); err != nil {
		return err
	}
	if p.Action != kms.ActionPolicy {
		return nil
	}
	params, err := p.PolicyParams()
	if err != nil {
		return err
	}
	for _, r := range params.Rules {
		if r.Need != nil || r.NotBefore != 0 {
			if err := t.need(FeatureRules); err != nil {
				return err
			}
		}
		if err := t.knowsAction(r.Action); err != nil {
			return err
		}
	}
	return nil
}

// featureActions are the actions that came with a feature.
var featureActions = map[Feature]kms.Action{
	FeatureActivate: kms.ActionActivate,
	FeatureImport:   kms.ActionImport,
}

// knowsAction refuses an action that some node's program may not know.
func (t *tx) knowsAction(a kms.Action) error {
	for _, f := range []Feature{FeatureActivate, FeatureImport} {
		if featureActions[f] == a {
			return t.need(f)
		}
	}
	return nil
}
