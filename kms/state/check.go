package state

import (
	"crypto/ecdh"
	"crypto/ed25519"
	"strconv"

	"github.com/conclave-kms/conclave/kms"
)

// sortedIDs checks that a list has 1 to limit entries whose names are well formed,
// sorted and distinct.
func sortedIDs[T any](what string, list []T, limit int, id func(T) string) error {
	if len(list) == 0 {
		return kms.Errorf(kms.Invalid, "there is no %s", what)
	}
	if len(list) > limit {
		return kms.Errorf(kms.Invalid, "there are %d entries of %s; the limit is %d", len(list), what, limit)
	}
	for i := range list {
		if err := kms.CheckName(what, id(list[i])); err != nil {
			return err
		}
		if i > 0 && id(list[i-1]) >= id(list[i]) {
			return kms.Errorf(kms.Invalid, "%s %q: the list is not sorted or repeats it", what, id(list[i]))
		}
	}
	return nil
}

// checkText checks a short text for people: valid UTF-8 that shows on one line.
func checkText(what, s string, required bool) error {
	if s == "" && required {
		return kms.Errorf(kms.Invalid, "%s is missing", what)
	}
	return kms.CheckText(what, s)
}

// pointOK reports whether b is an uncompressed point on the curve.
func pointOK(c ecdh.Curve, b []byte) bool {
	if len(b) > MaxPublicKey {
		return false
	}
	_, err := c.NewPublicKey(b)
	return err == nil
}

// checkPublicKey checks the public half of a key version: a SEC1 point or an
// Ed25519 key for keys that sign, nothing for others.
func checkPublicKey(alg kms.Algorithm, b []byte) error {
	ok := false
	switch alg {
	case kms.ECDSAP256:
		ok = pointOK(ecdh.P256(), b)
	case kms.ECDSAP384:
		ok = pointOK(ecdh.P384(), b)
	case kms.Ed25519:
		ok = len(b) == ed25519.PublicKeySize
	default:
		ok = len(b) == 0
	}
	if !ok {
		return kms.Errorf(kms.Invalid, "the public key does not fit the algorithm %s", alg)
	}
	return nil
}

// checkWrapped checks the length of wrapped material.
func checkWrapped(b []byte) error {
	if len(b) == 0 || len(b) > MaxWrapped {
		return kms.Errorf(kms.Invalid, "the wrapped material has %d bytes; it must have 1 to %d", len(b), MaxWrapped)
	}
	return nil
}

// validateChecks checks a list of checks, sorted by node.
func validateChecks(checks []Check) error {
	if err := sortedIDs("node of the checks", checks, MaxNodes, func(c Check) string { return c.Node }); err != nil {
		return err
	}
	for _, c := range checks {
		if len(c.Hash) != HashSize {
			return kms.Errorf(kms.Invalid, "the check of node %s has %d bytes, not %d", c.Node, len(c.Hash), HashSize)
		}
	}
	return nil
}

// validateCopies checks a list of sealed copies, sorted by node.
func validateCopies(copies []SealedCopy) error {
	if err := sortedIDs("node of the sealed copies", copies, MaxNodes, func(c SealedCopy) string { return c.Node }); err != nil {
		return err
	}
	for _, c := range copies {
		if c.Root == 0 {
			return kms.Errorf(kms.Invalid, "the sealed copy for node %s does not say for which of its roots it is", c.Node)
		}
		if len(c.Sealed) == 0 || len(c.Sealed) > MaxSealed {
			return kms.Errorf(kms.Invalid, "the sealed copy for node %s has %d bytes; it must have 1 to %d", c.Node, len(c.Sealed), MaxSealed)
		}
	}
	return nil
}

func decimal(n uint64) string { return strconv.FormatUint(n, 10) }
