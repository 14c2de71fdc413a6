package chaos

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/test/harness"
)

// suspicions reads from the nodes' access logs what they have suspected of others. Nobody
// lies here: all that there is to find is a clock that the faults have set.
func suspicions(c *harness.Coalition, clocks map[string]string) (unfounded []string, founded int, err error) {
	for _, n := range c.Nodes {
		err := audit.Read(filepath.Join(n.Data, "access"), func(_ uint64, e audit.Entry) error {
			if e.Action != "leader:suspect" {
				return nil
			}
			origin := strings.TrimPrefix(e.Resource, "node/")
			if _, set := clocks[origin]; set && e.Context["kind"] == cluster.Backdated {
				founded++
				return nil
			}
			unfounded = append(unfounded, fmt.Sprintf("%s suspects without a reason: %s %v", n.ID, e.Resource, e.Context))
			return nil
		})
		if err != nil {
			return nil, 0, fmt.Errorf("the access log of %s: %w", n.ID, err)
		}
	}
	return unfounded, founded, nil
}
