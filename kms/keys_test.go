package kms

import (
	"slices"
	"testing"
)

var allStates = []State{PreActive, Active, Suspended, Deactivated, Compromised, Destroyed, DestroyedCompromised}

// TestTransitions compares with the transitions of SP 800-57 part 1 revision 5,
// sections 7.1 to 7.6, where what is compromised and destroyed has a state of
// its own (revision 3, and KMIP).
func TestTransitions(t *testing.T) {
	spec := map[State][]State{
		PreActive:            {Destroyed, Compromised, Active},
		Active:               {Destroyed, Compromised, Suspended, Deactivated},
		Suspended:            {Destroyed, Compromised, Active, Deactivated},
		Deactivated:          {Destroyed, Compromised},
		Compromised:          {DestroyedCompromised},
		Destroyed:            {DestroyedCompromised},
		DestroyedCompromised: {},
	}
	for _, from := range allStates {
		for _, to := range allStates {
			got, want := from.CanBecome(to), slices.Contains(spec[from], to)
			if got != want {
				t.Errorf("%s to %s: allowed is %v, want %v", from, to, got, want)
			}
		}
		if from.CanBecome(from) || from.CanBecome("") || from.CanBecome("frozen") {
			t.Errorf("%s may become itself or no state", from)
		}
	}
}

// TestDestructionIsFinal follows every path: nothing that is gone comes back, and
// nothing that was compromised is ever in use again.
func TestDestructionIsFinal(t *testing.T) {
	reach := func(from State) map[State]bool {
		seen := map[State]bool{}
		var walk func(State)
		walk = func(s State) {
			for _, next := range allStates {
				if s.CanBecome(next) && !seen[next] {
					seen[next] = true
					walk(next)
				}
			}
		}
		walk(from)
		return seen
	}
	for _, from := range []State{Destroyed, DestroyedCompromised} {
		for s := range reach(from) {
			if !s.Gone() {
				t.Errorf("%s leads to %s", from, s)
			}
		}
	}
	for s := range reach(Compromised) {
		if s == Active || s == Suspended || s == Deactivated || s == Destroyed {
			t.Errorf("%s leads to %s", Compromised, s)
		}
	}
	if reach(Deactivated)[Active] {
		t.Error("a deactivated version becomes active again")
	}
	for s := range reach(PreActive) {
		if s == PreActive {
			t.Error("a version becomes pre-active again")
		}
	}
}

func TestStateNames(t *testing.T) {
	for _, s := range allStates {
		if !s.Valid() {
			t.Errorf("%s is not valid", s)
		}
		if got, want := s.Gone(), s == Destroyed || s == DestroyedCompromised; got != want {
			t.Errorf("%s: gone is %v", s, got)
		}
	}
	for _, s := range []State{"", "Active", "active ", "destroyed-"} {
		if s.Valid() || s.Gone() || s.CanBecome(Active) {
			t.Errorf("%q is a state", s)
		}
	}
}

func TestAlgorithms(t *testing.T) {
	seen := map[Algorithm]Purpose{}
	for _, p := range []Purpose{Encrypt, MAC, Sign} {
		if len(p.Algorithms()) == 0 {
			t.Errorf("%s has no algorithm", p)
		}
		for _, a := range p.Algorithms() {
			if other, ok := seen[a]; ok {
				t.Errorf("%s serves %s and %s", a, p, other)
			}
			seen[a] = p
		}
	}
	if len(seen) != 5 {
		t.Errorf("%d algorithms", len(seen))
	}
	for p, first := range map[Purpose]Algorithm{Encrypt: AES256GCM, MAC: HMACSHA256, Sign: ECDSAP256} {
		if p.Algorithms()[0] != first {
			t.Errorf("the default of %s is %s", p, p.Algorithms()[0])
		}
	}
	if Purpose("").Algorithms() != nil || Purpose("Sign").Algorithms() != nil {
		t.Error("an unknown purpose has algorithms")
	}
	Sign.Algorithms()[0] = "changed"
	if Sign.Algorithms()[0] != ECDSAP256 {
		t.Error("the table can be changed from outside")
	}
}

func TestActions(t *testing.T) {
	all := slices.Concat(KeyActions, GovernanceActions)
	slices.Sort(all)
	if len(slices.Compact(slices.Clone(all))) != len(all) {
		t.Error("an action is decided by two policies")
	}
	for _, a := range []Action{ActionKeyring, ActionCreate, ActionRotate, ActionActivate, ActionSuspend, ActionResume, ActionDeactivate, ActionCompromise, ActionDestroy, ActionImport, ActionSchedule, ActionPolicy, ActionCustodian, ActionNode, ActionSite, ActionRecoveryKey, ActionRecover} {
		if !slices.Contains(all, a) {
			t.Errorf("nobody decides about %s", a)
		}
	}
}
