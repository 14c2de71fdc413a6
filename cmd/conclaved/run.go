package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/api/native"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/engine"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/notify"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/kms/sink"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
	"github.com/conclave-kms/conclave/tpm"
)

func runCommand() *cobra.Command {
	var config string
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the node until it is interrupted",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(config)
			if err != nil {
				return err
			}
			log, err := newLogger(cfg.Log)
			if err != nil {
				return err
			}
			slog.SetDefault(log) // for what packages below say
			return runNode(cmd.Context(), cfg, log)
		},
	}
	cmd.Flags().StringVarP(&config, "config", "c", "conclaved.toml", "configuration file")
	return cmd
}

func logLevel(s string) (slog.Level, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(s)); err != nil {
		return 0, fmt.Errorf("%q is not debug, info, warn or error", s)
	}
	return l, nil
}

func newLogger(c LogConfig) (*slog.Logger, error) {
	level, err := logLevel(c.Level)
	if err != nil {
		return nil, err
	}
	opts := &slog.HandlerOptions{Level: level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, opts)), nil
	}
	return slog.New(slog.NewTextHandler(os.Stderr, opts)), nil
}

// memoryTarget is the size in bytes above which the collector works harder.
const memoryTarget = 256 << 20

// noCoreDumps keeps key material out of core files; what lies in locked memory
// is excluded besides.
func noCoreDumps() error {
	return syscall.Setrlimit(syscall.RLIMIT_CORE, &syscall.Rlimit{})
}

// node is everything that runs, in the order in which it was started.
type node struct {
	cfg         Config
	log         *slog.Logger
	roots       *heldRoots
	device      device
	root        *keyring.Root
	cache       *keyring.Cache
	access      *audit.Log
	sinks       []*sink.Queue  // of copies of the access log
	outbox      *notify.Outbox // nil: there are no webhooks
	clusterLog  *audit.ClusterLog
	cluster     *cluster.Node
	certificate *x509.Certificate // its own
	engine      *engine.Engine
	watcher     *watcher                      // nil: it does not look for anomalies
	watching    atomic.Pointer[engine.Engine] // the same, for what the consensus layer reports
	marks       *engine.Marks
	witness     *secret.Bytes // seed of the key for checkpoints, nil before the engine is open
	registry    *prometheus.Registry
	failed      chan error
	inForce     chan struct{} // closed when the state has shown the root that the node runs on
	closers     []func() error
}

// errAgain asks for the node's parts to be started anew, on another hardware root.
var errAgain = errors.New("start again")

// runNode runs the node until ctx ends or it must stop. Its parts start anew when
// it has adopted another hardware root.
func runNode(ctx context.Context, cfg Config, log *slog.Logger) (err error) {
	if err := noCoreDumps(); err != nil {
		return fmt.Errorf("disable core dumps: %w", err)
	}
	debug.SetGCPercent(800) // the live heap is a few MiB: collect less often
	debug.SetMemoryLimit(memoryTarget)
	if cfg.Device.Type == "pkcs11" && !cfg.Device.isolated() {
		// A processor blocked in a device call would be taken from its worker whenever
		// all others are busy.
		runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + 1)
	}
	log = log.With("node", cfg.Node)
	roots, err := openRoots(ctx, cfg, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, roots.close()) }()
	for {
		err := runOnce(ctx, cfg, log, roots)
		if !errors.Is(err, errAgain) || ctx.Err() != nil {
			return err
		}
		roots.follow(log)
	}
}

// runOnce starts the node's parts on the roots that are held, and takes them down
// again in reverse order.
func runOnce(ctx context.Context, cfg Config, log *slog.Logger, roots *heldRoots) (err error) {
	n := &node{cfg: cfg, log: log, roots: roots, registry: prometheus.NewRegistry(), failed: make(chan error, 1), marks: engine.NewMarks(), inForce: make(chan struct{})}
	defer func() {
		defer endIfStuck(stopLimit, log, os.Exit)()
		for i := len(n.closers) - 1; i >= 0; i-- {
			err = errors.Join(err, n.closers[i]())
		}
	}()
	start := []func(context.Context) error{n.useRoot, n.openLogs, n.openCluster, n.openOutbox, n.openEngine}
	serve := n.serve
	if roots.present == nil {
		start, serve = start[:3], n.wait
	}
	for _, f := range start {
		if err := f(ctx); err != nil {
			return err
		}
	}
	return serve(ctx)
}

func (n *node) closeLater(f func() error) { n.closers = append(n.closers, f) }

func (n *node) useRoot(context.Context) error {
	own := n.roots.own()
	n.device, n.root = own.dev, own.root
	if n.roots.present == nil {
		return nil
	}
	var err error
	n.cache, err = keyring.NewCache(n.root, keyring.Limits{TTL: n.cfg.Cache.TTL.Duration, MaxKEKs: n.cfg.Cache.KEKs, MaxKeys: n.cfg.Cache.Keys})
	if err != nil {
		return err
	}
	n.closeLater(func() error { n.cache.Purge(); return nil })
	n.log.Info("device is ready", "device", n.device.Describe(), "root", own.file.Root)
	return nil
}

func (n *node) openLogs(context.Context) error {
	access, err := audit.Open(filepath.Join(n.cfg.DataDir, "access"), audit.Options{})
	if err != nil {
		return err
	}
	n.access = access
	n.closeLater(access.Close)
	if n.sinks, err = n.cfg.Audit.open(n.log); err != nil {
		return err
	}
	n.closeLater(func() error { return closeSinks(n.sinks) })
	clusterLog, err := audit.OpenClusterLog(filepath.Join(n.cfg.DataDir, "cluster-log"))
	if err != nil {
		return err
	}
	n.clusterLog = clusterLog
	n.closeLater(clusterLog.Close)
	for _, removed := range []string{access.Recovered(), clusterLog.Recovered()} {
		if removed != "" {
			n.log.Warn("recovered after a crash", "what", removed)
		}
	}
	return nil
}

func (n *node) openCluster(ctx context.Context) error {
	signed, err := readSignedGenesis(n.cfg.Genesis)
	if err != nil {
		return err
	}
	genesis, err := signed.Verify()
	if err != nil {
		if g, perr := state.ParseGenesis(signed.Genesis); perr == nil && unsigned(signed, g) != "" {
			return fmt.Errorf("%s: %w; missing: %s", n.cfg.Genesis, err, unsigned(signed, g))
		}
		return fmt.Errorf("%s: %w; if it was in order before, the file is damaged: copy the signed document from another node of the cluster", n.cfg.Genesis, err)
	}
	if err := n.checkGenesis(genesis); err != nil {
		return err
	}
	known, err := introduced(n.cfg.DataDir, kms.ClusterID(signed.Genesis))
	if err != nil {
		return err
	}
	cert, err := n.cfg.TLS.load()
	if err != nil {
		return err
	}
	n.certificate = cert.Leaf
	listener, err := listen(ctx, n.cfg.Cluster.Listen, "cluster.listen")
	if err != nil {
		return err
	}
	n.cluster, err = cluster.Open(ctx, cluster.Config{
		NodeID: n.cfg.Node, DataDir: filepath.Join(n.cfg.DataDir, "raft"), Listener: listener, Genesis: signed, Certificate: cert,
		Sign: n.device.Sign, SigningSuite: uint16(n.signingSuite()), Signing: n.roots.own().public, Site: n.cfg.Site, Introduced: known, Logger: n.log, Counter: n.counter(ctx, kms.ClusterID(signed.Genesis)), Applied: n.clusterLog.Last(),
		Timing: n.cfg.Cluster.timing(), Profile: n.cfg.Cluster.profile(), PreferSites: n.cfg.Cluster.PreferSites, OnApply: n.applied, OnSuspicion: n.suspected, OnRestore: n.restored, OnSnapshot: n.clusterLog.Sync, Records: n.clusterLog.Pack,
	})
	if err != nil {
		return err
	}
	n.closeLater(n.cluster.Close)
	gauges, err := newNodeGauges(n.cluster, filepath.Join(n.cfg.DataDir, "raft"), cert)
	if err != nil {
		return err
	}
	return n.registry.Register(gauges)
}

// signingSuite is the suite of the signing key in the node's own device.
func (n *node) signingSuite() pqc.SuiteID {
	_, sig := n.roots.own().cfg.Device.suites()
	return sig
}

func (n *node) checkGenesis(g state.Genesis) error {
	for _, node := range g.Nodes {
		if node.ID == n.cfg.Node {
			if node.Site != n.cfg.Site {
				return fmt.Errorf("the configuration says site %s, the genesis document says %s", n.cfg.Site, node.Site)
			}
			if n.roots.own().file.Root == firstRoot { // later ones are in the state alone: checkRoot
				return sameRoot(node, n.device, n.root)
			}
			return nil
		}
	}
	// A later member: its card shows that it is to join, or its data that it has. Whose
	// the data is, cluster.Open looks at; a restored directory holds no card.
	if _, err := os.Stat(filepath.Join(n.cfg.DataDir, "raft", "identity.json")); err == nil {
		return nil
	}
	if c, err := readCard(cardPath(n.cfg.DataDir)); err == nil && c.Node == n.cfg.Node && len(c.Possession) > 0 {
		return nil
	}
	return fmt.Errorf("the genesis document %s does not name node %s; to join a running cluster, see: conclaved join --help", n.cfg.Genesis, n.cfg.Node)
}

// applied keeps the cluster log: every command with its leaf, in order.
func (n *node) applied(st *state.State, raw []byte, r state.Result) {
	n.marks.Applied(st, r)
	if err := n.clusterLog.Append(r.Index, raw, r.Leaf); err != nil {
		n.fail(fmt.Errorf("the cluster log cannot be written: %w", err))
	}
	if err := sameHistory(n.clusterLog, r.Index, st.LogRoot); err != nil {
		n.fail(fmt.Errorf("%w; data directory %s", err, n.cfg.DataDir))
	}
}

// sameHistory compares, when a restarted node has applied again what it had applied
// before, the root of the state's log with that of the log on disk. Raft's log has no
// checksums: an entry damaged there is no longer a valid command, has no effect, and
// would leave this node with a state of its own until the nodes next compare theirs.
func sameHistory(log *audit.ClusterLog, index uint64, root func() []byte) error {
	if index != log.Last() {
		return nil
	}
	stored, ok := log.Root()
	if !ok || bytes.Equal(stored, root()) {
		return nil
	}
	return fmt.Errorf("what raft/raft.db yields is not what this node had applied according to cluster-log (entry %d): "+
		"one of the two is damaged; put back a copy of the data directory, or remove the node (conclave node remove) and let the machine join under a new name", index)
}

func (n *node) restored(st *state.State) {
	if err := n.clusterLog.Restored(st.Index(), st.LogSize(), st.LogRoot()); err != nil {
		n.fail(fmt.Errorf("the cluster log cannot be written: %w", err))
	}
}

// fail ends the process: something happened after which it must not go on.
func (n *node) fail(err error) {
	select {
	case n.failed <- err:
	default:
	}
}

func (n *node) openEngine(ctx context.Context) error {
	checkpoints, err := n.openCheckpoints(ctx)
	if err != nil {
		return err
	}
	n.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	if err := n.watchAccess(); err != nil {
		return err
	}
	if err := n.registry.Register(sinkCounters(n.sinks)); err != nil {
		return err
	}
	n.engine, err = engine.New(engine.Config{
		Node: n.cfg.Node, Cluster: n.cluster, Cache: n.cache, Root: n.root, Signer: n.device, Device: n.device, Log: sink.Copied{Log: n.access, Sinks: n.sinks},
		Logger: n.log, Metrics: n.registry, Hold: n.cluster.Probation, Raft: n.raft, Version: version, Importers: importers(), SigningSuite: n.signingSuite(), Seed: n.keptSeed(), Certificate: n.certificate, Checkpoints: checkpoints,
		Past: func(since time.Time, f func(audit.Entry)) (bool, error) {
			return audit.ReadSince(filepath.Join(n.cfg.DataDir, "access"), since, f)
		},
	})
	if n.watcher != nil && err == nil {
		n.watcher.note = n.engine.NoteAnomaly // before there is anything to observe
	}
	if err == nil {
		n.watching.Store(n.engine)
	}
	return err
}

// keptSeed is what the cluster keeps of this node's root file.
func (n *node) keptSeed() *engine.KeptSeed {
	own := n.roots.own()
	suite, _ := own.cfg.Device.suites()
	return &engine.KeptSeed{Root: own.file.Root, Suite: uint16(suite), Wrapped: own.file.Wrapped}
}

// importers wrap keys for the devices of other nodes.
func importers() map[string]keyring.Importer {
	return map[string]keyring.Importer{
		hsm.ImportKind: {WrapHMAC: hsm.WrapHMAC, WrapSigner: hsm.WrapSigner},
		tpm.ImportKind: {WrapHMAC: tpm.WrapHMAC, WrapSigner: tpm.WrapSigner},
	}
}

// raft is the consensus layer's view in the API's words.
func (n *node) raft() wire.Raft {
	s := n.cluster.Status()
	r := wire.Raft{State: s.State, Leader: s.Leader, Term: s.Term, Applied: s.Applied, Committed: s.Committed, LastContactMS: s.LastContact.Milliseconds(),
		QuorumMS: s.Quorum.Milliseconds(), LeaseMS: s.Lease.Milliseconds(), HeartbeatMS: s.Heartbeat.Milliseconds(), Profile: string(s.Profile), Probation: s.Probation, ReadOnly: s.ReadOnly}
	for _, x := range s.Suspicions {
		r.Suspicions = append(r.Suspicions, suspicionView(x))
	}
	for _, p := range s.Peers {
		v := wire.Peer{ID: p.ID, Site: p.Site, Address: p.Address, Suffrage: p.Suffrage, HeardMS: p.Heard.Milliseconds(), Lag: p.Lag}
		if p.RTT > 0 {
			v.RTTUS, v.FreshMS = p.RTT.Microseconds(), p.Fresh.Milliseconds()
		}
		if p.ID == s.Node {
			v.HeardMS = 0
		}
		r.Peers = append(r.Peers, v)
	}
	return r
}

// serve runs the agent and the API until ctx ends or something fails.
func (n *node) serve(ctx context.Context) error {
	cert, err := n.cfg.TLS.load()
	if err != nil {
		return err
	}
	if err := certifies(cert, n.cfg.API.Advertise); err != nil {
		n.log.Warn("clients will refuse this node: have the site's CA issue a certificate with the host of api.advertise as SAN", "advertise", n.cfg.API.Advertise, "err", err)
	}
	agent, err := engine.NewAgent(n.engine, engine.AgentConfig{Watch: n.cluster})
	if err != nil {
		return err
	}
	listener, err := listen(ctx, n.cfg.API.Listen, "api.listen")
	if err != nil {
		return err
	}
	server := native.New(native.Config{Engine: n.engine, Metrics: promhttp.HandlerFor(n.registry, promhttp.HandlerOpts{}), Logger: n.log}).HTTPServer()
	tlsListener := tls.NewListener(listener, n.engine.ServerTLS(cert, n.cfg.API.RequireHybrid))

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { // whose commands the cluster would not take before
		select {
		case <-n.inForce:
			agent.Run(ctx)
		case <-ctx.Done():
		}
	})
	wg.Go(func() { n.watchRoot(ctx) })
	if n.outbox != nil {
		wg.Go(func() {
			(&notifier{node: n.cfg.Node, log: n.log, outbox: n.outbox, alarms: n.engine, cluster: n.cluster}).run(ctx)
		})
	}
	wg.Go(func() { filler{node: n.cfg.Node, log: n.log, own: n.clusterLog, others: n.cluster}.run(ctx) })
	wg.Go(func() { n.exportLogs(ctx) })
	wg.Go(func() {
		if err := server.Serve(tlsListener); !errors.Is(err, http.ErrServerClosed) {
			n.fail(fmt.Errorf("api: %w", err))
		}
	})
	n.log.Info("serving", "api", n.cfg.API.Listen, "cluster", n.cluster.State().Cluster())

	select {
	case <-ctx.Done():
		err = nil
	case err = <-n.failed:
	case err = <-n.cluster.Done():
		err = n.again(err)
	}
	n.log.Info("stopping")
	cancel()
	grace, stop := context.WithTimeout(context.Background(), 5*time.Second)
	defer stop()
	if server.Shutdown(grace) != nil {
		_ = server.Close() // requests that did not end in time
	}
	wg.Wait()
	return err
}

// listen opens a port; a taken one names the field and what to do.
func listen(ctx context.Context, address, field string) (net.Listener, error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("%s: %s is in use by another process; stop it or choose another port", field, address)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	return l, nil
}
