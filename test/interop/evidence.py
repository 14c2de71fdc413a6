#!/usr/bin/env python3
"""A second verifier of evidence files, written from kms/audit/EVIDENCE.md and
independent of the Go code: Python 3.11 and the package cryptography (Debian:
python3-cryptography). It prints what it does not check.

usage: evidence.py [--cluster ID] FILE...
       evidence.py --batch   reads lines "ID FILE", answers with a line of JSON each
"""

import argparse
import base64
import binascii
import hashlib
import json
import sys

import commands
import replay
import shapes
import signatures
from canon import Refused
from shapes import need

FORMAT = 2
MAX_FILE = 64 << 20

NOT_PROVEN = [
    "inclusion in the cluster log: that no governance decision or rejection is left out and that the cluster accepted this commit",
]

# The file's JSON objects: fields in their order, ? for one that is left out where empty.
STATEMENT = [("proposal", "text"), ("verdict", "text"), ("custodian", "text"), ("credential", "text"), ("signature", "bytes")]
DECISION = [("proposal", "bytes"), ("open", "bytes"), ("votes", [STATEMENT]), ("execution", "bytes"), ("adoption?", "bytes"), ("suspensions?", ["bytes"])]
EVIDENCE = [
    ("format", "number"), ("cluster", "text"), ("genesis", "bytes"), ("recoveries?", ["bytes"]), ("governance", [DECISION]),
    ("decision", DECISION), ("later?", [DECISION]), ("keyring?", "bytes"), ("key?", "bytes"), ("key_id?", "bytes"), ("receipts?", ["bytes"]),
]


def _decode(v, form):
    if isinstance(form, list) and isinstance(form[0], tuple):
        need(isinstance(v, dict), "the file has not the form of evidence")
        left = list(v)
        out = {}
        for field, of in form:
            name = field.rstrip("?")
            if left and left[0] == name:
                left.pop(0)
                out[name] = _decode(v[name], of)
                need(out[name] or not field.endswith("?"), f"the field {name} is empty and should not be there")
            else:
                need(field.endswith("?"), f"the field {name} is missing or not in its place")
                out[name] = [] if isinstance(of, list) else b""
        need(not left, "the file has a field that is not known")
        return out
    if isinstance(form, list):
        need(isinstance(v, list), "the file has not the form of evidence")
        return [_decode(x, form[0]) for x in v]
    if form == "number":
        need(isinstance(v, int) and not isinstance(v, bool), "the file has not the form of evidence")
        return v
    need(isinstance(v, str), "the file has not the form of evidence")
    if form == "text":
        return v
    try:
        b = base64.b64decode(v, validate=True)
    except (binascii.Error, ValueError) as e:
        raise Refused("the file has not the form of evidence") from e
    need(base64.b64encode(b).decode() == v, "base64 is not in its one form")
    return b


def parse(b):
    """The evidence in a file, which must be exactly as it was written."""
    need(len(b) <= MAX_FILE, "the file is too long")
    try:
        v = json.loads(b.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as e:
        raise Refused("the file is no JSON") from e
    need(isinstance(v, dict) and v.get("format") == FORMAT, "the file has another format")
    e = _decode(v, EVIDENCE)
    # json.loads forgives repeated fields and any spelling: only one text is right.
    text = json.dumps(v, indent=2, ensure_ascii=False)
    for c in "<>&\u2028\u2029":
        text = text.replace(c, f"\\u{ord(c):04x}")
    need((text + "\n").encode() == b, "the file has been changed or reformatted")
    return e


class Verifier:
    """Verifies one file. On success report says what was shown."""

    def __init__(self, e, cluster):
        self.e = e
        self.w = replay.World(e["genesis"], e["recoveries"])
        need(e["cluster"] == self.w.cluster, "the evidence names another cluster than its genesis founds")
        need(cluster in ("", self.w.cluster), "the evidence is of another cluster than the one asked for")
        for d in e["governance"]:
            self.w.govern(self.w.decide(d))
        self.d = self.w.decide(e["decision"])
        self.target()
        need(not self.w.imports, "the evidence holds the import of a key that nothing in it belongs to")
        need(not self.w.ahead, "the evidence holds a recovery that nothing in it belongs to")

    def target(self):
        e, kind, name = self.e, *shapes.target(self.d.proposal["target"])
        if kind not in ("key", "keyring"):
            rest = ("keyring", "key", "key_id", "receipts", "later")
            need(not any(e[f] for f in rest), "the evidence holds commands on a key, but the decision is about none")
            self.w.govern(self.d)
            return
        need(not self.d.adoption, "the evidence holds the adoption of a hardware root, but the decision is about no node")
        ring_name, _, key_name = name.partition("/")
        self.keyring(ring_name)
        if kind == "keyring":
            need(not e["key"] and not e["key_id"], "the evidence holds commands on a key, but the decision is about a keyring")
            self.w.in_order(self.created, self.d.opening)
            self.kek()
            return
        if self.d.proposal["action"] == "import":
            self.w.govern(self.d)
        self.key(key_name)
        if self.d.proposal["action"] == "rotate":
            self.rotation(key_name)
            return
        need(not e["receipts"] and not e["key_id"] and not e["later"], "the evidence holds receipts, but the action asks for none")

    def resident_origin(self, c):
        need(self.w.nodes[c.origin].site in self.ring["residency"], f"node {c.origin} may not open the keyring")

    def direct(self, policy, action, who):
        """Refuses somebody whom no revision of the policy so far lets act alone."""
        why = Refused(f"there is no policy {policy}")
        for p in self.w.past.get(policy, []):
            try:
                rule = next((r for r in p["rules"] if r["action"] == action and r["direct"]), None)
                need(rule is not None, f"policy {policy} lets nobody do {action!r} alone")
                self.w.principal(who, rule)
                return
            except Refused as e:
                why = e
        raise why

    def keyring(self, name):
        c = self.w.command(self.e["keyring"], commands.CREATE_KEYRING)
        self.created, self.ring = c, c.content
        need(self.ring["name"] == name, "the keyring's creation is that of another")
        need(self.ring["policy"] == self.d.proposal["policy"], "the keyring is under another policy than the proposal")
        if self.ring["protection"] == "software":
            nodes = self.w.residents(self.ring["residency"], [x["node"] for x in self.ring["checks"]], True)
            need(nodes is not None and self.copies_fit(c, nodes), "the keyring's creation is not for exactly the nodes of its residency")
        self.resident_origin(c)
        self.direct(shapes.GOVERNANCE, "keyring", c.envelope["principal"])

    def copies_fit(self, c, nodes):
        """Whether the copies in a command are for these nodes and roots of theirs;
        for the node that signed it, the root that did."""
        copies = c.content["copies"]
        return [x["node"] for x in copies] == nodes and all(
            self.w.nodes[x["node"]].has(x["root"]) and (x["node"] != c.origin or x["root"] == c.root) for x in copies
        )

    def copies_allowed(self, policy, copies):
        for x in copies:
            shapes.allow(policy, *[root["suite"] for number, root in self.w.nodes[x["node"]].roots if number == x["root"]])

    def key(self, name):
        e, self.algorithm, self.purpose, self.key_id = self.e, "", "", self.e["key_id"]
        imported = self.w.imports.pop(self.d.proposal["target"], None)
        if imported is not None:
            self.imported(imported)
            return
        if not e["key"]:  # erased with version 1
            self.w.in_order(self.created, self.d.opening)
            return
        c = self.w.command(e["key"], commands.CREATE_KEY)
        k = c.content
        need((k["keyring"], k["name"]) == (self.ring["name"], name), "the key's creation is that of another")
        need(not e["key_id"], "the evidence holds the key's creation and its identifier again")
        if self.ring["protection"] == "hardware" and k["purpose"] != "sign":
            nodes = self.w.residents(self.ring["residency"], [x["node"] for x in k["checks"]], True)
            need(nodes is not None, "the key's creation does not ask exactly the resident nodes for receipts")
        self.w.in_order(self.created, c)
        self.w.in_order(c, self.d.opening)
        self.resident_origin(c)
        self.direct(self.ring["policy"], "create", c.envelope["principal"])
        self.algorithm, self.purpose, self.key_id = k["algorithm"], k["purpose"], k["id"]

    def imported(self, d):
        """The key was made by a decision, which may be the one that the evidence is for."""
        k, hardware = d.execution.content["key"], self.ring["protection"] == "hardware"
        need(not self.e["key"] and not self.e["key_id"], "the evidence holds the key's creation besides its import")
        need(d.proposal["policy"] == self.ring["policy"], "the import was decided under another policy than the keyring's")
        need(bool(k["copies"]) == hardware, "the import has the form of the other protection")
        if hardware and k["purpose"] != "sign":
            nodes = self.w.residents(self.ring["residency"], [x["node"] for x in k["checks"]], True)
            need(nodes is not None, "the import does not ask exactly the resident nodes for receipts")
        self.w.in_order(self.created, d.opening)
        if d is not self.d:
            self.w.in_order(d.execution, self.d.opening)
        self.resident_origin(d.execution)
        self.algorithm, self.purpose, self.key_id = k["algorithm"], k["purpose"], k["id"]

    def rotation(self, key_name):
        x, w = self.d.execution, self.w
        c = x.content
        need((c["keyring"], c["key"]) == (self.ring["name"], key_name), "the commit brings a version of another key")
        self.resident_origin(x)
        self.signs = bool(c["copies"] and c["public-key"])
        asked = [y["node"] for y in c["checks"]]
        if self.ring["protection"] == "software":
            need(not c["copies"], "the commit has the form of protection hardware")
            nodes = w.residents(self.ring["residency"], asked, False)
            need(nodes is not None, "the commit does not ask exactly the resident nodes for receipts")
        else:
            need(c["copies"], "the commit has the form of protection software")
            nodes = w.residents(self.ring["residency"], [y["node"] for y in c["copies"]], False)
            need(nodes is not None and self.copies_fit(x, nodes), "the commit has not one copy for the hardware of every resident node")
            need(asked == ([] if self.signs else nodes), "the commit does not ask exactly the resident nodes for receipts")
        if self.algorithm:
            need((self.purpose == "sign") == bool(c["public-key"]), "the version has not the form of the key's purpose")
        elif self.signs:
            need(len(self.key_id) == 16, "the evidence does not say the key's identifier")
            self.algorithm = "ecdsa-p384" if len(c["public-key"]) > 65 else "ecdsa-p256"
        else:
            need(not self.key_id, "the evidence holds a key's identifier that nothing confirms")
        policy = w.policies[self.d.proposal["policy"]]
        shapes.allow(policy, commands.SUITES.get(self.algorithm))
        self.copies_allowed(policy, c["copies"])
        self.receipts(nodes, key_name)

    def kek(self):
        x, w = self.d.execution, self.w
        c = x.content
        need(c["keyring"] == self.ring["name"] and self.ring["protection"] == "software", "the commit brings a KEK of another keyring, or of one that has none")
        nodes = w.residents(self.ring["residency"], [y["node"] for y in c["checks"]], False)
        need(nodes is not None and self.copies_fit(x, nodes), "the commit is not for exactly the resident nodes and their hardware")
        self.resident_origin(x)
        self.copies_allowed(w.policies[self.d.proposal["policy"]], c["copies"])
        self.signs = False
        self.receipts(nodes, "")

    def receipts(self, nodes, key_name):
        """Verifies the receipts, after the decisions that they rest on, and the rule."""
        commit, last, given = self.d.execution.content, "", []
        for d in self.e["later"]:
            self.w.govern(self.w.decide(d))
        for raw in self.e["receipts"]:
            r = self.w.command(raw, commands.RECEIPT)
            need(r.origin > last, "the receipts are not sorted by node, or one is there twice")
            last = r.origin
            about = (r.content["keyring"], r.content["key"], r.content["version"])
            need(about == (commit["keyring"], key_name, commit["version"]), "a receipt is for another version")
            self.w.in_order(self.d.execution, r)
            need(self.shows(r, commit), f"the receipt of node {r.origin} does not show the version committed")
            given.append(r.origin)
        left = [n for n in nodes if not self.w.nodes[n].removed]
        need(left, "no node is left whose receipt could count")
        if self.ring["receipts"] == "every-node":
            need(set(left) <= set(given), "receipts are missing")
        else:
            sites = {self.w.nodes[n].site for n in left}
            need(sites <= {self.w.nodes[n].site for n in left if n in given}, "receipts of a site are missing")

    def shows(self, r, commit):
        kcv = r.content["kcv"]
        if not self.signs:
            return any(x == {"node": r.origin, "hash": hashlib.sha256(kcv).digest()} for x in commit["checks"])
        if self.algorithm not in ("ecdsa-p256", "ecdsa-p384") or r.origin not in [x["node"] for x in commit["copies"]]:
            return False
        parts = [self.w.cluster.encode(), commit["keyring"].encode(), self.key_id, None, r.origin.encode()]
        message = b"conclave/receipt/1\x00"
        for p in parts:
            message += commit["version"].to_bytes(4, "big") if p is None else len(p).to_bytes(4, "big") + p
        suite = signatures.ECDSA_P256 if self.algorithm == "ecdsa-p256" else signatures.ECDSA_P384
        return signatures.ecdsa(suite, commit["public-key"], message, kcv)

    def unchecked(self):
        l = list(NOT_PROVEN)
        if self.w.attestations:
            l.append("the attestation documents of the hardware of " + ", ".join(sorted(set(self.w.attestations))) + ": what their devices are")
        if self.d.rule["direct"]:
            l.append("the identity of the proposer, which the node checked that opened the proposal")
        return l


def judge(path, cluster):
    """The verdict on a file as a dictionary."""
    try:
        with open(path, "rb") as f:
            v = Verifier(parse(f.read(MAX_FILE + 1)), cluster)
        p = v.d.proposal
        return {"verdict": "accept", "cluster": v.w.cluster, "proposal": v.d.id, "action": p["action"], "target": p["target"], "not_checked": v.unchecked()}
    except Refused as e:
        return {"verdict": "refuse", "why": str(e)}


def main():
    a = argparse.ArgumentParser(description="verifies evidence files of Conclave")
    a.add_argument("--cluster", default="", help="identifier of the cluster, known from elsewhere")
    a.add_argument("--batch", action="store_true", help='read lines "ID FILE" and answer with a line of JSON each')
    a.add_argument("files", nargs="*")
    args = a.parse_args()
    if args.batch:
        for line in sys.stdin:
            cluster, path = line.rstrip("\n").split(" ", 1)
            print(json.dumps(judge(path, cluster)), flush=True)
        return 0
    refused = not args.files
    for path in args.files:
        v = judge(path, args.cluster)
        refused = refused or v["verdict"] != "accept"
        if v["verdict"] != "accept":
            print(f"{path}: REFUSED: {v['why']}")
            continue
        print(f"{path}: accepted: proposal {v['proposal']} to {v['action']} {v['target']} in cluster {v['cluster']}")
        for n in v["not_checked"] + ([] if args.cluster else ["which cluster this is: no identifier was given"]):
            print(f"  not checked: {n}")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
