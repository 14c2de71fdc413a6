package tpm

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
)

// MaxRecipients is for how many TPMs a key can be generated at once.
const MaxRecipients = orMost * orMost

// orMost is how many digests TPM2_PolicyOR takes.
const orMost = 8

// recipient is a TPM that a generated key goes to.
type recipient struct {
	public tpm2.TPMTPublic // of its storage key
	name   []byte
}

// Generates reports whether keys for TPMs of this kind can be generated in this
// one: HMAC keys and signing keys can.
func (d *Device) Generates() (hmac, signer bool) { return true, true }

// GenerateHMAC has the TPM generate a 32-byte key for HMAC-SHA-256, and duplicate
// it for each recipient: what ImportKey returns for it. The blobs, in the order of
// the recipients, are for their LoadHMAC; mac and unload are as of LoadHMAC. The key
// is never outside a TPM in the clear, and the TPM duplicates it to no other
// storage key than the recipients'. Errors: ErrInvalid for a recipient,
// ErrUnsupported where a recipient's keys are on another curve or there are more
// than MaxRecipients.
func (d *Device) GenerateHMAC(ctx context.Context, recipients [][]byte) (blobs [][]byte, mac func(ctx context.Context, message []byte) ([]byte, error), unload func(), err error) {
	g, err := d.generate(ctx, importHMAC, recipients)
	if err != nil {
		return nil, nil, nil, err
	}
	mac = func(ctx context.Context, message []byte) ([]byte, error) { return d.mac(ctx, g.key, message) }
	return g.blobs, mac, func() { d.unload(g.key) }, nil
}

// GenerateSigner is GenerateHMAC for an ECDSA key on P-256 or P-384, and returns its
// public half; sign is as of LoadSigner. A curve that the TPM lacks is
// ErrUnsupported.
func (d *Device) GenerateSigner(ctx context.Context, curve ecdh.Curve, recipients [][]byte) (blobs [][]byte, public *ecdsa.PublicKey, sign func(ctx context.Context, digest []byte) ([]byte, error), unload func(), err error) {
	kind, ok := signerType(curve)
	if !ok {
		return nil, nil, nil, nil, invalid("a signing key is on P-256 or P-384")
	}
	g, err := d.generate(ctx, kind, recipients)
	if err != nil {
		return nil, nil, nil, nil, err
	}
	on := kind.signer()
	raw, err := on.publicKey(&object{public: g.public})
	if err == nil {
		public, err = ecdsa.ParseUncompressedPublicKey(on.elliptic(), raw.Bytes())
	}
	if err != nil {
		d.unload(g.key)
		return nil, nil, nil, nil, err
	}
	sign = func(ctx context.Context, digest []byte) ([]byte, error) { return d.signWith(ctx, g.key, on, digest) }
	return g.blobs, public, sign, func() { d.unload(g.key) }, nil
}

// generatedKey is a fresh key: the blobs for the recipients and the TPM's own.
type generatedKey struct {
	blobs  [][]byte
	public tpm2.TPMTPublic
	key    *importedKey
}

func (d *Device) generate(ctx context.Context, kind importType, recipients [][]byte) (*generatedKey, error) {
	to, err := d.suite.parseRecipients(recipients)
	if err != nil {
		return nil, err
	}
	return do(ctx, d, call[*generatedKey]{op: "generate", fn: func(c *conn) (g *generatedKey, err error) {
		d.letGo(c) // the key, its duplicates' parent and two sessions need the room
		for range 8 {
			d.extend(c)
			if g, err = d.generateOnce(c, kind, to); !errors.Is(err, errShort) {
				break
			}
		}
		return g, err
	}})
}

// errShort: the TPM left out a leading zero byte, which one key in 256 has. The
// blob has fixed lengths, so another is made.
var errShort = unavailable("the TPM left out leading zeros")

func (s *suite) parseRecipients(recipients [][]byte) ([]recipient, error) {
	if len(recipients) == 0 {
		return nil, invalid("a key is generated for at least one recipient")
	}
	if len(recipients) > MaxRecipients {
		return nil, fmt.Errorf("tpm: %w: %d recipients, a TPM generates keys for %d", ErrUnsupported, len(recipients), MaxRecipients)
	}
	var out []recipient
	for _, b := range recipients {
		of, _, err := importTarget(b, nil)
		if err != nil {
			return nil, err
		}
		if of.curve != s.curve {
			return nil, fmt.Errorf("tpm: %w: a recipient has its keys on %s, this TPM on %s", ErrUnsupported, of.name, s.name)
		}
		pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](b)
		if err != nil {
			return nil, invalid("recipient: %v", err)
		}
		out = append(out, recipient{*pub, s.objectName(b)})
	}
	return out, nil
}

// generateOnce creates the key under our storage key, duplicates it, and gives our
// own copy the authorization value of the others.
func (d *Device) generateOnce(c *conn, kind importType, to []recipient) (*generatedKey, error) {
	names := namesOf(to)
	template := d.suite.generated(kind, names)
	g := &generatedKey{key: &importedKey{}}
	var obj *object
	err := d.withKeyAuth(c, encryptInOut(), func(s tpm2.Session) error {
		made, err := (tpm2.Create{
			ParentHandle: d.storage.auth(s),
			InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
				Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{}),
			}},
			InPublic: tpm2.New2B(template),
		}).Execute(c)
		if err != nil {
			return unsupported(err)
		}
		g.key.pub, g.key.private = made.OutPublic.Bytes(), made.OutPrivate.Buffer
		g.key.name = d.suite.objectName(g.key.pub)
		if !d.suite.importedPublic(kind, template, g.key.pub) {
			return errShort
		}
		obj, err = d.loadObject(c, s, g.key)
		return err
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		if c.err == nil {
			c.flush(obj.handle)
		}
	}()
	pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](g.key.pub)
	if err != nil {
		return nil, err
	}
	g.public = *pub
	for _, r := range to {
		b := &importBlob{version: generatedVersion, kind: kind, label: slices.Concat(names...), pub: g.key.pub}
		if err := d.duplicateFor(c, obj, r, names, b); err != nil {
			return nil, err
		}
		if _, ok := d.suite.parseImport(b.encode()); !ok {
			return nil, errShort
		}
		g.blobs = append(g.blobs, b.encode())
	}
	g.key.private, err = d.takeOver(c, obj)
	return g, err
}

// unsupported marks what a TPM cannot do at all.
func unsupported(err error) error {
	for _, rc := range []tpm2.TPMRC{tpm2.TPMRCCommandCode, tpm2.TPMRCCurve} {
		if errors.Is(err, rc) {
			return fmt.Errorf("tpm: %w: %w", ErrUnsupported, err)
		}
	}
	return err
}

// duplicateFor has the TPM wrap the key for a recipient's storage key.
func (d *Device) duplicateFor(c *conn, obj *object, r recipient, names [][]byte, b *importBlob) error {
	d.extend(c)
	parent, err := (tpm2.LoadExternal{InPublic: tpm2.New2B(r.public), Hierarchy: tpm2.TPMRHNull}).Execute(c)
	if err != nil {
		return unsupported(err)
	}
	defer func() {
		if c.err == nil {
			c.flush(parent.ObjectHandle)
		}
	}()
	if !bytes.Equal(parent.Name.Buffer, r.name) {
		return unavailable("the TPM loaded another recipient than asked for")
	}
	return d.withPolicySession(c, func(s tpm2.Session) error {
		if err := d.suite.mayDuplicate(c, s, obj.name.Buffer, r.name, names); err != nil {
			return unsupported(err)
		}
		rsp, err := (tpm2.Duplicate{
			ObjectHandle:    obj.auth(s),
			NewParentHandle: tpm2.NamedHandle{Handle: parent.ObjectHandle, Name: parent.Name},
			Symmetric:       tpm2.TPMTSymDef{Algorithm: tpm2.TPMAlgNull},
		}).Execute(c)
		if err != nil {
			return unsupported(err)
		}
		b.duplicate, b.point = bytes.Clone(rsp.Duplicate.Buffer), bytes.Clone(rsp.OutSymSeed.Buffer)
		return nil
	})
}

// generated is the template of a key that comes from a TPM: like an imported one,
// but its policy lets TPM2_Duplicate move it to the storage keys of these names.
func (s *suite) generated(kind importType, names [][]byte) tpm2.TPMTPublic {
	t := s.imported(kind, nil)
	t.ObjectAttributes.SensitiveDataOrigin = true
	_, top := s.duplication(names)
	t.AuthPolicy.Buffer = policyDigest(s.hash, tpm2.PolicyOr{PHashList: top})
	return t
}

// duplication is the policy of a generated key: a TPM2_PolicyOR over groups of up
// to eight, each a TPM2_PolicyOR over TPM2_PolicyDuplicationSelect of one name.
func (s *suite) duplication(names [][]byte) (groups []tpm2.TPMLDigest, top tpm2.TPMLDigest) {
	for group := range slices.Chunk(names, orMost) {
		var l tpm2.TPMLDigest
		for _, name := range group {
			l.Digests = append(l.Digests, tpm2.TPM2BDigest{Buffer: policyDigest(s.hash,
				tpm2.PolicyDuplicationSelect{NewParentName: tpm2.TPM2BName{Buffer: name}})})
		}
		l = atLeastTwo(l)
		groups = append(groups, l)
		top.Digests = append(top.Digests, tpm2.TPM2BDigest{Buffer: policyDigest(s.hash, tpm2.PolicyOr{PHashList: l})})
	}
	return groups, atLeastTwo(top)
}

// atLeastTwo repeats a lone digest: TPM2_PolicyOR takes no fewer than two.
func atLeastTwo(l tpm2.TPMLDigest) tpm2.TPMLDigest {
	if len(l.Digests) == 1 {
		l.Digests = append(l.Digests, l.Digests[0])
	}
	return l
}

// mayDuplicate satisfies the policy of a generated key for one recipient.
func (s *suite) mayDuplicate(c *conn, session tpm2.Session, object, parent []byte, names [][]byte) error {
	at := slices.IndexFunc(names, func(n []byte) bool { return bytes.Equal(n, parent) })
	groups, top := s.duplication(names)
	_, err := (tpm2.PolicyDuplicationSelect{
		PolicySession: session.Handle(), ObjectName: tpm2.TPM2BName{Buffer: object}, NewParentName: tpm2.TPM2BName{Buffer: parent},
	}).Execute(c)
	for _, l := range []tpm2.TPMLDigest{groups[at/orMost], top} {
		if err == nil {
			_, err = (tpm2.PolicyOr{PolicySession: session.Handle(), PHashList: l}).Execute(c)
		}
	}
	return err
}

// namesOf lists the names of recipients, each once, ascending.
func namesOf(to []recipient) [][]byte {
	var names [][]byte
	for _, r := range to {
		names = append(names, r.name)
	}
	slices.SortFunc(names, bytes.Compare)
	return slices.CompactFunc(names, bytes.Equal)
}

// parseNames is the inverse of joining namesOf.
func (s *suite) parseNames(b []byte) ([][]byte, bool) {
	n := 2 + s.digest
	if len(b) == 0 || len(b)%n != 0 || len(b)/n > MaxRecipients {
		return nil, false
	}
	names := slices.Collect(slices.Chunk(b, n))
	for i, name := range names {
		if !isName(name) || name[1] != byte(s.hash) || i > 0 && bytes.Compare(names[i-1], name) >= 0 {
			return nil, false
		}
	}
	return names, true
}
