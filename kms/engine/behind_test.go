package engine

import (
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// A node that has not heard yet that something exists, is permitted or is in use again
// does not say that it is not: it catches up, and where it cannot it says so.
func TestLaggingNodeRefusesNothingForGood(t *testing.T) {
	w := newWorld(t, "")
	de, as := w.at("de"), w.agents()
	service, q := caller("service", "de"), wire.EncryptRequest{Plaintext: []byte("x")}
	use := func() error {
		_, err := de.engine.Encrypt(bg, service, "ring", "key", q)
		return err
	}
	before := map[string]*state.State{"keyring": w.cluster.State()} // a service may not use what does not exist
	w.keyring("ring", "fr", "de")
	before["key"] = w.cluster.State()
	w.key("ring", "key", kms.Encrypt)
	key := approval.KeyTarget("ring", "key")
	w.carry(as, kms.ActionSuspend, key, wire.ProposalParameters{})
	wantKind(t, use(), kms.Conflict)
	before["resumed"] = w.cluster.State()
	w.carry(as, kms.ActionResume, key, wire.ProposalParameters{})
	for name, st := range before {
		de.stay(st)
		de.cutOff = true
		if err := use(); !errors.Is(err, kms.Unavailable) {
			t.Errorf("%s, cut off: %v", name, err)
		}
		if l := de.log.last(); l.Outcome != kms.Unavailable.String() || l.Resource != "ring/key" {
			t.Errorf("%s, cut off: logged %+v", name, l)
		}
		de.cutOff = false
		if err := use(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	b := wire.Batch[wire.EncryptRequest]{Items: []wire.EncryptRequest{q, q}}
	de.stay(before["keyring"])
	r, err := de.engine.EncryptBatch(bg, service, "ring", "key", b)
	if err != nil || len(r.Items) != 2 || r.Items[1].Result == nil {
		t.Errorf("a batch: %+v, %v", r, err)
	}
}

// What does not exist is said so when the node has caught up, also right after its start.
func TestRefusalsAfterCatchingUpAreFinal(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("ring", "fr")
	fr, before := w.at("fr"), w.at("fr").barriers()
	_, err := fr.engine.Encrypt(bg, caller("service", "fr"), "ring", "none", wire.EncryptRequest{})
	wantKind(t, err, kms.NotFound)
	_, err = fr.engine.Encrypt(bg, caller("service", "jp"), "ring", "none", wire.EncryptRequest{})
	wantKind(t, err, kms.Denied)
	if n := fr.barriers() - before; n != 2 {
		t.Errorf("two refusals asked %d times", n)
	}
}

// Whoever sends requests that are refused cannot keep the leader busy: those that wait
// share one question, and a node asks ten times a second at most.
func TestRefusalsShareTheirQuestions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "")
		w.keyring("ring", "fr")
		fr := w.at("fr")
		before, gate := fr.barriers(), make(chan struct{})
		ask := func() error {
			_, err := fr.engine.Encrypt(bg, caller("service", "fr"), "ring", "none", wire.EncryptRequest{})
			return err
		}
		fr.lag.gate = gate
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() { wantFinal(t, ask()) })
			synctest.Wait() // the first asks, the others come later
		}
		if n := fr.barriers() - before; n != 1 {
			t.Errorf("%d questions at a time", n)
		}
		close(gate)
		wg.Wait()
		if n := fr.barriers() - before; n != 2 {
			t.Errorf("50 requests asked %d times", n)
		}
		start := time.Now()
		for range 20 {
			wantFinal(t, ask())
		}
		if d := time.Since(start); d < 19*catchUpEvery {
			t.Errorf("20 requests in %s", d)
		}
	})
}

func wantFinal(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, kms.NotFound) {
		t.Errorf("got %v", err)
	}
}

// A batch of ciphertexts under versions that do not exist asks once.
func TestBatchAsksOnce(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("ring", "fr")
	w.key("ring", "key", kms.Encrypt)
	fr, service := w.at("fr"), caller("service", "fr")
	r := check[wire.EncryptResponse](t)(fr.engine.Encrypt(bg, service, "ring", "key", wire.EncryptRequest{}))
	r.Ciphertext[24] = 2 // the version
	b := wire.Batch[wire.DecryptRequest]{}
	for range 5 {
		b.Items = append(b.Items, wire.DecryptRequest{Ciphertext: r.Ciphertext})
	}
	before := fr.barriers()
	out := check[wire.BatchResult[wire.DecryptResponse]](t)(fr.engine.DecryptBatch(bg, service, "ring", "key", b))
	if n := fr.barriers() - before; n != 1 || out.Items[4].Problem == nil {
		t.Errorf("asked %d times, %+v", n, out.Items[4])
	}
}
