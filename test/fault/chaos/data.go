package chaos

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
)

// Data operations are answered by each node from its own state, which may be as old as
// the keyring allows: they are held against that bound, not against the model.

// encrypted is a ciphertext and how it came about.
type encrypted struct {
	key, node    string
	text         string
	ciphertext   []byte
	version      uint32
	call, finish time.Duration
}

// dataLoad encrypts at one node and decrypts at another.
type dataLoad struct {
	load    *Load
	mu      sync.Mutex
	made    []encrypted
	decrypt int            // how many were opened again
	served  map[served]int // what the nodes have answered, for accessLogs
	errors  errorCounts
}

// one makes a ciphertext at some node, or opens one at some other.
func (d *dataLoad) one(ctx context.Context, r *rand.Rand) {
	l := d.load
	n := l.c.Nodes[r.IntN(len(l.c.Nodes))]
	cl, err := l.c.Client(n, "service", tryTimeout)
	if err != nil {
		d.errors.odd(n.ID, err)
		return
	}
	pause := time.NewTimer(50 * time.Millisecond) // the load is there to be checked, not to be fast
	defer pause.Stop()
	d.mu.Lock()
	var old encrypted
	if len(d.made) > 0 {
		old = d.made[r.IntN(len(d.made))]
	}
	d.mu.Unlock()
	call, cancel := context.WithTimeout(context.Background(), tryTimeout)
	defer cancel()
	if old.text != "" && r.IntN(2) == 0 {
		p, err := cl.Key(ring, old.key).Decrypt(call, wire.DecryptRequest{Ciphertext: old.ciphertext})
		d.errors.count(n.ID, l.history.Now(), err)
		if err == nil && string(p.Plaintext) != old.text {
			d.errors.odd(n.ID, fmt.Errorf("a ciphertext of %s made at %s opens to something else", old.key, old.node))
		}
		if err == nil {
			d.mu.Lock()
			d.decrypt++
			d.served[served{n.ID, "decrypt", ring + "/" + old.key, old.version}]++
			d.mu.Unlock()
		}
	} else {
		l.mu.Lock()
		key := l.slots[r.IntN(len(l.slots))].key
		l.mu.Unlock()
		e := encrypted{key: key, node: n.ID, text: fmt.Sprintf("%s %d", key, r.Uint64()), call: l.history.Now()}
		c, err := cl.Key(ring, key).Encrypt(call, wire.EncryptRequest{Plaintext: wire.Secret(e.text)})
		e.finish = l.history.Now()
		d.errors.count(n.ID, e.finish, err)
		if err == nil {
			e.ciphertext, e.version = c.Ciphertext, c.KeyVersion
			d.mu.Lock()
			d.made = append(d.made, e)
			d.served[served{n.ID, "encrypt", ring + "/" + key, e.version}]++
			d.mu.Unlock()
		}
	}
	select {
	case <-pause.C:
	case <-ctx.Done():
	}
}

// openAll opens the latest ciphertexts of every key at every node, but not those of
// keys that are suspended in the end, and returns how many.
func (d *dataLoad) openAll(ctx context.Context) (opened int, err error) {
	l := d.load
	last := map[string]encrypted{}
	d.mu.Lock()
	for _, e := range d.made {
		last[fmt.Sprint(e.key, e.version)] = e
	}
	d.mu.Unlock()
	for _, e := range last {
		for _, n := range l.c.Nodes {
			cl, err := l.c.Client(n, "service", tryTimeout)
			if err != nil {
				return opened, err
			}
			p, err := cl.Key(ring, e.key).Decrypt(ctx, wire.DecryptRequest{Ciphertext: e.ciphertext})
			if kms.KindOf(err) == kms.Conflict {
				continue // suspended
			}
			if err != nil || string(p.Plaintext) != e.text {
				return opened, fmt.Errorf("a ciphertext of %s version %d, made at %s, does not open at %s: %v", e.key, e.version, e.node, n.ID, err)
			}
			opened++
		}
	}
	return opened, nil
}

// tooOld returns the ciphertexts that an older state than the keyring allows has made:
// under a version that was no longer primary, or of a key that was suspended, for
// longer than that before the call. ops tell what the key was like, at the least.
func (d *dataLoad) tooOld(ops []Op) (wrong []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	reads := map[string][]Op{}
	for _, o := range ops {
		if o.Kind == ReadKey && o.Outcome == OK {
			reads[o.Key] = append(reads[o.Key], o)
		}
	}
	for _, e := range d.made {
		for _, before := range reads[e.key] {
			if before.Return > e.call-maxStaleness {
				continue
			}
			if e.version < before.Primary {
				wrong = append(wrong, fmt.Sprintf("%s encrypted with version %d of %s between %v and %v; version %d was primary by %v (%s)", e.node, e.version, e.key, e.call, e.finish, before.Primary, before.Return, before.Node))
			}
			for _, after := range reads[e.key] {
				if before.Suspended && after.Suspended && before.Revision == after.Revision && after.Call >= e.finish {
					wrong = append(wrong, fmt.Sprintf("%s encrypted with %s at %v, which was suspended from %v to %v", e.node, e.key, e.call, before.Return, after.Call))
				}
			}
		}
	}
	return wrong
}
