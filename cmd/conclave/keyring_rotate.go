package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/wire"
)

func (a *app) keyringRotateCommand() *cobra.Command {
	var by proposing
	cmd := &cobra.Command{
		Use:   "rotate KEYRING --reason TEXT",
		Short: "Propose a new version of the keyring's key-encryption key",
		Long: `Propose a new version of the keyring's key-encryption key (KEK).
Opens a proposal: it is carried out once the quorum of the keyring's policy has
approved it. Then one resident node makes the new KEK, all prove that they can open
it, every key version is rewrapped under it and checked by every resident node, and
the old KEK is retired. Ciphertexts and keys stay as they are; decryption goes on all
the time. See how far it is with: conclave keyring show KEYRING
A keyring of protection hardware has no KEK: rotate its keys.`,
		Args: arguments("KEYRING"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := by.check(); err != nil {
				return err
			}
			return a.propose(cmd, kms.ActionRotate, approval.KeyringTarget(args[0]), wire.ProposalParameters{}, by)
		},
	}
	by.flags(cmd)
	return cmd
}

// kekRotation shows how far the rotation of a keyring's KEK is.
func kekRotation(w io.Writer, k wire.Keyring) {
	r := k.Rotation
	if r == nil {
		return
	}
	for _, id := range r.Proposals {
		row(w, "open proposal", id)
	}
	if len(r.Live) > 1 {
		row(w, "KEK rotation", fmt.Sprintf("to version %d; not retired: %s", r.Target, strings.Trim(fmt.Sprint(r.Live), "[]")))
		row(w, "rewrapped", fmt.Sprintf("%d of %d key versions in use, %d wait for confirmation, %d left", r.Done, r.Versions, r.Rewrapped, r.Left))
		var receipts []string
		for _, x := range r.Receipts {
			mark := "missing"
			if x.Received {
				mark = "ok"
			}
			receipts = append(receipts, x.Node+" "+mark)
		}
		row(w, "KEK receipts", or(strings.Join(receipts, ", "), "-"))
	}
	row(w, "KEK note", r.Note)
	for _, x := range r.Refused {
		row(w, "REFUSED", fmt.Sprintf("%s refused what %s rewrapped: version %d of %s, %s", x.Refused, x.Rewrapped, x.Version, kms.KeyPath(k.Name, x.Key), when(x.Time)))
	}
}
