package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/anomaly"
)

// AnomalyConfig has the node look for what is unusual in its access log. Fields that are
// absent are as anomaly.DefaultPolicy has them.
type AnomalyConfig struct {
	Learn      Duration               `toml:"learn"`       // before a first use is unusual
	RateFactor int64                  `toml:"rate_factor"` // times the busiest hour of seven days
	RateFloor  int64                  `toml:"rate_floor"`  // items in an hour that are never too many
	Denials    int64                  `toml:"denials"`     // in ten minutes
	Hours      map[string]HoursConfig `toml:"hours"`       // by names of their own
}

// HoursConfig is when keys are used.
type HoursConfig struct {
	Keyrings []string `toml:"keyrings"` // default: all
	Days     []string `toml:"days"`     // mon to sun; default: all
	From     string   `toml:"from"`     // "07:00"
	To       string   `toml:"to"`       // "19:00"; before from: past midnight
	Zone     string   `toml:"zone"`     // "Europe/Paris"; default UTC
}

var weekdays = []string{"sun", "mon", "tue", "wed", "thu", "fri", "sat"}

// check returns the first field that is wrong and why.
func (c *AnomalyConfig) check() (field, why string) {
	if c == nil {
		return "", ""
	}
	for name, v := range map[string]int64{"rate_factor": c.RateFactor, "rate_floor": c.RateFloor, "denials": c.Denials} {
		if v < 0 {
			return "anomaly." + name, "must be at least 1"
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.Hours)) {
		if field, why := c.Hours[name].check(); field != "" {
			return "anomaly.hours." + name + "." + field, why
		}
	}
	return "", ""
}

func (c HoursConfig) check() (field, why string) {
	for _, ring := range c.Keyrings {
		if err := kms.CheckName("keyring", ring); err != nil {
			return "keyrings", err.Error()
		}
	}
	for _, day := range c.Days {
		if !slices.Contains(weekdays, day) {
			return "days", fmt.Sprintf("%q is not one of %s", day, strings.Join(weekdays, ", "))
		}
	}
	from, ok := minutes(c.From)
	if !ok {
		return "from", fmt.Sprintf("%q is not a time such as \"07:00\"", c.From)
	}
	to, ok := minutes(c.To)
	if !ok {
		return "to", fmt.Sprintf("%q is not a time such as \"19:00\"", c.To)
	}
	if from == to {
		return "to", "it is from: leave the whole table out where keys are used all day"
	}
	if _, err := time.LoadLocation(c.Zone); err != nil || c.Zone == "Local" {
		return "zone", fmt.Sprintf("%q is not a time zone that this machine knows, such as \"Europe/Paris\"", c.Zone)
	}
	return "", ""
}

// minutes after midnight of "15:04"; "24:00" is the end of the day.
func minutes(s string) (int, bool) {
	if s == "24:00" {
		return 24 * 60, true
	}
	t, err := time.Parse("15:04", s)
	return t.Hour()*60 + t.Minute(), err == nil && len(s) == 5
}

// policy is what the configuration, which was checked, says.
func (c *AnomalyConfig) policy(trustDomain string) (anomaly.Policy, error) {
	p := anomaly.DefaultPolicy()
	p.TrustDomain = trustDomain
	if c.Learn.Duration > 0 {
		p.Learn = c.Learn.Duration
	}
	for to, v := range map[*int64]int64{&p.RateFactor: c.RateFactor, &p.RateFloor: c.RateFloor, &p.Denials: c.Denials} {
		if v > 0 {
			*to = v
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.Hours)) {
		h := c.Hours[name]
		w := anomaly.Window{Keyrings: h.Keyrings}
		for _, day := range h.Days {
			w.Days = append(w.Days, time.Weekday(slices.Index(weekdays, day)))
		}
		w.From, _ = minutes(h.From)
		w.To, _ = minutes(h.To)
		var err error
		if w.Zone, err = time.LoadLocation(h.Zone); err != nil {
			return p, fmt.Errorf("anomaly.hours.%s.zone: %w", name, err)
		}
		p.Hours = append(p.Hours, w)
	}
	return p, nil
}
