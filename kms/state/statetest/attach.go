package statetest

import "github.com/conclave-kms/conclave/kms/state"

// attached is a running cluster that applies the commands of a World.
type attached struct {
	propose func(raw []byte) (*state.State, state.Result)
	now     func() int64
}

// Attach has a running cluster apply all further commands: propose returns the state
// after a command and its result, now the time that nodes write into commands. It is
// called before the World is used by several goroutines.
func (w *World) Attach(propose func(raw []byte) (*state.State, state.Result), now func() int64) {
	w.attached = &attached{propose, now}
}
