package engine

import (
	"fmt"
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// rotationView says where the rotation of a keyring's KEK stands, nil where none is
// under way, proposed or wanted.
func rotationView(st *state.State, kr state.Keyring) *wire.KEKRotation {
	if kr.KEK == 0 {
		return nil
	}
	var open []string
	for _, p := range st.ProposalsOpen() {
		if p.Content.Target == approval.KeyringTarget(kr.Name) && p.Content.Action == kms.ActionRotate {
			open = append(open, p.ID)
		}
	}
	gone, wanted := st.RotationWanted(kr.Name)
	p, under := st.KEKProgress(kr.Name)
	if !under {
		switch {
		case len(open) > 0:
			return &wire.KEKRotation{Target: kr.KEK, Live: []uint32{kr.KEK}, Proposals: open, Note: "a rotation is proposed"}
		case wanted:
			return &wire.KEKRotation{Target: kr.KEK, Live: []uint32{kr.KEK},
				Note: "node " + gone + " was removed and could open the KEK: rotate it (conclave keyring rotate " + kr.Name + ")"}
		}
		return nil
	}
	v := &wire.KEKRotation{
		Target: p.Target, Versions: p.Versions, Done: p.Done, Rewrapped: p.Rewrapped, Left: p.Versions - p.Done - p.Rewrapped,
		Live: p.Live, Awaits: p.Awaits, Proposals: open,
	}
	newest, _ := st.NewestKEK(kr.Name)
	for _, c := range newest.Checks {
		n, ok := st.Node(c.Node)
		if !ok {
			continue // removed since
		}
		v.Receipts = append(v.Receipts, wire.Receipt{Node: n.ID, Site: n.Site,
			Received: slices.ContainsFunc(newest.Receipts, func(r state.Receipt) bool { return r.Node == n.ID })})
	}
	for _, x := range p.Refused {
		v.Refused = append(v.Refused, wire.RefusedRewrap{KEK: x.KEK, Rewrapped: x.By, Refused: x.Node, Key: x.Key, Version: x.Version, Time: at(x.Time)})
	}
	v.Note = rotationNote(st, kr, p, v)
	return v
}

// rotationNote says what a rotation waits for.
func rotationNote(st *state.State, kr state.Keyring, p state.KEKProgress, v *wire.KEKRotation) string {
	able := slices.ContainsFunc(st.ResidentNodes(kr.Name), func(n state.Node) bool { return st.MayRewrap(kr.Name, n.ID) })
	var waits []string
	if p.Target != p.Primary {
		waits = append(waits, fmt.Sprintf("KEK version %d waits for receipts of %s", p.Target, strings.Join(missingReceipts(v), ", ")))
	}
	switch {
	case v.Left > 0 && !able:
		waits = append(waits, "every node has been refused by another one: see what was refused, remove the node at fault or propose another rotation")
	case v.Left > 0:
		waits = append(waits, count(v.Left, "key version")+" to be rewrapped")
	}
	if v.Rewrapped > 0 {
		waits = append(waits, fmt.Sprintf("%s to be confirmed by %s", count(v.Rewrapped, "rewrapped key version"), strings.Join(v.Awaits, ", ")))
	}
	if len(waits) == 0 {
		return "old KEK versions are about to be retired"
	}
	return strings.Join(waits, "; ")
}

func missingReceipts(v *wire.KEKRotation) (nodes []string) {
	for _, r := range v.Receipts {
		if !r.Received {
			nodes = append(nodes, r.Node)
		}
	}
	return nodes
}
