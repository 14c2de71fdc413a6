package audit

import (
	"bytes"
	"slices"
	"strconv"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/attest"
	"github.com/conclave-kms/conclave/kms/state"
)

// member is a node with the hardware roots that it had one after the other.
type member struct {
	site     string
	removed  bool
	revision uint64
	slack    uint64 // how much higher it may be since recoveries
	roots    []root // the first one from the genesis, or adopted when the node joined
	pending  uint32 // number of a root that was approved and never adopted, if higher
	last     uint32 // number of the root that signed its latest execution
}

// root is a hardware root with its number.
type root struct {
	number uint32
	keys   approval.NodeRoot
}

// present returns the root that the node adopted last; number 0 before its first.
func (m *member) present() (r root) {
	if n := len(m.roots); n > 0 {
		r = m.roots[n-1]
	}
	return r
}

// has reports whether the node has or had a root of that number.
func (m *member) has(number uint32) bool {
	return slices.ContainsFunc(m.roots, func(r root) bool { return r.number == number })
}

// act takes note of an execution that the node signed. Executions stand in the
// order of the log, so a root that signed none of the later ones is given up.
func (m *member) act(what string, e signed) error {
	if e.root < m.last {
		return refuse(kms.Conflict, nil, "%s is signed with root number %d of node %s, which had number %d by then", what, e.root, e.Origin, m.last)
	}
	m.last = e.root
	return nil
}

// inOrder refuses two commands of a node of which the later one is signed with an
// older hardware root.
func (w *replay) inOrder(what string, before, after signed) error {
	if before.Origin == after.Origin && before.root > after.root {
		return refuse(kms.Conflict, nil, "%s is signed with root number %d of node %s, which had number %d by then", what, after.root, after.Origin, before.root)
	}
	return nil
}

// replaceRoot applies a verified decision on a node's next root, judging as the
// state machine did: the holder of the keys agrees, they are nobody else's, and
// the attestation document holds. If the node has adopted the root, its command
// is there, signed with the new key.
func (w *replay) replaceRoot(id string, d decided) error {
	params, err := d.content.NodeParams()
	if err != nil {
		return err
	}
	m, ok := w.nodes[id]
	if !ok {
		return refuse(kms.NotFound, nil, "there is no node %s", id)
	}
	number := max(m.present().number, m.pending) + 1
	if err := params.VerifyPossession(w.cluster, id, number); err != nil {
		return err
	}
	if err := w.policies[kms.Governance].AllowRoot(id, params.Root); err != nil {
		return err
	}
	if err := w.unusedKey(id, params.Root.Signing); err != nil {
		return err
	}
	if err := w.attested(id, params.Root, d); err != nil {
		return err
	}
	m.revision++
	if len(d.adoption) == 0 {
		m.pending = number
		return nil
	}
	return w.adopt(id, root{number, params.Root}, d.adoption)
}

// attested verifies the attestation document of a new root. The witness signed it
// with the root that it had then: its latest one, or one before that it gave up in
// the meantime.
func (w *replay) attested(id string, keys approval.NodeRoot, d decided) (err error) {
	site, _ := w.siteOf(id)
	for back, more := 0, true; more; back++ {
		more = false
		_, err = attest.Verify(keys.Attestation, state.Subject(id, site, keys), attest.Context{
			Time: time.UnixMilli(d.execution.Time), Vendors: w.genesis.Vendors,
			Witness: func(node string) (attest.Subject, bool) {
				site, ok := w.siteOf(node)
				if !ok || back >= len(w.nodes[node].roots) {
					return attest.Subject{}, false
				}
				roots := w.nodes[node].roots
				more = back+1 < len(roots)
				return state.Subject(node, site, roots[len(roots)-1-back].keys), true
			},
		})
		if err == nil {
			return nil
		}
	}
	return err
}

// unusedKey refuses a signing key that a root of any node is or was.
func (w *replay) unusedKey(id string, signing []byte) error {
	for o, m := range w.nodes {
		if slices.ContainsFunc(m.roots, func(r root) bool { return bytes.Equal(r.keys.Signing, signing) }) {
			return refuse(kms.Conflict, nil, "the signing key of the new root of node %s is or was that of node %s", id, o)
		}
	}
	return nil
}

// adopt applies the command by which a node adopted a root.
func (w *replay) adopt(id string, next root, raw []byte) error {
	what := "the adoption of root number " + strconv.FormatUint(uint64(next.number), 10) + " by node " + id
	e, c, err := commandBy[state.AdoptRoot](w, what, raw, func(*member) []root { return []root{next} })
	switch {
	case err != nil:
		return err
	case e.Origin != id || c.Root != next.number:
		return refuse(kms.Invalid, nil, "%s: the command is that of node %s for number %d", what, e.Origin, c.Root)
	}
	m := w.nodes[id]
	m.roots = append(m.roots, next)
	m.revision++
	return nil
}

// reportAdoption says whether the node of a decision has adopted the root.
func (w *replay) reportAdoption(d decided, r *Report) {
	if d.content.Action != kms.ActionNode {
		return
	}
	_, id, _ := approval.ParseTarget(d.content.Target)
	if params, err := d.content.NodeParams(); err != nil || !params.HasRoot() {
		return
	}
	if len(d.adoption) == 0 {
		r.Notes = append(r.Notes, "That node "+id+" has adopted the hardware root of proposal "+d.id+" is not in this file.")
		return
	}
	now := w.nodes[id].present()
	r.passed("Node %s adopted that hardware root as its number %d and signed so with the new key (device: %q).", id, now.number, now.keys.Device)
}
