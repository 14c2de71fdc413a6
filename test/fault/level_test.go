package fault

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

// levels are the protection levels that every fault meets.
var levels = []kms.Protection{kms.Software, kms.Hardware}

// stock is what a fault finds in use at one protection level: two keyrings
// resident everywhere, of which the victim has used one and not the other.
type stock struct {
	w      *world
	level  kms.Protection
	victim string // site
	others []string

	warm, cold string // keyrings
	before     map[string]wire.EncryptResponse
	version    uint32 // of the key "rotated" before the fault

	home, homeRotation string // keyring resident at the victim alone, and a proposal, where a test has made them
}

const text = "what was protected before the fault"

// stocks makes keyrings, keys and ciphertexts for every level, through a node
// other than the victim's.
func (w *world) stocks(victim string) []*stock {
	w.t.Helper()
	var out []*stock
	for _, level := range levels {
		s := &stock{w: w, level: level, victim: victim, before: map[string]wire.EncryptResponse{}, version: 1}
		for _, site := range []string{"de", "fr", "jp"} {
			if site != victim {
				s.others = append(s.others, site)
			}
		}
		s.warm, s.cold = unique("warm-"+string(level)), unique("cold-"+string(level))
		for _, ring := range []string{s.warm, s.cold} {
			s.keyring(ring)
		}
		w.settled()
		for _, ring := range []string{s.warm, s.cold} {
			s.before[ring] = s.encrypt(s.others[0], ring, "data", text)
		}
		s.decrypt(victim, s.warm, s.before[s.warm])
		s.sign(victim, s.warm)
		out = append(out, s)
	}
	return out
}

func (w *world) settled() {
	w.t.Helper()
	_, _, err := w.c.SameLog(w.t.Context())
	w.do(err)
}

func (s *stock) keyring(name string) {
	s.w.t.Helper()
	operator := s.w.client("de", "operator")
	ctx := s.w.t.Context()
	_, err := operator.CreateKeyring(ctx, wire.CreateKeyringRequest{
		Name: name, Residency: []string{"de", "fr", "jp"}, Protection: string(s.level), Policy: "keys", Receipts: string(kms.EveryNode),
	})
	s.w.do(err)
	for key, purpose := range map[string]kms.Purpose{"data": kms.Encrypt, "rotated": kms.Encrypt, "signer": kms.Sign} {
		algorithm := kms.AES256GCM
		if purpose == kms.Sign {
			algorithm = kms.ECDSAP256
		}
		_, err := operator.CreateKey(ctx, name, wire.CreateKeyRequest{Name: key, Purpose: string(purpose), Algorithm: string(algorithm)})
		s.w.do(err)
	}
}

func (s *stock) encrypt(at, ring, key, plain string) wire.EncryptResponse {
	s.w.t.Helper()
	r, err := s.w.client(at, "service").Key(ring, key).Encrypt(s.w.t.Context(), wire.EncryptRequest{Plaintext: wire.Secret(plain)})
	if err != nil {
		s.w.t.Fatalf("encrypt with %s/%s at %s: %v", ring, key, at, err)
	}
	return r
}

// decrypt opens a ciphertext of the key "data".
func (s *stock) decrypt(at, ring string, c wire.EncryptResponse) {
	s.w.t.Helper()
	if err := s.tryDecrypt(s.w.t.Context(), at, ring, "data", c); err != nil {
		s.w.t.Fatal(err)
	}
}

func (s *stock) tryDecrypt(ctx context.Context, at, ring, key string, c wire.EncryptResponse) error {
	r, err := s.w.client(at, "service").Key(ring, key).Decrypt(ctx, wire.DecryptRequest{Ciphertext: c.Ciphertext})
	if err != nil {
		return fmt.Errorf("decrypt with %s/%s at %s: %w", ring, key, at, err)
	}
	if string(r.Plaintext) != text {
		return harness.Give(fmt.Errorf("decrypt with %s/%s at %s: another plaintext", ring, key, at))
	}
	return nil
}

// sign makes a signature and has another node verify it.
func (s *stock) sign(at, ring string) {
	s.w.t.Helper()
	if err := s.trySign(s.w.t.Context(), at, ring); err != nil {
		s.w.t.Fatal(err)
	}
}

func (s *stock) trySign(ctx context.Context, at, ring string) error {
	message := []byte("a message")
	sig, err := s.w.client(at, "service").Key(ring, "signer").Sign(ctx, wire.SignRequest{Message: message})
	if err != nil {
		return fmt.Errorf("sign with %s/signer at %s: %w", ring, at, err)
	}
	v, err := s.w.client("de", "service").Key(ring, "signer").Verify(ctx, wire.VerifyRequest{Message: message, Signature: sig.Signature})
	if err == nil && !v.Valid {
		err = harness.Give(errors.New("a signature does not verify"))
	}
	return err
}

// othersServe uses both keyrings at the nodes whose devices are well.
func (s *stock) othersServe() {
	s.w.t.Helper()
	for _, at := range s.others {
		for _, ring := range []string{s.warm, s.cold} {
			s.decrypt(at, ring, s.before[ring])
			s.sign(at, ring)
		}
	}
	c := s.encrypt(s.others[0], s.warm, "data", text)
	s.decrypt(s.others[1], s.warm, c)
}

// refuses asks the victim for what it needs its device for, as a client and with
// the command, and wants an answer that names the cause. What is in its cache a
// node that lives does all the same.
func (s *stock) refuses(cause []string, lives bool) {
	t := s.w.t
	t.Helper()
	for name, err := range map[string]error{
		"decrypt": func() error {
			_, err := s.w.once(s.victim, "service").Key(s.cold, "data").Decrypt(t.Context(), wire.DecryptRequest{Ciphertext: s.before[s.cold].Ciphertext})
			return err
		}(),
		"sign": func() error {
			_, err := s.w.once(s.victim, "service").Key(s.cold, "signer").Sign(t.Context(), wire.SignRequest{Message: []byte("a message")})
			return err
		}(),
	} {
		refused(t, name+" at the victim", err, kms.Unavailable)
		if err != nil {
			mustName(t, "the error of "+name, err.Error(), cause)
		}
	}
	r, err := s.w.c.CLI(t.Context(), s.w.c.Env(s.victim), "sign", s.cold+"/signer", "a message")
	s.w.do(err)
	if r.Code == 0 {
		t.Error("the command conclave signed without the device")
	}
	mustName(t, "conclave sign", r.Stderr, cause)
	if lives && s.level == kms.Software {
		s.decrypt(s.victim, s.warm, s.before[s.warm])
		s.sign(s.victim, s.warm)
	}
}

// rotate has custodians approve a rotation of a key in use.
func (s *stock) rotate() { s.w.t.Helper(); s.approveRotation(s.warm, "rotated") }

// approveRotation has custodians approve the rotation of a key.
func (s *stock) approveRotation(ring, key string) (proposal string) {
	t := s.w.t
	t.Helper()
	operator := s.w.client("de", "operator")
	p, err := operator.OpenProposal(t.Context(), wire.OpenProposalRequest{
		Action: string(kms.ActionRotate), Target: approval.KeyTarget(ring, key), Reason: "a rotation during a fault",
	})
	s.w.do(err)
	for _, id := range []string{"fr-1", "de-1"} {
		k, err := s.w.c.Custodian(id)
		s.w.do(err)
		st, err := k.Statement(approval.Approve, p)
		k.Key.Destroy()
		s.w.do(err)
		_, err = operator.Vote(t.Context(), p.ID, wire.VoteRequest{Statement: st})
		s.w.do(err)
	}
	return p.ID
}

// key reads the rotated key at a node.
func (s *stock) key(ctx context.Context, at string) (wire.Key, error) {
	cl, err := s.w.c.Client(at, "operator")
	if err != nil {
		return wire.Key{}, err
	}
	return cl.Key(s.warm, "rotated").Describe(ctx)
}

// halfWay waits until one of the other nodes has committed the new version, which
// must then wait for the victim's receipt.
func (s *stock) halfWay() {
	s.w.t.Helper()
	s.w.eventually(25*time.Second, "another node brings the new version", func(ctx context.Context) error {
		k, err := s.key(ctx, "de")
		if err != nil {
			return err
		}
		if k.Primary != s.version {
			return harness.Give(fmt.Errorf("version %d is primary without the victim's receipt", k.Primary))
		}
		if k.Latest != s.version+1 {
			return fmt.Errorf("the latest version is %d", k.Latest)
		}
		for _, r := range k.Versions[len(k.Versions)-1].Receipts {
			if victim := strings.HasPrefix(r.Node, s.victim); r.Received == victim {
				return fmt.Errorf("the receipt of %s: %v", r.Node, r.Received)
			}
		}
		return nil
	})
}

// whole waits until the rotation is complete at every node: versions without a
// gap, every receipt in.
func (s *stock) whole(deadline time.Duration) {
	s.w.t.Helper()
	for _, at := range []string{"de", "fr", "jp"} {
		s.w.eventually(deadline, "the rotation is complete at "+at, func(ctx context.Context) error {
			k, err := s.key(ctx, at)
			if err != nil {
				return err
			}
			if k.Primary != s.version+1 || k.Latest != s.version+1 || len(k.Versions) != int(k.Latest) {
				return fmt.Errorf("primary %d, latest %d, %d versions", k.Primary, k.Latest, len(k.Versions))
			}
			for i, v := range k.Versions {
				if v.Version != uint32(i+1) {
					return harness.Give(fmt.Errorf("version %d is in place %d", v.Version, i+1))
				}
			}
			for _, r := range k.Versions[s.version].Receipts {
				if !r.Received {
					return fmt.Errorf("no receipt of %s", r.Node)
				}
			}
			return nil
		})
	}
}

// intact wants everything that was protected before to open everywhere, and what
// the victim makes now to open elsewhere.
func (s *stock) intact() {
	s.w.t.Helper()
	for _, at := range append([]string{s.victim}, s.others...) {
		for _, ring := range []string{s.warm, s.cold} {
			s.decrypt(at, ring, s.before[ring])
			s.sign(at, ring)
		}
	}
	after := s.encrypt(s.victim, s.warm, "rotated", text)
	s.w.do(s.tryDecrypt(s.w.t.Context(), s.others[0], s.warm, "rotated", after))
}
