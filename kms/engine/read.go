package engine

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// Every read is authorised and has its entry in the access log. Errors: kms.Denied,
// kms.NotFound, kms.ReadOnly, and kms.Unavailable where the node cannot catch up; see
// consistency.go.

// read is the path of a read.
func read[R any](ctx context.Context, e *Engine, c Caller, act Action, res resource, about string, f func(st *state.State) (R, error)) (R, error) {
	return do(ctx, e, &request{caller: c, act: act, res: res, about: about, view: true}, f)
}

// views makes a list of views.
func views[A, B any](list []A, f func(A) B) []B {
	out := make([]B, len(list))
	for i, x := range list {
		out[i] = f(x)
	}
	return out
}

// Health says that the process runs; it asks nobody.
func (e *Engine) Health() wire.Health { return wire.Health{Status: "ok", Node: e.node} }

// readyStaleness is the age of the state beyond which a node is not ready: the
// default of a keyring.
const readyStaleness = DefaultMaxStaleness * time.Millisecond

// deviceCheck remembers for a moment whether the device answers, so that asking
// for readiness cannot keep it busy.
type deviceCheck struct {
	mu  sync.Mutex
	at  time.Time
	err error
}

const deviceCheckEvery = 2 * time.Second

func (e *Engine) deviceAnswers(ctx context.Context) error {
	c := &e.device
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := e.now(); c.at.IsZero() || now.Sub(c.at) >= deviceCheckEvery {
		was := c.err
		c.err = e.cfg.Device.Check(ctx)
		if ctx.Err() == nil { // else it says nothing of the device
			c.at = now
		}
		switch { // once, not at every probe
		case c.err != nil && was == nil:
			e.log.WarnContext(ctx, "the device does not answer", "error", c.err)
		case c.err == nil && was != nil:
			e.log.InfoContext(ctx, "the device answers again")
		}
	}
	return c.err
}

// Ready says whether requests should be sent to this node: its device answers,
// its state is fresh, it is not on probation and its access log can be written.
func (e *Engine) Ready(ctx context.Context) wire.Ready {
	var why []string
	if err := e.deviceAnswers(ctx); err != nil {
		why = append(why, "the device does not answer: "+cause(err))
	}
	if err := e.held(); err != nil {
		why = append(why, cause(err))
	} else if age := e.cluster.Fresh(); age > readyStaleness {
		why = append(why, cutOff(age))
	}
	switch n, known := e.cluster.State().Node(e.node); {
	case !known && e.cluster.State().Removed(e.node):
		why = append(why, "it was removed from the cluster")
	case !known:
		why = append(why, "custodians have not approved that it joins, or it has not heard of that: conclave node join")
	case n.Root == 0:
		why = append(why, "it joins and has yet to adopt its hardware root: conclave node show "+e.node)
	}
	if e.logFailed.Load() {
		why = append(why, "the access log could not be written, so every request is refused: free or repair the disk, then restart the node")
	}
	return wire.Ready{Ready: len(why) == 0, Reasons: why, Alarms: e.auditAlarms(e.cluster.State())}
}

// maxCause is the longest text of a cause in bytes.
const maxCause = 300

// cause is what a device says of its failure, as text that may be shown: one line
// of visible characters. Errors of devices carry no secrets.
func cause(err error) string {
	text := strings.ToValidUTF8(err.Error(), "?")
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, text)
	if len(text) > maxCause {
		text = strings.ToValidUTF8(text[:maxCause], "") + " ..."
	}
	return text
}

func cutOff(age time.Duration) string {
	if age == neverFresh {
		return "has not caught up with the cluster since it started"
	}
	return fmt.Sprintf("cut off from the cluster for %s", age.Round(time.Second))
}

// Authorise permits or denies an action on System::"cluster" that is carried out
// elsewhere, such as ActReadMetrics, and logs it.
func (e *Engine) Authorise(ctx context.Context, c Caller, act Action) error {
	_, err := read(ctx, e, c, act, resource{}, "", func(*state.State) (struct{}, error) { return struct{}{}, nil })
	return err
}

// Status tells how the cluster looks from this node.
func (e *Engine) Status(ctx context.Context, c Caller) (wire.Status, error) {
	return read(ctx, e, c, ActReadStatus, resource{}, "", func(st *state.State) (wire.Status, error) {
		n, _ := st.Node(e.node)
		v := wire.Status{
			Cluster: st.Cluster(), Name: st.Genesis().Name, Node: e.node, Site: n.Site, Version: e.cfg.Version,
			Device: e.cfg.Device.Describe(), Time: e.now().UTC(), Clock: at(st.Clock()), Index: st.Index(),
			FreshMS: e.cluster.Fresh().Milliseconds(), LogSize: st.LogSize(), LogRoot: st.LogRoot(),
			Epoch: st.Epoch(), Lineage: st.Lineage(),
			Open: len(st.ProposalsOpen()), Pending: len(st.Pending(e.node)),
		}
		v.Keys, v.Waiting = e.counts(st), waiting(st)
		v.Staleness = e.staleness(st, c)
		if e.cfg.Raft != nil {
			r := e.cfg.Raft()
			v.Raft = &r
		}
		return v, nil
	})
}

// counts counts keyrings and keys.
func (e *Engine) counts(st *state.State) wire.KeyCounts {
	var c wire.KeyCounts
	for _, kr := range st.Keyrings() {
		c.Keyrings++
		if st.Resident(kr.Name, e.node) {
			c.Resident++
		}
		for _, k := range st.Keys(kr.Name) {
			c.Keys++
			if due := rotationDue(k); due > 0 && st.Clock() >= due {
				c.Overdue++
			}
		}
	}
	return c
}

// Nodes lists the members, sorted by id.
func (e *Engine) Nodes(ctx context.Context, c Caller) (wire.Nodes, error) {
	return read(ctx, e, c, ActReadCluster, resource{}, "nodes", func(st *state.State) (wire.Nodes, error) {
		return nodesView(st), nil
	})
}

// Sites lists the trust domains, sorted by id.
func (e *Engine) Sites(ctx context.Context, c Caller) (wire.Sites, error) {
	return read(ctx, e, c, ActReadCluster, resource{}, "sites", func(st *state.State) (wire.Sites, error) {
		l := views(st.Sites(), func(s state.Site) wire.Site { return siteView(st, s) })
		return wire.Sites{Sites: byName(l, func(s wire.Site) string { return s.ID })}, nil
	})
}

// Custodians lists the custodians, sorted by id.
func (e *Engine) Custodians(ctx context.Context, c Caller) (wire.Custodians, error) {
	return read(ctx, e, c, ActReadCluster, resource{}, "custodians", func(st *state.State) (wire.Custodians, error) {
		l := views(st.Custodians(), custodianView)
		return wire.Custodians{Custodians: byName(l, func(c wire.Custodian) string { return c.ID })}, nil
	})
}

// Policies lists the approval policies, sorted by name, and the access policy.
func (e *Engine) Policies(ctx context.Context, c Caller) (wire.Policies, error) {
	return read(ctx, e, c, ActReadCluster, resource{}, "policies", func(st *state.State) (wire.Policies, error) {
		l := byName(views(st.Policies(), policyView), func(p wire.Policy) string { return p.Name })
		return wire.Policies{Policies: l, Access: string(st.Access())}, nil
	})
}

// Keyrings lists the keyrings that the caller may read, sorted by name. It is
// denied only to those who may read none.
func (e *Engine) Keyrings(ctx context.Context, c Caller) (wire.Keyrings, error) {
	rq := &request{caller: c, act: ActReadKeyring, anyOf: true, view: true, about: "keyrings"}
	return do(ctx, e, rq, func(st *state.State) (wire.Keyrings, error) {
		out := wire.Keyrings{Keyrings: []wire.Keyring{}}
		whole := e.access.allow(st, c.Identity, ActReadKeyring, resource{})
		for _, kr := range st.Keyrings() {
			if whole != nil && e.access.allow(st, c.Identity, ActReadKeyring, ofRing(kr.Name).at(st)) != nil {
				continue
			}
			out.Keyrings = append(out.Keyrings, e.keyringView(st, kr))
		}
		if whole != nil && len(out.Keyrings) == 0 {
			return wire.Keyrings{}, whole
		}
		return out, nil
	})
}

// Keyring returns one keyring.
func (e *Engine) Keyring(ctx context.Context, c Caller, ring string) (wire.Keyring, error) {
	return read(ctx, e, c, ActReadKeyring, ofRing(ring), "", func(st *state.State) (wire.Keyring, error) {
		kr, ok := st.Keyring(ring)
		if !ok {
			return wire.Keyring{}, noKeyring(ring)
		}
		return e.keyringView(st, kr), nil
	})
}

// Keys lists the keys of a keyring, sorted by name, without their versions.
func (e *Engine) Keys(ctx context.Context, c Caller, ring string) (wire.Keys, error) {
	return read(ctx, e, c, ActReadKey, ofRing(ring), "", func(st *state.State) (wire.Keys, error) {
		if _, ok := st.Keyring(ring); !ok {
			return wire.Keys{}, noKeyring(ring)
		}
		return wire.Keys{Keys: views(st.Keys(ring), func(k state.Key) wire.Key { return e.keyView(st, k, false) })}, nil
	})
}

// Key returns one key with its versions.
func (e *Engine) Key(ctx context.Context, c Caller, ring, key string) (wire.Key, error) {
	return read(ctx, e, c, ActReadKey, ofKey(ring, key), "", func(st *state.State) (wire.Key, error) {
		k, ok := st.Key(ring, key)
		if !ok {
			return wire.Key{}, noKey(ring, key)
		}
		return e.keyView(st, k, true), nil
	})
}

// Proposal returns one proposal with its exact bytes.
func (e *Engine) Proposal(ctx context.Context, c Caller, id string) (wire.Proposal, error) {
	return read(ctx, e, c, ActReadProposal, resource{}, aboutProposal(id), func(st *state.State) (wire.Proposal, error) {
		return e.proposalByID(st, id)
	})
}
