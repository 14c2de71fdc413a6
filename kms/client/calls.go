package client

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
)

func get[R any](ctx context.Context, c *Client, path string, opts ...Option) (R, error) {
	var out R
	err := c.Do(ctx, http.MethodGet, path, nil, &out, opts...)
	return out, err
}

func post[R any](ctx context.Context, c *Client, path string, in any, opts ...Option) (R, error) {
	var out R
	err := c.Do(ctx, http.MethodPost, path, in, &out, opts...)
	return out, err
}

// Health asks whether the process of the first reachable node runs.
func (c *Client) Health(ctx context.Context) (wire.Health, error) {
	return get[wire.Health](ctx, c, "/v1/health")
}

// Ready returns nil when the node is ready to serve, and kms.Unavailable with
// the reasons when it is not.
func (c *Client) Ready(ctx context.Context) (wire.Ready, error) {
	r, err := get[wire.Ready](ctx, c, "/v1/ready")
	if err == nil && !r.Ready {
		err = kms.Errorf(kms.Unavailable, "the node is not ready: %s", strings.Join(r.Reasons, "; "))
	}
	return r, err
}

// Status returns the node's view of itself and the cluster.
func (c *Client) Status(ctx context.Context) (wire.Status, error) {
	return get[wire.Status](ctx, c, "/v1/status")
}

// Alarms reports what is wrong, as far as the node knows.
func (c *Client) Alarms(ctx context.Context) (wire.Alarms, error) {
	return get[wire.Alarms](ctx, c, "/v1/alarms")
}

// Drift reports what is not as it should be, as far as the node knows.
func (c *Client) Drift(ctx context.Context) (wire.Drift, error) {
	return get[wire.Drift](ctx, c, "/v1/drift")
}

// Nodes lists the members of the cluster.
func (c *Client) Nodes(ctx context.Context) ([]wire.Node, error) {
	r, err := get[wire.Nodes](ctx, c, "/v1/nodes")
	return r.Nodes, err
}

// Members lists the members of the cluster, those that were removed, and the change
// of the members that is under way.
func (c *Client) Members(ctx context.Context) (wire.Nodes, error) {
	return get[wire.Nodes](ctx, c, "/v1/nodes")
}

// Sites lists the trust domains.
func (c *Client) Sites(ctx context.Context) ([]wire.Site, error) {
	r, err := get[wire.Sites](ctx, c, "/v1/sites")
	return r.Sites, err
}

// RecoveryKeys lists the recovery keys with what a ceremony needs.
func (c *Client) RecoveryKeys(ctx context.Context) ([]wire.RecoveryKey, error) {
	r, err := get[wire.RecoveryKeys](ctx, c, "/v1/recovery-keys")
	return r.Keys, err
}

// Restore hands the cluster what came out of a recovery ceremony.
func (c *Client) Restore(ctx context.Context, req wire.RestoreRequest, opts ...Option) (wire.RestoreResponse, error) {
	return post[wire.RestoreResponse](ctx, c, "/v1/recovery-keys/restore", req, opts...)
}

// Custodians lists the custodians with their public keys.
func (c *Client) Custodians(ctx context.Context) ([]wire.Custodian, error) {
	r, err := get[wire.Custodians](ctx, c, "/v1/custodians")
	return r.Custodians, err
}

// Policies lists the approval policies and the access policy.
func (c *Client) Policies(ctx context.Context) (wire.Policies, error) {
	return get[wire.Policies](ctx, c, "/v1/policies")
}

// Keyrings lists the keyrings.
func (c *Client) Keyrings(ctx context.Context) ([]wire.Keyring, error) {
	r, err := get[wire.Keyrings](ctx, c, "/v1/keyrings")
	return r.Keyrings, err
}

// Keyring returns one keyring.
func (c *Client) Keyring(ctx context.Context, name string) (wire.Keyring, error) {
	return get[wire.Keyring](ctx, c, "/v1/keyrings/"+url.PathEscape(name))
}

// CreateKeyring makes a keyring.
func (c *Client) CreateKeyring(ctx context.Context, req wire.CreateKeyringRequest, opts ...Option) (wire.Keyring, error) {
	return post[wire.Keyring](ctx, c, "/v1/keyrings", req, opts...)
}

// Keys lists the keys of a keyring.
func (c *Client) Keys(ctx context.Context, keyring string) ([]wire.Key, error) {
	r, err := get[wire.Keys](ctx, c, "/v1/keyrings/"+url.PathEscape(keyring)+"/keys")
	return r.Keys, err
}

// CreateKey makes a key.
func (c *Client) CreateKey(ctx context.Context, keyring string, req wire.CreateKeyRequest, opts ...Option) (wire.Key, error) {
	return post[wire.Key](ctx, c, "/v1/keyrings/"+url.PathEscape(keyring)+"/keys", req, opts...)
}

// ImportKey hands in the sealed material of a key whose import is approved.
func (c *Client) ImportKey(ctx context.Context, keyring, key string, req wire.ImportKeyRequest, opts ...Option) (wire.Key, error) {
	return post[wire.Key](ctx, c, "/v1/keyrings/"+url.PathEscape(keyring)+"/keys/"+url.PathEscape(key)+"/import", req, opts...)
}

// Proposals lists the proposals that a query selects, newest first: all pages where it
// sets no limit, else as many.
func (c *Client) Proposals(ctx context.Context, q wire.ProposalQuery) ([]wire.Proposal, error) {
	all := []wire.Proposal{}
	for wanted := q.Limit; ; {
		if wanted > 0 {
			q.Limit = min(wanted-len(all), wire.MaxProposals)
		}
		r, err := get[wire.Proposals](ctx, c, "/v1/proposals", func(o *callOptions) { o.query = proposalQuery(q) })
		if err != nil {
			return nil, err
		}
		all = append(all, r.Proposals...)
		switch {
		case r.Next == 0 || wanted > 0 && len(all) >= wanted:
			return all, nil
		case q.Before != 0 && r.Next >= q.Before: // it would never end
			return nil, kms.Errorf(kms.Internal, "the node sent the pages of the list in no order")
		}
		q.Before = r.Next
	}
}

// proposalQuery writes the query of a list of proposals.
func proposalQuery(q wire.ProposalQuery) url.Values {
	v := url.Values{}
	set := func(name, value string, is bool) {
		if is {
			v.Set(name, value)
		}
	}
	set("open", "true", q.Open)
	set("action", q.Action, q.Action != "")
	set("target", q.Target, q.Target != "")
	set("waits_for", q.WaitsFor, q.WaitsFor != "")
	set("before", strconv.FormatUint(q.Before, 10), q.Before != 0)
	set("limit", strconv.Itoa(q.Limit), q.Limit != 0)
	return v
}

// Proposal returns one proposal with its exact bytes.
func (c *Client) Proposal(ctx context.Context, id string) (wire.Proposal, error) {
	return get[wire.Proposal](ctx, c, "/v1/proposals/"+url.PathEscape(id))
}

// OpenProposal opens a proposal.
func (c *Client) OpenProposal(ctx context.Context, req wire.OpenProposalRequest, opts ...Option) (wire.Proposal, error) {
	return post[wire.Proposal](ctx, c, "/v1/proposals", req, opts...)
}

// Vote submits a custodian's signed statement.
func (c *Client) Vote(ctx context.Context, id string, req wire.VoteRequest, opts ...Option) (wire.Proposal, error) {
	return post[wire.Proposal](ctx, c, "/v1/proposals/"+url.PathEscape(id)+"/votes", req, opts...)
}

// SuspendCredential submits a custodian's signed suspension of a colleague's credential.
func (c *Client) SuspendCredential(ctx context.Context, custodian string, req wire.SuspendRequest, opts ...Option) (wire.Custodian, error) {
	return post[wire.Custodian](ctx, c, "/v1/custodians/"+url.PathEscape(custodian)+"/suspensions", req, opts...)
}

// Evidence returns the evidence file of an executed proposal, as it is.
func (c *Client) Evidence(ctx context.Context, id string) ([]byte, error) {
	return get[[]byte](ctx, c, "/v1/proposals/"+url.PathEscape(id)+"/evidence")
}

// Key is one key; its methods are the operations on it.
type Key struct {
	c    *Client
	path string
}

// Key names a key. It makes no call.
func (c *Client) Key(keyring, name string) Key {
	return Key{c, "/v1/keyrings/" + url.PathEscape(keyring) + "/keys/" + url.PathEscape(name)}
}

// Describe returns the key with its versions.
func (k Key) Describe(ctx context.Context) (wire.Key, error) { return get[wire.Key](ctx, k.c, k.path) }

// Encrypt encrypts under the primary version.
func (k Key) Encrypt(ctx context.Context, req wire.EncryptRequest) (wire.EncryptResponse, error) {
	return post[wire.EncryptResponse](ctx, k.c, k.path+"/encrypt", req)
}

// EncryptBatch encrypts up to wire.MaxBatch plaintexts in one call.
func (k Key) EncryptBatch(ctx context.Context, items []wire.EncryptRequest) (wire.BatchResult[wire.EncryptResponse], error) {
	return post[wire.BatchResult[wire.EncryptResponse]](ctx, k.c, k.path+"/encrypt", wire.Batch[wire.EncryptRequest]{Items: items})
}

// Decrypt opens a ciphertext or a wrapped data key.
func (k Key) Decrypt(ctx context.Context, req wire.DecryptRequest) (wire.DecryptResponse, error) {
	return post[wire.DecryptResponse](ctx, k.c, k.path+"/decrypt", req)
}

// DecryptBatch opens up to wire.MaxBatch ciphertexts in one call.
func (k Key) DecryptBatch(ctx context.Context, items []wire.DecryptRequest) (wire.BatchResult[wire.DecryptResponse], error) {
	return post[wire.BatchResult[wire.DecryptResponse]](ctx, k.c, k.path+"/decrypt", wire.Batch[wire.DecryptRequest]{Items: items})
}

// Rewrap moves a ciphertext to the primary version without revealing it.
func (k Key) Rewrap(ctx context.Context, req wire.RewrapRequest) (wire.EncryptResponse, error) {
	return post[wire.EncryptResponse](ctx, k.c, k.path+"/rewrap", req)
}

// DataKey returns a fresh data key, plain and wrapped.
func (k Key) DataKey(ctx context.Context, req wire.DataKeyRequest) (wire.DataKeyResponse, error) {
	return post[wire.DataKeyResponse](ctx, k.c, k.path+"/datakey", req)
}

// WrappedDataKey returns a fresh data key in wrapped form only.
func (k Key) WrappedDataKey(ctx context.Context, req wire.DataKeyRequest) (wire.WrappedDataKeyResponse, error) {
	return post[wire.WrappedDataKeyResponse](ctx, k.c, k.path+"/datakey/wrapped", req)
}

// MAC computes a message authentication code.
func (k Key) MAC(ctx context.Context, req wire.MACRequest) (wire.MACResponse, error) {
	return post[wire.MACResponse](ctx, k.c, k.path+"/mac", req)
}

// VerifyMAC checks a message authentication code.
func (k Key) VerifyMAC(ctx context.Context, req wire.VerifyMACRequest) (wire.VerifyResponse, error) {
	return post[wire.VerifyResponse](ctx, k.c, k.path+"/verify-mac", req)
}

// Sign signs a message.
func (k Key) Sign(ctx context.Context, req wire.SignRequest) (wire.SignResponse, error) {
	return post[wire.SignResponse](ctx, k.c, k.path+"/sign", req)
}

// Verify checks a signature.
func (k Key) Verify(ctx context.Context, req wire.VerifyRequest) (wire.VerifyResponse, error) {
	return post[wire.VerifyResponse](ctx, k.c, k.path+"/verify", req)
}

// PublicKey returns the public key of a version, 0 for the primary.
func (k Key) PublicKey(ctx context.Context, version uint32) (wire.PublicKeyResponse, error) {
	return get[wire.PublicKeyResponse](ctx, k.c, k.path+"/public-key", withQuery("version", strconv.FormatUint(uint64(version), 10)))
}

// Export returns a data key or key version sealed to the caller's hybrid public key.
func (k Key) Export(ctx context.Context, req wire.ExportRequest) (wire.ExportResponse, error) {
	return post[wire.ExportResponse](ctx, k.c, k.path+"/export", req)
}
