package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/state"
)

// resealsInPass is how many copies are sealed before the agent looks at its other
// tasks again.
const resealsInPass = 64

// reseal seals what other nodes need for their next hardware roots. Among the
// nodes that could do it a different one goes first for each version.
func (a *Agent) reseal(ctx context.Context, st *state.State) time.Duration {
	wait, done := idleWait, 0
	for _, r := range st.Replacements() {
		a.tellRefused(ctx, st, r)
		for _, p := range st.Unsealed(r.Node) {
			if done >= resealsInPass {
				return 0
			}
			name := fmt.Sprintf("reseal/%s/%d/%s/%d", r.Node, r.Root, kms.KeyPath(p.Keyring, p.Key), p.Version)
			rank, mine := place(resealers(st, r, p), name, a.e.node)
			if !mine || p.Key != "" && a.cannot[replacementName(r)] {
				continue
			}
			wait = min(wait, a.attempt(ctx, "reseal", name, time.Duration(rank)*a.cfg.RankDelay, func(ctx context.Context) error {
				done++
				return a.resealOne(ctx, r, p)
			}))
		}
	}
	return wait
}

// tellRefused logs once what the next root of a node has refused, at every node: the
// one that sealed it may be at fault, or the root's device.
func (a *Agent) tellRefused(ctx context.Context, st *state.State, r state.Replacement) {
	for _, x := range st.Refused(r.Node) {
		name := fmt.Sprintf("%s/%s/%d/%s", replacementName(r), kms.KeyPath(x.Keyring, x.Key), x.Version, x.By)
		if !a.told[name] {
			a.told[name] = true
			a.e.log.WarnContext(ctx, "the next hardware root of a node has refused a copy that was sealed to it, as not opening or as of another key; the node that sealed it, or that root's device, is at fault",
				"node", r.Node, "root", r.Root, "keyring", x.Keyring, "key", x.Key, "version", x.Version, "sealed_by", x.By)
		}
	}
}

// resealers returns the nodes that may still seal a version to a node's next root:
// the other resident ones, the node itself only where there is no other, and none of
// which the root has refused a copy of it. A key version
// of protection hardware goes from a device to one of the same kind alone, and from
// a TPM to nobody: its policy lets a key go to the recipients of its creation only.
func resealers(st *state.State, r state.Replacement, p state.Pending) []state.Node {
	nodes := st.ResidentNodes(p.Keyring)
	if len(nodes) > 1 {
		nodes = slices.DeleteFunc(nodes, func(n state.Node) bool { return n.ID == r.Node })
	}
	refused := st.Refused(r.Node)
	nodes = slices.DeleteFunc(nodes, func(n state.Node) bool {
		return slices.ContainsFunc(refused, func(x state.RefusedCopy) bool { return x.By == n.ID && x.Of() == p })
	})
	if p.Key != "" {
		nodes = slices.DeleteFunc(nodes, func(n state.Node) bool {
			return n.ImportKind != r.New.ImportKind || n.ImportKind == kms.ImportTPM
		})
	}
	return nodes
}

func replacementName(r state.Replacement) string { return fmt.Sprintf("%s/%d", r.Node, r.Root) }

// resealOne seals one version to the node's next root.
func (a *Agent) resealOne(ctx context.Context, r state.Replacement, p state.Pending) error {
	st := a.e.cluster.State() // the newest: another node's copy may be in
	if now, ok := st.Replacement(r.Node); !ok || now.Root != r.Root {
		return kms.Errorf(kms.Conflict, "root %d of node %s is no longer to be adopted", r.Root, r.Node)
	}
	if !slices.Contains(st.Unsealed(r.Node), p) {
		return kms.Errorf(kms.Exists, "node %s has its copy", r.Node)
	}
	to := keyring.Recipient{Node: r.Node, Suite: r.New.Suite, PublicKey: r.New.Agreement}
	var sealed []byte
	var err error
	if p.Key == "" {
		sealed, err = a.resealKEK(ctx, st, p, to)
	} else {
		sealed, err = a.rewrapVersion(ctx, st, p, to, r.New.Import)
	}
	if errors.Is(err, keyring.ErrCannotRewrap) {
		a.cannot[replacementName(r)] = true
		a.e.log.WarnContext(ctx, "this node's device cannot wrap keys of protection hardware for the next device of another node; other nodes of the residency may, or the custodians let the node leave them behind",
			"node", r.Node, "root", r.Root, "import_kind", r.New.ImportKind)
	}
	if err != nil {
		return err
	}
	_, err = a.e.submit(ctx, attempt{}, state.Reseal{Node: r.Node, Root: r.Root, Keyring: p.Keyring, Key: p.Key, Version: p.Version, Sealed: sealed})
	return err
}

func (a *Agent) resealKEK(ctx context.Context, st *state.State, p state.Pending, to keyring.Recipient) ([]byte, error) {
	kr, ok := st.Keyring(p.Keyring)
	if !ok {
		return nil, noKeyring(p.Keyring)
	}
	b, sealed, err := a.e.sealedKEK(st, &kr, p.Version)
	if err != nil {
		return nil, err
	}
	kek, release, err := a.e.cfg.Cache.KEK(ctx, b, sealed)
	if err != nil {
		return nil, err
	}
	defer release()
	b.Node = ""
	copies, err := keyring.SealKEK([]keyring.Recipient{to}, b, kek)
	if err != nil {
		return nil, err
	}
	return copies[0].Sealed, nil
}

func (a *Agent) rewrapVersion(ctx context.Context, st *state.State, p state.Pending, to keyring.Recipient, device []byte) ([]byte, error) {
	v, err := a.e.stored(st, p)
	if err != nil {
		return nil, err
	}
	return a.e.cfg.Root.RewrapVersion(ctx, v.ref.KeyBinding, a.e.node, v.sealed, to, device)
}
