// Package state is the replicated state machine: it verifies signed commands and
// applies them to an immutable state, in the same way on every node.
//
// Nothing here reads a clock, random numbers or files, starts a goroutine, logs or
// depends on the order of a map: all that is not determined is in the command
// before it is proposed. DESIGN.md in this folder says why things are as they are.
package state
