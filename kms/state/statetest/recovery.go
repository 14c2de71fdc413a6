package statetest

import (
	"crypto/sha256"
	"slices"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/pqc"
)

// RecoveryParams returns a recovery key of which the custodians named have shares.
func (w *World) RecoveryParams(residency []string, threshold, sites uint32, custodians ...string) approval.RecoveryParams {
	w.t.Helper()
	key, err := pqc.GenerateKey(pqc.CustodianKEM)
	if err != nil {
		w.t.Fatal(err)
	}
	defer key.Destroy()
	w.count++
	p := approval.RecoveryParams{
		Residency: residency, Suite: uint16(pqc.CustodianKEM), PublicKey: key.PublicKey().Bytes(), Nonce: hash("recovery", w.count)[:approval.NonceSize],
		Threshold: threshold, Sites: sites,
	}
	slices.Sort(custodians)
	for _, id := range custodians {
		own := w.Custodian(id)
		kem, err := own.KEMKey()
		if err != nil {
			w.t.Fatal(err)
		}
		pub := kem.PublicKey().Bytes()
		kem.Destroy()
		sig, err := own.Sign(approval.RecoveryCard(w.State().Cluster(), id, uint16(pqc.CustodianKEM), pub), []byte(approval.RecoveryContext))
		if err != nil {
			w.t.Fatal(err)
		}
		site, _, _ := strings.Cut(id, "-")
		p.Holders = append(p.Holders, approval.RecoveryHolder{
			Custodian: id, Site: site, Suite: uint16(pqc.CustodianKEM), KEM: pub,
			Credential: Record(id, site, 0, own).Credentials[0].ID, Possession: sig,
			Sealed: hash("share", w.count, id), Commitment: hash("commitment", w.count, id),
		})
	}
	return p
}

// SetRecovery sets a recovery key.
func (w *World) SetRecovery(name string, p approval.RecoveryParams) string {
	w.t.Helper()
	return w.Carry(kms.ActionRecoveryKey, approval.RecoveryTarget(name), p)
}

// SealRecoveryCommand returns the command by which a node gives its site's copy.
func (w *World) SealRecoveryCommand(node string, p state.Pending) state.SealRecovery {
	k, _ := w.State().RecoveryFor(p.Keyring)
	return state.SealRecovery{Keyring: p.Keyring, Version: p.Version, Recovery: k.Name, Number: k.Number, Sealed: hash("recovery", p.Keyring, p.Version, k.Name, k.Number, node)}
}

// SealRecovery gives every copy for recovery keys that a site owes.
func (w *World) SealRecovery() {
	w.t.Helper()
	for _, n := range w.State().Nodes() {
		for _, p := range w.State().Unrecoverable(n.ID) {
			w.Do(n.ID, w.SealRecoveryCommand(n.ID, p))
		}
	}
}

// Ceremony is a ceremony's document with the key that signs what comes out.
type Ceremony struct {
	Document approval.Ceremony
	key      *pqc.HybridKey
}

// NewCeremony begins a ceremony for the next roots of the nodes.
func (w *World) NewCeremony(name string, nodes ...string) *Ceremony {
	w.t.Helper()
	kem, err := pqc.GenerateKey(pqc.CustodianKEM)
	if err != nil {
		w.t.Fatal(err)
	}
	defer kem.Destroy()
	key, err := pqc.GenerateHybrid(nil)
	if err != nil {
		w.t.Fatal(err)
	}
	w.count++
	s := w.State()
	k, _ := s.RecoveryKeyOf(name)
	c := approval.Ceremony{
		Domain: approval.CeremonyDomain, Cluster: s.Cluster(), Recovery: name, Number: k.Number, Nonce: hash("ceremony", w.count)[:approval.NonceSize],
		Created: w.Now(), Expires: w.Now() + time.Hour.Milliseconds(), Reason: "a test",
		Suite: uint16(pqc.CustodianKEM), KEM: kem.PublicKey().Bytes(), Signing: key.PublicKey(),
	}
	slices.Sort(nodes)
	for _, id := range nodes {
		next, _ := s.Replacement(id)
		sum := sha256.Sum256(next.New.Agreement)
		c.Recipients = append(c.Recipients, approval.CeremonyRecipient{Node: id, Root: next.Root, Agreement: sum[:]})
	}
	return &Ceremony{c, key}
}

// RestoreCommand returns the command with what the ceremony brought back, to which the
// custodians consented.
func (w *World) RestoreCommand(c *Ceremony, node string, p state.Pending, custodians ...string) state.RestoreCopy {
	w.t.Helper()
	doc := c.Document.Marshal()
	next, _ := w.State().Replacement(node)
	cmd := state.RestoreCopy{Ceremony: doc, Node: node, Root: next.Root, Keyring: p.Keyring, Version: p.Version, Sealed: hash("restored", node, p.Keyring, p.Version)}
	slices.Sort(custodians)
	for _, id := range custodians {
		share := sha256.Sum256([]byte(id))
		key := w.Custodian(id)
		sig, err := key.Sign(approval.ContributionMessage(doc, id, share[:]), []byte(approval.ContributionContext))
		if err != nil {
			w.t.Fatal(err)
		}
		cmd.Consents = append(cmd.Consents, approval.Consent{Custodian: id, Credential: Record(id, "", 0, key).Credentials[0].ID, Share: share[:], Signature: sig})
	}
	sig, err := c.key.Sign(approval.RestoredMessage(doc, node, cmd.Root, p.Keyring, p.Version, cmd.Sealed), []byte(approval.RestoredContext))
	if err != nil {
		w.t.Fatal(err)
	}
	cmd.Signature = sig
	return cmd
}
