package native

import (
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
)

// TestHardwareIsRefusedAsProblem asks for a key of protection hardware for devices
// that this node cannot wrap for.
func TestHardwareIsRefusedAsProblem(t *testing.T) {
	w := newWorld(t, options{})
	admin := w.client("operator")
	q := wire.CreateKeyringRequest{Name: "hard", Residency: []string{"de", "fr"}, Policy: "standard", Protection: "hardware"}
	var kr wire.Keyring
	w.call(admin, "POST", "/v1/keyrings", q).ok(&kr)
	if kr.Protection != "hardware" || kr.KEK != 0 {
		t.Errorf("keyring %+v", kr)
	}
	p := w.call(admin, "POST", "/v1/keyrings/hard/keys", wire.CreateKeyRequest{Name: "k", Purpose: "encrypt"}).problem(kms.Invalid, http.StatusBadRequest)
	if !strings.Contains(p.Detail, "node-de-1") || p.Fix == "" {
		t.Errorf("%+v", p)
	}
	p = w.call(admin, "POST", "/v1/keyrings/hard/keys", wire.CreateKeyRequest{Name: "k", Purpose: "sign", Algorithm: "ed25519"}).problem(kms.Invalid, http.StatusBadRequest)
	if !strings.Contains(p.Fix, "ecdsa") {
		t.Errorf("%+v", p)
	}
	q.Protection = "steel"
	q.Name = "other"
	if p := w.call(admin, "POST", "/v1/keyrings", q).problem(kms.Invalid, http.StatusBadRequest); !strings.Contains(p.Detail, "hardware") {
		t.Errorf("%+v", p)
	}
}

// TestHardwareIsShown looks at what the API says of levels and roots.
func TestHardwareIsShown(t *testing.T) {
	w := newWorld(t, options{})
	w.found()
	admin := w.client("operator")
	var nodes wire.Nodes
	w.call(admin, "GET", "/v1/nodes", nil).ok(&nodes)
	for _, n := range nodes.Nodes {
		if n.Root != 1 || !slices.Equal(n.Protections, []string{"software", "hardware"}) || n.ImportKind == "" || n.Attested || len(n.Claimed) == 0 || n.Replacing != nil {
			t.Errorf("node %s: root %d, protections %v, import kind %q, attested %v, claimed %q", n.ID, n.Root, n.Protections, n.ImportKind, n.Attested, n.Claimed)
		}
	}
	var key wire.Key
	w.call(admin, "GET", "/v1/keyrings/ring/keys/enc", nil).ok(&key)
	if key.Protection != "software" || key.Versions[0].Generated != "" || key.Versions[0].KEK != 1 {
		t.Errorf("key %+v", key)
	}
	var policies wire.Policies
	w.call(admin, "GET", "/v1/policies", nil).ok(&policies)
	for _, p := range policies.Policies {
		if p.Attested {
			t.Errorf("policy %+v", p)
		}
	}
}
