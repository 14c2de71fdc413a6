package harness

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// minPattern is the shortest piece of a secret that is looked for: a shorter one
// would be found by chance.
const minPattern = 8

// Scanner looks for secrets in files: as they are, in hexadecimal of either
// case, and in base64 of either alphabet wherever in a longer text they begin.
type Scanner struct {
	byStart map[uint64][]pattern
	first   [1 << 16]bool // the first two bytes of the patterns: most places are passed over by these
	secrets int
}

type pattern struct {
	name string // of the secret and the form; never the secret
	b    []byte
}

// Finding is a secret in a file.
type Finding struct {
	File   string
	Offset int
	What   string
}

func (f Finding) String() string { return fmt.Sprintf("%s in %s at byte %d", f.What, f.File, f.Offset) }

// Add adds a secret under a name for people. A secret shorter than 8 bytes is
// refused.
func (s *Scanner) Add(name string, secret []byte) error {
	if len(secret) < minPattern {
		return fmt.Errorf("%s has %d bytes: too short to be looked for", name, len(secret))
	}
	if s.byStart == nil {
		s.byStart = map[uint64][]pattern{}
	}
	s.secrets++
	s.put(name+", as it is", bytes.Clone(secret))
	s.put(name+", in hexadecimal", []byte(hex.EncodeToString(secret)))
	s.put(name+", in hexadecimal", []byte(strings.ToUpper(hex.EncodeToString(secret))))
	for shift := range 3 {
		for _, enc := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
			s.put(fmt.Sprintf("%s, in base64 at alignment %d", name, shift), inner(enc, secret, shift))
		}
	}
	return nil
}

// inner returns the characters of base64 that depend on the secret alone when
// shift bytes (modulo 3) come before it and anything after it.
func inner(enc *base64.Encoding, secret []byte, shift int) []byte {
	text := enc.EncodeToString(append(make([]byte, shift), secret...))
	from := (8*shift + 5) / 6           // characters with bits of what comes before
	to := 8 * (shift + len(secret)) / 6 // characters whose bits are all the secret's
	return []byte(text[from:min(to, len(text))])
}

func (s *Scanner) put(name string, b []byte) {
	if len(b) < minPattern {
		return
	}
	start := binary.LittleEndian.Uint64(b)
	for _, p := range s.byStart[start] {
		if bytes.Equal(p.b, b) {
			return
		}
	}
	s.byStart[start] = append(s.byStart[start], pattern{name, b})
	s.first[binary.LittleEndian.Uint16(b)] = true
}

// Secrets returns how many secrets were added.
func (s *Scanner) Secrets() int { return s.secrets }

// Bytes looks through b, which came from a file of that name.
func (s *Scanner) Bytes(file string, b []byte) []Finding {
	var found []Finding
	for i := s.next(b, 0); i >= 0; i = s.next(b, i+1) {
		for _, p := range s.byStart[binary.LittleEndian.Uint64(b[i:])] {
			if bytes.HasPrefix(b[i:], p.b) {
				found = append(found, Finding{file, i, p.name})
			}
		}
	}
	return found
}

// next returns the next place from i on where a pattern may begin, -1 for none.
// Hundreds of megabytes pass through here, so it is not slowed down for the race
// detector: b belongs to the caller.
//
//go:norace
func (s *Scanner) next(b []byte, i int) int {
	for ; i+minPattern <= len(b); i++ {
		if s.first[uint16(b[i])|uint16(b[i+1])<<8] {
			return i
		}
	}
	return -1
}

// Scanned says how much was looked at.
type Scanned struct {
	Files int
	Bytes int64
}

// Trees looks through every regular file at or below the paths. A file that
// cannot be read is an error, one that goes away meanwhile is not.
func (s *Scanner) Trees(paths ...string) ([]Finding, Scanned, error) {
	var found []Finding
	var n Scanned
	for _, root := range paths {
		if _, err := os.Stat(root); err != nil {
			return found, n, err
		}
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if !d.Type().IsRegular() {
				return nil
			}
			b, err := os.ReadFile(path)
			if os.IsNotExist(err) && path != root {
				return nil
			}
			if err != nil {
				return err
			}
			n.Files++
			n.Bytes += int64(len(b))
			found = append(found, s.Bytes(path, b)...)
			return nil
		})
		if err != nil {
			return found, n, err
		}
	}
	return found, n, nil
}
