"""What signed things look like: the structures of kms/audit/EVIDENCE.md with the
checks of their shape, which need nothing but the thing itself."""

import ipaddress
import re
import unicodedata
from urllib.parse import urlsplit

from cryptography import x509

import signatures
from canon import Refused, Struct, array, boolean, data, int64, text, uint

GOVERNANCE = "governance"
KEY_ACTIONS = ["create", "rotate", "activate", "suspend", "resume", "deactivate", "compromise", "destroy", "import", "schedule"]
GOVERNANCE_ACTIONS = ["keyring", "policy", "custodian", "node", "site", "recovery-key", "recover"]
LATER_ACTIONS = ["activate", "import", "schedule", "site", "recovery-key", "recover"]
ROLES = ["auditor", "custodian", "node", "operator", "service"]
QUORUM_ONLY = ["policy", "custodian", "node", "site", "recovery-key", "recover"]
MAX_TIME = 253402300799999
DAY = 24 * 3600 * 1000
KEM_MAX = 4 << 10
ALGORITHMS = {"encrypt": ["aes256-gcm"], "mac": ["hmac-sha256"], "sign": ["ecdsa-p256", "ecdsa-p384", "ed25519"]}

WEIGHT = Struct({"name": text, "weight": uint(32)})
SITE_WEIGHT = Struct({"name": text, "weight": uint(32), "approvals": uint(32)})
GROUP = Struct({
    "need": uint(32), "weight": uint(32), "custodians": array(WEIGHT), "sites": array(SITE_WEIGHT),
    "groups": array(lambda v: GROUP(v)),
}, {"weight": 0, "custodians": [], "sites": [], "groups": []})
RULE = Struct({
    "action": text, "direct": array(text), "approvals": uint(32), "sites": uint(32), "required": array(text),
    "proposer-may-approve": boolean, "delay": int64, "lifetime": int64, "veto": array(text),
    "need": GROUP, "not-before": int64, "unused": int64,
}, {"need": None, "not-before": 0, "unused": 0})
POLICY = Struct({"name": text, "revision": uint(64), "rules": array(RULE), "attested": boolean, "forbid": array(uint(16))}, {"forbid": []})
CREDENTIAL = Struct({"id": text, "suite": uint(16), "public-key": data, "suspended": boolean}, {"suspended": False})
CUSTODIAN = Struct({"id": text, "site": text, "credentials": array(CREDENTIAL), "revoked": boolean, "revision": uint(64)})
PROPOSAL = Struct({
    "format": uint(8), "cluster": text, "nonce": data, "action": text, "target": text, "revision": uint(64), "policy": text,
    "policy-revision": uint(64), "proposer": text, "created": int64, "not-before": int64, "expires": int64, "reason": text,
    "parameters": data,
})
STATEMENT = Struct({"proposal": text, "verdict": text, "custodian": text, "credential": text, "signature": data})
APPROVED = Struct({"proposal": data, "statements": array(STATEMENT)})

ROOT = Struct({
    "suite": uint(16), "agreement": data, "signing-suite": uint(16), "signing": data, "device": text, "import-kind": text,
    "import": data, "attestation": data,
})
HOLDER = Struct({
    "custodian": text, "site": text, "suite": uint(16), "kem": data, "credential": text, "possession": data, "sealed": data,
    "commitment": data,
})
PARAMETERS = {
    "policy": Struct({"rules": array(RULE), "attested": boolean, "forbid": array(uint(16))}, {"forbid": []}),
    "custodian": Struct({
        "custodian": CUSTODIAN, "possession": array(Struct({"credential": text, "signature": data})), "restore": array(text),
    }, {"possession": [], "restore": []}),
    "node": Struct({"change": text, "site": text, "address": text, "api": text, "root": ROOT, "possession": data, "leave": boolean}),
    "site": Struct({"change": text, "trust-domain": text, "cas": array(data)}),
    "recovery-key": Struct({
        "residency": array(text), "suite": uint(16), "public-key": data, "nonce": data, "threshold": uint(32), "sites": uint(32),
        "holders": array(HOLDER),
    }),
    "import": Struct({
        "node": text, "purpose": text, "algorithm": text, "rotation-period": int64, "public-key": data, "sealed": data,
    }),
    "recover": Struct({
        "cluster": text, "state": data, "index": uint(64), "log-size": uint(64), "log-root": data, "epoch": uint(64),
        "voters": array(text),
    }),
}
VERSION = Struct({"override": boolean, "version": uint(32)}, {"override": False})
for _a in ("activate", "deactivate", "compromise", "destroy"):
    PARAMETERS[_a] = VERSION

PARAMETERS["schedule"] = Struct({"rotation-period": int64})

NODE = Struct({
    "id": text, "site": text, "address": text, "api": text, "suite": uint(16), "agreement": data, "signing-suite": uint(16),
    "signing": data, "device": text, "root": uint(32), "import-kind": text, "import": data, "attestation": data, "voter": boolean,
    "revision": uint(64),
})
SITE = Struct({"id": text, "trust-domain": text, "cas": array(data)})
GENESIS = Struct({
    "format": uint(8), "name": text, "nonce": data, "created": int64, "sites": array(SITE), "nodes": array(NODE),
    "custodians": array(CUSTODIAN), "policies": array(POLICY), "access": data, "vendors": array(data), "majority-site": text,
}, {"majority-site": ""})
SIGNED_GENESIS = Struct({"genesis": data, "signatures": array(Struct({"node": text, "signature": data}))})

# Targets by action; a rotation may also be of a keyring's KEK.
TARGETS = {
    "rotate": "key", "activate": "key", "suspend": "key", "resume": "key", "deactivate": "key", "compromise": "key", "destroy": "key",
    "import": "key",
    "schedule": "key",
    "policy": "policy", "custodian": "custodian", "node": "node", "site": "site", "recovery-key": "recovery", "recover": "cluster",
}


def need(condition, why):
    if not condition:
        raise Refused(why)


def name(s):
    need(re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", s), f"{s!r} is not a name")


def names(l, low=0, high=1000):
    need(low <= len(l) <= high, "a list of names is too short or too long")
    for s in l:
        name(s)
    need(all(a < b for a, b in zip(l, l[1:])), "a list of names is not sorted or repeats one")


def hex128(s):
    return re.fullmatch(r"[0-9a-f]{32}", s) is not None


def graphic(c):
    category = unicodedata.category(c)
    return category[0] in "LMNPS" or category == "Zs"


def line(s):
    """A short text for people."""
    need(len(s.encode()) <= 255 and all(map(graphic, s)), "a text is too long, or does not show on one line")


def identity(s):
    """The trust domain, role and name of a SPIFFE ID."""
    need(len(s) <= 512 and s.startswith("spiffe://"), "an identity is no SPIFFE ID")
    parts = s[len("spiffe://") :].split("/")
    need(len(parts) >= 3, "an identity has no role or name")
    for p in parts:
        need(re.fullmatch(r"[a-z0-9._-]+", p) and p not in (".", ".."), "an identity has a segment that is not allowed")
    return parts[0], parts[1], "/".join(parts[2:])


def target(s):
    kind, _, rest = s.partition("/")
    if kind == "key":
        ring, sep, key = rest.partition("/")
        need(sep, "a key's target has no key")
        name(ring)
        name(key)
    elif kind in ("keyring", "policy", "custodian", "node", "site", "recovery"):
        name(rest)
    else:
        need(kind == "cluster" and hex128(rest), f"the target {s!r} has no known form")
    return kind, rest


def quorum(r):
    return r["approvals"] > 0 and r["sites"] > 0 and not r["direct"]


def rule(r):
    need(r["action"] in KEY_ACTIONS + GOVERNANCE_ACTIONS, "a rule is about an action that there is not")
    if r["direct"]:
        rest = (r["approvals"], r["sites"], r["delay"], r["lifetime"], len(r["required"]), len(r["veto"]), r["proposer-may-approve"],
                r["need"], r["not-before"], r["unused"])
        need(not any(rest), "a rule is direct and has parts of a quorum")
        need(r["action"] != "destroy", "a destruction cannot be direct")
        need(all(x in ROLES for x in r["direct"]), "a rule names a role that there is not")
        need(all(a < b for a, b in zip(r["direct"], r["direct"][1:])), "the roles of a rule are not sorted")
        return
    need(0 < r["sites"] <= r["approvals"] <= 1000, "a rule's thresholds are missing or do not fit together")
    names(r["required"])
    need(len(r["required"]) <= r["sites"], "a rule requires more sites than it counts")
    names(r["veto"])
    if r["need"]:
        need(r["need"]["weight"] == 0, "the outermost group of a rule has a weight")
        group(r["need"], 5)
    need(0 <= r["not-before"] <= MAX_TIME, "a rule's time of release is no time")
    need(r["action"] != "recover" or not r["not-before"], "a recovery cannot wait for a day")
    need(r["unused"] == 0 or r["action"] in ("deactivate", "destroy"), "a rule asks for a time without use of what is not retired")
    need(r["unused"] == 0 or DAY // 24 <= r["unused"] <= 3650 * DAY, "a rule's time without use is out of bounds")
    need(60_000 <= r["lifetime"] <= 90 * DAY and 0 <= r["delay"] <= 30 * DAY, "a rule's times are out of bounds")
    need(r["action"] != "destroy" or r["delay"] >= 7 * DAY, "a destruction waits at least seven days")
    need(r["delay"] < r["lifetime"], "a rule's delay outlasts its lifetime")


def group_names(g, kind):
    """The names of the custodians, or sites, in a group and those in it."""
    return [] if g is None else [m["name"] for m in g[kind]] + [n for i in g["groups"] for n in group_names(i, kind)]


def group(g, levels):
    """The shape of a group with at most so many levels; returns how many it has, and members."""
    need(levels > 0, "groups are nested too deep")
    need(g["need"] > 0, "a group needs nothing")
    for members in (g["custodians"], g["sites"]):
        names([m["name"] for m in members])
    members = g["custodians"] + g["sites"] + g["groups"]
    need(all(1 <= m["weight"] <= 1000 for m in members), "a member of a group has no weight that it may have")
    need(all(1 <= s["approvals"] <= 1000 for s in g["sites"]), "a site in a group takes no number of approvals that it may take")
    need(sum(m["weight"] for m in members) >= g["need"], "a group needs more than its members weigh")
    inner = [group(i, levels - 1) for i in g["groups"]]
    return 1 + max((d for d, _ in inner), default=0), len(members) + sum(n for _, n in inner)


def policy(p_name, rules, attested, forbid):
    name(p_name)
    decides = GOVERNANCE_ACTIONS if p_name == GOVERNANCE else KEY_ACTIONS
    need(not (p_name == GOVERNANCE and attested), "the governance policy cannot ask for attested hardware")
    need(len(forbid) <= 64 and all(a < b for a, b in zip([0] + forbid, forbid)), "the forbidden suites are too many, not sorted, or one is 0")
    actions = [r["action"] for r in rules]
    need(all(a in decides for a in actions), f"policy {p_name} has a rule that is not its own")
    need(all(a < b for a, b in zip(actions, actions[1:])), f"policy {p_name}: the rules are not sorted by action")
    for r in rules:
        rule(r)
        if r["need"]:
            depth, members = group(r["need"], 5)
            need(depth <= 4 and members <= 256, f"policy {p_name} has a group that is too large")
    need(all(a in actions or a in LATER_ACTIONS for a in decides), f"policy {p_name} lacks a rule")


def allow(policy, *suites):
    """Refuses suites that a policy forbids for what is new."""
    need(not set(suites) & set(policy["forbid"]), f"policy {policy['name']} forbids a suite of what is new")


def custodian(c):
    name(c["id"])
    name(c["site"])
    need(len(c["credentials"]) <= 8 and (c["credentials"] or c["revoked"]), "a custodian has no credential, or too many")
    for k in c["credentials"]:
        need(signatures.is_signature_key(k["suite"], k["public-key"]), "a credential is no public key of a signature suite")
        need(k["id"] == signatures.fingerprint(k["public-key"]), "a credential is not the fingerprint of its key")
        need(not k["suspended"], "a credential is marked as suspended, which only a record is")
    ids = [k["id"] for k in c["credentials"]]
    need(all(a < b for a, b in zip(ids, ids[1:])), "a custodian's credentials are not sorted")


def custodian_extras(v):
    """What is beside the record in the parameters of the action custodian."""
    c, proven, restored = v["custodian"], [x["credential"] for x in v["possession"]], v["restore"]
    ids = [k["id"] for k in c["credentials"]]
    for l in (proven, restored):
        need(all(a < b for a, b in zip(l, l[1:])) and set(l) <= set(ids), "proofs or restorations are not sorted, or of other credentials")
        need(not l or not c["revoked"], "a revoked custodian gets nothing")
    need(all(0 < len(x["signature"]) <= 16 << 10 for x in v["possession"]), "a proof of possession is missing or too long")
    need(not proven or not restored, "a restoration goes with nothing else")


def reason(s):
    """A reason is text that shows as text."""
    need(0 < len(s.encode()) <= 1000, "there is no reason, or too long a one")
    need(all(c != "\ufffd" and (c == "\n" or graphic(c)) for c in s), "a reason does not show as text")


def suspension(s):
    need(re.fullmatch(r"[0-9a-f]{32}", s["cluster"]), "a suspension names no cluster")
    name(s["custodian"])
    name(s["by"])
    need(0 < len(s["credential"].encode()) <= 255 and 0 < len(s["with"].encode()) <= 255 and s["revision"], "a suspension lacks a credential or the revision")
    need(0 < len(s["signature"]) <= 16 << 10, "a suspension's signature is missing or too long")
    reason(s["reason"])


def distinct_custodians(all_custodians):
    owner = {}
    for c in all_custodians:
        for k in c["credentials"]:
            need(owner.setdefault(k["public-key"], c["id"]) == c["id"], "two custodians have the same credential")


def certificates(cas):
    need(1 <= len(cas) <= 16, "a site has no CA certificate, or too many")
    for der in cas:
        need(len(der) <= 16 << 10, "a CA certificate is too long")
        try:
            constraints = x509.load_der_x509_certificate(der).extensions.get_extension_for_class(x509.BasicConstraints)
        except (ValueError, x509.ExtensionNotFound) as e:
            raise Refused("a certificate is not that of a CA") from e
        need(constraints.value.ca, "a certificate is not that of a CA")


def trust_domain(s):
    need(identity(f"spiffe://{s}/node/x")[0] == s, "a trust domain is not one")


def root(r):
    """The public half of a hardware root. Its attestation document is not checked."""
    line(r["device"])
    need(len(r["agreement"]) <= KEM_MAX and signatures.is_kem_key(r["suite"], r["agreement"]), "an agreement key is not one of its suite")
    need(r["signing-suite"] in signatures.CURVES, "a node's signing key has a suite that is not for one")
    need(signatures.is_point(signatures.CURVES[r["signing-suite"]][0], r["signing"]), "a signing key is not one of its suite")
    if r["import-kind"]:
        name(r["import-kind"])
    need(bool(r["import-kind"]) == bool(r["import"]), "an import key comes with its kind, or neither does")
    need(len(r["import"]) <= KEM_MAX and len(r["attestation"]) <= 64 << 10, "an import key or attestation is too long")


def has_root(p):
    return p["change"] in ("root", "join")


def node_parameters(p):
    need(p["change"] in ("root", "join", "promote", "remove"), "a change of a node is not known")
    if p["change"] == "join":
        name(p["site"])
        need(p["address"], "a node that joins has no address")
    else:
        need(not (p["site"] or p["address"] or p["api"]), "only a node that joins brings a site and addresses")
    need(not (p["change"] == "promote" and p["leave"]), "a promotion leaves nothing behind")
    if has_root(p):
        root(p["root"])
        need(len(p["possession"]) == signatures.SIZES[p["root"]["signing-suite"]][1], "the proof of possession is no signature")
    else:
        need(not any(p["root"].values()) and not p["possession"], "a change of a node brings a root that it does not have")


def site_parameters(p):
    need(p["change"] in ("add", "cas", "remove"), "a change of a site is not known")
    if p["change"] == "add":
        trust_domain(p["trust-domain"])
    else:
        need(not p["trust-domain"], "a site keeps its trust domain")
    if p["change"] == "remove":
        need(not p["cas"], "a site that is removed brings no certificates")
    else:
        certificates(p["cas"])


def import_parameters(p):
    name(p["node"])
    need(p["algorithm"] in ALGORITHMS.get(p["purpose"], []), "an import's purpose or algorithm is not one")
    need(0 <= p["rotation-period"] <= 3650 * DAY, "an import's rotation period is out of bounds")
    need((p["purpose"] == "sign") == bool(p["public-key"]) and len(p["public-key"]) <= KEM_MAX, "an import's public key is not one")
    need(len(p["sealed"]) == 32, "an import does not say what is sealed")


def recovery_parameters(p):
    names(p["residency"], 1, 32)
    need(len(p["public-key"]) <= KEM_MAX and signatures.is_kem_key(p["suite"], p["public-key"]), "a recovery key is not one of its suite")
    need(len(p["nonce"]) == 16, "a recovery key has no nonce")
    names([h["custodian"] for h in p["holders"]], 1, 16)
    for h in p["holders"]:
        name(h["site"])
        need(len(h["kem"]) <= KEM_MAX and signatures.is_kem_key(h["suite"], h["kem"]), "a holder's key is not one of its suite")
        need(len(h["credential"].encode()) <= 255 and 0 < len(h["possession"]) <= KEM_MAX, "a holder's signature is missing")
        need(0 < len(h["sealed"]) <= KEM_MAX and len(h["commitment"]) == 32, "a holder's share is not one")
    need(len({h["kem"] for h in p["holders"]}) == len(p["holders"]), "two holders have the same key")
    need(2 <= p["sites"] <= len({h["site"] for h in p["holders"]}), "a recovery key asks for too few or too many sites")
    need(p["sites"] <= p["threshold"] <= len(p["holders"]), "a recovery key asks for too few or too many shares")


def parameters(p):
    """The decoded parameters of a proposal, of which the shape is checked."""
    kind, rest = target(p["target"])
    action = p["action"]
    need(action in TARGETS, f"the action {action!r} cannot be proposed")
    need(kind == TARGETS[action] or (action == "rotate" and kind == "keyring"), "the target is not of the action's kind")
    if action not in PARAMETERS:
        need(not p["parameters"], "the action has no parameters")
        return None
    v = PARAMETERS[action].parse(p["parameters"])
    if PARAMETERS[action] is VERSION:
        need(v["version"] or action == "destroy", "the action needs a version")
        need(not v["override"] or action in ("deactivate", "destroy"), "the action overrides nothing")
    elif action == "schedule":
        need(0 <= v["rotation-period"] <= 3650 * DAY, "a rotation period is out of bounds")
    elif action == "policy":
        policy(rest, v["rules"], v["attested"], v["forbid"])
    elif action == "custodian":
        need(v["custodian"]["id"] == rest and v["custodian"]["revision"] == 0, "the parameters are of another custodian")
        custodian(v["custodian"])
        custodian_extras(v)
    elif action == "node":
        node_parameters(v)
    elif action == "site":
        site_parameters(v)
    elif action == "recovery-key":
        recovery_parameters(v)
    elif action == "import":
        need(p["revision"] == 0, "an import is about a key that is there already")
        import_parameters(v)
    else:
        need(rest == p["cluster"] and hex128(v["cluster"]), "a recovery names different clusters")
        need(len(v["state"]) == 32 and len(v["log-root"]) == 32, "a recovery's hashes are not ones")
        need(p["revision"] < v["epoch"] <= 1 << 20, "a recovery's epoch does not come after the present one")
        names(v["voters"], 1, 128)
    return v


def proposal(b):
    """A proposal from its exact bytes, with its decoded parameters."""
    need(len(b) <= 128 << 10, "a proposal is too long")
    p = PROPOSAL.parse(b)
    need(p["format"] == 1 and hex128(p["cluster"]) and len(p["nonce"]) == 16, "a proposal has another format, cluster or nonce")
    name(p["policy"])
    identity(p["proposer"])
    need(0 < p["created"] < p["expires"] <= MAX_TIME, "a proposal's times are not in order")
    need(0 <= p["not-before"] < p["expires"], "a proposal's earliest time is not before it expires")
    reason(p["reason"])
    return p, parameters(p)


def address(s):
    try:
        u = urlsplit("//" + s)
        ok = u.netloc == s and u.hostname and u.port is not None and len(s.encode()) <= 255
        if ok and s.startswith("["):
            ipaddress.ip_address(u.hostname)
    except ValueError:
        ok = False
    need(ok, "a node's address is not host:port")


def genesis(g):
    need(g["format"] == 1 and len(g["nonce"]) == 32 and 0 < g["created"] <= MAX_TIME, "a genesis has another format, nonce or time")
    need(g["name"] and len(g["access"]) <= 256 << 10, "a genesis has no name, or too long an access policy")
    line(g["name"])
    for what, limit in (("sites", 32), ("nodes", 128), ("custodians", 512)):
        names([x["id"] for x in g[what]], 1, limit)
    names([p["name"] for p in g["policies"]], 1, 128)
    sites = {s["id"] for s in g["sites"]}
    need(len({s["trust-domain"] for s in g["sites"]}) == len(sites), "two sites have the same trust domain")
    for s in g["sites"]:
        trust_domain(s["trust-domain"])
        certificates(s["cas"])
    for n in g["nodes"]:
        need(n["site"] in sites and n["root"] == 1 and n["revision"] == 1, "a node of the genesis has no site, or another root or revision")
        address(n["address"])
        need(not n["api"] or (n["api"].startswith("https://") and urlsplit(n["api"]).netloc and len(n["api"]) <= 255), "an API address is no https URL")
        root(n)
    need(len({n["signing"] for n in g["nodes"]}) == len(g["nodes"]), "two nodes have the same signing key")
    need({n["site"] for n in g["nodes"]} == sites, "a site has no node")
    need(any(n["voter"] for n in g["nodes"]), "no node of the genesis is a voter")
    need(g["majority-site"] in sites | {""}, "the site with the majority does not exist")
    for c in g["custodians"]:
        custodian(c)
        need(c["revision"] == 1 and not c["revoked"] and c["site"] in sites, "a custodian of the genesis has another revision, or no site")
    distinct_custodians(g["custodians"])
    for p in g["policies"]:
        need(p["revision"] == 1, "a policy of the genesis has another revision")
        policy(p["name"], p["rules"], p["attested"], p["forbid"])
        need(all(s in sites for r in p["rules"] for s in r["required"] + group_names(r["need"], "sites")), "a policy requires a site that does not exist")
    governance = next((p for p in g["policies"] if p["name"] == GOVERNANCE), None)
    need(governance is not None, "the genesis has no governance policy")
    for n in g["nodes"]:
        allow(governance, n["suite"], n["signing-suite"])
    for c in g["custodians"]:
        allow(governance, *[k["suite"] for k in c["credentials"]])
