#!/usr/bin/env python3
"""Checks what this verifier brings itself, ML-DSA-65 and the composite signature,
against known answers: Wycheproof's mldsa_65_verify_test.json, and the composite
signature published by the working group (test/vectors/pqc).

usage: known_answers.py WYCHEPROOF.json COMPOSITE.json"""

import base64
import json
import sys

import mldsa65
import signatures


def wycheproof(path):
    with open(path, encoding="utf-8") as f:
        vectors = json.load(f)
    valid = invalid = 0
    for group in vectors["testGroups"]:
        key = bytes.fromhex(group["publicKey"])
        for t in group["tests"]:
            context = bytes.fromhex(t.get("ctx", ""))
            got = mldsa65.verify(key, bytes.fromhex(t["msg"]), context, bytes.fromhex(t["sig"]))
            if got != (t["result"] == "valid"):
                sys.exit(f"ML-DSA-65 test {t['tcId']} ({t['comment']}): {got}, want {t['result']}")
            valid, invalid = valid + got, invalid + (not got)
    if valid + invalid != vectors["numberOfTests"] or not valid or not invalid:
        sys.exit("not all tests were there")
    print(f"ML-DSA-65: {valid} valid, {invalid} invalid")


def composite(path):
    with open(path, encoding="utf-8") as f:
        v = json.load(f)
    key, message, signature = (base64.b64decode(v[x]) for x in ("publicKey", "message", "signature"))
    if not signatures.verify(signatures.MLDSA65_ED25519, key, message, b"", signature):
        sys.exit("the published composite signature does not verify")
    for at in (5, 3308, 3310, len(signature) - 1):
        bad = bytearray(signature)
        bad[at] ^= 1
        if signatures.verify(signatures.MLDSA65_ED25519, key, message, b"", bytes(bad)):
            sys.exit(f"a composite signature with byte {at} changed verifies")
    print("composite signature: 1 valid, 4 invalid")


if __name__ == "__main__":
    wycheproof(sys.argv[1])
    composite(sys.argv[2])
