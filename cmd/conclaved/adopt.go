package main

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/conclave-kms/conclave/kms/engine"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/pqc"
)

const (
	openNextAgain = 15 * time.Second // between attempts to open the next device
	reviveEvery   = 30 * time.Second // between attempts to open the present device
	joinAgain     = time.Second      // between looks whether a node that joins has caught up
)

// rootVerdict is what the state says of the root that the node runs on.
type rootVerdict int

const (
	rootUnknown  rootVerdict = iota // the state is older than the root: not yet caught up
	rootInForce                     // it is the node's
	rootReplaced                    // the next root is the node's already
	rootJoins                       // the node has yet to adopt its first
)

// checkRoot compares the node's record in the state with its root. Right after the
// start the state is the genesis or a snapshot, whose root may be an older one.
func (n *node) checkRoot(st *state.State, caughtUp bool) (rootVerdict, error) {
	me, ok := st.Node(n.cfg.Node)
	switch {
	case !ok: // not yet approved, or a state from before; or removed: then the cluster's part records that and ends the node
		return rootUnknown, nil
	case me.Root == 0:
		return rootJoins, nil
	}
	own := n.roots.own()
	if bytes.Equal(me.Signing, own.public) {
		if !bytes.Equal(me.Agreement, own.root.PublicKey().Bytes()) {
			return 0, fmt.Errorf("the cluster has another agreement key for node %s than this device and its root file hold: restore the root file from a backup", me.ID)
		}
		return rootInForce, nil
	}
	signing := pqc.Fingerprint(me.Signing)
	if n.roots.present != nil {
		if next, err := readRoot(nextRootPath(n.cfg.DataDir)); err == nil && next.Signing == signing {
			return rootReplaced, nil
		}
	}
	if !caughtUp || n.roots.present == nil {
		return rootUnknown, nil
	}
	return 0, fmt.Errorf("node %s has hardware root number %d with signing key %s in the cluster; this node runs on number %d with %s: wrong device, or a data directory from before the replacement",
		me.ID, me.Root, signing, own.file.Root, pqc.Fingerprint(own.public))
}

// hasCaughtUp reports whether the state holds what the node itself brought about
// before it started, as the adoption of its root: the leader may hand out a proof that
// is older than that, and the state was fresh then without it.
func hasCaughtUp(fresh, running time.Duration) bool { return fresh < running }

// watchRoot looks at each change of the state whether the node's root is still the
// one it runs on, and takes the next one into use when custodians have approved it.
func (n *node) watchRoot(ctx context.Context) {
	var a attempts
	began := time.Now()
	known := sync.OnceFunc(func() { close(n.inForce) })
	for {
		changed := n.cluster.Changed() // before the state is read, so that no change is missed
		caughtUp := hasCaughtUp(n.cluster.Fresh(), time.Since(began))
		st := n.cluster.State()
		verdict, err := n.checkRoot(st, caughtUp)
		switch {
		case err != nil:
			n.fail(err)
			return
		case verdict == rootReplaced:
			n.takeOver(ctx)
			return
		case verdict == rootInForce:
			known()
		case verdict == rootJoins && caughtUp: // and not a state from before
			if err := n.join(ctx, st); err != nil {
				if ctx.Err() == nil {
					n.fail(err)
				}
				return
			}
			continue
		}
		var again <-chan time.Time
		if verdict == rootJoins {
			again = time.After(joinAgain)
		}
		if r, ok := st.Replacement(n.cfg.Node); ok && verdict == rootInForce {
			if n.adopt(ctx, r, &a) {
				return
			}
			again = time.After(openNextAgain)
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-again:
		}
	}
}

// attempts is what watchRoot remembers of an approved root that it cannot take.
type attempts struct {
	root uint32    // its number; what hinders it is in the log
	next time.Time // of the next attempt; zero: never
}

// adopt runs the adoption of an approved root and reports whether the node starts
// again.
func (n *node) adopt(ctx context.Context, r state.Replacement, a *attempts) bool {
	if a.root == r.Root && (a.next.IsZero() || time.Now().Before(a.next)) {
		return false
	}
	told := a.root == r.Root
	*a = attempts{r.Root, time.Now().Add(openNextAgain)}
	if err := n.holdNext(ctx, r); err != nil {
		if !told {
			n.log.Warn("custodians have approved another hardware root for this node, which cannot be taken into use", "root", r.Root, "proposal", r.Proposal, "err", err)
		}
		if pinRefused(err) {
			a.next = time.Time{}
		}
		return false
	}
	n.log.Info("custodians have approved the next hardware root; taking it into use", "root", r.Root, "device", n.roots.next.dev.Describe())
	if err := keepWitness(ctx, n.cfg, n.roots.next.dev, n.witness); err != nil {
		n.log.Warn("the key for checkpoints does not go along to the next device: the node will make another", "err", err)
	}
	if err := n.runAdoption(ctx, n.roots.next); err != nil {
		if ctx.Err() == nil {
			n.log.Error("the next hardware root is not adopted", "root", r.Root, "err", err)
			a.next = time.Time{}
		}
		return false
	}
	n.takeOver(ctx)
	return true
}

// holdNext opens the next device unless it is open, and makes sure that it holds
// the root that was approved.
func (n *node) holdNext(ctx context.Context, r state.Replacement) error {
	if n.roots.next == nil {
		next, err := openNext(ctx, n.cfg)
		if err != nil {
			return err
		}
		n.roots.next = next
	}
	if held := n.roots.next.public; !bytes.Equal(held, r.New.Signing) {
		return fmt.Errorf("what was approved has signing key %s, [next_device] holds %s: propose the card of this one, or configure the other", pqc.Fingerprint(r.New.Signing), pqc.Fingerprint(held))
	}
	return nil
}

// runAdoption takes a root into use, the next one or a node's first; the device of the
// present one is not needed.
func (n *node) runAdoption(ctx context.Context, next *heldRoot) error {
	_, suite := next.cfg.Device.suites()
	a, err := engine.NewAdoption(engine.AdoptionConfig{
		Node: n.cfg.Node, Cluster: n.cluster, Watch: n.cluster, Root: next.root, Signer: next.dev, SigningSuite: suite, Logger: n.log,
	})
	if err != nil {
		return err
	}
	return a.Run(ctx)
}

// takeOver makes the adopted root the node's own: its files first, then its parts.
func (n *node) takeOver(ctx context.Context) {
	if err := n.replaceRoot(ctx); err != nil {
		n.fail(fmt.Errorf("the next hardware root is adopted, but the node cannot go on with it: %w", err))
		return
	}
	if f, err := readPresentRoot(n.cfg); err == nil {
		n.roots.next.file = f // its number may have been prepared anew since the device was opened
	}
	n.roots.adopted = true
	n.log.Info("the next hardware root is adopted; the former one is not needed any more: make [next_device] the [device] of the configuration", "root", n.roots.next.file.Root)
	n.fail(errAgain)
}

func (n *node) replaceRoot(ctx context.Context) error {
	if n.roots.next == nil { // adopted before a crash or a restart
		next, err := openNext(ctx, n.cfg)
		if err != nil {
			return err
		}
		n.roots.next = next
	}
	return adoptFiles(n.cfg.DataDir)
}

// wait is the life of a node whose present device is dead: it replicates the state,
// and takes the next device into use when custodians have approved it. It serves
// nobody.
func (n *node) wait(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait() // nothing may use the device any more
	defer cancel()
	adopted := make(chan error, 1)
	wg.Go(func() { adopted <- n.runAdoption(ctx, n.roots.next) })
	wg.Go(func() { n.awaitPresent(ctx) })
	n.log.Info("waiting for the next hardware root to be approved and adopted", "root", n.roots.next.file.Root, "cluster", n.cluster.State().Cluster())
	select {
	case <-ctx.Done():
		return nil
	case err := <-adopted:
		if err != nil && ctx.Err() == nil {
			return fmt.Errorf("the next hardware root is not adopted: %w", err)
		}
		if err == nil {
			n.takeOver(ctx)
			return <-n.failed
		}
		return nil
	case err := <-n.failed:
		return err
	case err := <-n.cluster.Done():
		return n.again(err)
	}
}

// awaitPresent ends the waiting when the device of root.json can be opened after all.
func (n *node) awaitPresent(ctx context.Context) {
	tick := time.NewTicker(reviveEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		h, err := n.openPresent(ctx)
		switch {
		case err == nil && h != nil:
			n.log.Info("the device of root.json is back: the node serves again")
			n.roots.present = h
			n.fail(errAgain)
			return
		case pinRefused(err):
			n.log.Warn("the device of root.json is back, but refuses its PIN or authorisation secret; correct it and start the node again", "err", err)
			return
		case err != nil:
			n.log.Debug("the device of root.json is still away", "err", err)
		}
	}
}

// openPresent tries the tables of the configuration that the next device is not in.
func (n *node) openPresent(ctx context.Context) (*heldRoot, error) {
	file, err := readPresentRoot(n.cfg)
	if err != nil {
		return nil, err
	}
	for _, s := range sections(n.cfg) {
		if s.name != n.roots.next.table {
			return openSection(ctx, s, file, rootFile{})
		}
	}
	return nil, nil
}
