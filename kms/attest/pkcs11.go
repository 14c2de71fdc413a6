package attest

import (
	"bytes"
	"crypto/sha256"
	"slices"
	"strings"
)

// wanted are the values of attributes by which a token says that a key was made in
// it and cannot leave it (PKCS#11 v3.0, section 4.9).
var wanted = map[string]string{
	"CKA_LOCAL": "true", "CKA_SENSITIVE": "true", "CKA_ALWAYS_SENSITIVE": "true",
	"CKA_EXTRACTABLE": "false", "CKA_NEVER_EXTRACTABLE": "true",
}

// allowing are the attributes that allow a use of a key.
var allowing = []string{"CKA_DECRYPT", "CKA_DERIVE", "CKA_ENCRYPT", "CKA_SIGN", "CKA_SIGN_RECOVER", "CKA_UNWRAP", "CKA_VERIFY", "CKA_WRAP"}

func (p *PKCS11) verify(s Subject, r *Report) error {
	if !bytes.Equal(p.Subject, Qualifying(s)) {
		return invalid("the document is about another node or other keys")
	}
	r.claimed("that its keys are in a PKCS#11 token at all: such a token signs no statement that others can verify")
	for _, k := range p.Keys {
		k.report(r)
	}
	if len(p.Vendor) > 0 {
		r.claimed("the vendor's attestation, %d bytes with SHA-256 %x: this program cannot read it, the vendor's tool can", len(p.Vendor), sha256.Sum256(p.Vendor))
	}
	return nil
}

// report says what the token returned of the attributes that matter, and of those
// that allow a use.
func (k PKCS11Key) report(r *Report) {
	var good, bad, uses []string
	for _, f := range k.Facts {
		text := f.Name + " " + f.Value
		switch want, ok := wanted[f.Name]; {
		case ok && want == f.Value:
			good = append(good, text)
		case ok:
			bad = append(bad, text)
		case slices.Contains(allowing, f.Name) && f.Value == "true":
			uses = append(uses, f.Name)
		}
	}
	if len(uses) == 0 {
		uses = []string{"nothing that it names"}
	}
	if len(good) > 0 {
		r.claimed("of its %s key the token returned: %s; allowed: %s", k.Role, strings.Join(good, ", "), strings.Join(uses, ", "))
	}
	if len(bad) > 0 {
		r.claimed("of its %s key the token did NOT return what a key that never leaves it has: %s", k.Role, strings.Join(bad, ", "))
	}
	if missing := absent(k.Facts); len(missing) > 0 {
		r.claimed("of its %s key the token said nothing about: %s", k.Role, strings.Join(missing, ", "))
	}
}

func absent(facts []Fact) (missing []string) {
	for name := range wanted {
		if !slices.ContainsFunc(facts, func(f Fact) bool { return f.Name == name }) {
			missing = append(missing, name)
		}
	}
	slices.Sort(missing)
	return missing
}
