package tpm

import (
	"bytes"
	"context"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/kms/secret"
)

const (
	// macBuffer is TPM2B_MAX_BUFFER of all TPMs known to us: what goes in one
	// command.
	macBuffer = 1024
	macLen    = 32
)

func (d *Device) mac(ctx context.Context, k *importedKey, message []byte) ([]byte, error) {
	if len(message) > MaxMessage {
		return nil, invalid("the message has %d bytes, the TPM takes %d", len(message), MaxMessage)
	}
	if k.unloaded.Load() {
		return nil, errUnloaded
	}
	msg := bytes.Clone(message)
	wipe := func() { secret.Wipe(msg) }
	return do(ctx, d, call[[]byte]{op: "HMAC", drop: secret.Wipe, after: wipe, fn: func(c *conn) (mac []byte, err error) {
		err = d.use(c, k, encryptInOut(), func(o *object, s tpm2.Session) error {
			if len(msg) > macBuffer {
				mac, err = d.macSequence(c, o, s, msg)
			} else {
				mac, err = macOnce(c, o, s, msg)
			}
			return err
		})
		return mac, err
	}})
}

// macOnce is TPM2_HMAC.
func macOnce(c *conn, o *object, s tpm2.Session, msg []byte) ([]byte, error) {
	rsp, err := (tpm2.Hmac{
		Handle: o.auth(s), Buffer: tpm2.TPM2BMaxBuffer{Buffer: msg}, HashAlg: tpm2.TPMAlgSHA256,
	}).Execute(c)
	if err != nil {
		return nil, err
	}
	return macResult(rsp.OutHMAC)
}

// macSequence is TPM2_HMAC_Start, TPM2_SequenceUpdate and TPM2_SequenceComplete
// (Part 3, 17). The sequence is an object in the TPM until it completes, and is
// flushed where it does not.
func (d *Device) macSequence(c *conn, o *object, s tpm2.Session, msg []byte) (mac []byte, err error) {
	// Neither HMAC_Start nor SequenceUpdate answers with a parameter, and a
	// session that encrypts answers is refused there.
	err = d.withKeyAuth(c, encryptIn(), func(in tpm2.Session) error {
		started, err := (tpm2.HmacStart{
			Handle: o.auth(in), Auth: tpm2.TPM2BAuth{Buffer: d.auth.key.Reveal()}, HashAlg: tpm2.TPMAlgSHA256,
		}).Execute(c)
		if err != nil {
			return err
		}
		sequence := tpm2.AuthHandle{Handle: started.SequenceHandle}
		completed := false
		defer func() {
			if !completed && c.err == nil {
				c.flush(started.SequenceHandle)
			}
		}()
		rest := msg
		for ; len(rest) > macBuffer; rest = rest[macBuffer:] {
			sequence.Auth = in
			_, err := (tpm2.SequenceUpdate{SequenceHandle: sequence, Buffer: tpm2.TPM2BMaxBuffer{Buffer: rest[:macBuffer]}}).Execute(c)
			if err != nil {
				return err
			}
		}
		sequence.Auth = s
		rsp, err := (tpm2.SequenceComplete{
			SequenceHandle: sequence, Buffer: tpm2.TPM2BMaxBuffer{Buffer: rest}, Hierarchy: tpm2.TPMRHNull,
		}).Execute(c)
		if err != nil {
			return err
		}
		completed = true
		mac, err = macResult(rsp.Result)
		return err
	})
	return mac, err
}

// macResult takes the HMAC out of a response, which it wipes.
func macResult(out tpm2.TPM2BDigest) ([]byte, error) {
	defer secret.Wipe(out.Buffer)
	if len(out.Buffer) != macLen {
		return nil, unavailable("HMAC: the TPM returned %d bytes", len(out.Buffer))
	}
	return bytes.Clone(out.Buffer), nil
}
