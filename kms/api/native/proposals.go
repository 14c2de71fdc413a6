package native

import (
	"net/url"
	"slices"
	"strconv"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
)

// proposalsRoute lists proposals by a query.
func proposalsRoute() route {
	rt := read("/v1/proposals", "listProposals", "A page of the proposals, newest first", func(c *call) (wire.Proposals, error) {
		q, err := proposalQuery(c.URL.Query())
		if err != nil {
			return wire.Proposals{}, err
		}
		return c.engine.Proposals(c.Context(), c.caller, q)
	})
	rt.query = []string{"open:boolean", "action:string", "target:string", "waits_for:string", "before", "limit"}
	return rt
}

// proposalQuery reads the query of a list. A misspelt filter would select all, so an
// unknown one is refused.
func proposalQuery(v url.Values) (q wire.ProposalQuery, err error) {
	for name, values := range v {
		if !slices.Contains([]string{"open", "action", "target", "waits_for", "before", "limit"}, name) || len(values) != 1 {
			return q, kms.Errorf(kms.Invalid, "the query has %q, which is unknown or repeated", name)
		}
	}
	number := func(name string, bits int) (n uint64) {
		if s := v.Get(name); s != "" && err == nil {
			if n, err = strconv.ParseUint(s, 10, bits); err != nil || n == 0 {
				err = kms.Errorf(kms.Invalid, "%s is not a number above 0", name)
			}
		}
		return n
	}
	q = wire.ProposalQuery{Action: v.Get("action"), Target: v.Get("target"), WaitsFor: v.Get("waits_for")}
	q.Before, q.Limit = number("before", 62), int(number("limit", 31))
	if s := v.Get("open"); s != "" && err == nil {
		if q.Open, err = strconv.ParseBool(s); err != nil {
			err = kms.Errorf(kms.Invalid, "open is neither true nor false")
		}
	}
	return q, err
}
