// Package engine is the use cases of the key management service. Every door
// (HTTPS API, later others) goes through it, and every request takes one path:
// authorise, resolve the key, open its material, act, write the access log,
// answer. An answer, a refusal included, leaves only when its entry in the
// access log is durable.
//
// Agent is the part that acts without being asked: it tells the time to the
// cluster, gives receipts, executes what custodians authorised, and brings the
// new version of a rotation.
package engine
