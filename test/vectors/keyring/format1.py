#!/usr/bin/env python3
"""Makes format1.json: known answers for kms/keyring.

Independent of the Go code: written from kms/keyring/DESIGN.md with Python's
hmac and hashlib, AES-GCM and EC arithmetic of the package `cryptography`
(OpenSSL), and a CBOR encoder of its own. Inputs are fixed, so that the output
is the same every time:  python3 format1.py > format1.json
"""
import hashlib, hmac, json, struct
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat


def fixed(label, n):
    """n bytes that look random and are always the same."""
    return hashlib.shake_256(label.encode()).digest(n)


def kdf(digest, key, label, context, n):
    out, i = b"", 1
    while len(out) < n:
        data = struct.pack(">I", i) + label.encode() + b"\0" + context + struct.pack(">I", 8 * n)
        out += hmac.new(key, data, digest).digest()
        i += 1
    return out[:n]


def head(major, n):
    if n < 24:
        return bytes([major << 5 | n])
    if n < 256:
        return bytes([major << 5 | 24, n])
    if n < 65536:
        return bytes([major << 5 | 25]) + struct.pack(">H", n)
    return bytes([major << 5 | 26]) + struct.pack(">I", n)


def cbor(v):
    """RFC 8949, core deterministic encoding, of what is needed here."""
    if isinstance(v, int):
        return head(0, v)
    if isinstance(v, bytes):
        return head(2, len(v)) + v
    if isinstance(v, str):
        return head(3, len(v.encode())) + v.encode()
    if isinstance(v, dict):
        pairs = sorted((cbor(k), cbor(x)) for k, x in v.items())
        return head(5, len(pairs)) + b"".join(k + x for k, x in pairs)
    raise TypeError(type(v))


def encode_context(context):
    out = struct.pack(">H", len(context))
    for k in sorted(context, key=lambda s: s.encode()):
        for s in (k.encode(), context[k].encode()):
            out += struct.pack(">H", len(s)) + s
    return out


def message(name, version, context, plaintext):
    key, key_id, nonce = fixed(name + " key", 32), fixed(name + " id", 16), fixed(name + " nonce", 24)
    header = b"CV" + b"\x01" + struct.pack(">H", 0xC201) + key_id + struct.pack(">I", version) + nonce
    label = b"conclave/message-secret/1"
    secret_input = struct.pack(">I", 1) + label + b"\0" + header + struct.pack(">I", 256)
    secret = hmac.new(key, secret_input, "sha256").digest()
    aad = header + encode_context(context)
    keys = kdf("sha256", secret, "conclave/message-keys/1", aad, 64)
    sealed = AESGCM(keys[:32]).encrypt(bytes(12), plaintext, aad)
    return {
        "name": name, "key": key.hex(), "key_id": key_id.hex(), "version": version, "context": context,
        "plaintext": plaintext.hex(), "message_secret_input": secret_input.hex(), "message_secret": secret.hex(),
        "aad": aad.hex(), "message_key": keys[:32].hex(), "commitment": keys[32:].hex(),
        "ciphertext": (header + keys[32:] + sealed).hex(),
    }


SIZES = {"aes256-gcm": 32, "hmac-sha256": 32, "ecdsa-p256": 32, "ecdsa-p384": 48, "ed25519": 32}


def wrapped(algorithm, purpose):
    kek, nonce, material = fixed("kek", 32), fixed(algorithm + " wrap", 12), fixed(algorithm + " material", SIZES[algorithm])
    key_id = fixed("wrapped id", 16)
    aad = cbor({"domain": "conclave/wrapped-key/1", "cluster": "0123456789abcdef", "keyring": "coalition", "kek": 3,
                "key-id": key_id, "version": 300, "algorithm": algorithm, "purpose": purpose})
    return {"algorithm": algorithm, "purpose": purpose, "cluster": "0123456789abcdef", "keyring": "coalition", "kek_version": 3,
            "key_id": key_id.hex(), "version": 300, "kek": kek.hex(), "material": material.hex(), "aad": aad.hex(),
            "wrapped": (b"\x01" + nonce + AESGCM(kek).encrypt(nonce, material, aad)).hex()}


def check(key_id, node):
    material = fixed("checked material", 32)
    context = cbor({"cluster": "0123456789abcdef", "keyring": "coalition", "key-id": key_id, "version": 7, "node": node})
    kcv = kdf("sha512", material, "conclave/check-value/1", context, 32)
    return {"material": material.hex(), "cluster": "0123456789abcdef", "keyring": "coalition", "key_id": key_id.hex(),
            "version": 7, "node": node, "kcv": kcv.hex(), "hash": hashlib.sha256(kcv).hexdigest()}


def device_check(key_id, node):
    material = fixed("device checked material", 32)
    context = cbor({"cluster": "0123456789abcdef", "keyring": "coalition", "key-id": key_id, "version": 7, "node": node})
    kcv = kdf("sha256", material, "conclave/check-value/2", context, 32)
    return {"material": material.hex(), "cluster": "0123456789abcdef", "keyring": "coalition", "key_id": key_id.hex(),
            "version": 7, "node": node, "kcv": kcv.hex(), "hash": hashlib.sha256(kcv).hexdigest()}


def generated(algorithm):
    entropy, size = fixed(algorithm + " entropy", 64), SIZES.get(algorithm, 32)
    material = kdf("sha512", entropy, "conclave/generate/1", algorithm.encode() + struct.pack(">I", 0), size)
    public = b""
    if algorithm.startswith("ecdsa"):
        curve = ec.SECP256R1() if algorithm.endswith("256") else ec.SECP384R1()
        public = ec.derive_private_key(int.from_bytes(material, "big"), curve).public_key().public_bytes(
            Encoding.X962, PublicFormat.UncompressedPoint)
    elif algorithm == "ed25519":
        public = ed25519.Ed25519PrivateKey.from_private_bytes(material).public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return {"algorithm": algorithm, "entropy": entropy.hex(), "material": material.hex(), "public_key": public.hex()}


print(json.dumps({
    "note": "made by format1.py beside this file, which does not share code with the product",
    "messages": [
        message("empty", 1, {}, b""),
        message("one-byte", 2, {}, b"\x00"),
        message("context", 0xFFFFFFFF, {"b": "2", "a": "1", "aa": "", "B": "upper", "ü": "ñandú"}, b"attack at dawn"),
        message("block-boundary", 256, {"service": "payroll"}, bytes(range(256)) * 4),
        message("long-context", 5, {"name-%02d" % i: "v" * 100 for i in range(64)}, b"x" * 17),
    ],
    "wrapped": [wrapped("aes256-gcm", "encrypt"), wrapped("hmac-sha256", "mac"), wrapped("ecdsa-p256", "sign"),
                wrapped("ecdsa-p384", "sign"), wrapped("ed25519", "sign")],
    "checks": [check(fixed("checked id", 16), "fr-1"), check(fixed("checked id", 16), "de-1"), check(bytes(16), "fr-1")],
    "device_checks": [device_check(fixed("checked id", 16), "fr-1"), device_check(fixed("checked id", 16), "de-1")],
    "generated": [generated(a) for a in list(SIZES) + ["kek"]],
}, indent=1, ensure_ascii=True))
