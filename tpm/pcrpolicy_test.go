package tpm_test

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/tpm"
	"github.com/conclave-kms/conclave/tpm/tpmtest"
)

// measure extends a register, as firmware, boot loader or kernel do.
func measure(t *testing.T, cfg tpm.Config, pcr uint32, what string) {
	t.Helper()
	digest := sha256.Sum256([]byte(what))
	direct(t, cfg, tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: digest[:]}}},
	})
}

// extended is the value of a register that held zeros, after measure.
func extended(what string) []byte {
	digest := sha256.Sum256([]byte(what))
	h := sha256.Sum256(append(make([]byte, 32), digest[:]...))
	return h[:]
}

// notApproved checks that both bound keys are refused with an error that names
// the registers and the next step, and that the rest goes on.
func notApproved(t *testing.T, d *tpm.Device, registers string) {
	t.Helper()
	_, signErr := d.Sign(t.Context(), make([]byte, len(d.AgreementKey().Bytes())/2))
	_, agreeErr := d.ECDH(t.Context(), d.AgreementKey())
	for what, err := range map[string]error{"Sign": signErr, "ECDH": agreeErr, "Check": d.Check(t.Context())} {
		if !errors.Is(err, tpm.ErrPCRs) || !strings.Contains(err.Error(), "PCR "+registers+" ") || !strings.Contains(err.Error(), "approve-pcrs") {
			t.Errorf("%s: %v, want that PCR %s is not as approved, and what to do", what, err, registers)
		}
	}
	if err := d.Random(t.Context(), make([]byte, 8)); err != nil {
		t.Error(err)
	}
}

func usable(t *testing.T, d *tpm.Device) {
	t.Helper()
	if _, err := d.Sign(t.Context(), make([]byte, len(d.AgreementKey().Bytes())/2)); err != nil {
		t.Errorf("Sign: %v", err)
	}
	if _, err := d.ECDH(t.Context(), d.AgreementKey()); err != nil {
		t.Errorf("ECDH: %v", err)
	}
	if err := d.Check(t.Context()); err != nil {
		t.Errorf("Check: %v", err)
	}
}

func update(t *testing.T, cfg tpm.Config, also ...map[int][]byte) {
	t.Helper()
	if err := tpm.UpdatePCRPolicy(t.Context(), cfg, also...); err != nil {
		t.Fatal(err)
	}
}

func TestPCRPolicy(t *testing.T) {
	t.Parallel()
	for name, curve := range map[string]ecdh.Curve{"P-384": ecdh.P384(), "P-256": ecdh.P256()} {
		t.Run(name, func(t *testing.T) {
			p := tpmtest.New(t)
			cfg := p.Config()
			cfg.Curve, cfg.PCRs = curve, []int{11, 7, 7}
			measure(t, cfg, 7, "first firmware")
			d := p.Open(cfg)
			pub := d.SigningKey()
			key, mac, _ := loadHMAC(t, d)
			usable(t, d)
			measure(t, cfg, 10, "a register that nobody chose")
			usable(t, d)
			measure(t, cfg, 7, "other firmware")
			notApproved(t, d, "7")
			checkHMAC(t, mac, key, []byte("imported keys are not bound"))
			measure(t, cfg, 11, "other kernel")
			notApproved(t, d, "7, 11")
			wantErr(t, "opening", openErr(t, cfg), tpm.ErrPCRs)

			update(t, cfg)
			usable(t, d) // notices by itself
			again := p.Open(cfg)
			usable(t, again)
			if !again.SigningKey().Equal(pub) {
				t.Error("another signing key")
			}
			p.Restart() // the registers are those of a boot without any measurement
			notApproved(t, d, "7, 11")
			update(t, cfg)
			usable(t, d)
			qualifying := []byte("nonce")
			measure(t, cfg, 7, "evil firmware")
			ev, err := d.Attest(t.Context(), qualifying) // the proof of what is there must not depend on it
			if err != nil {
				t.Fatal(err)
			}
			checkEvidence(t, ev, qualifying)
			if !bytes.Equal(ev.Quote.PCRs[7], extended("evil firmware")) {
				t.Error("the quote does not show the register")
			}
			if n := loaded(t, cfg); n != 0 {
				t.Errorf("%d transient objects and sessions are left", n)
			}
		})
	}
}

// TestPCRPlannedUpdate: values that a firmware update will bring are approved
// before it, and the old ones withdrawn after it.
func TestPCRPlannedUpdate(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	cfg := p.Config()
	cfg.PCRs = []int{0, 4}
	d := p.Open(cfg)
	update(t, cfg, map[int][]byte{0: extended("next firmware"), 4: extended("next loader")})
	usable(t, d)
	measure(t, cfg, 0, "next firmware")
	notApproved(t, d, "0")
	measure(t, cfg, 4, "next loader")
	usable(t, d)
	update(t, cfg)
	usable(t, d)
	p.Restart()
	notApproved(t, d, "0, 4")

	full := map[int][]byte{0: make([]byte, 32), 4: make([]byte, 32)}
	for what, also := range map[string][]map[int][]byte{
		"a register missing": {{0: make([]byte, 32)}},
		"another register":   {{0: make([]byte, 32), 5: make([]byte, 32)}},
		"one more":           {{0: make([]byte, 32), 4: make([]byte, 32), 5: make([]byte, 32)}},
		"a short value":      {{0: make([]byte, 32), 4: make([]byte, 20)}},
		"too many sets": {full, {0: make([]byte, 32), 4: extended("1")}, {0: make([]byte, 32), 4: extended("2")},
			{0: make([]byte, 32), 4: extended("3")}, {0: make([]byte, 32), 4: extended("4")}},
	} {
		wantErr(t, what, tpm.UpdatePCRPolicy(t.Context(), cfg, also...), tpm.ErrInvalid)
	}
	notApproved(t, d, "0, 4")
}

// TestPCROwner: who has the node's secret alone cannot approve anything when the
// owner's is kept apart, and the device needs the node's alone.
func TestPCROwner(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	cfg := p.Config()
	cfg.PCRs = []int{7}
	owner := cfg
	owner.OwnerFile = filepath.Join(t.TempDir(), "owner")
	if err := tpm.NewAuthFile(owner.OwnerFile); err != nil {
		t.Fatal(err)
	}
	if err := tpm.Provision(t.Context(), owner); err != nil {
		t.Fatal(err)
	}
	d, err := tpm.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	usable(t, d)
	measure(t, cfg, 7, "x")
	for range 5 {
		wantErr(t, "approving with the node's secret", tpm.UpdatePCRPolicy(t.Context(), cfg), tpm.ErrAuth)
	}
	notApproved(t, d, "7")
	if n := dictionaryAttacks(t, cfg); n != 0 {
		t.Errorf("%d dictionary attacks counted", n)
	}
	update(t, owner)
	usable(t, d)
	stolen := owner
	stolen.AuthFile = owner.OwnerFile
	wantErr(t, "opening with the owner's secret", openErr(t, stolen), tpm.ErrAuth)
}

// TestPCRIndexes: what happens when somebody with the owner authorization has
// meddled with the indexes.
func TestPCRIndexes(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	cfg := p.Config()
	cfg.PCRs = []int{7}
	d := p.Open(cfg)
	apply := func(f ...tpm.Fault) {
		t.Helper()
		if err := tpm.Apply(t.Context(), cfg, f...); err != nil {
			t.Fatal(err)
		}
	}
	const policy, values = 0x01880000, 0x01880001
	for what, faults := range map[string][]tpm.Fault{
		"policy gone":   {tpm.UndefineOwner(policy)},
		"values gone":   {tpm.UndefineOwner(values)},
		"both gone":     {tpm.UndefineOwner(policy), tpm.UndefineOwner(values)},
		"another value": {tpm.WriteOwner(values, make([]byte, 512))},
		"another policy": {tpm.WriteOwner(policy, tpm2.Marshal(tpm2.TPMTHA{
			HashAlg: tpm2.TPMAlgSHA384, Digest: make([]byte, 48)}))},
	} {
		apply(faults...)
		if err := openErr(t, cfg); !errors.Is(err, tpm.ErrPCRs) || !strings.Contains(err.Error(), "approve-pcrs") {
			t.Errorf("%s: %v, want ErrPCRs and what to do", what, err)
		}
		update(t, cfg)
		usable(t, d)
	}
	apply(tpm.UndefineOwner(values), tpm.DefineOwner(values, 20))
	wantErr(t, "an index of somebody else", tpm.UpdatePCRPolicy(t.Context(), cfg), tpm.ErrInvalid)
}

// TestPCRConfig: the keys are made with or without PCRs, and the configuration
// has to say the same.
func TestPCRConfig(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	plain := p.Config()
	p.Open(plain)
	bound := plain
	bound.PCRs = []int{7}
	if err := openErr(t, bound); !errors.Is(err, tpm.ErrUnsafe) || !strings.Contains(err.Error(), "without PCRs") {
		t.Errorf("PCRs for keys made without: %v", err)
	}
	wantErr(t, "approving for keys made without PCRs", tpm.UpdatePCRPolicy(t.Context(), bound), tpm.ErrUnsafe)
	wantErr(t, "approving without PCRs", tpm.UpdatePCRPolicy(t.Context(), plain), tpm.ErrInvalid)

	bound.PersistentBase = 0x81080010
	p.Open(bound)
	plain.PersistentBase = bound.PersistentBase
	if err := openErr(t, plain); !errors.Is(err, tpm.ErrUnsafe) || !strings.Contains(err.Error(), "made with PCRs") {
		t.Errorf("no PCRs for keys made with: %v", err)
	}
	other := bound
	other.PCRs = []int{7, 8}
	if err := openErr(t, other); !errors.Is(err, tpm.ErrPCRs) || !strings.Contains(err.Error(), "PCRs 7, 8 are configured, PCRs 7 are approved") {
		t.Errorf("other PCRs than approved: %v", err)
	}
	update(t, other)
	if err := openErr(t, other); err != nil {
		t.Errorf("other PCRs, approved: %v", err)
	}
	for _, bad := range [][]int{{-1}, {24}, {3, 99}} {
		cfg := bound
		cfg.PCRs = bad
		wantErr(t, "registers that there are not", openErr(t, cfg), tpm.ErrInvalid)
	}
	bound.PersistentBase = 0x81400000
	wantErr(t, "handles without an index", openErr(t, bound), tpm.ErrInvalid)
}

// TestPCRUnsupported: a TPM without TPM2_PolicyAuthorizeNV gets no keys bound to a
// policy that it could never satisfy, and keys without PCRs as before.
func TestPCRUnsupported(t *testing.T) {
	p := tpmtest.New(t)
	w, cfg := tap(t, p.Config())
	w.setRefuse(func(cmd []byte) []byte {
		if commandCode(cmd) != tpm2.TPMCCPolicyAuthorizeNV {
			return nil
		}
		return binary.BigEndian.AppendUint32([]byte{0x80, 1, 0, 0, 0, 10}, uint32(tpm2.TPMRCCommandCode))
	})
	bound := cfg
	bound.PCRs = []int{7}
	wantErr(t, "provisioning with PCRs", tpm.Provision(t.Context(), bound), tpm.ErrUnsupported)
	wantErr(t, "opening", openErr(t, bound), tpm.ErrNotProvisioned)
	usable(t, p.Open(cfg))
}

// TestPCRCancelled: callers that give up leave nothing in the TPM.
func TestPCRCancelled(t *testing.T) {
	p := tpmtest.New(t)
	cfg := p.Config()
	cfg.PCRs = []int{7}
	d := p.Open(cfg)
	for i := range 20 {
		ctx, cancel := context.WithCancel(t.Context())
		if i%2 == 0 {
			measure(t, cfg, 7, "x")
			cancel()
		}
		if _, err := d.Sign(ctx, make([]byte, 48)); err == nil && i%2 == 0 {
			t.Error("a cancelled call succeeded")
		}
		cancel()
	}
	notApproved(t, d, "7")
	if n := loaded(t, cfg); n != 0 {
		t.Errorf("%d transient objects and sessions are left", n)
	}
}
