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

// signAs opens the credential, finds whose it is, and signs what message makes of that.
func signAs(cmd *cobra.Command, by *signerFlags, context string, owner func(credential string) (string, bool), message func(who, credential string) []byte) (who string, k approval.Credential, signature []byte, err error) {
	key, err := by.open(cmd)
	if err != nil {
		return "", k, nil, err
	}
	defer key.Close()
	public := key.PublicKey()
	k = approval.Credential{ID: pqc.Fingerprint(public), Suite: uint16(key.Suite()), PublicKey: public}
	who, ok := owner(k.ID)
	if !ok {
		return "", k, nil, kms.Errorf(kms.NotFound, "no custodian of this cluster has the key %s (%s), or it is suspended", k.ID, by.where())
	}
	m := message(who, k.ID)
	if signature, err = key.Sign(cmd.Context(), m, context); err != nil {
		return "", k, nil, err
	}
	if err := pqc.Verify(key.Suite(), public, m, []byte(context), signature); err != nil {
		return "", k, nil, kms.Wrap(kms.BadSignature, err, "the signature by "+by.where()+" does not verify under its public key", "")
	}
	return who, k, signature, nil
}

// cast signs a verdict on a proposal, given as its exact bytes, in the name of the
// custodian whom the credential belongs to.
func cast(cmd *cobra.Command, by *signerFlags, verdict approval.Verdict, proposal []byte, owner func(credential string) (string, bool)) (approval.Statement, error) {
	who, k, signature, err := signAs(cmd, by, approval.Context, owner, func(_, _ string) []byte { return approval.Message(verdict, proposal) })
	return approval.Statement{Proposal: approval.ProposalID(proposal), Verdict: verdict, Custodian: who, Credential: k.ID, Signature: signature}, err
}
