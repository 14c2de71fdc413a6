package main

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

func (s *story) keys(ctx context.Context) error {
	s.chapter("3. Two keyrings, a key for every use",
		"A keyring says which nations may open its keys. \"coalition\" belongs to all three,",
		"\"europe\" to France and Germany. Operators make keys but cannot use them.")
	return s.checks(ctx,
		step{"keyring coalition opens at fr, de and jp; europe at fr and de only", s.keyrings},
		step{"an operator makes keys to encrypt, to sign and to authenticate", s.create},
		step{"the same operator may not encrypt with them", func(ctx context.Context) error {
			cert, key := s.c.Certificate("fr", "operator")
			env := s.c.Env("fr").With("CONCLAVE_CLIENT_CERT", cert, "CONCLAVE_CLIENT_KEY", key)
			return s.refused(ctx, env, 3, []string{"may not encrypt"}, "encrypt", "coalition/orders", "x")
		}},
	)
}

func (s *story) keyrings(ctx context.Context) error {
	for name, residency := range map[string][]string{"coalition": {"de", "fr", "jp"}, "europe": {"de", "fr"}} {
		var kr wire.Keyring
		if err := s.read(ctx, "jp", &kr, "keyring", "show", name); err != nil {
			return err
		}
		if !slices.Equal(kr.Residency, residency) || kr.Resident != slices.Contains(residency, "jp") {
			return fmt.Errorf("%s: residency %v, resident at jp: %v", name, kr.Residency, kr.Resident)
		}
	}
	return nil
}

func (s *story) create(ctx context.Context) error {
	for _, k := range [][]string{
		{"coalition/orders", "encrypt"}, {"coalition/seal", "sign", "--algorithm", "ecdsa-p384"}, {"coalition/tags", "mac"}, {"europe/plans", "encrypt"},
	} {
		var made wire.Key
		if err := s.write(ctx, "fr", &made, append([]string{"key", "create", k[0], "--purpose"}, k[1:]...)...); err != nil {
			return err
		}
		if err := want("the primary version of "+k[0], made.Primary, 1); err != nil {
			return err
		}
	}
	return nil
}

func (s *story) share(ctx context.Context) error {
	s.chapter("4. France encrypts, Japan decrypts",
		"A French service fetches a data key, encrypts a report with it on its own machine and",
		"forgets it; the wrapped data key travels with the report. A Japanese service has its own",
		"node unwrap it. Short messages can be encrypted by the node itself, bound to a context.")
	return s.checks(ctx,
		step{"a service at fr fetches a data key, plain and wrapped", s.dataKey},
		step{"it encrypts a report with it (AES-256-GCM, on its own machine)", func(context.Context) error { return s.sealReport() }},
		step{"jp unwraps the data key and reads the report", func(ctx context.Context) error { return s.openReport(ctx, "jp") }},
		step{"fr encrypts an order, bound to the context mission=falcon, unit=7", func(ctx context.Context) (err error) {
			s.order, err = s.conclave(ctx, "fr", append([]string{"encrypt", "coalition/orders", orderText}, orderContext...)...)
			return err
		}},
		step{"jp decrypts it under the same context", func(ctx context.Context) error { return s.readOrder(ctx, "jp", s.order) }},
		step{"another context is refused, and so is none", func(ctx context.Context) error {
			for _, c := range [][]string{{"--context", "mission=falcon", "--context", "unit=8"}, {"--context", "mission=falcon"}, nil} {
				if err := s.refused(ctx, s.c.Env("jp"), 6, []string{"cannot be opened"}, append([]string{"decrypt", "coalition/orders", s.order}, c...)...); err != nil {
					return err
				}
			}
			return nil
		}},
		step{"a ciphertext with one bit changed is refused in the same words", func(ctx context.Context) error {
			b, err := base64.StdEncoding.DecodeString(s.order)
			if err != nil {
				return err
			}
			b[len(b)-1] ^= 1
			changed := base64.StdEncoding.EncodeToString(b)
			return s.refused(ctx, s.c.Env("de"), 6, []string{"cannot be opened"}, append([]string{"decrypt", "coalition/orders", changed}, orderContext...)...)
		}},
	)
}

func (s *story) dataKey(ctx context.Context) error {
	var r wire.DataKeyResponse
	if err := s.read(ctx, "fr", &r, "datakey", "coalition/orders", "--context", "file=report"); err != nil {
		return err
	}
	s.wrapped, s.dataKeys = r.Wrapped, append(s.dataKeys, r.Plaintext)
	return want("the length of the data key", len(r.Plaintext), 32)
}

func gcm(key []byte) (cipher.AEAD, error) {
	b, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(b)
}

func (s *story) sealReport() error {
	s.report = []byte(strings.Repeat("Position and strength of all units.\n", 4000))
	aead, err := gcm(s.dataKeys[0])
	if err != nil {
		return err
	}
	nonce := make([]byte, aead.NonceSize())
	if _, err := rand.Read(nonce); err != nil {
		return err
	}
	return os.WriteFile(s.file("report.sealed"), aead.Seal(nonce, nonce, s.report, nil), 0o600)
}

// openReport knows the sealed report and the wrapped data key alone.
func (s *story) openReport(ctx context.Context, site string) error {
	key, err := s.conclave(ctx, site, "decrypt", "coalition/orders", base64.StdEncoding.EncodeToString(s.wrapped), "--context", "file=report", "-o", "json")
	if err != nil {
		return err
	}
	var r wire.DecryptResponse
	if err := (harness.Result{Stdout: key}).JSON(&r); err != nil {
		return err
	}
	aead, err := gcm(r.Plaintext)
	if err != nil {
		return err
	}
	sealed, err := os.ReadFile(s.file("report.sealed"))
	if err != nil {
		return err
	}
	report, err := aead.Open(nil, sealed[:aead.NonceSize()], sealed[aead.NonceSize():], nil)
	if err != nil {
		return err
	}
	if !bytes.Equal(report, s.report) {
		return fmt.Errorf("the report reads %d other bytes", len(report))
	}
	return nil
}

func (s *story) readOrder(ctx context.Context, site, ciphertext string) error {
	text, err := s.conclave(ctx, site, append([]string{"decrypt", "coalition/orders", ciphertext}, orderContext...)...)
	if err != nil {
		return err
	}
	return want("the order", text, orderText)
}

func (s *story) residency(ctx context.Context) error {
	s.chapter("5. What Japan cannot open",
		"Japan's node holds a replica of everything, europe's keys included, but only wrapped:",
		"no copy of europe's key-encryption key was ever sealed to Japan's TPM.")
	return s.checks(ctx,
		step{"fr encrypts with europe/plans, de decrypts", func(ctx context.Context) (err error) {
			if s.plan, err = s.conclave(ctx, "fr", "encrypt", "europe/plans", "the northern route"); err != nil {
				return err
			}
			text, err := s.conclave(ctx, "de", "decrypt", "europe/plans", s.plan)
			return all(err, want("the plan", text, "the northern route"))
		}},
		step{"a Japanese service has no right to europe", func(ctx context.Context) error {
			return s.refused(ctx, s.c.Env("jp"), 3, []string{"may not decrypt"}, "decrypt", "europe/plans", s.plan)
		}},
		step{"and Japan's node cannot open it for a French service either", func(ctx context.Context) error {
			return s.refused(ctx, s.c.EnvAs("jp", "fr"), 7, []string{"europe"}, "decrypt", "europe/plans", s.plan)
		}},
		step{"jp's node has the key on record, but holds nothing of it in the clear", s.onlyCiphertext},
	)
}

// onlyCiphertext looks for data keys and plaintexts in all that the nodes wrote.
func (s *story) onlyCiphertext(ctx context.Context) error {
	k, err := s.key(ctx, "jp", "europe/plans")
	if err != nil {
		return err
	}
	var r wire.DataKeyResponse
	if err := s.read(ctx, "fr", &r, "datakey", "europe/plans"); err != nil {
		return err
	}
	var sc harness.Scanner
	for i, secret := range append(s.dataKeys, r.Plaintext, []byte("the northern route"), []byte(orderText)) {
		if err := sc.Add(fmt.Sprintf("secret %d", i+1), secret); err != nil {
			return err
		}
	}
	var paths []string
	for _, n := range s.c.All() {
		paths = append(paths, n.Data, n.Log)
	}
	found, scanned, err := sc.Trees(paths...)
	if err != nil {
		return err
	}
	if len(found) > 0 {
		return fmt.Errorf("found %v", found)
	}
	if scanned.Files < 12 || scanned.Bytes < 10_000 {
		return fmt.Errorf("only %d files with %d bytes were there to look at", scanned.Files, scanned.Bytes)
	}
	return want("europe/plans at jp: primary version", k.Primary, 1)
}
