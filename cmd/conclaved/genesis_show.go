package main

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/attest"
	"github.com/conclave-kms/conclave/kms/engine"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/pqc"
)

func genesisShowCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "show FILE",
		Short: "Print a genesis document, decoded from its bytes, and who has signed it",
		Args:  oneFile,
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := readSignedGenesis(args[0])
			if err != nil {
				return err
			}
			g, err := state.ParseGenesis(s.Genesis)
			if err != nil {
				return err
			}
			showGenesis(cmd.OutOrStdout(), s, g)
			return nil
		},
	}
}

// showGenesis prints all that a signature stands for. What others have written
// into the document is quoted, so that it shows as it is.
func showGenesis(w io.Writer, s state.SignedGenesis, g state.Genesis) {
	fmt.Fprintf(w, "cluster   %s\nname      %q\ncreated   %s\n", kms.ClusterID(s.Genesis), g.Name, time.UnixMilli(g.Created).UTC().Format(time.RFC3339))
	fmt.Fprintf(w, "document  SHA-256 %x, nonce %x\n", sha256.Sum256(s.Genesis), g.Nonce)
	for _, der := range g.Vendors {
		fmt.Fprintf(w, "vendor    SHA-256 %x  %s\n", sha256.Sum256(der), subject(der))
	}
	for _, site := range g.Sites {
		fmt.Fprintf(w, "site      %s  trust domain %s\n", site.ID, site.TrustDomain)
		for _, der := range site.CAs {
			fmt.Fprintf(w, "ca        %s  SHA-256 %x  %s\n", site.ID, sha256.Sum256(der), subject(der))
		}
	}
	if g.MajoritySite != "" {
		fmt.Fprintf(w, "majority  site %s has a majority of the voters: it can decide alone, and without it nobody can\n", g.MajoritySite)
	}
	for _, n := range g.Nodes {
		voter := "no vote"
		if n.Voter {
			voter = "voter"
		}
		fmt.Fprintf(w, "node      %s  site %s, %s, address %q, API %q\n", n.ID, n.Site, voter, n.Address, n.API)
		fmt.Fprintf(w, "node      %s  device %q\n", n.ID, n.Device)
		fmt.Fprintf(w, "node      %s  signing key %s (%s)\n", n.ID, pqc.Fingerprint(n.Signing), pqc.SuiteID(n.SigningSuite))
		fmt.Fprintf(w, "node      %s  agreement key %s (%s)\n", n.ID, pqc.Fingerprint(n.Agreement), pqc.SuiteID(n.Suite))
		showHardware(w, g, n)
	}
	for _, c := range g.Custodians {
		for _, cred := range c.Credentials {
			fmt.Fprintf(w, "custodian %s  site %s, key %s (%s)\n", c.ID, c.Site, cred.ID, pqc.SuiteID(cred.Suite))
		}
	}
	showAccess(w, g.Access)
	for _, p := range g.Policies {
		if p.Attested {
			fmt.Fprintf(w, "policy    %s  keyrings under it: only on nodes whose hardware is attested\n", p.Name)
		}
		for _, id := range p.Forbid {
			fmt.Fprintf(w, "policy    %s  forbids %s for what is new\n", p.Name, pqc.SuiteID(id))
		}
		for _, r := range p.Rules {
			b, _ := json.Marshal(r) // plain data
			fmt.Fprintf(w, "policy    %s  %s\n", p.Name, b)
		}
	}
	if err := g.CheckFounding(); err != nil {
		fmt.Fprintf(w, "founding  NOT as a new cluster must be: %v\n", err)
	}
	if _, err := s.Verify(); err != nil {
		fmt.Fprintf(w, "signed    NOT complete: %v\n", err)
		if missing := unsigned(s, g); missing != "" {
			fmt.Fprintf(w, "missing   %s\n", missing)
		}
		return
	}
	fmt.Fprintf(w, "signed    by all %d nodes\n", len(g.Nodes))
}

// showHardware prints what the document proves of a node's hardware, and what the
// node only says.
func showHardware(w io.Writer, g state.Genesis, n state.Node) {
	r, err := hardware(g, n)
	if err != nil {
		fmt.Fprintf(w, "node      %s  attestation does NOT hold: %q\n", n.ID, err.Error())
		return
	}
	attested := "NOT attested"
	if r.Attested {
		attested = "attested"
	}
	fmt.Fprintf(w, "node      %s  hardware %s\n", n.ID, attested)
	for _, s := range r.Proven {
		fmt.Fprintf(w, "node      %s  proven: %s\n", n.ID, s)
	}
	for _, s := range r.Claimed {
		fmt.Fprintf(w, "node      %s  only claimed: %s\n", n.ID, s)
	}
}

// hardware verifies a node's attestation as the state machine does at the founding.
func hardware(g state.Genesis, n state.Node) (attest.Report, error) {
	return attest.Verify(n.Attestation, state.NodeSubject(n), attest.Context{
		Time: time.UnixMilli(g.Created), Vendors: g.Vendors,
		Witness: func(id string) (attest.Subject, bool) {
			i := slices.IndexFunc(g.Nodes, func(o state.Node) bool { return o.ID == id })
			if i < 0 {
				return attest.Subject{}, false
			}
			return state.NodeSubject(g.Nodes[i]), true
		},
	})
}

// subject names a CA certificate for people.
func subject(der []byte) string {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return "not readable"
	}
	return fmt.Sprintf("%q, until %s", c.Subject.String(), c.NotAfter.UTC().Format(time.RFC3339))
}

// showAccess prints who may use what: that it is the program's default, or all of it.
func showAccess(w io.Writer, text []byte) {
	fmt.Fprintf(w, "access    SHA-256 %x", sha256.Sum256(text))
	if string(text) == engine.DefaultAccess() {
		fmt.Fprintln(w, ", the default of this release")
		return
	}
	fmt.Fprintln(w, ", not the default of this release:")
	for line := range strings.Lines(string(text)) {
		q := strconv.QuoteToGraphic(strings.TrimRight(line, "\n"))
		fmt.Fprintf(w, "access    %s\n", q)
	}
}

// unsigned names the nodes whose signatures are missing.
func unsigned(s state.SignedGenesis, g state.Genesis) string {
	var missing []string
	for _, n := range g.Nodes {
		if !slices.ContainsFunc(s.Signatures, func(x state.NodeSignature) bool { return x.Node == n.ID }) {
			missing = append(missing, n.ID)
		}
	}
	return strings.Join(missing, ", ")
}
