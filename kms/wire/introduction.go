package wire

// Introduction names the members of a cluster to a node that joins, whose log knows the
// founders alone. It lets them connect, no more: the node believes only the signed log that they
// send. An operator writes it as a file: conclave node introduce.
type Introduction struct {
	Format  uint8            `json:"format"` // 1
	Cluster string           `json:"cluster"`
	Epoch   uint64           `json:"epoch,omitempty"`   // of the history; 0 until the cluster was recovered
	Lineage string           `json:"lineage,omitempty"` // of that history, 32 hexadecimal digits; empty in epoch 0
	Nodes   []IntroducedNode `json:"nodes"`
	Sites   []IntroducedSite `json:"sites"`
}

// IntroducedNode says where a node listens for others.
type IntroducedNode struct {
	ID      string `json:"id"`
	Site    string `json:"site"`
	Address string `json:"address"` // host:port
}

// IntroducedSite says who signs for a site's nodes.
type IntroducedSite struct {
	ID          string   `json:"id"`
	TrustDomain string   `json:"trust_domain"`
	CAs         [][]byte `json:"cas"` // DER certificates
}
