// Package backup is the file format of backups: a state of the cluster, wrapped
// material only, with the genesis document before it and the signature of the node
// that made it after it.
//
// A file is the magic line, then frames: a type (1 byte), a length (4 bytes, big
// endian) and as many bytes.
//
//	H  header: canonical CBOR of Header, once, first
//	G  the signed genesis document, once
//	S  a piece of the state's snapshot (state.State.Snapshot), in order
//	T  trailer: canonical CBOR of Trailer, once, last
//
// The trailer holds the signature of the node's device, in the context Context,
// over the SHA-512 of all bytes before the trailer's frame. It proves which node
// made the file. Whether what it says is true follows from the statements in the
// snapshot, which Verify checks from the genesis on.
package backup
