package cluster

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io/fs"
	"os"
	"slices"

	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
)

// A node that starts applies its log only when the leader has said how much of it is
// committed. The leader may be a node, or hold a certificate of a CA, of which the
// state at the start knows nothing. So each node keeps who the members were.

// directoryFile keeps them: the canonical encoding of kept, then its SHA-256. A file
// that is damaged is as good as none.
const directoryFile = "members"

// kept are the members and sites after an entry of the log.
type kept struct {
	Index uint64     `cbor:"index"`
	Nodes []keptNode `cbor:"nodes"`
	Sites []keptSite `cbor:"sites"`
}

type keptNode struct {
	ID      string `cbor:"id"`
	Site    string `cbor:"site"`
	Address string `cbor:"address"`
}

type keptSite struct {
	ID          string   `cbor:"id"`
	TrustDomain string   `cbor:"trust-domain"`
	CAs         [][]byte `cbor:"cas"`
}

// keep returns what is kept of a state.
func keep(st *state.State) *kept {
	k := &kept{Index: st.Index()}
	for _, n := range st.Nodes() {
		k.Nodes = append(k.Nodes, keptNode{n.ID, n.Site, n.Address})
	}
	for _, s := range st.Sites() {
		k.Sites = append(k.Sites, keptSite{s.ID, s.TrustDomain, s.CAs})
	}
	return k
}

// same reports whether the members and sites are those of another time.
func (k *kept) same(o *kept) bool {
	a, b := *k, *o
	a.Index, b.Index = 0, 0
	return bytes.Equal(canon.Marshal(a), canon.Marshal(b))
}

func (k *kept) node(id string) (state.Node, bool) {
	i := slices.IndexFunc(k.Nodes, func(n keptNode) bool { return n.ID == id })
	if i < 0 {
		return state.Node{}, false
	}
	return state.Node{ID: id, Site: k.Nodes[i].Site, Address: k.Nodes[i].Address}, true
}

func (k *kept) site(id string) (state.Site, bool) {
	i := slices.IndexFunc(k.Sites, func(s keptSite) bool { return s.ID == id })
	if i < 0 {
		return state.Site{}, false
	}
	return state.Site{ID: id, TrustDomain: k.Sites[i].TrustDomain, CAs: k.Sites[i].CAs}, true
}

// loadKept returns what the last run has kept, nil for nothing.
func (n *Node) loadKept() *kept {
	b, err := os.ReadFile(n.dir.file(directoryFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	k := &kept{}
	if err == nil {
		err = k.decode(b)
	}
	if err != nil {
		n.cfg.Logger.Warn("cannot read who the members were; until the log says it, only those of the genesis can connect", "file", n.dir.file(directoryFile), "error", err)
		return nil
	}
	return k
}

func (k *kept) encode() []byte {
	b := canon.Marshal(k)
	sum := sha256.Sum256(b)
	return append(b, sum[:]...)
}

func (k *kept) decode(b []byte) error {
	body := b[:max(len(b)-sha256.Size, 0)]
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:], b[len(body):]) {
		return errors.New("the checksum does not fit")
	}
	return canon.Unmarshal(body, k)
}

// keepMembers stores who the members are, if that has changed.
func (n *Node) keepMembers() {
	st := n.State()
	if last := n.kept.Load(); last != nil && st.Index() <= last.Index {
		return
	}
	now := keep(st)
	if last := n.kept.Load(); last != nil && now.same(last) {
		return
	}
	if err := writeFile(n.dir.file(directoryFile), now.encode()); err != nil {
		n.cfg.Logger.Warn("cannot keep who the members are for the next start", "error", err)
		return
	}
	n.kept.Store(now)
}
