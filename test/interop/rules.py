"""Who may decide what: the arithmetic of quorums, and the rule for a proposal."""

import shapes
from canon import Refused
from shapes import need, quorum


def possible(policy, custodians):
    """Refuses a policy of which the custodians could not meet a quorum."""
    active = [c for c in custodians if not c["revoked"] and any(not k["suspended"] for k in c["credentials"])]
    sites = {c["site"] for c in active}
    for r in policy["rules"]:
        if r["direct"]:
            continue
        need(quorum(r), "a rule has no thresholds")
        from_sites = max(r["sites"], len(r["required"]))
        need(max(r["approvals"], from_sites) <= len(active), "a rule needs more custodians than there are")
        need(from_sites <= len(sites), "a rule needs more sites than have custodians")
        need(set(r["required"]) <= sites, "a rule requires a site without custodians")
        known = {c["id"] for c in custodians}
        need(set(r["veto"]) <= known, "a rule gives a veto to nobody")
        if r["need"]:
            need(set(shapes.group_names(r["need"], "custodians")) <= known, "a group names nobody")
            need(weighs(r["need"], [c["id"] for c in active], [c["site"] for c in active]), "a group cannot be met")


def weighs(group, custodians, sites):
    """Whether approvals of these custodians, with their sites one by one, meet a group."""
    met_members = [c["weight"] for c in group["custodians"] if c["name"] in custodians]
    met_members += [s["weight"] for s in group["sites"] if sites.count(s["name"]) >= s["approvals"]]
    met_members += [g["weight"] for g in group["groups"] if weighs(g, custodians, sites)]
    return sum(met_members) >= group["need"]


def terms(group):
    """The groups all of which a group asks for."""
    if group is None:
        return []
    only = not group["custodians"] and not group["sites"] and all(g["weight"] == 1 for g in group["groups"])
    return group["groups"] if only and group["need"] == len(group["groups"]) else [{**group, "weight": 1}]


def joined(a, b):
    """The group that asks for both."""
    parts = []
    for t in terms(a) + terms(b):
        if t not in parts:
            parts.append(t)
    if len(parts) < 2:
        return {**parts[0], "weight": 0} if parts else None
    return {"need": len(parts), "weight": 0, "custodians": [], "sites": [], "groups": parts}


def restorable(policies, custodians, without=None):
    """Refuses custodians of whom those that count could not restore a suspended credential."""
    custodians = list(custodians)
    if any(not c["revoked"] and any(k["suspended"] for k in c["credentials"]) for c in custodians):
        left = [dict(c, revoked=c["revoked"] or c["id"] == without) for c in custodians]
        rule = rule_of(policies[shapes.GOVERNANCE], "custodian")
        possible({"rules": [rule] if rule else []}, left)


def met(rule, proposer, custodians, approvers):
    """Whether the approvals of these custodians meet a quorum rule."""
    if not quorum(rule):
        return False
    _, role, who = shapes.identity(proposer)
    counted = set()
    for c in approvers:
        own = role == "custodian" and who == c and not rule["proposer-may-approve"]
        if c in custodians and not custodians[c]["revoked"] and not own:
            counted.add(c)
    each = [custodians[c]["site"] for c in counted]
    sites = set(each)
    if rule["need"] and not weighs(rule["need"], counted, each):
        return False
    return len(counted) >= rule["approvals"] and len(sites) >= rule["sites"] and set(rule["required"]) <= sites


def stricter(rule, other):
    """The rule that takes what both take. Only quorum rules come here."""
    if not quorum(rule) or not quorum(other):
        raise Refused(f"there is no quorum for {rule['action']!r}")
    both = dict(rule)
    both["need"] = joined(rule["need"], other["need"])
    for f in ("approvals", "sites", "delay", "not-before", "unused"):
        both[f] = max(rule[f], other[f])
    for f in ("required", "veto"):
        both[f] = sorted(set(rule[f]) | set(other[f]))
    both["lifetime"] = min(rule["lifetime"], other["lifetime"])
    both["proposer-may-approve"] = rule["proposer-may-approve"] and other["proposer-may-approve"]
    both["sites"] = max(both["sites"], len(both["required"]))
    both["approvals"] = max(both["approvals"], both["sites"])
    return both


def at_least(rule, other):
    """rule with the thresholds and vetoes of other, not its times, if that is a quorum."""
    if other is None or not quorum(other):
        return rule
    return stricter(rule, {**other, "delay": 0, "not-before": 0, "unused": 0, "lifetime": rule["lifetime"]})


def thresholds(n, sites, required=()):
    return {"direct": [], "approvals": n, "sites": sites, "required": list(required), "veto": [], "proposer-may-approve": True,
            "need": None, "not-before": 0, "unused": 0}


def with_site(rule, site):
    return at_least(rule, thresholds(1, 1, [site]))


def rule_of(policy, action):
    return next((r for r in policy["rules"] if r["action"] == action), None)


def rule_for(w, p, params):
    """The rule that decides a proposal in a world w (replay.World)."""
    need((p["action"] in shapes.GOVERNANCE_ACTIONS) == (p["policy"] == shapes.GOVERNANCE), "the policy does not decide the action")
    policy = w.policies.get(p["policy"])
    need(policy is not None, f"there is no policy {p['policy']}")
    need(policy["revision"] == p["policy-revision"], f"policy {p['policy']} has another revision than the proposal was made under")
    rule = rule_of(policy, p["action"])
    need(rule is not None, f"policy {p['policy']} has no rule for {p['action']!r}")
    _, name = shapes.target(p["target"])
    if p["action"] == "policy":
        return _for_policy(w, rule, name, params)
    if p["action"] == "custodian" and not params["custodian"]["revoked"] and not params["restore"]:
        return _for_custodian(w, rule, params["custodian"]["site"])
    if p["action"] == "node" and params["change"] != "remove":
        if params["change"] == "join":
            return with_site(rule, params["site"])
        need(name in w.nodes, f"there is no node {name}")
        return with_site(rule, w.nodes[name].site)
    if p["action"] == "site" and params["change"] == "cas" and w.enrolled(name):
        return with_site(rule, name)
    if p["action"] == "recovery-key":
        rule = at_least(rule, thresholds(2, 2))
        for site in params["residency"]:
            rule = with_site(rule, site)
    return rule


def _for_custodian(w, rule, site):
    for policy in w.policies.values():
        for r in policy["rules"]:
            rule = at_least(rule, r)
    if w.enrolled(site):
        rule = with_site(rule, site)
    shapes.rule(rule)
    return rule


def _for_policy(w, rule, name, params):
    after = {r["action"]: r for r in params["rules"]}
    if name == shapes.GOVERNANCE and "policy" in after:
        rule = stricter(rule, after["policy"])
    if name in w.policies:
        old = w.policies[name]
        before = {r["action"]: r for r in old["rules"]}
        same = old["attested"] == params["attested"] and old["forbid"] == params["forbid"]
        for a in shapes.KEY_ACTIONS + shapes.GOVERNANCE_ACTIONS:
            if same and a in before and before[a] == after.get(a):
                continue
            rule = at_least(at_least(rule, before.get(a)), after.get(a))
    shapes.rule(rule)
    return rule
