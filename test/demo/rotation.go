package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

func (s *story) rotate(ctx context.Context) error {
	s.chapter("6. A rotation, approved across borders",
		"An operator may propose a new version of a key. It comes into being only when two",
		"custodians of two nations have signed for it, each with a key of their own. Every node",
		"checks those signatures itself. Two approvals of one nation are not enough.")
	return s.checks(ctx,
		step{"an operator at fr proposes to rotate coalition/orders", func(ctx context.Context) error {
			err := s.write(ctx, "fr", &s.rotation, "key", "rotate", "coalition/orders", "--reason", "yearly rotation")
			return all(err, want("progress", s.rotation.Progress, "open"))
		}},
		step{"de reads the proposal, decoded from the very bytes that are signed", s.showProposal},
		step{"custodian fr-1 approves: still open", func(ctx context.Context) error { return s.notYet(ctx, "fr-1", 1, 1) }},
		step{"custodian fr-2 approves: two approvals, one nation, still not authorised", func(ctx context.Context) error { return s.notYet(ctx, "fr-2", 2, 1) }},
		step{"custodian de-1 approves: authorised", func(ctx context.Context) error {
			p, err := s.approve(ctx, "de-1", s.rotation.ID)
			return all(err, want("the quorum is met", p.Met, true), want("sites", p.Sites, 2))
		}},
		step{"version 2 is made, sealed, proved by every node, and becomes primary", s.activated},
		step{"fr-1, de-1 and jp-1 have each given a receipt for version 2", s.receipts},
	)
}

var signedBytes = regexp.MustCompile(`(?m)^signed bytes\s+\d+ bytes, ([0-9a-f]+)$`)

func (s *story) showProposal(ctx context.Context) error {
	text, err := s.conclave(ctx, "de", "proposal", "show", s.rotation.ID)
	if err != nil {
		return err
	}
	for _, w := range []string{"key/coalition/orders", "yearly rotation", "rotate", "spiffe://fr.example/operator/", s.c.Vars["CONCLAVE_CLUSTER"]} {
		if !strings.Contains(text, w) {
			return fmt.Errorf("%q is not shown", w)
		}
	}
	m := signedBytes.FindStringSubmatch(text)
	if m == nil {
		return errors.New("the signed bytes are not shown")
	}
	b, err := hex.DecodeString(m[1])
	if err != nil {
		return err
	}
	if err := want("the proposal that the bytes make", approval.ProposalID(b), s.rotation.ID); err != nil {
		return err
	}
	for _, line := range strings.Split(text, "\n")[:14] {
		s.say("        %s", line)
	}
	return nil
}

// notYet approves and wants nothing to happen.
func (s *story) notYet(ctx context.Context, custodian string, approvals, nations int) error {
	p, err := s.approve(ctx, custodian, s.rotation.ID)
	if err != nil {
		return err
	}
	if len(p.Missing) == 0 {
		return errors.New("nothing is said to be missing")
	}
	s.say("        missing: %s", strings.Join(p.Missing, ", "))
	k, err := s.key(ctx, "jp", "coalition/orders")
	return all(err, want("progress", p.Progress, "open"), want("the quorum is met", p.Met, false),
		want("approvals", p.Approvals, approvals), want("sites", p.Sites, nations),
		want("the primary version", k.Primary, 1), want("the latest version", k.Latest, 1))
}

func (s *story) activated(ctx context.Context) error {
	for _, site := range sites {
		if _, err := s.c.Activated(ctx, site, "coalition", "orders", 2); err != nil {
			return err
		}
	}
	return s.read(ctx, "fr", &s.rotation, "proposal", "show", s.rotation.ID)
}

func (s *story) receipts(ctx context.Context) error {
	k, err := s.key(ctx, "jp", "coalition/orders")
	if err != nil {
		return err
	}
	v := k.Versions[len(k.Versions)-1]
	got := map[string]bool{}
	for _, r := range v.Receipts {
		got[r.Node] = r.Received
	}
	return all(want("receipts", len(v.Receipts), 3), want("fr-1", got["fr-1"], true), want("de-1", got["de-1"], true), want("jp-1", got["jp-1"], true),
		want("the proposal behind version 2", v.Proposal, s.rotation.ID), want("progress", s.rotation.Progress, "executed"))
}

func (s *story) after(ctx context.Context) error {
	var newer, moved wire.EncryptResponse
	return s.checks(ctx,
		step{"what was encrypted before still opens, at all three", func(ctx context.Context) error {
			for _, site := range sites {
				if err := all(s.readOrder(ctx, site, s.order), s.openReport(ctx, site)); err != nil {
					return err
				}
			}
			return nil
		}},
		step{"a new ciphertext carries version 2, and opens at jp", func(ctx context.Context) error {
			err := s.read(ctx, "de", &newer, append([]string{"encrypt", "coalition/orders", orderText}, orderContext...)...)
			return all(err, want("the version", newer.KeyVersion, 2), s.readOrder(ctx, "jp", b64(newer.Ciphertext)))
		}},
		step{"rewrap moves an old ciphertext to version 2 without showing it", func(ctx context.Context) error {
			err := s.read(ctx, "jp", &moved, append([]string{"rewrap", "coalition/orders", s.order}, orderContext...)...)
			return all(err, want("the version", moved.KeyVersion, 2), s.readOrder(ctx, "fr", b64(moved.Ciphertext)))
		}},
	)
}

func (s *story) evidence(ctx context.Context) error {
	s.chapter("8. Proof",
		"The evidence of a rotation is one file. Anybody who knows the cluster's identity can",
		"verify it without the cluster: the founders' signatures, the policy, each approval, the",
		"commit and each receipt.")
	file := s.file("evidence.json")
	cluster := s.c.Vars["CONCLAVE_CLUSTER"]
	return s.checks(ctx,
		step{"an operator fetches the evidence of the rotation", func(ctx context.Context) error {
			_, err := s.conclave(ctx, "jp", "evidence", "get", s.rotation.ID, "--out", file)
			return err
		}},
		step{"it verifies offline, in an empty environment", func(ctx context.Context) error {
			r, err := s.c.CLI(ctx, nil, "evidence", "verify", file, "--cluster", cluster)
			if err != nil {
				return err
			}
			if err := r.Err(); err != nil {
				return err
			}
			for _, w := range []string{"fr-1", "de-1", "jp-1", "verified"} {
				if !strings.Contains(r.Stdout, w) {
					return fmt.Errorf("the report does not mention %q: %s", w, r.Stdout)
				}
			}
			for line := range strings.Lines(r.Stdout) {
				s.say("        %s", strings.TrimRight(line, "\n"))
			}
			return nil
		}},
		step{"with another cluster's identity it is refused", func(ctx context.Context) error {
			return s.fails(ctx, "evidence", "verify", file, "--cluster", strings.Repeat("0", 32))
		}},
		step{"with a byte changed, wherever a value is, it is refused", func(ctx context.Context) error { return s.changedEvidence(ctx, file, cluster) }},
	)
}

// fails runs the command in an empty environment and wants it to fail with a
// message.
func (s *story) fails(ctx context.Context, args ...string) error {
	r, err := s.c.CLI(ctx, nil, args...)
	if err != nil {
		return err
	}
	if r.Code == 0 || strings.TrimSpace(r.Stderr) == "" {
		return fmt.Errorf("exit code %d, message %q; it must be refused", r.Code, r.Stderr)
	}
	return nil
}

// changedEvidence changes one byte of each signed or hashed value in turn and
// wants every change to be noticed. The file stays well-formed JSON and base64, so
// it is the content that is verified.
func (s *story) changedEvidence(ctx context.Context, file, cluster string) error {
	good, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	values := regexp.MustCompile(`"[A-Za-z0-9+/]{40,}={0,2}"`).FindAllIndex(good, -1)
	if len(values) < 5 {
		return fmt.Errorf("only %d values in the evidence", len(values))
	}
	for _, v := range values {
		bad := append([]byte(nil), good...)
		at := (v[0] + v[1]) / 2
		bad[at] = map[bool]byte{true: 'B', false: 'A'}[bad[at] == 'A']
		if err := os.WriteFile(file+".changed", bad, 0o600); err != nil {
			return err
		}
		if err := s.fails(ctx, "evidence", "verify", file+".changed", "--cluster", cluster); err != nil {
			return fmt.Errorf("byte %d changed: %w", at, err)
		}
	}
	s.say("        changed in %d places, noticed in all", len(values))
	return nil
}

func (s *story) suspend(ctx context.Context) error {
	s.chapter("10. One nation can stop a key, two must agree to go on",
		"In an emergency a single custodian suspends a key. Taking it into service again needs",
		"the quorum.")
	var p wire.Proposal
	key := "coalition/orders"
	return s.checks(ctx,
		step{"jp proposes to suspend the key, custodian jp-1 approves, and it is suspended", func(ctx context.Context) error {
			if err := s.write(ctx, "jp", &p, "key", "suspend", key, "--reason", "suspected leak"); err != nil {
				return err
			}
			if _, err := s.approve(ctx, "jp-1", p.ID); err != nil {
				return err
			}
			return s.suspended(ctx, key, true)
		}},
		step{"every node refuses it: no encryption, no decryption", func(ctx context.Context) error {
			for _, site := range sites {
				if err := all(s.refused(ctx, s.c.Env(site), 5, []string{"suspended"}, "encrypt", key, "x"),
					s.refused(ctx, s.c.Env(site), 5, []string{"suspended"}, append([]string{"decrypt", key, s.order}, orderContext...)...)); err != nil {
					return fmt.Errorf("%s: %w", site, err)
				}
			}
			return nil
		}},
		step{"one approval does not resume it", func(ctx context.Context) error {
			if err := s.write(ctx, "jp", &p, "key", "resume", key, "--reason", "it was a false alarm"); err != nil {
				return err
			}
			after, err := s.approve(ctx, "jp-2", p.ID)
			return all(err, want("progress", after.Progress, "open"), s.suspended(ctx, key, true))
		}},
		step{"the second, of another nation, does; the key serves again", func(ctx context.Context) error {
			if _, err := s.approve(ctx, "de-2", p.ID); err != nil {
				return err
			}
			return all(s.suspended(ctx, key, false), s.readOrder(ctx, "de", s.order))
		}},
	)
}

// suspended waits until all nodes see the key suspended or not.
func (s *story) suspended(ctx context.Context, path string, wanted bool) error {
	for _, site := range sites {
		err := harness.Within(ctx, time.Minute, "suspension at "+site, func(ctx context.Context) error {
			k, err := s.key(ctx, site, path)
			return all(err, want("suspended", k.Suspended, wanted))
		})
		if err != nil {
			return err
		}
	}
	return nil
}
