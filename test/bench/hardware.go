package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
	"github.com/miekg/pkcs11"
)

// share is the least part of the token's own HMAC rate that format-1 encryption
// with a key of protection hardware must reach.
const share = 0.80

// Each rate is taken in short slices, in turns with the others, and the best slice
// counts: the one that the rest of the machine disturbed least.
const (
	slice = 50 * time.Millisecond
	turns = 40
)

// rates of one parallelism, a second.
type hardwareRates struct{ raw, closure, encrypt float64 }

// hardware measures a key of protection hardware on SoftHSM against what the token
// gives to a bare loop of C_SignInit and C_Sign over miekg/pkcs11: as many sessions
// as goroutines, the same key object, the same message length, nothing around it.
// It fails when the best rate of encryption at any parallelism is less than the
// share of the best bare rate at any, on SoftHSM mostly that of a single session.
// The ratios at equal parallelism are for information.
func hardware(ctx context.Context, dir string) error {
	// A node's heap is some ten times that of this process: without this, what is
	// measured here would be garbage collected ten times as often, the bare loop's too.
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	dev, token, err := softHSM(ctx, filepath.Join(dir, "hardware"))
	if err != nil {
		return err
	}
	defer dev.Close()
	material, err := hardwareKey(ctx, dev)
	if err != nil {
		return err
	}
	defer material.Destroy()
	_, own := dev.ImportKey()
	_, mac, unload, err := dev.GenerateHMAC(ctx, [][]byte{own})
	if err != nil {
		return err
	}
	defer unload()
	bare, err := openBare(token, 64)
	if err != nil {
		return err
	}
	defer bare.close()

	message, plaintext := make([]byte, 109), make([]byte, payload) // what format 1 asks of the device
	pairs := keyring.Context{"table": "orders", "row": "4711"}
	work := []func(i int) error{
		func(i int) error { return bare.mac(i, message) },
		func(int) error { _, err := mac(ctx, message); return err },
		func(int) error { _, err := material.Encrypt(ctx, pairs, plaintext); return err },
	}
	fmt.Printf("\n%-10s %14s %14s %14s %16s   SoftHSM, HMAC-SHA-256, %d-byte plaintexts\n", "goroutines", "bare HMAC/s", "closure/s", "encrypt/s", "encrypt/bare", payload)
	var best hardwareRates
	for _, n := range []int{1, 4, 16, 64} {
		r, err := inTurns(n, work)
		if err != nil {
			return err
		}
		fmt.Printf("%-10d %14.0f %14.0f %14.0f %16.2f\n", n, r.raw, r.closure, r.encrypt, r.encrypt/r.raw)
		best = hardwareRates{max(best.raw, r.raw), max(best.closure, r.closure), max(best.encrypt, r.encrypt)}
	}
	ratio := best.encrypt / best.raw
	fmt.Printf("%-10s %14.0f %14.0f %14.0f %16.2f   at least %.2f wanted\n", "best", best.raw, best.closure, best.encrypt, ratio, share)
	if ratio < share {
		return fmt.Errorf("format-1 encryption with a hardware key reaches %.2f of the token's own HMAC rate, less than %.2f", ratio, share)
	}
	return nil
}

// hardwareOnly is hardware without the rest of the bench.
func hardwareOnly(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "cvb")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	return hardware(ctx, dir)
}

// inTurns measures the three at one parallelism.
func inTurns(n int, work []func(int) error) (hardwareRates, error) {
	got := make([][]float64, len(work))
	for range turns {
		for i, f := range work {
			rate, err := parallel(n, f)
			if err != nil {
				return hardwareRates{}, err
			}
			got[i] = append(got[i], rate)
		}
	}
	return hardwareRates{slices.Max(got[0]), slices.Max(got[1]), slices.Max(got[2])}, nil
}

// parallel repeats f on n goroutines for a slice of time.
func parallel(n int, f func(i int) error) (float64, error) {
	var total atomic.Int64
	errs := make([]error, n)
	begin := time.Now()
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			k := int64(0)
			for time.Since(begin) < slice {
				if errs[i] = f(i); errs[i] != nil {
					return
				}
				k++
			}
			total.Add(k)
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return 0, err
		}
	}
	return float64(total.Load()) / time.Since(begin).Seconds(), nil
}

// hardwareKey makes a key version of protection hardware as a node does.
func hardwareKey(ctx context.Context, dev *hsm.Device) (*keyring.Material, error) {
	seed, err := secret.New(64)
	if err != nil {
		return nil, err
	}
	if err := dev.Random(ctx, seed.Reveal()); err != nil {
		return nil, err
	}
	root, err := keyring.NewRoot(dev, pqc.MLKEM1024P384, seed)
	if err != nil {
		return nil, err
	}
	kind, public := dev.ImportKey()
	v, err := root.MakeVersion(ctx, "bench", dev, nil, keyring.KeyBinding{
		Cluster: string(bytes.Repeat([]byte("0"), 64)), Keyring: "bench", KeyID: kms.KeyID{1}, Version: 1,
		Algorithm: kms.AES256GCM, Purpose: kms.Encrypt,
	}, []keyring.Resident{{
		Recipient:  keyring.Recipient{Node: "bench", Suite: uint16(pqc.MLKEM1024P384), PublicKey: root.PublicKey().Bytes()},
		ImportKind: kind, Import: public,
	}})
	if err != nil {
		return nil, err
	}
	return v.Material, nil
}

// bareToken is the yardstick: sessions of this process, beside those of the device,
// and one of its loaded HMAC keys.
type bareToken struct {
	p11      *pkcs11.Ctx
	sessions []pkcs11.SessionHandle
	key      pkcs11.ObjectHandle
}

func openBare(token *hsm.SoftToken, n int) (*bareToken, error) {
	b := &bareToken{p11: pkcs11.New(token.Module)}
	if b.p11 == nil {
		return nil, fmt.Errorf("%s cannot be loaded", token.Module)
	}
	slot, err := b.slot(token.Serial)
	if err != nil {
		return nil, err
	}
	for range n {
		s, err := b.p11.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION)
		if err != nil {
			return nil, err
		}
		b.sessions = append(b.sessions, s)
	}
	s := b.sessions[0]
	if err := b.p11.FindObjectsInit(s, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
		pkcs11.NewAttribute(pkcs11.CKA_SIGN, true),
	}); err != nil {
		return nil, err
	}
	found, _, err := b.p11.FindObjects(s, 1)
	if err != nil {
		return nil, err
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("no loaded HMAC key in the token")
	}
	b.key = found[0]
	return b, b.p11.FindObjectsFinal(s)
}

func (b *bareToken) slot(serial string) (uint, error) {
	all, err := b.p11.GetSlotList(true)
	if err != nil {
		return 0, err
	}
	for _, slot := range all {
		info, err := b.p11.GetTokenInfo(slot)
		if err != nil {
			return 0, err
		}
		if info.SerialNumber == serial {
			return slot, nil
		}
	}
	return 0, fmt.Errorf("no token with serial %s", serial)
}

func (b *bareToken) mac(i int, message []byte) error {
	if err := b.p11.SignInit(b.sessions[i], []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_SHA256_HMAC, nil)}, b.key); err != nil {
		return err
	}
	_, err := b.p11.Sign(b.sessions[i], message)
	return err
}

func (b *bareToken) close() {
	for _, s := range b.sessions {
		_ = b.p11.CloseSession(s) // the device's own sessions end with it
	}
}
