package hsm

import (
	"github.com/conclave-kms/conclave/kms/secret"
)

// Hold returns c with the PIN in it, read from its one source, in place of that
// source, so that c opens a token more than once even where the source is a
// descriptor. The caller destroys PIN. Errors: ErrInvalid, ErrPIN.
func (c Config) Hold() (Config, error) {
	s, err := c.settings()
	if err != nil {
		return Config{}, err
	}
	var pin *secret.Bytes
	if pin, err = c.readPIN(s.uri); err != nil {
		return Config{}, err
	}
	u := *s.uri
	u.PINSource = ""
	c.URI, c.PIN, c.PINFile, c.PINFD = u.String(), pin, "", 0
	return c, nil
}
