package chaos

import (
	"fmt"
	"path/filepath"

	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/test/harness"
)

// served is a data operation that a node has answered.
type served struct {
	node, action, key string
	version           uint32 // of the key that encrypted
}

// accessLogs verifies the access log of every node and holds it against the answers of
// which the callers know: each has its entry, which was durable before the answer
// left. It returns the number of entries of all.
func accessLogs(c *harness.Coalition, answered map[served]int) (entries int, err error) {
	logged := map[served]int{}
	for _, n := range c.Nodes {
		err := audit.Read(filepath.Join(n.Data, "access"), func(_ uint64, e audit.Entry) error {
			entries++
			if e.Node != n.ID {
				return fmt.Errorf("an entry is of node %q", e.Node)
			}
			if e.Outcome == "ok" {
				logged[served{e.Node, e.Action, e.Resource, e.Version}]++
			}
			return nil
		})
		if err != nil {
			return entries, fmt.Errorf("the access log of %s: %w", n.ID, err)
		}
	}
	for s, count := range answered {
		if logged[s] < count {
			return entries, fmt.Errorf("%s has answered %d times %s with version %d of %s; its access log says %d", s.node, count, s.action, s.version, s.key, logged[s])
		}
	}
	return entries, nil
}
