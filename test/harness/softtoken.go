package harness

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
)

// softTokens keeps copies of the files in which SoftHSM has its tokens' own attributes.
// SoftHSM writes that file anew, in place, at each login: the death of a process in that moment leaves
// half of it, and the token is gone. What happens to its host does not end a real token.
type softTokens struct {
	mu   sync.Mutex
	kept map[string][]byte // by path
}

// keep takes copies where a file is whole: as long as it was before.
func (s *softTokens) keep(dir string) error {
	return s.each(dir, func(path string, now []byte) error {
		if len(now) >= len(s.kept[path]) {
			s.kept[path] = now
		}
		return nil
	})
}

// mend puts a file back that was cut short.
func (s *softTokens) mend(dir string) error {
	return s.each(dir, func(path string, now []byte) error {
		if len(now) >= len(s.kept[path]) {
			return nil
		}
		return os.WriteFile(path, s.kept[path], 0o600)
	})
}

func (s *softTokens) each(dir string, f func(path string, now []byte) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.kept == nil {
		s.kept = map[string][]byte{}
	}
	paths, err := filepath.Glob(filepath.Join(dir, "token", "tokens", "*", "token.object"))
	if err != nil {
		return err
	}
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err == nil {
			err = f(path, b)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // a site without a token of SoftHSM
			return err
		}
	}
	return nil
}
