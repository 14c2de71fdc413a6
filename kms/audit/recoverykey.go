package audit

import "github.com/conclave-kms/conclave/kms"

// setRecoveryKey checks what a decision for a recovery key rests on: that the holders of
// shares were custodians then, who had signed for the keys that the shares are sealed
// to. It changes nothing that later decisions depend on.
func (w *replay) setRecoveryKey(d decided) error {
	p, err := d.content.RecoveryParams()
	if err != nil {
		return err
	}
	if err := w.policies[kms.Governance].Allow(p.Suite, "the recovery key"); err != nil {
		return err
	}
	for _, h := range p.Holders {
		c, ok := w.custodian(h.Custodian)
		if !ok {
			return refuse(kms.Denied, nil, "there was no custodian %q when proposal %s was carried out", h.Custodian, d.id)
		}
		if err := h.VerifyCard(w.cluster, c); err != nil {
			return err
		}
	}
	return nil
}
