package state

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/go-memdb"

	"github.com/conclave-kms/conclave/kms/approval"
)

// The tables, in the order of a snapshot.
const (
	tableStatus     = "status"
	tableCustodian  = "custodian"
	tablePolicy     = "policy"
	tableKeyring    = "keyring"
	tableKEK        = "kek"
	tableKey        = "key"
	tableVersion    = "version"
	tableProposal   = "proposal"
	tableNode       = "node"
	tableNext       = "next" // replacements
	tableFormer     = "former"
	tableResealed   = "resealed"
	tableRefused    = "refused" // copies that next roots refused
	tableNonce      = "nonce"
	tableOutcome    = "outcome"
	tableRelease    = "release"    // what nodes announced
	tableMembership = "membership" // the latest change
	tableRemoved    = "removed"    // nodes
	tableSite       = "site"       // changes since the genesis
	tableRecovery   = "recovery"
	tableSeed       = "seed"   // of hardware roots, wrapped
	tableRewrap     = "rewrap" // batches of rewrapped key versions

	tableRewrapRefused = "rewrap-refused"
	tableRecoveryKey   = "recovery-key"
	tableRecoveryCopy  = "recovery-copy"

	tableUse         = "use"         // of key versions, as nodes report it
	tableWitness     = "witness"     // keys for checkpoints
	tableCheckpoint  = "checkpoint"  // of access logs, the last ones
	tableCosignature = "cosignature" // the last one of each log and site
	tableSuspension  = "suspension"  // of credentials
)

// The indexes. Index values are strings of names, which have no NUL, and of
// big-endian numbers; every value of an index that is not unique ends in NUL, so
// that no value is the start of another.
const (
	byID      = "id"
	byKeyID   = "key-id"  // keys
	byCopy    = "copy"    // versions and KEKs, by node and root that a copy is for
	byNode    = "node"    // statements behind copies
	byPending = "pending" // versions and KEKs, by node whose receipt is missing
	byTarget  = "target"  // proposals
	byLive    = "live"    // open and authorised proposals; batches not yet in use
	bySeq     = "seq"     // proposals, newest first
	byTime    = "time"    // nonces and outcomes
	byKEK     = "kek"     // versions, by keyring and KEK version that wraps them
	byWrap    = "wrap"    // versions, by keyring and newest KEK version that wraps them
)

func nameKey(parts ...string) []byte { return []byte(strings.Join(parts, "\x00")) }

func prefixKey(parts ...string) []byte { return append(nameKey(parts...), 0) }

func numberKey(n uint64, parts ...string) []byte {
	var b []byte
	if len(parts) > 0 {
		b = prefixKey(parts...)
	}
	return binary.BigEndian.AppendUint64(b, n)
}

// index makes a memdb index of a function from records to index values.
type index[T any] struct{ key func(*T) []byte }

func (index[T]) FromArgs(args ...any) ([]byte, error)       { return keyArg(args) }
func (index[T]) PrefixFromArgs(args ...any) ([]byte, error) { return keyArg(args) }

func (i index[T]) FromObject(raw any) (bool, []byte, error) {
	k := i.key(raw.(*T))
	return k != nil, k, nil
}

// multiIndex is index with any number of values for a record.
type multiIndex[T any] struct{ keys func(*T) [][]byte }

func (multiIndex[T]) FromArgs(args ...any) ([]byte, error)       { return keyArg(args) }
func (multiIndex[T]) PrefixFromArgs(args ...any) ([]byte, error) { return keyArg(args) }

func (i multiIndex[T]) FromObject(raw any) (bool, [][]byte, error) {
	k := i.keys(raw.(*T))
	return len(k) > 0, k, nil
}

func keyArg(args []any) ([]byte, error) {
	if len(args) == 1 {
		if b, ok := args[0].([]byte); ok {
			return b, nil
		}
	}
	return nil, fmt.Errorf("state: an index takes one []byte")
}

func statusID(r *NodeStatus) []byte            { return nameKey(r.Node) }
func custodianID(r *approval.Custodian) []byte { return nameKey(r.ID) }
func policyID(r *approval.Policy) []byte       { return nameKey(r.Name) }
func keyringID(r *Keyring) []byte              { return nameKey(r.Name) }
func kekID(r *KEK) []byte                      { return numberKey(uint64(r.Version), r.Keyring) }
func keyID(r *Key) []byte                      { return nameKey(r.Keyring, r.Name) }
func versionID(r *Version) []byte              { return numberKey(uint64(r.Version), r.Keyring, r.Key) }
func proposalID(r *Proposal) []byte            { return nameKey(r.ID) }
func nodeID(r *Node) []byte                    { return nameKey(r.ID) }
func nextID(r *Replacement) []byte             { return nameKey(r.Node) }
func formerID(r *FormerRoot) []byte            { return numberKey(uint64(r.Root), r.Node) }
func nonceID(r *nonce) []byte                  { return append(prefixKey(r.Origin), r.Nonce...) }
func outcomeID(r *Outcome) []byte              { return r.Key }

// resealedID begins with resealedKey.
func resealedID(r *resealed) []byte {
	return append(resealedKey(r.Keyring, r.Key, r.Version), numberKey(uint64(r.Root), r.Node)...)
}

// refusedID begins with the node and its root.
func refusedID(r *RefusedCopy) []byte {
	return append(append(copyKey(r.Node, r.Root), resealedKey(r.Keyring, r.Key, r.Version)...), r.By...)
}

func resealedKey(keyring, key string, version uint32) []byte {
	return numberKey(uint64(version), keyring, key)
}

// copyKey is a value of byCopy.
func copyKey(node string, root uint32) []byte { return numberKey(uint64(root), node) }

func copyKeys(copies []SealedCopy) [][]byte {
	var keys [][]byte
	for _, c := range copies {
		keys = append(keys, copyKey(c.Node, c.Root))
	}
	return keys
}

func table(name string, indexes ...*memdb.IndexSchema) *memdb.TableSchema {
	t := &memdb.TableSchema{Name: name, Indexes: make(map[string]*memdb.IndexSchema)}
	for _, i := range indexes {
		t.Indexes[i.Name] = i
	}
	return t
}

func unique[T any](name string, key func(*T) []byte) *memdb.IndexSchema {
	return &memdb.IndexSchema{Name: name, Unique: true, Indexer: index[T]{key}}
}

func some[T any](name string, key func(*T) []byte) *memdb.IndexSchema {
	return &memdb.IndexSchema{Name: name, AllowMissing: true, Indexer: index[T]{key}}
}

func many[T any](name string, keys func(*T) [][]byte) *memdb.IndexSchema {
	return &memdb.IndexSchema{Name: name, AllowMissing: true, Indexer: multiIndex[T]{keys}}
}

// newDB makes an empty database.
func newDB() *memdb.MemDB {
	tables := []*memdb.TableSchema{
		table(tableStatus, unique(byID, statusID)),
		table(tableCustodian, unique(byID, custodianID)),
		table(tablePolicy, unique(byID, policyID)),
		table(tableKeyring, unique(byID, keyringID)),
		table(tableKEK, unique(byID, kekID), many(byPending, pendingKEK), many(byCopy, func(r *KEK) [][]byte { return copyKeys(r.Copies) })),
		table(tableKey, unique(byID, keyID), unique(byKeyID, func(r *Key) []byte { return r.ID })),
		table(tableVersion, unique(byID, versionID), many(byPending, pendingVersion), many(byCopy, func(r *Version) [][]byte { return copyKeys(r.Copies) }), some(byKEK, versionKEK), some(byWrap, versionWrap)),
		table(tableProposal, unique(byID, proposalID),
			some(byTarget, func(r *Proposal) []byte { return prefixKey(r.Content.Target) }),
			some(byLive, liveProposal),
			some(bySeq, func(r *Proposal) []byte { return numberKey(^r.Index) })),
		table(tableNode, unique(byID, nodeID)),
		table(tableNext, unique(byID, nextID)),
		table(tableFormer, unique(byID, formerID)),
		table(tableResealed, unique(byID, resealedID), some(byNode, func(r *resealed) []byte { return prefixKey(r.Node) })),
		table(tableRefused, unique(byID, refusedID)),
		table(tableNonce, unique(byID, nonceID), some(byTime, func(r *nonce) []byte { return timeKey(r.Time) })),
		table(tableOutcome, unique(byID, outcomeID), some(byTime, func(r *Outcome) []byte { return timeKey(r.Time) })),
		table(tableRelease, unique(byID, releaseID)),
		table(tableMembership, unique(byID, membershipID)),
		table(tableRemoved, unique(byID, removalID)),
		table(tableSite, unique(byID, siteChangeID)),
		table(tableRecovery, unique(byID, recoveryID)),
		table(tableSeed, unique(byID, seedID)),
		table(tableRewrap, unique(byID, rewrapID), some(byLive, openRewrap)),
		table(tableRewrapRefused, unique(byID, rewrapRefusedID)),
		table(tableRecoveryKey, unique(byID, recoveryKeyID)),
		table(tableRecoveryCopy, unique(byID, recoveryCopyID)),
		table(tableUse, unique(byID, useID)),
		table(tableWitness, unique(byID, witnessID)),
		table(tableCheckpoint, unique(byID, checkpointID)),
		table(tableCosignature, unique(byID, cosignatureID)),
		table(tableSuspension, unique(byID, suspensionID)),
	}
	schema := &memdb.DBSchema{Tables: make(map[string]*memdb.TableSchema)}
	for _, t := range tables {
		schema.Tables[t.Name] = t
	}
	db, err := memdb.NewMemDB(schema)
	if err != nil {
		panic(fmt.Sprintf("state: the table schema is wrong: %v", err)) // constant
	}
	return db
}

func timeKey(t int64) []byte { return numberKey(uint64(max(t, 0))) }

func liveProposal(r *Proposal) []byte {
	if !r.live() {
		return nil
	}
	return []byte{1}
}

func pendingVersion(r *Version) [][]byte {
	if r.State.Gone() {
		return nil
	}
	if r.Generated != "" && (r.signsReceipts() || len(r.Checks) > 0) { // a node may have been left without a copy
		asked := slices.DeleteFunc(slices.Clone(r.Copies), func(c SealedCopy) bool { // or have joined since
			return len(r.Checks) > 0 && !slices.ContainsFunc(r.Checks, func(x Check) bool { return x.Node == c.Node })
		})
		return missing(asked, func(c SealedCopy) string { return c.Node }, r.Receipts)
	}
	return missing(r.Checks, checkNode, r.Receipts)
}

func checkNode(c Check) string { return c.Node }

func pendingKEK(r *KEK) [][]byte {
	if r.Retired() {
		return nil
	}
	return missing(r.Checks, checkNode, r.Receipts)
}

// missing lists those of the nodes asked, sorted, that owe a receipt, as values of
// byPending. A node with copies for two roots is asked once.
func missing[T any](asked []T, node func(T) string, receipts []Receipt) [][]byte {
	var nodes [][]byte
	for i, a := range asked {
		repeated := i > 0 && node(asked[i-1]) == node(a)
		if !repeated && !slices.ContainsFunc(receipts, func(r Receipt) bool { return r.Node == node(a) }) {
			nodes = append(nodes, prefixKey(node(a)))
		}
	}
	return nodes
}

// mustDB stops on an error of the database: its only errors are misuse of the
// schema, which is a mistake in the program and never in data.
func mustDB(err error) {
	if err != nil {
		panic(fmt.Sprintf("state: %v", err))
	}
}

// find returns the record with the given index value.
func find[T any](x *memdb.Txn, table, index string, key []byte) (T, bool) {
	raw, err := x.First(table, index, key)
	mustDB(err)
	if raw == nil {
		var zero T
		return zero, false
	}
	return *raw.(*T), true
}

// list returns the records whose index value begins with prefix, in its order.
func list[T any](x *memdb.Txn, table, index string, prefix []byte) []T {
	it, err := x.Get(table, index+"_prefix", prefix)
	mustDB(err)
	var l []T
	for raw := it.Next(); raw != nil; raw = it.Next() {
		l = append(l, *raw.(*T))
	}
	return l
}

// each calls f for the records of a table in the order of their identifiers, until
// f returns an error.
func each[T any](x *memdb.Txn, table string, f func(*T) error) error {
	it, err := x.Get(table, byID+"_prefix", []byte{})
	mustDB(err)
	for raw := it.Next(); raw != nil; raw = it.Next() {
		if err := f(raw.(*T)); err != nil {
			return err
		}
	}
	return nil
}

func insert[T any](x *memdb.Txn, table string, r T) { mustDB(x.Insert(table, &r)) }
