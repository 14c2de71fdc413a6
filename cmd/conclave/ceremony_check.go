package main

import (
	"bytes"
	"context"
	"fmt"
	"slices"

	"github.com/spf13/pflag"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/wire"
)

// A ceremony opens keys for the hardware that a node names. Every replica would refuse the
// outcome for other hardware, but that is too late: what was sealed is sealed. So what
// the node says is verified before, from the genesis on, by the custodians' signatures.
// A node that shows another cluster whole gains nothing, for copies are bound to the
// identity of theirs and do not open under another.

// evidenceSource fetches the evidence file of a proposal: client.Client.Evidence.
type evidenceSource func(ctx context.Context, proposal string) ([]byte, error)

func trustNode(f *pflag.FlagSet, trust *bool) {
	f.BoolVar(trust, "trust-node", false, "take the word of the node for what custodians have approved, when it can show no evidence; a node of your own site alone")
}

// approvedByCustodians verifies that custodians have approved a recovery key as the node
// describes it, and each of the next roots that it names, for a node at a site of the
// key's residency. Errors: kms.Denied, and those of the evidence.
func approvedByCustodians(ctx context.Context, ask evidenceSource, cluster string, k wire.RecoveryKey, p approval.RecoveryParams) error {
	r, err := evidenceOf(ctx, ask, cluster, k.Proposal)
	if err != nil {
		return err
	}
	if r.Content.Action != kms.ActionRecoveryKey || r.Content.Target != approval.RecoveryTarget(k.Name) || !bytes.Equal(r.Content.Parameters, k.Params) {
		return notApproved("the recovery key " + k.Name + " as the node describes it")
	}
	for _, root := range k.Roots {
		r, err := evidenceOf(ctx, ask, cluster, root.Proposal)
		if err != nil {
			return err
		}
		if err := isApprovedRoot(r, cluster, root, p.Residency); err != nil {
			return err
		}
	}
	return nil
}

// isApprovedRoot checks that what evidence proves is the approval of a root.
func isApprovedRoot(r audit.Report, cluster string, root wire.RecoveryRoot, residency []string) error {
	what := fmt.Sprintf("hardware root number %d of node %s as the node describes it", root.Root, root.Node)
	if r.Content.Action != kms.ActionNode || r.Content.Target != approval.NodeTarget(root.Node) {
		return notApproved(what)
	}
	params, err := r.Content.NodeParams()
	switch {
	case err != nil:
		return err
	case !params.HasRoot() || params.Root.Suite != root.Suite || !bytes.Equal(params.Root.Agreement, root.Agreement):
		return notApproved(what)
	case !slices.Contains(residency, r.Site):
		return &kms.Error{Kind: kms.Denied, Msg: fmt.Sprintf("the node would have the keys given to node %s, which is of site %q and not of the residency", root.Node, r.Site), Fix: askOthers}
	}
	if err := params.VerifyPossession(cluster, root.Node, root.Root); err != nil {
		return notApproved(what)
	}
	return nil
}

const askOthers = "do not go on; ask a node of another site, and find out why this one says so"

func notApproved(what string) error {
	return &kms.Error{Kind: kms.Denied, Msg: "custodians have not approved " + what, Fix: askOthers}
}

// evidenceOf fetches the evidence for a proposal and verifies it.
func evidenceOf(ctx context.Context, ask evidenceSource, cluster, proposal string) (audit.Report, error) {
	b, err := ask(ctx, proposal)
	if err != nil {
		return audit.Report{}, kms.Wrap(kms.KindOf(err), err, "the node shows no evidence that custodians have approved proposal "+proposal+": "+err.Error(),
			"ask another node (CONCLAVE_ADDR), or, at a node of your own site, give --trust-node")
	}
	e, err := audit.ParseEvidence(b)
	if err != nil {
		return audit.Report{}, err
	}
	r, err := audit.VerifyEvidence(e, cluster)
	if err == nil && r.Proposal != proposal {
		err = notApproved("proposal " + proposal)
	}
	return r, err
}
