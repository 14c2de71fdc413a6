package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/recovery"
	"github.com/conclave-kms/conclave/kms/state"
)

func (a *app) ceremonyVerifyCommand() *cobra.Command {
	var from source
	cmd := &cobra.Command{
		Use:   "verify TRANSCRIPT [--backup FILE --cluster ID]",
		Short: "Verify a ceremony's transcript: every signature, and that the custodians sufficed",
		Long: `Verify a ceremony's transcript: that as many custodians of as many sites as the recovery
key takes have signed this very ceremony, and that what came out of it is what the
ceremony's key, which they signed, has signed.

Who the custodians are is asked of the cluster; with --backup and --cluster it is taken
from a backup, verified from the genesis on, and nothing is asked of anybody: use one
that was made after the ceremony, before any of its custodians was replaced.`,
		Args: arguments("TRANSCRIPT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			t, err := readJSON[recovery.Transcript](args[0], "transcript that conclave ceremony run writes")
			if err != nil {
				return usageError{err}
			}
			if from.file == "" {
				return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
					r, err := clusterRecords(ctx, c)
					if err != nil {
						return err
					}
					return a.verifyTranscript(cmd, t, r, "the cluster's word on its custodians and its recovery key")
				})
			}
			info, st, err := from.open()
			if err != nil {
				return err
			}
			basis := fmt.Sprintf("%s, at log index %d", info.File, info.Header.Index)
			if info.Full {
				basis += ", every statement in it verified"
			}
			return a.verifyTranscript(cmd, t, stateRecords(st), basis)
		},
	}
	from.flags(cmd)
	return cmd
}

func (a *app) verifyTranscript(cmd *cobra.Command, t recovery.Transcript, r recovery.Records, basis string) error {
	doc, err := t.Verify(r)
	if err != nil {
		return err
	}
	p, _ := r.Key(doc.Recovery, doc.Number)
	return a.show(cmd, t, func(w io.Writer) {
		showCeremony(w, t.Ceremony, doc)
		for _, x := range t.Contributions {
			at, _ := p.Holder(x.Custodian)
			row(w, "contributed", fmt.Sprintf("%s of %s, key %s", x.Custodian, p.Holders[at].Site, x.Credential))
		}
		row(w, "it takes", fmt.Sprintf("%d custodians of %d sites", p.Threshold, p.Sites))
		for _, x := range t.Restored {
			row(w, "brought back", fmt.Sprintf("KEK version %d of keyring %s to root %d of node %s", x.Version, x.Keyring, x.Root, x.Node))
		}
		row(w, "verified by", basis)
	})
}

// clusterRecords are a cluster's word.
func clusterRecords(ctx context.Context, c *client.Client) (recovery.Records, error) {
	s, err := c.Status(ctx)
	if err != nil {
		return recovery.Records{}, err
	}
	custodians, err := c.Custodians(ctx)
	if err != nil {
		return recovery.Records{}, err
	}
	keys, err := c.RecoveryKeys(ctx)
	if err != nil {
		return recovery.Records{}, err
	}
	return recovery.Records{
		Cluster: s.Cluster,
		Key: func(name string, number uint64) (approval.RecoveryParams, bool) {
			for _, k := range keys {
				if k.Name == name && k.Number == number {
					p, err := approval.ParseRecoveryParams(k.Params)
					return p, err == nil
				}
			}
			return approval.RecoveryParams{}, false
		},
		Custodian: func(id string) (approval.Custodian, bool) {
			for _, x := range custodians {
				if x.ID == id {
					return custodianFrom(x), true
				}
			}
			return approval.Custodian{}, false
		},
	}, nil
}

// stateRecords are those of a verified state.
func stateRecords(st *state.State) recovery.Records {
	return recovery.Records{
		Cluster: st.Cluster(),
		Key: func(name string, number uint64) (approval.RecoveryParams, bool) {
			for _, k := range st.AllRecoveryKeys() {
				if k.Name == name && k.Number == number {
					return k.Params, true
				}
			}
			return approval.RecoveryParams{}, false
		},
		Custodian: st.Custodian,
	}
}
