package chaos

import (
	"os"
	"path/filepath"

	"github.com/conclave-kms/conclave/test/harness"
)

// SoftHSM writes a token's own file anew at each login, in place: it is empty for a moment,
// and a process that is killed just then leaves it so. The token is then no token any more,
// which no HSM would let happen and nothing above it can mend. The file holds label and
// PINs, no keys and no counter, so a copy of it from before stands for the hardware that SoftHSM is not.

// tokenFiles are copies of the tokens' own files, by path.
type tokenFiles map[string][]byte

func tokensOf(n *harness.Node) []string {
	l, _ := filepath.Glob(filepath.Join(n.Dir, "token", "tokens", "*", "token.object")) // the pattern is well formed
	return l
}

// keepTokens copies the tokens' own files while no node is disturbed.
func keepTokens(nodes []*harness.Node) tokenFiles {
	kept := tokenFiles{}
	for _, n := range nodes {
		for _, path := range tokensOf(n) {
			if b, err := os.ReadFile(path); err == nil && len(b) > 0 {
				kept[path] = b
			}
		}
	}
	return kept
}

// mend puts back what SoftHSM has left empty, of a node that does not run, and reports
// whether there was anything.
func (k tokenFiles) mend(n *harness.Node) (mended bool, err error) {
	for _, path := range tokensOf(n) {
		if fi, err := os.Stat(path); err != nil || fi.Size() > 0 || len(k[path]) == 0 {
			continue
		}
		if err := os.WriteFile(path, k[path], 0o600); err != nil {
			return mended, err
		}
		mended = true
	}
	return mended, nil
}
