package tpm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/go-tpm/tpm2"
)

// The policy of agreement and signing key when Config.PCRs is set:
//
//	TPM2_PolicyAuthorizeNV(policy index), then TPM2_PolicyAuthValue
//
// The policy index holds the digest of the approved policy, which is
// TPM2_PolicyOR over one TPM2_PolicyPCR for each approved set of values. Only the
// owner authorization writes it. The values index beside it says which
// registers and values these are; a lie in it makes the TPM refuse.
const (
	nvOwnerMin tpm2.TPMHandle = 0x01800000
	nvOwnerMax tpm2.TPMHandle = 0x01bfffff
	handleMask                = 0x007fffff
)

// policyIndex is what the policy index must be. written is false before the
// first write.
func (d *Device) policyIndex(written bool) tpm2.TPMSNVPublic {
	return d.suite.ownerIndex(nvOwnerMin+tpm2.TPMHandle(d.cfg.PersistentBase&handleMask), uint16(2+d.suite.digest), written)
}

func (d *Device) valuesIndex(written bool) tpm2.TPMSNVPublic {
	return d.suite.ownerIndex(d.policyIndex(true).NVIndex+1, approvedLen, written)
}

// ownerIndex is an index that the owner writes and everybody reads.
func (s *suite) ownerIndex(at tpm2.TPMHandle, size uint16, written bool) tpm2.TPMSNVPublic {
	return tpm2.TPMSNVPublic{
		NVIndex: at, NameAlg: s.hash, DataSize: size,
		Attributes: tpm2.TPMANV{OwnerWrite: true, WriteAll: true, AuthRead: true, OwnerRead: true, NoDA: true, Written: written},
	}
}

func nvName(pub tpm2.TPMSNVPublic) tpm2.TPM2BName {
	name, err := tpm2.NVName(&pub)
	if err != nil {
		panic(err) // of a public area of this package
	}
	return *name
}

func (d *Device) policyIndexWritten() *nvIndex {
	pub := d.policyIndex(true)
	return &nvIndex{pub, nvName(pub)}
}

// bound is a key template with the policy in place of the authorization value
// alone. Certification, in the ADMIN role, goes by the authorization value still.
func (d *Device) bound(t tpm2.TPMTPublic) tpm2.TPMTPublic {
	t.ObjectAttributes.UserWithAuth = false
	t.AuthPolicy.Buffer = policyDigest(d.suite.hash,
		tpm2.PolicyAuthorizeNV{NVIndex: d.policyIndexWritten().named()}, tpm2.PolicyAuthValue{})
	return t
}

// branch is the digest of TPM2_PolicyPCR for registers with a digest of values.
func (s *suite) branch(pcrs []int, digest []byte) tpm2.TPM2BDigest {
	return tpm2.TPM2BDigest{Buffer: policyDigest(s.hash, tpm2.PolicyPCR{
		PcrDigest: tpm2.TPM2BDigest{Buffer: digest}, Pcrs: selectPCRs(pcrs),
	})}
}

// branches lists those of all approved sets.
func (s *suite) branches(a *approved) tpm2.TPMLDigest {
	var l tpm2.TPMLDigest
	for _, set := range a.sets {
		l.Digests = append(l.Digests, s.branch(a.pcrs, set.digest))
	}
	return atLeastTwo(l)
}

// withDeviceKey runs fn with a session for the agreement or the signing key.
func (d *Device) withDeviceKey(c *conn, crypt tpm2.AuthOption, fn func(tpm2.Session) error) error {
	if len(d.cfg.PCRs) == 0 {
		return d.withKeyAuth(c, crypt, fn)
	}
	err := d.withPolicy(c, crypt, fn)
	for range 2 { // something was measured in between
		if !errors.Is(err, tpm2.TPMRCPCRChanged) {
			break
		}
		err = d.withPolicy(c, crypt, fn)
	}
	return err
}

// withPolicy satisfies the policy and runs fn. Where that fails it looks whether
// other values were approved meanwhile.
func (d *Device) withPolicy(c *conn, crypt tpm2.AuthOption, fn func(tpm2.Session) error) error {
	a := d.approved
	for {
		if a == nil {
			var err error
			if a, err = d.readApproved(c); err != nil {
				return err
			}
			if d.approved != nil && bytes.Equal(a.encode(), d.approved.encode()) {
				return d.differs(c, a)
			}
			d.approved = a
		}
		refused := false
		err := d.withPolicySession(c, func(s tpm2.Session) error {
			if err := d.satisfy(c, s, a); err != nil {
				refused = saidNo(c, err) && !errors.Is(err, tpm2.TPMRCCommandCode)
				return err
			}
			return fn(s)
		}, crypt, tpm2.Auth(d.auth.key.Reveal()))
		if !refused {
			return err
		}
		a = nil
	}
}

// withPolicySession runs fn with a salted policy session and flushes the session
// afterwards.
func (d *Device) withPolicySession(c *conn, fn func(tpm2.Session) error, opts ...tpm2.AuthOption) error {
	opts = append([]tpm2.AuthOption{tpm2.Salted(d.storage.handle, d.storage.public)}, opts...)
	s, _, err := tpm2.PolicySession(c, d.suite.hash, 16, opts...)
	if err != nil {
		return err
	}
	defer func() {
		if c.err == nil {
			c.flush(s.Handle())
		}
	}()
	return fn(s)
}

// satisfy runs the commands of the policy.
func (d *Device) satisfy(c *conn, s tpm2.Session, a *approved) error {
	_, err := (tpm2.PolicyPCR{PolicySession: s.Handle(), Pcrs: selectPCRs(d.cfg.PCRs)}).Execute(c)
	if err != nil {
		return err
	}
	if _, err = (tpm2.PolicyOr{PolicySession: s.Handle(), PHashList: d.suite.branches(a)}).Execute(c); err != nil {
		return err
	}
	x := d.policyIndexWritten()
	if _, err = (tpm2.PolicyAuthorizeNV{AuthHandle: x.auth(), NVIndex: x.named(), PolicySession: s.Handle()}).Execute(c); err != nil {
		return err
	}
	_, err = (tpm2.PolicyAuthValue{PolicySession: s.Handle()}).Execute(c)
	return err
}

// readApproved reads the values index.
func (d *Device) readApproved(c *conn) (*approved, error) {
	b, err := c.readNV(d.valuesIndex(true).NVIndex)
	if err != nil {
		if saidNo(c, err) {
			return nil, fmt.Errorf("tpm: %w: index %#x with the approved values cannot be read; %s", ErrPCRs, uint32(d.valuesIndex(true).NVIndex), approveFix)
		}
		return nil, err
	}
	a, ok := d.suite.parseApproved(b)
	if !ok {
		return nil, fmt.Errorf("tpm: %w: index %#x does not hold approved values; %s", ErrPCRs, uint32(d.valuesIndex(true).NVIndex), approveFix)
	}
	return a, nil
}

// approveFix is the next step, for errors.
const approveFix = "if the change is intended, approve the present values: conclaved device approve-pcrs"

// differs says which registers have other values than approved.
func (d *Device) differs(c *conn, a *approved) error {
	if !slices.Equal(a.pcrs, d.cfg.PCRs) {
		return fmt.Errorf("tpm: %w: PCRs %s are configured, PCRs %s are approved; %s", ErrPCRs, listPCRs(d.cfg.PCRs), listPCRs(a.pcrs), approveFix)
	}
	values, err := c.readPCRs(a.pcrs)
	if err != nil {
		return err
	}
	changed := a.changed(values)
	if len(changed) == 0 {
		return fmt.Errorf("tpm: %w: the policy in the TPM is not that of the approved values, as after an approval that was cut short; %s", ErrPCRs, approveFix)
	}
	return fmt.Errorf("tpm: %w: PCR %s (SHA-256 bank) not as approved; %s", ErrPCRs, listPCRs(changed), approveFix)
}

func listPCRs(pcrs []int) string {
	s := make([]string, len(pcrs))
	for i, p := range pcrs {
		s[i] = fmt.Sprint(p)
	}
	return strings.Join(s, ", ")
}

// UpdatePCRPolicy approves the present values of Config.PCRs, and the sets of
// values given besides, such as those that a planned update of the firmware will
// bring: a map from each register to its 32-byte value in the SHA-256 bank.
// Everything approved before is not any more. The keys stay the same. It asks for
// the owner authorization (Config.OwnerFile) and works whatever the registers
// hold; a node that runs on the TPM notices by itself. Errors: as of Open;
// ErrInvalid when no PCRs are configured or a set does not fit.
func UpdatePCRPolicy(ctx context.Context, cfg Config, also ...map[int][]byte) error {
	d, err := newDevice(cfg, true)
	if err != nil {
		return err
	}
	defer d.abandon()
	if len(d.cfg.PCRs) == 0 {
		return invalid("no PCRs are configured")
	}
	if err := d.discover(ctx); err != nil {
		return err
	}
	err = d.run(ctx, "approve PCRs", func(c *conn) error { return d.approve(c, d.storage, also) })
	if err != nil {
		return err
	}
	return d.testSign(ctx)
}

// approve writes what is approved: the present values and more.
func (d *Device) approve(c *conn, salt *object, also []map[int][]byte) error {
	present, err := c.readPCRs(d.cfg.PCRs)
	if err != nil {
		return err
	}
	if len(present) != len(d.cfg.PCRs) {
		return unsafe("the TPM does not keep the SHA-256 bank of PCRs %s", listPCRs(d.cfg.PCRs))
	}
	a, err := d.suite.approve(d.cfg.PCRs, append([]map[int][]byte{present}, also...))
	if err != nil {
		return err
	}
	policy := policyDigest(d.suite.hash, tpm2.PolicyOr{PHashList: d.suite.branches(a)})
	if err := d.writeIndex(c, salt, d.valuesIndex, a.encode()); err != nil {
		return err
	}
	err = d.writeIndex(c, salt, d.policyIndex, tpm2.Marshal(tpm2.TPMTHA{HashAlg: d.suite.hash, Digest: policy}))
	if err == nil {
		d.approved = a
	}
	return err
}

// writeIndex writes an index of ours whole, and defines it where it is missing.
func (d *Device) writeIndex(c *conn, salt *object, public func(written bool) tpm2.TPMSNVPublic, data []byte) error {
	d.extend(c)
	at := public(false).NVIndex
	x, err := c.readNVPublic(at)
	if handleMissing(err) {
		if err = d.defineIndex(c, salt, public(false)); err == nil {
			x, err = c.readNVPublic(at)
		}
	}
	if err != nil {
		return err
	}
	if x.name.Buffer == nil || !bytes.Equal(x.name.Buffer, nvName(public(false)).Buffer) && !bytes.Equal(x.name.Buffer, nvName(public(true)).Buffer) {
		return invalid("index %#x is taken by another: undefine it or choose another PersistentBase", uint32(at))
	}
	return d.withOwner(c, salt, func(s tpm2.Session) error {
		_, err := (tpm2.NVWrite{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: s}, NVIndex: x.named(),
			Data: tpm2.TPM2BMaxNVBuffer{Buffer: data},
		}).Execute(c)
		return err
	})
}

func (d *Device) defineIndex(c *conn, salt *object, public tpm2.TPMSNVPublic) error {
	return d.withOwner(c, salt, func(s tpm2.Session) error {
		_, err := (tpm2.NVDefineSpace{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: s}, PublicInfo: tpm2.New2B(public),
		}).Execute(c)
		return err
	})
}

// withOwner runs fn with a session that proves the owner authorization.
func (d *Device) withOwner(c *conn, salt *object, fn func(tpm2.Session) error) error {
	err := c.withSession(salt, fn, encryptIn(), tpm2.Auth(d.auth.owner.Reveal()))
	if errors.Is(err, tpm2.TPMRCBadAuth) || errors.Is(err, tpm2.TPMRCAuthFail) {
		return fmt.Errorf("tpm: %w: the owner authorization is not the one that comes from this file (owner_file, or auth_file)", ErrAuth)
	}
	return err
}
