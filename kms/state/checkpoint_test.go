package state_test

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/note"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// witnessed returns a cluster of three sites whose nodes have registered their keys.
func witnessed(t testing.TB) *statetest.World {
	w := statetest.New(t, statetest.Options{})
	for _, id := range w.NodeIDs() {
		w.Do(id, w.RegisterCommand(id))
	}
	return w
}

func TestRegisterWitness(t *testing.T) {
	w := statetest.New(t, statetest.Options{})
	w.Refuse(kms.Conflict, fr, w.CheckpointCommand(fr, w.Grow(fr, 1)))
	c := w.RegisterCommand(fr)
	w.Do(fr, c)
	w.Refuse(kms.Exists, fr, c)
	w.Refuse(kms.BadSignature, de, c) // it shows possession at another node
	for name, alter := range map[string]func(*state.RegisterWitness){
		"number 0":     func(c *state.RegisterWitness) { c.Number = 0 },
		"a short key":  func(c *state.RegisterWitness) { c.PublicKey = c.PublicKey[1:] },
		"no signature": func(c *state.RegisterWitness) { c.Possession = nil },
		"a high one":   func(c *state.RegisterWitness) { c.Number = state.MaxWitnessKeys + 1 },
	} {
		bad := w.RegisterCommand(fr)
		alter(&bad)
		if r := w.Apply(w.Command(fr, bad)); r.Kind != kms.Invalid {
			t.Errorf("%s: %v", name, r.Err())
		}
	}
	bad := w.RegisterCommand(fr)
	bad.Number++
	w.Refuse(kms.BadSignature, fr, bad)
	w.Refuse(kms.Invalid, fr, w.RegisterCommand(fr), statetest.As(w.Operator("fr")))

	// A new hardware root leaves the key, and a lost key is followed by another.
	w.Rekey(fr)
	if got, ok := w.State().Witness(fr); !ok || got.Number != 1 || !bytes.Equal(got.PublicKey, c.PublicKey) {
		t.Errorf("after a new root: %v", got.Number)
	}
	w.Do(fr, w.CheckpointCommand(fr, w.Grow(fr, 1)))
	w.Advance(time.Second)
	next := w.RegisterCommand(fr)
	w.Do(fr, next)
	if got, _ := w.State().Witness(fr); got.Number != 2 || !bytes.Equal(got.PublicKey, next.PublicKey) {
		t.Errorf("number %d", got.Number)
	}
	fullyRestored(t, w.State())
}

func TestSubmitCheckpoint(t *testing.T) {
	w := witnessed(t)
	log := w.Grow(fr, 5)
	first := w.CheckpointCommand(fr, log)
	w.Do(fr, first)
	stale := w.Command(fr, w.CheckpointCommand(fr, log.Fork(4)))
	w.Advance(time.Second)
	w.Refuse(kms.Exists, fr, first)
	w.Grow(fr, 7)
	good := w.CheckpointCommand(fr, log)

	restarted := good
	restarted.Restart = 1
	w.Refuse(kms.BadSignature, fr, restarted)
	w.Refuse(kms.Invalid, fr, w.SignedCheckpoint(fr, restarted)) // it may not begin anew
	unproven := good
	unproven.Proofs = nil
	w.Refuse(kms.Conflict, fr, unproven)
	w.Refuse(kms.BadSignature, de, good)
	for name, alter := range map[string]func(*state.SubmitCheckpoint){
		"size 0":       func(c *state.SubmitCheckpoint) { c.Size = 0 },
		"a short root": func(c *state.SubmitCheckpoint) { c.Root = c.Root[1:] },
		"from 0":       func(c *state.SubmitCheckpoint) { c.Proofs = []state.LogProof{{From: 0}} },
		"from itself":  func(c *state.SubmitCheckpoint) { c.Proofs = []state.LogProof{{From: c.Size}} },
		"a short hash": func(c *state.SubmitCheckpoint) { c.Proofs = []state.LogProof{{From: 1, Hashes: [][]byte{{1}}}} },
		"twice":        func(c *state.SubmitCheckpoint) { c.Proofs = append(c.Proofs, c.Proofs...) },
		"long proof":   func(c *state.SubmitCheckpoint) { c.Proofs[0].Hashes = make([][]byte, 1000) },
		"many proofs":  func(c *state.SubmitCheckpoint) { c.Proofs = make([]state.LogProof, state.MaxSites+2) },
	} {
		bad := w.CheckpointCommand(fr, log)
		alter(&bad)
		if r := w.Apply(w.Command(fr, bad)); r.Kind != kms.Invalid {
			t.Errorf("%s: %v", name, r.Err())
		}
	}
	if r := w.Apply(stale); r.Kind != kms.Conflict {
		t.Errorf("a checkpoint that comes late: %v", r.Err())
	}
	if cp, ok := w.State().Checkpoint(fr); !ok || cp.Size != 5 || !bytes.Equal(cp.Root, first.Root) || cp.Fork != nil {
		t.Fatalf("what was refused has changed the checkpoint: %+v", cp)
	}
	w.Do(fr, good)
	w.Advance(time.Second)
	// With a proof for a cosigner that is behind it may be submitted again.
	w.Do(fr, w.CheckpointCommand(fr, log, 3))
	fullyRestored(t, w.State())
}

// What a log that only grows does not give is not taken, but stays as evidence.
func TestForkedLog(t *testing.T) {
	grown := func(l *statetest.AccessLog, n int) *statetest.AccessLog {
		for range n {
			l.Add([]byte("another"))
		}
		return l
	}
	for name, f := range map[string]func(w *statetest.World, log *statetest.AccessLog) state.SubmitCheckpoint{
		"truncated": func(w *statetest.World, log *statetest.AccessLog) state.SubmitCheckpoint {
			return w.CheckpointCommand(fr, log.Fork(4))
		},
		"last entry edited": func(w *statetest.World, log *statetest.AccessLog) state.SubmitCheckpoint {
			return w.CheckpointCommand(fr, grown(log.Fork(4), 1))
		},
		"truncated and grown": func(w *statetest.World, log *statetest.AccessLog) state.SubmitCheckpoint {
			return w.CheckpointCommand(fr, grown(log.Fork(4), 8))
		},
		"another log": func(w *statetest.World, _ *statetest.AccessLog) state.SubmitCheckpoint {
			return w.CheckpointCommand(fr, grown(&statetest.AccessLog{}, 9))
		},
		"a proof altered": func(w *statetest.World, log *statetest.AccessLog) state.SubmitCheckpoint {
			c := w.CheckpointCommand(fr, grown(log.Fork(5), 3))
			c.Proofs[0].Hashes[0][0] ^= 1
			return c
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := witnessed(t)
			log := w.Grow(fr, 5)
			w.Do(fr, w.CheckpointCommand(fr, log))
			before := w.State()
			w.Advance(time.Second)
			r := w.Do(fr, f(w, log))
			cp, _ := w.State().Checkpoint(fr)
			if cp.Size != 5 || cp.Fork == nil || cp.Fork.Index != r.Index || len(r.Events) != 1 || r.Events[0].Type != state.EventLogForked {
				t.Fatalf("%+v", cp)
			}
			w.Advance(time.Second)
			w.Refuse(kms.Conflict, fr, w.CheckpointCommand(fr, w.Grow(fr, 1)))
			w.Refuse(kms.Conflict, jp, w.CosignCommand(jp, fr))
			fullyRestored(t, w.State())
			if err := w.State().Extends(before); err != nil {
				t.Error(err)
			}
			for range 20 {
				before, _ = before.Apply(before.Index()+1, []byte("noise"))
			}
			if err := before.Extends(w.State()); !errors.Is(err, kms.Conflict) {
				t.Errorf("a state without the evidence is taken: %v", err)
			}
		})
	}
}

func TestCosign(t *testing.T) {
	w := witnessed(t)
	log := w.Grow(fr, 5)
	w.Refuse(kms.Invalid, jp, w.CosignCommand(jp, fr)) // there is no checkpoint
	w.Do(fr, w.CheckpointCommand(fr, log))
	c := w.CosignCommand(jp, fr)
	w.Refuse(kms.BadSignature, de, c)
	w.Refuse(kms.Invalid, fr, w.CosignCommand(fr, fr)) // its own
	ahead := c
	ahead.Size++
	w.Refuse(kms.BadSignature, jp, ahead)
	w.Refuse(kms.Conflict, jp, w.SignedCosign(jp, ahead))
	another := c
	another.Root = bytes.Repeat([]byte{1}, 32)
	w.Refuse(kms.Conflict, jp, w.SignedCosign(jp, another))
	for name, alter := range map[string]func(*state.Cosign){
		"no log":             func(c *state.Cosign) { c.Log = "access" },
		"no node":            func(c *state.Cosign) { c.Log = "access/ " },
		"size 0":             func(c *state.Cosign) { c.Size = 0 },
		"a state's hash":     func(c *state.Cosign) { c.State = c.Root },
		"the cluster's none": func(c *state.Cosign) { c.Log = note.ClusterLog },
	} {
		bad := c
		alter(&bad)
		if r := w.Apply(w.Command(jp, bad)); r.Kind != kms.Invalid {
			t.Errorf("%s: %v", name, r.Err())
		}
	}
	w.Refuse(kms.NotFound, jp, w.SignedCosign(jp, state.Cosign{Log: note.AccessLog("nobody"), Size: 1, Root: c.Root}))
	w.Do(jp, c)
	w.Refuse(kms.Exists, jp, c)
	// A cosigner that is behind says so; the place of its site goes only forward.
	w.Advance(time.Second)
	w.Grow(fr, 5)
	w.Do(fr, w.CheckpointCommand(fr, log))
	w.Do(de, w.SignedCosign(de, state.Cosign{Log: c.Log, Size: 5, Root: c.Root}))
	w.Do(de, w.CosignCommand(de, fr))
	w.Refuse(kms.Exists, de, w.SignedCosign(de, state.Cosign{Log: c.Log, Size: 7, Root: c.Root}))
	l := w.State().Cosignatures(c.Log)
	if len(l) != 2 || l[0].Site != "de" || l[0].Size != 10 || l[1].Site != "jp" || l[1].Size != 5 || l[1].Node != jp {
		t.Errorf("%+v", l)
	}
	// The cluster log's is every site's own.
	for _, id := range []string{fr, de, jp} {
		own := w.CosignCommand(id, "")
		w.Do(id, own)
		w.Refuse(kms.Exists, id, own)
		own.Size += 1000
		w.Refuse(kms.Invalid, id, w.SignedCosign(id, own))
	}
	if l := w.State().Cosignatures(note.ClusterLog); len(l) != 3 {
		t.Errorf("%d sites have cosigned the cluster log", len(l))
	}
	fullyRestored(t, w.State())
	w.RemoveNode(jp, true)
	fullyRestored(t, w.State())
}

// After a recovery a log may begin anew, once, and counts that; cosigners begin again.
func TestCheckpointAfterRecovery(t *testing.T) {
	w := witnessed(t)
	w.Do(fr, w.CheckpointCommand(fr, w.Grow(fr, 5)))
	w.Do(de, w.CheckpointCommand(de, w.Grow(de, 5)))
	w.Do(jp, w.CosignCommand(jp, fr))
	w.Do(jp, w.CosignCommand(jp, ""))
	s, err := w.State().Recover(w.Recover(w.State(), fr, de))
	if err != nil {
		t.Fatal(err)
	}
	w.SetState(s)
	fresh := &statetest.AccessLog{}
	fresh.Add([]byte("new"))
	c := w.CheckpointCommand(fr, fresh)
	c.Restart = 1
	w.Do(fr, w.SignedCheckpoint(fr, c))
	w.Advance(time.Second)
	fresh.Add([]byte("newer"))
	c = w.CheckpointCommand(fr, fresh.Fork(1))
	c.Restart = 2
	w.Refuse(kms.Invalid, fr, w.SignedCheckpoint(fr, c))
	w.Do(fr, w.CheckpointCommand(fr, fresh))
	w.Do(jp, w.CosignCommand(jp, fr))
	w.Do(jp, w.CosignCommand(jp, ""))
	// A log that was not lost goes on.
	w.Do(de, w.CheckpointCommand(de, w.Grow(de, 1)))
	if cp, _ := w.State().Checkpoint(fr); cp.Restart != 1 || cp.Size != 2 {
		t.Errorf("%+v", cp)
	}
	fullyRestored(t, w.State())
}

func TestExtendsCheckpoints(t *testing.T) {
	w := witnessed(t)
	old := w.State()
	w.Do(fr, w.CheckpointCommand(fr, w.Grow(fr, 5)))
	w.Do(jp, w.CosignCommand(jp, fr))
	known := w.State()
	for range 5 {
		old, _ = old.Apply(old.Index()+1, []byte("noise"))
	}
	if err := old.Extends(known); !errors.Is(err, kms.Conflict) {
		t.Errorf("a state without the checkpoint is taken: %v", err)
	}
	w.Advance(time.Second)
	w.Do(fr, w.CheckpointCommand(fr, w.Grow(fr, 5)))
	w.Do(jp, w.CosignCommand(jp, fr))
	if err := w.State().Extends(known); err != nil {
		t.Error(err)
	}
}

// What one round of checkpoints costs in the cluster log, see DESIGN.md.
func TestCheckpointCost(t *testing.T) {
	w := statetest.New(t, statetest.Options{P384: true})
	for _, id := range w.NodeIDs() {
		w.Do(id, w.RegisterCommand(id))
	}
	w.Do(fr, w.CheckpointCommand(fr, w.Grow(fr, 5)))
	w.Grow(fr, 60_000)
	w.Advance(time.Second)
	submit := len(w.Command(fr, w.CheckpointCommand(fr, w.AccessLog(fr))))
	cosign := len(w.Command(jp, w.CosignCommand(jp, fr)))
	mark := len(w.Command(jp, w.CosignCommand(jp, "")))
	t.Logf("a checkpoint has %d bytes, a cosignature %d, of the cluster log %d", submit, cosign, mark)
	if submit > 3800 || cosign > 3100 || mark > 3200 {
		t.Errorf("a checkpoint has %d bytes, a cosignature %d, of the cluster log %d", submit, cosign, mark)
	}
}
