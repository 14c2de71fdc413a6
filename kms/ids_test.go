package kms

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"testing"
)

func TestCheckName(t *testing.T) {
	for _, s := range []string{"a", "0", "payments", "fr-1", "a--b", "1a", strings.Repeat("x", MaxName)} {
		if err := CheckName("key", s); err != nil {
			t.Errorf("%q: %v", s, err)
		}
	}
	for _, s := range []string{
		"", "-", "-a", "a-", "A", "aB", "a.b", "a_b", "a/b", "a b", " a", "a\n", "a\x00", "é", "aé", "é-a", "..", "a\u200bb", "\xff", "a\xff",
		strings.Repeat("x", MaxName+1),
	} {
		err := CheckName("key", s)
		if KindOf(err) != Invalid || !strings.HasPrefix(err.Error(), "key ") {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestKeyID(t *testing.T) {
	id := KeyID{0: 0xab, 15: 1}
	if id.String() != "ab000000000000000000000000000001" {
		t.Error(id.String())
	}
	if back, err := ParseKeyID(id.String()); err != nil || back != id {
		t.Errorf("no round trip: %v", err)
	}
	for _, s := range []string{"", "ab", id.String()[1:], id.String() + "00", "zz" + id.String()[2:]} {
		if _, err := ParseKeyID(s); KindOf(err) != Invalid {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestClusterID(t *testing.T) {
	genesis := []byte("genesis")
	sum := sha256.Sum256(append([]byte("conclave/genesis/v1\x00"), genesis...))
	if got := ClusterID(genesis); got != hex.EncodeToString(sum[:])[:32] {
		t.Error(got)
	}
	if ClusterID(nil) == ClusterID([]byte{0}) {
		t.Error("two documents, one identifier")
	}
}

func TestKeyPath(t *testing.T) {
	ring, key, err := SplitKeyPath(KeyPath("coalition", "payments"))
	if err != nil || ring != "coalition" || key != "payments" {
		t.Errorf("no round trip: %q %q %v", ring, key, err)
	}
	for _, s := range []string{"", "/", "a", "a/", "/a", "a/b/c", "A/b", "a/B", "a//b", "../b", "a/..", " a/b"} {
		if ring, key, err := SplitKeyPath(s); KindOf(err) != Invalid || ring != "" || key != "" {
			t.Errorf("%q: %q %q %v", s, ring, key, err)
		}
	}
}

func TestIdentity(t *testing.T) {
	for s, want := range map[string]Identity{
		"spiffe://fr.example/service/payroll":       {"fr.example", "service", "payroll"},
		"spiffe://de/node/de-1":                     {"de", "node", "de-1"},
		"spiffe://jp.example/operator/team/a_b/c.d": {"jp.example", "operator", "team/a_b/c.d"},
	} {
		got, err := ParseIdentity(s)
		if err != nil || got != want || got.String() != s {
			t.Errorf("%q: %+v %v", s, got, err)
		}
	}
	for _, s := range []string{
		"", "spiffe://", "spiffe:///service/a", "spiffe://fr", "spiffe://fr/", "spiffe://fr/service", "spiffe://fr/service/", "spiffe://fr//a",
		"spiffe://fr/service//a", "spiffe://fr/service/.", "spiffe://fr/service/..", "spiffe://fr/../a", "spiffe://../service/a",
		"spiffe://fr/service/a/", "SPIFFE://fr/service/a", "https://fr/service/a", "spiffe:/fr/service/a", "spiffe://FR/service/a",
		"spiffe://fr/Service/a", "spiffe://fr/service/A", "spiffe://fr:443/service/a", "spiffe://u@fr/service/a", "spiffe://fr/service/a?b",
		"spiffe://fr/service/a#b", "spiffe://fr/service/%61", "spiffe://fr/service/a b", "spiffe://fr/service/a\x00", "spiffe://fr/service/é",
		"spiffe://fr/service/*", "spiffe://fr/service/\xff", " spiffe://fr/service/a",
		"spiffe://fr/service/" + strings.Repeat("a", MaxIdentity),
	} {
		if id, err := ParseIdentity(s); KindOf(err) != Unauthenticated || id != (Identity{}) {
			t.Errorf("%q: %+v %v", s, id, err)
		}
	}
	longest := "spiffe://fr/service/"
	longest += strings.Repeat("a", MaxIdentity-len(longest))
	if _, err := ParseIdentity(longest); err != nil {
		t.Error(err)
	}
}

func FuzzParseIdentity(f *testing.F) {
	f.Add("spiffe://fr.example/service/payroll")
	f.Add("spiffe://fr/service/../a")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseIdentity(s)
		if err != nil {
			return
		}
		if id.String() != s || id.TrustDomain == "" || id.Role == "" || id.Name == "" || strings.Contains(s, "/../") {
			t.Errorf("%q is read as %+v", s, id)
		}
	})
}

func FuzzSplitKeyPath(f *testing.F) {
	f.Add("coalition/payments")
	f.Add("a//b")
	f.Fuzz(func(t *testing.T, s string) {
		ring, key, err := SplitKeyPath(s)
		if err == nil && (KeyPath(ring, key) != s || strings.Count(s, "/") != 1) {
			t.Errorf("%q is read as %q and %q", s, ring, key)
		}
	})
}
