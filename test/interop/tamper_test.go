package interop

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// class is a way to tamper with evidence. It returns a file, or false where the
// sample has nothing of the kind.
type class struct {
	name   string
	tamper func(ed editor, s sample, other sample) ([]byte, bool)
}

// inPlace is a class that changes a copy of the evidence.
func inPlace(name string, f func(ed editor, s sample, other sample, e *audit.Evidence) bool) class {
	return class{name, func(ed editor, s sample, other sample) ([]byte, bool) {
		e := clone(ed.t, s.e)
		if !f(ed, s, other, &e) {
			return nil, false
		}
		return e.Marshal(), true
	}}
}

// decisions returns every decision in evidence.
func decisions(e *audit.Evidence) (l []*audit.Decision) {
	l = append(l, &e.Decision)
	for _, d := range [][]audit.Decision{e.Governance, e.Later} {
		for i := range d {
			l = append(l, &d[i])
		}
	}
	return l
}

// signedCommands returns the places of all commands in evidence.
func signedCommands(e *audit.Evidence) (l []*[]byte) {
	for _, d := range decisions(e) {
		l = append(l, &d.Open, &d.Execution, &d.Adoption)
		for i := range d.Suspensions {
			l = append(l, &d.Suspensions[i])
		}
	}
	l = append(l, &e.Keyring, &e.Key)
	for i := range e.Receipts {
		l = append(l, &e.Receipts[i])
	}
	return slices.DeleteFunc(l, func(b *[]byte) bool { return len(*b) == 0 })
}

// lists returns what in evidence is a list of several, as functions that rearrange it.
func lists(ed editor, e *audit.Evidence, f func(n int) []int) bool {
	var can []func()
	add := func(n int, set func(order []int)) {
		if n > 1 {
			can = append(can, func() { set(f(n)) })
		}
	}
	add(len(e.Governance), func(o []int) { e.Governance = arranged(e.Governance, o) })
	add(len(e.Later), func(o []int) { e.Later = arranged(e.Later, o) })
	add(len(e.Receipts), func(o []int) { e.Receipts = arranged(e.Receipts, o) })
	add(len(e.Recoveries), func(o []int) { e.Recoveries = arranged(e.Recoveries, o) })
	d := statetest.Pick(ed.r, decisions(e))
	add(len(d.Suspensions), func(o []int) { d.Suspensions = arranged(d.Suspensions, o) })
	add(len(d.Votes), func(o []int) { d.Votes = arranged(d.Votes, o) })
	if len(can) == 0 {
		return false
	}
	statetest.Pick(ed.r, can)()
	return true
}

func arranged[T any](l []T, order []int) (out []T) {
	for _, i := range order {
		out = append(out, l[i])
	}
	return out
}

func ordered(n int) (o []int) {
	for i := range n {
		o = append(o, i)
	}
	return o
}

var classes = []class{
	{"a byte of the file", func(ed editor, s, _ sample) ([]byte, bool) {
		b := s.e.Marshal()
		b[ed.r.IntN(len(b))] ^= 1 << ed.r.IntN(7)
		return b, true
	}},
	{"the file's form", reformatted},
	inPlace("a command edited, its signature left", func(ed editor, _, _ sample, e *audit.Evidence) bool {
		b := statetest.Pick(ed.r, signedCommands(e))
		*b = ed.tampered(*b)
		return true
	}),
	inPlace("a command edited, signed again by its node", func(ed editor, s, _ sample, e *audit.Evidence) bool {
		b := statetest.Pick(ed.r, signedCommands(e))
		*b = ed.resigned(s.w, *b)
		return true
	}),
	inPlace("a proposal edited, signatures left", func(ed editor, _, _ sample, e *audit.Evidence) bool {
		d := statetest.Pick(ed.r, decisions(e))
		d.Proposal = canon.Marshal(ed.change(ed.loose(d.Proposal)))
		return true
	}),
	inPlace("a proposal edited, signed again by all", func(ed editor, s, _ sample, e *audit.Evidence) bool {
		d := statetest.Pick(ed.r, decisions(e))
		again, ok := ed.reproposed(s.w, *d)
		*d = again
		return ok
	}),
	inPlace("a vote edited", func(ed editor, _, _ sample, e *audit.Evidence) bool {
		d := statetest.Pick(ed.r, decisions(e))
		if len(d.Votes) == 0 {
			return false
		}
		v := &d.Votes[ed.r.IntN(len(d.Votes))]
		text := statetest.Pick(ed.r, []*string{&v.Proposal, &v.Custodian, &v.Credential, (*string)(&v.Verdict), nil})
		if text == nil {
			v.Signature = statetest.Editor{R: ed.r}.Bytes(v.Signature)
			return true
		}
		*text = strings.ToValidUTF8(ed.change(*text).(string), "")
		return true
	}),
	inPlace("other votes, truly signed", otherVotes),
	inPlace("times moved, signed again by all", movedTimes),
	inPlace("a threshold lowered, signed again by all", loweredThreshold),
	inPlace("a group or a time of release changed, signed again by all", changedGroup),
	inPlace("suites forbidden, signed again by all", forbade),
	inPlace("the genesis edited", editedGenesis),
	inPlace("something dropped", dropped),
	inPlace("something in another order", func(ed editor, _, _ sample, e *audit.Evidence) bool {
		return lists(ed, e, func(n int) []int {
			o := ordered(n)
			i := ed.r.IntN(n - 1)
			o[i], o[i+1] = o[i+1], o[i]
			return o
		})
	}),
	inPlace("something twice", func(ed editor, _, _ sample, e *audit.Evidence) bool {
		return lists(ed, e, func(n int) []int {
			i := ed.r.IntN(n)
			return slices.Insert(ordered(n), i, i)
		})
	}),
	inPlace("something of another decision", func(ed editor, _, _ sample, e *audit.Evidence) bool {
		d, from := statetest.Pick(ed.r, decisions(e)), statetest.Pick(ed.r, decisions(e))
		return d != from && graft(ed, d, from)
	}),
	inPlace("something of another cluster", foreign),
	inPlace("a recovery edited", func(ed editor, _, _ sample, e *audit.Evidence) bool {
		if len(e.Recoveries) == 0 {
			return false
		}
		i := ed.r.IntN(len(e.Recoveries))
		if ed.r.IntN(2) == 0 {
			e.Recoveries[i] = statetest.Editor{R: ed.r}.Bytes(e.Recoveries[i])
		} else {
			e.Recoveries[i] = canon.Marshal(ed.change(ed.loose(e.Recoveries[i])))
		}
		return true
	}),
}

func reformatted(ed editor, s, _ sample) ([]byte, bool) {
	b := s.e.Marshal()
	text := string(b)
	switch ed.r.IntN(9) {
	case 0:
		return []byte(strings.TrimSuffix(text, "\n")), true
	case 1:
		return []byte(strings.Replace(text, `"format": 2`, `"format": 3`, 1)), true
	case 2:
		return []byte(strings.Replace(text, `"format": 2`, `"format": 2, "format": 2`, 1)), true
	case 3:
		return []byte(strings.Replace(text, `"format"`, `"Format"`, 1)), true
	case 4:
		return []byte(strings.Replace(text, `"format": 2,`, `"format": 2, "signed": true,`, 1)), true
	case 5:
		return append(b, "{}"...), true
	case 6:
		return b[:ed.r.IntN(len(b))], true
	case 7:
		return []byte(strings.Replace(text, `"cluster": "`, `"cluster": "\u0030`, 1)), true
	}
	var v map[string]any
	if err := json.Unmarshal(b, &v); err != nil {
		ed.t.Fatal(err)
	}
	out, err := json.Marshal(v)
	if err != nil {
		ed.t.Fatal(err)
	}
	return out, true
}

// otherVotes lets other custodians decide, who all truly sign.
func otherVotes(ed editor, s, _ sample, e *audit.Evidence) bool {
	if len(e.Decision.Votes) == 0 {
		return false
	}
	var votes []approval.Statement
	for _, c := range s.w.State().Custodians() {
		if ed.r.IntN(2) == 0 || c.Revoked {
			continue
		}
		verdict := approval.Approve
		if ed.r.IntN(4) == 0 {
			verdict = approval.Reject
		}
		v := ed.statement(s.w, approval.Statement{Custodian: c.ID, Credential: c.Credentials[0].ID, Verdict: verdict}, e.Decision.Proposal)
		if v != nil {
			votes = append(votes, *v)
		}
	}
	e.Decision.Votes = votes
	return true
}

// movedTimes moves the times of the decision's proposal or of its execution to the
// edge of what is allowed and beyond.
func movedTimes(ed editor, s, _ sample, e *audit.Evidence) bool {
	p, err := approval.ParseProposal(e.Decision.Proposal)
	if err != nil {
		ed.t.Fatal(err)
	}
	at := p.Created + statetest.Pick(ed.r, []int64{0, 1, -1, state.Window, -2 * state.Window, -2*state.Window - 1, -state.Window - 1, 7*24*3_600_000 - 2*state.Window - 1})
	switch ed.r.IntN(3) {
	case 0:
		p.NotBefore = max(p.Created, at) + state.Window
	case 1:
		p.Created = max(1, at)
	}
	d, ok := ed.redecided(s.w, e.Decision, p.Marshal())
	if !ok {
		return false
	}
	move := func(v *state.Envelope) { v.Time = max(1, at) }
	switch parsed(ed.t, d.Execution).(type) {
	case state.Execute:
		d.Execution = rewrite(ed, s.w, d.Execution, func(v *state.Envelope, _ *state.Execute) { move(v) })
	case state.CommitRotation:
		d.Execution = rewrite(ed, s.w, d.Execution, func(v *state.Envelope, _ *state.CommitRotation) { move(v) })
	}
	e.Decision = d
	return true
}

// loweredThreshold changes a rule in a decision on a policy, which the custodians who
// took part sign once more: enough for the new rule, perhaps not for the old one.
func loweredThreshold(ed editor, s, _ sample, e *audit.Evidence) bool {
	for _, d := range decisions(e) {
		p, err := approval.ParseProposal(d.Proposal)
		if err != nil {
			ed.t.Fatal(err)
		}
		if p.Action != kms.ActionPolicy {
			continue
		}
		params, err := p.PolicyParams()
		if err != nil {
			ed.t.Fatal(err)
		}
		r := &params.Rules[ed.r.IntN(len(params.Rules))]
		switch {
		case len(r.Direct) > 0:
			*r = approval.Rule{Action: r.Action, Approvals: 1, Sites: 1, Lifetime: approval.MaxLifetime, Delay: approval.MinDestroyDelay}
		case ed.r.IntN(3) == 0:
			*r = approval.Rule{Action: r.Action, Direct: []string{"operator"}}
		default:
			r.Approvals, r.Sites, r.Required = uint32(ed.r.IntN(5)), uint32(ed.r.IntN(4)), nil
		}
		p.Parameters = canon.Marshal(params)
		again, ok := ed.redecided(s.w, *d, p.Marshal())
		*d = again
		return ok
	}
	return false
}

// editedGenesis changes the genesis, with the nodes' signatures left or made again;
// then it founds another cluster, which is named or not.
func editedGenesis(ed editor, s, _ sample, e *audit.Evidence) bool {
	signed, err := state.ParseSignedGenesis(e.Genesis)
	if err != nil {
		ed.t.Fatal(err)
	}
	b := canon.Marshal(ed.change(ed.loose(signed.Genesis)))
	g, err := state.ParseGenesis(b)
	if err == nil && ed.r.IntN(2) == 0 && len(g.Nodes) == len(signed.Signatures) {
		e.Genesis = s.w.SignGenesis(g).Marshal()
	} else {
		signed.Genesis = b
		e.Genesis = signed.Marshal()
	}
	if ed.r.IntN(2) == 0 {
		e.Cluster = kms.ClusterID(b)
	}
	return true
}

func dropped(ed editor, s, _ sample, e *audit.Evidence) bool {
	d := statetest.Pick(ed.r, decisions(e))
	var can []func()
	add := func(there bool, f func()) {
		if there {
			can = append(can, f)
		}
	}
	add(len(d.Votes) > 0, func() { i := ed.r.IntN(len(d.Votes)); d.Votes = slices.Delete(d.Votes, i, i+1) })
	add(len(d.Adoption) > 0, func() { d.Adoption = nil })
	add(len(e.Governance) > 0, func() { i := ed.r.IntN(len(e.Governance)); e.Governance = slices.Delete(e.Governance, i, i+1) })
	add(len(e.Receipts) > 0, func() { i := ed.r.IntN(len(e.Receipts)); e.Receipts = slices.Delete(e.Receipts, i, i+1) })
	add(len(e.Later) > 0, func() { e.Later = e.Later[:len(e.Later)-1] })
	add(len(e.Recoveries) > 0, func() { e.Recoveries = e.Recoveries[1:] })
	add(len(e.Keyring) > 0, func() { e.Keyring = nil })
	add(len(e.Key) > 0, func() { e.Key = nil })
	add(len(e.KeyID) > 0, func() { e.KeyID = nil })
	add(true, func() { d.Open = nil })
	add(true, func() { d.Execution = nil })
	statetest.Pick(ed.r, can)()
	return true
}

// graft puts a part of one decision in the place of another's.
func graft(ed editor, to, from *audit.Decision) bool {
	switch ed.r.IntN(5) {
	case 0:
		to.Proposal = from.Proposal
	case 1:
		to.Open = from.Open
	case 2:
		to.Votes = from.Votes
	case 3:
		to.Execution = from.Execution
	case 4:
		if bytes.Equal(to.Adoption, from.Adoption) {
			return false
		}
		to.Adoption = from.Adoption
	}
	return true
}

func foreign(ed editor, _, other sample, e *audit.Evidence) bool {
	o := clone(ed.t, other.e)
	d, from := statetest.Pick(ed.r, decisions(e)), statetest.Pick(ed.r, decisions(&o))
	switch ed.r.IntN(8) {
	case 0:
		e.Genesis, e.Cluster = o.Genesis, statetest.Pick(ed.r, []string{e.Cluster, o.Cluster})
	case 1:
		e.Decision = o.Decision
	case 2:
		e.Keyring = o.Keyring
	case 3:
		e.Key = o.Key
	case 4:
		e.Receipts = o.Receipts
	case 5:
		e.Governance = append(e.Governance, *from)
	case 6:
		*e = o
	default:
		return graft(ed, d, from)
	}
	return true
}
