package hsm

import "strings"

// CredentialURI is a PKCS#11 URI (RFC 7512) that names one private key in a token: a
// custodian's credential.
type CredentialURI struct {
	URI
	Object string // CKA_LABEL, "" for any
	ID     string // CKA_ID, its bytes, "" for any
}

// ParseCredentialURI parses a PKCS#11 URI such as
//
//	pkcs11:token=YubiKey%20PIV;id=%02?module-path=/usr/lib/libykcs11.so
//
// It accepts what ParseURI accepts and object, id and type=private, and needs the
// token or its serial, and module-path. Errors are ErrInvalid and never quote a value.
func ParseCredentialURI(s string) (*CredentialURI, error) {
	u := &CredentialURI{}
	err := u.parse(s, func(name, value string) error {
		switch name {
		case "object":
			u.Object = value
		case "id":
			u.ID = value
		case "type":
			if value != "private" {
				return invalidf("PKCS#11 URI: type is not private: a custodian signs with a private key")
			}
		default:
			return u.setPath(name, value)
		}
		return nil
	})
	switch {
	case err != nil:
		return nil, err
	case u.Token == "" && u.Serial == "":
		return nil, invalidf("PKCS#11 URI names neither token nor serial")
	case u.ModulePath == "":
		return nil, invalidf("PKCS#11 URI has no module-path (YubiKey: ?module-path=/usr/lib/x86_64-linux-gnu/libykcs11.so; SoftHSM: ?module-path=/usr/lib/softhsm/libsofthsm2.so)")
	}
	return u, nil
}

// String returns the URI in a canonical form that ParseCredentialURI accepts. It holds
// no secret.
func (u *CredentialURI) String() string {
	path, query, hasQuery := strings.Cut(u.URI.String(), "?")
	for _, a := range []struct{ name, value string }{{"object", u.Object}, {"id", u.ID}} {
		if a.value == "" {
			continue
		}
		if !strings.HasSuffix(path, ":") {
			path += ";"
		}
		path += a.name + "=" + escape(a.value, pathChars)
	}
	if hasQuery {
		path += "?" + query
	}
	return path
}
