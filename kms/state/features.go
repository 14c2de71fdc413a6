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
// append only. 2 is for credentials, 3 for changes of keyrings.
type Feature uint16

// The features.
const (
	FeatureRules      Feature = 1 // approval.Rule.Need and NotBefore; who a proposer is not
	FeatureActivate   Feature = 6 // kms.ActionActivate, as an action and in rules
	FeatureImport     Feature = 4 // kms.ActionImport, as an action and in rules
	FeatureRetirement Feature = 5 // approval.Rule.Unused, approval.VersionParams.Override
	FeatureForbid     Feature = 7 // approval.Policy.Forbid
	FeatureSchedule   Feature = 8 // kms.ActionSchedule, as an action and in rules
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
	case FeatureRetirement:
		return "rules about the use of versions"
	case FeatureForbid:
		return "policies that forbid suites"
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
	switch p.Action {
	case kms.ActionDeactivate, kms.ActionDestroy:
		v, err := p.VersionParams()
		if err != nil || !v.Override {
			return err
		}
		return t.need(FeatureRetirement)
	case kms.ActionPolicy:
		params, err := p.PolicyParams()
		if err != nil {
			return err
		}
		return t.knowsPolicy(params)
	}
	return nil
}

// knowsPolicy refuses a policy with what some node's program may not know.
func (t *tx) knowsPolicy(p approval.PolicyParams) error {
	var asked []Feature
	if len(p.Forbid) > 0 {
		asked = append(asked, FeatureForbid)
	}
	for _, r := range p.Rules {
		if err := t.knowsAction(r.Action); err != nil {
			return err
		}
		if r.Need != nil || r.NotBefore != 0 {
			asked = append(asked, FeatureRules)
		}
		if r.Unused != 0 {
			asked = append(asked, FeatureRetirement)
		}
	}
	for _, f := range asked {
		if err := t.need(f); err != nil {
			return err
		}
	}
	return nil
}

// featureActions are the actions that came with a feature.
var featureActions = map[Feature]kms.Action{
	FeatureActivate: kms.ActionActivate,
	FeatureImport:   kms.ActionImport,
	FeatureSchedule: kms.ActionSchedule,
}

// knowsAction refuses an action that some node's program may not know.
func (t *tx) knowsAction(a kms.Action) error {
	for _, f := range []Feature{FeatureActivate, FeatureImport, FeatureSchedule} {
		if featureActions[f] == a {
			return t.need(f)
		}
	}
	return nil
}
