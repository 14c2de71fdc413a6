// Package sim plays random, seeded schedules of faults on a whole cluster in one
// process: real nodes (cluster.Node, hashicorp/raft, kms/state) on a simulated network,
// disk and clock. What each node applies is watched by a model that shares no rule with
// the state machine. See DESIGN.md.
package sim
