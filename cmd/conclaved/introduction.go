package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// introductionPath is where a node that joins keeps to whom it was introduced.
func introductionPath(dataDir string) string { return filepath.Join(dataDir, "introduction.json") }

// readIntroduction reads and checks a file of conclave node introduce for a cluster.
func readIntroduction(path, id string) (wire.Introduction, error) {
	var in wire.Introduction
	b, err := os.ReadFile(path)
	if err != nil {
		return in, err
	}
	if err = strictJSON(b, &in); err == nil {
		err = checkIntroduction(in, id)
	}
	if err != nil {
		return in, fmt.Errorf("%s: %w; make it with: conclave node introduce", path, err)
	}
	return in, nil
}

var lineage = regexp.MustCompile(`^[0-9a-f]{32}$`)

func checkIntroduction(in wire.Introduction, id string) error {
	switch {
	case in.Format != 1:
		return fmt.Errorf("format %d is not known", in.Format)
	case in.Cluster != id:
		return fmt.Errorf("it is of cluster %q, the genesis document of %s", in.Cluster, id)
	case in.Epoch > approval.MaxEpoch || (in.Epoch > 0) != lineage.MatchString(in.Lineage) || in.Epoch == 0 && in.Lineage != "":
		return fmt.Errorf("epoch %d with lineage %q; a lineage of 32 hexadecimal digits goes with every epoch after 0, and with no other", in.Epoch, in.Lineage)
	case len(in.Nodes) == 0 || len(in.Nodes) > state.MaxNodes || len(in.Sites) > state.MaxSites:
		return fmt.Errorf("it names %d nodes of %d sites; at least one node, and no more than %d of %d", len(in.Nodes), len(in.Sites), state.MaxNodes, state.MaxSites)
	}
	for _, s := range in.Sites {
		if err := errors.Join(kms.CheckName("site", s.ID), approval.CheckTrustDomain(s.TrustDomain), approval.CheckCAs(s.CAs)); err != nil {
			return err
		}
	}
	for _, n := range in.Nodes {
		if err := kms.CheckName("node", n.ID); err != nil {
			return err
		}
		if _, _, err := net.SplitHostPort(n.Address); err != nil {
			return fmt.Errorf("node %s: address %q is not host:port", n.ID, n.Address)
		}
		if !slices.ContainsFunc(in.Sites, func(s wire.IntroducedSite) bool { return s.ID == n.Site }) {
			return fmt.Errorf("node %s is of site %q, which it does not introduce", n.ID, n.Site)
		}
	}
	return nil
}

// keepIntroduction puts a file of conclave node introduce where run finds it.
func keepIntroduction(cfg Config, file, id string) error {
	if _, err := readIntroduction(file, id); err != nil {
		return err
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	return replaceFile(introductionPath(cfg.DataDir), b, 0o600)
}

// introduced returns to whom this node was introduced, nobody where it was not.
func introduced(dataDir, id string) (cluster.Introduction, error) {
	var out cluster.Introduction
	in, err := readIntroduction(introductionPath(dataDir), id)
	if errors.Is(err, fs.ErrNotExist) {
		return out, nil
	}
	if err != nil {
		return out, err
	}
	out.Epoch, out.Lineage = in.Epoch, in.Lineage
	for _, n := range in.Nodes {
		out.Nodes = append(out.Nodes, state.Node{ID: n.ID, Site: n.Site, Address: n.Address})
	}
	for _, s := range in.Sites {
		out.Sites = append(out.Sites, state.Site{ID: s.ID, TrustDomain: s.TrustDomain, CAs: s.CAs})
	}
	return out, nil
}
