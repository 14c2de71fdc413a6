package approval

import (
	"crypto/ecdh"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/pqc"
)

// Limits of a hardware root, in bytes.
const (
	MaxRootKey     = 4 << 10  // of each public key and of what others need to wrap for the device
	MaxAttestation = 64 << 10 // of the attestation document
)

// RootContext is the signature context (pqc.Verify) of the signature by which the
// holder of a new hardware root shows that the signing key is theirs.
const RootContext = "conclave/node-root/v1"

type rootMessage struct {
	Cluster string   `cbor:"cluster"`
	Node    string   `cbor:"node"`
	Number  uint32   `cbor:"number"`
	Root    NodeRoot `cbor:"root"`
}

// RootMessage returns what the signing key of a new hardware root signs in the
// context RootContext: the canonical encoding of the cluster, the node, the
// number that the root is to have, and the root itself.
func RootMessage(cluster, node string, number uint32, root NodeRoot) []byte {
	return canon.Marshal(rootMessage{cluster, node, number, root})
}

// VerifyPossession checks that the holder of the new signing key wants it to be
// the root of that number of the node. Errors: kms.BadSignature.
func (n NodeParams) VerifyPossession(cluster, node string, number uint32) error {
	m := RootMessage(cluster, node, number, n.Root)
	if err := pqc.Verify(pqc.SuiteID(n.Root.SigningSuite), n.Root.Signing, m, []byte(RootContext), n.Possession); err != nil {
		return &kms.Error{
			Kind: kms.BadSignature, Err: err,
			Msg: kms.Errorf(kms.BadSignature, "the new signing key has not signed that it is to be root number %d of node %s", number, node).Error(),
			Fix: "prepare the root again, for this cluster, node and number",
		}
	}
	return nil
}

// Validate checks that the keys are those of their suites and the texts and
// documents within their limits. What others need to wrap for the device comes
// with its kind or not at all. Errors: kms.Invalid.
func (r NodeRoot) Validate() error {
	if err := kms.CheckText("the description of the device", r.Device); err != nil {
		return err
	}
	if len(r.Agreement) > MaxRootKey {
		return kms.Errorf(kms.Invalid, "the agreement key is longer than %d bytes", MaxRootKey)
	}
	if _, err := pqc.ParsePublicKey(pqc.SuiteID(r.Suite), r.Agreement); err != nil {
		return kms.Wrap(kms.Invalid, err, "the agreement key is not one of suite "+pqc.SuiteID(r.Suite).String(), "")
	}
	var curve ecdh.Curve
	switch pqc.SuiteID(r.SigningSuite) {
	case pqc.ECDSAP256SHA256:
		curve = ecdh.P256()
	case pqc.ECDSAP384SHA384:
		curve = ecdh.P384()
	default:
		return kms.Errorf(kms.Invalid, "%v is no suite for a node's signing key", pqc.SuiteID(r.SigningSuite))
	}
	if len(r.Signing) > MaxRootKey {
		return kms.Errorf(kms.Invalid, "the signing key is longer than %d bytes", MaxRootKey)
	}
	if _, err := curve.NewPublicKey(r.Signing); err != nil {
		return kms.Wrap(kms.Invalid, err, "the signing key is not an uncompressed point of suite "+pqc.SuiteID(r.SigningSuite).String(), "")
	}
	return r.validateRest()
}

func (r NodeRoot) validateRest() error {
	if r.ImportKind != "" {
		if err := kms.CheckName("import kind", r.ImportKind); err != nil {
			return err
		}
	}
	switch {
	case (r.ImportKind == "") != (len(r.Import) == 0):
		return kms.Errorf(kms.Invalid, "the import key comes with its kind, or neither does")
	case len(r.Import) > MaxRootKey:
		return kms.Errorf(kms.Invalid, "the import key is longer than %d bytes", MaxRootKey)
	case len(r.Attestation) > MaxAttestation:
		return kms.Errorf(kms.Invalid, "the attestation has %d bytes; the limit is %d", len(r.Attestation), MaxAttestation)
	}
	return nil
}

// HasRoot reports whether the change brings a hardware root.
func (n NodeParams) HasRoot() bool { return n.Change == NodeReplaceRoot || n.Change == NodeJoin }

// validateNode checks the parameters of the action node.
func (p Proposal) validateNode() error {
	params, err := p.NodeParams()
	if err != nil {
		return err
	}
	return params.Validate()
}

// Validate checks the shape of the parameters: what the change has is there and well
// formed, and nothing else is. Errors: kms.Invalid.
func (n NodeParams) Validate() error {
	switch n.Change {
	case NodeReplaceRoot, NodeJoin, NodePromote, NodeRemove:
	default:
		return kms.Errorf(kms.Invalid, "the change %q of a node is none of %s, %s, %s, %s", n.Change, NodeReplaceRoot, NodeJoin, NodePromote, NodeRemove)
	}
	join := n.Change == NodeJoin
	switch {
	case join && (n.Site == "" || n.Address == ""):
		return kms.Errorf(kms.Invalid, "a node that joins needs its site and the address at which other nodes reach it")
	case !join && (n.Site != "" || n.Address != "" || n.API != ""):
		return kms.Errorf(kms.Invalid, "only a node that joins brings its site and addresses")
	case n.Change == NodePromote && n.Leave:
		return kms.Errorf(kms.Invalid, "a promotion leaves nothing behind")
	}
	if join {
		if err := kms.CheckName("site", n.Site); err != nil {
			return err
		}
	}
	if !n.HasRoot() {
		if !n.Root.empty() || len(n.Possession) != 0 {
			return kms.Errorf(kms.Invalid, "the change %q of a node brings no hardware root", n.Change)
		}
		return nil
	}
	if err := n.Root.Validate(); err != nil {
		return err
	}
	s, ok := pqc.Lookup(pqc.SuiteID(n.Root.SigningSuite))
	if !ok || len(n.Possession) != s.SignatureSize {
		return kms.Errorf(kms.Invalid, "the proof of possession is no signature of suite %v", pqc.SuiteID(n.Root.SigningSuite))
	}
	return nil
}

func (r NodeRoot) empty() bool {
	return r.Suite == 0 && r.SigningSuite == 0 && r.Device == "" && r.ImportKind == "" &&
		len(r.Agreement)+len(r.Signing)+len(r.Import)+len(r.Attestation) == 0
}
