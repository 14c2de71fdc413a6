package main

import (
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/backup"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
)

func (a *app) recoverCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "recover",
		Short: "Write and approve the statement by which a cluster goes on from a backup",
		Long: `When the data of all nodes is lost, when so many nodes are lost for good that the rest
has no majority, or when every node was set back to an old copy, the cluster goes on
from a backup. No cluster can vote on that, so custodians sign a statement offline:
the exact state of the backup, who votes at first, and why. It takes the quorum of
the backup's own governance policy for "recover", and at least two custodians of two
sites whatever that says.

  1. get the backup: the newest there is; of a stopped survivor:  conclaved backup --out FILE
  2. anywhere:              conclave recover prepare --backup FILE --cluster ID --voters NODE,... --reason TEXT --out recover.cbor
  3. each custodian in turn: conclave recover approve recover.cbor --backup FILE --cluster ID --custodian-key FILE
  4. at every node that goes on, stopped:  conclaved recover --backup FILE --statement recover.cbor
     with the same two files everywhere, then start it

What was changed after the backup is lost: keys and versions made since, and with them
what they encrypted. What was undone since is back: destroyed keys, revoked
custodians, suspended keys. Proposals that were open must be made again.`,
	}
	cmd.AddCommand(a.recoverPrepareCommand(), a.recoverShowCommand(), a.recoverApproveCommand())
	return cmd
}

// source is the backup that a statement is about, as flags.
type source struct{ file, cluster, signer string }

func (s *source) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&s.file, "backup", "", "backup `FILE`")
	cmd.Flags().StringVar(&s.cluster, "cluster", "", "`ID` of the cluster, 32 hexadecimal digits")
	cmd.Flags().StringVar(&s.signer, "signer", "", "`FINGERPRINT` of the signing key of a node that is trusted, to spare verifying every statement")
}

func (s *source) open() (backupInfo, *state.State, error) {
	if s.file == "" {
		return backupInfo{}, nil, usagef("--backup is missing: the backup file")
	}
	if s.cluster == "" {
		return backupInfo{}, nil, usagef("--cluster is missing: the identity of the cluster that you expect")
	}
	info, res, err := verifyBackup(s.file, backup.Options{Cluster: s.cluster, Signer: s.signer})
	return info, res.State, err
}

func (a *app) recoverPrepareCommand() *cobra.Command {
	var from source
	var voters, reason, out, proposer string
	var expires time.Duration
	var epoch uint64
	cmd := &cobra.Command{
		Use:   "prepare --backup FILE --cluster ID --voters NODE,... --reason TEXT --out FILE",
		Short: "Write an unsigned recover statement for a backup",
		Args:  arguments(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if voters == "" || reason == "" || out == "" {
				return usagef("--voters, --reason and --out are needed; see: %s --help", cmd.CommandPath())
			}
			_, st, err := from.open()
			if err != nil {
				return err
			}
			if proposer == "" {
				if proposer, err = a.certificateIdentity(); err != nil {
					return err
				}
			}
			list := strings.Split(voters, ",")
			slices.Sort(list)
			p, err := prepareRecovery(st, list, reason, proposer, expires, max(epoch, a.nextEpoch(st)))
			if err != nil {
				return err
			}
			file := approval.Approved{Proposal: p.Marshal(), Statements: []approval.Statement{}}
			if _, _, err := approval.ParseApproved(file.Marshal()); err != nil {
				return err
			}
			if err := create(out, file.Marshal(), 0o644); err != nil {
				return err
			}
			return a.showRecovery(cmd, file, p, st)
		},
	}
	from.flags(cmd)
	f := cmd.Flags()
	f.StringVar(&voters, "voters", "", "`NODES` that vote at first, comma-separated; all others begin without a vote")
	f.StringVar(&reason, "reason", "", "`TEXT`: why; part of what custodians sign")
	f.StringVar(&out, "out", "", "statement `FILE` to write")
	f.StringVar(&proposer, "proposer", "", "SPIFFE `ID` of who proposes (default: that of the operator's certificate)")
	f.DurationVar(&expires, "expires", 72*time.Hour, "not to be used after this time (at most: the policy's lifetime)")
	f.Uint64Var(&epoch, "epoch", 0, "`NUMBER` of the epoch that begins (default: the next after those that the backup and this person know)")
	return cmd
}

func prepareRecovery(st *state.State, voters []string, reason, proposer string, expires time.Duration, epoch uint64) (approval.Proposal, error) {
	pol, _ := st.Policy(kms.Governance)
	rule, ok := pol.Rule(kms.ActionRecover)
	if !ok {
		return approval.Proposal{}, kms.Errorf(kms.Denied, "the governance policy of the backup has no rule for %q, so nobody can approve it", kms.ActionRecover)
	}
	now := time.Now().UnixMilli()
	p := approval.Proposal{
		Format: approval.ProposalFormat, Cluster: st.Lineage(), Nonce: make([]byte, approval.NonceSize), Action: kms.ActionRecover,
		Target: approval.ClusterTarget(st.Lineage()), Revision: st.Epoch(), Policy: kms.Governance, PolicyRevision: pol.Revision,
		Proposer: proposer, Created: now, Expires: now + min(expires.Milliseconds(), rule.Lifetime), Reason: reason,
		Parameters: canon.Marshal(st.RecoverParams(epoch, voters)),
	}
	if rule.Delay > 0 {
		p.NotBefore = now + rule.Delay
	}
	if _, err := rand.Read(p.Nonce); err != nil {
		return p, err
	}
	if err := p.Validate(); err != nil {
		return p, err
	}
	return p, st.CheckStatement(p)
}

// certificateIdentity reads who the operator is from the certificate.
func (a *app) certificateIdentity() (string, error) {
	path := or(a.cert, or(os.Getenv("CONCLAVE_ADMIN_CERT"), os.Getenv("CONCLAVE_CLIENT_CERT")))
	if path == "" {
		return "", usagef("--proposer is missing, and no certificate says who proposes")
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return "", kms.Wrap(kms.Invalid, err, err.Error(), "")
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return "", kms.Errorf(kms.Invalid, "%s holds no PEM certificate", path)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil || len(c.URIs) != 1 {
		return "", kms.Errorf(kms.Invalid, "%s holds no certificate with one SPIFFE ID; give --proposer", path)
	}
	return c.URIs[0].String(), nil
}

func readApproved(path string) (approval.Approved, approval.Proposal, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return approval.Approved{}, approval.Proposal{}, kms.Wrap(kms.Invalid, err, err.Error(), "")
	}
	file, p, err := approval.ParseApproved(b)
	if err == nil && p.Action != kms.ActionRecover {
		err = kms.Errorf(kms.Invalid, "%s is no recover statement", path)
	}
	return file, p, err
}

func (a *app) recoverShowCommand() *cobra.Command {
	var from source
	cmd := &cobra.Command{
		Use:   "show FILE [--backup FILE --cluster ID]",
		Short: "Show a recover statement; with its backup, what its approvals are worth",
		Args:  arguments("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			file, p, err := readApproved(args[0])
			if err != nil {
				return err
			}
			var st *state.State
			if from.file != "" {
				if _, st, err = from.open(); err != nil {
					return err
				}
				if err := st.CheckStatement(p); err != nil {
					return err
				}
			}
			return a.showRecovery(cmd, file, p, st)
		},
	}
	from.flags(cmd)
	return cmd
}

// recoveryInfo is what the commands print of a statement.
type recoveryInfo struct {
	ID        string                 `json:"id"` // changes with every approval
	Proposal  string                 `json:"proposal"`
	Content   approval.Proposal      `json:"content"`
	Params    approval.RecoverParams `json:"params"`
	Approvals []string               `json:"approvals"`
	Approved  bool                   `json:"approved"` // by the backup's own policy; false without the backup
	Missing   string                 `json:"missing,omitempty"`
	Warnings  []string               `json:"warnings,omitempty"`
}

func describeRecovery(file approval.Approved, p approval.Proposal, st *state.State) (recoveryInfo, error) {
	params, err := p.RecoverParams()
	if err != nil {
		return recoveryInfo{}, err
	}
	b := file.Marshal()
	i := recoveryInfo{ID: approval.ApprovedID(b), Proposal: approval.ProposalID(file.Proposal), Content: p, Params: params, Approvals: []string{}}
	for _, s := range file.Statements {
		i.Approvals = append(i.Approvals, s.Custodian)
	}
	if st == nil {
		i.Missing = "not verified; give the --backup and --cluster that it is about"
		return i, nil
	}
	_, err = st.CheckRecovery(b)
	switch {
	case err == nil:
		i.Approved = true
	case kms.KindOf(err) == kms.NeedsApproval:
		i.Missing = "no: " + err.Error()
	default:
		return i, err
	}
	i.Warnings = warnings(p, params, st)
	return i, nil
}

// warnings says what a custodian should think about.
func warnings(p approval.Proposal, params approval.RecoverParams, st *state.State) (w []string) {
	if age := time.Duration(p.Created-st.Clock()) * time.Millisecond; age > 10*time.Minute {
		w = append(w, fmt.Sprintf("the backup is %s older than the statement: all that was changed in that time is lost, and what was undone is back", age.Round(time.Minute)))
	}
	sites := map[string]int{}
	for _, v := range params.Voters {
		n, _ := st.Node(v)
		sites[n.Site]++
	}
	for _, s := range st.Sites() {
		if n := sites[s.ID]; 2*n > len(params.Voters) {
			w = append(w, fmt.Sprintf("site %s has %d of the %d votes: it can decide alone what is committed and when, until more nodes are promoted", s.ID, n, len(params.Voters)))
		}
	}
	if n := len(params.Voters); n < 3 {
		w = append(w, fmt.Sprintf("%d voters tolerate no loss of a node", n))
	}
	var without []string
	for _, n := range st.Nodes() {
		if n.Voter && !slices.Contains(params.Voters, n.ID) {
			without = append(without, n.ID)
		}
	}
	if len(without) > 0 {
		w = append(w, fmt.Sprintf("%s lose their votes: make sure that they are stopped for good. Together they could go on with the old history; one that meets the new one stops", strings.Join(without, ", ")))
	}
	return w
}

func (a *app) showRecovery(cmd *cobra.Command, file approval.Approved, p approval.Proposal, st *state.State) error {
	i, err := describeRecovery(file, p, st)
	if err != nil {
		return err
	}
	return a.show(cmd, i, func(w io.Writer) { i.table(w, file.Proposal) })
}

func (i recoveryInfo) table(w io.Writer, signed []byte) {
	row(w, "to recover", "cluster "+i.Params.Cluster)
	row(w, "from state", hex.EncodeToString(i.Params.State))
	row(w, "at log index", fmt.Sprintf("%d, %d leaves, root %s", i.Params.Index, i.Params.LogSize, b64(i.Params.LogRoot)))
	row(w, "epoch", fmt.Sprintf("%d begins, after epoch %d", i.Params.Epoch, i.Content.Revision))
	row(w, "voters", strings.Join(i.Params.Voters, ", "))
	showSigned(w, signed, i.Content)
	row(w)
	row(w, "approved by", or(strings.Join(i.Approvals, ", "), "-"))
	switch {
	case i.Approved:
		row(w, "approved", "yes, by the backup's own policy; statement "+i.ID)
		row(w, "next", "at each of "+strings.Join(i.Params.Voters, ", ")+", stopped: conclaved recover --backup FILE --statement FILE; then conclaved run")
	default:
		row(w, "approved", i.Missing)
	}
	for _, t := range i.Warnings {
		row(w, "note", t)
	}
}

func (a *app) recoverApproveCommand() *cobra.Command {
	var from source
	var by signerFlags
	var yes bool
	cmd := &cobra.Command{
		Use:   "approve FILE --backup FILE --cluster ID {--custodian-key FILE | --credential URI}",
		Short: "Approve a recover statement with a custodian's own key",
		Long: `Verify the backup, show what the statement says of it, and after asking sign it. FILE is
replaced by one that holds the approval too: pass it on to the next custodian.

If this program has seen a later state of the cluster than the backup's, it says so:
what came after the backup is lost. A backup that contradicts what it has seen is refused.
A backup is one node's word for what was decided last: before you sign, compare its state
hash and log root with a backup that a node of another site made, or with what custodians
of other sites have seen.`,
		Args: arguments("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := by.check(); err != nil {
				return err
			}
			file, p, err := readApproved(args[0])
			if err != nil {
				return err
			}
			_, st, err := from.open()
			if err != nil {
				return err
			}
			if err := st.CheckStatement(p); err != nil {
				return err
			}
			if err := a.checkStatementTime(p, time.Now()); err != nil {
				return err
			}
			if err := a.contradicts(st); err != nil {
				return err
			}
			if !yes {
				if err := a.confirmRecovery(cmd, file, p, st); err != nil {
					return err
				}
			}
			if file, err = signRecovery(cmd, file, st, &by); err != nil {
				return err
			}
			if err := replace(args[0], file.Marshal()); err != nil {
				return err
			}
			return a.showRecovery(cmd, file, p, st)
		},
	}
	from.flags(cmd)
	by.flags(cmd)
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask before signing")
	return cmd
}

// checkStatementTime holds the statement against this computer's clock.
func (a *app) checkStatementTime(p approval.Proposal, now time.Time) error {
	switch ms := now.UnixMilli(); {
	case p.Created > ms+state.Window:
		return kms.Errorf(kms.Invalid, "the recover statement is dated in the future, %s: the cluster's clock would begin there", when(time.UnixMilli(p.Created)))
	case p.Expires <= ms:
		return kms.Errorf(kms.Expired, "the recover statement has expired; prepare another one")
	}
	return nil
}

func (a *app) confirmRecovery(cmd *cobra.Command, file approval.Approved, p approval.Proposal, st *state.State) error {
	i, err := describeRecovery(file, p, st)
	if err != nil {
		return err
	}
	if note := a.remembersMore(st); note != "" {
		i.Warnings = append(i.Warnings, note)
	}
	return a.ask(cmd, func(w io.Writer) { i.table(w, file.Proposal) }, "Approve this?", "nothing was signed")
}

// signRecovery adds the approval of the custodian of the backup whom the credential
// belongs to.
func signRecovery(cmd *cobra.Command, file approval.Approved, st *state.State, by *signerFlags) (approval.Approved, error) {
	s, err := cast(cmd, by, approval.Approve, file.Proposal, approval.Carry(st.Cluster(), file.Proposal, st.Custodians()).Owner)
	if err != nil {
		return file, err
	}
	c, _ := st.Custodian(s.Custodian)
	if err := s.Verify(c, file.Proposal); err != nil {
		return file, err
	}
	return file.With(s), nil
}
