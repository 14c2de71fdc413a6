package engine

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms/state"
)

// announce tells the cluster once what commands this node's program knows. Kinds that
// are new since the first release are taken when all nodes have announced them.
func (a *Agent) announce(ctx context.Context, st *state.State) time.Duration {
	if lost := st.Forgotten(a.e.node); len(lost) > 0 && !a.downgraded {
		a.downgraded = true
		a.e.log.ErrorContext(ctx, "this node's program is older than the one before: it halts when a command comes that it does not know; install the newer release again",
			"kinds", len(lost), "type", lost[0].Type, "version", lost[0].Version)
	}
	news, any := st.News(a.e.node, state.Program(cmp.Or(a.e.cfg.Version, "unknown")))
	if n, ok := st.Node(a.e.node); !any || !ok || n.Root == 0 {
		return idleWait // a node without a root of its own cannot sign yet
	}
	return a.attempt(ctx, "announce", "announce", 0, func(ctx context.Context) error {
		_, err := a.e.submit(ctx, attempt{}, news)
		return err
	})
}

// waiting says which kinds of commands of this program the cluster does not take yet,
// because nodes have not announced that theirs knows them.
func waiting(st *state.State) []string {
	var l []string
	for _, k := range state.Program("").Kinds {
		lacking := st.Lacking(k)
		switch {
		case len(lacking) == 0:
		case k.Type == state.TypeFeature:
			l = append(l, fmt.Sprintf("%s wait for %s", state.Feature(k.Version), strings.Join(lacking, ", ")))
		default:
			l = append(l, fmt.Sprintf("commands of type %d version %d wait for %s", k.Type, k.Version, strings.Join(lacking, ", ")))
		}
	}
	return l
}
