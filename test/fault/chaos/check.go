package chaos

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

// Verdict is what the checker found.
type Verdict struct {
	Keys, Ops  int
	Violations []string // one for each key whose history no single copy could have produced
	Undecided  []string // keys for which the search did not end in time
}

// Check holds a history against the model, key by key. Each key may take the limit.
// Pictures of violations go into dir, if it is not empty.
func Check(ops []Op, limit time.Duration, dir string) Verdict {
	parts := byKey(ops)
	var v Verdict
	for _, key := range slices.Sorted(maps.Keys(parts)) {
		part := parts[key]
		v.Keys++
		v.Ops += len(part)
		history := make([]porcupine.Operation, len(part))
		for i, o := range part {
			end := int64(o.Return)
			if o.Outcome == Unknown {
				end = math.MaxInt64
			}
			history[i] = porcupine.Operation{ClientId: o.Client, Input: o, Call: int64(o.Call), Output: o.Outcome, Return: end}
		}
		m := model()
		switch porcupine.CheckOperationsTimeout(m, history, limit) {
		case porcupine.Unknown:
			v.Undecided = append(v.Undecided, key)
		case porcupine.Illegal:
			v.Violations = append(v.Violations, explain(key, part, picture(m, history, limit, key, dir)))
		}
	}
	return v
}

// picture draws a violation and returns the file's name.
func picture(m porcupine.Model, history []porcupine.Operation, limit time.Duration, key, dir string) string {
	if dir == "" {
		return ""
	}
	_, info := porcupine.CheckOperationsVerbose(m, history, limit)
	name := filepath.Join(dir, "violation-"+strings.ReplaceAll(key, "/", "-")+".html")
	f, err := os.Create(name)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	if err := porcupine.Visualize(m, info, f); err != nil {
		return err.Error()
	}
	return name
}

// explain writes a key's history in the order of the answers.
func explain(key string, part []Op, picture string) string {
	part = slices.Clone(part)
	slices.SortFunc(part, func(a, b Op) int { return cmp.Compare(a.Return, b.Return) })
	var b strings.Builder
	fmt.Fprintf(&b, "%s: no order of these operations explains the answers %s\n", key, picture)
	for _, o := range part {
		fmt.Fprintf(&b, "  %9.3f to %9.3f s, client %d: %s\n", o.Call.Seconds(), o.Return.Seconds(), o.Client, o)
	}
	return b.String()
}
