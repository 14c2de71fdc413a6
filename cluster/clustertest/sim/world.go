package sim

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/cluster/clustertest"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// world is a founded cluster: the keys of all its nodes and custodians. Schedules use
// one after the other.
type world struct {
	*statetest.World
	id    string
	ids   []string
	certs map[string]tls.Certificate
}

// Worlds are the clusters that schedules are played with.
type Worlds struct{ all []*world }

// New founds the clusters: three sites with a node each, and five.
func New(t testing.TB) *Worlds {
	t.Helper()
	return &Worlds{all: []*world{newWorld(t, "de", "fr", "jp"), newWorld(t, "ca", "de", "fr", "jp", "uk")}}
}

func newWorld(t testing.TB, sites ...string) *world {
	t.Helper()
	w := &world{World: statetest.New(t, statetest.Options{Sites: sites, Policies: policies()}), certs: map[string]tls.Certificate{}}
	w.id = kms.ClusterID(w.Signed().Genesis)
	for _, n := range w.Genesis().Nodes {
		w.ids = append(w.ids, n.ID)
		w.certs[n.ID] = w.issue(t, n)
	}
	return w
}

// issue makes a node's certificate. Nothing connects with it, but a node does not
// start without.
func (w *world) issue(t testing.TB, n state.Node) tls.Certificate {
	t.Helper()
	ca, key := w.CA(n.Site), w.Node(n.ID).Key
	uri, err := url.Parse(clustertest.NodeURI(n.Site, n.ID))
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: ca.Certificate.NotBefore, NotAfter: ca.Certificate.NotAfter, URIs: []*url.URL{uri},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}, ca.Certificate, &key.PublicKey, ca.Key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// policies differ from statetest's in that a rotation takes more custodians than sites:
// a custodian who counted twice would make a quorum.
func policies() []approval.Policy {
	l := statetest.Policies(3)
	for i := range l {
		for j := range l[i].Rules {
			if r := &l[i].Rules[j]; r.Action == kms.ActionRotate || r.Action == kms.ActionResume {
				r.Approvals, r.Sites = need(r.Action)
				r.Lifetime = (2 * time.Minute).Milliseconds()
			}
		}
	}
	return l
}

// need returns the custodians and sites that an action takes, for the policies and,
// apart from them, for the check.
func need(a kms.Action) (custodians, sites uint32) {
	switch a {
	case kms.ActionRotate:
		return 3, 2
	case kms.ActionResume:
		return 2, 1
	case kms.ActionSuspend:
		return 1, 1
	}
	return 2, 2
}
