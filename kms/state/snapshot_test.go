package state_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/fxamacker/cbor/v2"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
)

func snapshot(t testing.TB, s *state.State) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := s.Snapshot(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func yes([32]byte) bool { return true }
func no([32]byte) bool  { return false }

func TestSnapshotRoundTrip(t *testing.T) {
	w := rich(t)
	s := w.State()
	b := snapshot(t, s)
	for name, trusted := range map[string]func([32]byte) bool{"trusted": yes, "untrusted": no, "nil": nil} {
		got, err := state.Restore(iotest.OneByteReader(bytes.NewReader(b)), trusted)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got.Hash() != s.Hash() || got.Index() != s.Index() || got.Clock() != s.Clock() || !bytes.Equal(got.LogRoot(), s.LogRoot()) {
			t.Errorf("%s: restored state differs", name)
		}
		// Both go on alike.
		raw := w.Command("node-fr-1", state.Tick{}, func(e *state.Envelope) { e.Time += 1000 })
		a, ra := s.Apply(s.Index()+1, raw)
		c, rc := got.Apply(got.Index()+1, raw)
		if a.Hash() != c.Hash() || !bytes.Equal(ra.Leaf, rc.Leaf) {
			t.Errorf("%s: the restored state goes on differently", name)
		}
	}
	var seen [32]byte
	if _, err := state.Restore(bytes.NewReader(b), func(h [32]byte) bool { seen = h; return true }); err != nil || seen != s.Hash() {
		t.Errorf("the hash asked about is not the state's: %v", err)
	}
}

type record struct {
	number byte
	body   []byte
}

func split(t testing.TB, b []byte) (l []record) {
	t.Helper()
	for len(b) > 0 {
		n := binary.BigEndian.Uint32(b[1:5])
		l = append(l, record{b[0], b[5 : 5+n]})
		b = b[5+n:]
	}
	return l
}

// join writes records with a matching end record.
func join(l []record) []byte {
	var b []byte
	for _, r := range l {
		if r.number == 255 {
			sum := sha256.Sum256(b)
			r.body = sum[:]
		}
		b = append(b, r.number)
		b = binary.BigEndian.AppendUint32(b, uint32(len(r.body)))
		b = append(b, r.body...)
	}
	return b
}

// alterations calls f with every version of v in which one value is altered.
func alterations(path string, v any, f func(path string, v any)) {
	switch v := v.(type) {
	case map[any]any:
		keys := make([]string, 0, len(v))
		for k := range v {
			keys = append(keys, k.(string))
		}
		slices.Sort(keys)
		for _, k := range keys {
			old := v[k]
			alterations(path+"."+k, old, func(p string, n any) { v[k] = n; f(p, v) })
			v[k] = old
		}
	case []any:
		for i := range v {
			old := v[i]
			alterations(path+"[]", old, func(p string, n any) { v[i] = n; f(p, v) })
			v[i] = old
		}
		if len(v) > 0 {
			f(path+"[-]", v[:len(v)-1])
			f(path+"[+]", append(slices.Clone(v), v[len(v)-1]))
		}
	case []byte:
		if len(v) > 0 {
			n := bytes.Clone(v)
			n[len(n)/2] ^= 1
			f(path, n)
			f(path+"(empty)", []byte{})
		} else {
			f(path+"(filled)", []byte{1})
		}
	case string:
		f(path, v+"x")
	case uint64:
		f(path, v+1)
		if v > 0 {
			f(path+"(less)", v-1)
		}
	case int64:
		f(path, v-1)
	case bool:
		f(path, !v)
	default:
		panic(fmt.Sprintf("%s: %T", path, v))
	}
}

// claims are the fields that no signed statement covers where they stand alone:
// when and where in the log a statement was applied, checked for order only.
var claims = []string{
	"kek.receipts[].index", "kek.receipts[].time", "version.receipts[].index", "version.receipts[].time",
	"proposal.votes[].index", "proposal.votes[].time", "proposal.index", "proposal.opened",
	"proposal.executed", "proposal.closed-at", "keyring.index", "refused.index", "refused.time", "release.index", "release.time",
	"rewrap.time", "rewrap.confirmed[].index", "rewrap.confirmed[].time", "rewrap-refused.index", "rewrap-refused.time", "kek.retired-at", "kek.retired-index",
	"membership.confirmed", "membership.time", "former.until", "suspension.index", "suspension.time",
	"witness.index", "witness.time", "checkpoint.index", "checkpoint.time", "checkpoint.fork.index", "checkpoint.fork.time", "cosignature.index", "cosignature.time",
	// The latest receipts and votes may be kept back: nothing else follows from them.
	"kek.receipts[-]", "version.receipts[-]", "proposal.votes[-]",
}

// erasedClaims are those of versions whose command went with their material, and
// of keys whose first version it was.
var erasedClaims = []string{
	"version.erased", "version.origin", "version.kek",
	"key.id", "key.creator", "key.rotation-period", "key.purpose", "key.algorithm",
}

// TestUntrustedRefusesAlterations alters every field of every record of an
// untrusted snapshot, one at a time.
func TestUntrustedRefusesAlterations(t *testing.T) {
	t.Parallel()
	if tried := refusesAlterations(t, rich(t).State()); tried < 370 {
		t.Errorf("only %d kinds of field tried", tried)
	}
}

// refusesAlterations alters every field of the records of the tables given, of all where
// none is, and returns how many kinds of field there are.
func refusesAlterations(t *testing.T, s *state.State, tables ...string) int {
	t.Helper()
	records := split(t, snapshot(t, s))
	names := state.VerifiedTables()
	names[0] = "header"
	tried, accepted := map[string]int{}, map[string]bool{}
	for i, r := range records {
		if names[r.number] == "" || len(tables) > 0 && !slices.Contains(tables, names[r.number]) {
			continue
		}
		var v any
		if err := cbor.Unmarshal(r.body, &v); err != nil {
			t.Fatal(err)
		}
		erased := ""
		if m, ok := v.(map[any]any); ok && r.number != 0 {
			b, _ := m["erased"].([]byte)
			stmt, _ := m["statement"].([]byte)
			if len(b) > 0 || names[r.number] == "key" && len(stmt) == 0 {
				erased = "(erased)"
			}
		}
		alterations(names[r.number], v, func(path string, v any) {
			if tried[path+erased] >= 1 {
				return
			}
			tried[path+erased]++
			changed := slices.Clone(records)
			changed[i].body = canon.Marshal(v)
			if _, err := state.Restore(bytes.NewReader(join(changed)), no); err == nil {
				accepted[path+erased] = true
			}
		})
	}
	for path := range accepted {
		field, erased := strings.CutSuffix(path, "(erased)")
		field = strings.TrimSuffix(field, "(less)")
		switch {
		case slices.Contains(claims, field):
		case erased && slices.Contains(erasedClaims, field):
		case strings.HasPrefix(field, "header.log-hashes"), field == "header.index", field == "header.log-size":
		default:
			t.Errorf("altered %s was accepted", path)
		}
	}
	return len(tried)
}

// TestUntrustedRefusesMissing leaves out, repeats and swaps records.
func TestUntrustedRefusesMissing(t *testing.T) {
	s := rich(t).State()
	records := split(t, snapshot(t, s))
	verified := state.VerifiedTables()
	tried := map[byte]int{}
	for i, r := range records {
		if r.number != 0 && verified[r.number] == "" {
			continue
		}
		if tried[r.number]++; tried[r.number] > 5 {
			continue
		}
		if _, err := state.Restore(bytes.NewReader(join(slices.Delete(slices.Clone(records), i, i+1))), no); err == nil && !traceless(t, r) {
			t.Errorf("accepted without record %d of table %d", i, r.number)
		}
		if r.number == 0 {
			continue
		}
		if _, err := state.Restore(bytes.NewReader(join(slices.Insert(slices.Clone(records), i, r))), yes); err == nil {
			t.Errorf("accepted record %d of table %d twice", i, r.number)
		}
		if records[i+1].number == r.number {
			swapped := slices.Clone(records)
			swapped[i], swapped[i+1] = swapped[i+1], swapped[i]
			if _, err := state.Restore(bytes.NewReader(join(swapped)), yes); err == nil {
				t.Errorf("accepted record %d of table %d out of order", i, r.number)
			}
		}
	}
}

// traceless reports whether a record is a proposal that was not carried out, the
// refusal of a copy, an announcement or about checkpoints: nothing else follows from it, so nobody can tell
// that it is kept back. See TestExtendsRefusesThinned.
func traceless(t *testing.T, r record) bool {
	switch state.VerifiedTables()[r.number] {
	case "refused", "release", "rewrap-refused", "witness", "checkpoint", "cosignature":
		return true
	case "proposal":
	default:
		return false
	}
	var p state.Proposal
	if err := canon.Unmarshal(r.body, &p); err != nil {
		t.Fatal(err)
	}
	return p.Progress != state.Executed
}

func TestRestoreRefusesDamage(t *testing.T) {
	b := snapshot(t, rich(t).State())
	for n := 0; n < len(b); n += 1 + len(b)/200 {
		if _, err := state.Restore(bytes.NewReader(b[:n]), yes); err == nil {
			t.Errorf("accepted cut after %d bytes", n)
		}
		bad := bytes.Clone(b)
		bad[n] ^= 0x10
		if _, err := state.Restore(bytes.NewReader(bad), yes); err == nil {
			t.Errorf("accepted with byte %d changed", n)
		}
	}
	huge := append([]byte{0, 0xff, 0xff, 0xff, 0xff}, b...)
	if _, err := state.Restore(bytes.NewReader(huge), yes); kms.KindOf(err) != kms.TooLarge {
		t.Errorf("a record of 4 GiB: %v", err)
	}
}
