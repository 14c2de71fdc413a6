package main

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/conclave-kms/conclave/kms"
)

// create writes a file that must not exist yet.
func create(path string, b []byte, mode os.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if errors.Is(err, os.ErrExist) {
		return exists(path, err)
	}
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(path)) // half a file is of no use
	}
	return nil
}

func exists(path string, cause error) error {
	return kms.Wrap(kms.Exists, cause, path+" exists already and is not replaced", "choose another name")
}

// readPEM returns the certificates of a PEM file, DER.
func readPEM(path string) ([][]byte, error) {
	rest, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var ders [][]byte
	for {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		if b.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s holds a %s, not certificates alone", path, b.Type)
		}
		ders = append(ders, b.Bytes)
	}
	if len(ders) == 0 {
		return nil, fmt.Errorf("%s holds no PEM certificate", path)
	}
	return ders, nil
}

// certificateName is a certificate's subject, end and fingerprint, for people.
func certificateName(der []byte) (string, error) {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s, until %s, SHA-256 %x", c.Subject, c.NotAfter.UTC().Format(time.DateOnly), sha256.Sum256(der)), nil
}

// replace writes a file so that after a crash either the old or the new content is
// there, whole. What it writes is for this user alone unless the file was there
// with another mode.
func replace(path string, b []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".tmp-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name()) // a no-op after the rename
	if old, serr := os.Stat(path); serr == nil {
		err = tmp.Chmod(old.Mode().Perm())
	}
	if err == nil {
		_, err = tmp.Write(b)
	}
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}
