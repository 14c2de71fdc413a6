package statetest

import "github.com/conclave-kms/conclave/kms/state"

// UseCommand is a node's report that it has used a version until a time, having counted
// for an hour.
func (w *World) UseCommand(ring, key string, version uint32, until int64) state.ReportUse {
	c := state.ReportUse{From: until - state.UseHour, Until: until}
	if k, ok := w.State().Key(ring, key); ok {
		c.Used = []state.VersionUse{{Key: k.ID, Version: version, Hour: until / state.UseHour}}
	}
	return c
}
