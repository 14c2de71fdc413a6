// Package keyring is key material in use: it opens the sealed copies of KEKs
// with the device of this node, unwraps key versions, keeps both for a bounded
// time in locked memory, and encrypts, authenticates and signs with them. It
// knows nothing of replicated state, policies or callers.
//
// The formats are laid out byte by byte in DESIGN.md beside this file.
package keyring
