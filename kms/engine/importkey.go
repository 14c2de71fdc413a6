package engine

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// actImportKey is what the access log calls an import. Who may create keys may hand in
// what a proposal lets in; the access policies know no other name for it.
const actImportKey Action = "key:import"

// ImportKey makes the key that an authorised proposal asks for, of material that its
// owner has sealed to this node. The material is opened only once the proposal may be
// carried out, and is wiped with the end of the request. To hand it in again returns the
// key. Errors: kms.Invalid, kms.NotFound, kms.Exists, kms.Denied, kms.NeedsApproval,
// kms.Expired, kms.Conflict, kms.NotResident (sealed to another node), kms.OpenFailed,
// and those of every write.
func (e *Engine) ImportKey(ctx context.Context, c Caller, ring, key string, q wire.ImportKeyRequest) (wire.Key, error) {
	rq := &request{caller: c, act: ActCreateKey, logged: actImportKey, res: ofRing(ring), about: aboutName("key", key)}
	if rq.about != "" {
		rq.about = kms.KeyPath(ring, key)
	}
	return do(ctx, e, rq, func(st *state.State) (wire.Key, error) {
		p, params, done, err := e.toImport(st, ring, key, q)
		if err != nil {
			return wire.Key{}, err
		}
		if !done {
			err = e.importKey(ctx, rq, st, p, params, q.Sealed)
			if now := e.cluster.State(); kms.KindOf(err) == kms.Conflict && kekOf(now, ring) != kekOf(st, ring) {
				err = e.importKey(ctx, rq, now, p, params, q.Sealed) // the KEK was rotated meanwhile
			}
		}
		if err != nil {
			return wire.Key{}, err
		}
		now := e.cluster.State()
		k, ok := now.Key(ring, key)
		if !ok {
			return wire.Key{}, noKey(ring, key)
		}
		return e.keyView(now, k, true), nil
	})
}

// toImport finds the proposal that an import is for, and refuses before anything is
// opened what it does not let in. done: it was carried out, and this is a repetition.
func (e *Engine) toImport(st *state.State, ring, key string, q wire.ImportKeyRequest) (p state.Proposal, params approval.ImportParams, done bool, err error) {
	p, ok := st.Proposal(q.Proposal)
	if !ok {
		return p, params, false, noProposal(q.Proposal)
	}
	if p.Content.Action != kms.ActionImport || p.Content.Target != approval.KeyTarget(ring, key) {
		return p, params, false, kms.Errorf(kms.Invalid, "proposal %s is not to import %s", p.ID, kms.KeyPath(ring, key))
	}
	if params, err = p.Content.ImportParams(); err != nil {
		return p, params, false, err
	}
	if sum := sha256.Sum256(q.Sealed); subtle.ConstantTimeCompare(sum[:], params.Sealed) != 1 {
		return p, params, false, &kms.Error{Kind: kms.Invalid, Msg: "this is not the sealed material that proposal " + p.ID + " is about",
			Fix: "send the file that was written when the proposal was opened, as it is"}
	}
	if p.Progress == state.Executed {
		return p, params, true, nil
	}
	if params.Node != e.node {
		return p, params, false, e.sealedToAnother(st, params.Node)
	}
	return p, params, false, mayCarryOut(st, p)
}

func (e *Engine) sealedToAnother(st *state.State, node string) error {
	n, ok := st.Node(node)
	if !ok {
		return kms.Errorf(kms.Conflict, "node %s, to which the material is sealed, is gone; seal it to another one and propose again", node)
	}
	return &kms.Error{Kind: kms.NotResident, Msg: "the material is sealed to node " + node + "; node " + e.node + " cannot open it", Fix: "send the request to " + n.API}
}

// mayCarryOut refuses a proposal that is not to be carried out now. The state machine
// decides it once more.
func mayCarryOut(st *state.State, p state.Proposal) error {
	v, err := proposalView(st, p)
	if err != nil {
		return err
	}
	switch v.Progress {
	case string(state.Authorised):
		return nil
	case string(state.Open):
		return kms.Errorf(kms.NeedsApproval, "proposal %s %s", p.ID, v.Summary)
	case state.Expired:
		return kms.Errorf(kms.Expired, "proposal %s has expired; open a new one", p.ID)
	}
	return kms.Errorf(kms.Conflict, "proposal %s is %s", p.ID, v.Summary)
}

// importKey opens the material, wraps it and brings the key.
func (e *Engine) importKey(ctx context.Context, rq *request, st *state.State, p state.Proposal, params approval.ImportParams, sealed []byte) error {
	ring, key, ok := keyTarget(p.Content.Target)
	if !ok {
		return kms.Errorf(kms.Internal, "proposal %s has no key as target", p.ID)
	}
	kr, ok := st.Keyring(ring)
	if !ok {
		return noKeyring(ring)
	}
	info, aad := approval.ImportBinding(st.Cluster(), ring, key, e.node, params.Purpose, params.Algorithm)
	defer e.cfg.Cache.Scrub()
	material, public, err := e.cfg.Root.OpenImport(ctx, info, aad, sealed, params.Algorithm)
	if err != nil {
		return err
	}
	defer material.Destroy()
	if subtle.ConstantTimeCompare(public, params.PublicKey) != 1 {
		return kms.Errorf(kms.Invalid, "the material has another public key than proposal %s says", p.ID)
	}
	cmd := state.CreateKey{Keyring: ring, Name: key, Purpose: params.Purpose, Algorithm: params.Algorithm, RotationPeriod: params.RotationPeriod, KEK: kr.KEK}
	var id kms.KeyID
	_, _ = rand.Read(id[:])
	cmd.ID = id[:]
	v, err := e.importedVersion(ctx, st, kr, keyring.KeyBinding{
		Cluster: st.Cluster(), Keyring: ring, KEK: kr.KEK, KeyID: id, Version: 1, Algorithm: cmd.Algorithm, Purpose: cmd.Purpose,
	}, material, public)
	if err != nil {
		return err
	}
	cmd.Wrapped, cmd.Copies, cmd.Generated, cmd.PublicKey, cmd.Checks = v.wrapped, v.copies, v.generated, v.public, v.checks
	_, err = e.submit(ctx, attempt{expect: p.Content.Revision}, state.ImportKey{Proposal: p.ID, Key: cmd})
	rq.written = rq.written || err == nil || kms.KindOf(err) == kms.Unknown
	return err
}

// importedVersion wraps material from outside as newVersion does what it generates.
func (e *Engine) importedVersion(ctx context.Context, st *state.State, kr state.Keyring, b keyring.KeyBinding, material *secret.Bytes, public []byte) (v newMaterial, err error) {
	if kr.Protection == kms.Hardware {
		nodes := st.ResidentNodes(kr.Name)
		made, err := e.cfg.Root.ImportVersion(e.node, e.cfg.Importers, b, residents(nodes), material, public)
		if err != nil {
			return v, err
		}
		return deviceVersion(ctx, made, b, nodes, nodes)
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
	v.public = public
	v.wrapped, err = keyring.WrapMaterial(kek, b, material)
	return v, err
}
