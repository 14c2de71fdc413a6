package hsmtest

import (
	"context"
	"testing"
)

func TestTwoTokensInOneProcess(t *testing.T) {
	a, b := Device(t), Device(t)
	if a.AgreementKey().Equal(b.AgreementKey()) {
		t.Fatal("two tokens have one key")
	}
	blob, err := a.Wrap(context.Background(), nil, []byte("key"))
	if err != nil {
		t.Fatal(err)
	}
	if k, err := b.Unwrap(context.Background(), nil, blob); err == nil {
		k.Destroy()
		t.Fatal("a token opened another token's blob")
	}
	t.Log(a.Describe())
}
