package e2e

import (
	"crypto/rand"
	"errors"
	"slices"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails: it ends the process instead
	return b
}

// TestOutsiderCannotOpenResidentKeyring gives jp's process the whole replicated
// state, from the disk of fr, and jp's real TPM: nothing of the keyring europe
// opens, while what was sealed to jp does.
func TestOutsiderCannotOpenResidentKeyring(t *testing.T) {
	s := site{t, cluster(t)}
	name := unique("residency")
	s.key("europe", name, kms.Encrypt, "")
	s.key("coalition", name, kms.Encrypt, "")
	secretText := "for fr and de alone"
	european := s.encrypt("fr", "europe", name, secretText)
	shared := s.encrypt("de", "coalition", name, "for all three")
	s.rotate("europe", name, 2)
	s.decrypts("de", "europe", name, european, secretText)

	// The API of jp's node has nothing to give, whoever asks.
	for _, from := range []string{"fr", "jp"} {
		cl, err := s.c.ClientAt("jp", from, "service")
		if err != nil {
			t.Fatal(err)
		}
		_, err = cl.Key("europe", name).Decrypt(t.Context(), wire.DecryptRequest{Ciphertext: european.Ciphertext})
		if !errors.Is(err, kms.NotResident) && !errors.Is(err, kms.Denied) {
			t.Errorf("a service of %s at jp: %v", from, err)
		}
	}

	jp := s.c.Nodes["jp"]
	size, _, err := s.c.SameLog(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := jp.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	r := replay(t, s.c, s.c.Nodes["fr"])
	if r.state.LogSize() < size {
		t.Fatalf("the log on fr's disk has %d entries of %d", r.state.LogSize(), size)
	}
	tpm := takeDevice(t, jp)

	coalition := opensOwn(t, tpm, r.state, name, shared)
	defer coalition.Destroy()
	opensNothing(t, tpm, r.state)
	// And no other secret of jp's unwraps europe's keys.
	europe, _ := r.state.Key("europe", name)
	for _, v := range r.state.Versions("europe", name) {
		for _, ring := range []string{"europe", "coalition"} {
			b := keyBinding(r.state, europe, v)
			b.Keyring = ring
			if got, err := keyring.UnwrapMaterial(coalition, b, v.Wrapped); err == nil {
				got.Destroy()
				t.Errorf("coalition's KEK unwrapped version %d of europe/%s", v.Version, name)
			}
		}
	}
	if n := len(r.state.Versions("europe", name)); n != 2 {
		t.Errorf("%d versions of europe/%s were tried", n, name)
	}
	tpm.close()
}

// opensOwn is the control: jp's TPM opens the copy of coalition's KEK that was
// sealed to jp, and with it the key and the ciphertext. It returns the KEK.
func opensOwn(t *testing.T, tpm *hardware, st *state.State, name string, shared wire.EncryptResponse) *secret.Bytes {
	t.Helper()
	keks := st.KEKs("coalition")
	if len(keks) == 0 {
		t.Fatal("coalition has no KEK")
	}
	coalition, err := tpm.open(t.Context(), st, "coalition", keks[len(keks)-1])
	if err != nil {
		t.Fatalf("jp's TPM does not open jp's own copy: %v", err)
	}
	key, _ := st.Key("coalition", name)
	version, _ := st.Version("coalition", name, 1)
	material, err := keyring.UnwrapMaterial(coalition, keyBinding(st, key, version), version.Wrapped)
	if err != nil {
		t.Fatal(err)
	}
	m, err := keyring.NewMaterial(keyBinding(st, key, version), material)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Destroy()
	if got, err := m.Decrypt(t.Context(), nil, shared.Ciphertext); err != nil || string(got) != "for all three" {
		t.Fatalf("jp cannot decrypt what is its own: %v", err)
	}

	return coalition
}

// opensNothing tries every copy of europe's KEK under every name that it might go
// by.
func opensNothing(t *testing.T, tpm *hardware, st *state.State) {
	t.Helper()
	attempts := 0
	for _, k := range st.KEKs("europe") {
		if slices.ContainsFunc(k.Copies, func(c state.SealedCopy) bool { return c.Node == "jp-1" }) {
			t.Fatalf("there is a copy of europe's KEK %d for jp", k.Version)
		}
		for _, c := range k.Copies {
			for _, ring := range []string{"europe", "coalition"} {
				for _, node := range []string{"fr-1", "de-1", "jp-1"} {
					attempts++
					kek, err := tpm.root.OpenKEK(t.Context(), binding(st, ring, k.Version, node), c.Sealed)
					if err == nil {
						kek.Destroy()
						t.Errorf("jp's TPM opened the copy for %s of europe's KEK %d", c.Node, k.Version)
					} else if !errors.Is(err, kms.OpenFailed) {
						t.Errorf("the copy for %s of europe's KEK %d was not tried to the end: %v", c.Node, k.Version, err)
					}
				}
			}
		}
	}
	if attempts < 12 {
		t.Errorf("only %d attempts were made", attempts)
	}
}
