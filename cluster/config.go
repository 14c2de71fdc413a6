package cluster

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
)

// Config is what a node needs to run. Fields marked optional may be zero; every
// other one is required.
type Config struct {
	NodeID  string // of the genesis
	DataDir string // owned by this node alone, mode 0700; made if missing
	Listen  string // host:port for the other nodes; not used when Listener is set

	// Listener, optional, is taken over in place of listening on Listen.
	Listener net.Listener
	// Dial, optional, replaces plain TCP for connections to other nodes. TLS runs on top.
	Dial func(ctx context.Context, address string) (net.Conn, error)

	// Log and Wire, optional, are taken over in place of a file in DataDir, and of TLS
	// on Listener: a simulated disk and network. All else is as without them.
	Log  LogStore
	Wire Wire

	Genesis state.SignedGenesis
	Site    string // of a node that is not in the genesis; optional for the others
	// Introduced, optional, are nodes and sites that may connect although this node's
	// own log does not know them yet: those that joined since the genesis, one of
	// which may lead. It gives them no say: the log that they send must verify.
	Introduced Introduction

	Certificate tls.Certificate // URI SAN spiffe://TRUST-DOMAIN/node/NODE-ID

	// Sign has the node's device sign a digest (pqc.Digest of the node's signing
	// suite) with the node's signing key and returns r‖s. It is used for hashes of
	// snapshots, in the context SnapshotContext.
	Sign func(ctx context.Context, digest []byte) ([]byte, error)
	// SigningSuite (pqc.SuiteID) and Signing, optional together, are the public half of
	// Sign. Without them it is the node's of the genesis, which a node whose hardware
	// root was replaced no longer has, and one that is not in the genesis never had.
	SigningSuite uint16
	Signing      []byte

	Logger *slog.Logger // optional: slog.Default
	// RaftLogLevel, optional, is the least level at which Raft's own log is passed on.
	RaftLogLevel *slog.Level // nil: Warn
	Timing       Timing      // optional: for a LAN
	// Profile, optional, sets Timing.Heartbeat where that is 0, and what follows from it.
	Profile Profile
	// PreferSites, optional, are the sites at which this node wants the leader, the
	// best first. A leader elsewhere hands the lead to a voter there; see prefer.go.
	PreferSites []string

	// OnApply, optional, is called in log order after each entry that was applied,
	// before anyone waiting for it wakes. After a restart it sees the entries since
	// the last snapshot again. It must be quick: the log waits for it.
	OnApply func(st *state.State, raw []byte, r state.Result)
	// OnRestore, optional, is called when a snapshot has replaced the state: entries
	// up to st.Index() that OnApply has not seen yet, it will not see. At a start from a
	// snapshot it is called before Open returns.
	OnRestore func(st *state.State)
	// OnSnapshot, optional, is called before a snapshot is kept, after which entries
	// that OnApply has seen may vanish from Raft's log: whoever stores them makes
	// them durable here. An error cancels the snapshot.
	OnSnapshot func() error

	// Records, optional, returns what this node keeps of the cluster log from a leaf on,
	// in one piece of at most 4 MiB, for another node that asks with FetchRecords.
	Records func(leaf uint64) ([]byte, error)

	// OnSuspicion, optional, is called with what this node comes to suspect, once for each
	// kind, leader, term and origin. The log does not wait for it.
	OnSuspicion func(Suspicion)

	// Applied, optional, is the index of the last command that this node has applied in
	// former runs, as far as its caller has kept that: no leader takes what is committed back.
	Applied uint64

	// Counter, optional, is a counter in the node's device: with it the node notices that its
	// disk was put back to an older state also where the other nodes' were, too.
	Counter Counter

	// FreeSpace, optional, tells the free and total bytes of the disk of a
	// directory: FreeSpace of this package, other in tests.
	FreeSpace func(dir string) (free, total uint64, err error)

	given Timing // Timing before the defaults
}

// Timing are the node's periods and thresholds. The zero value of a field stands
// for its default, which suits round trips up to about 100 ms; for longer ones see
// Profile. They stay as they are until the node stops.
type Timing struct {
	Heartbeat time.Duration // within three of these a dead leader is replaced: 1 s
	Election  time.Duration // of an election before the next, at the least: half of Heartbeat, which it may not be less than
	Lease     time.Duration // of a leader without a quorum before it steps down: half of Heartbeat, at most that
	Commit    time.Duration // between messages of an idle leader, and of a commit to followers: 25 ms
	RPC       time.Duration // for one message between nodes: 10 s
	Propose   time.Duration // of Propose and Barrier when the context has no deadline: 30 s
	Stall     time.Duration // of a disk operation before the node gives itself up: 30 s
	Suspect   time.Duration // of a command on its way into the log before the leader is under suspicion: 30 s

	SnapshotInterval  time.Duration // between looks whether a snapshot is due: 2 min
	SnapshotThreshold uint64        // new entries that make one due: 8192
	TrailingLogs      uint64        // entries kept after a snapshot for nodes that lag: 10240
	HashEvery         uint64        // entries between comparisons of the nodes' states: 1024
}

// withDefaults fills in the defaults.
func (t Timing) withDefaults() Timing {
	period := func(d *time.Duration, def time.Duration) {
		if *d == 0 {
			*d = def
		}
	}
	count := func(n *uint64, def uint64) {
		if *n == 0 {
			*n = def
		}
	}
	period(&t.Heartbeat, time.Second)
	period(&t.Election, t.raftHeartbeat())
	period(&t.Lease, t.raftHeartbeat())
	period(&t.Commit, 25*time.Millisecond)
	period(&t.RPC, 10*time.Second)
	period(&t.Propose, 30*time.Second)
	period(&t.Stall, 30*time.Second)
	period(&t.Suspect, 30*time.Second)
	period(&t.SnapshotInterval, 2*time.Minute)
	count(&t.SnapshotThreshold, 8192)
	count(&t.TrailingLogs, 10240)
	count(&t.HashEvery, 1024)
	return t
}

// raftHeartbeat is what Raft calls the heartbeat timeout. A follower notices the silence of its
// leader after one to three of these (its timer runs for one to two, and once more if it was begun
// before the last word), and nobody is elected before two of three have noticed. With an
// election that ends without a majority, which is repeated after one to two more, that makes five: less than
// three of Heartbeat.
func (t Timing) raftHeartbeat() time.Duration { return t.Heartbeat / 2 }

// dial is how long a connection to the leader may take to stand.
func (t Timing) dial() time.Duration { return 2 * t.Heartbeat }

// check validates the configuration's shape and fills in the defaults.
func (c Config) check() (Config, error) {
	if err := kms.CheckName("node id", c.NodeID); err != nil {
		return c, err
	}
	if c.Listen == "" && c.Listener == nil && c.Wire == nil {
		return c, kms.Errorf(kms.Invalid, "the address to listen on for other nodes is missing")
	}
	if c.Sign == nil {
		return c, kms.Errorf(kms.Invalid, "the node's signing key is missing")
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if c.RaftLogLevel == nil {
		level := slog.LevelWarn
		c.RaftLogLevel = &level
	}
	if c.FreeSpace == nil {
		c.FreeSpace = FreeSpace
	}
	t := c.Timing
	for _, d := range []time.Duration{t.Heartbeat, t.Election, t.Lease, t.Commit, t.RPC, t.Propose, t.Stall, t.Suspect, t.SnapshotInterval} {
		if d < 0 {
			return c, kms.Errorf(kms.Invalid, "a period of the cluster's timing is negative")
		}
	}
	return c.settle()
}

// settle chooses the timing as far as it can be without measuring.
func (c Config) settle() (Config, error) {
	c.given = c.Timing
	if c.Profile != "" {
		if _, err := ParseProfile(string(c.Profile)); err != nil {
			return c, err
		}
	}
	switch {
	case c.Timing.Heartbeat > 0: // wins over any profile
		c.Profile = ""
		c.Timing = c.Timing.withDefaults()
	case c.Profile == "":
		c.Profile = LAN
		fallthrough
	default:
		c.Timing = c.Profile.apply(c.Timing)
	}
	return c, nil
}
