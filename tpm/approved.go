package tpm

import (
	"bytes"
	"slices"
)

// The content of the values index, version 1, filled up with zeros:
//
//	version byte 1
//	3 bytes       the registers, as TPMS_PCR_SELECTION selects them
//	count byte    1 to 4 sets of values
//	for each set  the digest over its values (the suite's hash), and of each value
//	              the first 8 bytes, to say which register differs
const (
	approvedVersion = 1
	approvedLen     = nvChunk
	approvedHeader  = 5
	approvedPrefix  = 8
	maxApproved     = 4
	pcrLen          = 32 // SHA-256 bank
)

// approved is what the registers may hold.
type approved struct {
	pcrs []int
	sets []approvedSet
}

type approvedSet struct {
	digest   []byte
	prefixes [][]byte // one for each register
}

// approve makes the record of sets of values, and leaves out repeated ones.
func (s *suite) approve(pcrs []int, values []map[int][]byte) (*approved, error) {
	a := &approved{pcrs: pcrs}
	for _, v := range values {
		if len(v) != len(pcrs) {
			return nil, invalid("a set has %d values, there are %d PCRs: %s", len(v), len(pcrs), listPCRs(pcrs))
		}
		var set approvedSet
		for _, p := range pcrs {
			if len(v[p]) != pcrLen {
				return nil, invalid("a set has %d bytes for PCR %d, want %d", len(v[p]), p, pcrLen)
			}
			set.prefixes = append(set.prefixes, v[p][:approvedPrefix])
		}
		set.digest = s.pcrDigest(v)
		if !slices.ContainsFunc(a.sets, func(o approvedSet) bool { return bytes.Equal(o.digest, set.digest) }) {
			a.sets = append(a.sets, set)
		}
	}
	if most := min(maxApproved, (approvedLen-approvedHeader)/s.setLen(len(pcrs))); len(a.sets) > most {
		return nil, invalid("%d sets of values for %d PCRs; the TPM keeps %d", len(a.sets), len(pcrs), most)
	}
	return a, nil
}

func (s *suite) setLen(pcrs int) int { return s.digest + pcrs*approvedPrefix }

func (a *approved) encode() []byte {
	out := append([]byte{approvedVersion}, selectPCRs(a.pcrs).PCRSelections[0].PCRSelect...)
	out = append(out, byte(len(a.sets)))
	for _, set := range a.sets {
		out = append(append(out, set.digest...), slices.Concat(set.prefixes...)...)
	}
	return append(out, make([]byte, approvedLen-len(out))...)
}

// parseApproved is the inverse of encode and accepts nothing else.
func (s *suite) parseApproved(b []byte) (*approved, bool) {
	if len(b) != approvedLen || b[0] != approvedVersion {
		return nil, false
	}
	a := &approved{}
	for p := range pcrCount {
		if b[1+p/8]&(1<<(p%8)) != 0 {
			a.pcrs = append(a.pcrs, p)
		}
	}
	count, rest := int(b[4]), b[approvedHeader:]
	if len(a.pcrs) == 0 || count < 1 || count > maxApproved || count*s.setLen(len(a.pcrs)) > len(rest) {
		return nil, false
	}
	for range count {
		set := approvedSet{digest: bytes.Clone(rest[:s.digest])}
		rest = rest[s.digest:]
		for range a.pcrs {
			set.prefixes = append(set.prefixes, bytes.Clone(rest[:approvedPrefix]))
			rest = rest[approvedPrefix:]
		}
		a.sets = append(a.sets, set)
	}
	return a, bytes.Equal(rest, make([]byte, len(rest)))
}

// changed lists the registers that differ from the set to which the values are
// nearest.
func (a *approved) changed(values map[int][]byte) []int {
	var best []int
	for n, set := range a.sets {
		var diff []int
		for i, p := range a.pcrs {
			if !bytes.HasPrefix(values[p], set.prefixes[i]) {
				diff = append(diff, p)
			}
		}
		if n == 0 || len(diff) < len(best) {
			best = diff
		}
	}
	return best
}
