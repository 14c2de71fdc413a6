package hsm

import (
	"crypto/ecdh"
	"crypto/rand"
	"fmt"

	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/miekg/pkcs11"
)

// The attacks on loaded keys work on session objects of the attacking session,
// made anew for it: should one of them succeed, nothing stays loosened.

// loadedTargets are the objects of an import as an attack sees them.
func loadedTargets(p *importProfile) []target {
	if p == nil {
		return nil
	}
	var all []target
	for _, r := range []role{transportRole, hmacRole, signerRole} {
		if r.name == signerRole.name && !p.signers {
			continue
		}
		all = append(all, target{r, func(s *session) pkcs11.ObjectHandle { return s.victims[r.name] }})
	}
	return all
}

// loadVictims makes the objects that loadedTargets name: keys that nobody uses.
func (s *session) loadVictims(p *importProfile) error {
	if p == nil {
		return nil
	}
	point, err := s.point(s.keys.agreementPub)
	if err != nil {
		return err
	}
	key, err := s.curve.ecdh.NewPublicKey(point)
	if err != nil {
		return unsafef("the agreement key's public point is not on %s", s.curve.name)
	}
	to := recipient{p.kdf, key}
	s.victims = map[string]pkcs11.ObjectHandle{}
	held, err := secret.New(HMACKey)
	if err != nil {
		return unavailablef("%v", err)
	}
	defer held.Destroy()
	_, _ = rand.Read(held.Reveal()) // crypto/rand.Read never returns an error
	if s.victims[hmacRole.name], err = s.loadPlain(to, *p, materialHMAC, held.Reveal()); err != nil {
		return err
	}
	if p.signers {
		k, err := ecdh.P256().GenerateKey(rand.Reader)
		if err != nil {
			return unavailablef("%v", err)
		}
		if s.victims[signerRole.name], err = s.loadPlain(to, *p, materialP256, k.Bytes()); err != nil {
			return err
		}
	}
	blob, err := WrapHMAC(to.bytes(), held, nil)
	if err != nil {
		return err
	}
	in, err := parseImport(blob, s.curve)
	if err != nil {
		return err
	}
	s.victims[transportRole.name], err = s.deriveTransport(in, *p)
	return err
}

// loadedUses make a loaded key do another's work. An Init that succeeds is enough.
func loadedUses(p *importProfile) []attack {
	if p == nil {
		return nil
	}
	type initFunc func(*session, []*pkcs11.Mechanism, pkcs11.ObjectHandle) error
	victim := func(r role, what string, m *pkcs11.Mechanism, init initFunc) attack {
		return attack{fmt.Sprintf("%s with the %s key", what, r.name), func(s *session) (bool, error) {
			return refused(init(s, []*pkcs11.Mechanism{m}, s.victims[r.name]))
		}}
	}
	decrypt := func(s *session, m []*pkcs11.Mechanism, h pkcs11.ObjectHandle) error {
		return s.p11.DecryptInit(s.h, m, h)
	}
	encrypt := func(s *session, m []*pkcs11.Mechanism, h pkcs11.ObjectHandle) error {
		return s.p11.EncryptInit(s.h, m, h)
	}
	verify := func(s *session, m []*pkcs11.Mechanism, h pkcs11.ObjectHandle) error {
		return s.p11.VerifyInit(s.h, m, h)
	}
	wrapAnother := func(s *session, m []*pkcs11.Mechanism, h pkcs11.ObjectHandle) error {
		other := freshKey(s)
		if other == 0 {
			return pkcs11.Error(pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED) // no extractable keys, none to lose
		}
		_, err := s.p11.WrapKey(s.h, m, h, other)
		return err
	}
	all := []attack{
		victim(transportRole, "decrypt by ECB", pkcs11.NewMechanism(pkcs11.CKM_AES_ECB, nil), decrypt),
		victim(transportRole, "decrypt by CBC", pkcs11.NewMechanism(pkcs11.CKM_AES_CBC_PAD, make([]byte, 16)), decrypt),
		victim(transportRole, "encrypt by ECB", pkcs11.NewMechanism(pkcs11.CKM_AES_ECB, nil), encrypt),
		victim(transportRole, "wrap a fresh key", pkcs11.NewMechanism(p.mech, nil), wrapAnother),
		victim(hmacRole, "verify", pkcs11.NewMechanism(pkcs11.CKM_SHA256_HMAC, nil), verify),
	}
	if p.signers {
		all = append(all, attack{"derive with the loaded signing key", func(s *session) (bool, error) {
			peer, err := ecdh.P256().GenerateKey(rand.Reader)
			if err != nil {
				return false, err
			}
			_, err = s.derive(s.victims[signerRole.name], peer.PublicKey().Bytes())
			return refused(err)
		}})
	}
	return all
}
