// Package tamper holds the tampering suite: exported audit logs are changed in every way
// that somebody who holds them, or one node's keys as well, could change them, and the
// verifier must find each one. Its tests count and print.
package tamper
