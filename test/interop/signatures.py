"""The signature suites of pqc/DESIGN.md, and the checks of public keys."""

import base64
import hashlib

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, utils, x25519

import mldsa65

ECDSA_P256, ECDSA_P384, ED25519, MLDSA65_ED25519 = 0xC101, 0xC102, 0xC103, 0xC104

# public key and signature in bytes
SIZES = {ECDSA_P256: (65, 64), ECDSA_P384: (97, 96), ED25519: (32, 64), MLDSA65_ED25519: (1984, 3373)}

# KEM suites: parameter k of ML-KEM, curve of the point behind it
KEMS = {0x0050: (3, ec.SECP256R1), 0x0051: (4, ec.SECP384R1), 0x647A: (3, None)}

CURVES = {ECDSA_P256: (ec.SECP256R1, hashes.SHA256), ECDSA_P384: (ec.SECP384R1, hashes.SHA384)}

PREFIX = b"CompositeAlgorithmSignatures2025"
LABEL = b"COMPSIG-MLDSA65-Ed25519-SHA512"

_verified = {}  # what was asked before: files of one cluster share most signatures


def fingerprint(public_key):
    return "SHA256:" + base64.b64encode(hashlib.sha256(public_key).digest()).decode().rstrip("=")


def verify(suite, public_key, message, context, signature):
    """Whether the signature of message under context (bytes, at most 255) verifies."""
    if suite not in SIZES or (len(public_key), len(signature)) != SIZES[suite] or len(context) > 255:
        return False
    asked = (suite, public_key, hashlib.sha256(message).digest(), context, signature)
    if asked not in _verified:
        _verified[asked] = _verify(suite, public_key, message, context, signature)
    return _verified[asked]


def _verify(suite, public_key, message, context, signature):
    if suite == MLDSA65_ED25519:
        m = PREFIX + LABEL + bytes([len(context)]) + context + hashlib.sha512(message).digest()
        return mldsa65.verify(public_key[:1952], m, LABEL, signature[:3309]) and _ed25519(public_key[1952:], m, signature[3309:])
    signed = bytes([len(context)]) + context + message
    if suite == ED25519:
        return _ed25519(public_key, signed, signature)
    return ecdsa(suite, public_key, signed, signature)


def _ed25519(public_key, message, signature):
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
        return True
    except (InvalidSignature, ValueError):
        return False


def ecdsa(suite, public_key, message, signature):
    """ECDSA with a signature r || s of fixed length, over the message itself."""
    curve, digest = CURVES[suite]
    if len(signature) != SIZES[suite][1]:
        return False
    n = len(signature) // 2
    r, s = int.from_bytes(signature[:n], "big"), int.from_bytes(signature[n:], "big")
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(curve(), public_key)
        key.verify(utils.encode_dss_signature(r, s), message, ec.ECDSA(digest()))
        return True
    except (InvalidSignature, ValueError):
        return False


def is_point(curve, b):
    """Whether b is an uncompressed point (SEC 1) on the curve."""
    try:
        ec.EllipticCurvePublicKey.from_encoded_point(curve(), b)
        return b[:1] == b"\x04"
    except ValueError:
        return False


def is_signature_key(suite, b):
    """Whether b can be a credential's public key of the suite."""
    if suite not in SIZES or len(b) != SIZES[suite][0]:
        return False
    return suite not in CURVES or is_point(CURVES[suite][0], b)


def is_kem_key(suite, b):
    """Whether b is a public key of a KEM suite: an ML-KEM key, then a point."""
    if suite not in KEMS:
        return False
    k, curve = KEMS[suite]
    size = 384 * k + 32
    point = b[size:]
    if len(point) != {None: 32, ec.SECP256R1: 65, ec.SECP384R1: 97}[curve]:
        return False
    for at in range(0, 384 * k, 3):  # two coefficients of 12 bits, each below q
        if b[at] | (b[at + 1] & 15) << 8 >= 3329 or b[at + 1] >> 4 | b[at + 2] << 4 >= 3329:
            return False
    if curve is not None:
        return is_point(curve, point)
    try:  # no point of small order
        x25519.X25519PrivateKey.generate().exchange(x25519.X25519PublicKey.from_public_bytes(point))
        return True
    except ValueError:
        return False
