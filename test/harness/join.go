package harness

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/wire"
)

// Add makes a node that the genesis does not name: its directory, token, hardware root
// and card, as an operator does with conclaved join. Custodians have to let it in, and
// it is not started.
func (c *Coalition) Add(ctx context.Context, site, id string) (*Node, error) {
	n, err := c.place(c.plan, c.authorities[site], site, id)
	if err != nil {
		return nil, err
	}
	n.found = "join"
	if err := c.equip(ctx, n); err != nil {
		return nil, err
	}
	c.Nodes = append(c.Nodes, n)
	return n, nil
}

// Card is the file that a node's card is in.
func (n *Node) Card() string { return filepath.Join(n.Data, "node.json") }

// EnvAs is the environment of conclave for an identity of a site, asking a node.
func (c *Coalition) EnvAs(n *Node, site, role string) Env {
	cert := filepath.Join(c.Dir, "clients", site+"-"+role)
	return base().With("CONCLAVE_ADDR", n.API, "CONCLAVE_CACERT", filepath.Join(c.Dir, "ca", "bundle.pem"),
		"CONCLAVE_ADMIN_CERT", cert+".crt", "CONCLAVE_ADMIN_KEY", cert+".key",
		"CONCLAVE_CLIENT_CERT", cert+".crt", "CONCLAVE_CLIENT_KEY", cert+".key")
}

// Carry has custodians approve a proposal and waits until a node has carried it out.
func (c *Coalition) Carry(ctx context.Context, at *Node, p wire.Proposal, custodians ...string) error {
	cl, err := c.Client(at, "operator", 20*time.Second)
	if err != nil {
		return err
	}
	for _, id := range custodians {
		k, err := c.Custodian(id)
		if err != nil {
			return err
		}
		s, err := k.Statement(approval.Approve, p)
		k.Key.Destroy()
		if err == nil {
			_, err = cl.Vote(ctx, p.ID, wire.VoteRequest{Statement: s})
		}
		if err != nil {
			return fmt.Errorf("the approval of %s: %w", id, err)
		}
	}
	return Within(ctx, readyWait, "proposal "+p.ID+" is carried out", func(ctx context.Context) error {
		now, err := cl.Proposal(ctx, p.ID)
		switch {
		case err != nil:
			return err
		case now.Progress == "executed":
			return nil
		case now.Progress == "rejected" || now.Progress == "void" || now.Progress == "expired":
			return Give(fmt.Errorf("it is %s: %s", now.Progress, now.Summary))
		}
		return errors.New(now.Summary)
	})
}
