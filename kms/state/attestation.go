package state

import (
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/attest"
)

// Subject returns what the attestation document of a root must be about.
func Subject(node, site string, r approval.NodeRoot) attest.Subject {
	return attest.Subject{
		Node: node, Site: site, SigningSuite: r.SigningSuite, Signing: r.Signing, Agreement: r.Agreement,
		ImportKind: r.ImportKind, Import: r.Import,
	}
}

// NodeSubject is Subject for a node's present root.
func NodeSubject(n Node) attest.Subject { return Subject(n.ID, n.Site, n.HardwareRoot()) }

// attest verifies the attestation document of a root of a node. at is the cluster's
// time; witness returns the nodes that may have witnessed it.
func (g Genesis) attest(n Node, r approval.NodeRoot, at int64, witness func(string) (attest.Subject, bool)) (attest.Report, error) {
	return attest.Verify(r.Attestation, Subject(n.ID, n.Site, r), attest.Context{Time: time.UnixMilli(at), Vendors: g.Vendors, Witness: witness})
}

// attestFounding verifies the document of a node of the genesis: the other nodes of
// the genesis may have witnessed it.
func (g Genesis) attestFounding(n Node) (attest.Report, error) {
	return g.attest(n, n.HardwareRoot(), g.Created, func(id string) (attest.Subject, bool) {
		w, ok := search(g.Nodes, func(x Node) bool { return x.ID == id })
		return NodeSubject(w), ok
	})
}

func (g Genesis) validateAttestations() error {
	if len(g.Vendors) > MaxVendors {
		return kms.Errorf(kms.Invalid, "genesis: there are %d vendors' certificates; the limit is %d", len(g.Vendors), MaxVendors)
	}
	for i, der := range g.Vendors {
		if len(der) > MaxCertificate {
			return kms.Errorf(kms.Invalid, "genesis: vendor's certificate %d is longer than %d bytes", i+1, MaxCertificate)
		}
		if _, err := x509.ParseCertificate(der); err != nil {
			return kms.Wrap(kms.Invalid, err, fmt.Sprintf("genesis: vendor's certificate %d is not a DER certificate", i+1), "")
		}
	}
	for _, n := range g.Nodes {
		if _, err := g.attestFounding(n); err != nil {
			return kms.Wrap(kms.Invalid, err, "genesis: "+err.Error(), "found the cluster without this document, or with one that holds")
		}
	}
	return nil
}

// attestNext verifies the document of a root that is proposed as a node's next one,
// at a time and place in the log: the roots that other nodes had there may have
// witnessed it.
func (r reader) attestNext(n Node, root approval.NodeRoot, at int64, index uint64) (attest.Report, error) {
	return r.genesis.attest(n, root, at, func(id string) (attest.Subject, bool) {
		w, ok := r.node(id)
		if old, removed := r.removal(id); removed && old.Index > index {
			w, ok = old.Node, true
		}
		for _, f := range slices.Backward(r.formers(id)) {
			if f.Until > index {
				w.SigningSuite, w.Signing = f.SigningSuite, f.Signing
			}
		}
		return NodeSubject(w), ok
	})
}

// report returns what is known of the hardware of a node's present root. The
// document was verified when the root was accepted, and is verified here for that
// time: certificates may expire and witnesses change since. A document that does
// not hold here, in a state that another release of this program trusted, is none.
func (r reader) report(n Node) attest.Report {
	var rep attest.Report
	var err error
	if formers := r.formers(n.ID); len(formers) == 0 {
		rep, err = r.genesis.attestFounding(n)
	} else {
		p, _ := r.proposal(formers[len(formers)-1].Proposal)
		rep, err = r.attestNext(n, n.HardwareRoot(), p.ClosedAt, p.Executed)
	}
	if err != nil {
		return attest.Report{Claimed: []string{"everything about its hardware: this program does not take its attestation document, which the cluster took"}}
	}
	return rep
}

func (r reader) reports() map[string]attest.Report {
	m := make(map[string]attest.Report)
	for _, n := range r.nodes() {
		if n.Root != 0 {
			m[n.ID] = r.report(n)
		}
	}
	return m
}

// Attestation returns what is proven and what is only claimed of the hardware of a
// node's present root. It is the zero Report for an unknown node.
func (s *State) Attestation(node string) attest.Report { return s.reports[node] }

// attested refuses nodes whose hardware is not attested, naming them.
func (s *State) attested(what string, nodes []Node) error {
	var missing []string
	for _, n := range nodes {
		if !s.reports[n.ID].Attested {
			missing = append(missing, n.ID)
		}
	}
	if len(missing) > 0 {
		return kms.Errorf(kms.Conflict, "%s asks for attested hardware; that of %s is not", what, strings.Join(missing, ", "))
	}
	return nil
}

// checkAttested refuses to make a policy one that asks for attested hardware while
// a keyring under it has a node whose hardware is not.
func (t *tx) checkAttested(p approval.Policy) error {
	if !p.Attested {
		return nil
	}
	r := t.reader()
	for _, k := range r.keyrings() {
		if k.Policy != p.Name {
			continue
		}
		if err := t.before.attested("policy "+p.Name+" for keyring "+k.Name, r.residents(k.Residency)); err != nil {
			return err
		}
	}
	return nil
}

// fitForKeyrings refuses a root that could not serve a keyring for which the node
// is resident.
func (r reader) fitForKeyrings(n Node, root approval.NodeRoot, report attest.Report) error {
	for _, k := range r.keyrings() {
		if !slices.Contains(k.Residency, n.Site) {
			continue
		}
		if k.Protection == kms.Hardware && root.ImportKind == "" {
			return kms.Errorf(kms.Conflict, "node %s is resident for keyring %s of protection %s; the new device takes no keys from others", n.ID, k.Name, kms.Hardware)
		}
		p, _ := r.policy(k.Policy)
		if err := p.Allow(root.Suite, "the agreement key of node "+n.ID); err != nil {
			return err
		}
		if p.Attested && !report.Attested {
			return kms.Errorf(kms.Conflict, "node %s is resident for keyring %s, whose policy %s asks for attested hardware; that of the new root is not", n.ID, k.Name, p.Name)
		}
	}
	return nil
}
