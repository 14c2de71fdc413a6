package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

// Custodian is a custodian with the key opened from its file.
type Custodian struct {
	ID  string
	Key *pqc.HybridKey
}

// Custodian opens the key file of a custodian; the caller destroys the key.
func (c *Cluster) Custodian(id string) (*Custodian, error) {
	keyFile, passFile := c.CustodianFiles(id)
	return openCustodian(id, keyFile, passFile)
}

func openCustodian(id, keyFile, passFile string) (*Custodian, error) {
	b, err := os.ReadFile(keyFile)
	if err != nil {
		return nil, err
	}
	p, err := os.ReadFile(passFile)
	if err != nil {
		return nil, err
	}
	pass, err := secret.Copy(bytes.TrimRight(p, "\r\n"))
	if err != nil {
		return nil, err
	}
	defer pass.Destroy()
	key, err := pqc.DecryptKeyFile(b, pass)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", keyFile, err)
	}
	return &Custodian{ID: id, Key: key}, nil
}

// Statement signs a verdict on the exact bytes of a proposal.
func (k *Custodian) Statement(verdict approval.Verdict, p wire.Proposal) (wire.Statement, error) {
	sig, err := k.Key.Sign(approval.Message(verdict, p.Bytes), []byte(approval.Context))
	if err != nil {
		return wire.Statement{}, err
	}
	return wire.Statement{
		Proposal: p.ID, Verdict: string(verdict), Custodian: k.ID,
		Credential: pqc.Fingerprint(k.Key.PublicKey()), Signature: sig,
	}, nil
}

// Activated waits until the node of a site reports the version of a key as
// primary, and returns the key.
func (c *Cluster) Activated(ctx context.Context, site, keyring, key string, version uint32) (wire.Key, error) {
	var k wire.Key
	cl, err := c.Client(site, "operator")
	if err != nil {
		return k, err
	}
	err = Within(ctx, readyWait, fmt.Sprintf("version %d of %s/%s is primary at %s", version, keyring, key, site), func(ctx context.Context) error {
		var err error
		if k, err = cl.Key(keyring, key).Describe(ctx); err != nil {
			return err
		}
		if k.Primary > version {
			return Give(fmt.Errorf("version %d is primary already", k.Primary))
		}
		if k.Primary != version {
			return errors.New(describe(k))
		}
		return nil
	})
	return k, err
}

// describe says which versions a key has and who owes a receipt.
func describe(k wire.Key) string {
	s := fmt.Sprintf("primary %d, latest %d", k.Primary, k.Latest)
	for _, v := range k.Versions {
		s += fmt.Sprintf("; version %d %s", v.Version, v.State)
		for _, r := range v.Receipts {
			if !r.Received {
				s += ", no receipt of " + r.Node
			}
		}
	}
	return s
}
