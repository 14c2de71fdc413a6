package approval

import (
	"fmt"
	"math/bits"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
)

// dumbGroup asks whether there is any set of the group's members, each of them
// satisfied by the approvals, that weighs enough.
func (w world) dumbGroup(g *Group, approvals uint) bool {
	var satisfied []bool
	var weights []int
	for _, c := range g.Custodians {
		satisfied, weights = append(satisfied, slices.Contains(ids(approvals), c.Name)), append(weights, int(c.Weight))
	}
	for _, s := range g.Sites {
		n := 0
		for i, at := range w.site {
			if siteNames[at] == s.Name && approvals>>i&1 == 1 {
				n++
			}
		}
		satisfied, weights = append(satisfied, n >= int(s.Approvals)), append(weights, int(s.Weight))
	}
	for i := range g.Groups {
		satisfied, weights = append(satisfied, w.dumbGroup(&g.Groups[i], approvals)), append(weights, int(g.Groups[i].Weight))
	}
	return enough(satisfied, weights, int(g.Need))
}

// enough tries every set of members.
func enough(satisfied []bool, weights []int, need int) bool {
	for set := range 1 << len(weights) {
		sum, all := 0, true
		for i, w := range weights {
			if set>>i&1 == 1 {
				sum, all = sum+w, all && satisfied[i]
			}
		}
		if all && sum >= need {
			return true
		}
	}
	return false
}

// tabled is a group and on which sets of approvals the dumb version has it met.
type tabled struct {
	g     Group
	table [128]bool
}

// flat returns every k-of of custodians, every k-of of sites for one and for two
// approvals each, and weighted groups of both kinds.
func (w world) flat() (all []tabled) {
	add := func(g Group) {
		x := tabled{g: g}
		for set := range uint(1) << len(w.site) {
			x.table[set] = w.dumbGroup(&g, set)
		}
		all = append(all, x)
	}
	for mask := uint(1); mask < 1<<len(w.site); mask++ {
		g, heavy := Group{}, Group{}
		for i, id := range ids(mask) {
			g.Custodians = append(g.Custodians, Weight{id, 1})
			heavy.Custodians = append(heavy.Custodians, Weight{id, uint32(i%3 + 1)})
		}
		for g.Need = 1; int(g.Need) <= len(g.Custodians); g.Need++ {
			add(g)
		}
		if total, _ := heavy.total(); mask%5 == 0 {
			for heavy.Need = 2; uint64(heavy.Need) <= total; heavy.Need += 2 {
				add(heavy)
			}
		}
	}
	for mask := 1; mask < 16; mask++ {
		for approvals := uint32(1); approvals <= 2; approvals++ {
			g := Group{}
			for i, s := range siteNames {
				if mask>>i&1 == 1 {
					g.Sites = append(g.Sites, SiteWeight{s, 1, approvals})
				}
			}
			for g.Need = 1; int(g.Need) <= len(g.Sites); g.Need++ {
				add(g)
			}
			g.Custodians, g.Sites = []Weight{{"c0", 2}}, slices.Clone(g.Sites)
			g.Sites[0].Weight = 3
			for g.Need = 1; g.Need <= 5; g.Need++ {
				add(g)
			}
		}
	}
	return all
}

// joined returns groups of three members: two of the given ones and a custodian, with
// every need there can be, once with equal weights and once with unequal ones.
func joined(parts []tabled, step int) (all []tabled) {
	for i := 0; i < len(parts); i += step {
		for j := i % step; j < len(parts); j += 3 * step {
			for _, w := range [][3]uint32{{1, 1, 1}, {3, 2, 1}} {
				a, b := parts[i], parts[j]
				a.g.Weight, b.g.Weight = w[0], w[1]
				c := i % 3
				g := Group{Custodians: []Weight{{fmt.Sprintf("c%d", c), w[2]}}, Groups: []Group{a.g, b.g}}
				for g.Need = 1; g.Need <= w[0]+w[1]+w[2]; g.Need++ {
					x := tabled{g: g}
					for set := range x.table {
						x.table[set] = enough([]bool{a.table[set], b.table[set], set>>c&1 == 1}, []int{int(w[0]), int(w[1]), int(w[2])}, int(g.Need))
					}
					all = append(all, x)
				}
			}
		}
	}
	return all
}

func (w world) tallies() (all []tally) {
	for set := range uint(1) << len(w.site) {
		t := tally{map[string]bool{}, map[string]int{}}
		for _, id := range ids(set) {
			c, _ := w.custodian(id)
			t.custodians[id] = true
			t.sites[c.Site]++
		}
		all = append(all, t)
	}
	return all
}

var groupWorlds = []world{
	{site: []int{0}}, {site: []int{0, 1}}, {site: []int{0, 1, 2}}, {site: []int{0, 1, 2, 3}}, {site: []int{0, 0, 1, 2, 3}},
	{site: []int{0, 0, 1, 1, 2, 3}}, {site: []int{0, 0, 1, 1, 2, 2, 3}}, {site: []int{0, 0, 0, 0, 1, 2, 3}},
}

// TestGroupsExhaustively takes every set of approvals of up to 7 custodians at up to 4
// sites under every flat group there is of custodians or of sites, and under groups of
// groups, three levels deep.
func TestGroupsExhaustively(t *testing.T) {
	cases, groups := 0, 0
	for _, w := range groupWorlds {
		tallies := w.tallies()
		flat := w.flat()
		two := joined(flat, 1+len(flat)/30)
		three := joined(two, 1+len(two)/25)
		for _, x := range slices.Concat(flat, two, three) {
			groups++
			if err := x.g.validate(1); err != nil {
				t.Fatalf("%+v: %v", x.g, err)
			}
			for set, tally := range tallies {
				cases++
				if got := x.g.met(tally); got != x.table[set] {
					t.Fatalf("sites %v, %+v, approvals %07b: %v, want %v", w.site, x.g, set, got, x.table[set])
				}
			}
		}
	}
	t.Logf("%d groups, %d cases", groups, cases)
	if groups < 10_000 || cases < 1_000_000 {
		t.Fatalf("only %d groups and %d cases", groups, cases)
	}
}

// TestDecideWithGroupsExhaustively does so with whole rules: thresholds, required
// sites, the proposer and revoked custodians besides.
func TestDecideWithGroupsExhaustively(t *testing.T) {
	cases := 0
	for _, w := range groupWorlds[3:] {
		flat := w.flat()
		n, sets, records := uint32(len(w.site)), [][]string{}, map[string]Custodian{}
		for set := range uint(1) << n {
			sets = append(sets, ids(set))
		}
		for i, x := range slices.Concat(flat[:len(flat):len(flat)], joined(flat, 1+len(flat)/8)) {
			r := Rule{Action: kms.ActionRotate, Approvals: uint32(i)%n + 1, ProposerMayApprove: i%7 == 0, Lifetime: MinLifetime, Need: &x.g}
			r.Sites = min(r.Approvals, uint32(i)%3+1)
			if i%4 == 0 {
				r.Required = siteNames[i/4%4 : i/4%4+1]
			}
			w.revoked = uint(i % 11 * 13 % (1 << n))
			for _, c := range w.all() {
				records[c.ID] = c
			}
			proposer := i%(len(w.site)+1) - 1
			for set, approvals := range sets {
				cases++
				counted := w.counted(r, proposer, uint(set))
				s := w.sitesOf(counted)
				want := bits.OnesCount(counted) >= int(r.Approvals) && bits.OnesCount(s) >= int(r.Sites) && requiredMask(r)&^s == 0 && x.table[counted]
				d := r.Decide(proposerID(proposer), func(id string) (Custodian, bool) { c, ok := records[id]; return c, ok }, approvals)
				if d.Met != want || d.Met != (len(d.Missing) == 0) {
					t.Fatalf("%+v %+v proposer %d revoked %b approvals %b: %+v, want %v", r, x.g, proposer, w.revoked, set, d, want)
				}
			}
		}
	}
	t.Logf("%d cases", cases)
	if cases < 50_000 {
		t.Fatalf("only %d cases", cases)
	}
}

// genGroup draws a valid group of at most the depth.
func genGroup(t *rapid.T, depth int) *Group {
	g := &Group{}
	weight := func() uint32 { return rapid.Uint32Range(1, 3).Draw(t, "weight") }
	total := uint32(0)
	for i := range 9 {
		if rapid.IntRange(0, 3).Draw(t, "has custodian") == 0 {
			g.Custodians = append(g.Custodians, Weight{fmt.Sprintf("c%d", i), weight()})
			total += g.Custodians[len(g.Custodians)-1].Weight
		}
	}
	for _, s := range siteNames {
		if rapid.IntRange(0, 2).Draw(t, "has site") == 0 {
			g.Sites = append(g.Sites, SiteWeight{s, weight(), rapid.Uint32Range(1, 2).Draw(t, "approvals of site")})
			total += g.Sites[len(g.Sites)-1].Weight
		}
	}
	for range rapid.IntRange(0, 2).Draw(t, "groups") {
		if depth > 1 {
			inner := genGroup(t, depth-1)
			inner.Weight = weight()
			g.Groups = append(g.Groups, *inner)
			total += inner.Weight
		}
	}
	if total == 0 {
		g.Custodians, total = []Weight{{"c0", 1}}, 1
	}
	g.Need = rapid.Uint32Range(1, total).Draw(t, "need")
	return g
}

// strangers reports whether a group names a custodian whom the world has not.
func (w world) strangers(r Rule) (any bool) {
	r.Need.each(func(g *Group) {
		for _, c := range g.Custodians {
			_, ok := w.custodian(c.Name)
			any = any || !ok
		}
	})
	return any
}

// More approvals never undo a quorum.
func TestDecideIsMonotone(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w, r := genWorld(t), genRule(t, "rule")
		p := proposerID(genProposer(t, w))
		for set := uint(0); set < 1<<len(w.site); set++ {
			if !r.Decide(p, w.custodian, ids(set)).Met {
				continue
			}
			for i := range w.site {
				if !r.Decide(p, w.custodian, ids(set|1<<i)).Met {
					t.Fatalf("met by %v and not with c%d besides", ids(set), i)
				}
			}
		}
	})
}

func TestGroupKeepsItsEncoding(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := genRule(t, "rule")
		var again Rule
		if err := canon.Unmarshal(canon.Marshal(r), &again); err != nil || fmt.Sprintf("%+v", canon.Marshal(again)) != fmt.Sprintf("%+v", canon.Marshal(r)) {
			t.Fatalf("%+v comes back as %+v: %v", r, again, err)
		}
	})
	old := canon.Marshal(Rule{Action: kms.ActionRotate, Approvals: 1, Sites: 1})
	if strings.Contains(string(old), "need") {
		t.Error("a rule without a group is not encoded as it always was")
	}
}

func TestGroupValidate(t *testing.T) {
	leaf := func() Group { return Group{Need: 1, Weight: 1, Custodians: []Weight{{"anna", 1}}} }
	nested := func(levels int) *Group {
		g := leaf()
		for range levels - 1 {
			g = Group{Need: 1, Weight: 1, Groups: []Group{g}}
		}
		g.Weight = 0
		return &g
	}
	many := &Group{Need: 1}
	for i := range maxGroupMembers + 1 {
		many.Custodians = append(many.Custodians, Weight{fmt.Sprintf("c%04d", i), 1})
	}
	for name, c := range map[string]struct {
		g    *Group
		want string
	}{
		"one custodian":        {nested(1), ""},
		"four levels":          {nested(maxGroupDepth), ""},
		"five levels":          {nested(maxGroupDepth + 1), "nested 5 deep; the limit is 4"},
		"six levels":           {nested(maxGroupDepth + 2), "nested more than 4 deep"},
		"too many":             {many, "257 members"},
		"need omitted":         {&Group{Custodians: []Weight{{"anna", 1}}}, "need is missing"},
		"empty":                {&Group{Need: 1}, "needs 1, but the weights of its members add up to 0"},
		"unreachable":          {&Group{Need: 4, Custodians: []Weight{{"anna", 2}, {"ben", 1}}}, "needs 4, but the weights of its members add up to 3"},
		"weight omitted":       {&Group{Need: 1, Custodians: []Weight{{"anna", 0}}}, "anna weighs 0"},
		"weight too large":     {&Group{Need: 1, Sites: []SiteWeight{{"fr", maxWeight + 1, 1}}}, "fr weighs 1001"},
		"approvals omitted":    {&Group{Need: 1, Sites: []SiteWeight{{"fr", 1, 0}}}, "of 1 to 1000 of its custodians, not of 0"},
		"custodian twice":      {&Group{Need: 1, Custodians: []Weight{{"anna", 1}, {"anna", 1}}}, "not sorted or repeats"},
		"sites not sorted":     {&Group{Need: 1, Sites: []SiteWeight{{"fr", 1, 1}, {"de", 1, 1}}}, "not sorted or repeats"},
		"ill named":            {&Group{Need: 1, Custodians: []Weight{{"Anna", 1}}}, "a-z"},
		"outermost has weight": {&Group{Need: 1, Weight: 1, Custodians: []Weight{{"anna", 1}}}, "outermost group has a weight"},
		"inner has no weight":  {&Group{Need: 1, Groups: []Group{{Need: 1, Custodians: []Weight{{"anna", 1}}}}}, "a group in a group weighs 0"},
		"inner unreachable":    {&Group{Need: 1, Groups: []Group{{Need: 2, Weight: 1, Custodians: []Weight{{"anna", 1}}}}}, "needs 2, but"},
	} {
		p := policyOf("keys", kms.KeyActions)
		p.Rules[1].Need = c.g
		switch err := p.Validate(); {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case c.want != "" && (kms.KindOf(err) != kms.Invalid || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	r := Rule{Action: kms.ActionRotate, Direct: []string{"operator"}, Need: nested(1)}
	if err := r.Validate(); err == nil || !strings.Contains(err.Error(), "choose one") {
		t.Errorf("direct with a group: %v", err)
	}
	r = Rule{Action: kms.ActionRotate, Lifetime: MinLifetime, Need: nested(1)}
	if err := r.Validate(); err == nil || !strings.Contains(err.Error(), "approvals is missing") {
		t.Errorf("a group in place of the thresholds: %v", err)
	}
	if r.Decide(proposerID(-1), world{site: []int{0}}.custodian, []string{"c0"}).Met {
		t.Error("a group in place of the thresholds is met")
	}
}

func TestGroupInWords(t *testing.T) {
	w := world{site: []int{0, 0, 1, 2}} // de de fr jp
	allOf := &Group{Need: 2, Custodians: []Weight{{"c0", 1}}, Sites: []SiteWeight{{"fr", 1, 2}}}
	anyOf := &Group{Need: 1, Custodians: []Weight{{"c0", 1}}, Sites: []SiteWeight{{"jp", 1, 1}}}
	weighted := &Group{Need: 3, Custodians: []Weight{{"c0", 2}, {"c1", 1}, {"c3", 1}}}
	inner := *allOf
	inner.Weight = 1
	nested := &Group{Need: 2, Custodians: []Weight{{"c1", 1}, {"c3", 1}}, Groups: []Group{inner}}
	for _, c := range []struct {
		g              *Group
		approvals      []string
		words, missing string
	}{
		{allOf, []string{"c3"}, "c0 and 2 custodians of site fr", "custodian c0; 2 custodians of site fr"},
		{allOf, []string{"c0", "c2"}, "c0 and 2 custodians of site fr", "2 custodians of site fr (1 so far)"},
		{anyOf, []string{"c1"}, "c0 or a custodian of site jp", "1 of: c0, a custodian of site jp"},
		{weighted, []string{"c1"}, "a weight of 3 from: c0 (weighs 2), c1 (weighs 1), c3 (weighs 1)", "a weight of 2 from: c0 (weighs 2), c3 (weighs 1)"},
		{nested, []string{"c1"}, "2 of: c1, c3, (c0 and 2 custodians of site fr)", "1 of: c3, (c0 and 2 custodians of site fr)"},
	} {
		if got := c.g.Words(); got != c.words {
			t.Errorf("%q, want %q", got, c.words)
		}
		d := Rule{Action: kms.ActionRotate, Approvals: 1, Sites: 1, Need: c.g}.Decide(proposerID(-1), w.custodian, c.approvals)
		if got := strings.Join(d.Missing, "; "); got != c.missing {
			t.Errorf("%q, want %q", got, c.missing)
		}
	}
	r := Rule{Action: kms.ActionRotate, Approvals: 1, Sites: 1, Need: allOf}
	err := Policy{Name: "p", Rules: []Rule{r}}.Possible(w.all())
	if want := `policy p: rule for "rotate" has a group that needs 2 of the 2 that its members weigh, but with the custodians that are not revoked it could reach 1; it would still lack 2 custodians of site fr (1 so far)`; err == nil || err.Error() != want {
		t.Errorf("%v", err)
	}
	r.Need = &Group{Need: 1, Custodians: []Weight{{"c0", 1}, {"zoe", 1}}}
	if err := (Policy{Name: "p", Rules: []Rule{r}}).Possible(w.all()); err == nil || !strings.Contains(err.Error(), "zoe, who is no custodian") {
		t.Errorf("%v", err)
	}
}

// A conjunction grows by terms and not by levels, however often rules are joined.
func TestStricterStaysFlat(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var all []Rule
		joined := genRule(t, "first")
		for range 4 {
			r := genRule(t, "another")
			all = append(all, r)
			joined = joined.Stricter(r)
		}
		if err := joined.Validate(); err != nil {
			t.Fatal(err)
		}
		size := bits.Len(uint(len(canon.Marshal(joined))))
		for _, r := range all {
			joined = joined.Stricter(r)
		}
		if again := bits.Len(uint(len(canon.Marshal(joined)))); again != size {
			t.Fatalf("joined with the same rules again it grows from %d to %d bits of length", size, again)
		}
	})
}
