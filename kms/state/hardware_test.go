package state_test

import (
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// vault is a cluster with a keyring of protection hardware at fr and de, and a key
// of each purpose, whose first versions all nodes have proven.
func vault(t testing.TB) *statetest.World {
	w := statetest.New(t, statetest.Options{})
	w.CreateHardwareKeyring("vault", "fr", "de")
	w.CreateKey("vault", "mail", kms.Encrypt)
	w.CreateKey("vault", "code", kms.MAC)
	w.CreateKey("vault", "seal", kms.Sign)
	w.GiveReceipts()
	return w
}

func vaultKey(name string) string { return approval.KeyTarget("vault", name) }

func TestHardwareKeyring(t *testing.T) {
	w := vault(t)
	s := w.State()
	if k, _ := s.Keyring("vault"); k.KEK != 0 || len(s.KEKs("vault")) != 0 || k.Protection != kms.Hardware {
		t.Errorf("keyring %+v", k)
	}
	for _, name := range []string{"mail", "code", "seal"} {
		v, _ := s.Version("vault", name, 1)
		if v.State != kms.Active || v.KEK != 0 || len(v.Wrapped) != 0 || len(v.Copies) != 2 || v.Generated != kms.InDevice || v.Copies[0].Root != 1 {
			t.Errorf("version 1 of %s: %+v", name, v)
		}
		if len(v.Receipts) != 2 || len(v.Checks) != map[string]int{"mail": 2, "code": 2}[name] || v.Activated != v.Created {
			t.Errorf("version 1 of %s: %d receipts, %d checks", name, len(v.Receipts), len(v.Checks))
		}
		w.Rotate("vault", name)
		if k, _ := w.State().Key("vault", name); k.Primary != 2 {
			t.Errorf("primary version %d of %s", k.Primary, name)
		}
	}
	v, _ := w.State().Version("vault", "seal", 2)
	if len(v.Checks) != 0 || len(v.Receipts) != 2 || len(v.Receipts[0].KCV) != 64 {
		t.Errorf("receipts of the sign key: %+v", v.Receipts)
	}
	if err := w.State().VerifyStatements(); err != nil {
		t.Error(err)
	}
}

// TestHardwareDestroyed leaves nothing of a version's material, and what is left
// verifies.
func TestHardwareDestroyed(t *testing.T) {
	w := vault(t)
	for _, name := range []string{"mail", "seal"} {
		w.Rotate("vault", name)
	}
	w.Replace("node-fr-1", false)
	w.Reseal("node-fr-1")
	for _, name := range []string{"mail", "seal"} {
		id := w.Propose(kms.ActionDestroy, vaultKey(name), approval.VersionParams{})
		w.ApproveAll(id)
		w.Advance(8 * 24 * time.Hour)
		w.Execute(id)
		for _, v := range w.State().Versions("vault", name) {
			if !v.State.Gone() || len(v.Copies) != 0 || len(v.Statement) != 0 || len(v.Erased) != 32 || v.Generated != kms.InDevice {
				t.Errorf("version %d of %s: %+v", v.Version, name, v)
			}
		}
	}
	if got := w.State().Resealed("node-fr-1"); got != 1 { // that of the key code
		t.Errorf("%d statements behind copies are left", got)
	}
	if got := w.State().Unsealed("node-fr-1"); len(got) != 0 {
		t.Errorf("destroyed versions are to be resealed: %v", got)
	}
	if err := w.State().VerifyStatements(); err != nil {
		t.Error(err)
	}
	restoreBoth(t, w.State())
}

func TestHardwareCreateRefused(t *testing.T) {
	w := vault(t)
	w.CreateKeyring("europe", "fr", "de")
	fr, op := "node-fr-1", statetest.As(w.Operator("fr"))
	ring := func(change func(*state.CreateKeyring)) []byte {
		c := w.HardwareKeyringCommand("new", "fr", "de")
		change(&c)
		return w.Command(fr, c, op)
	}
	key := func(keyring string, purpose kms.Purpose, change func(*state.CreateKey)) []byte {
		c := w.KeyCommand(keyring, "new", purpose)
		change(&c)
		return w.Command(fr, c, op)
	}
	soft := w.KeyringCommand("new", "fr", "de")
	copies := w.KeyCommand("vault", "x", kms.Encrypt).Copies
	for name, c := range map[string]struct {
		kind kms.Kind
		raw  []byte
	}{
		"keyring with copies":         {kms.Invalid, ring(func(c *state.CreateKeyring) { c.Copies = soft.Copies })},
		"keyring with checks":         {kms.Invalid, ring(func(c *state.CreateKeyring) { c.Checks = soft.Checks })},
		"software without copies":     {kms.Invalid, ring(func(c *state.CreateKeyring) { c.Protection = kms.Software })},
		"software with copies":        {kms.Invalid, key("europe", kms.MAC, func(c *state.CreateKey) { c.Copies = copies })},
		"software in hardware's form": {kms.Invalid, key("europe", kms.MAC, func(c *state.CreateKey) { *c = w.KeyCommand("vault", "new", kms.MAC); c.Keyring = "europe" })},
		"software with generated":     {kms.Invalid, key("europe", kms.MAC, func(c *state.CreateKey) { c.Generated = kms.InDevice })},
		"hardware in software's form": {kms.Invalid, key("vault", kms.MAC, func(c *state.CreateKey) { *c = w.KeyCommand("europe", "new", kms.MAC); c.Keyring = "vault" })},
		"hardware with wrapped":       {kms.Invalid, key("vault", kms.MAC, func(c *state.CreateKey) { c.Wrapped = []byte{1} })},
		"hardware with a KEK":         {kms.Invalid, key("vault", kms.MAC, func(c *state.CreateKey) { c.KEK = 1 })},
		"without generated":           {kms.Invalid, key("vault", kms.MAC, func(c *state.CreateKey) { c.Generated = "" })},
		"generated elsewhere":         {kms.Invalid, key("vault", kms.MAC, func(c *state.CreateKey) { c.Generated = "cloud" })},
		"no copies":                   {kms.Invalid, key("vault", kms.MAC, func(c *state.CreateKey) { c.Copies = nil })},
		"a copy missing":              {kms.Invalid, key("vault", kms.MAC, func(c *state.CreateKey) { c.Copies = c.Copies[1:] })},
		"a copy too many": {kms.Invalid, key("vault", kms.MAC, func(c *state.CreateKey) {
			c.Copies = append(c.Copies, state.SealedCopy{Node: "node-jp-1", Root: 1, Sealed: []byte{1}})
		})},
		"a copy twice":                 {kms.Invalid, key("vault", kms.MAC, func(c *state.CreateKey) { c.Copies = append(c.Copies, c.Copies[1]) })},
		"copies not sorted":            {kms.Invalid, key("vault", kms.MAC, func(c *state.CreateKey) { c.Copies[0], c.Copies[1] = c.Copies[1], c.Copies[0] })},
		"a copy for no root":           {kms.Invalid, key("vault", kms.MAC, func(c *state.CreateKey) { c.Copies[0].Root = 0 })},
		"a copy for another root":      {kms.Conflict, key("vault", kms.MAC, func(c *state.CreateKey) { c.Copies[0].Root = 2 })},
		"an empty copy":                {kms.Invalid, key("vault", kms.MAC, func(c *state.CreateKey) { c.Copies[0].Sealed = nil })},
		"a copy too long":              {kms.Invalid, key("vault", kms.MAC, func(c *state.CreateKey) { c.Copies[0].Sealed = make([]byte, state.MaxSealed+1) })},
		"no checks":                    {kms.Invalid, key("vault", kms.MAC, func(c *state.CreateKey) { c.Checks = nil })},
		"no checks, encrypt":           {kms.Invalid, key("vault", kms.Encrypt, func(c *state.CreateKey) { c.Checks = nil })},
		"a check missing":              {kms.Invalid, key("vault", kms.MAC, func(c *state.CreateKey) { c.Checks = c.Checks[:1] })},
		"a check for a stranger":       {kms.Invalid, key("vault", kms.MAC, func(c *state.CreateKey) { c.Checks[1].Node = "node-jp-1" })},
		"a check too many":             {kms.Invalid, key("vault", kms.MAC, func(c *state.CreateKey) { c.Checks = append(c.Checks, w.KeyringCommand("x", "jp").Checks...) })},
		"a check twice":                {kms.Invalid, key("vault", kms.MAC, func(c *state.CreateKey) { c.Checks = append(c.Checks, c.Checks[1]) })},
		"checks not sorted":            {kms.Invalid, key("vault", kms.MAC, func(c *state.CreateKey) { c.Checks[0], c.Checks[1] = c.Checks[1], c.Checks[0] })},
		"a check too short":            {kms.Invalid, key("vault", kms.MAC, func(c *state.CreateKey) { c.Checks[0].Hash = c.Checks[0].Hash[1:] })},
		"an empty check":               {kms.Invalid, key("vault", kms.Encrypt, func(c *state.CreateKey) { c.Checks[1].Hash = nil })},
		"a sign key with checks":       {kms.Invalid, key("vault", kms.Sign, func(c *state.CreateKey) { c.Checks = soft.Checks })},
		"software with checks":         {kms.Invalid, key("europe", kms.MAC, func(c *state.CreateKey) { c.Checks = soft.Checks })},
		"ed25519":                      {kms.Invalid, key("vault", kms.Sign, func(c *state.CreateKey) { c.Algorithm, c.PublicKey = kms.Ed25519, make([]byte, 32) })},
		"a sign key without public":    {kms.Invalid, key("vault", kms.Sign, func(c *state.CreateKey) { c.PublicKey = nil })},
		"a keyring's copy, other root": {kms.Conflict, w.Command(fr, func() state.CreateKeyring { c := w.KeyringCommand("new", "fr", "de"); c.Copies[0].Root = 7; return c }(), op)},
	} {
		t.Run(name, func(t *testing.T) { refused(t, w, c.kind, c.raw) })
	}
}

// TestHardwareNeedsImport refuses devices that take no keys, and a device's word
// that it wrapped its key for a device of another kind.
func TestHardwareNeedsImport(t *testing.T) {
	w := statetest.New(t, statetest.Options{Amend: func(n *state.Node) {
		switch n.Site {
		case "jp":
			n.ImportKind, n.Import = "", nil
		case "de":
			n.ImportKind = "another-kind"
		}
	}})
	op := statetest.As(w.Operator("fr"))
	refused(t, w, kms.Conflict, w.Command("node-fr-1", w.HardwareKeyringCommand("vault", "fr", "jp"), op))
	w.CreateHardwareKeyring("vault", "fr", "de")
	c := w.KeyCommand("vault", "mail", kms.Encrypt)
	refused(t, w, kms.Invalid, w.Command("node-fr-1", c, op))
	c.Generated = kms.OnHost
	w.Do("node-fr-1", c, op)
	id := w.Propose(kms.ActionRotate, vaultKey("mail"), nil)
	w.ApproveAll(id)
	commit := w.CommitCommand(id)
	refused(t, w, kms.Invalid, w.Command("node-de-1", commit, statetest.Expect(1)))
	commit.Generated = kms.OnHost
	w.Do("node-de-1", commit, statetest.Expect(1))
}

func TestHardwareCommitRefused(t *testing.T) {
	w := vault(t)
	w.CreateKeyring("europe", "fr", "de")
	w.CreateKey("europe", "mail", kms.Encrypt)
	soft := w.Propose(kms.ActionRotate, mail, nil)
	w.ApproveAll(soft)
	for _, name := range []string{"mail", "seal"} {
		id := w.Propose(kms.ActionRotate, vaultKey(name), nil)
		w.ApproveAll(id)
		good := w.CommitCommand(id)
		for what, c := range map[string]struct {
			kind   kms.Kind
			change func(*state.CommitRotation)
		}{
			"software's form": {kms.Invalid, func(c *state.CommitRotation) {
				s := w.CommitCommand(soft)
				c.KEK, c.Wrapped, c.Copies, c.Generated = s.KEK, s.Wrapped, nil, ""
				c.Checks = s.Checks
			}},
			"with wrapped":    {kms.Invalid, func(c *state.CommitRotation) { c.Wrapped = []byte{1} }},
			"a copy missing":  {kms.Invalid, func(c *state.CommitRotation) { c.Copies = c.Copies[:1] }},
			"another root":    {kms.Conflict, func(c *state.CommitRotation) { c.Copies[1].Root++ }},
			"generated":       {kms.Invalid, func(c *state.CommitRotation) { c.Generated = "" }},
			"other checks":    {kms.Invalid, func(c *state.CommitRotation) { c.Checks = otherChecks(w, c.Checks) }},
			"public key":      {kms.Invalid, func(c *state.CommitRotation) { c.PublicKey = []byte{4} }},
			"for the keyring": {kms.Conflict, func(c *state.CommitRotation) { c.Keyring = "europe"; c.Key = "mail" }},
		} {
			bad := good
			bad.Copies = append([]state.SealedCopy{}, good.Copies...)
			c.change(&bad)
			k, _ := w.State().Key("vault", name)
			t.Run(name+" "+what, func(t *testing.T) {
				refused(t, w, c.kind, w.Command("node-fr-1", bad, statetest.Expect(k.Revision)))
			})
		}
		w.Commit(id)
	}
	bad := w.CommitCommand(soft)
	bad.Generated = kms.InDevice
	refused(t, w, kms.Invalid, w.Command("node-fr-1", bad, statetest.Expect(1)))
}

// otherChecks returns no checks where there are some, and some where there are none.
func otherChecks(w *statetest.World, checks []state.Check) []state.Check {
	if len(checks) > 0 {
		return nil
	}
	return w.KeyringCommand("x", "fr", "de").Checks
}

// TestHardwareReceipts: the receipts of a sign key are signatures by the new
// version, for this node and version and no other.
func TestHardwareReceipts(t *testing.T) {
	w := vault(t)
	id := w.Propose(kms.ActionRotate, vaultKey("seal"), nil)
	w.ApproveAll(id)
	w.Commit(id)
	want := state.Pending{Keyring: "vault", Key: "seal", Version: 2}
	for _, n := range []string{"node-fr-1", "node-de-1"} {
		if got := w.State().Pending(n); len(got) != 1 || got[0] != want {
			t.Errorf("pending at %s: %v", n, got)
		}
	}
	give := func(node string, change func(*state.GiveReceipt)) []byte {
		c := w.ReceiptCommand(node, "vault", "seal", 2)
		change(&c)
		return w.Command(node, c)
	}
	order := []byte{ // of P-256
		0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
		0xbc, 0xe6, 0xfa, 0xad, 0xa7, 0x17, 0x9e, 0x84, 0xf3, 0xb9, 0xca, 0xc2, 0xfc, 0x63, 0x25, 0x51,
	}
	for _, change := range []func(*state.GiveReceipt){
		func(c *state.GiveReceipt) { c.KCV[7] ^= 1 },
		func(c *state.GiveReceipt) { c.KCV = c.KCV[:63] },
		func(c *state.GiveReceipt) { c.KCV = c.KCV[:32] },
		func(c *state.GiveReceipt) { c.KCV = append(c.KCV, 0) },
		func(c *state.GiveReceipt) { c.KCV = make([]byte, 64) },
		func(c *state.GiveReceipt) { copy(c.KCV[:32], order) },
		func(c *state.GiveReceipt) { copy(c.KCV[32:], order) },
		func(c *state.GiveReceipt) { c.KCV = w.ReceiptCommand("node-de-1", "vault", "seal", 2).KCV },
		func(c *state.GiveReceipt) { c.KCV = w.ReceiptCommand("node-fr-1", "vault", "seal", 3).KCV },
	} {
		refused(t, w, kms.BadSignature, give("node-fr-1", change))
	}
	refused(t, w, kms.Invalid, give("node-fr-1", func(c *state.GiveReceipt) { c.KCV = nil }))
	refused(t, w, kms.NotFound, give("node-fr-1", func(c *state.GiveReceipt) { c.Version = 3 }))
	refused(t, w, kms.BadSignature, give("node-fr-1", func(c *state.GiveReceipt) { c.Version = 1 })) // that of version 2
	refused(t, w, kms.Exists, w.Command(fr, w.ReceiptCommand(fr, "vault", "seal", 1)))
	refused(t, w, kms.NotResident, give("node-jp-1", func(*state.GiveReceipt) {}))
	w.Do("node-fr-1", w.ReceiptCommand("node-fr-1", "vault", "seal", 2))
	refused(t, w, kms.Exists, give("node-fr-1", func(*state.GiveReceipt) {}))
	w.GiveReceipts()
	if k, _ := w.State().Key("vault", "seal"); k.Primary != 2 {
		t.Errorf("primary version %d", k.Primary)
	}
	// A key that does not sign shows its check value, and nothing longer.
	id = w.Propose(kms.ActionRotate, vaultKey("mail"), nil)
	w.ApproveAll(id)
	w.Commit(id)
	c := w.ReceiptCommand("node-fr-1", "vault", "mail", 2)
	c.KCV = append(c.KCV, 0)
	refused(t, w, kms.Invalid, w.Command("node-fr-1", c))
}
