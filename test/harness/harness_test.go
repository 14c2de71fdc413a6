package harness

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestScannerFinds plants a secret in every form and at every alignment between
// other bytes and finds it each time.
func TestScannerFinds(t *testing.T) {
	secret := []byte("\x00\xff a secret of some length \xfb\xef\xbe")
	var s Scanner
	if err := s.Add("the secret", secret); err != nil {
		t.Fatal(err)
	}
	forms := map[string][]byte{
		"raw": secret, "hex": []byte(hex.EncodeToString(secret)), "HEX": []byte(strings.ToUpper(hex.EncodeToString(secret))),
	}
	for shift := range 9 {
		text := append(append(make([]byte, shift), secret...), "tail"[:shift%4]...)
		forms["std "+string(rune('0'+shift))] = []byte(base64.StdEncoding.EncodeToString(text))
		forms["url "+string(rune('0'+shift))] = []byte(base64.URLEncoding.EncodeToString(text))
	}
	for name, form := range forms {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "f"), append([]byte("before "), append(form, " after"...)...), 0o600); err != nil {
			t.Fatal(err)
		}
		found, n, err := s.Trees(dir)
		if err != nil {
			t.Fatal(err)
		}
		if len(found) == 0 || n.Files != 1 {
			t.Errorf("%s: found %v in %d files", name, found, n.Files)
		}
	}
}

func TestScannerIsQuiet(t *testing.T) {
	var s Scanner
	if err := s.Add("the secret", []byte("0123456789abcdef")); err != nil {
		t.Fatal(err)
	}
	if f := s.Bytes("f", []byte("0123456789abcdeX, 23456789abcdef0, and nothing else")); len(f) != 0 {
		t.Errorf("found %v", f)
	}
	if err := s.Add("short", []byte("1234567")); err == nil {
		t.Error("a short secret was accepted")
	}
}

func TestParseEnv(t *testing.T) {
	e, err := parseEnv("# a comment\nexport A='x'\nexport B_2='it'\\''s'\n\nexport C=''\n")
	if err != nil {
		t.Fatal(err)
	}
	if e["A"] != "x" || e["B_2"] != "it's" || len(e) != 3 {
		t.Errorf("got %v", e)
	}
	for _, bad := range []string{"", "A='x'", "export A=x", "export A='x", "export A='x' ; rm", "export a='x'"} {
		if e, err := parseEnv(bad); err == nil {
			t.Errorf("%q gave %v", bad, e)
		}
	}
}

func TestWait(t *testing.T) {
	n := 0
	err := Within(context.Background(), 10*time.Second, "three looks", func(context.Context) error {
		if n++; n < 3 {
			return errors.New("not yet")
		}
		return nil
	})
	if err != nil || n != 3 {
		t.Errorf("%d looks, %v", n, err)
	}
	missing := errors.New("the thing is missing")
	if err := Within(context.Background(), 50*time.Millisecond, "never", func(context.Context) error { return missing }); !errors.Is(err, missing) {
		t.Errorf("the last answer is not in %v", err)
	}
	n = 0
	err = Within(context.Background(), time.Minute, "hopeless", func(context.Context) error { n++; return Give(missing) })
	if !errors.Is(err, missing) || n != 1 {
		t.Errorf("%d looks, %v", n, err)
	}
}

func TestRunTakesEnvironmentAlone(t *testing.T) {
	t.Setenv("HARNESS_LEAK", "leaked")
	r, err := Run(t.Context(), "/usr/bin/env", nil, nil)
	if err != nil || r.Code != 0 || r.Stdout != "" {
		t.Errorf("an empty environment gave %q, code %d, %v", r.Stdout, r.Code, err)
	}
	r, err = Run(t.Context(), "/usr/bin/env", Env{"A": "b"}.With("C", "d"), nil)
	if err != nil || r.Text() != "A=b\nC=d" {
		t.Errorf("got %q, %v", r.Stdout, err)
	}
	r, err = Run(t.Context(), "/bin/sh", nil, strings.NewReader("exit 7"))
	if err != nil || r.Code != 7 || r.Err() == nil {
		t.Errorf("code %d, %v", r.Code, err)
	}
}
