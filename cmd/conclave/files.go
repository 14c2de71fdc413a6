package main

import (
	"errors"
	"os"

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
