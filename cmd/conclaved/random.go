package main

import (
	"crypto/rand"
	"crypto/subtle"

	"github.com/conclave-kms/conclave/kms/secret"
)

// xorRandom mixes the operating system's randomness into p.
func xorRandom(p []byte) error {
	b := make([]byte, len(p))
	defer secret.Wipe(b)
	if _, err := rand.Read(b); err != nil {
		return err
	}
	subtle.XORBytes(p, p, b)
	return nil
}
