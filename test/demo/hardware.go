package main

import (
	"context"
	"strings"

	"github.com/conclave-kms/conclave/kms/wire"
)

func (s *story) hardware(ctx context.Context) error {
	s.chapter("11. Keys that stay in the hardware",
		"A keyring can ask for protection hardware: its keys are only ever usable inside the HSMs",
		"and TPMs of the nations that share them. Callers notice no difference.")
	const order = "The vault is open."
	var atJP, signature string
	return s.checks(ctx,
		step{"two keyrings of protection hardware: vault at fr, de and jp; strongbox at fr and de", func(ctx context.Context) error {
			return all(s.hardwareRing(ctx, "vault", "fr,de,jp"), s.hardwareRing(ctx, "strongbox", "fr,de"))
		}},
		step{"a key for two HSMs is made in one of them, and leaves it wrapped for the other alone", func(ctx context.Context) error {
			return s.generated(ctx, "strongbox/plans", "encrypt", "device")
		}},
		step{"a key for HSMs and a TPM is made in locked memory, wrapped for each, and wiped", func(ctx context.Context) error {
			return all(s.generated(ctx, "vault/orders", "encrypt", "host"), s.generated(ctx, "vault/seal", "sign", "host"))
		}},
		step{"jp's TPM encrypts, fr's HSM decrypts", func(ctx context.Context) (err error) {
			if atJP, err = s.conclave(ctx, "jp", "encrypt", "vault/orders", orderText); err != nil {
				return err
			}
			text, err := s.conclave(ctx, "fr", "decrypt", "vault/orders", atJP)
			return all(err, want("the text", text, orderText))
		}},
		step{"jp's TPM signs, de finds the signature valid", func(ctx context.Context) (err error) {
			if signature, err = s.conclave(ctx, "jp", "sign", "vault/seal", order); err != nil {
				return err
			}
			answer, err := s.conclave(ctx, "de", "verify", "vault/seal", order, signature)
			return all(err, want("the answer", answer, "valid"))
		}},
		step{"jp's hardware is attested: a chain of proof from the TPM's maker, witnessed by fr; a SoftHSM's word is only a claim", func(ctx context.Context) error {
			return all(s.attested(ctx, "jp-1", true), s.attested(ctx, "fr-1", false))
		}},
	)
}

func (s *story) hardwareRing(ctx context.Context, name, residency string) error {
	var kr wire.Keyring
	err := s.write(ctx, "fr", &kr, "keyring", "create", name, "--residency", residency, "--policy", "keys", "--protection", "hardware")
	return all(err, want("the protection of "+name, kr.Protection, "hardware"))
}

// generated makes a key and compares where its material came into being.
func (s *story) generated(ctx context.Context, path, purpose, place string) error {
	var k wire.Key
	if err := s.write(ctx, "fr", &k, "key", "create", path, "--purpose", purpose); err != nil {
		return err
	}
	if err := want("the number of versions of "+path, len(k.Versions), 1); err != nil {
		return err
	}
	return want("where "+path+" was made", k.Versions[0].Generated, place)
}

// attested compares what is proven about a node's hardware.
func (s *story) attested(ctx context.Context, node string, proven bool) error {
	text, err := s.conclave(ctx, "fr", "node", "show", node)
	if err != nil {
		return err
	}
	var n wire.Node
	if err := s.read(ctx, "fr", &n, "node", "show", node); err != nil {
		return err
	}
	for _, line := range n.Proven {
		if err := want("a proven fact is shown", strings.Contains(text, line), true); err != nil {
			return err
		}
	}
	return all(want("the hardware of "+node+" is attested", n.Attested, proven), want("something is proven", len(n.Proven) > 0, true))
}
