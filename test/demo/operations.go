package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

func b64(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

func (s *story) operations(ctx context.Context) error {
	s.chapter("7. Signing, authenticating, taking a key along",
		"Signing keys and MAC keys work the same way. A data key can be fetched sealed to a",
		"post-quantum key of the caller's own, so that not even TLS carries it bare.")
	const order = "Order 66 is cancelled."
	var signature, mac string
	return s.checks(ctx,
		step{"jp signs an order with coalition/seal; de finds the signature valid", func(ctx context.Context) (err error) {
			if signature, err = s.conclave(ctx, "jp", "sign", "coalition/seal", order); err != nil {
				return err
			}
			answer, err := s.conclave(ctx, "de", "verify", "coalition/seal", order, signature)
			return all(err, want("the answer", answer, "valid"))
		}},
		step{"so does anybody with the public key alone; another order does not verify", func(ctx context.Context) error {
			if err := s.verifyAlone(ctx, order, signature); err != nil {
				return err
			}
			return s.refused(ctx, s.c.Env("fr"), 6, []string{"does not verify"}, "verify", "coalition/seal", order+"!", signature)
		}},
		step{"fr authenticates a message with coalition/tags; jp checks it, and refuses another", func(ctx context.Context) (err error) {
			if mac, err = s.conclave(ctx, "fr", "mac", "coalition/tags", order); err != nil {
				return err
			}
			answer, err := s.conclave(ctx, "jp", "verify-mac", "coalition/tags", order, mac)
			return all(err, want("the answer", answer, "valid"),
				s.refused(ctx, s.c.Env("jp"), 6, nil, "verify-mac", "coalition/tags", order+"!", mac))
		}},
		step{"de takes the report's data key along, sealed to a fresh ML-KEM-1024 + P-384 key", func(ctx context.Context) error {
			var out struct {
				Key  []byte `json:"key"`
				Kind string `json:"kind"`
			}
			err := s.read(ctx, "de", &out, "export", "coalition/orders", b64(s.wrapped), "--context", "file=report")
			return all(err, want("it is the data key of the report", bytes.Equal(out.Key, s.dataKeys[0]), true), want("its kind", out.Kind, wire.ExportDataKey))
		}},
		step{"key material itself is not handed out", func(ctx context.Context) error {
			return s.refused(ctx, s.c.Env("de"), 3, []string{"may not export-material"}, "export", "coalition/orders", "--version", "1")
		}},
	)
}

// verifyAlone verifies with Go's own ECDSA.
func (s *story) verifyAlone(ctx context.Context, order, signature string) error {
	text, err := s.conclave(ctx, "fr", "public-key", "coalition/seal")
	if err != nil {
		return err
	}
	block, _ := pem.Decode([]byte(text + "\n"))
	if block == nil {
		return errors.New("the public key is not PEM")
	}
	pub, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return err
	}
	key, ok := pub.(*ecdsa.PublicKey)
	if !ok {
		return fmt.Errorf("the public key is a %T", pub)
	}
	sig, err := base64.StdEncoding.DecodeString(signature)
	if err != nil {
		return err
	}
	digest := sha512.Sum384([]byte(order))
	return want("the signature is valid", ecdsa.VerifyASN1(key, digest[:], sig), true)
}

func (s *story) retry(ctx context.Context) error {
	s.chapter("9. A write can be repeated safely",
		"Whoever did not get an answer asks again with the same idempotency key, at any node, and",
		"gets the first outcome.")
	req := wire.CreateKeyRequest{Name: "letters", Purpose: "encrypt"}
	return s.checks(ctx,
		step{"the same request twice, at fr and then at jp, makes one key", func(ctx context.Context) error {
			first, err := s.createAt(ctx, "fr", req)
			if err != nil {
				return err
			}
			again, err := s.createAt(ctx, "jp", req)
			return all(err, want("the key's id", again.ID, first.ID))
		}},
		step{"another request under the same idempotency key is refused", func(ctx context.Context) error {
			other := req
			other.Name = "parcels"
			if _, err := s.createAt(ctx, "fr", other); !errors.Is(err, kms.Conflict) {
				return fmt.Errorf("the outcome is %v, not a conflict", err)
			}
			return nil
		}},
	)
}

// createAt makes a key through a site's node as the operator of fr, under one
// idempotency key.
func (s *story) createAt(ctx context.Context, node string, req wire.CreateKeyRequest) (wire.Key, error) {
	cl, err := s.c.ClientAt(node, "fr", "operator")
	if err != nil {
		return wire.Key{}, err
	}
	return cl.CreateKey(ctx, "coalition", req, client.WithIdempotencyKey("letters-1"))
}

func (s *story) kill(ctx context.Context) error {
	s.chapter("12. The leader dies",
		"The leader's process is killed in the middle of its work. The two others elect another,",
		"and meanwhile go on encrypting and decrypting by themselves.")
	var dead *harness.Node
	var others []*harness.Node
	var killed time.Time
	return s.checks(ctx,
		step{"the leader is killed with SIGKILL", func(ctx context.Context) (err error) {
			if dead, err = s.c.Leader(ctx); err != nil {
				return err
			}
			for _, n := range s.c.All() {
				if n != dead {
					others = append(others, n)
				}
			}
			killed = time.Now()
			return dead.Kill(ctx)
		}},
		step{"the others decrypt at once, without a leader", func(ctx context.Context) error {
			for _, n := range others {
				if err := s.readOrder(ctx, n.Site, s.order); err != nil {
					return err
				}
			}
			return nil
		}},
		step{"a new leader takes over and a write succeeds", func(ctx context.Context) error {
			var made wire.Key
			err := s.read(ctx, others[0].Site, &made, "key", "create", "coalition/after-the-fall", "--purpose", "encrypt")
			if err != nil {
				return err
			}
			s.say("        the write was done %s after the kill", short(time.Since(killed)))
			if _, _, err := s.c.SameLog(ctx); err != nil {
				return err
			}
			leader, err := s.c.Leader(ctx)
			return all(err, want("the dead node leads", leader == dead, false))
		}},
		step{"the new key works at both of them", func(ctx context.Context) error {
			c, err := s.conclave(ctx, others[0].Site, "encrypt", "coalition/after-the-fall", orderText)
			if err != nil {
				return err
			}
			text, err := s.conclave(ctx, others[1].Site, "decrypt", "coalition/after-the-fall", c)
			return all(err, want("the text", text, orderText))
		}},
		step{"the dead node starts again and catches up: equal logs at all three", func(ctx context.Context) error {
			if err := dead.Start(ctx); err != nil {
				return err
			}
			size, root, err := s.c.SameLog(ctx)
			s.say("        %d entries, root %x", size, root)
			return err
		}},
		step{"it serves what was made before and while it was down", func(ctx context.Context) error {
			c, err := s.conclave(ctx, others[0].Site, "encrypt", "coalition/after-the-fall", orderText)
			if err != nil {
				return err
			}
			text, err := s.conclave(ctx, dead.Site, "decrypt", "coalition/after-the-fall", c)
			return all(err, want("the text", text, orderText), s.readOrder(ctx, dead.Site, s.order))
		}},
	)
}
