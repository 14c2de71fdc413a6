package chaos

import (
	"fmt"
	"slices"
)

// last is the client that reads everything in the end.
const last = -1

// lost returns the acknowledged writes that are gone in the end: keys and proposals that are not
// there, votes that the proposal does not show, and how many writes were acknowledged. The
// checker finds them too; this says so in plain words.
func lost(ops []Op) (gone []string, acknowledged int) {
	final := map[string]Op{} // by key or proposal
	for _, o := range ops {
		switch {
		case o.Client != last:
		case o.Kind == ReadKey:
			final[o.Key] = o
		case o.Kind == ReadProposal:
			final[o.ID] = o
		}
	}
	for _, o := range ops {
		if o.Outcome != OK || !slices.Contains([]Kind{CreateKey, OpenProposal, Vote}, o.Kind) {
			continue
		}
		acknowledged++
		id := o.ID
		if o.Kind == CreateKey {
			id = o.Key
		}
		end, read := final[id]
		switch {
		case !read:
			gone = append(gone, fmt.Sprintf("%v of %s: nobody has read it in the end", o, o.Key))
		case end.Outcome != OK:
			gone = append(gone, fmt.Sprintf("%v of %s: it is gone in the end", o, o.Key))
		case o.Kind == Vote && end.Votes[o.Custodian] != o.Verdict && end.Votes[o.Custodian] != reject: // an approval may be taken back
			gone = append(gone, fmt.Sprintf("%v of %s: the vote is gone in the end", o, o.Key))
		}
	}
	return gone, acknowledged
}
