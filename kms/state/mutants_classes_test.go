package state_test

import (
	"bytes"
	"crypto/elliptic"
	"math/big"
	"math/rand/v2"
	"slices"

	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// mutation makes mutants of one class: commands that must not be carried out. It
// returns nil where what it drew has nothing to change.
type mutation struct {
	class string
	make  func(g *siege, r *rand.Rand) []byte
}

// mutant draws a class and a mutant of it.
func (g *siege) mutant(r *rand.Rand) (class string, raw []byte) {
	m := statetest.Pick(r, mutations)
	for raw == nil {
		raw = m.make(g, r)
	}
	return m.class, raw
}

func (g *siege) one(r *rand.Rand) good { return statetest.Pick(r, g.good) }

// lax decodes the fields of an envelope.
func lax(b []byte) map[string]any {
	v, err := statetest.Loose(b)
	if err != nil {
		panic(err) // it was encoded by us
	}
	return v.(map[string]any)
}

var mutations = []mutation{
	{"command: bytes changed after signing", func(g *siege, r *rand.Rand) []byte {
		raw := bytes.Clone(g.one(r).raw)
		for range 1 + r.IntN(3) {
			raw[r.IntN(len(raw))] ^= byte(1 + r.IntN(255))
		}
		return unless(raw, g)
	}},
	{"command: cut short or longer", func(g *siege, r *rand.Rand) []byte {
		raw := g.one(r).raw
		switch r.IntN(3) {
		case 0:
			return raw[:r.IntN(len(raw))]
		case 1:
			return append(bytes.Clone(raw), raw[:1+r.IntN(20)]...)
		}
		i := r.IntN(len(raw))
		return slices.Insert(bytes.Clone(raw), i, byte(r.Uint32()))
	}},
	{"command: a field of the envelope edited after signing", func(g *siege, r *rand.Rand) []byte {
		c := g.one(r)
		return differs(c, canon.Marshal(statetest.Editor{R: r}.Change(lax(c.envelope))))
	}},
	{"command: a field of the payload edited after signing", func(g *siege, r *rand.Rand) []byte {
		c := g.one(r)
		m := lax(c.envelope)
		v, err := statetest.Loose(m["payload"].([]byte))
		if err != nil {
			panic(err)
		}
		m["payload"] = canon.Marshal(statetest.Editor{R: r}.Change(v))
		return differs(c, canon.Marshal(m))
	}},
	{"command: fields swapped with another command", func(g *siege, r *rand.Rand) []byte {
		c, o := g.one(r), g.one(r)
		m, from := lax(c.envelope), lax(o.envelope)
		for range 1 + r.IntN(3) {
			k := statetest.Pick(r, []string{"type", "origin", "nonce", "principal", "expect", "payload", "time", "idempotency", "request"})
			m[k] = from[k]
		}
		return differs(c, canon.Marshal(m))
	}},
	{"command: the signature of another command", func(g *siege, r *rand.Rand) []byte {
		c, o := g.one(r), statetest.Pick(r, g.commands)
		if bytes.Equal(c.envelope, o.envelope) {
			return nil
		}
		return state.Join(c.envelope, o.signature)
	}},
	{"command: the signature of a custodian", func(g *siege, r *rand.Rand) []byte {
		s := statetest.Pick(r, g.statements).Signature
		return state.Join(g.one(r).envelope, s[:min(len(s), statetest.Pick(r, []int{64, 96, 256}))])
	}},
	{"command: signed by a stranger, a former, next or removed root", func(g *siege, r *rand.Rand) []byte {
		by, e := statetest.Pick(r, g.strange), g.one(r).env
		if e.Type == state.TypeAdoptRoot || e.Type == state.TypeRefuseCopy {
			return nil // these are the next root's to sign
		}
		return sign(by, e.Marshal())
	}},
	{"command: signed by a removed node or stranger in its own name", func(g *siege, r *rand.Rand) []byte {
		by, e := statetest.Pick(r, g.strange), g.one(r).env
		e.Origin = statetest.Pick(r, []string{"node-jp-2", "node-xx-1", "xx"})
		return sign(by, e.Marshal())
	}},
	{"command: signed by another member", func(g *siege, r *rand.Rand) []byte {
		e, by := g.one(r).env, g.anyMember(r)
		if by == e.Origin {
			return nil
		}
		return sign(g.member[by], e.Marshal())
	}},
	{"command: for another cluster, lineage or domain, by a member", func(g *siege, r *rand.Rand) []byte {
		e := g.own(r)
		switch r.IntN(3) {
		case 0:
			e.Domain = statetest.Pick(r, []string{"", "conclave/command/v2", approval.Context, state.GenesisContext})
		case 1:
			b := []byte(e.Cluster)
			b[r.IntN(len(b))] = "0123456789abcdef"[r.IntN(16)]
			e.Cluster = string(b)
		default:
			e.Cluster = statetest.Pick(r, []string{"", statetest.Pick(r, g.foreign).env.Cluster})
		}
		if e.Cluster == g.base.Lineage() && e.Domain == state.CommandDomain {
			return nil
		}
		return g.byMember(e)
	}},
	{"command: too old, by a member", func(g *siege, r *rand.Rand) []byte {
		e := g.own(r)
		e.Time = g.base.Clock() - state.Window - 1 - r.Int64N(1_000_000)
		return g.byMember(e)
	}},
	{"command: expects another revision, by a member", func(g *siege, r *rand.Rand) []byte {
		e := g.own(r)
		e.Expect += 1 + r.Uint64N(5)
		return g.byMember(e)
	}},
	{"command: for somebody who may not, by a member", func(g *siege, r *rand.Rand) []byte {
		e := g.own(r)
		who := statetest.Pick(r, []string{
			"", "spiffe://fr.example/auditor/eve", "spiffe://de.example/custodian/de-1", "spiffe://xx.example/operator/alice", "spiffe://fr.example/node/node-fr-1",
		})
		if who == e.Principal || slices.Contains([]state.Type{state.TypeVote, state.TypeAnnounce, state.TypeSuspendCredential}, e.Type) {
			return nil // who brings these is not looked at: the custodian or node signed them
		}
		e.Principal = who
		return g.byMember(e)
	}},
	{"command: of another type or version, by a member", func(g *siege, r *rand.Rand) []byte {
		e := g.own(r)
		was := e
		e.Type, e.Version = state.Type(r.UintN(60)), uint16(statetest.Pick(r, []int{0, 1, 1, 1, 2}))
		if e.Type == was.Type && e.Version == was.Version {
			return nil
		}
		if e.Type == state.TypeAdoptRoot || e.Type == state.TypeRefuseCopy {
			return nil
		}
		return g.byMember(e)
	}},
	{"command: hopeless by the rules, by a member", func(g *siege, r *rand.Rand) []byte {
		i := r.IntN(len(g.hopeless))
		e := g.fresh(r, g.anyMember(r), g.hopeless[i])
		e.Expect = g.expects[i]
		return g.byMember(e)
	}},
	{"command: of another cluster or a history given up", func(g *siege, r *rand.Rand) []byte {
		return statetest.Pick(r, g.foreign).raw
	}},
	{"command: of a history given up, signed anew but for the payload", func(g *siege, r *rand.Rand) []byte {
		c := statetest.Pick(r, g.foreign)
		if c.env.Type != state.TypeOpenProposal && c.env.Type != state.TypeVote && c.env.Type != state.TypeExecute && c.env.Type != state.TypeCommitRotation && c.env.Type != state.TypeSuspendCredential {
			return nil // others name no history within
		}
		e := g.fresh(r, g.anyMember(r), state.Tick{})
		e.Type, e.Version, e.Payload, e.Expect, e.Principal = c.env.Type, c.env.Version, c.env.Payload, c.env.Expect, c.env.Principal
		return g.byMember(e)
	}},
	{"replay: a command that was carried out", func(g *siege, r *rand.Rand) []byte {
		return statetest.Pick(r, g.past).raw
	}},
	{"replay: with the second form of its signature", func(g *siege, r *rand.Rand) []byte {
		c := statetest.Pick(r, g.past)
		half := len(c.signature) / 2
		s := new(big.Int).SetBytes(c.signature[half:])
		s.Sub(elliptic.P256().Params().N, s)
		return state.Join(c.envelope, append(bytes.Clone(c.signature[:half]), s.FillBytes(make([]byte, half))...))
	}},
	{"replay: what was carried out, signed anew by its node", func(g *siege, r *rand.Rand) []byte {
		e := statetest.Pick(r, g.past).env
		n, ok := g.member[e.Origin]
		if !ok || e.Type == state.TypeAdoptRoot || e.Type == state.TypeRefuseCopy {
			return nil
		}
		if r.IntN(2) == 0 { // as if it were new
			e.Nonce, e.Time = g.fresh(r, e.Origin, state.Tick{}).Nonce, g.base.Clock()
		}
		return sign(n, e.Marshal())
	}},
	{"vote: a field edited, in a member's envelope", func(g *siege, r *rand.Rand) []byte {
		return g.cast(r, edited(r, statetest.Pick(r, g.votes)))
	}},
	{"vote: fields swapped with another vote", func(g *siege, r *rand.Rand) []byte {
		s, o := statetest.Pick(r, g.votes), statetest.Pick(r, g.statements)
		was := s
		for range 1 + r.IntN(3) {
			switch r.IntN(4) {
			case 0:
				s.Proposal = o.Proposal
			case 1:
				s.Custodian = o.Custodian
			case 2:
				s.Credential = o.Credential
			default:
				s.Signature = o.Signature
			}
		}
		if isTrue(g, s) || bytes.Equal(canon.Marshal(s), canon.Marshal(was)) {
			return nil
		}
		return g.cast(r, s)
	}},
	{"vote: the verdict turned", func(g *siege, r *rand.Rand) []byte {
		s := statetest.Pick(r, g.statements)
		s.Verdict = map[approval.Verdict]approval.Verdict{approval.Approve: approval.Reject, approval.Reject: approval.Approve}[s.Verdict]
		return g.cast(r, s)
	}},
	{"vote: bytes of the signature changed", func(g *siege, r *rand.Rand) []byte {
		s := statetest.Pick(r, g.votes)
		s.Signature = bytes.Clone(s.Signature)
		s.Signature[r.IntN(len(s.Signature))] ^= byte(1 + r.IntN(255))
		return g.cast(r, s)
	}},
	{"vote: the halves of two signatures", func(g *siege, r *rand.Rand) []byte {
		s, o := statetest.Pick(r, g.votes), statetest.Pick(r, g.statements)
		if bytes.Equal(s.Signature, o.Signature) {
			return nil
		}
		s.Signature = append(bytes.Clone(s.Signature[:3309]), o.Signature[3309:]...)
		return g.cast(r, s)
	}},
	{"vote: the signature of a node's command", func(g *siege, r *rand.Rand) []byte {
		s := statetest.Pick(r, g.votes)
		s.Signature = g.one(r).signature
		return g.cast(r, s)
	}},
	{"vote: truly signed, but revoked, doubled, of another proposal, cluster, epoch or context", func(g *siege, r *rand.Rand) []byte {
		return g.cast(r, statetest.Pick(r, g.bad))
	}},
	{"vote: a proposal or statement as a command", func(g *siege, r *rand.Rand) []byte {
		p := statetest.Pick(r, g.proposals)
		s := statetest.Pick(r, g.votes)
		switch r.IntN(3) {
		case 0:
			return state.Join(p.Bytes, s.Signature[:64])
		case 1:
			return canon.Marshal(s)
		}
		e := g.fresh(r, g.anyMember(r), state.Tick{})
		e.Type, e.Payload = state.TypeVote, statetest.Pick(r, [][]byte{p.Bytes, canon.Marshal(s), s.Signature})
		return g.byMember(e)
	}},
	{"suspension: a field edited, in a member's envelope", func(g *siege, r *rand.Rand) []byte {
		return g.byMember(g.fresh(r, g.anyMember(r), state.SuspendCredential{Statement: edited(r, statetest.Pick(r, g.suspended))}))
	}},
	{"suspension: truly signed, but by another site, a revoked or suspended one, or about another record", func(g *siege, r *rand.Rand) []byte {
		return g.byMember(g.fresh(r, g.anyMember(r), state.SuspendCredential{Statement: statetest.Pick(r, g.unfit)}))
	}},
	{"cosignature: a field edited, in its node's or another member's envelope", func(g *siege, r *rand.Rand) []byte {
		if g.cosigned.Log == "" {
			return g.byMember(g.fresh(r, g.anyMember(r), state.Cosign{Log: "none"}))
		}
		return g.byMember(g.fresh(r, g.anyMember(r), edited(r, g.cosigned)))
	}},
	{"proposal: opened for another time, revision, policy or proposer", func(g *siege, r *rand.Rand) []byte {
		return g.reopened(r)
	}},
}

// own returns the envelope of a good command with a nonce of its own. Those that the
// next root signs are left to other classes.
func (g *siege) own(r *rand.Rand) state.Envelope {
	for {
		e := g.one(r).env
		if e.Type == state.TypeAdoptRoot || e.Type == state.TypeRefuseCopy {
			continue
		}
		e.Nonce = g.fresh(r, e.Origin, state.Tick{}).Nonce
		return e
	}
}

// unless drops a mutant that is a good command after all.
func unless(raw []byte, g *siege) []byte {
	if slices.ContainsFunc(g.good, func(c good) bool { return bytes.Equal(c.raw, raw) }) {
		return nil
	}
	return raw
}

// differs joins an edited envelope with the signature of the one that it was.
func differs(c good, envelope []byte) []byte {
	if bytes.Equal(envelope, c.envelope) {
		return nil
	}
	return state.Join(envelope, c.signature)
}

// isTrue reports whether a statement is one of those truly made.
func isTrue(g *siege, s approval.Statement) bool {
	return slices.ContainsFunc(g.votes, func(v approval.Statement) bool { return bytes.Equal(canon.Marshal(v), canon.Marshal(s)) })
}

// reopened returns a good proposal with one thing wrong, opened by a member.
func (g *siege) reopened(r *rand.Rand) []byte {
	c := g.one(r)
	if c.env.Type != state.TypeOpenProposal {
		return nil
	}
	var o state.OpenProposal
	if err := canon.Unmarshal(c.env.Payload, &o); err != nil {
		panic(err)
	}
	p, err := approval.ParseProposal(o.Proposal)
	if err != nil {
		panic(err)
	}
	principal := p.Proposer
	switch r.IntN(9) {
	case 0:
		p.Revision += 1 + r.Uint64N(9)
	case 1:
		p.PolicyRevision += 1 + r.Uint64N(9)
	case 2:
		p.Policy = statetest.Pick(r, []string{"governance", "lenient", "x"})
	case 3:
		p.Created += state.Window + 1 + r.Int64N(1_000_000)
		p.Expires += 2_000_000
	case 4:
		p.Created -= state.Window + 1 + r.Int64N(1_000_000)
	case 5:
		p.Expires += 91 * 24 * 3_600_000
	case 6:
		p.Proposer = statetest.Pick(r, []string{"spiffe://fr.example/operator/eve", "spiffe://xx.example/operator/alice"})
	case 7:
		p.Cluster = statetest.Pick(r, g.foreign).env.Cluster
		if p.Cluster == g.base.Lineage() {
			return nil
		}
	default:
		p.Target = statetest.Pick(r, []string{"key/coalition/none", "key/none/mail", "policy/standard", "custodian/de-1"})
	}
	e := g.fresh(r, c.env.Origin, state.OpenProposal{Proposal: p.Marshal()})
	e.Principal = principal
	return g.byMember(e)
}
