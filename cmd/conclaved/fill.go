package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/state"
)

// fillEvery is how often a node looks whether its cluster log lacks commands.
const fillEvery = 30 * time.Second

// filler fetches what a node's cluster log lacks, since it took over a snapshot, from the
// other nodes.
type filler struct {
	node string
	log  *slog.Logger
	own  interface {
		Missing() (from, n uint64)
		Fill(from uint64, records []audit.Record) error
	}
	others interface {
		State() *state.State
		FetchRecords(ctx context.Context, peer string, leaf uint64) ([]byte, error)
	}
}

// run looks at once and then regularly until ctx ends.
func (f filler) run(ctx context.Context) {
	t := time.NewTicker(fillEvery)
	defer t.Stop()
	for {
		f.fill(ctx)
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// fill asks one node after the other until nothing is missing.
func (f filler) fill(ctx context.Context) {
	before, n := f.own.Missing()
	if n == 0 {
		return
	}
	for _, m := range f.others.State().Members() {
		if m.ID == f.node {
			continue
		}
		if err := f.from(ctx, m.ID); err != nil {
			f.log.DebugContext(ctx, "a node gave nothing of the cluster log that is missing here", "peer", m.ID, "err", err)
		}
		if _, n := f.own.Missing(); n == 0 {
			f.log.InfoContext(ctx, "the cluster log is complete again", "fetched_from_leaf", before)
			return
		}
		if ctx.Err() != nil {
			return
		}
	}
	f.log.WarnContext(ctx, "the cluster log has a gap that no node in reach fills; trying on", "leaves", n, "from", before)
}

// from fetches from one node as long as it brings anything on.
func (f filler) from(ctx context.Context, peer string) error {
	for {
		leaf, n := f.own.Missing()
		if n == 0 {
			return nil
		}
		b, err := f.others.FetchRecords(ctx, peer, leaf)
		if err != nil {
			return err
		}
		records, err := audit.Unpack(b)
		if err != nil {
			return err
		}
		if err := f.own.Fill(leaf, records); err != nil {
			return err
		}
		if next, left := f.own.Missing(); left > 0 && next <= leaf {
			return nil // nothing came
		}
	}
}
