package main

import (
	"context"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/kms/wire"
)

// suspected records what this node has come to suspect of the leader or of another's clock.
func (n *node) suspected(s cluster.Suspicion) {
	e := n.watching.Load()
	if e == nil {
		return // it starts; the log on standard error has it
	}
	if err := e.Suspect(context.Background(), suspicionView(s)); err != nil {
		n.log.Error("a suspicion is not in the access log", "error", err)
	}
}

// suspicionView is a suspicion in the API's words.
func suspicionView(s cluster.Suspicion) wire.Suspicion {
	return wire.Suspicion{Kind: s.Kind, Leader: s.Leader, Term: s.Term, Origin: s.Origin, First: s.First.UTC(), Last: s.Last.UTC(),
		Count: s.Count, DelayMS: s.Delay.Milliseconds(), Command: s.Command, Text: s.Text}
}
