package recovery

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
)

// Occasion is what a ceremony is about.
type Occasion struct {
	Cluster  string // kms.ClusterID
	Name     string // of the recovery key
	Number   uint64
	Params   approval.RecoveryParams
	Roots    []Root // the next hardware roots that are to get the keys
	Reason   string
	Created  time.Time
	Lifetime time.Duration
}

// Root is a node's next hardware root.
type Root struct {
	Number uint32
	keyring.Recipient
}

// Lost is a KEK version with its copies for the recovery key and the commitments to its
// check values.
type Lost struct {
	Keyring string
	Version uint32
	Copies  [][]byte
	Checks  map[string][]byte // by node, hashes
}

// Restored is a KEK version sealed to a next root.
type Restored struct {
	Node      string `cbor:"node" json:"node"`
	Root      uint32 `cbor:"root" json:"root"`
	Keyring   string `cbor:"keyring" json:"keyring"`
	Version   uint32 `cbor:"version" json:"version"`
	Sealed    []byte `cbor:"sealed" json:"sealed"`
	Signature []byte `cbor:"signature" json:"signature"` // by the ceremony's key over approval.RestoredMessage
}

// Coordinator holds a ceremony's keys and shares in locked memory, from Begin to
// Destroy. It is for one goroutine.
type Coordinator struct {
	occasion Occasion
	document approval.Ceremony
	bytes    []byte
	kem      *pqc.SoftwareKey
	signer   *pqc.HybridKey
	given    []approval.Contribution
	shares   []Share
}

// Begin makes the keys of a ceremony and its document. Errors: kms.Invalid, kms.Internal.
func Begin(o Occasion) (*Coordinator, error) {
	kem, err := pqc.GenerateKey(pqc.CustodianKEM)
	if err != nil {
		return nil, noMemory(err)
	}
	signer, err := pqc.GenerateHybrid(nil)
	if err != nil {
		kem.Destroy()
		return nil, noMemory(err)
	}
	c := &Coordinator{occasion: o, kem: kem, signer: signer}
	c.document = approval.Ceremony{
		Domain: approval.CeremonyDomain, Cluster: o.Cluster, Recovery: o.Name, Number: o.Number, Nonce: make([]byte, approval.NonceSize),
		Created: o.Created.UnixMilli(), Expires: o.Created.Add(o.Lifetime).UnixMilli(), Reason: o.Reason,
		Suite: uint16(kem.Suite()), KEM: kem.PublicKey().Bytes(), Signing: signer.PublicKey(),
	}
	_, _ = rand.Read(c.document.Nonce)
	for _, r := range o.Roots {
		sum := sha256.Sum256(r.PublicKey)
		c.document.Recipients = append(c.document.Recipients, approval.CeremonyRecipient{Node: r.Node, Root: r.Number, Agreement: sum[:]})
	}
	slices.SortFunc(c.document.Recipients, func(a, b approval.CeremonyRecipient) int { return strings.Compare(a.Node, b.Node) })
	if err := c.document.Validate(); err != nil {
		c.Destroy()
		return nil, err
	}
	c.bytes = c.document.Marshal()
	return c, nil
}

// Document returns the ceremony's exact bytes, which custodians sign.
func (c *Coordinator) Document() []byte { return bytes.Clone(c.bytes) }

// Destroy wipes the keys and the shares. It may be called more than once.
func (c *Coordinator) Destroy() {
	c.kem.Destroy()
	c.signer.Destroy()
	DestroyShares(c.shares)
	c.shares = nil
}

func contributionAAD(custodian string) []byte { return []byte("conclave/contribution/1/" + custodian) }

// Contribute opens a custodian's share and seals it to the ceremony's key, bound to the
// ceremony's exact bytes, which it signs with the sealed share. What the ceremony is for
// is for the custodian to judge before. Errors: kms.Invalid, kms.Expired, kms.NotFound,
// kms.OpenFailed.
func Contribute(document []byte, p approval.RecoveryParams, custodian string, key *pqc.HybridKey, now time.Time) (approval.Contribution, error) {
	var out approval.Contribution
	doc, err := approval.ParseCeremony(document)
	if err != nil {
		return out, err
	}
	if now.UnixMilli() >= doc.Expires {
		return out, kms.Errorf(kms.Expired, "the ceremony has expired; begin another one")
	}
	share, err := OpenShare(p, custodian, key)
	if err != nil {
		return out, err
	}
	defer share.Destroy()
	pub, err := pqc.ParsePublicKey(pqc.SuiteID(doc.Suite), doc.KEM)
	if err != nil {
		return out, kms.Wrap(kms.Invalid, err, "the ceremony's key is not valid", "")
	}
	out = approval.Contribution{Ceremony: doc.ID(), Custodian: custodian, Credential: pqc.Fingerprint(key.PublicKey())}
	out.Sealed, err = pub.Seal(document, contributionAAD(custodian), share.Reveal())
	runtime.KeepAlive(share)
	if err != nil {
		return out, kms.Wrap(kms.Internal, err, "the share cannot be sealed to the ceremony's key", "")
	}
	out.Signature, err = key.Sign(approval.ContributionMessage(document, custodian, out.Consent().Share), []byte(approval.ContributionContext))
	if err != nil {
		return out, kms.Wrap(kms.Internal, err, "the contribution cannot be signed", "")
	}
	return out, nil
}

// Add takes a contribution: its signature must be of custodian who, the record in force,
// and its share the one that was committed to. Errors: kms.Exists for a second one of a
// custodian, kms.BadSignature, kms.Denied, kms.NotFound, kms.OpenFailed.
func (c *Coordinator) Add(x approval.Contribution, who approval.Custodian) error {
	at, ok := c.occasion.Params.Holder(x.Custodian)
	switch {
	case !ok:
		return kms.Errorf(kms.NotFound, "custodian %q holds no share of this recovery key", x.Custodian)
	case x.Ceremony != c.document.ID():
		return kms.Errorf(kms.Invalid, "the contribution of custodian %s is to another ceremony", x.Custodian)
	case slices.ContainsFunc(c.given, func(g approval.Contribution) bool { return g.Custodian == x.Custodian }):
		return kms.Errorf(kms.Exists, "custodian %s has contributed", x.Custodian)
	}
	if err := x.Consent().Verify(who, c.bytes); err != nil {
		return err
	}
	share, err := openShare(c.occasion.Params, at, c.kem.PrivateKey, c.bytes, contributionAAD(x.Custodian), x.Sealed)
	if err != nil {
		return err
	}
	c.given = append(c.given, x)
	c.shares = append(c.shares, Share{at, share})
	return nil
}

// Missing says what the ceremony still takes, empty when it has enough.
func (c *Coordinator) Missing() string {
	var given []string
	for _, g := range c.given {
		given = append(given, g.Custodian)
	}
	return missing(c.occasion.Params, given)
}

// missing says how far the shares of custodians, each of whom holds one, reach; "" if they
// suffice.
func missing(p approval.RecoveryParams, given []string) string {
	var sites []string
	for _, id := range given {
		at, _ := p.Holder(id)
		sites = append(sites, p.Holders[at].Site)
	}
	slices.Sort(sites)
	n := len(slices.Compact(sites))
	if len(given) >= int(p.Threshold) && n >= int(p.Sites) {
		return ""
	}
	return fmt.Sprintf("%d of %d shares, from %d of %d sites", len(given), p.Threshold, n, p.Sites)
}

// key puts the recovery key together from the shares at hand. It does not count them:
// what too few shares give is not the key, which its public half tells.
func (c *Coordinator) key() (*pqc.SoftwareKey, error) {
	p := c.occasion.Params
	seed, err := scheme(p).Combine(c.shares)
	if err != nil {
		return nil, err
	}
	defer seed.Destroy()
	key, err := pqc.NewSoftwareKey(pqc.SuiteID(p.Suite), seed)
	if err != nil {
		return nil, kms.Wrap(kms.OpenFailed, kms.ErrOpen, notTheKey, "")
	}
	if !bytes.Equal(key.PublicKey().Bytes(), p.PublicKey) {
		key.Destroy()
		return nil, kms.Wrap(kms.OpenFailed, kms.ErrOpen, notTheKey, "")
	}
	return key, nil
}

const notTheKey = "the shares do not give the recovery key: they are too few, of too few sites, or were dealt wrong"

// Restore puts the recovery key together, opens the lost KEK versions and seals each to
// every root, signed with the ceremony's key. Of several copies of a version it takes
// the one that agrees with what was committed to. Errors: kms.OpenFailed.
func (c *Coordinator) Restore(lost []Lost) ([]Restored, error) {
	key, err := c.key()
	if err != nil {
		return nil, err
	}
	defer key.Destroy()
	var out []Restored
	for _, l := range lost {
		for _, r := range c.occasion.Roots {
			x, err := c.restore(key, l, r)
			if err != nil {
				return nil, err
			}
			out = append(out, x)
		}
	}
	return out, nil
}

func (c *Coordinator) restore(key *pqc.SoftwareKey, l Lost, to Root) (Restored, error) {
	b := keyring.KEKBinding{Cluster: c.occasion.Cluster, Keyring: l.Keyring, Version: l.Version, Node: approval.RecoveryRecipient(c.occasion.Name), Protection: kms.Software}
	for _, sealed := range l.Copies {
		kek, err := keyring.OpenRecoveryKEK(key.PrivateKey, b, sealed)
		if err != nil || !c.agrees(kek, l, to.Node) {
			kek.Destroy()
			continue
		}
		b.Node = ""
		copies, err := keyring.SealKEK([]keyring.Recipient{to.Recipient}, b, kek)
		kek.Destroy()
		if err != nil {
			return Restored{}, err
		}
		x := Restored{Node: to.Node, Root: to.Number, Keyring: l.Keyring, Version: l.Version, Sealed: copies[0].Sealed}
		x.Signature, err = c.signer.Sign(approval.RestoredMessage(c.bytes, x.Node, x.Root, x.Keyring, x.Version, x.Sealed), []byte(approval.RestoredContext))
		if err != nil {
			return Restored{}, kms.Wrap(kms.Internal, err, "what came out of the ceremony cannot be signed", "")
		}
		return x, nil
	}
	return Restored{}, kms.Wrap(kms.OpenFailed, kms.ErrOpen, fmt.Sprintf("none of the %d copies of KEK version %d of keyring %s for the recovery key is good", len(l.Copies), l.Version, l.Keyring), "")
}

// agrees holds a KEK against the commitment to the node's check value, or where the
// node has none against any: the node itself checks again before it adopts.
func (c *Coordinator) agrees(kek *secret.Bytes, l Lost, node string) bool {
	if hash, ok := l.Checks[node]; ok {
		return keyring.IsKEK(kek, c.occasion.Cluster, l.Keyring, l.Version, node, hash)
	}
	for other, hash := range l.Checks {
		if keyring.IsKEK(kek, c.occasion.Cluster, l.Keyring, l.Version, other, hash) {
			return true
		}
	}
	return false
}
