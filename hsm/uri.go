package hsm

import (
	"path/filepath"
	"strconv"
	"strings"
)

// URI is the part of a PKCS#11 URI (RFC 7512) that names a token and its
// library. Attributes that name an object are not accepted: the device keys are
// found by Config.Label.
type URI struct {
	Token        string // CKA label of the token
	Manufacturer string
	Model        string
	Serial       string
	SlotID       *uint  // narrows the search; slot ids may change at a restart
	ModulePath   string // absolute path of the PKCS#11 library
	PINSource    string // absolute path of the file that holds the PIN
}

const maxURI = 4096

// ParseURI parses a PKCS#11 URI such as
//
//	pkcs11:token=site-fr;serial=0123?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/etc/conclave/pin
//
// It accepts token, manufacturer, model, serial and slot-id in the path, and
// module-path and pin-source in the query, each at most once. It refuses
// pin-value, since a PIN inside a URI leaks through arguments, configuration
// and logs, and every attribute that it does not know. Errors are ErrInvalid
// and never quote a value.
func ParseURI(s string) (*URI, error) {
	u := &URI{}
	if err := u.parse(s, u.setPath); err != nil {
		return nil, err
	}
	return u, nil
}

// parse reads s into u; setPath takes the attributes of the path.
func (u *URI) parse(s string, setPath func(name, value string) error) error {
	if len(s) > maxURI {
		return invalidf("PKCS#11 URI is longer than %d bytes", maxURI)
	}
	rest, ok := strings.CutPrefix(s, "pkcs11:")
	if !ok {
		return invalidf("a PKCS#11 URI begins with %q", "pkcs11:")
	}
	path, query, hasQuery := strings.Cut(rest, "?")
	seen := map[string]bool{}
	if path != "" {
		for _, part := range strings.Split(path, ";") {
			if err := u.attribute(part, pathChars, seen, setPath); err != nil {
				return err
			}
		}
	}
	if hasQuery {
		for _, part := range strings.Split(query, "&") {
			if err := u.attribute(part, queryChars, seen, u.setQuery); err != nil {
				return err
			}
		}
	}
	return nil
}

// RFC 7512 section 2.3: the characters that may stand unescaped in a value.
const (
	unreserved = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"
	pathChars  = unreserved + ":[]@!$'()*+,=" + "&"
	queryChars = unreserved + ":[]@!$'()*+,=" + "/?|"
)

func (u *URI) attribute(part, chars string, seen map[string]bool, set func(name, value string) error) error {
	name, raw, ok := strings.Cut(part, "=")
	if !ok {
		return invalidf("PKCS#11 URI: an attribute without a value")
	}
	if seen[name] {
		return invalidf("PKCS#11 URI: attribute %q stands twice", printable(name))
	}
	seen[name] = true
	if name == "pin-value" {
		return invalidf("PKCS#11 URI: pin-value is refused, a PIN in a URI leaks: write the PIN to a file and use pin-source=file:PATH")
	}
	value, ok := unescape(raw, chars)
	if !ok {
		return invalidf("PKCS#11 URI: the value of %q has a bad escape or a character that must be escaped", printable(name))
	}
	if value == "" {
		return invalidf("PKCS#11 URI: attribute %q is empty", printable(name))
	}
	return set(name, value)
}

func (u *URI) setPath(name, value string) error {
	switch name {
	case "token":
		u.Token = value
	case "manufacturer":
		u.Manufacturer = value
	case "model":
		u.Model = value
	case "serial":
		u.Serial = value
	case "slot-id":
		n, err := strconv.ParseUint(value, 10, 63)
		if err != nil || strconv.FormatUint(n, 10) != value {
			return invalidf("PKCS#11 URI: slot-id is not a decimal number")
		}
		id := uint(n)
		u.SlotID = &id
	case "object", "id", "type":
		return invalidf("PKCS#11 URI: attribute %q names an object; the device keys are found by the configured label, leave it out", name)
	default:
		return invalidf("PKCS#11 URI: attribute %q is not supported (token, manufacturer, model, serial, slot-id are)", printable(name))
	}
	return nil
}

func (u *URI) setQuery(name, value string) error {
	switch name {
	case "module-path":
		if !filepath.IsAbs(value) || strings.ContainsRune(value, 0) {
			return invalidf("PKCS#11 URI: module-path is not an absolute path")
		}
		u.ModulePath = value
	case "pin-source":
		p, err := pinSource(value)
		if err != nil {
			return err
		}
		u.PINSource = p
	default:
		return invalidf("PKCS#11 URI: query attribute %q is not supported (module-path, pin-source are)", printable(name))
	}
	return nil
}

func pinSource(v string) (string, error) {
	p := strings.TrimPrefix(v, "file:")
	if h, ok := strings.CutPrefix(p, "//"); ok { // file://host/path, host empty or localhost
		p = strings.TrimPrefix(h, "localhost")
	}
	if !filepath.IsAbs(p) || strings.HasPrefix(p, "//") || strings.ContainsRune(p, 0) {
		return "", invalidf("PKCS#11 URI: pin-source is not file: and an absolute path")
	}
	return p, nil
}

// String returns the URI in a canonical form that ParseURI accepts. It holds no
// secret.
func (u *URI) String() string {
	var path, query []string
	add := func(list *[]string, name, value, chars string) {
		if value != "" {
			*list = append(*list, name+"="+escape(value, chars))
		}
	}
	add(&path, "token", u.Token, pathChars)
	add(&path, "manufacturer", u.Manufacturer, pathChars)
	add(&path, "model", u.Model, pathChars)
	add(&path, "serial", u.Serial, pathChars)
	if u.SlotID != nil {
		add(&path, "slot-id", strconv.FormatUint(uint64(*u.SlotID), 10), pathChars)
	}
	add(&query, "module-path", u.ModulePath, queryChars)
	if u.PINSource != "" {
		add(&query, "pin-source", "file:"+u.PINSource, queryChars)
	}
	s := "pkcs11:" + strings.Join(path, ";")
	if len(query) > 0 {
		s += "?" + strings.Join(query, "&")
	}
	return s
}

func escape(s, chars string) string {
	const hex = "0123456789ABCDEF"
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if c := s[i]; strings.IndexByte(chars, c) >= 0 {
			b.WriteByte(c)
		} else {
			b.WriteByte('%')
			b.WriteByte(hex[c>>4])
			b.WriteByte(hex[c&15])
		}
	}
	return b.String()
}

func unescape(s, chars string) (string, bool) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c == '%' {
			if i+2 >= len(s) {
				return "", false
			}
			n, err := strconv.ParseUint(s[i+1:i+3], 16, 8)
			if err != nil {
				return "", false
			}
			b.WriteByte(byte(n))
			i += 2
			continue
		}
		if strings.IndexByte(chars, c) < 0 {
			return "", false
		}
		b.WriteByte(c)
	}
	return b.String(), true
}

// printable cuts an attribute's name to something fit for a message.
func printable(name string) string {
	if len(name) > 40 {
		name = name[:40] + "..."
	}
	return name
}
