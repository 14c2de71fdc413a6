package state

import (
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

// Limits of commands and records. A command beyond one is refused; they are part
// of the state machine and the same on every node.
const (
	MaxCommand     = 1 << 20                 // bytes of a signed command, as Join returns it
	MaxSignature   = 256                     // bytes of an envelope's signature
	MaxWrapped     = 16 << 10                // bytes of wrapped material
	MaxSealed      = 16 << 10                // bytes of a sealed KEK copy
	MaxPublicKey   = approval.MaxRootKey     // bytes of a node's or key's public key
	MaxSites       = 32                      // sites of a cluster
	MaxNodes       = 128                     // nodes of a cluster
	MaxCustodians  = 512                     // custodians of a cluster
	MaxPolicies    = 128                     // policies of a cluster
	MaxCAs         = approval.MaxCAs         // CA certificates of a site
	MaxCertificate = approval.MaxCertificate // bytes of a CA certificate or of a vendor's root
	MaxVendors     = 64                      // vendors' roots for attestation
	MaxAccess      = 256 << 10               // bytes of the access policy text
	MaxText        = kms.MaxText             // bytes of a cluster name, address, URL or device description
	MaxMessage     = 512                     // bytes of the message in a result
	MaxRecord      = 8 << 20                 // bytes of one record in a snapshot
	MaxGenesis     = 4 << 20                 // bytes of a genesis document

	NonceSize    = 16 // bytes of an envelope's nonce
	KeyIDSize    = 16 // bytes of a key's identifier
	HashSize     = 32 // bytes of SHA-256 values and key check values
	GenesisNonce = 32 // bytes of a genesis document's nonce
)

// maxIndex is far above any log index that is ever reached: no sum overflows.
const maxIndex = uint64(1) << 62

// Times in milliseconds.
const (
	// Window is how far a command's time may lie behind the cluster's clock, and
	// how long nonces are remembered.
	Window = int64(10 * time.Minute / time.Millisecond)
	// OutcomeRetention is how long the outcome of an idempotency key is remembered.
	OutcomeRetention = int64(24 * time.Hour / time.Millisecond)
	// MinStaleness and MaxStaleness bound a keyring's MaxStaleness.
	MinStaleness = int64(time.Second / time.Millisecond)
	MaxStaleness = int64(7 * 24 * time.Hour / time.Millisecond)
	// MaxRotationPeriod is the longest rotation period of a key, ten years.
	MaxRotationPeriod = approval.MaxRotationPeriod

	// maxTime is the last millisecond of the year 9999: no sum of times overflows.
	maxTime = int64(253402300799999)
)
