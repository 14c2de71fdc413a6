package tpm

import (
	"slices"

	"github.com/google/go-tpm/tpm2"
)

// pcrCount is the number of platform configuration registers in a TPM for a PC
// (PC Client Platform TPM Profile).
const pcrCount = 24

// selectPCRs selects registers of the SHA-256 bank.
func selectPCRs(pcrs []int) tpm2.TPMLPCRSelection {
	u := make([]uint, len(pcrs))
	for i, p := range pcrs {
		u[i] = uint(p)
	}
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
		{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(u...)},
	}}
}

// selected lists the registers of the SHA-256 bank in a selection, ascending.
func selected(l tpm2.TPMLPCRSelection) []int {
	var out []int
	for _, s := range l.PCRSelections {
		if s.Hash != tpm2.TPMAlgSHA256 {
			continue
		}
		for i := range 8 * len(s.PCRSelect) {
			if s.PCRSelect[i/8]&(1<<(i%8)) != 0 {
				out = append(out, i)
			}
		}
	}
	return out
}

// readPCRs reads registers of the SHA-256 bank. One answer holds eight at most. A
// TPM that does not keep that bank gives none.
func (c *conn) readPCRs(pcrs []int) (map[int][]byte, error) {
	values, left := map[int][]byte{}, slices.Clone(pcrs)
	for len(left) > 0 {
		rsp, err := (tpm2.PCRRead{PCRSelectionIn: selectPCRs(left)}).Execute(c)
		if err != nil {
			return nil, err
		}
		got := selected(rsp.PCRSelectionOut)
		if len(got) != len(rsp.PCRValues.Digests) {
			return nil, unavailable("the TPM returned %d values of %d registers", len(rsp.PCRValues.Digests), len(got))
		}
		if len(got) == 0 {
			return values, nil
		}
		for i, p := range got {
			at := slices.Index(left, p)
			if at < 0 || len(rsp.PCRValues.Digests[i].Buffer) != 32 {
				return nil, unavailable("the TPM returned another register than asked for")
			}
			values[p] = rsp.PCRValues.Digests[i].Buffer
			left = slices.Delete(left, at, at+1)
		}
	}
	return values, nil
}

// pcrDigest is the digest over values in the order of their registers (Part 1,
// 17.5).
func (s *suite) pcrDigest(values map[int][]byte) []byte {
	var parts [][]byte
	for p := range pcrCount {
		if v, ok := values[p]; ok {
			parts = append(parts, v)
		}
	}
	return s.sum(parts...)
}
