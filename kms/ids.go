package kms

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// MaxName is the longest name of a site, node, keyring, key, custodian or policy.
const MaxName = 63

// CheckName reports whether s may name a thing: 1 to MaxName characters of
// a-z, 0-9 and '-', starting and ending with a letter or digit (the label rule
// of RFC 1123 in lower case). what is the field's name for the message.
func CheckName(what, s string) error {
	if s == "" {
		return Errorf(Invalid, "%s is missing", what)
	}
	if len(s) > MaxName {
		return Errorf(Invalid, "%s is longer than %d characters", what, MaxName)
	}
	for i, r := range s {
		alnum := r >= 'a' && r <= 'z' || r >= '0' && r <= '9'
		if !alnum && (r != '-' || i == 0 || i == len(s)-1) {
			return Errorf(Invalid, "%s %q: use a-z, 0-9 and inner '-'", what, s)
		}
	}
	return nil
}

// MaxText is the longest short text for people, in bytes: a cluster's name, a
// description of a device, an address.
const MaxText = 255

// CheckText checks a short text for people: at most MaxText bytes of UTF-8 that
// show on one line. It may be empty. what is the field's name for the message.
func CheckText(what, s string) error {
	if len(s) > MaxText || !utf8.ValidString(s) {
		return Errorf(Invalid, "%s is longer than %d bytes or not UTF-8", what, MaxText)
	}
	for _, r := range s {
		if !unicode.IsGraphic(r) {
			return Errorf(Invalid, "%s contains %U, which does not show as text", what, r)
		}
	}
	return nil
}

// KeyID identifies a key for ever: 16 random bytes, part of every ciphertext.
type KeyID [16]byte

// String returns the identifier in lower-case hexadecimal.
func (id KeyID) String() string { return hex.EncodeToString(id[:]) }

// ParseKeyID reads what String wrote.
func ParseKeyID(s string) (KeyID, error) {
	var id KeyID
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(id) {
		return id, Errorf(Invalid, "key id must be %d hexadecimal digits", 2*len(id))
	}
	copy(id[:], b)
	return id, nil
}

// ClusterID derives the cluster's identifier from the exact bytes of its genesis
// document: the first 16 bytes of SHA-256 over a domain string and the bytes.
func ClusterID(genesis []byte) string {
	h := sha256.New()
	h.Write([]byte("conclave/genesis/v1\x00"))
	h.Write(genesis)
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// KeyPath is the name of a key with its keyring, "keyring/key".
func KeyPath(keyring, key string) string { return keyring + "/" + key }

// SplitKeyPath splits "keyring/key" and checks both names.
func SplitKeyPath(path string) (keyring, key string, err error) {
	keyring, key, ok := strings.Cut(path, "/")
	if !ok {
		return "", "", Errorf(Invalid, "%q is not of the form KEYRING/KEY", path)
	}
	if err := CheckName("keyring", keyring); err != nil {
		return "", "", err
	}
	if err := CheckName("key", key); err != nil {
		return "", "", err
	}
	return keyring, key, nil
}

// Identity is an authenticated caller: the URI SAN of its certificate,
// spiffe://<trust domain>/<role>/<name...> (SPIFFE-ID, section 2).
type Identity struct {
	TrustDomain string // of the site whose CA issued the certificate
	Role        string // first path segment: operator, service, custodian, auditor, node
	Name        string // the rest of the path
}

// String returns the SPIFFE ID.
func (id Identity) String() string {
	return fmt.Sprintf("spiffe://%s/%s/%s", id.TrustDomain, id.Role, id.Name)
}

// MaxIdentity bounds the length of a SPIFFE ID.
const MaxIdentity = 512

// ParseIdentity reads a SPIFFE ID with a role and a name. Only lower-case
// letters, digits, '.', '-' and '_' are accepted in a segment.
func ParseIdentity(s string) (Identity, error) {
	bad := func(why string) (Identity, error) {
		return Identity{}, Errorf(Unauthenticated, "identity is not spiffe://TRUST-DOMAIN/ROLE/NAME: %s", why)
	}
	if len(s) > MaxIdentity {
		return bad("too long")
	}
	rest, ok := strings.CutPrefix(s, "spiffe://")
	if !ok {
		return bad("another scheme")
	}
	parts := strings.Split(rest, "/")
	if len(parts) < 3 {
		return bad("role or name missing")
	}
	for _, p := range parts {
		if p == "" || p == "." || p == ".." {
			return bad("empty or dot segment")
		}
		for _, r := range p {
			if !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '.' || r == '-' || r == '_') {
				return bad("character outside a-z 0-9 . - _")
			}
		}
	}
	return Identity{TrustDomain: parts[0], Role: parts[1], Name: strings.Join(parts[2:], "/")}, nil
}
