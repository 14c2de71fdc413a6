package native

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"reflect"
	"strconv"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/engine"
	"github.com/conclave-kms/conclave/kms/wire"
)

// route is one operation: how it is reached, what it takes and gives (for the
// OpenAPI document), and what serves it.
type route struct {
	method, pattern, id, summary string
	request                      reflect.Type // nil: no body
	batch                        bool         // also takes wire.Batch of request
	response                     reflect.Type
	query                        []string // "NAME" of an integer, "NAME:TYPE" of another
	serve                        func(c *call) (any, error)
}

// read is a GET without a body.
func read[R any](pattern, id, summary string, f func(c *call) (R, error)) route {
	return route{method: http.MethodGet, pattern: pattern, id: id, summary: summary, response: reflect.TypeFor[R](),
		serve: func(c *call) (any, error) { return f(c) }}
}

// write is a POST that changes the cluster.
func write[Q, R any](pattern, id, summary string, f func(c *call, q Q) (R, error)) route {
	return route{method: http.MethodPost, pattern: pattern, id: id, summary: summary, request: reflect.TypeFor[Q](), response: reflect.TypeFor[R](),
		serve: func(c *call) (any, error) {
			q, err := decode[Q](c.body)
			if err != nil {
				return nil, err
			}
			return f(c, *q)
		}}
}

type (
	single[Q, R any]  func(*engine.Engine, context.Context, engine.Caller, string, string, Q) (R, error)
	batched[Q, R any] func(*engine.Engine, context.Context, engine.Caller, string, string, wire.Batch[Q]) (wire.BatchResult[R], error)
)

// data is an operation on a key, of one item or of a batch.
func data[Q, R any](op, id, summary string, one single[Q, R], many batched[Q, R]) route {
	required := requiredBytes(reflect.TypeFor[Q]())
	return route{method: http.MethodPost, pattern: "/v1/keyrings/{keyring}/keys/{key}/" + op, id: id, summary: summary,
		request: reflect.TypeFor[Q](), batch: true, response: reflect.TypeFor[R](),
		serve: func(c *call) (any, error) {
			keyring, key := c.PathValue("keyring"), c.PathValue("key")
			if isBatch(c.body) {
				q, err := decode[wire.Batch[Q]](c.body)
				if err != nil {
					return nil, err
				}
				for i := range q.Items {
					if err := checkRequired(&q.Items[i], required); err != nil {
						return nil, kms.Errorf(kms.Invalid, "item %d: %v", i, err)
					}
				}
				return many(c.engine, c.Context(), c.caller, keyring, key, *q)
			}
			q, err := decode[Q](c.body)
			if err != nil {
				return nil, err
			}
			if err := checkRequired(q, required); err != nil {
				return nil, err
			}
			return one(c.engine, c.Context(), c.caller, keyring, key, *q)
		}}
}

// isBatch reports whether the body's first field is "items". A batch has no
// other field, so a valid one always begins with it.
func isBatch(body []byte) bool {
	b := bytes.TrimLeft(body, " \t\r\n")
	if len(b) == 0 || b[0] != '{' {
		return false
	}
	return bytes.HasPrefix(bytes.TrimLeft(b[1:], " \t\r\n"), []byte(`"items"`))
}

// requiredBytes returns the byte strings of a request that must be there.
func requiredBytes(t reflect.Type) (fields []requiredField) {
	for i := range t.NumField() {
		f := t.Field(i)
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if f.Type.Kind() == reflect.Slice && !strings.Contains(options, "omit") {
			fields = append(fields, requiredField{i, name})
		}
	}
	return fields
}

type requiredField struct {
	index int
	name  string
}

// checkRequired refuses a request in which a byte string is absent: an empty
// plaintext is written "".
func checkRequired(q any, required []requiredField) error {
	v := reflect.ValueOf(q).Elem()
	for _, f := range required {
		if v.Field(f.index).IsNil() {
			return kms.Errorf(kms.Invalid, "%s is missing", f.name)
		}
	}
	return nil
}

// ready answers 503 until the node is ready.
type ready struct{ wire.Ready }

func (r ready) httpStatus() int {
	if r.Ready.Ready {
		return http.StatusOK
	}
	return http.StatusServiceUnavailable
}

func routes() []route {
	return append([]route{
		read("/v1/health", "health", "Whether the process runs", func(c *call) (wire.Health, error) {
			return c.engine.Health(), nil
		}),
		read("/v1/ready", "ready", "Whether the node can serve; 503 with the reasons otherwise", func(c *call) (ready, error) {
			return ready{c.engine.Ready(c.Context())}, nil
		}),
		read("/v1/openapi.json", "openapi", "This document", func(c *call) (json.RawMessage, error) {
			return c.server.openapi, nil
		}),
		read("/v1/status", "status", "The cluster as this node sees it", func(c *call) (wire.Status, error) {
			return c.engine.Status(c.Context(), c.caller)
		}),
		read("/v1/nodes", "listNodes", "The members of the cluster", func(c *call) (wire.Nodes, error) {
			return c.engine.Nodes(c.Context(), c.caller)
		}),
		read("/v1/sites", "listSites", "The trust domains with their CAs", func(c *call) (wire.Sites, error) {
			return c.engine.Sites(c.Context(), c.caller)
		}),
		read("/v1/custodians", "listCustodians", "The custodians with their public keys", func(c *call) (wire.Custodians, error) {
			return c.engine.Custodians(c.Context(), c.caller)
		}),
		write("/v1/custodians/{id}/suspensions", "suspendCredential", "Submit a custodian's signed suspension of a credential that a colleague has lost", func(c *call, q wire.SuspendRequest) (wire.Custodian, error) {
			return c.engine.SuspendCredential(c.Context(), c.caller, c.PathValue("id"), q)
		}),
		read("/v1/policies", "listPolicies", "The approval policies and the access policy", func(c *call) (wire.Policies, error) {
			return c.engine.Policies(c.Context(), c.caller)
		}),
		read("/v1/drift", "drift", "What is not as it should be, as far as this node knows", func(c *call) (wire.Drift, error) {
			return c.engine.Drift(c.Context(), c.caller)
		}),
		read("/v1/alarms", "alarms", "What is wrong, as far as this node knows", func(c *call) (wire.Alarms, error) {
			return c.engine.Alarms(c.Context(), c.caller)
		}),
		read("/v1/recoveries", "listRecoveries", "The times that custodians had the cluster go on from a backup", func(c *call) (wire.Recoveries, error) {
			return c.engine.Recoveries(c.Context(), c.caller)
		}),
		read("/v1/audit/checkpoints", "auditCheckpoints", "How far the logs are cosigned by the sites", func(c *call) (wire.Checkpoints, error) {
			return c.engine.AuditCheckpoints(c.Context(), c.caller)
		}),
		backupRoute(),
		read("/v1/keyrings", "listKeyrings", "The keyrings", func(c *call) (wire.Keyrings, error) {
			return c.engine.Keyrings(c.Context(), c.caller)
		}),
		write("/v1/keyrings", "createKeyring", "Create a keyring", func(c *call, q wire.CreateKeyringRequest) (wire.Keyring, error) {
			return c.engine.CreateKeyring(c.Context(), c.caller, q)
		}),
		read("/v1/keyrings/{keyring}", "getKeyring", "One keyring", func(c *call) (wire.Keyring, error) {
			return c.engine.Keyring(c.Context(), c.caller, c.PathValue("keyring"))
		}),
		read("/v1/keyrings/{keyring}/keys", "listKeys", "The keys of a keyring", func(c *call) (wire.Keys, error) {
			return c.engine.Keys(c.Context(), c.caller, c.PathValue("keyring"))
		}),
		write("/v1/keyrings/{keyring}/keys", "createKey", "Create a key", func(c *call, q wire.CreateKeyRequest) (wire.Key, error) {
			return c.engine.CreateKey(c.Context(), c.caller, c.PathValue("keyring"), q)
		}),
		read("/v1/keyrings/{keyring}/keys/{key}", "getKey", "A key with its versions and their receipts", func(c *call) (wire.Key, error) {
			return c.engine.Key(c.Context(), c.caller, c.PathValue("keyring"), c.PathValue("key"))
		}),
		write("/v1/keyrings/{keyring}/keys/{key}/import", "importKey", "Hand in the sealed material of a key whose import is approved", func(c *call, q wire.ImportKeyRequest) (wire.Key, error) {
			return c.engine.ImportKey(c.Context(), c.caller, c.PathValue("keyring"), c.PathValue("key"), q)
		}),
		publicKeyRoute(),
		read("/v1/recovery-keys", "listRecoveryKeys", "The recovery keys of residencies, with what a ceremony needs", func(c *call) (wire.RecoveryKeys, error) {
			return c.engine.RecoveryKeys(c.Context(), c.caller)
		}),
		write("/v1/recovery-keys/restore", "restoreKEKs", "Hand in what came out of a recovery ceremony", func(c *call, q wire.RestoreRequest) (wire.RestoreResponse, error) {
			return c.engine.Restore(c.Context(), c.caller, q)
		}),
		proposalsRoute(),
		write("/v1/proposals", "openProposal", "Open a proposal", func(c *call, q wire.OpenProposalRequest) (wire.Proposal, error) {
			return c.engine.OpenProposal(c.Context(), c.caller, q)
		}),
		read("/v1/proposals/{id}", "getProposal", "A proposal with the exact bytes that custodians sign", func(c *call) (wire.Proposal, error) {
			return c.engine.Proposal(c.Context(), c.caller, c.PathValue("id"))
		}),
		write("/v1/proposals/{id}/votes", "vote", "Submit a custodian's signed approval or rejection", func(c *call, q wire.VoteRequest) (wire.Proposal, error) {
			return c.engine.Vote(c.Context(), c.caller, c.PathValue("id"), q)
		}),
		read("/v1/proposals/{id}/evidence", "evidence", "The evidence of an executed proposal, verifiable offline", func(c *call) (wire.Evidence, error) {
			return c.engine.Evidence(c.Context(), c.caller, c.PathValue("id"))
		}),
	}, dataRoutes()...)
}

func dataRoutes() []route {
	return []route{
		data("encrypt", "encrypt", "Encrypt under the primary version", (*engine.Engine).Encrypt, (*engine.Engine).EncryptBatch),
		data("decrypt", "decrypt", "Decrypt a ciphertext or a wrapped data key", (*engine.Engine).Decrypt, (*engine.Engine).DecryptBatch),
		data("rewrap", "rewrap", "Move a ciphertext to the primary version without revealing it", (*engine.Engine).Rewrap, (*engine.Engine).RewrapBatch),
		data("datakey", "dataKey", "A fresh data key, plain and wrapped", (*engine.Engine).DataKey, (*engine.Engine).DataKeyBatch),
		data("datakey/wrapped", "wrappedDataKey", "A fresh data key in wrapped form only", (*engine.Engine).WrappedDataKey, (*engine.Engine).WrappedDataKeyBatch),
		data("mac", "mac", "Compute a message authentication code", (*engine.Engine).MAC, (*engine.Engine).MACBatch),
		data("verify-mac", "verifyMAC", "Check a message authentication code", (*engine.Engine).VerifyMAC, (*engine.Engine).VerifyMACBatch),
		data("sign", "sign", "Sign a message", (*engine.Engine).Sign, (*engine.Engine).SignBatch),
		data("verify", "verify", "Check a signature", (*engine.Engine).Verify, (*engine.Engine).VerifyBatch),
		data("export", "export", "A data key or key version sealed to the caller's hybrid public key", (*engine.Engine).Export, (*engine.Engine).ExportBatch),
	}
}

func publicKeyRoute() route {
	rt := read("/v1/keyrings/{keyring}/keys/{key}/public-key", "publicKey", "The public key of a sign key", func(c *call) (wire.PublicKeyResponse, error) {
		var version uint64
		if v := c.URL.Query().Get("version"); v != "" {
			var err error
			if version, err = strconv.ParseUint(v, 10, 32); err != nil {
				return wire.PublicKeyResponse{}, kms.Errorf(kms.Invalid, "version is not a number")
			}
		}
		return c.engine.PublicKey(c.Context(), c.caller, c.PathValue("keyring"), c.PathValue("key"), uint32(version))
	})
	rt.query = []string{"version"}
	return rt
}

// metricsRoute serves the metrics in Prometheus's text format to whom the access
// policy lets read them.
func metricsRoute(h http.Handler) route {
	return route{method: http.MethodGet, pattern: "/v1/metrics", id: "metrics", summary: "Metrics in Prometheus text format", response: reflect.TypeFor[text](),
		serve: func(c *call) (any, error) {
			if err := c.engine.Authorise(c.Context(), c.caller, engine.ActReadMetrics); err != nil {
				return nil, err
			}
			return h, nil
		}}
}

// text is an answer that is not JSON.
type text string
