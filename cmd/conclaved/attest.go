package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms/attest"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
	"github.com/conclave-kms/conclave/tpm"
)

// challengeFile is a challenge to the TPM of a node.
type challengeFile struct {
	Format     int    `json:"format"` // 1
	ID         string `json:"id"`     // 32 hexadecimal digits
	Node       string `json:"node"`   // that is challenged
	Witness    string `json:"witness"`
	Credential []byte `json:"credential"` // content of TPM2B_ID_OBJECT
	Secret     []byte `json:"secret"`     // content of TPM2B_ENCRYPTED_SECRET
}

// pendingFile is what the challenger keeps of a challenge until it is answered,
// DATA_DIR/attest/ID.json.
type pendingFile struct {
	Format  int    `json:"format"` // 1
	Card    card   `json:"card"`
	Wrapped []byte `json:"wrapped"` // the secret, wrapped by the challenger's device
}

// answerFile is what the challenged node returns.
type answerFile struct {
	Format int    `json:"format"` // 1
	ID     string `json:"id"`
	Node   string `json:"node"`
	Answer []byte `json:"answer"` // attest.Answer
}

const challengeSecret = 32 // bytes

func pendingPath(dataDir, id string) string { return filepath.Join(dataDir, "attest", id+".json") }

// pendingAAD binds the wrapped secret to its challenge and to what it is about.
func pendingAAD(id string, s attest.Subject, doc []byte) []byte {
	sum := sha256.Sum256(doc)
	return fmt.Appendf(nil, "conclave/attest/challenge/v1\x00%s\x00%x\x00%x", id, attest.Qualifying(s), sum)
}

func attestCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "attest",
		Short: "Witness that the keys of another site's node are in its TPM",
		Long: `The card of a node on a TPM says that the node's keys are in that TPM. A node of another
site can put it to the test, and sign what it saw; the genesis document then says so of
the node, and policies can ask for it. The files go from site to site as the cards do:

  1. the witness:          conclaved attest challenge --card node.json -o challenge.json
  2. the challenged node:  conclaved attest answer --challenge challenge.json -o answer.json
  3. the witness:          conclaved attest witness --answer answer.json -o witness.json

witness.json goes beside the node's card into the plan of the genesis document. For the
next root of a node of a running cluster (conclaved rekey): the same with next-node.json
and answer --next, then conclaved rekey prepare --witness witness.json.`,
	}
	cmd.AddCommand(attestChallengeCommand(), attestAnswerCommand(), attestWitnessCommand())
	return cmd
}

// attestStep is one of the three commands: configuration, a file in, a file out.
func attestStep(use, short, in, inText string, run func(ctx context.Context, cfg Config, in string, out io.Writer) (any, error)) *cobra.Command {
	var config, input, output string
	cmd := &cobra.Command{
		Use: use, Short: short, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if input == "" || output == "" {
				return fmt.Errorf("--%s and --output are needed; see: %s --help", in, cmd.CommandPath())
			}
			if _, err := os.Stat(output); err == nil {
				return fmt.Errorf("%s exists already and is not replaced; choose another name", output)
			}
			cfg, err := loadConfig(config)
			if err != nil {
				return err
			}
			v, err := run(cmd.Context(), cfg, input, cmd.OutOrStdout())
			if err != nil {
				return err
			}
			b, err := json.MarshalIndent(v, "", "  ")
			if err != nil {
				return err
			}
			return writeNew(output, append(b, '\n'), 0o644)
		},
	}
	cmd.Flags().StringVarP(&config, "config", "c", "conclaved.toml", "configuration file")
	cmd.Flags().StringVar(&input, in, "", inText)
	cmd.Flags().StringVarP(&output, "output", "o", "", "the `FILE` to write")
	return cmd
}

func attestChallengeCommand() *cobra.Command {
	return attestStep("challenge --card FILE -o FILE", "Challenge the TPM behind another site's node card", "card", "the node's card, node.json or next-node.json",
		func(ctx context.Context, cfg Config, in string, out io.Writer) (any, error) {
			c, err := readCard(in)
			if err != nil {
				return nil, err
			}
			ch, err := challenge(ctx, cfg, c, out)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", in, err)
			}
			return ch, nil
		})
}

// challenge makes a credential that only the TPM with the card's endorsement key
// and attestation key can open, and keeps its secret, wrapped by this node's device.
func challenge(ctx context.Context, cfg Config, c card, out io.Writer) (challengeFile, error) {
	none := challengeFile{}
	if c.Site == cfg.Site {
		return none, fmt.Errorf("node %s is of your own site %s: a witness is a node of another site", c.Node, c.Site)
	}
	subject, err := c.subject()
	if err != nil {
		return none, err
	}
	report, err := attest.Verify(c.Attestation, subject, attest.Context{Time: time.Now()})
	if err != nil {
		return none, err
	}
	if report.Kind != attest.KindTPM {
		return none, fmt.Errorf("node %s is not on a TPM: there is nothing that its device could answer", c.Node)
	}
	doc, err := attest.Parse(c.Attestation)
	if err != nil {
		return none, err
	}
	name, err := doc.TPM.AKName()
	if err != nil {
		return none, err
	}
	given, err := secret.New(challengeSecret)
	if err != nil {
		return none, err
	}
	defer given.Destroy()
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		return none, err
	}
	if _, err := rand.Read(given.Reveal()); err != nil {
		return none, err
	}
	ch := challengeFile{Format: 1, ID: hex.EncodeToString(id), Node: c.Node, Witness: cfg.Node}
	if ch.Credential, ch.Secret, err = tpm.MakeCredential(doc.TPM.EKPublic, name, given.Reveal()); err != nil {
		return none, err
	}
	dev, err := openDevice(ctx, cfg.Device)
	if err != nil {
		return none, err
	}
	defer dev.Close()
	wrapped, err := dev.Wrap(ctx, pendingAAD(ch.ID, subject, c.Attestation), given.Reveal())
	if err != nil {
		return none, fmt.Errorf("wrap the secret of the challenge: %w", err)
	}
	if err := keepChallenge(cfg, ch.ID, pendingFile{Format: 1, Card: c, Wrapped: wrapped}); err != nil {
		return none, err
	}
	fmt.Fprintf(out, "node         %s, site %s, signing key %s\nchallenge    %s, to be answered by its TPM\n", c.Node, c.Site, pqc.Fingerprint(c.Signing), ch.ID)
	return ch, nil
}

func keepChallenge(cfg Config, id string, p pendingFile) error {
	b, err := json.Marshal(p)
	if err != nil {
		return err
	}
	path := pendingPath(cfg.DataDir, id)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return writeNew(path, append(b, '\n'), 0o600)
}

func attestAnswerCommand() *cobra.Command {
	var cardFile string
	var next bool
	cmd := attestStep("answer --challenge FILE -o FILE", "Answer a challenge with this node's TPM", "challenge", "the challenge",
		func(ctx context.Context, cfg Config, in string, out io.Writer) (any, error) {
			var ch challengeFile
			if err := readJSON(in, "a challenge, as conclaved attest challenge writes it", &ch, &ch.Format); err != nil {
				return nil, err
			}
			file := cardPath(cfg.DataDir)
			if next {
				if cfg.NextDevice == nil {
					return nil, errors.New("--next: the configuration has no [next_device]")
				}
				cfg.Device, cfg.NextDevice = *cfg.NextDevice, nil
				file = filepath.Join(cfg.DataDir, "next-node.json")
			}
			if cardFile == "" {
				cardFile = file
			}
			a, err := answer(ctx, cfg, ch, cardFile)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", in, err)
			}
			fmt.Fprintf(out, "challenge    %s of %s, answered\n", ch.ID, ch.Witness)
			return a, nil
		})
	cmd.Flags().StringVar(&cardFile, "card", "", "this node's card that was sent to the witness; default DATA_DIR/node.json, with --next DATA_DIR/next-node.json")
	cmd.Flags().BoolVar(&next, "next", false, "answer with the device that takes the place of the present one, [next_device]")
	return cmd
}

// answer opens the challenge in this node's TPM.
func answer(ctx context.Context, cfg Config, ch challengeFile, cardFile string) (answerFile, error) {
	none := answerFile{}
	c, err := readCard(cardFile)
	if err != nil {
		return none, err
	}
	if ch.Node != cfg.Node || c.Node != cfg.Node {
		return none, fmt.Errorf("the challenge is for node %s and the card of node %s; this is node %s", ch.Node, c.Node, cfg.Node)
	}
	subject, err := c.subject()
	if err != nil {
		return none, err
	}
	dev, err := openDevice(ctx, cfg.Device)
	if err != nil {
		return none, err
	}
	defer dev.Close()
	if err := c.belongs(dev); err != nil {
		return none, fmt.Errorf("%s: %w", cardFile, err)
	}
	chip, ok := dev.(interface {
		Activate(ctx context.Context, credential, encryptedSecret []byte) ([]byte, error)
	})
	if !ok {
		return none, errors.New("this node is not on a TPM")
	}
	given, err := chip.Activate(ctx, ch.Credential, ch.Secret)
	if err != nil {
		return none, err
	}
	defer secret.Wipe(given)
	return answerFile{Format: 1, ID: ch.ID, Node: cfg.Node, Answer: attest.Answer(given, []byte(ch.ID), subject)}, nil
}

func attestWitnessCommand() *cobra.Command {
	return attestStep("witness --answer FILE -o FILE", "Check the answer and sign that the node's keys are in its TPM", "answer", "the answer",
		func(ctx context.Context, cfg Config, in string, out io.Writer) (any, error) {
			var a answerFile
			if err := readJSON(in, "an answer, as conclaved attest answer writes it", &a, &a.Format); err != nil {
				return nil, err
			}
			w, err := witness(ctx, cfg, a)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", in, err)
			}
			fmt.Fprintf(out, "%s has witnessed the TPM of %s\n", w.Witness, w.Node)
			return w, nil
		})
}

// witness checks the answer against the kept secret and signs the statement with
// this node's device. A challenge serves once: its secret is removed before.
func witness(ctx context.Context, cfg Config, a answerFile) (witnessFile, error) {
	none := witnessFile{}
	if b, err := hex.DecodeString(a.ID); err != nil || len(b) != 16 || hex.EncodeToString(b) != a.ID {
		return none, errors.New("the answer names no challenge")
	}
	path := pendingPath(cfg.DataDir, a.ID)
	var p pendingFile
	err := readJSON(path, "a kept challenge", &p, &p.Format)
	if errors.Is(err, fs.ErrNotExist) {
		return none, fmt.Errorf("this node has no open challenge %s: it was answered before, or is another node's; make a new one with: conclaved attest challenge", a.ID)
	}
	if err != nil {
		return none, err
	}
	subject, err := p.Card.subject()
	if err != nil {
		return none, err
	}
	dev, err := openDevice(ctx, cfg.Device)
	if err != nil {
		return none, err
	}
	defer dev.Close()
	given, err := dev.Unwrap(ctx, pendingAAD(a.ID, subject, p.Card.Attestation), p.Wrapped)
	if err != nil {
		return none, fmt.Errorf("unwrap the secret of the challenge: %w", err)
	}
	defer given.Destroy()
	if a.Node != p.Card.Node || !hmac.Equal(a.Answer, attest.Answer(given.Reveal(), []byte(a.ID), subject)) {
		return none, fmt.Errorf("the answer is wrong: it is not from the TPM of node %s's card", p.Card.Node)
	}
	doc, err := attest.Parse(p.Card.Attestation)
	if err != nil {
		return none, err
	}
	hash := sha256.Sum256(given.Reveal())
	msg, err := attest.WitnessMessage(cfg.Node, subject, doc.TPM, hash[:])
	if err != nil {
		return none, err
	}
	_, suite := cfg.Device.suites()
	digest, err := pqc.Digest(suite, msg, []byte(attest.WitnessContext))
	if err != nil {
		return none, err
	}
	if err := errors.Join(os.Remove(path), syncDir(filepath.Dir(path))); err != nil {
		return none, err
	}
	sig, err := dev.Sign(ctx, digest)
	if err != nil {
		return none, err
	}
	return witnessFile{Format: 1, Node: p.Card.Node, Witness: cfg.Node, Secret: bytes.Clone(hash[:]), Signature: sig}, nil
}

// readJSON reads a file of format 1.
func readJSON(path, what string, v any, format *int) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := strictJSON(b, v); err != nil {
		return fmt.Errorf("%s is not %s: %w", path, what, err)
	}
	if *format != 1 {
		return fmt.Errorf("%s: format %d is not known", path, *format)
	}
	return nil
}
