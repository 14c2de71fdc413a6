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

var siteNames = []string{"de", "fr", "jp", "us"}

// world is a set of custodians c0, c1, ... as bit masks.
type world struct {
	site    []int // of each custodian
	revoked uint
}

func (w world) custodian(id string) (Custodian, bool) {
	var i int
	if _, err := fmt.Sscanf(id, "c%d", &i); err != nil || i >= len(w.site) || id != fmt.Sprintf("c%d", i) {
		return Custodian{}, false
	}
	return Custodian{ID: id, Site: siteNames[w.site[i]], Revoked: w.revoked>>i&1 == 1}, true
}

func (w world) all() []Custodian {
	var cs []Custodian
	for i := range w.site {
		c, _ := w.custodian(fmt.Sprintf("c%d", i))
		cs = append(cs, c)
	}
	return cs
}

func ids(mask uint) (list []string) {
	for i := range bits.Len(mask) {
		if mask>>i&1 == 1 {
			list = append(list, fmt.Sprintf("c%d", i))
		}
	}
	return list
}

// sitesOf returns the sites of a set of custodians as a mask.
func (w world) sitesOf(set uint) (m uint) {
	for i, s := range w.site {
		if set>>i&1 == 1 {
			m |= 1 << s
		}
	}
	return m
}

func requiredMask(r Rule) (m uint) {
	for _, s := range r.Required {
		m |= 1 << slices.Index(siteNames, s)
	}
	return m
}

// dumb asks whether there is any set of custodians, all of them approving and
// allowed to count, that has the rule's numbers. proposer is -1 for nobody.
func (w world) dumb(r Rule, proposer int, approvals uint) bool {
	allowed := approvals &^ w.revoked
	if proposer >= 0 && !r.ProposerMayApprove {
		allowed &^= 1 << proposer
	}
	for set := uint(0); set < 1<<len(w.site); set++ {
		if set&^allowed != 0 {
			continue
		}
		s := w.sitesOf(set)
		if bits.OnesCount(set) >= int(r.Approvals) && bits.OnesCount(s) >= int(r.Sites) && requiredMask(r)&^s == 0 &&
			(r.Need == nil || w.dumbGroup(r.Need, set)) {
			return true
		}
	}
	return false
}

func proposerID(i int) string {
	if i < 0 {
		return "spiffe://fr.example/operator/anna"
	}
	return fmt.Sprintf("spiffe://fr.example/custodian/c%d", i)
}

func genWorld(t *rapid.T) world {
	n := rapid.IntRange(0, 9).Draw(t, "custodians")
	return world{
		site:    rapid.SliceOfN(rapid.IntRange(0, 3), n, n).Draw(t, "sites"),
		revoked: rapid.UintRange(0, 1<<n-1).Draw(t, "revoked") & rapid.UintRange(0, 1<<n-1).Draw(t, "revoked too"),
	}
}

// genRule draws a quorum rule that Validate accepts.
func genRule(t *rapid.T, label string) Rule {
	a := rapid.Uint32Range(1, 10).Draw(t, label+" approvals")
	s := rapid.Uint32Range(1, min(a, 4)).Draw(t, label+" at sites")
	var req []string
	for i, name := range siteNames {
		if rapid.UintRange(0, 15).Draw(t, label+" required")>>i&1 == 1 && len(req) < int(s) {
			req = append(req, name)
		}
	}
	r := Rule{
		Action: kms.ActionRotate, Approvals: a, Sites: s, Required: req,
		ProposerMayApprove: rapid.Bool().Draw(t, label+" proposer may"),
		NotBefore:          rapid.SampledFrom([]int64{0, 0, 1, 1 << 40}).Draw(t, label+" not before"),
		Delay:              rapid.Int64Range(0, 1000).Draw(t, label+" delay"),
		Lifetime:           rapid.Int64Range(MinLifetime, MaxLifetime).Draw(t, label+" lifetime"),
		Veto:               rapid.SampledFrom([][]string{nil, {"c0"}, {"c0", "c3"}, {"c1"}}).Draw(t, label+" veto"),
	}
	if rapid.Bool().Draw(t, label+" has a group") {
		r.Need = genGroup(t, 3)
	}
	if err := r.Validate(); err != nil {
		t.Fatal(err)
	}
	return r
}

func genProposer(t *rapid.T, w world) int {
	return rapid.IntRange(-1, len(w.site)-1).Draw(t, "proposer")
}

func TestDecideAgainstDumbVersion(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w, r := genWorld(t), genRule(t, "rule")
		proposer := genProposer(t, w)
		for set := uint(0); set < 1<<len(w.site); set++ {
			// Repetitions and strangers change nothing.
			approvals := append(ids(set), ids(set)...)
			approvals = append(approvals, "stranger", "")
			d := r.Decide(proposerID(proposer), w.custodian, approvals)
			if want := w.dumb(r, proposer, set); d.Met != want {
				t.Fatalf("approvals %v: Decide says %+v, the dumb version %v", ids(set), d, want)
			}
			if d.Met != (len(d.Missing) == 0) {
				t.Fatalf("met and missing contradict: %+v", d)
			}
			counted := set &^ w.revoked
			if proposer >= 0 && !r.ProposerMayApprove {
				counted &^= 1 << proposer
			}
			if d.Approvals != bits.OnesCount(counted) || d.Sites != bits.OnesCount(w.sitesOf(counted)) {
				t.Fatalf("approvals %v: counted %+v", ids(set), d)
			}
		}
	})
}

// TestDecideExhaustively takes every rule over 5 custodians at 3 sites, every
// proposer, every set of revoked and of approving custodians.
func TestDecideExhaustively(t *testing.T) {
	w := world{site: []int{0, 0, 1, 1, 2}}
	cases := 0
	for a := uint32(1); a <= 6; a++ {
		for s := uint32(1); s <= min(a, 4); s++ {
			for req := range 8 {
				if bits.OnesCount(uint(req)) > int(s) {
					continue
				}
				for flags := range 2 {
					r := Rule{Action: kms.ActionRotate, Approvals: a, Sites: s, ProposerMayApprove: flags == 1, Lifetime: MinLifetime}
					for i, name := range siteNames[:3] {
						if req>>i&1 == 1 {
							r.Required = append(r.Required, name)
						}
					}
					cases += exhaust(t, w, r)
				}
			}
		}
	}
	if cases < 50_000 {
		t.Fatalf("only %d cases", cases)
	}
}

func exhaust(t *testing.T, w world, r Rule) (cases int) {
	t.Helper()
	for proposer := -1; proposer < len(w.site); proposer++ {
		for w.revoked = 0; w.revoked < 1<<len(w.site); w.revoked += 7 {
			for set := uint(0); set < 1<<len(w.site); set++ {
				cases++
				if got, want := r.Decide(proposerID(proposer), w.custodian, ids(set)).Met, w.dumb(r, proposer, set); got != want {
					t.Fatalf("%+v proposer %d revoked %05b approvals %05b: %v, want %v", r, proposer, w.revoked, set, got, want)
				}
			}
		}
	}
	return cases
}

func TestPossibleAgainstDumbVersion(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w, r := genWorld(t), genRule(t, "rule")
		r.Veto = nil
		err := Policy{Name: "p", Rules: []Rule{r}}.Possible(w.all())
		if want := w.dumb(r, -1, 1<<len(w.site)-1) && !w.strangers(r); (err == nil) != want {
			t.Fatalf("Possible says %v, the dumb version %v", err, want)
		}
	})
}

func TestStricterIsStricterThanBoth(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w, a, b := genWorld(t), genRule(t, "a"), genRule(t, "b")
		proposer := genProposer(t, w)
		s := a.Stricter(b)
		if err := s.Validate(); err != nil {
			t.Fatalf("stricter of two valid rules with short delays: %v", err)
		}
		if s.Delay < max(a.Delay, b.Delay) || s.Lifetime > min(a.Lifetime, b.Lifetime) || s.NotBefore < max(a.NotBefore, b.NotBefore) || s.Action != a.Action {
			t.Fatalf("times or action: %+v", s)
		}
		for _, v := range slices.Concat(a.Veto, b.Veto) {
			if !slices.Contains(s.Veto, v) {
				t.Fatalf("veto of %s is lost", v)
			}
		}
		for set := uint(0); set < 1<<len(w.site); set++ {
			p, approvals := proposerID(proposer), ids(set)
			both := a.Decide(p, w.custodian, approvals).Met && b.Decide(p, w.custodian, approvals).Met
			got := s.Decide(p, w.custodian, approvals).Met
			if got && !both {
				t.Fatalf("approvals %v: accepted by the stricter rule and not by both", approvals)
			}
			if both && !got && a.ProposerMayApprove == b.ProposerMayApprove {
				t.Fatalf("approvals %v: both accept, the stricter refuses beyond need", approvals)
			}
		}
	})
}

func TestStricterOfDirectRules(t *testing.T) {
	direct := func(roles ...string) Rule { return Rule{Action: kms.ActionRotate, Direct: roles} }
	q := Rule{Action: kms.ActionRotate, Approvals: 2, Sites: 2, Lifetime: MinLifetime}
	for _, c := range []struct {
		a, b Rule
		ok   bool
		want Rule
	}{
		{direct("operator"), q, true, q},
		{q, direct("operator"), true, q},
		{direct("operator", "service"), direct("auditor", "service"), true, direct("service")},
		{direct("operator"), direct("service"), false, Rule{Action: kms.ActionRotate}},
		{Rule{}, q, false, Rule{}},
		{q, Rule{}, false, Rule{Action: kms.ActionRotate}},
	} {
		got := c.a.Stricter(c.b)
		if fmt.Sprint(got) != fmt.Sprint(c.want) || (got.Validate() == nil) != c.ok {
			t.Errorf("%+v with %+v: %+v, %v", c.a, c.b, got, got.Validate())
		}
		if got.Decide(proposerID(-1), world{}.custodian, nil).Met {
			t.Errorf("%+v is met by nobody", got)
		}
	}
}

func TestDecideFailsClosed(t *testing.T) {
	w := world{site: []int{0, 1}}
	everybody := []string{"c0", "c1"}
	for name, r := range map[string]Rule{
		"no thresholds":       {Action: kms.ActionRotate},
		"no approvals":        {Action: kms.ActionRotate, Sites: 1},
		"no sites":            {Action: kms.ActionRotate, Approvals: 1},
		"direct":              {Action: kms.ActionRotate, Direct: []string{"operator"}},
		"direct and a quorum": {Action: kms.ActionRotate, Direct: []string{"operator"}, Approvals: 1, Sites: 1},
	} {
		if d := r.Decide(proposerID(-1), w.custodian, everybody); d.Met || len(d.Missing) == 0 {
			t.Errorf("%s: %+v", name, d)
		}
	}
	r := Rule{Action: kms.ActionRotate, Approvals: 1, Sites: 1}
	if d := r.Decide("nobody", w.custodian, everybody); d.Met {
		t.Errorf("a proposer without an identity: %+v", d)
	}
	// A lookup that answers with somebody else's record is not believed.
	if d := r.Decide(proposerID(-1), func(string) (Custodian, bool) { return Custodian{ID: "c9", Site: "fr"}, true }, everybody); d.Met {
		t.Errorf("a record of another custodian: %+v", d)
	}
}

func TestMissingIsSaidInWords(t *testing.T) {
	w := world{site: []int{0, 0, 1, 2}}
	r := Rule{Action: kms.ActionRotate, Approvals: 3, Sites: 2, Required: []string{"jp"}}
	d := r.Decide(proposerID(0), w.custodian, []string{"c0", "c1"})
	if got, want := strings.Join(d.Missing, "; "), "2 more approvals; custodians of 1 more site; a custodian of site jp"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestPossibleSaysTheArithmetic(t *testing.T) {
	w := world{site: []int{0, 0, 1, 1}, revoked: 8}
	for _, c := range []struct {
		rule Rule
		want string
	}{
		{Rule{Approvals: 4, Sites: 1}, `policy p: rule for "rotate" needs 4 approvals, but there are 3 custodians that are not revoked`},
		{Rule{Approvals: 3, Sites: 3}, `policy p: rule for "rotate" needs approvals from 3 sites, but the 3 custodians are at 2 sites`},
		{Rule{Approvals: 2, Sites: 1, Required: []string{"jp"}}, `policy p: rule for "rotate" requires site jp, where no custodian is that is not revoked`},
		{Rule{Approvals: 1, Sites: 1, Veto: []string{"zoe"}}, `policy p: rule for "rotate" gives a veto to zoe, who is no custodian`},
		{Rule{}, `policy p: rule for "rotate" has no thresholds`},
		{Rule{Approvals: 1, Sites: 1, Veto: []string{"c3"}}, ""},
		{Rule{Direct: []string{"operator"}}, ""},
	} {
		c.rule.Action = kms.ActionRotate
		got := ""
		if err := (Policy{Name: "p", Rules: []Rule{c.rule}}).Possible(w.all()); err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
}
