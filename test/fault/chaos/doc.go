// Package chaos breaks a coalition of real nodes while it is used, and checks the
// recorded history.
//
// Five `conclaved run` processes at three sites, with links between them that are
// slow, serve a load of operators, custodians and services (load.go). Meanwhile
// nodes are killed, frozen, cut off, cut off in one direction, slowed down, their
// disks filled or broken, their clocks set wrong (faults.go). What was asked and
// answered is a history (history.go), and it must be one that a single copy of the
// keys and proposals could have produced, each operation taking effect once between
// its call and its answer: porcupine searches for such an order with the model of
// model.go, which knows what a quorum is. Beside that: the replicas' states are equal
// in the end, every acknowledged write is in them, their logs verify, data operations
// are as fresh as they promise, and no caller saw an error that a fault does not
// explain.
//
// Nothing here is imported by anything. `make fault MINUTES=10` runs it for long.
package chaos
