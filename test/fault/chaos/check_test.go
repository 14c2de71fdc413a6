package chaos

import (
	"slices"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
)

// honest is a history as a sound cluster makes it: a key, a rotation that two
// custodians approve, and readings in between.
func honest() []Op {
	at := func(o Op, call int) Op {
		o.Key, o.Node, o.Call, o.Return = "k", "fr-1", time.Duration(call)*time.Second, time.Duration(call+1)*time.Second
		return o
	}
	fr1, de1 := slices.Index(custodians[:], "fr-1"), slices.Index(custodians[:], "de-1")
	one, two := votes{}, votes{}
	one[fr1] = approve
	two[fr1], two[de1] = approve, approve
	return []Op{
		at(Op{Kind: ReadKey, Outcome: NotFound}, 0),
		at(Op{Kind: CreateKey, Outcome: OK}, 2),
		at(Op{Kind: ReadKey, Outcome: OK, Latest: 1, Primary: 1, Revision: 1}, 4),
		at(Op{Kind: OpenProposal, Outcome: OK, ID: "p", Action: kms.ActionRotate}, 6),
		at(Op{Kind: ReadKey, Outcome: OK, Latest: 1, Primary: 1, Revision: 1, IDs: []string{"p"}}, 8),
		at(Op{Kind: Vote, Outcome: OK, ID: "p", Custodian: fr1, Verdict: approve}, 10),
		at(Op{Kind: ReadProposal, Outcome: OK, ID: "p", Progress: open, Votes: one}, 12),
		at(Op{Kind: Vote, Outcome: OK, ID: "p", Custodian: de1, Verdict: approve}, 14),
		at(Op{Kind: ReadProposal, Outcome: OK, ID: "p", Progress: authorised, Met: true, Votes: two}, 16),
		at(Op{Kind: ReadKey, Outcome: OK, Latest: 2, Primary: 1, Revision: 2}, 18),
		at(Op{Kind: ReadKey, Outcome: OK, Latest: 2, Primary: 2, Revision: 3}, 20),
		at(Op{Kind: ReadProposal, Outcome: OK, ID: "p", Progress: executed, Votes: two}, 22),
	}
}

// TestCheckerDecides: the honest history passes; each lie about it is found.
func TestCheckerDecides(t *testing.T) {
	if v := Check(honest(), time.Minute, ""); len(v.Violations)+len(v.Undecided) > 0 || v.Keys != 1 || v.Ops != 12 {
		t.Fatalf("the honest history: %+v", v)
	}
	lies := map[string]func(h []Op) []Op{
		"a stale read of the key":           func(h []Op) []Op { h[9], h[10] = swapTimes(h[9], h[10]); return h },
		"a stale read of the proposal":      func(h []Op) []Op { h[6], h[8] = swapTimes(h[6], h[8]); return h },
		"a key that was not there any more": func(h []Op) []Op { h[0], h[2] = swapTimes(h[0], h[2]); return h },
		"a lost key": func(h []Op) []Op {
			return append(h[:2:2], Op{Kind: ReadKey, Key: "k", Call: time.Hour, Return: time.Hour, Outcome: NotFound})
		},
		"a lost vote":                           func(h []Op) []Op { h[8].Votes, h[8].Progress, h[8].Met = h[6].Votes, open, false; return h[:9] },
		"a lost proposal":                       func(h []Op) []Op { h[4].IDs = nil; return h[:5] },
		"a quorum of one nation":                func(h []Op) []Op { h[7].Custodian = slices.Index(custodians[:], "fr-2"); return h },
		"a custodian counted twice":             func(h []Op) []Op { h[7].Custodian = h[5].Custodian; return h },
		"a decision without its votes":          func(h []Op) []Op { h[6].Met, h[6].Progress = true, authorised; return h },
		"a rotation without a quorum":           func(h []Op) []Op { return slices.Delete(h, 7, 9) },
		"a rotation without a proposal":         func(h []Op) []Op { return slices.Delete(h, 3, 9) },
		"two versions for one approval":         func(h []Op) []Op { h[9].Latest, h[10].Latest = 3, 3; return h },
		"a suspension that nobody asked for":    func(h []Op) []Op { h[10].Suspended = true; return h },
		"a revision that goes back":             func(h []Op) []Op { h[10].Revision = 1; return h },
		"an executed proposal that still lives": func(h []Op) []Op { h[10].IDs = []string{"p"}; return h },
	}
	for name, lie := range lies {
		if v := Check(lie(honest()), time.Minute, ""); len(v.Violations) != 1 {
			t.Errorf("%s is not found", name)
		}
	}
	// What nobody was told of may be or not be.
	for _, happened := range []bool{false, true} {
		h := honest()
		h[7].Outcome = Unknown
		if !happened {
			h = h[:8]
			h = append(h, Op{Kind: ReadProposal, Key: "k", ID: "p", Call: time.Hour, Return: time.Hour, Outcome: OK, Progress: open, Votes: h[6].Votes})
		}
		if v := Check(h, time.Minute, ""); len(v.Violations)+len(v.Undecided) > 0 {
			t.Errorf("an unknown outcome (%v): %+v", happened, v)
		}
	}
}

// swapTimes has the later operation answered first.
func swapTimes(a, b Op) (Op, Op) {
	a.Call, a.Return, b.Call, b.Return = b.Call, b.Return, a.Call, a.Return
	return a, b
}
