// Package fault breaks the devices of running nodes in every way that was thought
// of and asserts what an operator, a client and the other nations then see.
//
// The matrix (matrix_test.go) runs on the real programs: a development cluster
// whose fr node uses SoftHSM through a library that hangs, crashes or forgets its
// sessions on command (testdata/shim.c), and whose jp node has a software TPM that
// is killed, frozen and cleared. While a device is broken the node says why, at its
// API and in its readiness; a rotation that custodians approve meanwhile is either
// not committed or waits for the node's receipt; the other nodes serve on; and when
// the device is back the node uses it within 30 seconds, without a restart. What a
// ciphertext protected before, it protects after.
//
// What shows only inside a process is tried on the devices themselves
// (device_test.go). Nothing here is imported by anything.
package fault
