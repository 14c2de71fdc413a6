package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms"
)

// Certificates of the authority that swtpm_setup makes in its state directory: the
// vendor of jp's software TPM, and what lies between it and the endorsement key's.
const (
	devVendor  = "jp/swtpm/ca/swtpm-localca-rootca-cert.pem"
	devEKChain = "swtpm/ca/issuercert.pem" // relative to jp's configuration
)

// plan is the genesis plan of the development cluster.
func (d *dev) plan() genesisPlan {
	p := genesisPlan{Name: "development coalition", Custodians: devCustodians(), Vendors: []string{devVendor}}
	for _, s := range d.sites {
		p.Sites = append(p.Sites, sitePlan{ID: s.id, TrustDomain: s.trustDomain(), CA: "ca/" + s.id + ".pem"})
		node := nodePlan{Card: s.id + "/data/node.json", Voter: true}
		if s.device == "tpm" {
			node.Witness = s.id + "/witness.json"
		}
		p.Nodes = append(p.Nodes, node)
	}
	const week = 7 * 24 * time.Hour
	quorum := func(approvals, sites uint32, actions ...kms.Action) rulePlan {
		return rulePlan{Actions: names(actions), Approvals: approvals, Sites: sites, Lifetime: Duration{72 * time.Hour}}
	}
	destroy := quorum(3, 2, kms.ActionDestroy)
	destroy.Delay, destroy.Lifetime = Duration{week}, Duration{4 * week}
	p.Policies = []policyPlan{
		{Name: kms.Governance, Rules: []rulePlan{
			{Actions: names([]kms.Action{kms.ActionKeyring}), Direct: []string{"operator"}},
			quorum(3, 2, kms.ActionPolicy, kms.ActionCustodian, kms.ActionNode, kms.ActionSite, kms.ActionRecoveryKey, kms.ActionRecover),
		}},
		{Name: "keys", Rules: []rulePlan{
			{Actions: names([]kms.Action{kms.ActionCreate}), Direct: []string{"operator"}},
			quorum(2, 2, kms.ActionRotate, kms.ActionActivate, kms.ActionImport, kms.ActionResume, kms.ActionDeactivate, kms.ActionCompromise, kms.ActionSchedule),
			quorum(1, 1, kms.ActionSuspend),
			destroy,
		}},
	}
	return p
}

func names(actions []kms.Action) []string {
	out := make([]string, len(actions))
	for i, a := range actions {
		out[i] = string(a)
	}
	return out
}

// writeEnv writes DIR/env, which scripts and tests source.
func (d *dev) writeEnv(nodes *processes) (string, error) {
	var b strings.Builder
	set := func(name, value string) {
		fmt.Fprintf(&b, "export %s='%s'\n", name, strings.ReplaceAll(value, "'", `'\''`))
	}
	signed, err := readSignedGenesis(d.path("genesis.cbor"))
	if err != nil {
		return "", err
	}
	set("CONCLAVE_DIR", d.dir)
	set("CONCLAVE_CLUSTER", kms.ClusterID(signed.Genesis))
	set("CONCLAVE_ADDR", d.sites[0].url())
	set("CONCLAVE_CACERT", d.path("ca", "bundle.pem"))
	set("CONCLAVE_CLIENT_CERT", d.path("clients", "fr-service.crt"))
	set("CONCLAVE_CLIENT_KEY", d.path("clients", "fr-service.key"))
	set("CONCLAVE_ADMIN_CERT", d.path("clients", "fr-operator.crt"))
	set("CONCLAVE_ADMIN_KEY", d.path("clients", "fr-operator.key"))
	set("CONCLAVE_CUSTODIANS_DIR", d.path("custodians"))
	for _, s := range d.sites {
		upper := strings.ToUpper(s.id)
		set("CONCLAVE_ADDR_"+upper, s.url())
		set("CONCLAVE_PID_"+upper, fmt.Sprint(nodes.pid(s.id)))
		set("CONCLAVE_CLIENT_CERT_"+upper, d.path("clients", s.id+"-service.crt"))
		set("CONCLAVE_CLIENT_KEY_"+upper, d.path("clients", s.id+"-service.key"))
	}
	path := d.path("env")
	return path, replaceFile(path, []byte(b.String()), 0o600)
}
