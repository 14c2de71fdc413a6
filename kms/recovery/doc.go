// Package recovery splits the recovery key of a residency among custodians of
// several sites and puts it together again in a ceremony. What it computes with are
// secrets; what custodians and nodes sign about it is in package approval.
package recovery
