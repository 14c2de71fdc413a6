// Package wire is the vocabulary of the native API: the JSON structs that the
// engine answers with, the HTTPS API carries and the client reads. It imports
// the standard library and kms alone and contains no use case.
//
// Conventions. Byte strings are base64 (standard alphabet, padded). Instants are
// RFC 3339 in UTC and come from the cluster's clock or a node's signed time, to
// the millisecond; a field that does not apply is absent. Durations are whole
// milliseconds in fields whose JSON name ends in "_ms". Unknown fields of a
// request are refused.
//
// Every data operation takes one request or a Batch of at most MaxBatch, on one
// key: the route decides which key, the shape of the body decides which form.
package wire

import (
	"fmt"
	"log/slog"

	"github.com/conclave-kms/conclave/kms"
)

// Limits of the API.
const (
	MaxBatch     = 256      // items in a batch
	MaxPlaintext = 64 << 10 // bytes of one plaintext or message
	MaxBody      = 32 << 20 // bytes of one request body
	MaxReason    = 1000     // bytes of a proposal's reason
)

// Secret is a byte string that must not be printed: plaintext and data keys. In
// JSON it is base64 as any byte string is; in fmt and slog it is redacted.
type Secret []byte

const redacted = "[secret]"

// String returns a fixed text.
func (Secret) String() string { return redacted }

// GoString returns a fixed text.
func (Secret) GoString() string { return redacted }

// Format prints a fixed text for every verb.
func (Secret) Format(f fmt.State, _ rune) { _, _ = fmt.Fprint(f, redacted) }

// LogValue implements slog.LogValuer.
func (Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// Batch is the batch form of a request: the items are carried out in order,
// under one authorisation and one entry of the access log, and one item's
// failure does not touch the others.
type Batch[Q any] struct {
	Items []Q `json:"items"` // 1 to MaxBatch
}

// Check refuses an empty batch and one of more than MaxBatch items.
func (b Batch[Q]) Check() error {
	switch n := len(b.Items); {
	case n == 0:
		return kms.Errorf(kms.Invalid, "items is empty")
	case n > MaxBatch:
		return kms.Errorf(kms.TooLarge, "%d items exceed the limit of %d in a batch", n, MaxBatch)
	}
	return nil
}

// BatchResult answers a Batch, item for item in the same order.
type BatchResult[R any] struct {
	Items []Item[R] `json:"items"`
}

// Item is one answer of a batch: exactly one field is set.
type Item[R any] struct {
	Result  *R       `json:"result,omitempty"`
	Problem *Problem `json:"problem,omitempty"`
}
