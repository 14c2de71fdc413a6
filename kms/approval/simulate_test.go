package approval

import (
	"fmt"
	"math/bits"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/conclave-kms/conclave/kms"
)

// minimal returns every set that meets the rule and none of whose members is to spare.
func (w world) minimal(r Rule, proposer int) (sets []uint) {
	met := func(set uint) bool { return w.dumb(r, proposer, set) && w.counted(r, proposer, set) == set }
	for set := range uint(1) << len(w.site) {
		least := met(set)
		for i := range w.site {
			least = least && (set>>i&1 == 0 || !met(set&^(1<<i)))
		}
		if least {
			sets = append(sets, set)
		}
	}
	return sets
}

// counted are those of a set whose approvals count.
func (w world) counted(r Rule, proposer int, set uint) uint {
	set &^= w.revoked
	if proposer >= 0 && !r.ProposerMayApprove {
		set &^= 1 << proposer
	}
	return set
}

func (w world) checkSimulation(t interface{ Fatalf(string, ...any) }, r Rule, proposer int) {
	s := Simulate(r, w.all(), proposerID(proposer))
	everybody := uint(1)<<len(w.site) - 1
	can := w.counted(r, proposer, everybody)
	if s.Possible != w.dumb(r, proposer, everybody) || s.Possible != (len(s.Missing) == 0) || !slices.Equal(s.Approvers, ids(can)) {
		t.Fatalf("%+v: %+v", r, s)
	}
	var lost []Loss
	var alone []string
	for i, name := range siteNames {
		at := uint(0)
		for c, site := range w.site {
			if site == i {
				at |= 1 << c
			}
		}
		if s.Possible && !w.dumb(r, proposer, everybody&^at) {
			lost = append(lost, Loss{LossSite, name})
		}
		if w.dumb(r, proposer, at) {
			alone = append(alone, name)
		}
	}
	for i := range w.site {
		if s.Possible && can>>i&1 == 1 && !w.dumb(r, proposer, everybody&^(1<<i)) {
			lost = append(lost, Loss{LossCustodian, fmt.Sprintf("c%d", i)})
		}
	}
	if !slices.Equal(s.LockedOutBy, lost) || !slices.Equal(s.NationsAlone, alone) {
		t.Fatalf("%+v: %v lock out and %v alone, want %v and %v", r, s.LockedOutBy, s.NationsAlone, lost, alone)
	}
	sets := w.minimal(r, proposer)
	slices.SortFunc(sets, func(a, b uint) int { return bits.OnesCount(a) - bits.OnesCount(b) })
	if len(s.Quorums) != min(len(sets), maxQuorums) || s.More != (len(sets) > maxQuorums) {
		t.Fatalf("%+v: %d quorums, more %v, want %d", r, len(s.Quorums), s.More, len(sets))
	}
	for i, q := range s.Quorums {
		if len(q) != bits.OnesCount(sets[i]) || !slices.ContainsFunc(sets, func(x uint) bool { return slices.Equal(ids(x), q) }) {
			t.Fatalf("%+v: %v is no minimal quorum in its place", r, q)
		}
	}
}

func TestSimulateAgainstDumbVersion(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w, r := genWorld(t), genRule(t, "rule")
		w.site = w.site[:min(len(w.site), 7)]
		w.revoked &= 1<<len(w.site) - 1
		w.checkSimulation(t, r, genProposer(t, w))
	})
}

// TestSimulateGroups takes every flat group of 7 custodians at 4 sites.
func TestSimulateGroups(t *testing.T) {
	w := world{site: []int{0, 0, 1, 1, 2, 2, 3}}
	for i, x := range w.flat() {
		if i%6 != 0 {
			continue
		}
		r := Rule{Action: kms.ActionRotate, Approvals: uint32(i/6)%4 + 1, Sites: 1, Need: &x.g}
		w.checkSimulation(t, r, i%8-1)
	}
}

// A large cluster takes bounded time and still gives an example.
func TestSimulateIsBounded(t *testing.T) {
	var cs []Custodian
	for i := range 120 {
		cs = append(cs, Custodian{ID: fmt.Sprintf("c%03d", i), Site: siteNames[i%4]})
	}
	r := Rule{Action: kms.ActionRotate, Approvals: 60, Sites: 4, Required: siteNames, Veto: []string{"c000", "zoe"}}
	s := Simulate(r, cs, proposerID(-1))
	if !s.Possible || !s.More || len(s.Quorums) == 0 || len(s.Quorums[0]) != 60 || !slices.Equal(s.Vetoes, []string{"c000"}) {
		t.Errorf("%+v", s)
	}
	var last []Weight
	for i := 100; i < 120; i++ {
		last = append(last, Weight{fmt.Sprintf("c%03d", i), 1})
	}
	r = Rule{Action: kms.ActionDestroy, Approvals: 1, Sites: 1, Need: &Group{Need: 20, Custodians: last}}
	s = Simulate(r, cs, proposerID(-1))
	if len(s.Quorums) != 1 || len(s.Quorums[0]) != 20 || !s.More || len(s.LockedOutBy) != 24 || !s.AnyVeto {
		t.Errorf("%+v", s)
	}
}

func TestSimulateDirectAndCredentials(t *testing.T) {
	if s := Simulate(Rule{Action: kms.ActionCreate, Direct: []string{"operator"}}, nil, ""); !s.Possible || !slices.Equal(s.Direct, []string{"operator"}) {
		t.Errorf("%+v", s)
	}
	k1, k2, off := Credential{ID: "1"}, Credential{ID: "2"}, Credential{ID: "3", Suspended: true}
	cs := []Custodian{
		{ID: "a", Site: "de", Credentials: []Credential{k1, off}}, {ID: "b", Site: "fr", Credentials: []Credential{k1, k2}},
		{ID: "c", Site: "fr", Credentials: []Credential{off}}, {ID: "d", Site: "de", Credentials: []Credential{k1}, Revoked: true},
	}
	s := Simulate(Rule{Action: kms.ActionRotate, Approvals: 2, Sites: 2}, cs, proposerID(-1))
	var lost []string
	for _, l := range s.LockedOutBy {
		lost = append(lost, l.String())
	}
	if got := strings.Join(lost, ", "); got != "site de, site fr, custodian a, the only credential of a, custodian b" {
		t.Errorf("%s", got)
	}
	if !slices.Equal(s.Approvers, []string{"a", "b"}) {
		t.Errorf("%v can approve; the only credential of c is suspended, d is revoked", s.Approvers)
	}
	if s := Simulate(Rule{Action: kms.ActionRotate}, cs, proposerID(-1)); s.Possible || len(s.Missing) == 0 {
		t.Errorf("a rule that is none: %+v", s)
	}
}
