package cluster

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/pqc"
)

// MarkContext is the signature context (pqc.Verify) under which a node's device signs
// the key that signs its marks for one run of the node.
const MarkContext = "conclave/mark/v1"

// markDomain begins what that key signs.
const markDomain = "conclave/mark/v1\x00"

// maxMark bounds an encoded mark in bytes.
const maxMark = 4096

// position is how far a node's promises go: it has voted in no later term than Term,
// and stored the log up to the entry at Index, of term LogTerm.
type position struct {
	Term    uint64 `cbor:"term"`
	LogTerm uint64 `cbor:"log-term"`
	Index   uint64 `cbor:"index"`
}

// before reports whether a node at p has forgotten something that it had at q. Logs
// are compared as Raft does for elections: the term of the last entry decides, then its index.
func (p position) before(q position) bool {
	return p.Term < q.Term || p.logBefore(q)
}

func (p position) logBefore(q position) bool {
	return cmp.Or(cmp.Compare(p.LogTerm, q.LogTerm), cmp.Compare(p.Index, q.Index)) < 0
}

// empty reports whether the log holds nothing, or the first list of members alone.
func (p position) empty() bool { return p.Index <= 1 }

// join returns the position that has all of both.
func (p position) join(q position) position {
	if p.logBefore(q) {
		p.LogTerm, p.Index = q.LogTerm, q.Index
	}
	p.Term = max(p.Term, q.Term)
	return p
}

// mark is a node's signed word on its position. The device signs a key at the start of
// the node, and that key the marks: they are too many for a device.
type mark struct {
	Run     markRun  `cbor:"run"`
	Device  []byte   `cbor:"device"` // r‖s by the device over Run
	At      position `cbor:"at"`
	Counter uint64   `cbor:"counter"` // of the device, 0 without one
	Sig     []byte   `cbor:"sig"`     // Ed25519 by Run.Key over markDomain and markBody
}

// markRun names the key of one run of a node.
type markRun struct {
	Cluster string `cbor:"cluster"`
	Node    string `cbor:"node"`
	Key     []byte `cbor:"key"` // Ed25519
}

type markBody struct {
	Run     markRun  `cbor:"run"`
	At      position `cbor:"at"`
	Counter uint64   `cbor:"counter"`
}

func (m mark) body() []byte {
	return append([]byte(markDomain), canon.Marshal(markBody{m.Run, m.At, m.Counter})...)
}

// parseMark decodes a mark; verify says whether it holds. Errors: kms.Invalid, kms.TooLarge.
func parseMark(b []byte) (mark, error) {
	var m mark
	if len(b) > maxMark {
		return m, kms.Errorf(kms.TooLarge, "a mark of %d bytes; the limit is %d", len(b), maxMark)
	}
	if err := canon.Unmarshal(b, &m); err != nil {
		return m, kms.Wrap(kms.Invalid, err, "not a mark in canonical form", "")
	}
	if len(m.Run.Key) != ed25519.PublicKeySize || len(m.Sig) != ed25519.SignatureSize {
		return m, kms.Errorf(kms.Invalid, "a mark with a key of %d and a signature of %d bytes", len(m.Run.Key), len(m.Sig))
	}
	return m, nil
}

// signingKey is the public half of a device's signing key.
type signingKey struct {
	suite  pqc.SuiteID
	public []byte
}

// verify checks that a mark is by one of the keys, for this node of this cluster.
// Errors: kms.Invalid, kms.BadSignature.
func (m mark) verify(cluster, node string, keys []signingKey) error {
	if m.Run.Cluster != cluster || m.Run.Node != node {
		return kms.Errorf(kms.Invalid, "the mark is of node %q of cluster %q", m.Run.Node, m.Run.Cluster)
	}
	by := func(k signingKey) bool {
		return pqc.Verify(k.suite, k.public, canon.Marshal(m.Run), []byte(MarkContext), m.Device) == nil
	}
	if !slices.ContainsFunc(keys, by) || !ed25519.Verify(m.Run.Key, m.body(), m.Sig) {
		return kms.Errorf(kms.BadSignature, "the mark is not signed by node %s", node)
	}
	return nil
}

// marker signs this node's marks.
type marker struct {
	run    markRun
	device []byte
	key    ed25519.PrivateKey
}

// newMarker draws the key of this run and has the device sign it.
func newMarker(ctx context.Context, cluster, node string, own signingKey, sign func(context.Context, []byte) ([]byte, error)) (*marker, error) {
	public, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	m := &marker{run: markRun{cluster, node, public}, key: key}
	digest, err := pqc.Digest(own.suite, canon.Marshal(m.run), []byte(MarkContext))
	if err != nil {
		return nil, err
	}
	if m.device, err = sign(ctx, digest); err != nil {
		return nil, err
	}
	return m, m.at(position{}, 0).verify(cluster, node, []signingKey{own})
}

func (k *marker) at(p position, counter uint64) mark {
	m := mark{Run: k.run, Device: k.device, At: p, Counter: counter}
	m.Sig = ed25519.Sign(k.key, m.body())
	return m
}

// ownKeys are the keys with which this node's device may have signed: the present
// root's, and those that the state knows.
func ownKeys(t *trust, st *state.State) []signingKey {
	return append([]signingKey{{t.suite, t.signing}}, knownKeys(st, t.node)...)
}

// knownKeys are the signing keys of a node's present root, the former ones and the next.
func knownKeys(st *state.State, node string) (keys []signingKey) {
	add := func(suite uint16, public []byte) {
		if len(public) > 0 {
			keys = append(keys, signingKey{pqc.SuiteID(suite), public})
		}
	}
	if n, ok := st.Node(node); ok {
		add(n.SigningSuite, n.Signing)
	}
	if next, ok := st.Replacement(node); ok {
		add(next.New.SigningSuite, next.New.Signing)
	}
	for _, f := range st.FormerRoots(node) {
		add(f.SigningSuite, f.Signing)
	}
	return keys
}

// follows checks that a mark is of the same run of a node as one that was verified
// before, and signed. It spares the device's signature, which is the same.
func (m mark) follows(was mark) bool {
	return m.Run.Cluster == was.Run.Cluster && m.Run.Node == was.Run.Node && bytes.Equal(m.Run.Key, was.Run.Key) &&
		bytes.Equal(m.Device, was.Device) && ed25519.Verify(m.Run.Key, m.body(), m.Sig)
}

// made reports whether a mark was made in this run.
func (k *marker) made(m mark) bool { return k != nil && slices.Equal(m.Run.Key, k.run.Key) }
