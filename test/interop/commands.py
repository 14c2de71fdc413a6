"""Commands that nodes sign: the envelope and the payloads that evidence holds."""

from cryptography.hazmat.primitives.asymmetric import ec

import shapes
import signatures
from canon import Struct, array, boolean, data, int64, text, uint
from shapes import name, names, need

DOMAIN = "conclave/command/v1"
CONTEXT = b"conclave/command/v1"
WINDOW = 600_000  # ms

SIGNED = Struct({"envelope": data, "signature": data})
ENVELOPE = Struct({
    "domain": text, "cluster": text, "type": uint(16), "version": uint(16), "origin": text, "time": int64, "nonce": data,
    "principal": text, "expect": uint(64), "idempotency": data, "request": data, "payload": data,
})
COPY = Struct({"node": text, "root": uint(32), "sealed": data})
CHECK = Struct({"node": text, "hash": data})

MATERIAL = {
    "keyring": text, "kek": uint(32), "wrapped": data, "copies": array(COPY), "generated": text, "public-key": data,
    "checks": array(CHECK),
}
CREATE_KEYRING, CREATE_KEY, OPEN, EXECUTE, COMMIT, RECEIPT, ADOPT, COMMIT_KEK, SUSPEND, IMPORT = 2, 3, 4, 6, 7, 8, 10, 15, 31, 37
KEY = Struct({**MATERIAL, "name": text, "id": data, "purpose": text, "algorithm": text, "rotation-period": int64})
PAYLOADS = {
    CREATE_KEYRING: Struct({
        "name": text, "residency": array(text), "protection": text, "policy": text, "receipts": text, "max-staleness": int64,
        "survive": boolean, "copies": array(COPY), "checks": array(CHECK),
    }),
    CREATE_KEY: KEY,
    OPEN: Struct({"proposal": data}),
    EXECUTE: Struct({"proposal": text}),
    COMMIT: Struct({**MATERIAL, "proposal": text, "key": text, "version": uint(32)}),
    RECEIPT: Struct({"keyring": text, "key": text, "version": uint(32), "kcv": data}),
    ADOPT: Struct({"root": uint(32), "copies": data}),
    SUSPEND: Struct({"statement": Struct({
        "cluster": text, "custodian": text, "credential": text, "revision": uint(64), "by": text, "with": text, "reason": text,
        "signature": data,
    })}),
    COMMIT_KEK: Struct({"proposal": text, "keyring": text, "version": uint(32), "copies": array(COPY), "checks": array(CHECK)}),
    IMPORT: Struct({"proposal": text, "key": KEY}),
}


def parse(raw):
    """The envelope of a signed command as bytes and decoded, its payload, the signature."""
    need(len(raw) <= 1 << 20, "a command is too long")
    signed = SIGNED.parse(raw)
    b, signature = signed["envelope"], signed["signature"]
    need(b and 0 < len(signature) <= 256, "a command has no envelope or signature")
    e = ENVELOPE.parse(b)
    need(e["domain"] == DOMAIN and len(e["nonce"]) == 16 and 0 < e["time"] <= shapes.MAX_TIME, "an envelope has another domain, nonce or time")
    need(len(e["idempotency"]) in (0, 32) and len(e["request"]) in (0, 32), "an envelope's idempotency key or request hash is not one")
    need(not e["idempotency"] or e["request"], "an envelope's idempotency key has no request hash")
    name(e["origin"])
    if e["principal"]:
        shapes.identity(e["principal"])
    need(e["type"] in PAYLOADS and e["version"] == 1, "the command is of another type")
    c = PAYLOADS[e["type"]].parse(e["payload"])
    CHECKS[e["type"]](e, c)
    return b, e, c, signature


def copies(l):
    names([c["node"] for c in l], 1, 128)
    for c in l:
        need(c["root"] and 0 < len(c["sealed"]) <= 16 << 10, "a sealed copy is not one")


def checks(l):
    names([c["node"] for c in l], 1, 128)
    need(all(len(c["hash"]) == 32 for c in l), "a check is not a hash")


def own_act(e):
    need(not e["principal"], "a node does this on nobody's behalf")


def no_expect(e):
    need(e["expect"] == 0, "the command has no revision to expect")


def material(c):
    """Whether the material has the form of protection hardware."""
    if not c["copies"] and not c["generated"]:
        need(c["kek"] and 0 < len(c["wrapped"]) <= 16 << 10, "the wrapped material or its KEK is missing")
        return False
    need(c["kek"] == 0 and not c["wrapped"], "material comes under a KEK or in copies, not both")
    need(c["generated"] in ("device", "host"), "where the material was generated is not a place")
    copies(c["copies"])
    return True


def create_keyring(e, c):
    name(c["name"])
    names(c["residency"], 1, 32)
    name(c["policy"])
    need(c["protection"] in ("software", "hardware") and c["receipts"] in ("every-node", "every-site"), "a keyring's protection or receipts are not known")
    need(1000 <= c["max-staleness"] <= 7 * shapes.DAY and c["policy"] != shapes.GOVERNANCE, "a keyring's staleness or policy cannot be")
    if c["protection"] == "hardware":
        need(not c["copies"] and not c["checks"], "a keyring of protection hardware has no KEK")
    else:
        copies(c["copies"])
        checks(c["checks"])
    no_expect(e)


SUITES = {"aes256-gcm": 0xC201, "ecdsa-p256": 0xC101, "ecdsa-p384": 0xC102, "ed25519": 0xC103}


def public_key(algorithm, b):
    curve = {"ecdsa-p256": ec.SECP256R1, "ecdsa-p384": ec.SECP384R1}.get(algorithm)
    if curve:
        return signatures.is_point(curve, b)
    return len(b) == (32 if algorithm == "ed25519" else 0)


def create_key(e, c):
    name(c["keyring"])
    name(c["name"])
    need(len(c["id"]) == 16 and c["algorithm"] in shapes.ALGORITHMS.get(c["purpose"], []), "a key's identifier, purpose or algorithm is not one")
    need(0 <= c["rotation-period"] <= 3650 * shapes.DAY, "a key's rotation period is out of bounds")
    hardware = material(c)
    need(public_key(c["algorithm"], c["public-key"]), "a public key does not fit its algorithm")
    if hardware and c["purpose"] != "sign":
        checks(c["checks"])
    else:
        need(not c["checks"], "a key is created with checks that it does not have")
    no_expect(e)


def import_key(e, c):
    execute(e, c)
    need(c["key"]["generated"] != "device", "imported material comes from no device")
    create_key(e, c["key"])


def open_proposal(e, c):
    shapes.proposal(c["proposal"])
    no_expect(e)


def execute(e, c):
    own_act(e)
    need(shapes.hex128(c["proposal"]), "a proposal's identifier is not one")


def commit(e, c):
    name(c["keyring"])
    name(c["key"])
    execute(e, c)
    need(c["version"] >= 2 and len(c["public-key"]) <= 4 << 10, "a rotation's version or public key is not one")
    if not material(c) or c["checks"]:
        checks(c["checks"])


def commit_kek(e, c):
    name(c["keyring"])
    execute(e, c)
    need(c["version"] >= 2, "a KEK rotation's version is not one")
    copies(c["copies"])
    checks(c["checks"])


def receipt(e, c):
    name(c["keyring"])
    if c["key"]:
        name(c["key"])
    need(c["version"] and 0 < len(c["kcv"]) <= 256, "a receipt has no version or value")
    own_act(e)
    no_expect(e)


def adopt(e, c):
    need(c["root"] and len(c["copies"]) == 32, "an adoption has no root or digest")
    own_act(e)
    no_expect(e)


def suspend(e, c):
    shapes.suspension(c["statement"])
    no_expect(e)


CHECKS = {
    CREATE_KEYRING: create_keyring, CREATE_KEY: create_key, OPEN: open_proposal, EXECUTE: execute, COMMIT: commit, RECEIPT: receipt,
    ADOPT: adopt, COMMIT_KEK: commit_kek, SUSPEND: suspend, IMPORT: import_key,
}
