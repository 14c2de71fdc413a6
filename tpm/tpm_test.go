package tpm_test

import (
	"context"
	"testing"

	"github.com/conclave-kms/conclave/tpm/tpmtest"
)

func TestOpenSmoke(t *testing.T) {
	p := tpmtest.New(t)
	d := p.Open(p.Config())
	t.Log(d.Describe())
	if err := d.Check(context.Background()); err != nil {
		t.Fatal(err)
	}
}
