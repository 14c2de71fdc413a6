package client

import (
	"context"

	"github.com/conclave-kms/conclave/kms/wire"
)

// AuditCheckpoints tells how far the logs are cosigned.
func (c *Client) AuditCheckpoints(ctx context.Context) (wire.Checkpoints, error) {
	return get[wire.Checkpoints](ctx, c, "/v1/audit/checkpoints")
}
