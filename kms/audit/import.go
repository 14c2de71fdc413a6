package audit

import (
	"maps"
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
)

// belongs reports whether a decision belongs to the evidence for p besides p itself: it
// governs, or made the key that p is about of material from outside. With a version's
// destruction the command that brought it is erased.
func belongs(x, p state.Proposal) bool {
	if x.Content.Action == kms.ActionImport {
		return x.Content.Target == p.Content.Target && len(x.Execution) > 0
	}
	return governs(x)
}

// importKey takes note of a decision by which a key was imported.
func (w *replay) importKey(name string, d decided) error {
	params, err := d.content.ImportParams()
	if err != nil {
		return err
	}
	if _, again := w.imports[name]; again {
		return refuse(kms.Exists, nil, "key %s was imported already", name)
	}
	if made := d.imported.Key; d.content.Target != approval.KeyTarget(made.Keyring, made.Name) {
		return refuse(kms.Invalid, nil, "the execution of proposal %s makes key %s", d.id, kms.KeyPath(made.Keyring, made.Name))
	}
	if err := d.imported.Asked(d.execution.Origin, params); err != nil {
		return refuse(kms.KindOf(err), err, "the execution of proposal %s: %v", d.id, err)
	}
	w.imports[name] = d
	return nil
}

// noStrayImport refuses evidence with the import of a key that it is not about.
func (w *replay) noStrayImport() error {
	if len(w.imports) == 0 {
		return nil
	}
	return refuse(kms.Invalid, nil, "the evidence holds the import of %s, which nothing in it belongs to", list(slices.Sorted(maps.Keys(w.imports))))
}

// verifyImported verifies the key that a decision made of material from outside: out
// itself, or one before it.
func (w *replay) verifyImported(e Evidence, ring state.CreateKeyring, created signed, d, out decided, r *Report) (state.CreateKey, error) {
	key := d.imported.Key
	path := kms.KeyPath(key.Keyring, key.Name)
	delete(w.imports, path)
	what := "the import of key " + path
	hardware := ring.Protection == kms.Hardware
	switch {
	case len(e.Key) != 0 || len(e.KeyID) != 0:
		return key, refuse(kms.Invalid, nil, "the evidence holds a creation or identifier of key %s besides its import", path)
	case d.content.Policy != ring.Policy:
		return key, refuse(kms.Conflict, nil, "keyring %s is under policy %s, %s was decided under %s", ring.Name, ring.Policy, what, d.content.Policy)
	case hardware != (len(key.Copies) > 0):
		return key, refuse(kms.Invalid, nil, "%s has not the form of protection %s", what, ring.Protection)
	case hardware && key.Purpose != kms.Sign && !w.wereResident(ring.Residency, key.Checks):
		return key, refuse(kms.Invalid, nil, "%s does not ask exactly the resident nodes for receipts", what)
	}
	if err := w.inOrder(what, created, d.open); err != nil {
		return key, err
	}
	if d.id != out.id {
		if err := w.inOrder("the opening of proposal "+out.id, d.execution, out.open); err != nil {
			return key, err
		}
	}
	if err := w.residentOrigin(what, d.execution, ring); err != nil {
		return key, err
	}
	params, err := d.content.ImportParams()
	if err != nil {
		return key, err
	}
	r.passed("Key %s has the identifier %x and the algorithm %s; node %s made it of material from outside (sealed to it, SHA-256 %x), as proposal %s asked.",
		path, key.ID, key.Algorithm, d.execution.Origin, params.Sealed, d.id)
	if key.Purpose != kms.Sign { // the public key stands in the proposal
		r.Notes = append(r.Notes, "That the material of key "+path+" is what was sealed for its import is the word of node "+d.execution.Origin+".")
	}
	return key, nil
}
