"""The cluster as far as authority goes, derived from the genesis through one
decision after another. Nothing in it is taken on anybody's word."""

import hashlib

import commands
import rules
import shapes
import signatures
from canon import encode
from shapes import GOVERNANCE, need


def short_hash(domain, *parts):
    h = hashlib.sha256(domain)
    for p in parts:
        h.update(p)
    return h.hexdigest()[:32]


class Member:
    """A node, with the hardware roots that it had one after the other."""

    def __init__(self, site, revision=0, roots=()):
        self.site, self.revision, self.roots = site, revision, list(roots)  # (number, root)
        self.removed, self.slack, self.pending, self.last = False, 0, 0, 0

    def number(self):
        return self.roots[-1][0] if self.roots else 0

    def has(self, number):
        return any(n == number for n, _ in self.roots)


class Command:
    """A command of which the signature verified."""

    def __init__(self, envelope, content, root):
        self.envelope, self.content, self.root, self.origin = envelope, content, root, envelope["origin"]


class Decided:
    """A decision that verified."""

    def __init__(self, id_, proposal, params, rule, opening, execution, adoption):
        self.id, self.proposal, self.params, self.rule = id_, proposal, params, rule
        self.opening, self.execution, self.adoption = opening, execution, adoption


class World:
    def __init__(self, signed_genesis, recoveries):
        signed = shapes.SIGNED_GENESIS.parse(signed_genesis)
        b = signed["genesis"]
        need(len(b) <= 4 << 20, "the genesis is too long")
        g = shapes.GENESIS.parse(b)
        shapes.genesis(g)
        need([s["node"] for s in signed["signatures"]] == [n["id"] for n in g["nodes"]], "not exactly the nodes of the genesis have signed it")
        for n, s in zip(g["nodes"], signed["signatures"]):
            ok = signatures.verify(n["signing-suite"], n["signing"], b, b"conclave/genesis/v1", s["signature"])
            need(ok, f"the genesis signature of node {n['id']} does not verify")
        self.cluster = short_hash(b"conclave/genesis/v1\x00", b)
        self.lineage, self.epoch, self.entered, self.ahead = self.cluster, 0, {self.cluster}, list(recoveries)
        self.nodes = {n["id"]: Member(n["site"], 1, [(1, n)]) for n in g["nodes"]}
        self.sites = {s["id"]: {"domain": s["trust-domain"], "revision": 1, "removed": False} for s in g["sites"]}
        self.custodians = {c["id"]: c for c in g["custodians"]}
        self.policies, self.past = {}, {}
        self.imports = {}  # decisions by which keys were imported, by target
        self.attestations = sorted(n["id"] for n in g["nodes"] if n["attestation"])  # documents seen and not checked
        self.members, self.since = [], 0
        for p in g["policies"]:
            rules.possible(p, g["custodians"])
            self.set_policy(p)
        self.mark(False)

    def set_policy(self, p):
        for r in p["rules"]:
            need(r["action"] not in shapes.QUORUM_ONLY or shapes.quorum(r), f"policy {p['name']} lets one person alone do {r['action']!r}")
        self.policies[p["name"]] = p
        self.past.setdefault(p["name"], []).append(p)

    def enrolled(self, site):
        return any(c["site"] == site for c in self.custodians.values())

    def mark(self, removal):
        """Notes who is a member with a hardware root now."""
        self.members.append([(i, m.site) for i, m in sorted(self.nodes.items()) if not m.removed and m.roots])
        if removal:
            self.since = len(self.members) - 1

    def residents(self, sites, given, old):
        """The given nodes, if exactly they were resident at these sites at some time
        since the last removal, or for an old command at any time; else None."""
        for members in self.members[0 if old else self.since :]:
            if [n for n, s in members if s in sites] == given:
                return given
        return None

    # Histories

    def reach(self, lineage):
        """Goes on to a history through the recoveries that come next."""
        while lineage not in self.entered:
            need(self.ahead, "a command or proposal is for another cluster")
            self.recover(self.ahead.pop(0))

    def recover(self, b):
        need(len(b) <= 512 << 10, "a recovery is too long")
        a = shapes.APPROVED.parse(b)
        p, params = shapes.proposal(a["proposal"])
        policy = self.policies[GOVERNANCE]
        rule = rules.rule_of(policy, "recover")
        need(p["action"] == "recover", "a recovery is a proposal of something else")
        follows = (params["cluster"], p["cluster"], p["revision"]) == (self.cluster, self.lineage, self.epoch)
        need(follows, "a recovery does not follow on the history before it")
        need(rule is not None and p["policy"] == GOVERNANCE and p["policy-revision"] == policy["revision"], "a recovery was decided under another policy")
        voters = [s["custodian"] for s in a["statements"]]
        need(len(voters) <= 64 and all(x < y for x, y in zip(voters, voters[1:])), "a recovery's statements are not sorted, or too many")
        for s in a["statements"]:
            need(s["verdict"] == "approve", "a recovery holds a statement that is no approval")
            self.statement(s, a["proposal"])
        rule = {**rule, "approvals": max(rule["approvals"], 2), "sites": max(rule["sites"], 2)}
        need(rules.met(rule, p["proposer"], self.custodians, voters), "a recovery was not approved by its quorum")
        approved = short_hash(b"conclave/approved/v1\x00", b)
        self.lineage, self.epoch = short_hash(b"conclave/lineage/v1\x00", f"{self.cluster}\x00{approved}".encode()), params["epoch"]
        self.entered.add(self.lineage)
        for m in self.nodes.values():
            m.slack += 1

    # What is signed

    def statement(self, s, proposal):
        """Verifies a custodian's statement about a proposal's bytes."""
        need(s["verdict"] in ("approve", "reject"), "a verdict is neither approval nor rejection")
        need(s["proposal"] == short_hash(b"conclave/proposal/v1\x00", proposal), "a statement is about another proposal")
        message = b"conclave/statement/v1\x00" + s["verdict"].encode() + b"\x00" + proposal
        self.credential(s["custodian"], s["credential"], message, b"conclave/approval/v1", s["signature"])

    def credential(self, who, credential, message, context, signature):
        c = self.custodians.get(who)
        need(c is not None and not c["revoked"], f"there is no custodian {who!r}, or not any more")
        k = next((k for k in c["credentials"] if k["id"] == credential), None)
        need(k is not None and not k["suspended"], f"custodian {who} has no credential {credential!r} that counts")
        need(signatures.verify(k["suite"], k["public-key"], message, context, signature), f"the signature of custodian {who} does not verify")

    def command(self, raw, kind, roots=None):
        """Verifies a node's command, by any root that the node has or had."""
        b, e, content, signature = commands.parse(raw)
        self.reach(e["cluster"])
        need(e["origin"] in self.nodes, f"{e['origin']!r} is no node of the cluster")
        by = 0
        for number, root in self.nodes[e["origin"]].roots if roots is None else roots:
            if signatures.verify(root["signing-suite"], root["signing"], b, commands.CONTEXT, signature):
                by = number
        need(by, f"the signature of node {e['origin']} does not verify")
        need(e["type"] == kind, "a command is of another type")
        return Command(e, content, by)

    def principal(self, who, rule):
        """Refuses a principal whom a direct rule does not let act."""
        need(self.domain(who)[1] in rule["direct"], f"the policy does not let {who} do this")

    def domain(self, who):
        id_ = shapes.identity(who)
        need(any(s["domain"] == id_[0] for s in self.sites.values()), f"{who} is not of the trust domain of any site")
        return id_

    # Decisions

    def decide(self, d):
        """Verifies a decision under the custodians and policies in force."""
        p, params = shapes.proposal(d["proposal"])
        for raw in d["suspensions"]:
            self.suspend(raw)
        id_ = short_hash(b"conclave/proposal/v1\x00", d["proposal"])
        self.reach(p["cluster"])
        need(p["cluster"] == self.lineage, "a proposal outlives its epoch")
        opening = self.command(d["open"], commands.OPEN)
        need(opening.content["proposal"] == d["proposal"], "the opening of a proposal carries other bytes")
        o = self.nodes[opening.origin]
        who = opening.envelope["principal"] or f"spiffe://{self.sites[o.site]['domain']}/node/{opening.origin}"
        need(who == p["proposer"], "a proposal names another proposer than it was opened for")
        self.domain(who)
        rule = rules.rule_for(self, p, params)
        need(self.revision(p) == p["revision"], f"{p['target']} had another revision than the proposal is about")
        self.votes(d, p, rule)
        return Decided(id_, p, params, rule, opening, self.execution(d, id_, p, rule, opening), d.get("adoption", b""))

    def suspend(self, raw):
        """Verifies the suspension of a credential and puts it into force."""
        x = self.command(raw, commands.SUSPEND)
        s = x.content["statement"]
        c, by = self.custodians.get(s["custodian"]), self.custodians.get(s["by"])
        need(s["cluster"] == x.envelope["cluster"], "a suspension is for another cluster than its command")
        need(c is not None and by is not None and c["site"] == by["site"], "a suspension is not by a custodian of the same site")
        need(not c["revoked"] and c["revision"] == s["revision"], "a suspension is about another revision")
        k = next((k for k in c["credentials"] if k["id"] == s["credential"]), None)
        need(k is not None and not k["suspended"], "there is no such credential to suspend")
        message = b"conclave/suspension/v1\x00" + encode(dict(s, signature=b""))
        self.credential(s["by"], s["with"], message, b"conclave/suspension/v1", s["signature"])
        marked = [dict(o, suspended=o["suspended"] or o["id"] == s["credential"]) for o in c["credentials"]]
        self.custodians[c["id"]] = dict(c, credentials=marked, revision=c["revision"] + 1)
        rules.restorable(self.policies, self.custodians.values(), s["by"])

    def revision(self, p):
        kind, name = shapes.target(p["target"])
        if kind == "policy":
            return self.policies.get(name, {"revision": 0})["revision"]
        if kind == "custodian":
            return self.custodians.get(name, {"revision": 0})["revision"]
        if kind == "site":
            return self.sites.get(name, {"revision": 0})["revision"]
        if kind != "node":
            return p["revision"]  # the signed execution has that of a key
        m = self.nodes.get(name)
        if m is None:
            return 0
        if m.revision < p["revision"] <= m.revision + m.slack:  # a recovery changed its vote
            m.revision, m.slack = p["revision"], 0
        return m.revision

    def votes(self, d, p, rule):
        voters = [s["custodian"] for s in d["votes"]]
        need(all(v > "" for v in voters) and all(a < b for a, b in zip(voters, voters[1:])), "votes are not sorted by custodian, or one is there twice")
        approvers = []
        for s in d["votes"]:
            self.statement(s, d["proposal"])
            if s["verdict"] == "approve":
                approvers.append(s["custodian"])
            else:
                need(p["action"] != "destroy" and s["custodian"] not in rule["veto"], f"the rejection of {s['custodian']} ends the proposal")
        if rule["direct"]:
            self.principal(p["proposer"], rule)
        else:
            need(rules.met(rule, p["proposer"], self.custodians, approvers), "the approvals do not meet the rule")

    def execution(self, d, id_, p, rule, opening):
        kind = commands.EXECUTE
        if p["target"].startswith("keyring/"):
            kind = commands.COMMIT_KEK
        elif p["action"] == "rotate":
            kind = commands.COMMIT
        elif p["action"] == "import":
            kind = commands.IMPORT
        x = self.command(d["execution"], kind)
        need(x.content["proposal"] == id_, "an execution is that of another proposal")
        need(x.envelope["expect"] == p["revision"], "an execution expects another revision")
        self.in_order(opening, x)
        m = self.nodes[x.origin]
        need(not m.removed, "an execution is signed by a node that was removed by then")
        need(x.root >= m.last, "an execution is signed with a root that was given up by then")
        m.last = x.root
        earliest = max(p["not-before"] - commands.WINDOW, rule["not-before"] - commands.WINDOW, p["created"] + rule["delay"] - 2 * commands.WINDOW)
        need(x.envelope["time"] >= earliest, "an execution is signed too early")
        return x

    def in_order(self, before, after):
        need(before.origin != after.origin or before.root <= after.root, f"node {after.origin} signed a later command with an older root")

    # What decisions on governance change

    def govern(self, d):
        _, name = shapes.target(d.proposal["target"])
        change = {
            "policy": self.change_policy, "custodian": self.change_custodian, "node": self.change_node, "site": self.change_site,
            "recovery-key": self.check_recovery_key, "import": self.import_key,
        }.get(d.proposal["action"])
        need(change is not None, f"a decision on {d.proposal['action']!r} changes nothing of the governance")
        need(not d.adoption or d.proposal["action"] == "node", "only a node adopts a hardware root")
        change(name, d)

    def change_policy(self, name, d):
        revision = self.policies.get(name, {"revision": 0})["revision"] + 1
        p = {"name": name, "revision": revision, "rules": d.params["rules"], "attested": d.params["attested"], "forbid": d.params["forbid"]}
        rules.possible(p, self.custodians.values())
        self.set_policy(p)

    def change_custodian(self, name, d):
        c, old = dict(d.params["custodian"]), self.custodians.get(name)
        if old is None:
            need(not c["revoked"], f"there is no custodian {name} to revoke")
        else:
            need(not old["revoked"] and old["site"] == c["site"], f"custodian {name} was revoked, or is of another site")
        site = self.sites.get(c["site"])
        need(site is not None and not site["removed"], f"there is no site {c['site']}")
        had = [k["id"] for k in old["credentials"]] if old else []
        shapes.allow(self.policies[shapes.GOVERNANCE], *[k["suite"] for k in c["credentials"] if k["id"] not in had])
        self.possessed(name, d.params)
        c["credentials"] = self.marked(c, old, d.params["restore"])
        c["revision"] = 1 if old is None else old["revision"] + 1
        self.custodians[name] = c
        shapes.distinct_custodians(self.custodians.values())
        enrolled = [dict(x, credentials=[dict(k, suspended=False) for k in x["credentials"]]) for x in self.custodians.values()]
        for p in self.policies.values():
            rules.possible(p, enrolled)
        rules.restorable(self.policies, self.custodians.values())

    def possessed(self, name, params):
        """Verifies the proofs that a custodian holds new credentials."""
        for x in params["possession"]:
            k = next(k for k in params["custodian"]["credentials"] if k["id"] == x["credential"])
            card = encode({"cluster": self.cluster, "custodian": name, "suite": k["suite"], "public-key": k["public-key"]})
            context = b"conclave/credential/v1"
            need(signatures.verify(k["suite"], k["public-key"], context + b"\x00" + card, context, x["signature"]), "a proof of possession does not verify")

    def marked(self, c, old, restore):
        """The credentials of a changed record: what is suspended stays so but for what is restored."""
        before = {} if old is None else {k["id"]: k for k in old["credentials"]}
        if restore:
            need(old is not None and [dict(k, suspended=False) for k in old["credentials"]] == c["credentials"], "a restoration changes something else")
            need(all(before[i]["suspended"] for i in restore), "a credential to be restored is not suspended")
        return [dict(k, suspended=k["id"] in before and before[k["id"]]["suspended"] and k["id"] not in restore) for k in c["credentials"]]

    def change_node(self, name, d):
        change = d.params["change"]
        need(not d.adoption or shapes.has_root(d.params), "there is no hardware root that the node could adopt")
        if change == "join":
            need(name not in self.nodes, f"there is or was a node {name}")
            site = self.sites.get(d.params["site"])
            need(site is not None and not site["removed"], "there is no such site")
            self.nodes[name] = Member(d.params["site"])
            self.replace_root(name, d)
            if d.adoption:
                self.mark(False)
            return
        m = self.nodes.get(name)
        need(m is not None and not m.removed, f"there is no node {name}")
        if change == "root":
            self.replace_root(name, d)
            return
        m.revision += 1
        if change == "remove":
            m.removed = True
            self.mark(True)

    def replace_root(self, name, d):
        m, root = self.nodes[name], d.params["root"]
        shapes.allow(self.policies[shapes.GOVERNANCE], root["suite"], root["signing-suite"])
        number = max(m.number(), m.pending) + 1
        message = encode({"cluster": self.cluster, "node": name, "number": number, "root": root})
        ok = signatures.verify(root["signing-suite"], root["signing"], message, b"conclave/node-root/v1", d.params["possession"])
        need(ok, f"the new signing key has not signed that it is to be root {number} of node {name}")
        for o in self.nodes.values():
            need(all(r["signing"] != root["signing"] for _, r in o.roots), "a new signing key is or was another root's")
        if root["attestation"]:
            self.attestations.append(name)
        m.revision += 1
        if not d.adoption:
            m.pending = number
            return
        x = self.command(d.adoption, commands.ADOPT, [(number, root)])
        need(x.origin == name and x.content["root"] == number, "an adoption is that of another node or root")
        m.roots.append((number, root))
        m.revision += 1

    def change_site(self, name, d):
        change, s = d.params["change"], self.sites.get(name)
        if change == "add":
            domain = d.params["trust-domain"]
            need(s is None and all(o["domain"] != domain for o in self.sites.values()), "there is or was such a site or trust domain")
            self.sites[name] = {"domain": domain, "revision": 1, "removed": False}
            return
        need(s is not None and not s["removed"], f"there is no site {name}")
        s["revision"] += 1
        s["removed"] = change == "remove"

    def import_key(self, _, d):
        target, k, x = d.proposal["target"], d.execution.content["key"], d.execution
        need(target not in self.imports, "a key is imported twice")
        need(target == f"key/{k['keyring']}/{k['name']}", "an import makes another key than the proposal's")
        need(x.origin == d.params["node"], "an import is carried out by another node than the material is sealed to")
        for f in ("purpose", "algorithm", "rotation-period", "public-key"):
            need(k[f] == d.params[f], f"an import makes a key of another {f}")
        self.imports[target] = d

    def check_recovery_key(self, _, d):
        shapes.allow(self.policies[shapes.GOVERNANCE], d.params["suite"])
        for h in d.params["holders"]:
            c = self.custodians.get(h["custodian"])
            need(c is not None and c["site"] == h["site"], "a share is for somebody who is no custodian of that site")
            card = encode({"cluster": self.cluster, "custodian": h["custodian"], "suite": h["suite"], "kem": h["kem"]})
            self.credential(h["custodian"], h["credential"], card, b"conclave/recovery-key/v1", h["possession"])
