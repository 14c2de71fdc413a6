// Package cluster is a node's part in the replicated state machine: it keeps
// the Raft log, applies committed commands to a state.State, and carries commands
// to the leader. Nodes speak mutual TLS 1.3 with hybrid post-quantum groups, and
// each accepts only the certificates that a node's own site can have issued.
//
// Raft is not Byzantine-fault-tolerant. What makes a hostile leader harmless is
// in kms/state, where every replica verifies every command itself; this package
// sees to it that nothing reaches the state by another way: a snapshot is only
// accepted with this node's own device signature over its hash, or after every
// signed statement in it has been verified again. See DESIGN.md.
package cluster
