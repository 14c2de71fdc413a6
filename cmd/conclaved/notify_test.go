package main

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/notify"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
	"github.com/conclave-kms/conclave/kms/wire"
)

// told is what a notifier has around it.
type told struct {
	st    *state.State
	fresh time.Duration
	on    []wire.Alarm
	got   []notify.Notice
	fail  error
}

func (f *told) State() *state.State          { return f.st }
func (f *told) Fresh() time.Duration         { return f.fresh }
func (f *told) Standing() []wire.Alarm       { return f.on }
func (f *told) Put(l ...notify.Notice) error { f.got = l; return f.fail }

// TestNotifier: open proposals are told by a node that is up to date, alarms by every one.
func TestNotifier(t *testing.T) {
	w := statetest.New(t, statetest.Options{})
	w.CreateKeyring("coalition", w.State().Sites()[0].ID)
	w.CreateKey("coalition", "orders", kms.Encrypt)
	id := w.Propose(kms.ActionRotate, "key/coalition/orders", nil)
	f := &told{st: w.State(), fresh: time.Hour, on: []wire.Alarm{{ID: "node:node/de-1@1", Kind: wire.AlarmNode, Subject: "node/de-1", Text: "nothing was heard"}}}
	n := &notifier{node: "fr-1", log: slog.New(slog.DiscardHandler), outbox: f, alarms: f, cluster: f}
	n.look(t.Context())
	if len(f.got) != 1 || f.got[0].Kind != wire.AlarmNode || f.got[0].Node != "fr-1" || f.got[0].Cluster != w.State().Cluster() {
		t.Errorf("%+v", f.got)
	}
	f.fresh, f.fail = time.Second, errors.New("the disk is full")
	n.look(t.Context())
	if len(f.got) != 2 || !n.failing {
		t.Fatalf("%+v", f.got)
	}
	p := f.got[0]
	if p.Kind != notify.KindProposal || p.Proposal != id || p.Subject != "key/coalition/orders" || p.Index == 0 || p.Expires == nil || !strings.Contains(p.Text, "rotate") || !strings.Contains(p.Text, "missing: ") {
		t.Errorf("%+v", p)
	}
}

// TestWebhooks reads the key that a configuration names, and refuses one that others can read.
func TestWebhooks(t *testing.T) {
	path := writeConfigFile(t, strings.Replace(goodConfig, "[api]", "[notify.desk]\nurl = \"https://desk.example/\"\nkey = \"desk.key\"\nkinds = [\"proposal\"]\n[api]", 1))
	c, err := loadConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(filepath.Dir(path), "desk.key")
	const key = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
	for _, x := range []struct {
		text string
		mode os.FileMode
		want string
	}{{"", 0, "no such file"}, {key, 0o640, "chmod 600"}, {"whsec_x", 0o600, "a key is not"}, {strings.Repeat("x", maxWebhookKeys+1), 0o600, "more than"}} {
		if x.mode != 0 {
			if err := errors.Join(os.WriteFile(file, []byte(x.text), x.mode), os.Chmod(file, x.mode)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := c.Notify.webhooks(); err == nil || !strings.Contains(err.Error(), "notify.desk.key: ") || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%q: %v", x.want, err)
		}
	}
	if err := os.WriteFile(file, []byte(key+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	hooks, err := c.Notify.webhooks()
	if err != nil || len(hooks) != 1 || hooks[0].Name != "desk" || len(hooks[0].Keys) != 1 || len(hooks[0].Kinds) != 1 {
		t.Fatal(len(hooks), err)
	}
	box, err := notify.Open(filepath.Join(t.TempDir(), "notices.db"), hooks, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := box.Close(); err != nil {
		t.Fatal(err)
	}
}
