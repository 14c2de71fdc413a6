package hsm

import (
	"fmt"
	"os"
	"time"

	"github.com/conclave-kms/conclave/kms/secret"
)

// maxRefused bounds how many different PINs a token may refuse; then only a
// restart helps.
const maxRefused = 16

// settled is how long a PIN file has to be unchanged before it is read again: one
// that is still being written must not cost a try.
const settled = time.Second

// userPIN is the PIN and where it comes from. It is used under Device.loginMu.
type userPIN struct {
	now     *secret.Bytes
	file    string // to be read again after a refusal; "" for a source that can be read once
	from    string // for people
	refused error  // the token refused now: it is never sent again
	spent   []*secret.Bytes
}

func (c Config) userPIN(u *URI) (*userPIN, error) {
	b, err := c.readPIN(u)
	if err != nil {
		return nil, err
	}
	p := &userPIN{now: b}
	switch {
	case c.PIN != nil:
		p.from = "the program that opened the device"
	case c.PINFD != 0:
		p.from = fmt.Sprintf("file descriptor %d", c.PINFD)
	case c.PINFile != "":
		p.file, p.from = c.PINFile, "the PIN file "+c.PINFile
	default:
		p.file, p.from = u.PINSource, "the file "+u.PINSource+" that pin-source names"
	}
	return p, nil
}

// refuse remembers that the token does not take the PIN.
func (p *userPIN) refuse(err error) error {
	advice := "start anew with the right one"
	if p.file != "" {
		advice = "correct the PIN there: a running node reads it again"
	}
	p.refused = fmt.Errorf("%w: C_Login: %w (the PIN comes from %s and is not sent again; %s)", ErrPIN, err, p.from, advice)
	return p.refused
}

// renew takes another PIN from the file after a refusal. Without one it returns the
// refusal.
func (p *userPIN) renew() error {
	if p.file == "" {
		return p.refused
	}
	if len(p.spent) >= maxRefused {
		return fmt.Errorf("%w (%d PINs were refused; a restart is needed)", p.refused, len(p.spent)+1)
	}
	st, err := os.Stat(p.file)
	if err != nil {
		return fmt.Errorf("%w; %w", p.refused, err)
	}
	if age := time.Since(st.ModTime()); age >= 0 && age < settled {
		return p.refused
	}
	b, err := readPINFile(p.file)
	if err != nil {
		return fmt.Errorf("%w; then: %w", p.refused, err)
	}
	for _, old := range append(p.spent, p.now) {
		if old.Equal(b) {
			b.Destroy()
			return p.refused
		}
	}
	p.spent = append(p.spent, p.now)
	p.now, p.refused = b, nil
	return nil
}

func (p *userPIN) destroy() {
	p.now.Destroy()
	for _, b := range p.spent {
		b.Destroy()
	}
}
