package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"

	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

var sites = []string{"fr", "de", "jp"}

func (s *story) found(ctx context.Context) error {
	s.chapter("1. Three nations found a cluster",
		"France, Germany and Japan run one node each. France and Germany use an HSM (SoftHSM),",
		"Japan a TPM. Each device makes its own keys; they never leave it. All three nodes sign",
		"the founding document, and from then on every change is a signed entry in a shared log.")
	return s.checks(ctx,
		step{"three nodes at three sites start from nothing", func(ctx context.Context) (err error) {
			s.c, err = harness.Start(ctx, s.bin, s.file("c"), false)
			return err
		}},
		step{"every node is ready to serve", func(ctx context.Context) error { return s.c.Ready(ctx) }},
		step{"all three follow one leader and hold the same log", s.sameLog},
		step{"each nation's key lives in its own device: two HSM tokens and a TPM", s.devices},
	)
}

func (s *story) sameLog(ctx context.Context) error {
	if _, err := s.c.Leader(ctx); err != nil {
		return err
	}
	if _, _, err := s.c.SameLog(ctx); err != nil {
		return err
	}
	for _, site := range sites {
		var st wire.Status
		if err := s.read(ctx, site, &st, "status"); err != nil {
			return err
		}
		if err := all(want("the cluster", st.Cluster, s.c.Vars["CONCLAVE_CLUSTER"]), want("the site", st.Site, site)); err != nil {
			return err
		}
	}
	return nil
}

func (s *story) devices(ctx context.Context) error {
	var nodes []wire.Node
	if err := s.read(ctx, "fr", &nodes, "node", "list"); err != nil {
		return err
	}
	if err := want("the number of nodes", len(nodes), 3); err != nil {
		return err
	}
	for _, n := range nodes {
		kind := "PKCS#11"
		if n.Site == "jp" {
			kind = "TPM 2.0"
		}
		if !strings.Contains(n.Device, kind) {
			return fmt.Errorf("the device of %s is %q, not a %s", n.ID, n.Device, kind)
		}
		if err := want("the suite of "+n.ID, n.Suite, "MLKEM1024-P384"); err != nil {
			return err
		}
		s.say("        %s  %s", n.ID, n.Device)
	}
	return nil
}

func (s *story) connect(ctx context.Context) error {
	s.chapter("2. What crosses a border is protected against quantum computers",
		"Every connection is TLS 1.3 with certificates on both sides, and its key exchange joins a",
		"classical curve with ML-KEM: who records the traffic today cannot read it later.")
	return s.checks(ctx,
		step{"client and node agree on a hybrid post-quantum key exchange, at all three", s.hybridClient},
		step{"a node refuses a caller without a certificate", s.noCertificate},
		step{"nodes talk to one another with hybrid key exchange only", s.hybridNodes},
	)
}

func (s *story) clientTLS(site string) (*tls.Config, error) {
	cert, key := s.c.Certificate(site, "service")
	return client.LoadTLS(s.c.Vars["CONCLAVE_CACERT"], cert, key)
}

// dial makes a TLS connection and waits for the server's verdict, which in TLS
// 1.3 comes after the client's handshake is done.
func dial(ctx context.Context, address string, cfg *tls.Config) (tls.ConnectionState, error) {
	conn, err := (&tls.Dialer{Config: cfg}).DialContext(ctx, "tcp", address)
	if err != nil {
		return tls.ConnectionState{}, err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return tls.ConnectionState{}, err
		}
	}
	if _, err := fmt.Fprintf(conn, "GET /v1/health HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", address); err != nil {
		return tls.ConnectionState{}, err
	}
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		return tls.ConnectionState{}, err
	}
	return conn.(*tls.Conn).ConnectionState(), nil
}

func (s *story) hybridClient(ctx context.Context) error {
	for _, site := range sites {
		cfg, err := s.clientTLS(site)
		if err != nil {
			return err
		}
		cfg.CurvePreferences = nil // what Go offers by itself: classical groups too
		st, err := dial(ctx, strings.TrimPrefix(s.c.API(site), "https://"), cfg)
		if err != nil {
			return err
		}
		if st.Version != tls.VersionTLS13 || !hybrid(st.CurveID) {
			return fmt.Errorf("%s negotiated %s with %v", site, tls.VersionName(st.Version), st.CurveID)
		}
		s.say("        %s  %s, %v", site, tls.VersionName(st.Version), st.CurveID)
	}
	return nil
}

func hybrid(id tls.CurveID) bool {
	return id == tls.X25519MLKEM768 || id == tls.SecP384r1MLKEM1024 || id == tls.SecP256r1MLKEM768
}

func (s *story) noCertificate(ctx context.Context) error {
	cfg, err := s.clientTLS("fr")
	if err != nil {
		return err
	}
	cfg.Certificates = nil
	if _, err := dial(ctx, strings.TrimPrefix(s.c.API("fr"), "https://"), cfg); err == nil {
		return errors.New("the node answered")
	}
	return nil
}

// hybridNodes offers the nodes' own ports a classical key exchange and then a
// client's certificate: both must be refused.
func (s *story) hybridNodes(ctx context.Context) error {
	cl, err := s.c.Client("fr", "operator")
	if err != nil {
		return err
	}
	nodes, err := cl.Nodes(ctx)
	if err != nil {
		return err
	}
	for _, n := range nodes {
		cfg, err := s.clientTLS(n.Site)
		if err != nil {
			return err
		}
		cfg.InsecureSkipVerify = true // how the node treats us is what counts here
		cfg.NextProtos = []string{"conclave-raft/1"}
		cfg.CurvePreferences = []tls.CurveID{tls.X25519, tls.CurveP384}
		if _, err := dial(ctx, n.Address, cfg); err == nil || !strings.Contains(err.Error(), "handshake failure") {
			return fmt.Errorf("%s was offered classical key exchange only: %v", n.ID, err)
		}
		cfg.CurvePreferences = nil
		if _, err := dial(ctx, n.Address, cfg); err == nil {
			return fmt.Errorf("%s let a service in among the nodes", n.ID)
		}
	}
	return nil
}
