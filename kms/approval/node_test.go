package approval

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
)

// sampleKey is a fixed key on P-256: the scalar is the number.
func sampleKey(scalar byte) *ecdsa.PrivateKey {
	k, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), append(make([]byte, 31), scalar))
	if err != nil {
		panic(err) // constant
	}
	return k
}

// sampleRoot is a fixed hardware root.
func sampleRoot() NodeRoot {
	seed, err := secret.Copy(bytes.Repeat([]byte{7}, pqc.MLKEMSeedSize))
	if err != nil {
		panic(err) // no memory
	}
	defer seed.Destroy()
	half, err := ecdh.P256().NewPrivateKey(append(make([]byte, 31), 3))
	if err != nil {
		panic(err) // constant
	}
	k, err := pqc.NewPrivateKey(pqc.MLKEM768P256, seed, half)
	if err != nil {
		panic(err) // constant
	}
	signing, err := sampleKey(5).PublicKey.Bytes()
	if err != nil {
		panic(err) // constant
	}
	return NodeRoot{
		Suite: uint16(pqc.MLKEM768P256), Agreement: k.PublicKey().Bytes(), SigningSuite: uint16(pqc.ECDSAP256SHA256), Signing: signing,
		Device: "a new token", ImportKind: "pkcs11-ecdh-kwp", Import: half.PublicKey().Bytes(),
	}
}

func TestNodeRootRefused(t *testing.T) {
	if err := sampleRoot().Validate(); err != nil {
		t.Fatal(err)
	}
	bare := sampleRoot()
	bare.Device, bare.ImportKind, bare.Import = "", "", nil
	if err := bare.Validate(); err != nil {
		t.Errorf("a device that takes no keys: %v", err)
	}
	for name, change := range map[string]func(*NodeRoot){
		"suite":                   func(r *NodeRoot) { r.Suite = uint16(pqc.MLKEM1024P384) },
		"unknown suite":           func(r *NodeRoot) { r.Suite = 99 },
		"no agreement key":        func(r *NodeRoot) { r.Agreement = nil },
		"agreement key":           func(r *NodeRoot) { r.Agreement = r.Agreement[:len(r.Agreement)-1] },
		"long agreement key":      func(r *NodeRoot) { r.Agreement = make([]byte, MaxRootKey+1) },
		"signing suite":           func(r *NodeRoot) { r.SigningSuite = uint16(pqc.ECDSAP384SHA384) },
		"signing suite of none":   func(r *NodeRoot) { r.SigningSuite = uint16(pqc.Ed25519) },
		"no signing key":          func(r *NodeRoot) { r.Signing = nil },
		"no point":                func(r *NodeRoot) { r.Signing[9] ^= 1 },
		"compressed point":        func(r *NodeRoot) { r.Signing = append([]byte{2}, r.Signing[1:33]...) },
		"long signing key":        func(r *NodeRoot) { r.Signing = make([]byte, MaxRootKey+1) },
		"device":                  func(r *NodeRoot) { r.Device = "token\x1b[2K" },
		"long device":             func(r *NodeRoot) { r.Device = strings.Repeat("x", kms.MaxText+1) },
		"import kind":             func(r *NodeRoot) { r.ImportKind = "PKCS 11" },
		"kind without import":     func(r *NodeRoot) { r.Import = nil },
		"import without kind":     func(r *NodeRoot) { r.ImportKind = "" },
		"long import":             func(r *NodeRoot) { r.Import = make([]byte, MaxRootKey+1) },
		"long attestation":        func(r *NodeRoot) { r.Attestation = make([]byte, MaxAttestation+1) },
		"a control in the device": func(r *NodeRoot) { r.Device = "\u202e" },
	} {
		r := sampleRoot()
		change(&r)
		if err := r.Validate(); !errors.Is(err, kms.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
		p := sampleProposal(kms.ActionNode)
		p.Parameters = canon.Marshal(NodeParams{Change: NodeReplaceRoot, Root: r, Possession: make([]byte, 64)})
		if err := p.Validate(); !errors.Is(err, kms.Invalid) {
			t.Errorf("a proposal with %s: %v", name, err)
		}
	}
}

func TestNodeProposalRefused(t *testing.T) {
	for name, change := range map[string]func(*Proposal, *NodeParams){
		"no possession":    func(_ *Proposal, n *NodeParams) { n.Possession = nil },
		"short possession": func(_ *Proposal, n *NodeParams) { n.Possession = n.Possession[1:] },
		"long possession":  func(_ *Proposal, n *NodeParams) { n.Possession = append(n.Possession, 0) },
		"target of a key":  func(p *Proposal, _ *NodeParams) { p.Target = KeyTarget("coalition", "orders") },
		"no node":          func(p *Proposal, _ *NodeParams) { p.Target = NodeTarget("") },
		"two nodes":        func(p *Proposal, _ *NodeParams) { p.Target = NodeTarget("fr-1/de-1") },
	} {
		p := sampleProposal(kms.ActionNode)
		n, err := p.NodeParams()
		if err != nil {
			t.Fatal(err)
		}
		change(&p, &n)
		p.Parameters = canon.Marshal(n)
		if err := p.Validate(); !errors.Is(err, kms.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	p := sampleProposal(kms.ActionNode)
	p.Parameters = sampleProposal(kms.ActionCustodian).Parameters
	if err := p.Validate(); !errors.Is(err, kms.Invalid) {
		t.Errorf("parameters of another action: %v", err)
	}
}

// TestPossession: the proof is for one cluster, node, number and root.
func TestPossession(t *testing.T) {
	const cluster = "00112233445566778899aabbccddeeff"
	root := sampleRoot()
	digest, err := pqc.Digest(pqc.ECDSAP256SHA256, RootMessage(cluster, "fr-1", 2, root), []byte(RootContext))
	if err != nil {
		t.Fatal(err)
	}
	r, s, err := ecdsa.Sign(rand.Reader, sampleKey(5), digest)
	if err != nil {
		t.Fatal(err)
	}
	n := NodeParams{Root: root, Possession: append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)}
	if err := n.VerifyPossession(cluster, "fr-1", 2); err != nil {
		t.Fatal(err)
	}
	other := n
	other.Root.Device = "another"
	stranger := n
	stranger.Root.Signing, _ = sampleKey(6).PublicKey.Bytes()
	for name, err := range map[string]error{
		"cluster": n.VerifyPossession(strings.Repeat("0", 32), "fr-1", 2), "node": n.VerifyPossession(cluster, "fr-2", 2),
		"number": n.VerifyPossession(cluster, "fr-1", 3), "root": other.VerifyPossession(cluster, "fr-1", 2),
		"key": stranger.VerifyPossession(cluster, "fr-1", 2), "none": NodeParams{Root: root}.VerifyPossession(cluster, "fr-1", 2),
	} {
		if !errors.Is(err, kms.BadSignature) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
