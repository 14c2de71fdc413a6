// Package arch holds the direction of imports as a test.
package arch

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"maps"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/conclave-kms/conclave"

type listed struct {
	ImportPath string
	Dir        string
	GoFiles    []string
	CgoFiles   []string
	Imports    []string
	Standard   bool
}

// packages lists ours by their path below the module.
func packages(t *testing.T) map[string]listed {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Dir,GoFiles,CgoFiles,Imports", module+"/...")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	all := map[string]listed{}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		all[strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")] = p
	}
	if len(all) < 10 {
		t.Fatalf("go list found only %d packages", len(all))
	}
	return all
}

// ours returns the imports of p that are ours, below the module.
func ours(p listed) []string {
	var in []string
	for _, i := range p.Imports {
		if rest, ok := strings.CutPrefix(i, module+"/"); ok {
			in = append(in, rest)
		}
	}
	return in
}

// under reports whether path is dir or lies below it.
func under(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// allowed says what of ours each part may import. A package matches the longest
// entry that it lies under; one that matches none is an error.
var allowed = map[string][]string{
	"kms":                     {},
	"kms/secret":              {},
	"kms/parallel":            {},
	"kms/canon":               {},
	"kms/wire":                {"kms"},
	"kms/tlog":                {"kms"},
	"kms/approval":            {"kms", "kms/canon", "pqc"},
	"kms/attest":              {"kms", "kms/canon", "pqc"},
	"kms/note":                {"kms", "pqc"},
	"kms/state":               {"kms", "kms/canon", "kms/approval", "kms/attest", "kms/note", "pqc"},
	"kms/state/statetest":     {"kms", "kms/canon", "kms/approval", "kms/attest", "kms/note", "kms/secret", "kms/state", "kms/tlog", "pqc"},
	"kms/audit":               {"kms", "kms/canon", "kms/approval", "kms/attest", "kms/note", "kms/state", "kms/tlog", "pqc"},
	"kms/sink":                {"kms/audit"},
	"kms/anomaly":             {"kms"},
	"kms/notify":              {"kms", "kms/secret", "kms/state", "kms/wire"},
	"kms/backup":              {"kms", "kms/canon", "kms/parallel", "kms/state", "pqc"},
	"kms/keyring":             {"kms", "kms/canon", "kms/secret", "pqc"},
	"kms/engine":              {"kms", "kms/canon", "kms/secret", "kms/approval", "kms/note", "kms/state", "kms/tlog", "kms/audit", "kms/backup", "kms/keyring", "kms/wire", "pqc"},
	"kms/api/native":          {"kms", "kms/secret", "kms/engine", "kms/wire"},
	"kms/client":              {"kms", "kms/secret", "kms/wire"},
	"kms/recovery":            {"kms", "kms/canon", "kms/secret", "kms/approval", "kms/keyring", "pqc"},
	"pqc":                     {"kms/secret"},
	"hsm":                     {"kms/secret"},
	"hsm/hsmtest":             {"kms/secret", "hsm"},
	"hsm/child":               {"kms/secret", "hsm"},
	"hsm/child/shimtest":      {},
	"tpm":                     {"kms/secret"},
	"tpm/tpmtest":             {"kms/secret", "tpm"},
	"cluster":                 {"kms", "kms/canon", "kms/parallel", "kms/state", "pqc"},
	"cluster/clustertest":     {"kms", "kms/canon", "kms/approval", "kms/state", "kms/state/statetest", "pqc", "cluster"},
	"cluster/clustertest/sim": {"kms", "kms/canon", "kms/approval", "kms/state", "kms/state/statetest", "pqc", "cluster", "cluster/clustertest"},
	"cmd":                     {"kms", "hsm", "tpm", "cluster", "pqc", "cmd"},
	"test":                    {"kms", "hsm", "tpm", "cluster", "pqc", "test"},
}

// subtrees are entries of allowed lists that stand for everything below them.
var subtrees = map[string]bool{"cmd": true, "test": true}

func rule(path string) (dir string, imports []string, ok bool) {
	for d := path; ; d = filepath.Dir(d) {
		if l, found := allowed[d]; found && (d == path || subtrees[d] || d != "kms") {
			return d, l, true
		}
		if d == "." || d == "/" || !strings.Contains(d, "/") {
			return "", nil, false
		}
	}
}

func permits(dir string, imports []string, path string) bool {
	for _, a := range imports {
		if a == path || subtrees[dir] && under(path, a) {
			return true
		}
	}
	return false
}

func TestDirection(t *testing.T) {
	for path, p := range packages(t) {
		if path == "" {
			t.Errorf("a package at the top: %s", p.Dir)
			continue
		}
		dir, imports, ok := rule(path)
		if !ok {
			t.Errorf("%s: no rule says what it may import", path)
			continue
		}
		for _, i := range ours(p) {
			if !permits(dir, imports, i) {
				t.Errorf("%s must not import %s", path, i)
			}
		}
	}
}

func TestNothingImportsCmdOrTest(t *testing.T) {
	for path, p := range packages(t) {
		for _, i := range ours(p) {
			if under(i, "cmd") && !under(path, "cmd") || under(i, "test") && !under(path, "test") {
				t.Errorf("%s imports %s", path, i)
			}
		}
	}
}

// TestVocabularyIsStandardLibraryOnly keeps package kms free of dependencies.
func TestVocabularyIsStandardLibraryOnly(t *testing.T) {
	for _, i := range packages(t)["kms"].Imports {
		if strings.Contains(strings.Split(i, "/")[0], ".") {
			t.Errorf("kms imports %s", i)
		}
	}
}

// pure packages decide; they may not look at the world.
var pure = []string{"kms", "kms/canon", "kms/approval", "kms/attest", "kms/note", "kms/state", "kms/anomaly"}

// impure standard packages, and functions that make a package of ours impure.
var (
	impurePackages = []string{"os", "net", "net/http", "log", "log/slog", "math/rand", "math/rand/v2", "os/exec", "syscall", "context"}
	impureCalls    = map[string][]string{"time": {"Now", "Since", "Until", "After", "Tick", "NewTimer", "NewTicker", "Sleep", "AfterFunc"}}
)

func TestPurePackages(t *testing.T) {
	all := packages(t)
	for _, path := range pure {
		p, ok := all[path]
		if !ok {
			t.Errorf("%s does not exist", path)
			continue
		}
		for _, i := range p.Imports {
			if slices.Contains(impurePackages, i) || path == "kms/state" && i == "crypto/rand" {
				t.Errorf("%s imports %s: a pure package has no clock, randomness or I/O", path, i)
			}
		}
		if starts := goStatements(t, p); len(starts) > 0 {
			t.Errorf("%s starts goroutines: %v", path, starts)
		}
		for _, dep := range closure(all, path) {
			if calls := clockCalls(t, all[dep]); len(calls) > 0 {
				t.Errorf("%s depends on %s, which reads the clock: %v", path, dep, calls)
			}
		}
	}
}

// closure returns path and everything of ours below it.
func closure(all map[string]listed, path string) []string {
	seen := map[string]bool{}
	var walk func(string)
	walk = func(p string) {
		if seen[p] {
			return
		}
		seen[p] = true
		for _, i := range ours(all[p]) {
			walk(i)
		}
	}
	walk(path)
	return slices.Sorted(maps.Keys(seen))
}

func files(t *testing.T, p listed) (*token.FileSet, []*ast.File) {
	t.Helper()
	fset := token.NewFileSet()
	var parsed []*ast.File
	for _, name := range slices.Concat(p.GoFiles, p.CgoFiles) {
		f, err := parser.ParseFile(fset, filepath.Join(p.Dir, name), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		parsed = append(parsed, f)
	}
	return fset, parsed
}

func clockCalls(t *testing.T, p listed) []string {
	fset, parsed := files(t, p)
	var found []string
	for _, f := range parsed {
		ast.Inspect(f, func(n ast.Node) bool {
			if sel, ok := n.(*ast.SelectorExpr); ok {
				if id, ok := sel.X.(*ast.Ident); ok && slices.Contains(impureCalls[id.Name], sel.Sel.Name) {
					found = append(found, fmt.Sprintf("%s %s.%s", fset.Position(n.Pos()), id.Name, sel.Sel.Name))
				}
			}
			return true
		})
	}
	return found
}

func goStatements(t *testing.T, p listed) []string {
	fset, parsed := files(t, p)
	var found []string
	for _, f := range parsed {
		ast.Inspect(f, func(n ast.Node) bool {
			if _, ok := n.(*ast.GoStmt); ok {
				found = append(found, fset.Position(n.Pos()).String())
			}
			return true
		})
	}
	return found
}
