package interop

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"testing"

	"github.com/c2sp/wycheproof"

	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/kms/state/statetest"
	"github.com/conclave-kms/conclave/pqc"
)

// minFiles is what the agreement is shown on at least.
const (
	minFiles  = 200
	composite = "../vectors/pqc/composite-mldsa65-ed25519.json"
)

// setting returns a number from the environment (make interop), or what it is
// without.
func setting(t *testing.T, name string, without int) int {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return without
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// file is evidence, true or tampered with, and what it is asked to be of.
type file struct {
	class   string
	tamper  bool
	cluster string
	b       []byte
	path    string
	ours    error
	theirs  verdict
}

// TestVerifiersAgree has both verifiers judge the same files.
func TestVerifiersAgree(t *testing.T) {
	v := startVerifier(t)
	files := corpus(t)
	dir := t.TempDir()
	for i := range files {
		files[i].path = filepath.Join(dir, fmt.Sprintf("%04d.json", i))
		if err := os.WriteFile(files[i].path, files[i].b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	judge(t, v, files)
	seconds := v.stop(t)

	type row struct{ files, accepted, refused int }
	rows, order := map[string]*row{}, []string{}
	var total, tampered, refusedTampered int
	for _, f := range files {
		r := rows[f.class]
		if r == nil {
			r = &row{}
			rows[f.class], order = r, append(order, f.class)
		}
		r.files++
		total++
		if f.tamper {
			tampered++
		}
		switch accepts := f.ours == nil; {
		case accepts != (f.theirs.Verdict == "accept"):
			keep := filepath.Join(os.TempDir(), "disagreement-"+filepath.Base(f.path))
			_ = os.WriteFile(keep, f.b, 0o600)
			t.Errorf("%s: ours says %v; Python says %s: %s (%s, cluster %q)", f.class, f.ours, f.theirs.Verdict, f.theirs.Why, keep, f.cluster)
		case accepts && len(f.theirs.NotChecked) == 0:
			t.Errorf("%s: Python names nothing that it does not check", f.class)
		case accepts:
			r.accepted++
		default:
			r.refused++
			if f.tamper {
				refusedTampered++
			}
		}
		if !f.tamper && f.ours != nil && f.class != "true, of another cluster than asked for" {
			t.Errorf("%s: true evidence is refused: %v", f.class, f.ours)
		}
	}
	t.Logf("%-46s %6s %9s %8s", "class", "files", "accepted", "refused")
	for _, c := range order {
		t.Logf("%-46s %6d %9d %8d", c, rows[c].files, rows[c].accepted, rows[c].refused)
	}
	t.Logf("%d files, %d of them tampered with (%d of these refused by both); Python took %.1f s of processor time", total, tampered, refusedTampered, seconds)
	if total < minFiles || 2*tampered < total || 2*refusedTampered < total {
		t.Error("too few files, or too few tampered with")
	}
}

// corpus returns true evidence of every world and what was made of it.
func corpus(t *testing.T) (files []file) {
	t.Helper()
	good := samples(t)
	for i, s := range good {
		b, cluster := s.e.Marshal(), s.e.Cluster
		if i%10 == 9 {
			cluster = ""
		}
		files = append(files, file{class: "true, " + s.world, cluster: cluster, b: b})
	}
	seed := uint64(setting(t, "CONCLAVE_INTEROP_SEED", 5))
	perClass := setting(t, "CONCLAVE_INTEROP_FILES", 15)
	ed := editor{t, rand.New(rand.NewPCG(seed, seed))}
	for range 5 {
		s := statetest.Pick(ed.r, good)
		files = append(files, file{class: "true, of another cluster than asked for", cluster: "0123456789abcdef0123456789abcdef", b: s.e.Marshal()})
	}
	for _, c := range classes {
		for made, tries := 0, 0; made < perClass && tries < 100*perClass; tries++ {
			s, other := statetest.Pick(ed.r, good), statetest.Pick(ed.r, good)
			b, ok := c.tamper(ed, s, other)
			if !ok || string(b) == string(s.e.Marshal()) || other.world == s.world && c.name == "something of another cluster" {
				continue
			}
			cluster := s.e.Cluster
			if made%5 == 4 {
				cluster = ""
			}
			files = append(files, file{class: c.name, tamper: true, cluster: cluster, b: b})
			made++
		}
	}
	return files
}

// judge asks both verifiers about every file, at the same time.
func judge(t *testing.T, v *verifier, files []file) {
	t.Helper()
	var all sync.WaitGroup
	next := make(chan *file)
	for range runtime.GOMAXPROCS(0) {
		all.Go(func() {
			for f := range next {
				e, err := audit.ParseEvidence(f.b)
				if err == nil {
					_, err = audit.VerifyEvidence(e, f.cluster)
				}
				f.ours = err
			}
		})
	}
	for i := range files {
		next <- &files[i]
		files[i].theirs = v.ask(t, files[i].cluster, files[i].path)
	}
	close(next)
	all.Wait()
}

// TestKnownAnswers checks what the Python verifier brings itself: ML-DSA-65 against
// Wycheproof, the composite signature against the one published with its draft.
func TestKnownAnswers(t *testing.T) {
	python, dir := findPython(t), t.TempDir()
	vectors, err := fs.ReadFile(wycheproof.TestVectors, "mldsa_65_verify_test.json")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(composite)
	if err != nil {
		t.Fatal(err)
	}
	var c struct {
		M  []byte `json:"m"`
		SK []byte `json:"sk"`
		S  []byte `json:"s"`
	}
	if err := json.Unmarshal(b, &c); err != nil {
		t.Fatal(err)
	}
	seed, err := secret.Copy(c.SK)
	if err != nil {
		t.Fatal(err)
	}
	defer seed.Destroy()
	key, err := pqc.NewHybridKey(seed)
	if err != nil {
		t.Fatal(err)
	}
	defer key.Destroy()
	// The file has the published key by its beginning alone (pqc checks it); here it is whole.
	whole, err := json.Marshal(map[string][]byte{"publicKey": key.PublicKey(), "message": c.M, "signature": c.S})
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"wycheproof.json": vectors, "composite.json": whole} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.CommandContext(t.Context(), python, "-B", "known_answers.py", filepath.Join(dir, "wycheproof.json"), filepath.Join(dir, "composite.json")).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}
