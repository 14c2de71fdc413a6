package notify

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"

	"github.com/conclave-kms/conclave/kms"
)

// Limits of an outbox.
const (
	maxWaiting = 10_000              // notices for a webhook; what comes when so many wait is dropped, and told when there is room if it still stands
	keepTrying = 7 * 24 * time.Hour  // with one notice
	knownFor   = 30 * 24 * time.Hour // what still stands then is told again
	maxText    = 4096                // bytes

	firstRetry = time.Second
	lastRetry  = 5 * time.Minute
	tryTime    = 10 * time.Second // of one attempt
	lockTime   = 5 * time.Second  // for another process to let go of the file
)

// Buckets of the file. Each webhook has one at the top, and these in it.
var (
	bucketKnown   = []byte("known")   // ID -> when it was put, Unix milliseconds
	bucketWaiting = []byte("waiting") // number -> held
)

// held is a notice that waits.
type held struct {
	Put    int64  `json:"put"` // Unix milliseconds
	Notice Notice `json:"notice"`
}

// Outbox keeps notices on the disk until the webhooks have taken them.
type Outbox struct {
	db    *bbolt.DB
	log   *slog.Logger
	now   func() time.Time
	retry time.Duration
	hooks []*sender
	stop  context.CancelFunc
	done  sync.WaitGroup

	closing sync.Once
}

// sender sends to one webhook, in order.
type sender struct {
	*poster
	wake                   chan struct{}
	sent, dropped, waiting atomic.Int64
}

// Open opens the outbox in the file, making it if it is absent, and begins to send. Errors:
// kms.Unavailable.
func Open(path string, hooks []Webhook, log *slog.Logger) (*Outbox, error) {
	return open(path, hooks, log, time.Now, firstRetry)
}

func open(path string, hooks []Webhook, log *slog.Logger, now func() time.Time, retry time.Duration) (*Outbox, error) {
	db, err := openFile(path)
	if err != nil {
		return nil, kms.Wrap(kms.Unavailable, err, "the outbox "+path+" cannot be opened", "where it is damaged, move it away: what still asks for people is told again")
	}
	ctx, stop := context.WithCancel(context.Background())
	o := &Outbox{db: db, log: log, now: now, retry: retry, stop: stop}
	for _, w := range hooks {
		o.hooks = append(o.hooks, &sender{poster: newPoster(w), wake: make(chan struct{}, 1)})
	}
	if err := db.Update(o.prepare); err != nil {
		stop()
		return nil, errors.Join(failed(err), db.Close())
	}
	for _, s := range o.hooks {
		o.done.Go(func() { o.run(ctx, s) })
	}
	return o, nil
}

// openFile opens the file, in which bbolt looks for free pages: it panics where one is damaged.
func openFile(path string) (db *bbolt.DB, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("a page is damaged: %v", r)
		}
	}()
	return bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockTime, FreelistType: bbolt.FreelistMapType, NoFreelistSync: true})
}

// prepare makes the buckets, and removes those of webhooks that are no more.
func (o *Outbox) prepare(tx *bbolt.Tx) error {
	var gone [][]byte
	if err := tx.ForEach(func(name []byte, _ *bbolt.Bucket) error {
		if !slices.ContainsFunc(o.hooks, func(s *sender) bool { return s.Name == string(name) }) {
			gone = append(gone, bytes.Clone(name))
		}
		return nil
	}); err != nil {
		return err
	}
	for _, name := range gone {
		if err := tx.DeleteBucket(name); err != nil {
			return err
		}
	}
	for _, s := range o.hooks {
		b, err := tx.CreateBucketIfNotExists([]byte(s.Name))
		if err != nil {
			return err
		}
		if _, err := b.CreateBucketIfNotExists(bucketKnown); err != nil {
			return err
		}
		waiting, err := b.CreateBucketIfNotExists(bucketWaiting)
		if err != nil {
			return err
		}
		s.waiting.Store(int64(waiting.Stats().KeyN))
	}
	return nil
}

func (s *sender) known(tx *bbolt.Tx) *bbolt.Bucket {
	return tx.Bucket([]byte(s.Name)).Bucket(bucketKnown)
}

func (s *sender) queue(tx *bbolt.Tx) *bbolt.Bucket {
	return tx.Bucket([]byte(s.Name)).Bucket(bucketWaiting)
}

func failed(err error) error {
	return kms.Wrap(kms.Unavailable, err, "the outbox of notices cannot be written", "free or repair the disk")
}

// Put keeps those notices that are new to a webhook and returns when they are durable.
// Errors: kms.Unavailable.
func (o *Outbox) Put(notices ...Notice) error {
	for _, s := range o.hooks {
		if err := o.put(s, notices); err != nil {
			return failed(err)
		}
	}
	return nil
}

func (o *Outbox) put(s *sender, notices []Notice) error {
	var news []Notice
	if err := o.db.View(func(tx *bbolt.Tx) error {
		for _, n := range notices {
			if s.wants(n.Kind) && !o.knows(s.known(tx), n.ID) {
				news = append(news, n)
			}
		}
		return nil
	}); err != nil || len(news) == 0 {
		return err
	}
	var put, lost int64
	if err := o.db.Update(func(tx *bbolt.Tx) error {
		if err := o.forget(s.known(tx)); err != nil {
			return err
		}
		put, lost = 0, 0
		for _, n := range news {
			if o.knows(s.known(tx), n.ID) { // twice among them
				continue
			}
			if s.waiting.Load()+put >= maxWaiting {
				lost++
				continue
			}
			if err := o.keep(tx, s, n); err != nil {
				return err
			}
			put++
		}
		return nil
	}); err != nil {
		return err
	}
	s.waiting.Add(put)
	s.dropped.Add(lost)
	select {
	case s.wake <- struct{}{}:
	default:
	}
	return nil
}

// knows reports whether a notice was put lately.
func (o *Outbox) knows(known *bbolt.Bucket, id string) bool {
	at := known.Get([]byte(id))
	return len(at) == 8 && o.now().UnixMilli()-int64(binary.BigEndian.Uint64(at)) < knownFor.Milliseconds()
}

// forget removes what was put long ago from what is known.
func (o *Outbox) forget(known *bbolt.Bucket) error {
	var old [][]byte
	if err := known.ForEach(func(id, _ []byte) error {
		if !o.knows(known, string(id)) {
			old = append(old, bytes.Clone(id))
		}
		return nil
	}); err != nil {
		return err
	}
	for _, id := range old {
		if err := known.Delete(id); err != nil {
			return err
		}
	}
	return nil
}

// keep adds a notice to those that wait.
func (o *Outbox) keep(tx *bbolt.Tx, s *sender, n Notice) error {
	now := o.now().UnixMilli()
	if err := s.known(tx).Put([]byte(n.ID), binary.BigEndian.AppendUint64(nil, uint64(now))); err != nil {
		return err
	}
	if len(n.Text) > maxText {
		n.Text = strings.ToValidUTF8(n.Text[:maxText], "") + " ..."
	}
	value, err := json.Marshal(held{now, n})
	if err != nil {
		return err
	}
	number, err := s.queue(tx).NextSequence()
	if err != nil {
		return err
	}
	return s.queue(tx).Put(binary.BigEndian.AppendUint64(nil, number), value)
}

// Stat counts the notices for a webhook since the start.
type Stat struct {
	Webhook                string
	Sent, Dropped, Waiting int64
}

// Stats returns the counts for every webhook.
func (o *Outbox) Stats() (l []Stat) {
	for _, s := range o.hooks {
		l = append(l, Stat{s.Name, s.sent.Load(), s.dropped.Load(), s.waiting.Load()})
	}
	return l
}

// Close stops sending and closes the file; what waits stays in it. It may be called more
// than once.
func (o *Outbox) Close() (err error) {
	o.closing.Do(func() {
		o.stop()
		o.done.Wait()
		for _, s := range o.hooks {
			s.client.CloseIdleConnections()
			destroy(s.Keys)
		}
		err = o.db.Close()
	})
	return err
}
