package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// A cluster whose nodes were all set back to an old copy looks like one that is in
// order. Its custodians can tell: they remember what they have seen and what they have
// signed. memory is that memory, a file for each cluster.

// memoryEnv names the directory of the memory.
const memoryEnv = "CONCLAVE_MEMORY"

const (
	memoryFormat = 1
	keptVotes    = 64 // newest votes remembered
)

// memory is what this person has seen of a cluster.
type memory struct {
	Format  int       `json:"format"`
	Cluster string    `json:"cluster"`
	Epoch   uint64    `json:"epoch"`
	Lineage string    `json:"lineage"`
	LogSize uint64    `json:"log_size"` // the most leaves that any node has shown
	LogRoot []byte    `json:"log_root"`
	Node    string    `json:"node"` // that showed them
	Time    time.Time `json:"time"`
	Votes   []ballot  `json:"votes"` // newest last
}

// ballot is a vote that this person has cast and the cluster has recorded.
type ballot struct {
	Proposal  string    `json:"proposal"`
	Custodian string    `json:"custodian"`
	Verdict   string    `json:"verdict"`
	Lineage   string    `json:"lineage"`
	Time      time.Time `json:"time"`
}

// memoryDir is $CONCLAVE_MEMORY, else the conclave directory for the user's state
// (XDG Base Directory specification).
func memoryDir() (string, error) {
	if dir := os.Getenv(memoryEnv); dir != "" {
		return dir, nil
	}
	if dir := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "conclave"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(home, ".local", "state", "conclave"), nil
}

var clusterID = regexp.MustCompile(`^[0-9a-f]{32}$`)

func memoryPath(cluster string) (string, error) {
	dir, err := memoryDir()
	if err != nil {
		return "", err
	}
	if !clusterID.MatchString(cluster) {
		return "", kms.Errorf(kms.Invalid, "%q is not the identity of a cluster", cluster)
	}
	return filepath.Join(dir, cluster+".json"), nil
}

// recall reads the memory of a cluster; known is false where there is none.
func recall(cluster string) (m memory, known bool, err error) {
	path, err := memoryPath(cluster)
	if err != nil {
		return m, false, err
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return memory{Format: memoryFormat, Cluster: cluster}, false, nil
	}
	if err == nil {
		dec := json.NewDecoder(bytes.NewReader(b))
		dec.DisallowUnknownFields()
		err = dec.Decode(&m)
	}
	if err != nil || m.Format != memoryFormat || m.Cluster != cluster {
		return m, false, kms.Wrap(kms.Invalid, err, path+", which remembers the cluster, is not readable", "restore it; remove it only if you know why it is damaged: a cluster that was set back is then not noticed")
	}
	return m, true, nil
}

func (m memory) save() error {
	path, err := memoryPath(m.Cluster)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	return replace(path, append(b, '\n'))
}

// catchUp is how long a node may lag behind what another one has shown.
const catchUp = 10 * time.Second

// recognise compares the cluster with what this person remembers of it, and
// remembers what is new. Errors: kms.Conflict if it has less, or something else, than
// before. Where there is no place to remember anything it says so and goes on.
func (a *app) recognise(ctx context.Context, cmd *cobra.Command, c *client.Client) error {
	s, err := c.Status(ctx)
	if err != nil {
		return err
	}
	if _, err := memoryDir(); err != nil {
		fmt.Fprintf(cmd.ErrOrStderr(), "note: nothing is remembered of the cluster, so one that was set back is not noticed; set %s to a directory\n", memoryEnv)
		return nil
	}
	m, known, err := recall(s.Cluster)
	if err != nil {
		return err
	}
	if !known {
		return m.seen(s).save()
	}
	if err := m.sameHistory(s); err != nil {
		return err
	}
	for until := time.Now().Add(catchUp); s.LogSize < m.LogSize && time.Now().Before(until); {
		if err := sleep(ctx, 250*time.Millisecond); err != nil {
			return err
		}
		if s, err = c.Status(ctx); err != nil {
			return err
		}
	}
	if err := m.compare(s); err != nil {
		return err
	}
	if err := m.hasVotes(ctx, c); err != nil {
		return err
	}
	return m.seen(s).save()
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// seen returns the memory with what a node shows, where that is more.
func (m memory) seen(s wire.Status) memory {
	if s.Lineage != m.Lineage || s.LogSize >= m.LogSize {
		m.Epoch, m.Lineage, m.LogSize, m.LogRoot, m.Node, m.Time = s.Epoch, s.Lineage, s.LogSize, s.LogRoot, s.Node, s.Time
	}
	return m
}

const askAround = "do not sign anything; ask the custodians of other sites what they see, by other nodes too (CONCLAVE_ADDR). "

// sameHistory refuses a history that is not the one remembered.
func (m memory) sameHistory(s wire.Status) error {
	if s.Lineage == m.Lineage {
		return nil
	}
	msg := fmt.Sprintf("node %s shows epoch %d of the cluster (history %s); this person knows epoch %d (history %s, seen %s)", s.Node, s.Epoch, s.Lineage, m.Epoch, m.Lineage, when(m.Time))
	if s.Epoch > m.Epoch {
		return &kms.Error{Kind: kms.Conflict, Msg: msg + ": custodians have had the cluster go on from a backup",
			Fix: "look at it with conclave memory show, and if it is what was agreed: conclave memory accept"}
	}
	return &kms.Error{Kind: kms.Conflict, Msg: msg + ": this is a history that was given up, or another one", Fix: askAround + "A node that was left behind by a recovery must be stopped"}
}

// compare refuses a log that is shorter than the one remembered, or another.
func (m memory) compare(s wire.Status) error {
	switch {
	case s.LogSize < m.LogSize:
		return &kms.Error{Kind: kms.Conflict,
			Msg: fmt.Sprintf("node %s shows a log of %d entries; on %s node %s showed %d: the cluster was set back, or this node is cut off from it", s.Node, s.LogSize, when(m.Time), m.Node, m.LogSize),
			Fix: askAround + "If all nodes were set back to an old copy, take the newest copy or backup there is and begin a new epoch with it: conclave recover --help"}
	case s.LogSize == m.LogSize && !bytes.Equal(s.LogRoot, m.LogRoot):
		return &kms.Error{Kind: kms.Conflict,
			Msg: fmt.Sprintf("node %s shows another log of %d entries (root %s) than node %s on %s (root %s)", s.Node, s.LogSize, b64(s.LogRoot), m.Node, when(m.Time), b64(m.LogRoot)),
			Fix: askAround + "Keep the data directories for examination"}
	}
	return nil
}

// hasVotes asks for the newest vote that this person has cast. A cluster that was set
// back before it and has grown since does not have it.
func (m memory) hasVotes(ctx context.Context, c *client.Client) error {
	for i := len(m.Votes) - 1; i >= 0; i-- {
		v := m.Votes[i]
		if v.Lineage != m.Lineage {
			continue
		}
		p, err := c.Proposal(ctx, v.Proposal)
		if err == nil {
			for _, got := range p.Votes {
				if got.Statement.Custodian == v.Custodian {
					return nil
				}
			}
		} else if kms.KindOf(err) != kms.NotFound {
			return err
		}
		return &kms.Error{Kind: kms.Conflict,
			Msg: fmt.Sprintf("the cluster does not know the vote of %s on proposal %s any more, which it had recorded on %s: it was set back", v.Custodian, v.Proposal, when(v.Time)),
			Fix: askAround + "See: conclave recover --help"}
	}
	return nil
}

// remember adds a vote that the cluster has recorded.
func (a *app) remember(ctx context.Context, cmd *cobra.Command, c *client.Client, v wire.Statement) error {
	if _, err := memoryDir(); err != nil {
		return nil // recognise has said so
	}
	s, err := c.Status(ctx)
	if err != nil {
		return err
	}
	m, _, err := recall(s.Cluster)
	if err != nil {
		return err
	}
	m = m.seen(s)
	m.Votes = append(m.Votes, ballot{Proposal: v.Proposal, Custodian: v.Custodian, Verdict: v.Verdict, Lineage: s.Lineage, Time: s.Time})
	m.Votes = m.Votes[max(0, len(m.Votes)-keptVotes):]
	return m.save()
}

// nextEpoch is the number after the highest that the state or this person knows.
func (a *app) nextEpoch(st *state.State) uint64 {
	m, _, _ := recall(st.Cluster()) // not readable: the state's
	return max(st.Epoch(), m.Epoch) + 1
}

// contradicts refuses the state of a backup that cannot be of the history which this person
// has seen: another log of the same length, or one that is as long and lacks a vote that
// this person has cast. A backup is signed by one node, and statements that this node has
// left out are not missed by those that are in it. A backup from before what was seen
// contradicts nothing; see remembersMore.
func (a *app) contradicts(st *state.State) error {
	m, known, err := recall(st.Cluster())
	if err != nil || !known || m.Lineage != st.Lineage() || m.LogSize > st.LogSize() {
		return err
	}
	const fix = "do not sign anything; compare with backups from nodes of other sites (conclave backup create, verify)"
	if m.LogSize == st.LogSize() && !bytes.Equal(m.LogRoot, st.LogRoot()) {
		return &kms.Error{Kind: kms.Conflict, Fix: fix,
			Msg: fmt.Sprintf("the backup has another log of %d entries (root %x) than node %s showed to this person on %s (root %x)", st.LogSize(), st.LogRoot(), m.Node, when(m.Time), m.LogRoot)}
	}
	for _, v := range m.Votes {
		if v.Lineage != m.Lineage {
			continue
		}
		p, _ := st.Proposal(v.Proposal)
		if !slices.ContainsFunc(p.Votes, func(x state.Vote) bool { return x.Statement.Custodian == v.Custodian }) {
			return &kms.Error{Kind: kms.Conflict, Fix: fix,
				Msg: fmt.Sprintf("the backup lacks the vote of %s on proposal %s, which the cluster had recorded on %s, though its log is said to be longer: something was left out of it", v.Custodian, v.Proposal, when(v.Time))}
		}
	}
	return nil
}

// remembersMore says what this person has seen after a backup's state, "" for nothing.
func (a *app) remembersMore(st *state.State) string {
	m, known, err := recall(st.Cluster())
	switch {
	case err != nil:
		return "this person's memory of the cluster cannot be read: " + err.Error()
	case known && m.Epoch > st.Epoch():
		return fmt.Sprintf("this person has seen epoch %d of the cluster; the backup is of epoch %d", m.Epoch, st.Epoch())
	case known && m.Lineage == st.Lineage() && m.LogSize > st.LogSize():
		return fmt.Sprintf("this person has seen %d entries in the cluster's log on %s; the backup ends at %d: what came after is lost", m.LogSize, when(m.Time), st.LogSize())
	}
	return ""
}

func (a *app) memoryCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "memory",
		Short: "What this person has seen of the cluster, to notice one that was set back",
		Long: `conclave remembers for each cluster the longest log that any node has shown to this
person, its root, and the votes that this person has cast, in ` + memoryEnv + ` (default:
the user's state directory, ~/.local/state/conclave). Before it signs a vote it compares: a
cluster with less, or with something else, was set back to an old copy, or this node
was. Nothing is signed then.`,
	}
	cmd.AddCommand(a.memoryShowCommand(), a.memoryAcceptCommand())
	return cmd
}

// remembered is the memory beside what the cluster shows.
type remembered struct {
	Known      memory          `json:"known"`
	Shown      wire.Status     `json:"shown"`
	Recoveries []wire.Recovery `json:"recoveries"`
}

func fetchRemembered(ctx context.Context, c *client.Client) (remembered, error) {
	s, err := c.Status(ctx)
	if err != nil {
		return remembered{}, err
	}
	m, _, err := recall(s.Cluster)
	if err != nil {
		return remembered{}, err
	}
	l, err := c.Recoveries(ctx)
	return remembered{m, s, l}, err
}

func (r remembered) table(w io.Writer) {
	row(w, "", "REMEMBERED", "SHOWN BY "+r.Shown.Node)
	row(w, "epoch", r.Known.Epoch, r.Shown.Epoch)
	row(w, "history", or(r.Known.Lineage, "-"), r.Shown.Lineage)
	row(w, "log entries", r.Known.LogSize, r.Shown.LogSize)
	row(w, "log root", or(b64(r.Known.LogRoot), "-"), b64(r.Shown.LogRoot))
	row(w, "time", when(r.Known.Time), when(r.Shown.Time))
	row(w, "votes", len(r.Known.Votes))
	for _, x := range r.Recoveries {
		row(w)
		row(w, "recovery", fmt.Sprintf("epoch %d began %s from a backup with %d log entries", x.Epoch, when(x.Time), x.LogSize))
		row(w, "", "approved by "+strings.Join(x.Custodians, ", "))
		row(w, "", "voters "+strings.Join(x.Voters, ", "))
		row(w, "", fmt.Sprintf("reason %q", x.Reason))
	}
}

func (a *app) memoryShowCommand() *cobra.Command {
	return &cobra.Command{
		Use: "show", Short: "Show what is remembered beside what the cluster shows", Args: arguments(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
				r, err := fetchRemembered(ctx, c)
				if err != nil {
					return err
				}
				return a.show(cmd, r, r.table)
			})
		},
	}
}

func (a *app) memoryAcceptCommand() *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "accept",
		Short: "Take what the cluster shows for true, after a recovery that this person knows of",
		Args:  arguments(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
				r, err := fetchRemembered(ctx, c)
				if err != nil {
					return err
				}
				if !yes {
					if err := a.ask(cmd, r.table, "Forget what is remembered, and remember what is shown?", "nothing was changed"); err != nil {
						return err
					}
				}
				m := memory{Format: memoryFormat, Cluster: r.Shown.Cluster, Votes: r.Known.Votes}.seen(r.Shown)
				if r.Shown.Lineage == r.Known.Lineage {
					m.Votes = nil // some of them may be gone
				}
				return m.save()
			})
		},
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}
