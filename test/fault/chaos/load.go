package chaos

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

const (
	ring = "chaos" // the keyring, resident everywhere

	inUse        = 4  // keys that are in use at a time
	lifeOfKey    = 60 // operations on a key before another takes its place
	tryTimeout   = 8 * time.Second
	maxStaleness = 8 * time.Second // of the keyring
)

// Load uses a coalition: workers ask for changes and look at what there is, at every
// node, and record it.
type Load struct {
	c          *harness.Coalition
	history    *History
	data       *dataLoad
	custodians []*harness.Custodian
	seed       uint64

	mu     sync.Mutex
	slots  []*slot
	next   int
	failed int // operations that certainly had no effect
	errors errorCounts
}

// slot is a key in use and what the workers know of the proposals about it.
type slot struct {
	key       string
	ops       int
	opened    int
	proposals []wire.Proposal
	sent      map[string]wire.Statement // by proposal, custodian and verdict: signatures differ each time
}

// NewLoad opens the custodians' keys and makes the keyring.
func NewLoad(ctx context.Context, c *harness.Coalition, seed uint64) (*Load, error) {
	l := &Load{c: c, history: NewHistory(), seed: seed}
	l.data = &dataLoad{load: l, served: map[served]int{}}
	for _, id := range custodians {
		k, err := c.Custodian(id)
		if err != nil {
			return nil, err
		}
		l.custodians = append(l.custodians, k)
	}
	cl, err := c.Client(c.Nodes[0], "operator", time.Minute)
	if err != nil {
		return nil, err
	}
	_, err = cl.CreateKeyring(ctx, wire.CreateKeyringRequest{
		Name: ring, Residency: []string{"de", "fr", "jp"}, Policy: "keys", Receipts: string(kms.EverySite), MaxStalenessMS: maxStaleness.Milliseconds(),
	})
	if err != nil {
		return nil, err
	}
	if _, err := c.SameLog(ctx); err != nil { // where it is not known yet, nobody has rights on it
		return nil, err
	}
	for range inUse {
		l.slots = append(l.slots, l.newSlot())
	}
	return l, nil
}

// Close wipes the custodians' keys.
func (l *Load) Close() {
	for _, k := range l.custodians {
		k.Key.Destroy()
	}
}

func (l *Load) newSlot() *slot {
	l.next++
	return &slot{key: fmt.Sprintf("k%d", l.next), sent: map[string]wire.Statement{}}
}

// Run has workers ask until ctx ends. What they have begun they finish.
func (l *Load) Run(ctx context.Context, workers int) {
	var wg sync.WaitGroup
	for i := range workers {
		w := &worker{l: l, id: i, rand: rand.New(rand.NewPCG(l.seed, uint64(i)+1))}
		wg.Go(func() {
			for ctx.Err() == nil {
				w.one()
			}
		})
	}
	for i := range 2 {
		r := rand.New(rand.NewPCG(l.seed, uint64(i)+1000))
		wg.Go(func() {
			for ctx.Err() == nil {
				l.data.one(ctx, r)
			}
		})
	}
	wg.Wait()
}

// worker asks one thing after the other.
type worker struct {
	l    *Load
	id   int
	rand *rand.Rand
}

// one makes one operation on a key in use.
func (w *worker) one() {
	l := w.l
	l.mu.Lock()
	i := w.rand.IntN(len(l.slots))
	s := l.slots[i]
	s.ops++
	first := s.ops == 1
	if s.ops >= lifeOfKey {
		l.slots[i] = l.newSlot()
	}
	var known wire.Proposal
	if n := len(s.proposals); n > 0 { // the latest ones are of interest
		known = s.proposals[max(0, n-1-w.rand.IntN(3))]
	}
	mayOpen := s.opened < maxProposals-1
	l.mu.Unlock()

	x := w.rand.IntN(100)
	switch {
	case first || x < 2:
		w.createKey(s)
	case x < 30:
		w.readKey(s, w.node())
	case x < 50 && mayOpen:
		w.openProposal(s)
	case known.ID == "":
		w.readKey(s, w.node())
	case x < 70:
		w.readProposal(s, known.ID, w.node())
	default:
		w.vote(s, known)
	}
}

func (w *worker) node() *harness.Node { return w.l.c.Nodes[w.rand.IntN(len(w.l.c.Nodes))] }

// call makes a write at a node, and repeats it with the same idempotency key at others
// while the outcome is unknown or nobody took it. It fills in who answered, when, and
// how it ended; a false answer is that it certainly did not happen. What the answer
// showed was read at some time between the call and the return.
func (w *worker) call(o *Op, f func(ctx context.Context, cl *client.Client, opt client.Option) error) bool {
	l := w.l
	opt := client.WithIdempotencyKey(fmt.Sprintf("w%d-%d-%d", w.id, l.history.Now(), w.rand.Uint64()))
	tries := 1
	if w.rand.IntN(3) > 0 {
		tries = 6
	}
	o.Client, o.Call = w.id, l.history.Now()
	unknown := false
	for range tries {
		n := w.node()
		o.Node = n.ID
		err := w.at(n, func(ctx context.Context, cl *client.Client) error { return f(ctx, cl, opt) })
		o.Return = l.history.Now()
		out, certain := outcome(err)
		switch {
		case out == OK:
			o.Outcome = OK
			return true
		case out == Unknown:
			unknown = true
		case certain && !unknown:
			o.Outcome = out
			return true
		case certain: // an earlier try may have its effect yet
			o.Outcome = Unknown
			return true
		}
	}
	o.Outcome = Unknown
	if !unknown {
		l.fail()
	}
	return unknown
}

func (l *Load) fail() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failed++
}

// at calls f with the operator's client of a node.
func (w *worker) at(n *harness.Node, f func(ctx context.Context, cl *client.Client) error) error {
	cl, err := w.l.c.Client(n, "operator", tryTimeout)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), tryTimeout)
	defer cancel()
	err = f(ctx, cl)
	w.l.errors.count(n.ID, w.l.history.Now(), err)
	return err
}

// outcome translates an error. It is certain when the answer says something about the
// key or the proposal.
func outcome(err error) (o Outcome, certain bool) {
	switch kms.KindOf(err) {
	case 0:
		return OK, true
	case kms.Unknown:
		return Unknown, false
	case kms.NotFound:
		return NotFound, true
	case kms.Exists:
		return Exists, true
	case kms.Conflict:
		return Refused, true
	}
	return 0, false
}

func (w *worker) createKey(s *slot) {
	o := Op{Kind: CreateKey, Key: s.key}
	told := w.call(&o, func(ctx context.Context, cl *client.Client, opt client.Option) error {
		_, err := cl.CreateKey(ctx, ring, wire.CreateKeyRequest{Name: s.key, Purpose: string(kms.Encrypt)}, opt)
		return err
	})
	if told {
		w.l.history.Add(o)
	}
}

func (w *worker) openProposal(s *slot) {
	actions := []kms.Action{kms.ActionRotate, kms.ActionRotate, kms.ActionSuspend, kms.ActionResume}
	o := Op{Kind: OpenProposal, Key: s.key, Action: actions[w.rand.IntN(len(actions))]}
	var p wire.Proposal
	told := w.call(&o, func(ctx context.Context, cl *client.Client, opt client.Option) (err error) {
		p, err = cl.OpenProposal(ctx, wire.OpenProposalRequest{
			Action: string(o.Action), Target: approval.KeyTarget(ring, s.key), Reason: "chaos",
		}, opt)
		return err
	})
	if !told {
		return
	}
	if o.Outcome == OK {
		o.ID = p.ID
		w.l.mu.Lock()
		s.opened++
		s.proposals = append(s.proposals, p)
		w.l.mu.Unlock()
	}
	w.l.history.Add(o)
	w.shown(o, p)
}

func (w *worker) vote(s *slot, p wire.Proposal) {
	o := Op{Kind: Vote, Key: s.key, ID: p.ID, Custodian: w.rand.IntN(len(custodians)), Verdict: approve}
	if w.rand.IntN(10) == 0 {
		o.Verdict = reject
	}
	st, err := w.statement(s, p, o)
	if err != nil {
		w.l.errors.odd("a custodian's statement", err)
		return
	}
	var after wire.Proposal
	told := w.call(&o, func(ctx context.Context, cl *client.Client, opt client.Option) (err error) {
		after, err = cl.Vote(ctx, p.ID, wire.VoteRequest{Statement: st}, opt)
		return err
	})
	if told {
		w.l.history.Add(o)
		w.shown(o, after)
	}
}

// statement returns the custodian's statement, the same bytes each time.
func (w *worker) statement(s *slot, p wire.Proposal, o Op) (wire.Statement, error) {
	id := fmt.Sprint(p.ID, o.Custodian, o.Verdict)
	w.l.mu.Lock()
	defer w.l.mu.Unlock()
	if st, ok := s.sent[id]; ok {
		return st, nil
	}
	verdict := approval.Approve
	if o.Verdict == reject {
		verdict = approval.Reject
	}
	st, err := w.l.custodians[o.Custodian].Statement(verdict, p)
	s.sent[id] = st
	return st, err
}

// shown records the proposal in the answer to a write as a reading of it.
func (w *worker) shown(o Op, p wire.Proposal) {
	if o.Outcome != OK {
		return
	}
	r := Op{Kind: ReadProposal, Key: o.Key, ID: o.ID, Node: o.Node, Client: o.Client, Call: o.Call, Return: o.Return, Outcome: OK}
	if err := r.show(p); err != nil {
		w.l.errors.odd("the answer of "+o.Node, err)
		return
	}
	w.l.history.Add(r)
}

// show fills in what a view of a proposal says.
func (o *Op) show(p wire.Proposal) error {
	var ok bool
	if o.Progress, ok = progressNames[p.Progress]; !ok {
		return fmt.Errorf("a proposal is %q", p.Progress)
	}
	o.Met = p.Met
	for _, v := range p.Votes {
		i := 0
		for i < len(custodians) && custodians[i] != v.Statement.Custodian {
			i++
		}
		if i == len(custodians) {
			return fmt.Errorf("a vote of %q", v.Statement.Custodian)
		}
		o.Votes[i] = approve
		if v.Statement.Verdict == string(approval.Reject) {
			o.Votes[i] = reject
		}
	}
	return nil
}

func (w *worker) readKey(s *slot, n *harness.Node) error {
	o := Op{Kind: ReadKey, Key: s.key}
	return w.read(&o, n, func(ctx context.Context, cl *client.Client) error {
		k, err := cl.Key(ring, s.key).Describe(ctx)
		o.Latest, o.Primary, o.Revision, o.Suspended, o.IDs = k.Latest, k.Primary, k.Revision, k.Suspended, k.Proposals
		return err
	})
}

func (w *worker) readProposal(s *slot, id string, n *harness.Node) error {
	o := Op{Kind: ReadProposal, Key: s.key, ID: id}
	return w.read(&o, n, func(ctx context.Context, cl *client.Client) error {
		p, err := cl.Proposal(ctx, id)
		if err != nil {
			return err
		}
		return o.show(p)
	})
}

// read makes a reading at a node and records it if there was an answer.
func (w *worker) read(o *Op, n *harness.Node, f func(ctx context.Context, cl *client.Client) error) error {
	o.Client, o.Node, o.Call = w.id, n.ID, w.l.history.Now()
	err := w.at(n, f)
	o.Return = w.l.history.Now()
	if out, certain := outcome(err); certain && (out == OK || out == NotFound) {
		o.Outcome = out
		w.l.history.Add(*o)
		return nil
	}
	w.l.fail()
	return err
}

// ReadAll reads every key and every proposal that anybody was told of, each at a node
// drawn by lot, and records it. An error is a node that does not answer.
func (l *Load) ReadAll(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(32)
	seen := map[string]bool{}
	w := &worker{l: l, id: last, rand: rand.New(rand.NewPCG(l.seed, 0))}
	for _, o := range l.history.All() {
		for _, id := range []string{o.Key, o.ID} {
			if id == "" || seen[id] {
				continue
			}
			seen[id] = true
			n := w.node()
			g.Go(func() error {
				return harness.Within(ctx, time.Minute, id+" can be read at "+n.ID, func(context.Context) error {
					if id == o.Key {
						return w.readKey(&slot{key: o.Key}, n)
					}
					return w.readProposal(&slot{key: o.Key}, id, n)
				})
			})
		}
	}
	return g.Wait()
}
