package approval

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/pqc"
)

func credential(suite pqc.SuiteID, pub []byte) Credential {
	return Credential{ID: pqc.Fingerprint(pub), Suite: uint16(suite), PublicKey: pub}
}

// ed25519Key is a fixed key for vectors.
func ed25519Key(fill byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{fill}, ed25519.SeedSize))
}

func sampleCustodian() Custodian {
	return Custodian{ID: "fr-1", Site: "fr", Credentials: []Credential{
		credential(pqc.Ed25519, ed25519Key(1).Public().(ed25519.PublicKey)),
	}}
}

// sampleProposal returns a proposal of the action that is valid.
func sampleProposal(a kms.Action) Proposal {
	p := Proposal{
		Format: 1, Cluster: "00112233445566778899aabbccddeeff", Nonce: bytes.Repeat([]byte{0xa5}, NonceSize),
		Action: a, Target: KeyTarget("coalition", "orders"), Revision: 7, Policy: "two-nations", PolicyRevision: 3,
		Proposer: "spiffe://fr.example/operator/anna", Created: 1767225600000, NotBefore: 1767229200000, Expires: 1768435200000,
		Reason: "Yearly rotation.\nSee the minutes of 1 January.",
	}
	switch a {
	case kms.ActionActivate, kms.ActionDeactivate, kms.ActionCompromise, kms.ActionDestroy:
		p.Parameters = canon.Marshal(VersionParams{Version: 2})
	case kms.ActionImport:
		p.Revision = 0
		p.Parameters = canon.Marshal(ImportParams{Node: "fr-1", Purpose: kms.Encrypt, Algorithm: kms.AES256GCM, RotationPeriod: 7_776_000_000, Sealed: bytes.Repeat([]byte{0x5e}, 32)})
	case kms.ActionSchedule:
		p.Parameters = canon.Marshal(ScheduleParams{RotationPeriod: 90 * 24 * 3600 * 1000})
	case kms.ActionPolicy:
		p.Target, p.Policy = "policy/two-nations", kms.Governance
		p.Parameters = canon.Marshal(PolicyParams{Rules: policyOf("two-nations", firstActions()).Rules})
	case kms.ActionCustodian:
		p.Target, p.Policy = "custodian/fr-1", kms.Governance
		p.Parameters = canon.Marshal(CustodianParams{Custodian: sampleCustodian()})
	case kms.ActionNode:
		p.Target, p.Policy = NodeTarget("fr-1"), kms.Governance
		p.Parameters = canon.Marshal(NodeParams{Change: NodeReplaceRoot, Root: sampleRoot(), Possession: bytes.Repeat([]byte{0x11}, 64), Leave: true})
	case kms.ActionSite:
		p.Target, p.Policy = SiteTarget("it"), kms.Governance
		p.Parameters = canon.Marshal(SiteParams{Change: SiteRemove})
	}
	return p
}

// firstActions are what every policy of keys has a rule for.
func firstActions() []kms.Action {
	return slices.DeleteFunc(slices.Clone(kms.KeyActions), func(a kms.Action) bool { return slices.Contains(kms.LaterActions, a) })
}

var proposable = []kms.Action{
	kms.ActionRotate, kms.ActionActivate, kms.ActionSuspend, kms.ActionResume, kms.ActionDeactivate, kms.ActionCompromise,
	kms.ActionDestroy, kms.ActionImport, kms.ActionSchedule, kms.ActionPolicy, kms.ActionCustodian, kms.ActionNode, kms.ActionSite,
}

func TestProposalRoundTrip(t *testing.T) {
	for _, a := range proposable {
		p := sampleProposal(a)
		b := p.Marshal()
		got, err := ParseProposal(b)
		if err != nil {
			t.Errorf("%s: %v", a, err)
			continue
		}
		if !bytes.Equal(got.Marshal(), b) || got.Target != p.Target || got.Reason != p.Reason {
			t.Errorf("%s: does not round-trip", a)
		}
	}
	whole := sampleProposal(kms.ActionDestroy)
	whole.Parameters = canon.Marshal(VersionParams{})
	if err := whole.Validate(); err != nil {
		t.Errorf("destroy a whole key: %v", err)
	}
}

func TestProposalValidateRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		action kms.Action
		change func(p *Proposal)
	}{
		"format":                       {kms.ActionRotate, func(p *Proposal) { p.Format = 2 }},
		"no cluster":                   {kms.ActionRotate, func(p *Proposal) { p.Cluster = "" }},
		"upper-case cluster":           {kms.ActionRotate, func(p *Proposal) { p.Cluster = strings.ToUpper(p.Cluster) }},
		"short nonce":                  {kms.ActionRotate, func(p *Proposal) { p.Nonce = p.Nonce[1:] }},
		"no action":                    {kms.ActionRotate, func(p *Proposal) { p.Action = "" }},
		"unknown action":               {kms.ActionRotate, func(p *Proposal) { p.Action = "explode" }},
		"an action without proposals":  {kms.ActionRotate, func(p *Proposal) { p.Action = kms.ActionCreate }},
		"no target":                    {kms.ActionRotate, func(p *Proposal) { p.Target = "" }},
		"a target of another kind":     {kms.ActionRotate, func(p *Proposal) { p.Target = "policy/two-nations" }},
		"a target without key":         {kms.ActionRotate, func(p *Proposal) { p.Target = "key/coalition" }},
		"a target with too much":       {kms.ActionRotate, func(p *Proposal) { p.Target += "/x" }},
		"no policy":                    {kms.ActionRotate, func(p *Proposal) { p.Policy = "" }},
		"no proposer":                  {kms.ActionRotate, func(p *Proposal) { p.Proposer = "" }},
		"a proposer that is a name":    {kms.ActionRotate, func(p *Proposal) { p.Proposer = "anna" }},
		"never created":                {kms.ActionRotate, func(p *Proposal) { p.Created = 0 }},
		"expires when created":         {kms.ActionRotate, func(p *Proposal) { p.Expires = p.Created }},
		"expires beyond the calendar":  {kms.ActionRotate, func(p *Proposal) { p.Expires = 1 << 62 }},
		"not before a negative time":   {kms.ActionRotate, func(p *Proposal) { p.NotBefore = -1 }},
		"not before expiry":            {kms.ActionRotate, func(p *Proposal) { p.NotBefore = p.Expires }},
		"no reason":                    {kms.ActionRotate, func(p *Proposal) { p.Reason = "" }},
		"a long reason":                {kms.ActionRotate, func(p *Proposal) { p.Reason = strings.Repeat("x", MaxReason+1) }},
		"an escape sequence":           {kms.ActionRotate, func(p *Proposal) { p.Reason = "rotate \x1b[2K" }},
		"a direction override":         {kms.ActionRotate, func(p *Proposal) { p.Reason = "rotate \u202e" }},
		"not UTF-8":                    {kms.ActionRotate, func(p *Proposal) { p.Reason = "\xff" }},
		"parameters of nothing":        {kms.ActionRotate, func(p *Proposal) { p.Parameters = []byte{0xa0} }},
		"parameters missing":           {kms.ActionDestroy, func(p *Proposal) { p.Parameters = nil }},
		"parameters with a tail":       {kms.ActionDestroy, func(p *Proposal) { p.Parameters = append(p.Parameters, 0) }},
		"parameters of another action": {kms.ActionDestroy, func(p *Proposal) { p.Parameters = sampleProposal(kms.ActionPolicy).Parameters }},
		"a compromise with override":   {kms.ActionCompromise, func(p *Proposal) { p.Parameters = canon.Marshal(VersionParams{Version: 1, Override: true}) }},
		"an activation with override":  {kms.ActionActivate, func(p *Proposal) { p.Parameters = canon.Marshal(VersionParams{Version: 1, Override: true}) }},
		"a negative period":            {kms.ActionSchedule, func(p *Proposal) { p.Parameters = canon.Marshal(ScheduleParams{RotationPeriod: -1}) }},
		"a period of eleven years":     {kms.ActionSchedule, func(p *Proposal) { p.Parameters = canon.Marshal(ScheduleParams{RotationPeriod: 11 * 365 * day}) }},
		"a period missing":             {kms.ActionSchedule, func(p *Proposal) { p.Parameters = nil }},
		"version 0 of compromise":      {kms.ActionCompromise, func(p *Proposal) { p.Parameters = canon.Marshal(VersionParams{}) }},
		"an empty policy":              {kms.ActionPolicy, func(p *Proposal) { p.Parameters = canon.Marshal(PolicyParams{}) }},
		"keys' rules for governance":   {kms.ActionPolicy, func(p *Proposal) { p.Target = "policy/governance" }},
		"another custodian":            {kms.ActionCustodian, func(p *Proposal) { p.Target = "custodian/fr-2" }},
		"a custodian with revision": {kms.ActionCustodian, func(p *Proposal) {
			c := sampleCustodian()
			c.Revision = 1
			p.Parameters = canon.Marshal(CustodianParams{Custodian: c})
		}},
		"a custodian without credentials": {kms.ActionCustodian, func(p *Proposal) {
			p.Parameters = canon.Marshal(CustodianParams{Custodian: Custodian{ID: "fr-1", Site: "fr"}})
		}},
	} {
		t.Run(name, func(t *testing.T) {
			p := sampleProposal(c.action)
			c.change(&p)
			if err := p.Validate(); !errors.Is(err, kms.Invalid) {
				t.Errorf("Validate: %v", err)
			}
			if name == "not UTF-8" {
				return // Marshal writes it all the same, the decoder refuses it
			}
			if _, err := ParseProposal(p.Marshal()); !errors.Is(err, kms.Invalid) {
				t.Errorf("ParseProposal: %v", err)
			}
		})
	}
	if _, err := ParseProposal(make([]byte, MaxProposal+1)); !errors.Is(err, kms.TooLarge) {
		t.Error(err)
	}
}

func TestTargets(t *testing.T) {
	for s, want := range map[string][2]string{
		KeyTarget("a", "b"): {"key", "a/b"}, "policy/governance": {"policy", "governance"}, "custodian/fr-1": {"custodian", "fr-1"}, NodeTarget("a"): {"node", "a"},
	} {
		kind, name, err := ParseTarget(s)
		if err != nil || kind != want[0] || name != want[1] {
			t.Errorf("%s: %s %s %v", s, kind, name, err)
		}
	}
	for _, s := range []string{"", "key", "key/", "key/a", "key/a/", "key/a/b/c", "keys/a/b", "policy/", "policy/a/b", "custodian/A", "/policy/a", "node/", "node/a/b", "nodes/a"} {
		if _, _, err := ParseTarget(s); !errors.Is(err, kms.Invalid) {
			t.Errorf("%q: %v", s, err)
		}
	}
}

// signer signs as a custodian of each suite does.
type signer struct {
	credential Credential
	sign       func(message []byte) []byte
}

func signers(t testing.TB) map[string]signer {
	t.Helper()
	hybrid, err := pqc.GenerateHybrid(nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(hybrid.Destroy)
	ec, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ecPub, err := ec.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	ed := ed25519Key(1)
	check := func(b []byte, err error) []byte {
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	return map[string]signer{
		"hybrid": {credential(pqc.MLDSA65Ed25519, hybrid.PublicKey()), func(m []byte) []byte { return check(hybrid.Sign(m, []byte(Context))) }},
		"ed25519": {credential(pqc.Ed25519, ed.Public().(ed25519.PublicKey)), func(m []byte) []byte {
			return ed25519.Sign(ed, check(pqc.ToBeSigned(m, []byte(Context))))
		}},
		"ecdsa": {credential(pqc.ECDSAP384SHA384, ecPub), func(m []byte) []byte {
			r, s, err := ecdsa.Sign(rand.Reader, ec, check(pqc.Digest(pqc.ECDSAP384SHA384, m, []byte(Context))))
			if err != nil {
				t.Fatal(err)
			}
			sig := make([]byte, 96)
			r.FillBytes(sig[:48])
			s.FillBytes(sig[48:])
			return sig
		}},
	}
}

func TestStatementVerify(t *testing.T) {
	proposal := sampleProposal(kms.ActionRotate).Marshal()
	for name, k := range signers(t) {
		t.Run(name, func(t *testing.T) {
			c := Custodian{ID: "fr-1", Site: "fr", Credentials: []Credential{k.credential}}
			if err := c.Validate(); err != nil {
				t.Fatal(err)
			}
			good := Statement{Proposal: ProposalID(proposal), Verdict: Approve, Custodian: "fr-1", Credential: k.credential.ID,
				Signature: k.sign(Message(Approve, proposal))}
			if err := good.Verify(c, proposal); err != nil {
				t.Fatal(err)
			}
			for what, bad := range map[string]struct {
				change func(s *Statement, c *Custodian, proposal *[]byte)
				kind   kms.Kind
			}{
				"the other verdict": {func(s *Statement, _ *Custodian, _ *[]byte) { s.Verdict = Reject }, kms.BadSignature},
				"no verdict":        {func(s *Statement, _ *Custodian, _ *[]byte) { s.Verdict = "" }, kms.Invalid},
				"another proposal": {func(s *Statement, _ *Custodian, p *[]byte) {
					*p = append(slices.Clone(*p), 0)
				}, kms.Invalid},
				"another proposal, relabelled": {func(s *Statement, _ *Custodian, p *[]byte) {
					*p = append(slices.Clone(*p), 0)
					s.Proposal = ProposalID(*p)
				}, kms.BadSignature},
				"another custodian":   {func(s *Statement, _ *Custodian, _ *[]byte) { s.Custodian = "fr-2" }, kms.Invalid},
				"a revoked custodian": {func(_ *Statement, c *Custodian, _ *[]byte) { c.Revoked = true }, kms.Denied},
				"no custodian":        {func(s *Statement, c *Custodian, _ *[]byte) { s.Custodian = ""; *c = Custodian{} }, kms.Invalid},
				"a credential gone":   {func(_ *Statement, c *Custodian, _ *[]byte) { c.Credentials = nil }, kms.Denied},
				"no credential":       {func(s *Statement, _ *Custodian, _ *[]byte) { s.Credential = "" }, kms.Denied},
				"no signature":        {func(s *Statement, _ *Custodian, _ *[]byte) { s.Signature = nil }, kms.BadSignature},
				"a changed signature": {func(s *Statement, _ *Custodian, _ *[]byte) {
					s.Signature = bytes.Clone(s.Signature)
					s.Signature[len(s.Signature)/2] ^= 4
				}, kms.BadSignature},
				"a signature too long": {func(s *Statement, _ *Custodian, _ *[]byte) {
					s.Signature = append(bytes.Clone(s.Signature), 0)
				}, kms.BadSignature},
				"another suite": {func(_ *Statement, c *Custodian, _ *[]byte) {
					k := c.Credentials[0]
					k.Suite = uint16(pqc.MLKEM768P256)
					c.Credentials = []Credential{k}
				}, kms.BadSignature},
			} {
				s, c, p := good, c, proposal
				bad.change(&s, &c, &p)
				if err := s.Verify(c, p); !errors.Is(err, bad.kind) {
					t.Errorf("%s: %v, want %v", what, err, bad.kind)
				}
			}
		})
	}
}

func TestCustodianValidate(t *testing.T) {
	all := signers(t)
	a, b := all["hybrid"].credential, all["ecdsa"].credential
	if a.ID > b.ID {
		a, b = b, a
	}
	good := Custodian{ID: "fr-1", Site: "fr", Credentials: []Credential{a, b}}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	if err := (Custodian{ID: "fr-1", Site: "fr", Revoked: true}).Validate(); err != nil {
		t.Errorf("revoked, without credentials: %v", err)
	}
	for name, change := range map[string]func(c *Custodian){
		"no id":         func(c *Custodian) { c.ID = "" },
		"no site":       func(c *Custodian) { c.Site = "" },
		"no credential": func(c *Custodian) { c.Credentials = nil },
		"not sorted":    func(c *Custodian) { c.Credentials = []Credential{b, a} },
		"twice":         func(c *Custodian) { c.Credentials = []Credential{a, a} },
		"too many":      func(c *Custodian) { c.Credentials = slices.Repeat([]Credential{a}, MaxCredentials+1) },
		"a KEM suite": func(c *Custodian) {
			c.Credentials = []Credential{{ID: a.ID, Suite: uint16(pqc.XWing), PublicKey: a.PublicKey}}
		},
		"no suite":       func(c *Custodian) { c.Credentials = []Credential{{ID: a.ID, PublicKey: a.PublicKey}} },
		"another id":     func(c *Custodian) { c.Credentials = []Credential{{ID: b.ID, Suite: a.Suite, PublicKey: a.PublicKey}} },
		"a short key":    func(c *Custodian) { c.Credentials = []Credential{credential(pqc.SuiteID(a.Suite), a.PublicKey[1:])} },
		"not on a curve": func(c *Custodian) { c.Credentials = []Credential{credential(pqc.ECDSAP384SHA384, make([]byte, 97))} },
	} {
		c := good
		change(&c)
		if err := c.Validate(); !errors.Is(err, kms.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCheckCustodians(t *testing.T) {
	a, b := sampleCustodian(), sampleCustodian()
	b.ID, b.Credentials = "fr-2", []Credential{credential(pqc.Ed25519, ed25519Key(2).Public().(ed25519.PublicKey))}
	if err := CheckCustodians([]Custodian{a, b}); err != nil {
		t.Error(err)
	}
	if err := CheckCustodians([]Custodian{a, a}); !errors.Is(err, kms.Invalid) {
		t.Errorf("twice the same: %v", err)
	}
	b.Credentials = a.Credentials
	if err := CheckCustodians([]Custodian{a, b}); !errors.Is(err, kms.Invalid) || !strings.Contains(err.Error(), "fr-1 and fr-2") {
		t.Errorf("a shared credential: %v", err)
	}
}

func FuzzParseProposal(f *testing.F) {
	for _, a := range proposable {
		f.Add(sampleProposal(a).Marshal())
	}
	f.Add([]byte{})
	f.Add([]byte{0xa0})
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := ParseProposal(b)
		if err != nil {
			return
		}
		if !bytes.Equal(p.Marshal(), b) {
			t.Error("accepted bytes that it does not write")
		}
		if err := p.Validate(); err != nil {
			t.Error(err)
		}
	})
}
