package cluster

import (
	"testing"
	"time"
)

func TestBetter(t *testing.T) {
	const applied, limit = 1000, 5 * time.Second
	good := func(id, site string, prefer ...string) candidate {
		return candidate{id, site, pong{pingInfo: pingInfo{Applied: applied, Fresh: int64(time.Second), Prefer: prefer}, rtt: 10 * time.Millisecond, at: time.Now()}}
	}
	but := func(c candidate, change func(*candidate)) []candidate {
		change(&c)
		return []candidate{c}
	}
	fr := good("fr-1", "fr", "fr", "de")
	near := good("fr-2", "fr", "fr", "de")
	near.rtt = time.Millisecond
	for name, c := range map[string]struct {
		prefer []string
		voters []candidate
		want   string
	}{
		"the preferred site":              {[]string{"fr"}, []candidate{fr}, "fr-1"},
		"the nearest there":               {[]string{"fr"}, []candidate{fr, near}, "fr-2"},
		"the better of two":               {[]string{"de", "fr"}, []candidate{fr, good("de-1", "de", "de")}, "de-1"},
		"no preference":                   {nil, []candidate{fr}, ""},
		"this site is as good":            {[]string{"jp", "fr"}, []candidate{fr}, ""},
		"nobody there":                    {[]string{"us"}, []candidate{fr}, ""},
		"it wants this site":              {[]string{"fr"}, []candidate{good("fr-1", "fr", "jp", "fr")}, ""},
		"it has no preference":            {[]string{"fr"}, []candidate{good("fr-1", "fr")}, ""},
		"its disk is full":                {[]string{"fr"}, but(fr, func(c *candidate) { c.ReadOnly = true }), ""},
		"it is stale":                     {[]string{"fr"}, but(fr, func(c *candidate) { c.Fresh = int64(limit) }), ""},
		"it was never proven up to date":  {[]string{"fr"}, but(fr, func(c *candidate) { c.Fresh = 1<<63 - 1 }), ""},
		"it has not answered for long":    {[]string{"fr"}, but(fr, func(c *candidate) { c.at = time.Now().Add(-limit) }), ""},
		"it lags":                         {[]string{"fr"}, but(fr, func(c *candidate) { c.Applied = applied - maxLag - 1 }), ""},
		"it is as far as can be expected": {[]string{"fr"}, but(fr, func(c *candidate) { c.Applied = applied - maxLag }), "fr-1"},
	} {
		if got := better("jp", c.prefer, applied, limit, c.voters); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}
