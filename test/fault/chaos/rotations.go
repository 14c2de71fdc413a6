package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

// Rotations is the story of keys that are rotated again and again while services at every
// site open what was encrypted under new and old versions.
//
// A *client at a site* is the product's Go client with an identity of that site, and the
// addresses of all nodes of the residency, those of its own site first: it turns to the
// next one when a node cannot be reached or says that it cannot serve at the moment. The
// service repeats a call that ended so for openWait. A *decrypt fails* when a call returns
// any other error, at once, or another plaintext, or when none was answered in that time.
// The keyring survives: a node that is cut off goes on decrypting. So a node that is
// killed, frozen or cut off costs time; a new version that a node up and serving cannot
// open, an old one that is gone too early, or a refusal for good from a node that is
// behind, is a failure.
type Rotations struct {
	c          *harness.Coalition
	cluster    string
	custodians []*harness.Custodian
	operator   *client.Client            // asks all nodes
	services   map[string]*client.Client // by site

	mu      sync.Mutex
	made    []encrypted
	want    int // rotations to begin yet
	done    int // activated, evidence verified
	opened  map[string]int
	slowest time.Duration // until something was opened
	again   int           // calls that were repeated
	failed  []string
}

const (
	storyRing  = "rotations"
	storyKeys  = 6               // rotated side by side
	storyWait  = 3 * time.Minute // for a rotation to be carried out
	storyPause = 25 * time.Millisecond
	openWait   = time.Minute // faults last ten seconds at most, and a start a few
)

// NewRotations makes the keyring and its keys. want is how many rotations to begin.
func NewRotations(ctx context.Context, c *harness.Coalition, want int) (*Rotations, error) {
	s := &Rotations{c: c, want: want, services: map[string]*client.Client{}, opened: map[string]int{}}
	var err error
	if s.operator, err = s.client("fr", "operator"); err != nil {
		return nil, err
	}
	for _, site := range []string{"de", "fr", "jp"} {
		if s.services[site], err = s.client(site, "service"); err != nil {
			return nil, err
		}
	}
	for _, id := range []string{"fr-1", "jp-1"} {
		k, err := c.Custodian(id)
		if err != nil {
			return nil, err
		}
		s.custodians = append(s.custodians, k)
	}
	status, err := s.operator.Status(ctx)
	if err != nil {
		return nil, err
	}
	s.cluster = status.Cluster
	_, err = s.operator.CreateKeyring(ctx, wire.CreateKeyringRequest{
		Name: storyRing, Residency: []string{"de", "fr", "jp"}, Policy: "keys", Receipts: string(kms.EverySite), MaxStalenessMS: maxStaleness.Milliseconds(), Survive: true,
	})
	for i := 0; i < storyKeys && err == nil; i++ {
		_, err = s.operator.CreateKey(ctx, storyRing, wire.CreateKeyRequest{Name: storyKey(i), Purpose: string(kms.Encrypt)})
	}
	if err == nil {
		_, err = c.SameLog(ctx)
	}
	for i := 0; i < storyKeys && err == nil; i++ {
		err = s.encrypt(ctx, storyKey(i), 1)
	}
	return s, err
}

func storyKey(i int) string { return fmt.Sprintf("r%d", i+1) }

// client makes a client of a site: its own nodes first.
func (s *Rotations) client(site, role string) (*client.Client, error) {
	nodes := slices.Clone(s.c.Nodes)
	slices.SortStableFunc(nodes, func(a, b *harness.Node) int {
		far := func(n *harness.Node) int { return map[bool]int{true: 1}[n.Site != site] }
		return far(a) - far(b)
	})
	cfg, err := s.c.Config(site, role, nodes...)
	if err != nil {
		return nil, err
	}
	cfg.Timeout = tryTimeout
	return client.New(cfg)
}

// Close wipes the custodians' keys and drops the connections.
func (s *Rotations) Close() {
	for _, k := range s.custodians {
		k.Key.Destroy()
	}
	s.operator.Close()
	for _, c := range s.services {
		c.Close()
	}
}

// Run rotates until all rotations are made or ctx ends; what has begun is finished. It
// opens ciphertexts at every site all the time.
func (s *Rotations) Run(ctx context.Context, seed uint64) {
	opening, stop := context.WithCancel(context.Background())
	var opens, turns sync.WaitGroup
	i := uint64(0)
	for site := range s.services {
		i++
		r := rand.New(rand.NewPCG(seed, 2000+i))
		opens.Go(func() {
			for opening.Err() == nil {
				s.open(opening, site, r)
			}
		})
	}
	for i := range storyKeys {
		turns.Go(func() {
			for version := uint32(2); ctx.Err() == nil && s.take(); version++ {
				if err := s.rotate(storyKey(i), version); err != nil {
					s.fail("the rotation of %s to version %d: %v", storyKey(i), version, err)
					return
				}
			}
		})
	}
	turns.Wait()
	stop()
	opens.Wait()
}

// take reports whether another rotation is to be made.
func (s *Rotations) take() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.want--
	return s.want >= 0
}

func (s *Rotations) fail(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed = append(s.failed, fmt.Sprintf(format, args...))
}

// rotate has a key rotated to a version, encrypts under it and verifies the evidence.
// Writes are repeated under one idempotency key until their outcome is known.
func (s *Rotations) rotate(key string, version uint32) error {
	ctx, cancel := context.WithTimeout(context.Background(), storyWait)
	defer cancel()
	id := fmt.Sprintf("%s-%d", key, version)
	var p wire.Proposal
	err := s.insist(ctx, "it is proposed", func() (err error) {
		p, err = s.operator.OpenProposal(ctx, wire.OpenProposalRequest{
			Action: string(kms.ActionRotate), Target: approval.KeyTarget(storyRing, key), Reason: "the story of " + id,
		}, client.WithIdempotencyKey(id))
		return err
	})
	for _, k := range s.custodians {
		if err != nil {
			return err
		}
		var st wire.Statement
		if st, err = k.Statement(approval.Approve, p); err == nil {
			err = s.insist(ctx, "it is approved", func() error {
				_, err := s.operator.Vote(ctx, p.ID, wire.VoteRequest{Statement: st})
				return err
			})
		}
	}
	if err != nil {
		return err
	}
	err = s.insist(ctx, "it is in use", func() error {
		k, err := s.operator.Key(storyRing, key).Describe(ctx)
		switch {
		case err != nil:
			return err
		case k.Primary < version:
			return kms.Errorf(kms.Unavailable, "version %d is the primary one", k.Primary)
		case k.Primary > version || k.Versions[version-1].Proposal != p.ID:
			return kms.Errorf(kms.Internal, "version %d is the primary one; proposal %s brought version %d", k.Primary, p.ID, version)
		}
		return nil
	})
	if err == nil {
		err = s.encrypt(ctx, key, version)
	}
	if err == nil {
		err = s.evidence(ctx, p.ID)
	}
	if err == nil {
		s.mu.Lock()
		s.done++
		s.mu.Unlock()
	}
	return err
}

// insist repeats what a fault has kept from happening, and nothing else.
func (s *Rotations) insist(ctx context.Context, what string, f func() error) error {
	return harness.Wait(ctx, what, func(context.Context) error {
		err := f()
		if err != nil && !slices.Contains(explained, kms.KindOf(err)) {
			return harness.Give(err)
		}
		return err
	})
}

// encrypt makes a ciphertext under a version. Nodes may be behind as far as the keyring
// allows, so those under the version before are kept too.
func (s *Rotations) encrypt(ctx context.Context, key string, version uint32) error {
	return s.insist(ctx, "something is encrypted under it", func() error {
		e := encrypted{key: key, text: fmt.Sprintf("%s %d", key, version)}
		c, err := s.services["de"].Key(storyRing, key).Encrypt(ctx, wire.EncryptRequest{Plaintext: wire.Secret(e.text)})
		if err != nil {
			return err
		}
		e.ciphertext, e.version = c.Ciphertext, c.KeyVersion
		s.mu.Lock()
		s.made = append(s.made, e)
		s.mu.Unlock()
		if e.version != version {
			return kms.Errorf(kms.Unavailable, "version %d was used", e.version)
		}
		return nil
	})
}

// evidence fetches and verifies the evidence of a rotation.
func (s *Rotations) evidence(ctx context.Context, id string) error {
	var file []byte
	if err := s.insist(ctx, "there is evidence", func() (err error) {
		file, err = s.operator.Evidence(ctx, id)
		return err
	}); err != nil {
		return err
	}
	e, err := audit.ParseEvidence(file)
	if err != nil {
		return err
	}
	_, err = audit.VerifyEvidence(e, s.cluster)
	return err
}

// open opens a ciphertext at a site: every other time the newest one of some key.
func (s *Rotations) open(ctx context.Context, site string, r *rand.Rand) {
	s.mu.Lock()
	e := s.made[r.IntN(len(s.made))]
	if r.IntN(2) == 0 {
		e = s.made[max(0, len(s.made)-1-r.IntN(storyKeys))]
	}
	s.mu.Unlock()
	began := time.Now()
	err := s.decrypt(context.WithoutCancel(ctx), s.services[site], e)
	took := time.Since(began)
	s.mu.Lock()
	s.opened[site]++
	s.slowest = max(s.slowest, took)
	s.mu.Unlock()
	if err != nil {
		s.fail("a client at %s, after %v: %v", site, took.Round(time.Millisecond), err)
	}
	select {
	case <-ctx.Done():
	case <-time.After(storyPause):
	}
}

func (s *Rotations) decrypt(ctx context.Context, c *client.Client, e encrypted) error {
	ctx, cancel := context.WithTimeout(ctx, openWait)
	defer cancel()
	tries := 0
	err := s.insist(ctx, "it is opened", func() error {
		tries++
		p, err := c.Key(storyRing, e.key).Decrypt(ctx, wire.DecryptRequest{Ciphertext: e.ciphertext})
		if err == nil && string(p.Plaintext) != e.text {
			err = errors.New("it opens to something else")
		}
		return err
	})
	s.mu.Lock()
	s.again += max(tries-1, 0)
	s.mu.Unlock()
	if err != nil {
		return fmt.Errorf("a ciphertext of %s version %d: %w", e.key, e.version, err)
	}
	return nil
}

// Everywhere opens a ciphertext of every version at every node, once all are up again.
func (s *Rotations) Everywhere(ctx context.Context) (opened int) {
	last := map[string]encrypted{}
	for _, e := range s.made {
		last[fmt.Sprint(e.key, " ", e.version)] = e
	}
	for _, e := range last {
		for _, n := range s.c.Nodes {
			c, err := s.c.Client(n, "service", time.Minute)
			if err == nil {
				err = s.decrypt(ctx, c, e)
			}
			if err != nil {
				s.fail("%s, when all was over: %v", n.ID, err)
				continue
			}
			opened++
		}
	}
	return opened
}
