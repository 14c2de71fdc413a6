package chaos

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/conclave-kms/conclave/test/harness"
)

// fault is one way to break something for a while.
type fault struct {
	kind     string
	weight   int
	min, max time.Duration // how long it lasts
	nodes    int           // how many nodes it disturbs
	leader   bool          // it may be aimed at the leader, which then no longer leads

	// strike begins it and returns what ends it.
	strike func(ctx context.Context, f *Faults, on []*harness.Node) (repair func(context.Context) error, err error)
}

// struck is a fault that was injected.
type struck struct {
	kind   string
	nodes  []string
	leader bool // it hit the leader, hard
	from   time.Duration
	to     time.Duration
}

// Faults breaks a coalition, one or two faults at a time.
type Faults struct {
	c       *harness.Coalition
	now     func() time.Duration
	kinds   []fault
	disks   map[string]*disk
	clocks  map[string]string // file with the offset of a node's clock
	seed    uint64
	maximum int // of nodes that are disturbed at a time

	mu        sync.Mutex
	rand      *rand.Rand
	disturbed map[*harness.Node]int
	down      map[*harness.Node]bool // on purpose
	done      []struck
	ended     map[string]int // nodes that ended by themselves, by reason
	failures  []string       // of the injection
	restarted int            // nodes that were started anew because they asked for it
}

// NewFaults knows the faults that this machine allows.
func NewFaults(c *harness.Coalition, now func() time.Duration, seed uint64) *Faults {
	f := &Faults{
		c: c, now: now, seed: seed, rand: rand.New(rand.NewPCG(seed, 77)), maximum: (len(c.Nodes) - 1) / 2,
		disturbed: map[*harness.Node]int{}, down: map[*harness.Node]bool{}, ended: map[string]int{}, disks: map[string]*disk{},
	}
	f.kinds = slices.Clone(basic)
	return f
}

const ms = time.Millisecond

// basic are the faults that need no tools and no privileges.
var basic = []fault{
	{kind: "kill -9", weight: 5, min: 100 * ms, max: 4000 * ms, nodes: 1, leader: true, strike: kill},
	{kind: "kill -9 of two", weight: 1, min: 100 * ms, max: 3000 * ms, nodes: 2, leader: true, strike: kill},
	{kind: "SIGSTOP", weight: 4, min: 500 * ms, max: 8000 * ms, nodes: 1, leader: true, strike: pause},
	{kind: "cut", weight: 4, min: 1000 * ms, max: 8000 * ms, nodes: 1, leader: true, strike: cut(true, true)},
	{kind: "one-way cut: unheard", weight: 3, min: 1000 * ms, max: 8000 * ms, nodes: 1, leader: true, strike: cut(true, false)},
	{kind: "one-way cut: deaf", weight: 3, min: 1000 * ms, max: 8000 * ms, nodes: 1, leader: true, strike: cut(false, true)},
	{kind: "cut between two and three", weight: 2, min: 1000 * ms, max: 8000 * ms, nodes: 2, strike: cut(true, true)},
	{kind: "cut between a pair", weight: 2, min: 1000 * ms, max: 8000 * ms, nodes: 1, strike: cutPair},
	{kind: "delay 150 ms", weight: 3, min: 2000 * ms, max: 10000 * ms, nodes: 1, strike: slow},
}

func kill(ctx context.Context, f *Faults, on []*harness.Node) (func(context.Context) error, error) {
	f.lay(true, on)
	for _, n := range on {
		if err := n.Kill(ctx); err != nil {
			return nil, err
		}
	}
	return func(context.Context) error {
		defer f.lay(false, on)
		for _, n := range on {
			if err := f.c.Launch(n); err != nil {
				return err
			}
		}
		return nil
	}, nil
}

// lay notes that nodes are down on purpose.
func (f *Faults) lay(down bool, on []*harness.Node) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, n := range on {
		f.down[n] = down
	}
}

func pause(ctx context.Context, _ *Faults, on []*harness.Node) (func(context.Context) error, error) {
	if err := on[0].Pause(ctx); err != nil {
		return nil, err
	}
	return func(context.Context) error { return on[0].Resume() }, nil
}

// cut separates the nodes from the others: what they send, what is sent to them, or both.
func cut(out, in bool) func(context.Context, *Faults, []*harness.Node) (func(context.Context) error, error) {
	return func(_ context.Context, f *Faults, on []*harness.Node) (func(context.Context) error, error) {
		others := f.c.Except(on...)
		var links []harness.Link
		if out {
			links = append(links, f.c.Between(on, others)...)
		}
		if in {
			links = append(links, f.c.Between(others, on)...)
		}
		return f.cutLinks(links), nil
	}
}

func cutPair(_ context.Context, f *Faults, on []*harness.Node) (func(context.Context) error, error) {
	other := f.pick(f.c.Except(on[0]))
	pair := []*harness.Node{on[0], other}
	return f.cutLinks(f.c.Between(pair, pair)), nil
}

// cutLinks cuts links; the repair breaks the connections every second time, and
// otherwise lets through what was held.
func (f *Faults) cutLinks(links []harness.Link) func(context.Context) error {
	f.c.Links.Cut(links...)
	broken := f.number(2) == 0
	return func(context.Context) error {
		f.c.Links.Heal(broken, links...)
		return nil
	}
}

// slow puts a node on the far side of the world.
func slow(_ context.Context, f *Faults, on []*harness.Node) (func(context.Context) error, error) {
	links := append(f.c.Between(on, f.c.Nodes), f.c.Between(f.c.Nodes, on)...)
	before := map[harness.Link]time.Duration{}
	for _, l := range links {
		before[l] = f.c.Links.Slow(l)
	}
	f.c.Links.Delay(150*ms, links...)
	return func(context.Context) error {
		for l, d := range before {
			f.c.Links.Delay(d, l)
		}
		return nil
	}, nil
}

func (f *Faults) number(n int) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.rand.IntN(n)
}

func (f *Faults) pick(from []*harness.Node) *harness.Node { return from[f.number(len(from))] }

// choose draws a fault.
func (f *Faults) choose() fault {
	total := 0
	for _, k := range f.kinds {
		total += k.weight
	}
	x := f.number(total)
	for _, k := range f.kinds {
		if x -= k.weight; x < 0 {
			return k
		}
	}
	panic("weights")
}

// Run injects a fault about every period until ctx ends, then repairs everything.
func (f *Faults) Run(ctx context.Context, period time.Duration) {
	var wg sync.WaitGroup
	watched, stop := context.WithCancel(context.Background())
	defer stop()
	wg.Go(func() { f.revive(watched) })
	var striking sync.WaitGroup
	tick := time.NewTicker(period)
	defer tick.Stop()
	for ctx.Err() == nil {
		k := f.choose()
		on, leads, ok := f.aim(ctx, k)
		next := tick.C
		if ok {
			striking.Go(func() {
				defer f.release(on)
				f.one(ctx, k, on, leads)
			})
		} else { // look again soon
			next = time.After(period / 5)
		}
		select {
		case <-next:
		case <-ctx.Done():
		}
	}
	striking.Wait()
	stop()
	wg.Wait()
}

// aim chooses the nodes for a fault: every third time the leader at least. Nodes
// are disturbed by one fault at a time, and no more of them than a minority, except
// that now and then the majority is lost.
func (f *Faults) aim(ctx context.Context, k fault) (on []*harness.Node, leads, ok bool) {
	var leader *harness.Node
	short, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if l, err := f.c.Leader(short); err == nil {
		leader = l
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	limit := f.maximum
	if f.rand.IntN(12) == 0 {
		limit++
	}
	if len(f.disturbed)+k.nodes > limit {
		return nil, false, false
	}
	free := slices.DeleteFunc(slices.Clone(f.c.Nodes), func(n *harness.Node) bool { return f.disturbed[n] > 0 || !f.possible(k, n) })
	if len(free) < k.nodes {
		return nil, false, false
	}
	f.rand.Shuffle(len(free), func(i, j int) { free[i], free[j] = free[j], free[i] })
	if i := slices.Index(free, leader); i > 0 && f.rand.IntN(3) == 0 {
		free[0], free[i] = free[i], free[0]
	}
	on = free[:k.nodes]
	for _, n := range on {
		f.disturbed[n]++
	}
	return on, k.leader && leader != nil && slices.Contains(on, leader), true
}

// possible reports whether a node can be broken so: only some have a small disk, or a
// clock that can be set.
func (f *Faults) possible(k fault, n *harness.Node) bool {
	switch k.kind {
	case fullDisk:
		return f.disks[n.ID] != nil
	case clockJump:
		return f.clocks[n.ID] != ""
	}
	return true
}

func (f *Faults) release(on []*harness.Node) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, n := range on {
		if f.disturbed[n]--; f.disturbed[n] == 0 {
			delete(f.disturbed, n)
		}
	}
}

// one injects a fault and repairs it after a while, or when ctx ends.
func (f *Faults) one(ctx context.Context, k fault, on []*harness.Node, leads bool) {
	s := struck{kind: k.kind, leader: leads, from: f.now()}
	for _, n := range on {
		s.nodes = append(s.nodes, n.ID)
	}
	repair, err := k.strike(context.WithoutCancel(ctx), f, on)
	if err != nil {
		f.failed(k.kind, s.nodes, err)
		return
	}
	lasts := time.NewTimer(k.min + time.Duration(f.number(int(k.max-k.min))))
	defer lasts.Stop()
	select {
	case <-lasts.C:
	case <-ctx.Done():
	}
	if err := repair(context.Background()); err != nil {
		f.failed(k.kind, s.nodes, err)
	}
	s.to = f.now()
	f.mu.Lock()
	f.done = append(f.done, s)
	f.mu.Unlock()
}

func (f *Faults) failed(kind string, nodes []string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failures = append(f.failures, fmt.Sprintf("%s of %v: %v", kind, nodes, err))
}

// revive starts nodes again that have ended by themselves, as a service manager would.
func (f *Faults) revive(ctx context.Context) {
	tick := time.NewTicker(500 * ms)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, n := range f.c.Nodes {
			f.mu.Lock()
			if !f.down[n] && !n.Running() {
				f.ended[n.ID+": "+n.Says(1)]++
				if err := f.c.Launch(n); err != nil {
					f.failures = append(f.failures, err.Error())
				}
			}
			f.mu.Unlock()
		}
	}
}

// Heal waits until every node is ready, and starts anew those that say for long that
// they are not: that is what their operators are told to do.
func (f *Faults) Heal(ctx context.Context) error {
	for _, n := range f.c.Nodes {
		soon, cancel := context.WithTimeout(ctx, 20*time.Second)
		err := n.Ready(soon)
		cancel()
		if err == nil {
			continue
		}
		if err := f.anew(ctx, n); err != nil {
			return err
		}
		if err := n.Ready(ctx); err != nil {
			return err
		}
	}
	return nil
}

// counts returns how many faults of each kind were injected.
func (f *Faults) counts() (byKind map[string]int, total int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	byKind = map[string]int{}
	for _, s := range f.done {
		byKind[s.kind]++
		total++
	}
	return byKind, total
}

// endings returns how often nodes ended by themselves, with their last words.
func (f *Faults) endings() map[string]int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.ended)
}
