// Package notify tells people's systems what asks for people: proposals that wait for
// custodians, alarms, anomalies. What is to be told is kept in an outbox on the disk, once
// for each thing, and posted to webhooks, signed, until they take it. It never makes
// anything else wait.
package notify

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// The kinds of notices that are of no alarm.
const (
	KindProposal = "proposal" // it waits for approvals
	KindAnomaly  = "anomaly"  // something unusual in an access log
)

// Kinds are those of all notices.
func Kinds() []string {
	return []string{KindProposal, KindAnomaly, wire.AlarmOverdue, wire.AlarmRotateKEK, wire.AlarmNode, wire.AlarmCertificate, wire.AlarmSuspicion, wire.AlarmAudit}
}

// Notice is one thing that somebody should know. Nodes that see the same thing give it
// the same ID.
type Notice struct {
	ID      string    `json:"id"`
	Kind    string    `json:"kind"`
	Cluster string    `json:"cluster"`
	Node    string    `json:"node"` // that says so
	Time    time.Time `json:"time"` // when it began
	Subject string    `json:"subject"`
	Text    string    `json:"text"` // a sentence

	Proposal string     `json:"proposal,omitempty"`
	Index    uint64     `json:"index,omitempty"` // of the proposal in the cluster's log
	Expires  *time.Time `json:"expires,omitempty"`
}

// messageID is the notice's identifier on its way: the same at every node, without a
// character that has a meaning in what is signed.
func (n Notice) messageID() string {
	h := sha256.Sum256([]byte(n.Cluster + "\x00" + n.ID))
	return "msg_" + hex.EncodeToString(h[:16])
}

// Of returns what is to be told of a state and of the alarms that are on: every proposal that
// waits for approvals, if the state is a present one, and every alarm. What was told before is
// among it.
func Of(st *state.State, node string, alarms []wire.Alarm, present bool) (l []Notice) {
	var open []state.Proposal
	if present {
		open = st.ProposalsOpen()
	}
	for _, p := range open {
		d, progress, ok := st.Decision(p.ID)
		if !ok || progress != string(state.Open) {
			continue
		}
		expires := time.UnixMilli(p.Content.Expires).UTC()
		text := fmt.Sprintf("%s proposes to %s %s: %q", p.Content.Proposer, p.Content.Action, p.Content.Target, p.Content.Reason)
		if len(d.Missing) > 0 {
			text += "; missing: " + strings.Join(d.Missing, ", ")
		}
		l = append(l, Notice{
			ID: KindProposal + ":" + p.ID, Kind: KindProposal, Cluster: st.Cluster(), Node: node, Time: time.UnixMilli(p.Opened).UTC(), Subject: p.Content.Target,
			Text: text, Proposal: p.ID, Index: p.Index, Expires: &expires,
		})
	}
	for _, a := range alarms {
		l = append(l, Notice{ID: "alarm:" + a.ID, Kind: a.Kind, Cluster: st.Cluster(), Node: node, Time: a.Since, Subject: a.Subject, Text: a.Text})
	}
	return l
}
