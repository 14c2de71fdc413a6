package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/pqc"
)

// signer is a custodian's credential at work.
type signer interface {
	Suite() pqc.SuiteID
	PublicKey() []byte
	// Sign returns the signature of a message in a context, as pqc.Verify takes it.
	Sign(ctx context.Context, message []byte, signContext string) ([]byte, error)
	Close() error
}

// keyFileSigner signs with the hybrid key of a key file.
type keyFileSigner struct{ key *pqc.HybridKey }

func (k keyFileSigner) Suite() pqc.SuiteID { return pqc.MLDSA65Ed25519 }
func (k keyFileSigner) PublicKey() []byte  { return k.key.PublicKey() }
func (k keyFileSigner) Close() error       { k.key.Destroy(); return nil }

func (k keyFileSigner) Sign(_ context.Context, message []byte, signContext string) ([]byte, error) {
	return k.key.Sign(message, []byte(signContext))
}

// signerFlags name a credential: a key file, or a key in a PKCS#11 token.
type signerFlags struct{ keyFile, passFile, credential, pinFile string }

func (s *signerFlags) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&s.keyFile, "custodian-key", "", "the custodian's key `FILE`")
	f.StringVar(&s.passFile, "pass-file", "", "`FILE` with the key file's passphrase (default: ask)")
	f.StringVar(&s.credential, "credential", "", "PKCS#11 `URI` of the custodian's key in a token, in place of --custodian-key")
	f.StringVar(&s.pinFile, "pin-file", "", "`FILE` with the token's PIN, where the URI has no pin-source (default: ask)")
}

// signerFlagNames are the flags above.
var signerFlagNames = []string{"custodian-key", "pass-file", "credential", "pin-file"}

func (s *signerFlags) check() error {
	switch {
	case s.keyFile == "" && s.credential == "":
		return usagef("--custodian-key is missing: the key file that conclave custodian keygen made; or --credential, the PKCS#11 URI of a key in a token")
	case s.keyFile != "" && s.credential != "":
		return usagef("give either --custodian-key or --credential")
	case s.keyFile != "" && s.pinFile != "", s.credential != "" && s.passFile != "":
		return usagef("--pass-file goes with --custodian-key, --pin-file with --credential")
	}
	return nil
}

// where says which credential was named.
func (s *signerFlags) where() string { return or(s.keyFile, s.credential) }

func (s *signerFlags) open(cmd *cobra.Command) (signer, error) {
	if s.credential != "" {
		return openToken(cmd, s.credential, s.pinFile)
	}
	key, _, err := openKeyFile(cmd, s.keyFile, s.passFile)
	if err != nil {
		return nil, err
	}
	return keyFileSigner{key}, nil
}

// cast signs a verdict on a proposal, given as its exact bytes, in the name of the
// custodian whom the credential belongs to, and checks the signature as the cluster will.
func cast(cmd *cobra.Command, by *signerFlags, verdict approval.Verdict, proposal []byte, owner func(credential string) (string, bool)) (approval.Statement, error) {
	key, err := by.open(cmd)
	if err != nil {
		return approval.Statement{}, err
	}
	defer key.Close()
	public := key.PublicKey()
	s := approval.Statement{Proposal: approval.ProposalID(proposal), Verdict: verdict, Credential: pqc.Fingerprint(public)}
	who, ok := owner(s.Credential)
	if !ok {
		return s, kms.Errorf(kms.NotFound, "no custodian of this cluster has the key %s (%s)", s.Credential, by.where())
	}
	s.Custodian = who
	if s.Signature, err = key.Sign(cmd.Context(), approval.Message(verdict, proposal), approval.Context); err != nil {
		return s, err
	}
	record := approval.Custodian{ID: who, Credentials: []approval.Credential{{ID: s.Credential, Suite: uint16(key.Suite()), PublicKey: public}}}
	return s, s.Verify(record, proposal)
}
