package engine

import (
	"context"
	"errors"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/wire"
)

// A node that cannot catch up refuses administrative requests, as it cannot know
// whether its answer is true, or the caller still has the right to ask. It goes on with data
// operations and what it tells of itself, and shows its own view to who asks for that.
func TestCutOffNodeRefuses(t *testing.T) {
	w := newWorld(t, "")
	fr := w.at("fr")
	w.keyring("ring", "fr")
	w.key("ring", "key", kms.Encrypt)
	ctx, operator, service := t.Context(), caller("operator", "fr"), caller("service", "fr")
	fr.cutOff = true
	reads := map[string]func(c Caller) error{
		"nodes":      func(c Caller) error { _, err := fr.engine.Nodes(ctx, c); return err },
		"sites":      func(c Caller) error { _, err := fr.engine.Sites(ctx, c); return err },
		"custodians": func(c Caller) error { _, err := fr.engine.Custodians(ctx, c); return err },
		"policies":   func(c Caller) error { _, err := fr.engine.Policies(ctx, c); return err },
		"keyrings":   func(c Caller) error { _, err := fr.engine.Keyrings(ctx, c); return err },
		"keyring":    func(c Caller) error { _, err := fr.engine.Keyring(ctx, c, "ring"); return err },
		"keys":       func(c Caller) error { _, err := fr.engine.Keys(ctx, c, "ring"); return err },
		"key":        func(c Caller) error { _, err := fr.engine.Key(ctx, c, "ring", "key"); return err },
		"proposals":  func(c Caller) error { _, err := fr.engine.Proposals(ctx, c, wire.ProposalQuery{}); return err },
	}
	for name, read := range reads {
		if err := read(operator); !errors.Is(err, kms.Unavailable) {
			t.Errorf("%s of a node that is cut off: %v", name, err)
		}
		local := operator
		local.Local = true
		if err := read(local); err != nil {
			t.Errorf("its local view of %s: %v", name, err)
		}
	}
	operator.Local = true // means nothing to a write
	if _, err := fr.engine.CreateKey(ctx, operator, "ring", wire.CreateKeyRequest{Name: "another", Purpose: string(kms.Encrypt)}); !errors.Is(err, kms.Unavailable) {
		t.Errorf("a write: %v", err)
	}
	if _, ok := w.cluster.State().Key("ring", "another"); ok {
		t.Error("it was made all the same")
	}
	if _, err := fr.engine.Status(ctx, service); err != nil {
		t.Errorf("its status: %v", err)
	}
	if _, err := fr.engine.Encrypt(ctx, service, "ring", "key", wire.EncryptRequest{Plaintext: []byte("data")}); err != nil {
		t.Errorf("a data operation: %v", err)
	}
}

// failingLog is an access log that takes no entries.
type failingLog struct{ Log }

func (failingLog) Append(context.Context, audit.Entry) error {
	return kms.Errorf(kms.ReadOnly, "the disk is full")
}

// A change whose answer is withheld, because it cannot be logged, may have been made:
// that is unknown, not refused.
func TestWrittenButNotLogged(t *testing.T) {
	w := newWorld(t, "")
	fr := w.at("fr")
	w.keyring("ring", "fr")
	fr.engine.cfg.Log = failingLog{}
	_, err := fr.engine.CreateKey(t.Context(), caller("operator", "fr"), "ring", wire.CreateKeyRequest{Name: "key", Purpose: string(kms.Encrypt)})
	if _, ok := w.cluster.State().Key("ring", "key"); !ok || !errors.Is(err, kms.Unknown) {
		t.Errorf("made: %v, answer: %v", ok, err)
	}
}
