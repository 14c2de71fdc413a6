package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/conclave-kms/conclave/kms/attest"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/pqc"
)

// card is what a node tells the founders of a cluster about itself,
// DATA_DIR/node.json: nothing in it is secret.
type card struct {
	Format       int    `json:"format"` // 1
	Node         string `json:"node"`
	Site         string `json:"site"`
	Address      string `json:"address"`
	API          string `json:"api"`
	Suite        string `json:"suite"`
	Agreement    []byte `json:"agreement"`
	SigningSuite string `json:"signing_suite"`
	Signing      []byte `json:"signing"`
	Device       string `json:"device"`
	ImportKind   string `json:"import_kind,omitempty"` // how others wrap keys for the device
	Import       []byte `json:"import,omitempty"`
	Attestation  []byte `json:"attestation,omitempty"` // document of package attest

	// Of a next root only: its number, and proof of its signing key for the proposal.
	Root       uint32 `json:"root,omitempty"`
	Possession []byte `json:"possession,omitempty"`
}

func cardPath(dataDir string) string { return filepath.Join(dataDir, "node.json") }

// newCard describes the node of the configuration with its device and root.
func newCard(ctx context.Context, cfg Config, dev device, root *keyring.Root) (card, error) {
	signing, err := dev.SigningKey().Bytes()
	if err != nil {
		return card{}, err
	}
	kem, sig := cfg.Device.suites()
	c := card{
		Format: 1, Node: cfg.Node, Site: cfg.Site, Address: cfg.Cluster.Advertise, API: cfg.API.Advertise,
		Suite: kem.String(), Agreement: root.PublicKey().Bytes(),
		SigningSuite: sig.String(), Signing: signing, Device: dev.Describe(),
	}
	if d, ok := dev.(importing); ok {
		c.ImportKind, c.Import = d.ImportKey()
	}
	subject, err := c.subject()
	if err != nil {
		return card{}, err
	}
	c.Attestation, err = attestation(ctx, cfg.Device, dev, subject)
	return c, err
}

// subject is what the card's attestation is about.
func (c card) subject() (attest.Subject, error) {
	sig, ok := pqc.ByName(c.SigningSuite)
	if !ok {
		return attest.Subject{}, fmt.Errorf("unknown signing suite %q", c.SigningSuite)
	}
	return attest.Subject{
		Node: c.Node, Site: c.Site, SigningSuite: uint16(sig.ID), Signing: c.Signing, Agreement: c.Agreement, ImportKind: c.ImportKind, Import: c.Import,
	}, nil
}

// node turns the card into the record of the genesis document.
func (c card) node() (state.Node, error) {
	kem, ok := pqc.ByName(c.Suite)
	if !ok {
		return state.Node{}, fmt.Errorf("unknown suite %q", c.Suite)
	}
	sig, ok := pqc.ByName(c.SigningSuite)
	if !ok {
		return state.Node{}, fmt.Errorf("unknown signing suite %q", c.SigningSuite)
	}
	return state.Node{
		ID: c.Node, Site: c.Site, Address: c.Address, API: c.API, Suite: uint16(kem.ID), Agreement: c.Agreement,
		SigningSuite: uint16(sig.ID), Signing: c.Signing, Device: c.Device, Root: 1, Revision: 1,
		ImportKind: c.ImportKind, Import: c.Import, Attestation: c.Attestation,
	}, nil
}

func readCard(path string) (card, error) {
	var c card
	b, err := os.ReadFile(path)
	if err != nil {
		return c, fmt.Errorf("node card: %w", err)
	}
	if err := strictJSON(b, &c); err != nil {
		return c, fmt.Errorf("%s is not a node card, which conclaved init or conclaved rekey prepare writes: %w", path, err)
	}
	if c.Format != 1 {
		return c, fmt.Errorf("%s: format %d is not known", path, c.Format)
	}
	return c, nil
}

// sameRoot checks that the genesis document names the keys that the device holds.
func sameRoot(n state.Node, dev device, root *keyring.Root) error {
	signing, err := dev.SigningKey().Bytes()
	if err != nil {
		return err
	}
	if !bytes.Equal(n.Signing, signing) {
		return fmt.Errorf("the genesis document names signing key %s for node %s, but this device holds %s: wrong device, or wrong document", pqc.Fingerprint(n.Signing), n.ID, pqc.Fingerprint(signing))
	}
	if !bytes.Equal(n.Agreement, root.PublicKey().Bytes()) {
		return fmt.Errorf("the genesis document names another agreement key for node %s than this device and root.json hold", n.ID)
	}
	return nil
}

// writeCard writes the node's card, in the place of a former one.
func writeCard(cfg Config, c card) error {
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	return replaceFile(cardPath(cfg.DataDir), append(b, '\n'), 0o644)
}
