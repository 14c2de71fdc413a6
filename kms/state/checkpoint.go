package state

import (
	"bytes"
	"slices"
	"strings"

	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/note"
)

// The types of the commands about checkpoints.
const (
	TypeSubmitCheckpoint Type = 39
	TypeCosign           Type = 40
)

// The events about checkpoints.
const (
	EventCheckpoint = "checkpoint" // of Node's access log
	EventLogForked  = "log-forked" // Node's access log is not what it was
	EventCosigned   = "cosigned"   // by Node, for its Site
)

// maxProof is the most hashes in a consistency proof: two for each level of a tree.
const maxProof = 128

// LogProof is an RFC 6962 consistency proof from a size of a log to a later one.
type LogProof struct {
	From   uint64   `cbor:"from"`
	Hashes [][]byte `cbor:"hashes"`
}

// SubmitCheckpoint brings the head of the origin node's access log. It is taken if
// the log has only grown since the node's last checkpoint, which the proof from
// that size shows; else it is kept as evidence, see Fork. Further proofs, from where cosigners of other sites stand, are for them.
type SubmitCheckpoint struct {
	Restart   uint32         `cbor:"restart"` // how often the log has begun anew, see apply
	Size      uint64         `cbor:"size"`
	Root      []byte         `cbor:"root"`
	Proofs    []LogProof     `cbor:"proofs"` // by From, ascending
	Signature note.Signature `cbor:"signature"`
}

// Cosign says that the origin node has found the head of a log consistent with all that
// it had seen of the log before: of another site's access log, where it is a checkpoint
// that stands in the state, or of the cluster log as the node has applied it. One node signs
// for a site.
type Cosign struct {
	Log       string         `cbor:"log"` // note.ClusterLog or note.AccessLog
	Restart   uint32         `cbor:"restart"`
	Size      uint64         `cbor:"size"`
	Root      []byte         `cbor:"root"`
	State     []byte         `cbor:"state"` // hash of the state, for the cluster log alone
	Signature note.Signature `cbor:"signature"`
}

// Type implements Command.
func (SubmitCheckpoint) Type() Type { return TypeSubmitCheckpoint }

// Type implements Command.
func (Cosign) Type() Type { return TypeCosign }

// Checkpoint is the last one of a node's access log.
type Checkpoint struct {
	Node      string `cbor:"node"`
	Restart   uint32 `cbor:"restart"`
	Size      uint64 `cbor:"size"`
	Root      []byte `cbor:"root"`
	Signed    int64  `cbor:"signed"`    // when the node signed the command
	Time      int64  `cbor:"time"`      // cluster clock
	Index     uint64 `cbor:"index"`     // of Statement in the log
	Statement []byte `cbor:"statement"` // with the signatures and proofs

	Fork *Fork `cbor:"fork,omitempty"` // what contradicts it
}

// Fork is a checkpoint that does not continue the one before: the node has truncated its
// access log, or has another one. It is the last of this log.
type Fork struct {
	Size      uint64 `cbor:"size"`
	Root      []byte `cbor:"root"`
	Time      int64  `cbor:"time"`  // cluster clock
	Index     uint64 `cbor:"index"` // of Statement in the log
	Statement []byte `cbor:"statement"`
}

// latest is the index of the last statement about the checkpoint.
func (c *Checkpoint) latest() uint64 {
	if c.Fork != nil {
		return c.Fork.Index
	}
	return c.Index
}

// Cosignature is the last one of a log by a site.
type Cosignature struct {
	Log       string `cbor:"log"`
	Site      string `cbor:"site"`
	Node      string `cbor:"node"`
	Restart   uint32 `cbor:"restart"`
	Size      uint64 `cbor:"size"`
	Root      []byte `cbor:"root"`
	State     []byte `cbor:"state"`
	Time      int64  `cbor:"time"`  // cluster clock
	Index     uint64 `cbor:"index"` // of Statement in the log
	Statement []byte `cbor:"statement"`
}

func checkpointID(r *Checkpoint) []byte   { return nameKey(r.Node) }
func cosignatureID(r *Cosignature) []byte { return nameKey(r.Log, r.Site) }

// LogHead returns the checkpoint of a log as it is signed: of a cluster's history, with
// the state's hash for the cluster log (nil for others) and how often the log has begun anew.
func LogHead(lineage, log string, restart uint32, size uint64, root, state []byte) note.Checkpoint {
	c := note.Checkpoint{Origin: note.Origin(lineage, log), Size: size, Root: root}
	if len(state) > 0 {
		c.Extensions = append(c.Extensions, note.StateExtension(state))
	}
	if restart > 0 {
		c.Extensions = append(c.Extensions, "restart "+decimal(uint64(restart)))
	}
	return c
}

func (c SubmitCheckpoint) validate(e Envelope) error {
	bad := func(what string) error { return kms.Errorf(kms.Invalid, "checkpoint: %s", what) }
	switch {
	case c.Size == 0 || c.Size > maxIndex:
		return bad("the size is out of range")
	case len(c.Root) != HashSize:
		return bad("the root is no SHA-256")
	case len(c.Proofs) > MaxSites+1:
		return bad("there are more proofs than sites")
	case e.Principal != "":
		return bad("a node does it on nobody's behalf")
	}
	for i, p := range c.Proofs {
		switch {
		case p.From == 0 || p.From >= c.Size || i > 0 && c.Proofs[i-1].From >= p.From:
			return bad("the proofs do not ascend to its size")
		case len(p.Hashes) > maxProof || slices.ContainsFunc(p.Hashes, func(h []byte) bool { return len(h) != HashSize }):
			return bad("a proof is no list of hashes")
		}
	}
	return noExpect(e)
}

func (c SubmitCheckpoint) verify(t *tx) error {
	return t.verifyHead(LogHead(t.before.Lineage(), note.AccessLog(t.env.Origin), c.Restart, c.Size, c.Root, nil), c.Signature)
}

// apply takes the checkpoint if the log continues the one of the checkpoint before. If it
// does not, the checkpoint that stands stays the last one, with what contradicts it
// beside it: the node itself has signed both. A log
// may begin anew once in an epoch of the cluster, with the number of restarts one higher:
// a node that comes back from a backup in a recovery may have lost its access log.
// When a stored statement is replayed the checkpoint before it is known only where this
// one contradicts it.
func (c SubmitCheckpoint) apply(t *tx) error {
	node := t.env.Origin
	next := Checkpoint{Node: node, Restart: c.Restart, Size: c.Size, Root: c.Root, Signed: t.env.Time, Time: t.clock, Index: t.index, Statement: t.raw}
	old, has := find[Checkpoint](t.Txn, tableCheckpoint, byID, nameKey(node))
	if has || !t.replay {
		began, _ := t.before.Recovered()
		mayRestart := has && old.Index < began.Index
		if err := c.follows(t.env, old, mayRestart); err != nil {
			return err
		}
		if !mayRestart || c.Restart == old.Restart {
			if err := c.continues(old); err != nil {
				old.Fork = &Fork{Size: c.Size, Root: c.Root, Time: t.clock, Index: t.index, Statement: t.raw}
				insert(t.Txn, tableCheckpoint, old)
				t.event(Event{Type: EventLogForked, Node: node})
				return nil
			}
		}
	}
	insert(t.Txn, tableCheckpoint, next)
	t.event(Event{Type: EventCheckpoint, Node: node})
	return nil
}

// follows checks that a checkpoint is the next one after old, which is empty for the
// first, and brings what it takes to compare them.
func (c SubmitCheckpoint) follows(e Envelope, old Checkpoint, mayRestart bool) error {
	switch {
	case mayRestart && c.Restart == old.Restart+1:
		return nil
	case c.Restart != old.Restart:
		return kms.Errorf(kms.Invalid, "the access log of node %s cannot begin anew: it was not lost in a recovery of the cluster", e.Origin)
	case old.Fork != nil:
		return kms.Errorf(kms.Conflict, "the access log of node %s was forked or truncated: it has two that contradict each other", e.Origin)
	case old.Size > 0 && e.Time <= old.Signed:
		return kms.Errorf(kms.Conflict, "node %s has submitted a later checkpoint", e.Origin)
	case c.Size == old.Size && bytes.Equal(c.Root, old.Root) && len(c.Proofs) == 0:
		return kms.Errorf(kms.Exists, "node %s has submitted this checkpoint already", e.Origin)
	case old.Size > 0 && c.Size > old.Size && !slices.ContainsFunc(c.Proofs, func(p LogProof) bool { return p.From == old.Size }):
		return kms.Errorf(kms.Conflict, "the last checkpoint of node %s has %d entries; there is no proof from there", e.Origin, old.Size)
	}
	return nil
}

// continues checks that the log is the one of old, grown.
func (c SubmitCheckpoint) continues(old Checkpoint) error {
	switch {
	case old.Size == 0 || c.Size == old.Size && bytes.Equal(c.Root, old.Root):
		return nil
	case c.Size <= old.Size:
		return kms.Errorf(kms.Invalid, "the access log had %d entries and now has %d", old.Size, c.Size)
	}
	p, _ := search(c.Proofs, func(p LogProof) bool { return p.From == old.Size })
	return p.Verify(old.Root, c.Size, c.Root)
}

// Verify checks that the log with a root at the proof's size is the beginning of the one
// with another root at a later size. Error: kms.Invalid.
func (p LogProof) Verify(from []byte, size uint64, root []byte) error {
	if p.From == 0 || p.From >= size || len(from) != HashSize || len(root) != HashSize ||
		proof.VerifyConsistency(rfc6962.DefaultHasher, p.From, size, p.Hashes, from, root) != nil {
		return kms.Errorf(kms.Invalid, "the proof does not show that the log of %d leaves is the beginning of the one of %d", p.From, size)
	}
	return nil
}

func (c Cosign) validate(e Envelope) error {
	bad := func(what string) error { return kms.Errorf(kms.Invalid, "cosignature: %s", what) }
	node, access := strings.CutPrefix(c.Log, note.AccessLog(""))
	switch {
	case !access && c.Log != note.ClusterLog || access && kms.CheckName("node", node) != nil:
		return bad("there is no such log")
	case access && len(c.State) != 0 || !access && (len(c.State) != HashSize || c.Restart != 0):
		return bad("the hash of the state goes with the cluster log, and only the others begin anew")
	case c.Size == 0 || c.Size > maxIndex || len(c.Root) != HashSize:
		return bad("the size or the root is out of range")
	case e.Principal != "":
		return bad("a node does it on nobody's behalf")
	}
	return noExpect(e)
}

func (c Cosign) verify(t *tx) error {
	return t.verifyHead(LogHead(t.before.Lineage(), c.Log, c.Restart, c.Size, c.Root, c.State), c.Signature)
}

// apply records the cosignature in the place of the site's last one. Of an access log it
// may be behind the last checkpoint: that tells where the site stands, so that the next
// checkpoint brings a proof from there. Of the cluster log each site says what it
// has applied; whether they agree is for the reader to see. When a stored statement is
// replayed the log's checkpoint of then is not known.
func (c Cosign) apply(t *tx) error {
	r := t.reader()
	n, _ := r.node(t.env.Origin)
	if !t.replay {
		if err := c.fits(t, n); err != nil {
			return err
		}
	}
	insert(t.Txn, tableCosignature, Cosignature{
		Log: c.Log, Site: n.Site, Node: n.ID, Restart: c.Restart, Size: c.Size, Root: c.Root, State: c.State, Time: t.clock, Index: t.index, Statement: t.raw,
	})
	t.event(Event{Type: EventCosigned, Node: n.ID, Site: n.Site})
	return nil
}

// fits checks a cosignature by node n against the state.
func (c Cosign) fits(t *tx, n Node) error {
	began, _ := t.before.Recovered()
	old, has := find[Cosignature](t.Txn, tableCosignature, byID, nameKey(c.Log, n.Site))
	if has && old.Index >= began.Index && c.Restart == old.Restart && c.Size <= old.Size {
		return kms.Errorf(kms.Exists, "site %s has cosigned %d leaves of %s already", n.Site, old.Size, c.Log)
	}
	node, access := strings.CutPrefix(c.Log, note.AccessLog(""))
	if !access {
		if c.Size > t.before.log.size {
			return kms.Errorf(kms.Invalid, "the cluster log has %d leaves, not %d", t.before.log.size, c.Size)
		}
		return nil
	}
	owner, ok := t.reader().node(node)
	if !ok {
		return t.reader().noNode(node)
	}
	if owner.Site == n.Site {
		return kms.Errorf(kms.Invalid, "node %s is of the same site as %s: only others cosign its access log", n.ID, node)
	}
	cp, ok := find[Checkpoint](t.Txn, tableCheckpoint, byID, nameKey(node))
	switch {
	case !ok || c.Restart != cp.Restart || c.Size > cp.Size:
		return kms.Errorf(kms.Conflict, "there is no checkpoint of %d entries of the access log of node %s", c.Size, node)
	case cp.Fork != nil:
		return kms.Errorf(kms.Conflict, "the access log of node %s was forked or truncated", node)
	case c.Size == cp.Size && !bytes.Equal(c.Root, cp.Root):
		return kms.Errorf(kms.Conflict, "the checkpoint of %d entries of the access log of node %s has another root", c.Size, node)
	}
	return nil
}

// Checkpoint returns the last checkpoint of a node's access log.
func (s *State) Checkpoint(node string) (Checkpoint, bool) {
	return find[Checkpoint](s.read(), tableCheckpoint, byID, nameKey(node))
}

// Cosignatures returns the last cosignature of a log by each site that has given one.
func (s *State) Cosignatures(log string) []Cosignature {
	return list[Cosignature](s.read(), tableCosignature, byID, prefixKey(log))
}
