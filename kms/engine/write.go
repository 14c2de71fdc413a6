package engine

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

// DefaultMaxStaleness is the staleness, in milliseconds, that a keyring allows
// where its creator says nothing.
const DefaultMaxStaleness = 30_000

// attempt is what a write adds to its envelope: on whose behalf, and what tells
// a repetition from another request.
type attempt struct {
	principal   string
	idempotency []byte // nil where the caller gave no key
	hash        []byte // of the request
	expect      uint64 // revision of what is changed, where the command has one
}

// newAttempt hashes a request. q has no maps, so its JSON is the same each time.
func newAttempt(c Caller, act Action, q any) (attempt, error) {
	a := attempt{principal: c.Identity.String()}
	if c.IdempotencyKey == "" {
		return a, nil
	}
	body, err := json.Marshal(q)
	if err != nil {
		return a, kms.Wrap(kms.Internal, err, "the request cannot be encoded", "")
	}
	key := sha256.Sum256([]byte("conclave/idempotency/v1\x00" + a.principal + "\x00" + c.IdempotencyKey))
	hash := sha256.Sum256(slices.Concat([]byte("conclave/request/v1\x00"+string(act)+"\x00"), body))
	a.idempotency, a.hash = key[:], hash[:]
	return a, nil
}

// before returns the outcome of the first attempt, if there was one. The same
// key with another request is kms.Conflict.
func (a attempt) before(st *state.State) (state.Result, bool, error) {
	if a.idempotency == nil {
		return state.Result{}, false, nil
	}
	o, ok := st.Outcome(a.idempotency)
	if !ok {
		return state.Result{}, false, nil
	}
	if !bytes.Equal(o.Request, a.hash) {
		return state.Result{}, false, &kms.Error{Kind: kms.Conflict, Msg: "the idempotency key was used for another request",
			Fix: "take a new key for a new request"}
	}
	return o.Result(), true, o.Result().Err()
}

// submit signs a command with the node's device and proposes it.
func (e *Engine) submit(ctx context.Context, a attempt, cmd state.Command) (state.Result, error) {
	st, now := e.cluster.State(), e.now()
	res, err := origin{e.node, st.Lineage(), e.signingSuite(st), e.cfg.Signer, now}.submit(ctx, e.cluster, a, cmd)
	return res, e.clockOff(now, err)
}

// signingSuite is that of this node's signer.
func (e *Engine) signingSuite(st *state.State) pqc.SuiteID {
	if e.cfg.SigningSuite != 0 {
		return e.cfg.SigningSuite
	}
	n, _ := st.Node(e.node)
	return pqc.SuiteID(n.SigningSuite)
}

// origin is a node as the sender of commands.
type origin struct {
	node, clusterID string
	suite           pqc.SuiteID // of signer
	signer          Signer
	now             time.Time
}

// submit signs a command and proposes it.
func (o origin) submit(ctx context.Context, c Cluster, a attempt, cmd state.Command) (state.Result, error) {
	env := state.NewEnvelope(cmd)
	env.Cluster, env.Origin, env.Time = o.clusterID, o.node, o.now.UnixMilli()
	env.Nonce = make([]byte, state.NonceSize)
	_, _ = rand.Read(env.Nonce) // never fails: it ends the process instead
	env.Expect = a.expect
	env.Principal, env.Idempotency, env.Request = a.principal, a.idempotency, a.hash
	b := env.Marshal()
	digest, err := pqc.Digest(o.suite, b, []byte(state.CommandContext))
	if err != nil {
		return state.Result{}, kms.Wrap(kms.Internal, err, "the command cannot be signed", "")
	}
	sig, err := o.signer.Sign(ctx, digest)
	if err != nil {
		return state.Result{}, kms.Wrap(kms.Unavailable, err, "the node's device did not sign the command", deviceFix)
	}
	res, err := c.Propose(ctx, state.Join(b, sig))
	if err != nil {
		return res, err
	}
	return res, res.Err()
}

// deviceFix is what a caller can do about a device that failed.
const deviceFix = "try again, or use another node; this one's readiness (GET /v1/ready) names the cause"

// write makes a change once: a repetition of it returns the first outcome.
func (e *Engine) write(ctx context.Context, st *state.State, rq *request, q any, f func(attempt) (state.Result, error)) (state.Result, error) {
	a, err := newAttempt(rq.caller, rq.act, q)
	if err != nil {
		return state.Result{}, err
	}
	if res, done, err := a.before(st); done || err != nil {
		return res, err
	}
	res, err := f(a)
	rq.written = err == nil || kms.KindOf(err) == kms.Unknown
	return res, err
}

// CreateKeyring makes a keyring, with protection software with its first KEK,
// sealed to every node of the residency. It has to be asked of a node of the
// residency: whoever makes a KEK has seen it. Errors: kms.Invalid, kms.Exists, kms.Denied, kms.NotResident, and
// those of every write: kms.Unavailable, kms.Unknown, kms.Conflict.
func (e *Engine) CreateKeyring(ctx context.Context, c Caller, q wire.CreateKeyringRequest) (wire.Keyring, error) {
	rq := &request{caller: c, act: ActCreateKeyring, about: aboutName("keyring", q.Name)}
	return do(ctx, e, rq, func(st *state.State) (wire.Keyring, error) {
		_, err := e.write(ctx, st, rq, q, func(a attempt) (state.Result, error) {
			cmd, err := e.newKeyring(ctx, st, q)
			if err != nil {
				return state.Result{}, err
			}
			return e.submit(ctx, a, cmd)
		})
		if err != nil {
			return wire.Keyring{}, err
		}
		now := e.cluster.State()
		kr, ok := now.Keyring(q.Name)
		if !ok {
			return wire.Keyring{}, noKeyring(q.Name)
		}
		return e.keyringView(now, kr), nil
	})
}

// newKeyring makes the command with a fresh KEK.
func (e *Engine) newKeyring(ctx context.Context, st *state.State, q wire.CreateKeyringRequest) (state.CreateKeyring, error) {
	cmd := state.CreateKeyring{
		Name: q.Name, Residency: slices.Clone(q.Residency), Protection: kms.Protection(q.Protection), Policy: q.Policy,
		Receipts: kms.Receipts(q.Receipts), MaxStaleness: q.MaxStalenessMS, Survive: q.Survive,
	}
	if err := kms.CheckName("keyring", q.Name); err != nil {
		return cmd, err
	}
	if _, ok := st.Keyring(q.Name); ok {
		return cmd, kms.Errorf(kms.Exists, "there is a keyring %q already", q.Name)
	}
	slices.Sort(cmd.Residency)
	switch cmd.Protection {
	case "":
		cmd.Protection = kms.Software
	case kms.Software, kms.Hardware:
	default:
		return cmd, kms.Errorf(kms.Invalid, "protection %q is none of %s, %s", q.Protection, kms.Software, kms.Hardware)
	}
	if cmd.Receipts == "" {
		cmd.Receipts = kms.EveryNode
	}
	if cmd.MaxStaleness == 0 {
		cmd.MaxStaleness = DefaultMaxStaleness
	}
	nodes, err := e.recipients(st, q.Name, cmd.Residency)
	if err != nil {
		return cmd, err
	}
	if cmd.Protection == kms.Hardware {
		return cmd, keyring.CheckResidents(residents(nodes)) // it has no KEK
	}
	cmd.Copies, cmd.Checks, err = e.newKEK(ctx, keyring.KEKBinding{
		Cluster: st.Cluster(), Keyring: q.Name, Version: 1, Protection: cmd.Protection,
	}, nodes)
	return cmd, err
}

// recipients returns the nodes of a residency, of which this one must be one.
func (e *Engine) recipients(st *state.State, ring string, residency []string) ([]state.Node, error) {
	if len(residency) == 0 {
		return nil, kms.Errorf(kms.Invalid, "residency is empty; name at least one site")
	}
	var nodes []state.Node
	here := false
	for i, site := range residency {
		if i > 0 && residency[i-1] == site {
			return nil, kms.Errorf(kms.Invalid, "residency names site %q twice", site)
		}
		if _, ok := st.Site(site); !ok {
			return nil, &kms.Error{Kind: kms.Invalid, Msg: fmt.Sprintf("residency: there is no site %q", site), Fix: "see GET /v1/sites, or conclave node list"}
		}
		for _, n := range st.NodesOf(site) {
			nodes = append(nodes, n)
			here = here || n.ID == e.node
		}
	}
	if len(nodes) == 0 {
		return nil, kms.Errorf(kms.Invalid, "no site of the residency has a node")
	}
	if !here {
		return nil, e.notResident(st, ring, residency)
	}
	slices.SortFunc(nodes, func(a, b state.Node) int { return bytes.Compare([]byte(a.ID), []byte(b.ID)) })
	return nodes, nil
}

// newKEK makes a KEK from the device's and the system's randomness, seals it to
// the nodes and wipes it.
func (e *Engine) newKEK(ctx context.Context, b keyring.KEKBinding, nodes []state.Node) ([]state.SealedCopy, []state.Check, error) {
	entropy, err := keyring.Entropy(ctx, e.cfg.Device)
	if err != nil {
		return nil, nil, err
	}
	defer entropy.Destroy()
	defer e.cfg.Cache.Scrub()
	kek, err := keyring.GenerateKEK(entropy.Reveal())
	if err != nil {
		return nil, nil, err
	}
	defer kek.Destroy()
	to := make([]keyring.Recipient, len(nodes))
	for i, n := range nodes {
		to[i] = keyring.Recipient{Node: n.ID, Suite: n.Suite, PublicKey: n.Agreement}
	}
	sealed, err := keyring.SealKEK(to, b, kek)
	if err != nil {
		return nil, nil, err
	}
	copies := make([]state.SealedCopy, len(sealed))
	for i, s := range sealed {
		copies[i] = state.SealedCopy{Node: s.Node, Root: rootOf(nodes, s.Node), Sealed: s.Sealed}
	}
	return copies, checksOf(nodes, kek, b.Cluster, b.Keyring, kekID, b.Version), nil
}

// kekID stands for the key id in the check values of KEKs, which have none.
var kekID kms.KeyID

// checksOf commits to what each node must show in its receipt of a secret.
func checksOf(nodes []state.Node, s *secret.Bytes, cluster, ring string, id kms.KeyID, version uint32) []state.Check {
	checks := make([]state.Check, len(nodes))
	for i, n := range nodes {
		checks[i] = state.Check{Node: n.ID, Hash: keyring.CheckHash(keyring.CheckValue(s, cluster, ring, id, version, n.ID))}
	}
	return checks
}

// CreateKey makes a key with version 1, active at once, at a node where the
// keyring is resident. Errors: kms.Invalid, kms.NotFound, kms.Exists,
// kms.Denied, kms.NotResident, and those of every write.
func (e *Engine) CreateKey(ctx context.Context, c Caller, ring string, q wire.CreateKeyRequest) (wire.Key, error) {
	rq := &request{caller: c, act: ActCreateKey, res: ofRing(ring), about: aboutName("key", q.Name)}
	if rq.about != "" {
		rq.about = kms.KeyPath(ring, q.Name)
	}
	return do(ctx, e, rq, func(st *state.State) (wire.Key, error) {
		_, err := e.write(ctx, st, rq, []any{ring, q}, func(a attempt) (state.Result, error) {
			res, err := e.createKey(ctx, a, st, ring, q)
			if now := e.cluster.State(); kms.KindOf(err) == kms.Conflict && kekOf(now, ring) != kekOf(st, ring) {
				res, err = e.createKey(ctx, a, now, ring, q) // the KEK was rotated meanwhile
			}
			return res, err
		})
		if err != nil {
			return wire.Key{}, err
		}
		now := e.cluster.State()
		k, ok := now.Key(ring, q.Name)
		if !ok {
			return wire.Key{}, noKey(ring, q.Name)
		}
		return e.keyView(now, k, true), nil
	})
}

func (e *Engine) createKey(ctx context.Context, a attempt, st *state.State, ring string, q wire.CreateKeyRequest) (state.Result, error) {
	cmd, err := e.newKey(ctx, st, ring, q)
	if err != nil {
		return state.Result{}, err
	}
	return e.submit(ctx, a, cmd)
}

// kekOf is the primary KEK version of a keyring.
func kekOf(st *state.State, ring string) uint32 {
	kr, _ := st.Keyring(ring)
	return kr.KEK
}

func (e *Engine) newKey(ctx context.Context, st *state.State, ring string, q wire.CreateKeyRequest) (state.CreateKey, error) {
	cmd := state.CreateKey{
		Keyring: ring, Name: q.Name, Purpose: kms.Purpose(q.Purpose), Algorithm: kms.Algorithm(q.Algorithm),
		RotationPeriod: q.RotationPeriodMS,
	}
	if err := kms.CheckName("key", q.Name); err != nil {
		return cmd, err
	}
	offered := cmd.Purpose.Algorithms()
	if len(offered) == 0 {
		return cmd, kms.Errorf(kms.Invalid, "purpose %q is none of encrypt, mac, sign", q.Purpose)
	}
	if cmd.Algorithm == "" {
		cmd.Algorithm = offered[0]
	}
	if !slices.Contains(offered, cmd.Algorithm) {
		return cmd, kms.Errorf(kms.Invalid, "algorithm %q does not fit purpose %s; it offers %v", q.Algorithm, q.Purpose, offered)
	}
	kr, ok := st.Keyring(ring)
	if !ok {
		return cmd, noKeyring(ring)
	}
	if _, ok := st.Key(ring, q.Name); ok {
		return cmd, kms.Errorf(kms.Exists, "there is a key %q in keyring %q already", q.Name, ring)
	}
	var id kms.KeyID
	_, _ = rand.Read(id[:])
	cmd.ID, cmd.KEK = id[:], kr.KEK
	var checked []state.Node // what protection software commits to are the KEK's check values
	if kr.Protection == kms.Hardware {
		checked = st.ResidentNodes(ring)
	}
	v, err := e.newVersion(ctx, st, kr, keyring.KeyBinding{
		Cluster: st.Cluster(), Keyring: ring, KEK: kr.KEK, KeyID: id, Version: 1, Algorithm: cmd.Algorithm, Purpose: cmd.Purpose,
	}, checked)
	cmd.Wrapped, cmd.Copies, cmd.Generated, cmd.PublicKey, cmd.Checks = v.wrapped, v.copies, v.generated, v.public, v.checks
	return cmd, err
}

// newMaterial is a new key version as it goes into a command.
type newMaterial struct {
	wrapped   []byte             // protection software
	copies    []state.SealedCopy // protection hardware
	generated kms.Generated      // protection hardware
	public    []byte
	checks    []state.Check
}

// newVersion generates material, wraps it under the keyring's KEK or for the
// devices of the resident nodes, and commits to the check values of the nodes
// given.
func (e *Engine) newVersion(ctx context.Context, st *state.State, kr state.Keyring, b keyring.KeyBinding, nodes []state.Node) (v newMaterial, err error) {
	if kr.Protection == kms.Hardware {
		return e.newDeviceVersion(ctx, st, kr, b, nodes)
	}
	kb, sealed, err := e.sealedKEK(st, &kr, b.KEK)
	if err != nil {
		return v, err
	}
	kek, release, err := e.cfg.Cache.KEK(ctx, kb, sealed)
	if err != nil {
		return v, err
	}
	defer release()
	entropy, err := keyring.Entropy(ctx, e.cfg.Device)
	if err != nil {
		return v, err
	}
	defer entropy.Destroy()
	defer e.cfg.Cache.Scrub()
	m, public, err := keyring.Generate(b.Algorithm, entropy.Reveal())
	if err != nil {
		return v, err
	}
	defer m.Destroy()
	v.public = public
	v.checks = checksOf(nodes, m, b.Cluster, b.Keyring, b.KeyID, b.Version)
	v.wrapped, err = keyring.WrapMaterial(kek, b, m)
	return v, err
}

// aboutName returns a name that may be logged, or nothing.
func aboutName(what, s string) string {
	if kms.CheckName(what, s) != nil {
		return ""
	}
	return s
}
