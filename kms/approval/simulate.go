package approval

import (
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
)

// Bounds of a simulation: how many quorums it lists, and how many sets of custodians it
// tries to find them.
const (
	maxQuorums  = 8
	maxAttempts = 20_000
)

// LossKind is what can be lost.
type LossKind string

// The kinds of losses.
const (
	LossCustodian  LossKind = "custodian"
	LossCredential LossKind = "credential" // the only one of a custodian that counts
	LossSite       LossKind = "site"       // all its custodians
)

// Loss is one thing without which a rule could not be met any more.
type Loss struct {
	Kind LossKind `json:"kind"`
	Name string   `json:"name"` // custodian or site; of a credential its custodian
}

// Simulation is what custodians can do under a rule.
type Simulation struct {
	Direct       []string   `json:"direct,omitempty"`        // roles a single one of which decides, and nothing else applies
	Possible     bool       `json:"possible"`                // if all of them approve
	Missing      []string   `json:"missing,omitempty"`       // if all of them approve and that is not enough
	Approvers    []string   `json:"approvers,omitempty"`     // custodians whose approval counts
	Quorums      [][]string `json:"quorums,omitempty"`       // sets that suffice and have nobody to spare, the smallest first
	More         bool       `json:"more,omitempty"`          // there are others, or may be
	LockedOutBy  []Loss     `json:"locked_out_by,omitempty"` // each of them alone
	NationsAlone []string   `json:"nations_alone,omitempty"` // sites each of which could decide without any other
	Vetoes       []string   `json:"vetoes,omitempty"`        // custodians any of whom can end a proposal
	AnyVeto      bool       `json:"any_veto,omitempty"`      // any custodian's rejection ends a proposal
}

// Simulate says what the custodians could do under a rule for a proposal by proposer
// (a SPIFFE ID).
func Simulate(r Rule, custodians []Custodian, proposer string) Simulation {
	if len(r.Direct) > 0 {
		return Simulation{Direct: r.Direct, Possible: true}
	}
	m := model{rule: r, proposer: proposer, records: make(map[string]Custodian)}
	for _, c := range custodians {
		m.records[c.ID] = c
	}
	for _, c := range custodians {
		if c.canVote() && m.decide([]string{c.ID}).Approvals > 0 {
			m.ids = append(m.ids, c.ID)
		}
	}
	slices.Sort(m.ids)
	all := m.decide(m.ids)
	s := Simulation{Possible: all.Met, Missing: all.Missing, Approvers: m.ids, AnyVeto: r.Action == kms.ActionDestroy}
	for _, v := range r.Veto {
		if c, ok := m.records[v]; ok && !c.Revoked {
			s.Vetoes = append(s.Vetoes, v)
		}
	}
	if !s.Possible {
		return s
	}
	s.LockedOutBy, s.NationsAlone = m.losses(), m.alone()
	s.Quorums, s.More = m.quorums()
	return s
}

// model is a rule with those who can approve under it.
type model struct {
	rule     Rule
	proposer string
	records  map[string]Custodian
	ids      []string // of those whose approval counts, sorted
}

func (m *model) decide(ids []string) Decision {
	return m.rule.Decide(m.proposer, func(id string) (Custodian, bool) { c, ok := m.records[id]; return c, ok }, ids)
}

// sites returns the sites of those whose approval counts, sorted.
func (m *model) sites() (sites []string) {
	for _, id := range m.ids {
		sites = append(sites, m.records[id].Site)
	}
	slices.Sort(sites)
	return slices.Compact(sites)
}

// only returns those of them for whom keep holds.
func (m *model) only(keep func(Custodian) bool) []string {
	return slices.DeleteFunc(slices.Clone(m.ids), func(id string) bool { return !keep(m.records[id]) })
}

func (m *model) losses() (lost []Loss) {
	for _, site := range m.sites() {
		if !m.decide(m.only(func(c Custodian) bool { return c.Site != site })).Met {
			lost = append(lost, Loss{LossSite, site})
		}
	}
	for _, id := range m.ids {
		if m.decide(m.only(func(c Custodian) bool { return c.ID != id })).Met {
			continue
		}
		lost = append(lost, Loss{LossCustodian, id})
		if m.records[id].counting() == 1 {
			lost = append(lost, Loss{LossCredential, id})
		}
	}
	return lost
}

func (m *model) alone() (nations []string) {
	for _, site := range m.sites() {
		if m.decide(m.only(func(c Custodian) bool { return c.Site == site })).Met {
			nations = append(nations, site)
		}
	}
	return nations
}

// quorums tries sets of custodians by their size, as long as it may. Where it finds
// none so, it takes from all of them whom they can spare.
func (m *model) quorums() (found [][]string, more bool) {
	attempts := 0
	var try func(set []string, from, left int) bool
	try = func(set []string, from, left int) bool {
		if left > 0 {
			for i := from; i+left <= len(m.ids); i++ {
				if !try(append(set, m.ids[i]), i+1, left-1) {
					return false
				}
			}
			return true
		}
		if attempts++; attempts > maxAttempts || len(found) > maxQuorums {
			return false
		}
		spare := slices.ContainsFunc(found, func(q []string) bool {
			return !slices.ContainsFunc(q, func(id string) bool { return !slices.Contains(set, id) })
		})
		if !spare && m.decide(set).Met {
			found = append(found, slices.Clone(set))
		}
		return true
	}
	for size := int(m.rule.Approvals); size <= len(m.ids) && !more; size++ {
		more = !try(make([]string, 0, size), 0, size)
	}
	if len(found) > maxQuorums {
		found, more = found[:maxQuorums], true
	}
	if len(found) == 0 {
		set := slices.Clone(m.ids)
		for _, id := range m.ids {
			if less := slices.DeleteFunc(slices.Clone(set), func(x string) bool { return x == id }); m.decide(less).Met {
				set = less
			}
		}
		found = [][]string{set}
	}
	return found, more
}

// String says what is lost.
func (l Loss) String() string {
	if l.Kind == LossCredential {
		return "the only credential of " + l.Name
	}
	return strings.Join([]string{string(l.Kind), l.Name}, " ")
}
