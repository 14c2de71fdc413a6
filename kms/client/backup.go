package client

import (
	"context"
	"errors"
	"io"
	"net/http"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
)

// Recoveries lists the times that custodians had the cluster go on from a backup.
func (c *Client) Recoveries(ctx context.Context) ([]wire.Recovery, error) {
	r, err := get[wire.Recoveries](ctx, c, "/v1/recoveries")
	return r.Recoveries, err
}

// Backup writes a backup of the cluster's state to w as it arrives, from the first
// node that answers. There is no other try once bytes have come, and no limit of time
// but ctx's: package backup tells whether the file is whole.
func (c *Client) Backup(ctx context.Context, w io.Writer) error {
	var last error
	for _, base := range c.bases {
		req, err := newRequest(ctx, base, http.MethodGet, "/v1/backup", nil, callOptions{})
		if err != nil {
			return kms.Wrap(kms.Invalid, err, "the request cannot be made", "")
		}
		req.Header.Set("Accept", "application/octet-stream, application/problem+json")
		resp, err := c.http.Do(req)
		if err != nil {
			verdict, err := explain(base, http.MethodGet, err)
			if verdict == final {
				return err
			}
			last = preferred(last, err)
			continue
		}
		if resp.StatusCode >= 300 {
			b, rerr := io.ReadAll(io.LimitReader(resp.Body, wire.MaxBody))
			err := problem(resp, b)
			if cerr := errors.Join(rerr, resp.Body.Close()); cerr != nil {
				err = kms.Wrap(kms.Unavailable, cerr, "the answer of "+base.Host+" broke off", "try again")
			}
			switch kms.KindOf(err) {
			case kms.Unavailable, kms.Stale, kms.ReadOnly, kms.Conflict:
				last = preferred(last, err)
				continue
			}
			return err
		}
		_, err = io.Copy(w, resp.Body)
		if err = errors.Join(err, resp.Body.Close()); err != nil {
			return kms.Wrap(kms.Unavailable, err, "the backup broke off: "+err.Error(), "ask again")
		}
		return nil
	}
	return last
}
