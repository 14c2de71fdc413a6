package child_test

import (
	"context"
	"testing"
)

func TestDevice(t *testing.T) {
	_, cfg := provisioned(t)
	d, log := open(t, cfg)
	ctx := context.Background()
	if err := d.Check(ctx); err != nil {
		t.Fatal(err)
	}
	blob, check := hmacKey(t, d)
	mac, unload, err := d.LoadHMAC(ctx, blob)
	if err != nil {
		t.Fatal(err)
	}
	if err := check(mac); err != nil {
		t.Error(err)
	}
	unload()
	if log.String() != "" {
		t.Errorf("logged: %s", log)
	}
}
