package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// Edit replaces a text that occurs once in a source file; an empty Old makes the file.
type Edit struct{ Old, New string }

// Patch is a change of source files, by their paths in the module, that is built into a
// program and never lies in the sources: a fault that tests must find, or what no
// operating system offers.
type Patch map[string][]Edit

// Files lists the files that a patch changes.
func (p Patch) Files() []string { return slices.Sorted(maps.Keys(p)) }

// Build builds conclaved with a patch into dir and returns its path. The sources stay as
// they are (go build -overlay). A text that is no longer there is an error.
func (p Patch) Build(ctx context.Context, dir string) (string, error) {
	root, err := moduleRoot()
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	replace := map[string]string{}
	for i, file := range p.Files() {
		path := filepath.Join(root, file)
		var text string
		if p[file][0].Old != "" {
			b, err := os.ReadFile(path)
			if err != nil {
				return "", err
			}
			text = string(b)
		}
		for _, e := range p[file] {
			if e.Old == "" {
				text = e.New
				continue
			}
			if n := strings.Count(text, e.Old); n != 1 {
				return "", fmt.Errorf("%s has %d places that read %q: the patch does not fit any more", file, n, e.Old)
			}
			text = strings.Replace(text, e.Old, e.New, 1)
		}
		replace[path] = filepath.Join(dir, fmt.Sprintf("%d.go", i))
		if err := os.WriteFile(replace[path], []byte(text), 0o600); err != nil {
			return "", err
		}
	}
	b, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	overlay, out := filepath.Join(dir, "overlay.json"), filepath.Join(dir, "conclaved")
	if err := os.WriteFile(overlay, b, 0o600); err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-overlay", overlay, "-o", out, "./cmd/conclaved")
	cmd.Dir = root
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("go build of the patched program: %w\n%s", err, said.Bytes())
	}
	return out, nil
}
