package tpm

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/kms/secret"
)

// Names of trials on which conclusions rest.
const (
	nameHMAC   = "import, HMAC"
	nameSigner = "import, ECDSA "
)

// trial is something to be tried. run returns what it found.
type trial struct {
	name   string
	use    string
	needed bool
	run    func(*conn) (string, error)
}

func (p *prober) trials() []trial {
	return []trial{
		{"key generation", "the device keys", true, p.tryGenerate},
		{"salted session", "every command that carries a secret", true, p.trySession},
		{"ECDH", "opens sealed copies", true, p.tryECDH},
		{"ECDSA", "signs as the node", true, p.tryECDSA},
		{"sealing", "keeps the ML-KEM seed", true, p.trySeal},
		{"random numbers", "seeds and keys, XOR the system's", true, p.tryRandom},
		{nameHMAC, "encrypt and mac keys, level hardware", true, p.tryHMAC},
		{nameSigner + "P-256", "ecdsa-p256 keys, level hardware", false, p.trySigner(ecdh.P256())},
		{nameSigner + "P-384", "ecdsa-p384 keys, level hardware", false, p.trySigner(ecdh.P384())},
		{"certify and quote", "attestation", false, p.tryAttest},
		{"policy of registers", "device.pcrs", len(p.cfg.PCRs) > 0, p.tryPolicy},
	}
}

// primary makes a transient key in the null hierarchy with the empty authorization
// value. The caller flushes it.
func (c *conn) primary(template tpm2.TPMTPublic) (*object, error) {
	rsp, err := (tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHNull, InPublic: tpm2.New2B(template)}).Execute(c)
	if err != nil {
		return nil, err
	}
	o, err := c.readObject(rsp.ObjectHandle)
	if err != nil {
		c.flush(rsp.ObjectHandle)
	}
	return o, err
}

func noPassword() tpm2.Session { return tpm2.PasswordAuth(nil) }

func (p *prober) tryGenerate(c *conn) (string, error) {
	started := time.Now()
	for _, k := range []keyTemplate{{"storage", p.suite.storage()}, {"agreement", p.suite.agreement()}, {"signing", p.suite.signing()}} {
		o, err := c.primary(k.template)
		if err != nil {
			return "", fmt.Errorf("the %s key: %w", k.what, err)
		}
		c.flush(o.handle)
		if err := p.suite.checkKey(k.what+" key", o, k.template); err != nil {
			return "", err
		}
		c.deadline = time.Now().Add(p.cfg.CallTimeout)
	}
	return fmt.Sprintf("three keys on %s in %v", p.suite.name, time.Since(started).Round(time.Millisecond)), nil
}

func (p *prober) trySession(c *conn) (string, error) {
	o, err := c.primary(p.suite.storage())
	if err != nil {
		return "", err
	}
	defer c.flush(o.handle)
	return "salted by ECDH, parameters encrypted by AES-128-CFB", c.withSession(o, func(s tpm2.Session) error {
		_, err := (tpm2.GetRandom{BytesRequested: 16}).Execute(c, s)
		return err
	}, encryptOut())
}

func (p *prober) tryECDH(c *conn) (string, error) {
	o, err := c.primary(p.suite.agreement())
	if err != nil {
		return "", err
	}
	defer c.flush(o.handle)
	own, err := p.suite.publicKey(o)
	if err != nil {
		return "", err
	}
	peer, err := p.suite.curve.GenerateKey(rand.Reader)
	if err != nil {
		return "", err
	}
	want, err := peer.ECDH(own)
	if err != nil {
		return "", err
	}
	z, err := p.zgen(c, o, peer.PublicKey())
	if err != nil {
		return "", err
	}
	if subtle.ConstantTimeCompare(z, want) != 1 {
		return "", errors.New("the shared secret differs from software's")
	}
	return "agrees with software on " + p.suite.name, nil
}

// zgen is the shared secret of a temporary key and peer.
func (p *prober) zgen(c *conn, o *object, peer *ecdh.PublicKey) ([]byte, error) {
	rsp, err := (tpm2.ECDHZGen{KeyHandle: o.auth(noPassword()), InPoint: tpm2.New2B(*eccPoint(p.suite, peer))}).Execute(c)
	if err != nil {
		return nil, err
	}
	out, err := rsp.OutPoint.Contents()
	if err != nil {
		return nil, err
	}
	z := make([]byte, p.suite.field)
	if !leftPad(z, out.X.Buffer) {
		return nil, errors.New("the shared secret is too long")
	}
	return z, nil
}

func (p *prober) tryECDSA(c *conn) (string, error) {
	o, err := c.primary(p.suite.signing())
	if err != nil {
		return "", err
	}
	defer c.flush(o.handle)
	return p.suite.signs(c, o)
}

// signs verifies a signature of a key on the suite's curve in software.
func (s *suite) signs(c *conn, o *object) (string, error) {
	pub, err := s.publicKey(o)
	if err != nil {
		return "", err
	}
	key, err := ecdsa.ParseUncompressedPublicKey(s.elliptic(), pub.Bytes())
	if err != nil {
		return "", err
	}
	digest := make([]byte, s.digest)
	if _, err := rand.Read(digest); err != nil {
		return "", err
	}
	sig, err := s.ecdsa(c, o.auth(noPassword()), digest)
	if err != nil {
		return "", err
	}
	if !ecdsa.Verify(key, digest, new(big.Int).SetBytes(sig[:s.field]), new(big.Int).SetBytes(sig[s.field:])) {
		return "", errors.New("the signature does not verify")
	}
	return "signatures on " + s.name + " verify in software", nil
}

func (p *prober) trySeal(c *conn) (string, error) {
	o, err := c.primary(p.suite.storage())
	if err != nil {
		return "", err
	}
	defer c.flush(o.handle)
	data := bytes.Repeat([]byte{0xa5}, p.suite.digest+maxWrappedKey)
	if len(data) > 128 {
		data = data[:128]
	}
	made, err := (tpm2.Create{
		ParentHandle: o.auth(noPassword()),
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
			Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: data}),
		}},
		InPublic: tpm2.New2B(p.suite.sealed()),
	}).Execute(c)
	if err != nil {
		return "", err
	}
	loaded, err := (tpm2.Load{ParentHandle: o.auth(noPassword()), InPrivate: made.OutPrivate, InPublic: made.OutPublic}).Execute(c)
	if err != nil {
		return "", err
	}
	defer c.flush(loaded.ObjectHandle)
	item := object{handle: loaded.ObjectHandle, name: loaded.Name}
	rsp, err := (tpm2.Unseal{ItemHandle: item.auth(noPassword())}).Execute(c)
	if err != nil {
		return "", err
	}
	if !bytes.Equal(rsp.OutData.Buffer, data) {
		return "", errors.New("unsealing returns something else")
	}
	return fmt.Sprintf("round trip of %d bytes", len(data)), nil
}

func (p *prober) tryRandom(c *conn) (string, error) {
	var got [2][]byte
	for i := range got {
		rsp, err := (tpm2.GetRandom{BytesRequested: randomChunk}).Execute(c)
		if err != nil {
			return "", err
		}
		got[i] = rsp.RandomBytes.Buffer
	}
	if len(got[0]) == 0 || bytes.Equal(got[0], got[1]) {
		return "", errors.New("the generator repeats itself")
	}
	return fmt.Sprintf("%d bytes a command, changes from call to call", len(got[0])), nil
}

// loadImported imports a blob under a temporary storage key and loads it. The caller
// flushes it.
func (p *prober) loadImported(c *conn, storage *object, wrap func(public []byte) ([]byte, error)) (*object, error) {
	pub, err := p.suite.publicKey(storage)
	if err != nil {
		return nil, err
	}
	area := p.suite.storage()
	area.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, eccPoint(p.suite, pub))
	blob, err := wrap(tpm2.Marshal(area))
	if err != nil {
		return nil, err
	}
	b, ok := p.suite.parseImport(blob)
	if !ok {
		return nil, errors.New("what was wrapped here is not a key blob") // never: it was made for this storage key
	}
	rsp, err := (tpm2.Import{
		ParentHandle: storage.auth(noPassword()),
		ObjectPublic: tpm2.BytesAs2B[tpm2.TPMTPublic](b.pub),
		Duplicate:    tpm2.TPM2BPrivate{Buffer: b.duplicate},
		InSymSeed:    tpm2.TPM2BEncryptedSecret{Buffer: b.point},
		Symmetric:    tpm2.TPMTSymDef{Algorithm: tpm2.TPMAlgNull},
	}).Execute(c)
	if err != nil {
		return nil, fmt.Errorf("TPM2_Import: %w", err)
	}
	loaded, err := (tpm2.Load{ParentHandle: storage.auth(noPassword()), InPrivate: rsp.OutPrivate, InPublic: tpm2.BytesAs2B[tpm2.TPMTPublic](b.pub)}).Execute(c)
	if err != nil {
		return nil, fmt.Errorf("TPM2_Load: %w", err)
	}
	o, err := c.readObject(loaded.ObjectHandle)
	if err != nil {
		c.flush(loaded.ObjectHandle)
	}
	return o, err
}

// wrapKnown wraps the key of RFC 4231, test case 4, filled up with zeros.
func wrapKnown(public []byte) ([]byte, error) {
	raw := make([]byte, hmacKeyLen)
	for i := range 25 {
		raw[i] = byte(i + 1)
	}
	key, err := secret.Move(raw)
	if err != nil {
		return nil, err
	}
	defer key.Destroy()
	return WrapHMAC(public, key, []byte("probe"))
}

func (p *prober) tryHMAC(c *conn) (string, error) {
	storage, err := c.primary(p.suite.storage())
	if err != nil {
		return "", err
	}
	defer c.flush(storage.handle)
	o, err := p.loadImported(c, storage, wrapKnown)
	if err != nil {
		return "", err
	}
	defer c.flush(o.handle)
	rsp, err := (tpm2.Hmac{Handle: o.auth(noPassword()), Buffer: tpm2.TPM2BMaxBuffer{Buffer: bytes.Repeat([]byte{0xcd}, 50)}, HashAlg: tpm2.TPMAlgSHA256}).Execute(c)
	if err != nil {
		return "", fmt.Errorf("TPM2_HMAC: %w", err)
	}
	if hex.EncodeToString(rsp.OutHMAC.Buffer) != "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b" {
		return "", errors.New("the MAC is not that of RFC 4231")
	}
	return "MAC of RFC 4231 right, by TPM2_Import and TPM2_HMAC", nil
}

func (p *prober) trySigner(curve ecdh.Curve) func(*conn) (string, error) {
	return func(c *conn) (string, error) {
		key, err := curve.GenerateKey(rand.Reader)
		if err != nil {
			return "", err
		}
		scalar, err := secret.Move(key.Bytes())
		if err != nil {
			return "", err
		}
		defer scalar.Destroy()
		storage, err := c.primary(p.suite.storage())
		if err != nil {
			return "", err
		}
		defer c.flush(storage.handle)
		o, err := p.loadImported(c, storage, func(public []byte) ([]byte, error) { return WrapSigner(public, curve, scalar, []byte("probe")) })
		if err != nil {
			return "", err
		}
		defer c.flush(o.handle)
		return suiteOf(curve).signs(c, o)
	}
}

// tryAttest has a temporary attestation key certify another and quote registers.
func (p *prober) tryAttest(c *conn) (string, error) {
	ak, err := c.primary(p.suite.attestation())
	if err != nil {
		return "", err
	}
	defer c.flush(ak.handle)
	key, err := c.primary(p.suite.signing())
	if err != nil {
		return "", err
	}
	defer c.flush(key.handle)
	if _, err := (tpm2.Certify{ObjectHandle: key.auth(noPassword()), SignHandle: ak.auth(noPassword()),
		QualifyingData: tpm2.TPM2BData{Buffer: []byte("probe")}, InScheme: noScheme()}).Execute(c); err != nil {
		return "", fmt.Errorf("TPM2_Certify: %w", err)
	}
	if _, err := (tpm2.Quote{SignHandle: ak.auth(noPassword()), QualifyingData: tpm2.TPM2BData{Buffer: []byte("probe")},
		InScheme: noScheme(), PCRSelect: selectPCRs([]int{0, 7})}).Execute(c); err != nil {
		return "", fmt.Errorf("TPM2_Quote: %w", err)
	}
	for _, ek := range p.report.Endorsement {
		if ek.Certificate {
			return "works; an endorsement certificate is there", nil
		}
	}
	return "works; no endorsement certificate in the TPM, so its maker vouches for nothing", nil
}

// tryPolicy reads registers and compares the policy that the TPM computes of them with
// ours. That it can take approved values from an index is looked up alone: defining one
// needs the owner.
func (p *prober) tryPolicy(c *conn) (string, error) {
	pcrs := p.cfg.PCRs
	if len(pcrs) == 0 {
		pcrs = []int{0, 2, 4, 7}
	}
	values, err := c.readPCRs(pcrs)
	if err != nil {
		return "", err
	}
	if len(values) != len(pcrs) {
		return "", errors.New("the TPM does not keep the SHA-256 bank")
	}
	s, _, err := tpm2.PolicySession(c, p.suite.hash, 16, tpm2.Trial())
	if err != nil {
		return "", err
	}
	defer c.flush(s.Handle())
	if _, err := (tpm2.PolicyPCR{PolicySession: s.Handle(), Pcrs: selectPCRs(pcrs)}).Execute(c); err != nil {
		return "", err
	}
	got, err := (tpm2.PolicyGetDigest{PolicySession: s.Handle()}).Execute(c)
	if err != nil {
		return "", err
	}
	if want := p.suite.branch(pcrs, p.suite.pcrDigest(values)); !bytes.Equal(got.PolicyDigest.Buffer, want.Buffer) {
		return "", errors.New("the TPM computes another policy of the registers than we do")
	}
	caps, err := c.capability(tpm2.TPMCapCommands, uint32(tpm2.TPMCCPolicyAuthorizeNV))
	if err != nil {
		return "", err
	}
	commands, err := caps.Command()
	if err != nil {
		return "", err
	}
	if len(commands.CommandAttributes) == 0 || tpm2.TPMCC(commands.CommandAttributes[0].CommandIndex) != tpm2.TPMCCPolicyAuthorizeNV {
		return "", errors.New("TPM2_PolicyAuthorizeNV is not listed")
	}
	return "policies agree with ours; TPM2_PolicyAuthorizeNV is listed", nil
}

// keys looks at our handles.
func (p *prober) keys(c *conn) error {
	k := &p.report.Keys
	k.Base, k.Curve = p.cfg.PersistentBase, p.suite.name
	d := &Device{cfg: p.cfg, suite: p.suite}
	for i, t := range d.keyTemplates() {
		o, err := c.readObject(tpm2.TPMHandle(p.cfg.PersistentBase) + tpm2.TPMHandle(i))
		if handleMissing(err) {
			k.Missing = append(k.Missing, t.what)
			continue
		}
		if err != nil {
			return err
		}
		if err := d.checkKey(t.what, o, t.template); err != nil {
			k.Problem = strings.TrimPrefix(err.Error(), "tpm: ")
			return nil
		}
		if t.what == "signing key" {
			pub, err := p.suite.publicKey(o)
			if err != nil {
				return err
			}
			k.Signing = pub.Bytes()
		}
	}
	// A key for attestation may be missing: the TPM does its work without.
	k.Provisioned = k.Signing != nil && !slices.ContainsFunc(k.Missing, func(what string) bool { return what != "attestation key" })
	return nil
}

// judge draws the conclusions.
func (p *prober) judge() {
	r := &p.report
	var missing []string
	works := map[string]ProbeFunction{}
	for _, f := range r.Functions {
		works[f.Name] = f
		if f.Needed && !f.Works {
			missing = append(missing, f.Name+" ("+f.Found+")")
		}
	}
	switch l := r.Lockout; {
	case r.Keys.Problem != "":
		missing = append(missing, r.Keys.Problem)
	case l.Locked:
		missing = append(missing, "the TPM is in dictionary attack lockout: it refuses authorizations until failures are forgotten or its owner resets it")
	case r.Keys.Provisioned && (!l.OwnerSet || !l.LockoutSet):
		missing = append(missing, "the keys are there, but the owner or lockout authorization is not set: anybody on the machine can clear the TPM")
	}
	r.Root = len(missing) == 0
	software, hardware := ProbeLevel{Level: "software", Supported: r.Root}, ProbeLevel{Level: "hardware", Supported: r.Root}
	if !r.Root {
		r.Reason = "what Conclave needs does not work: " + strings.Join(missing, "; ")
		software.Why, hardware.Why = r.Reason, "the TPM cannot be a root at all"
	} else {
		hardware.How = []string{"encrypt and mac keys: " + works[nameHMAC].Found}
		for _, c := range []struct{ key, curve string }{{"ecdsa-p256", "P-256"}, {"ecdsa-p384", "P-384"}} {
			f := works[nameSigner+c.curve]
			no := ""
			if !f.Works {
				no = "no, "
			}
			hardware.How = append(hardware.How, c.key+" keys: "+no+f.Found)
		}
		hardware.How = append(hardware.How, "keys are drawn in locked memory of the node that creates them: a TPM wraps none of its own for another device")
	}
	r.Levels = []ProbeLevel{software, hardware}
}
