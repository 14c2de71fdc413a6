package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

// proposeOnKey is `conclave key ACTION`: it opens a proposal.
func (a *app) proposeOnKey(action, short string, version bool) *cobra.Command {
	var by proposing
	var n uint32
	var all, override bool
	use := action + " KEYRING/KEY --reason TEXT"
	switch {
	case action == "destroy":
		use += " {--version N | --all}"
	case version:
		use += " --version N"
	}
	cmd := &cobra.Command{
		Use:   use,
		Short: short,
		Long:  short + ".\nOpens a proposal: it is carried out once the quorum of the keyring's policy has approved it.",
		Args:  arguments("KEYRING/KEY"),
		RunE: func(cmd *cobra.Command, args []string) error {
			keyring, key := keyPath(args[0])
			if err := by.check(); err != nil {
				return err
			}
			if version && (n == 0) == !all {
				if action == "destroy" {
					return usagef("give either --version N or --all")
				}
				return usagef("--version is missing: the key version")
			}
			return a.propose(cmd, kms.Action(action), approval.KeyTarget(keyring, key), wire.ProposalParameters{Version: n, Override: override}, by)
		},
	}
	by.flags(cmd)
	f := cmd.Flags()
	if version {
		f.Uint32Var(&n, "version", 0, "key version `N`")
	}
	if action == "destroy" || action == "deactivate" {
		f.BoolVar(&override, "override", false, "although the version may still be in use; whoever needs it is cut off")
	}
	if action == "destroy" {
		f.BoolVar(&all, "all", false, "all versions")
	}
	return cmd
}

func (a *app) proposalCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "proposal", Short: "List, read, approve and reject proposals; carry one to a computer without a network"}
	cmd.AddCommand(a.proposalListCommand(), a.proposalShowCommand(), a.proposalExportCommand(), a.proposalSubmitCommand(),
		a.voteCommand(approval.Approve, "Approve a proposal with a custodian's own key"),
		a.voteCommand(approval.Reject, "Reject a proposal with a custodian's own key"))
	return cmd
}

// doing is a proposal's action, with what it does where the action alone does not say.
func doing(p wire.Proposal) string {
	action := p.Content.Action
	content, err := approval.ParseProposal(p.Bytes)
	if err != nil {
		return action
	}
	switch content.Action {
	case kms.ActionNode:
		if n, err := content.NodeParams(); err == nil {
			return action + " " + string(n.Change)
		}
	case kms.ActionSite:
		if s, err := content.SiteParams(); err == nil {
			return action + " " + string(s.Change)
		}
	}
	return action
}

func (a *app) proposalShowCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "show ID",
		Short: "Show a proposal, decoded from the exact bytes that custodians sign",
		Long: `Show a proposal, decoded here from the exact bytes that custodians sign. With -o json that is
the field "signed"; conclave evidence verify -o json prints the same field, with the same
values, for what evidence of the proposal holds.`,
		Args: arguments("ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
				p, content, err := fetchProposal(ctx, c, args[0])
				if err != nil {
					return err
				}
				signed, err := contentOf(p.Bytes)
				if err != nil {
					return err
				}
				return a.show(cmd, shownProposal{p, signed}, func(w io.Writer) {
					showSigned(w, p.Bytes, content)
					row(w)
					showProgress(w, p)
				})
			})
		},
	}
}

// shownProposal is a proposal as a node shows it, and what custodians sign, decoded here.
type shownProposal struct {
	wire.Proposal
	Signed signedContent `json:"signed"`
}

// fetchProposal returns a proposal whose bytes hash to its identifier, and the
// content decoded here from those bytes: the node's own decoding is not trusted.
func fetchProposal(ctx context.Context, c *client.Client, id string) (wire.Proposal, approval.Proposal, error) {
	p, err := c.Proposal(ctx, id)
	if err != nil {
		return p, approval.Proposal{}, err
	}
	if approval.ProposalID(p.Bytes) != id {
		return p, approval.Proposal{}, kms.Errorf(kms.BadSignature, "the node sent another proposal than %s: its bytes hash to %s", id, approval.ProposalID(p.Bytes))
	}
	content, err := approval.ParseProposal(p.Bytes)
	return p, content, err
}

// maxShown is how many signed bytes are printed in full.
const maxShown = 2048

// showSigned renders the signed bytes field for field.
func showSigned(w io.Writer, b []byte, p approval.Proposal) {
	ms := func(t int64) string {
		if t == 0 {
			return "-"
		}
		return when(time.UnixMilli(t))
	}
	row(w, "proposal", approval.ProposalID(b))
	row(w, "format", p.Format)
	row(w, "cluster", p.Cluster)
	row(w, "nonce", hex.EncodeToString(p.Nonce))
	row(w, "action", p.Action)
	row(w, "target", p.Target)
	row(w, "at revision", p.Revision)
	row(w, "policy", fmt.Sprintf("%s, revision %d", p.Policy, p.PolicyRevision))
	row(w, "proposer", p.Proposer)
	row(w, "created", ms(p.Created))
	row(w, "not before", ms(p.NotBefore))
	row(w, "expires", ms(p.Expires))
	row(w, "reason", fmt.Sprintf("%q", p.Reason))
	for i, line := range parameters(p) {
		row(w, map[bool]string{true: "parameters"}[i == 0], line)
	}
	if len(b) > maxShown { // no person reads these; the fields above are decoded from them
		row(w, "signed bytes", fmt.Sprintf("%d bytes, SHA-256 %x; -o json has them", len(b), sha256.Sum256(b)))
		return
	}
	row(w, "signed bytes", fmt.Sprintf("%d bytes, %s", len(b), hex.EncodeToString(b)))
}

// parameters are those of a proposal, one to a line, and what a person must not
// overlook in them.
func parameters(p approval.Proposal) []string {
	v, err := decoded(p)
	if err != nil {
		return []string{"NOT READABLE: " + err.Error()}
	}
	if v == nil {
		return []string{"-"}
	}
	b, err := json.Marshal(v)
	if err != nil {
		return []string{"NOT READABLE: " + err.Error()}
	}
	lines, err := fields(b)
	if err != nil {
		return []string{string(b)}
	}
	if note := warning(p); note != "" {
		lines = append(lines, "which means that "+note)
	}
	return lines
}

// decoded returns the parameters of a proposal's action, nil where it has none.
func decoded(p approval.Proposal) (any, error) {
	switch p.Action {
	case kms.ActionActivate, kms.ActionDeactivate, kms.ActionCompromise, kms.ActionDestroy:
		return p.VersionParams()
	case kms.ActionImport:
		return p.ImportParams()
	case kms.ActionSchedule:
		return p.ScheduleParams()
	case kms.ActionPolicy:
		return p.PolicyParams()
	case kms.ActionCustodian:
		return p.CustodianParams()
	case kms.ActionNode:
		return nodeParameters(p)
	case kms.ActionSite:
		return siteParameters(p)
	case kms.ActionRecoveryKey:
		return recoveryParameters(p)
	case kms.ActionRecover:
		return p.RecoverParams()
	}
	return nil, nil
}

// fields writes a JSON object as lines, NAME = VALUE; a list of objects has a line for each.
func fields(object []byte) ([]string, error) {
	dec := json.NewDecoder(bytes.NewReader(object))
	if _, err := dec.Token(); err != nil {
		return nil, err
	}
	var lines []string
	for dec.More() {
		name, err := dec.Token()
		if err != nil {
			return nil, err
		}
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return nil, err
		}
		list := []json.RawMessage{value}
		if bytes.HasPrefix(value, []byte("[{")) {
			if err := json.Unmarshal(value, &list); err != nil {
				return nil, err
			}
		}
		for _, x := range list {
			lines = append(lines, fmt.Sprintf("%s = %s", name, x))
		}
	}
	return lines, nil
}

// warning says in words what a person must not overlook in a proposal.
func warning(p approval.Proposal) string {
	if pp, err := p.PolicyParams(); p.Action == kms.ActionPolicy && err == nil {
		return policyWarning(pp)
	}
	if n, err := p.NodeParams(); p.Action == kms.ActionNode && err == nil {
		return nodeWarning(n)
	}
	if p.Action == kms.ActionImport {
		return "somebody outside the cluster HAS the key, and may keep it"
	}
	if s, err := p.ScheduleParams(); p.Action == kms.ActionSchedule && err == nil {
		return scheduleWarning(s)
	}
	if p.Action == kms.ActionActivate {
		return "nodes whose receipts are MISSING may be unable to use the key"
	}
	if slices.Contains([]kms.Action{kms.ActionDeactivate, kms.ActionCompromise, kms.ActionDestroy}, p.Action) {
		return versionWarning(p)
	}
	return ""
}

func scheduleWarning(s approval.ScheduleParams) string {
	if s.RotationPeriod == 0 {
		return "the key will be rotated ON REQUEST ONLY"
	}
	return "the key will be rotated every " + (time.Duration(s.RotationPeriod) * time.Millisecond).String()
}

func policyWarning(p approval.PolicyParams) string {
	what := "attested hardware is not asked for"
	if p.Attested {
		what = "every node of its keyrings needs ATTESTED hardware"
	}
	if len(p.Forbid) == 0 {
		return what
	}
	names := make([]string, len(p.Forbid))
	for i, id := range p.Forbid {
		names[i] = pqc.SuiteID(id).String()
	}
	return what + "; NOTHING NEW of the suites " + strings.Join(names, ", ")
}

func versionWarning(p approval.Proposal) string {
	v, err := p.VersionParams()
	var l []string
	if err == nil && v.Version == 0 {
		l = append(l, "it is about THE WHOLE KEY, every version")
	}
	if err == nil && v.Override {
		l = append(l, "it happens ALTHOUGH A VERSION MAY STILL BE IN USE: whoever needs it is cut off")
	}
	return strings.Join(l, "; ")
}

// nodeParameters are those of a change of a node, keys as fingerprints, as conclaved
// rekey prepare and conclaved join print them.
func nodeParameters(p approval.Proposal) (any, error) {
	n, err := p.NodeParams()
	if err != nil {
		return nil, err
	}
	some := func(b []byte) string {
		if len(b) == 0 {
			return "none"
		}
		return pqc.Fingerprint(b)
	}
	if !n.HasRoot() {
		return struct {
			Change approval.NodeChange `json:"change"`
			Leave  bool                `json:"leave,omitempty"`
		}{n.Change, n.Leave}, nil
	}
	return struct {
		Change       approval.NodeChange `json:"change"`
		Site         string              `json:"site,omitempty"`
		Address      string              `json:"address,omitempty"`
		API          string              `json:"api,omitempty"`
		Device       string              `json:"device"`
		SigningKey   string              `json:"signing_key"`
		SigningSuite string              `json:"signing_suite"`
		AgreementKey string              `json:"agreement_key"`
		Suite        string              `json:"suite"`
		ImportKind   string              `json:"import_kind"`
		ImportKey    string              `json:"import_key"`
		Attestation  string              `json:"attestation"`
		Leave        bool                `json:"leave"`
	}{
		n.Change, n.Site, n.Address, n.API,
		n.Root.Device, some(n.Root.Signing), pqc.SuiteID(n.Root.SigningSuite).String(), some(n.Root.Agreement), pqc.SuiteID(n.Root.Suite).String(),
		n.Root.ImportKind, some(n.Root.Import), some(n.Root.Attestation), n.Leave,
	}, nil
}

func showProgress(w io.Writer, p wire.Proposal) {
	row(w, "progress", p.Progress)
	row(w, "", p.Summary)
	row(w, "authorised", when(p.AuthorisedAt))
	row(w, "executable", when(p.ExecutableAt))
	row(w, "closed", when(p.ClosedAt))
	for _, m := range p.Missing {
		row(w, "missing", m)
	}
	row(w)
	row(w, "CUSTODIAN", "SITE", "VERDICT", "CREDENTIAL", "TIME")
	for _, v := range p.Votes {
		row(w, v.Statement.Custodian, v.Site, v.Statement.Verdict, v.Statement.Credential, when(v.Time))
	}
}

func (a *app) voteCommand(verdict approval.Verdict, short string) *cobra.Command {
	var by signerFlags
	var yes bool
	cmd := &cobra.Command{
		Use:   string(verdict) + " ID {--custodian-key FILE | --credential URI}",
		Short: short,
		Long: short + `.
Shows the proposal, decoded here from the exact bytes that are signed, and asks
before signing. The key never leaves this program, or its token; the node gets the signature.
For a computer without a network see: conclave proposal export --help`,
		Args: arguments("ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := by.check(); err != nil {
				return err
			}
			return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
				return a.vote(ctx, cmd, c, verdict, args[0], &by, yes)
			})
		},
	}
	by.flags(cmd)
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask before signing")
	return cmd
}

func (a *app) vote(ctx context.Context, cmd *cobra.Command, c *client.Client, verdict approval.Verdict, id string, by *signerFlags, yes bool) error {
	if err := a.recognise(ctx, cmd, c); err != nil {
		return err
	}
	p, content, err := fetchProposal(ctx, c, id)
	if err != nil {
		return err
	}
	if !yes {
		if err := a.confirm(cmd, verdict, p.Bytes, content); err != nil {
			return err
		}
	}
	list, err := c.Custodians(ctx)
	if err != nil {
		return err
	}
	file := approval.Carry(content.Cluster, p.Bytes, recordsOf(list))
	s, err := cast(cmd, by, verdict, p.Bytes, file.Owner)
	if err != nil {
		return err
	}
	return a.submit(ctx, cmd, c, file.With(s))
}

func (a *app) confirm(cmd *cobra.Command, verdict approval.Verdict, b []byte, content approval.Proposal) error {
	question := strings.ToUpper(string(verdict[:1])) + string(verdict[1:]) + " this?"
	return a.ask(cmd, func(w io.Writer) { showSigned(w, b, content) }, question, "nothing was signed")
}
