package recovery

import (
	"bytes"
	"crypto/rand"
	"runtime"
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
)

const (
	shareInfo = "conclave/recovery/1/share/info"
	shareAAD  = "conclave/recovery/1/share/aad"
)

// NewCard returns what a custodian hands to whoever makes a recovery key: the KEM key
// that goes with the signing key, signed with that. Errors: kms.Internal.
func NewCard(cluster, custodian, site string, key *pqc.HybridKey) (approval.RecoveryHolder, error) {
	kem, err := key.KEMKey()
	if err != nil {
		return approval.RecoveryHolder{}, kms.Wrap(kms.Internal, err, "the KEM key of custodian "+custodian+" cannot be derived", "")
	}
	defer kem.Destroy()
	h := approval.RecoveryHolder{Custodian: custodian, Site: site, Suite: uint16(kem.Suite()), KEM: kem.PublicKey().Bytes(), Credential: pqc.Fingerprint(key.PublicKey())}
	h.Possession, err = key.Sign(approval.RecoveryCard(cluster, custodian, h.Suite, h.KEM), []byte(approval.RecoveryContext))
	if err != nil {
		return approval.RecoveryHolder{}, kms.Wrap(kms.Internal, err, "the card of custodian "+custodian+" cannot be signed", "")
	}
	return h, nil
}

// scheme returns who can put the key together.
func scheme(p approval.RecoveryParams) Scheme {
	return Scheme{Threshold: int(p.Threshold), Sites: int(p.Sites), Holders: p.HolderSites()}
}

// Deal makes a recovery key of a KEM suite for a residency and splits its 32-byte seed
// among the holders of the cards, any threshold of them from at least that many sites.
// The seed and the shares are in locked memory and wiped before it returns; who runs
// it has to be trusted with that. Errors: kms.Invalid, kms.Internal.
func Deal(residency []string, suite pqc.SuiteID, threshold, sites int, cards []approval.RecoveryHolder) (approval.RecoveryParams, error) {
	p := approval.RecoveryParams{
		Residency: slices.Sorted(slices.Values(residency)), Suite: uint16(suite), Nonce: make([]byte, approval.NonceSize),
		Threshold: uint32(max(threshold, 0)), Sites: uint32(max(sites, 0)), Holders: slices.Clone(cards),
	}
	slices.SortFunc(p.Holders, func(a, b approval.RecoveryHolder) int { return strings.Compare(a.Custodian, b.Custodian) })
	_, _ = rand.Read(p.Nonce)
	key, err := pqc.GenerateKey(suite)
	if err != nil {
		return p, kms.Wrap(kms.Invalid, err, "a recovery key of this suite cannot be made: "+err.Error(), "")
	}
	defer key.Destroy()
	p.PublicKey = key.PublicKey().Bytes()
	packed, err := key.Marshal() // suite, then seed
	if err != nil {
		return p, noMemory(err)
	}
	defer packed.Destroy()
	seed, err := secret.Copy(packed.Reveal()[2:])
	runtime.KeepAlive(packed)
	if err != nil {
		return p, noMemory(err)
	}
	defer seed.Destroy()
	shares, err := scheme(p).Split(seed, nil)
	if err != nil {
		return p, err
	}
	defer DestroyShares(shares)
	for i := range p.Holders {
		if err := sealShare(p, i, shares[i].Value); err != nil {
			return p, err
		}
	}
	return p, p.Validate()
}

func sealShare(p approval.RecoveryParams, i int, share *secret.Bytes) error {
	h := &p.Holders[i]
	pub, err := pqc.ParsePublicKey(pqc.SuiteID(h.Suite), h.KEM)
	if err != nil {
		return kms.Wrap(kms.Invalid, err, "the KEM key of custodian "+h.Custodian+" is not valid", "let the custodian make the card again")
	}
	h.Sealed, err = pub.Seal(p.ShareBinding(shareInfo, h.Custodian), p.ShareBinding(shareAAD, h.Custodian), share.Reveal())
	if err != nil {
		return kms.Wrap(kms.Internal, err, "the share of custodian "+h.Custodian+" cannot be sealed", "")
	}
	h.Commitment = p.Commit(h.Custodian, share.Reveal())
	runtime.KeepAlive(share)
	return nil
}

// OpenShare opens a custodian's share with the custodian's key and checks that it is
// the one that was committed to. The caller destroys it. Errors: kms.NotFound when the
// custodian holds none, kms.OpenFailed.
func OpenShare(p approval.RecoveryParams, custodian string, key *pqc.HybridKey) (*secret.Bytes, error) {
	at, ok := p.Holder(custodian)
	if !ok {
		return nil, kms.Errorf(kms.NotFound, "custodian %s holds no share of this recovery key", custodian)
	}
	kem, err := key.KEMKey()
	if err != nil {
		return nil, kms.Wrap(kms.Internal, err, "the KEM key of custodian "+custodian+" cannot be derived", "")
	}
	defer kem.Destroy()
	return openShare(p, at, kem.PrivateKey, p.ShareBinding(shareInfo, custodian), p.ShareBinding(shareAAD, custodian), p.Holders[at].Sealed)
}

func openShare(p approval.RecoveryParams, at int, key *pqc.PrivateKey, info, aad, sealed []byte) (*secret.Bytes, error) {
	h := p.Holders[at]
	b, err := key.Open(info, aad, sealed)
	if err != nil {
		return nil, kms.Wrap(kms.OpenFailed, kms.ErrOpen, "the share of custodian "+h.Custodian+" does not open: it is sealed to another key, or damaged", "use the key file that made the custodian's card")
	}
	share, err := secret.Move(b)
	if err != nil {
		return nil, noMemory(err)
	}
	if share.Len() != approval.RecoveryShare || !bytes.Equal(p.Commit(h.Custodian, share.Reveal()), h.Commitment) {
		share.Destroy()
		return nil, kms.Wrap(kms.OpenFailed, kms.ErrOpen, "the share of custodian "+h.Custodian+" is not the one that was committed to", "")
	}
	return share, nil
}
