package recovery

import (
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/pqc"
)

// TranscriptContext is the signature context of a ceremony's transcript.
const TranscriptContext = "conclave/transcript/v1"

// Transcript is the record of a ceremony: its document, who contributed, and what came
// out, signed with the ceremony's key. It holds nothing that opens a key.
type Transcript struct {
	Ceremony      []byte                  `cbor:"ceremony" json:"ceremony"`
	Contributions []approval.Contribution `cbor:"contributions" json:"contributions"` // sorted by custodian
	Restored      []Restored              `cbor:"restored" json:"restored"`
	Signature     []byte                  `cbor:"signature" json:"signature"` // over the encoding without it
}

func (t Transcript) message() []byte {
	t.Signature = nil
	return canon.Marshal(t)
}

// Transcript signs the record of the ceremony.
func (c *Coordinator) Transcript(restored []Restored) (Transcript, error) {
	t := Transcript{Ceremony: c.Document(), Contributions: slices.Clone(c.given), Restored: restored}
	slices.SortFunc(t.Contributions, func(a, b approval.Contribution) int { return strings.Compare(a.Custodian, b.Custodian) })
	var err error
	if t.Signature, err = c.signer.Sign(t.message(), []byte(TranscriptContext)); err != nil {
		return t, kms.Wrap(kms.Internal, err, "the transcript cannot be signed", "")
	}
	return t, nil
}

// Records are what a transcript is held against: a cluster's word, or that of a verified
// backup of it.
type Records struct {
	Cluster   string
	Key       func(name string, number uint64) (approval.RecoveryParams, bool)
	Custodian func(id string) (approval.Custodian, bool)
}

// Verify checks that the ceremony was one of the cluster's, that as many custodians of as
// many sites as the recovery key takes contributed to it, and all signatures: those of the
// custodians and those of the ceremony's key, which the custodians signed. Errors:
// kms.BadSignature, kms.Invalid, kms.Denied, kms.Conflict, kms.NotFound, kms.NeedsApproval.
func (t Transcript) Verify(r Records) (approval.Ceremony, error) {
	doc, err := approval.ParseCeremony(t.Ceremony)
	if err != nil {
		return doc, err
	}
	if err := t.verifyContributions(doc, r); err != nil {
		return doc, err
	}
	for _, x := range t.Restored {
		m := approval.RestoredMessage(t.Ceremony, x.Node, x.Root, x.Keyring, x.Version, x.Sealed)
		if err := pqc.Verify(pqc.MLDSA65Ed25519, doc.Signing, m, []byte(approval.RestoredContext), x.Signature); err != nil {
			return doc, kms.Wrap(kms.BadSignature, err, "the ceremony's key has not signed the copy for node "+x.Node, "")
		}
	}
	if err := pqc.Verify(pqc.MLDSA65Ed25519, doc.Signing, t.message(), []byte(TranscriptContext), t.Signature); err != nil {
		return doc, kms.Wrap(kms.BadSignature, err, "the ceremony's key has not signed the transcript", "")
	}
	return doc, nil
}

func (t Transcript) verifyContributions(doc approval.Ceremony, r Records) error {
	if doc.Cluster != r.Cluster {
		return kms.Errorf(kms.Conflict, "the ceremony is of cluster %s, not of %s", doc.Cluster, r.Cluster)
	}
	p, ok := r.Key(doc.Recovery, doc.Number)
	if !ok {
		return kms.Errorf(kms.NotFound, "there is no recovery key %s number %d", doc.Recovery, doc.Number)
	}
	last := ""
	var given []string
	for _, x := range t.Contributions {
		who, ok := r.Custodian(x.Custodian)
		if _, holds := p.Holder(x.Custodian); !ok || !holds || x.Custodian <= last {
			return kms.Errorf(kms.Denied, "there is no custodian %q with a share, or two contributions of one", x.Custodian)
		}
		last = x.Custodian
		given = append(given, x.Custodian)
		if err := x.Consent().Verify(who, t.Ceremony); err != nil {
			return err
		}
	}
	if m := missing(p, given); m != "" {
		return kms.Errorf(kms.NeedsApproval, "the ceremony had %s", m)
	}
	return nil
}
