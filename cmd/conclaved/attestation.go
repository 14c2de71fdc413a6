package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms/attest"
	"github.com/conclave-kms/conclave/tpm"
)

// What devices can say about themselves. A device that can say nothing gets no
// attestation document.
type (
	importing interface {
		ImportKey() (kind string, public []byte)
	}
	attesting interface {
		Attest(ctx context.Context, qualifying []byte) (tpm.Evidence, error)
	}
	describing interface {
		Attributes(ctx context.Context) ([]hsm.KeyAttributes, error)
	}
)

// attestation makes the device's attestation document about s; empty when the
// device has nothing to say.
func attestation(ctx context.Context, c DeviceConfig, dev device, s attest.Subject) ([]byte, error) {
	switch d := dev.(type) {
	case attesting:
		ev, err := d.Attest(ctx, attest.Qualifying(s))
		if err != nil {
			return nil, fmt.Errorf("attestation by the TPM: %w", err)
		}
		doc := tpmDocument(ev)
		if c.EKChain != "" {
			if doc.EKChain, err = readCertificates(c.EKChain); err != nil {
				return nil, fmt.Errorf("device.ek_chain: %w", err)
			}
		}
		return doc.Marshal(), nil
	case describing:
		keys, err := d.Attributes(ctx)
		if err != nil {
			return nil, fmt.Errorf("attributes of the device keys: %w", err)
		}
		doc := attest.PKCS11{Subject: attest.Qualifying(s), Keys: tokenKeys(keys)}
		if c.VendorAttestation != "" {
			if doc.Vendor, err = os.ReadFile(c.VendorAttestation); err != nil {
				return nil, fmt.Errorf("device.vendor_attestation: %w", err)
			}
		}
		return doc.Marshal(), nil
	}
	return nil, nil
}

func tpmDocument(ev tpm.Evidence) attest.TPM {
	d := attest.TPM{
		EKCertificate: ev.EKCertificate, EKChain: ev.EKChain, EKPublic: ev.EKPublic, AK: ev.AK, Storage: attest.Certified(ev.Storage),
		Agreement: attest.Certified(ev.Agreement), Signing: attest.Certified(ev.Signing),
		Quote: attest.Quoted{Attest: ev.Quote.Attest, Signature: ev.Quote.Signature},
	}
	for _, i := range slices.Sorted(maps.Keys(ev.Quote.PCRs)) {
		d.Quote.PCRs = append(d.Quote.PCRs, attest.PCR{Index: uint8(i), Value: ev.Quote.PCRs[i]})
	}
	return d
}

// tokenKeys puts what the token says into the document's words.
func tokenKeys(keys []hsm.KeyAttributes) []attest.PKCS11Key {
	var out []attest.PKCS11Key
	for _, k := range keys {
		var facts []attest.Fact
		for name, v := range k.Values {
			facts = append(facts, attest.Fact{Name: name, Value: fmt.Sprint(v)})
		}
		if k.Mechanisms != nil {
			facts = append(facts, attest.Fact{Name: "CKA_ALLOWED_MECHANISMS", Value: fmt.Sprintf("%#x", k.Mechanisms)})
		}
		slices.SortFunc(facts, func(a, b attest.Fact) int { return cmp.Compare(a.Name, b.Name) })
		out = append(out, attest.PKCS11Key{Role: k.Role, Facts: facts})
	}
	slices.SortFunc(out, func(a, b attest.PKCS11Key) int { return cmp.Compare(a.Role, b.Role) })
	return out
}

// witnessFile is the statement of a witness about a node, as `conclaved attest
// witness` writes it.
type witnessFile struct {
	Format    int    `json:"format"` // 1
	Node      string `json:"node"`   // that it is about
	Witness   string `json:"witness"`
	Secret    []byte `json:"secret"` // SHA-256
	Signature []byte `json:"signature"`
}

// addWitness puts the statement in the file into the card's document.
func (c *card) addWitness(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("witness: %w", err)
	}
	var w witnessFile
	if err := strictJSON(b, &w); err != nil {
		return fmt.Errorf("%s is not a witness, as conclaved attest witness writes it: %w", path, err)
	}
	if w.Format != 1 {
		return fmt.Errorf("%s: format %d is not known", path, w.Format)
	}
	if w.Node != c.Node {
		return fmt.Errorf("%s is about node %s, not %s", path, w.Node, c.Node)
	}
	doc, err := attest.WithWitness(c.Attestation, attest.Witness{Node: w.Witness, Secret: w.Secret, Signature: w.Signature})
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	c.Attestation = doc
	return nil
}

// belongs checks that the card names the keys that the device holds.
func (c card) belongs(dev device) error {
	signing, err := dev.SigningKey().Bytes()
	if err != nil {
		return err
	}
	if !bytes.Equal(signing, c.Signing) {
		return errors.New("the card names another signing key than this device holds: make it anew with: conclaved init")
	}
	return nil
}
