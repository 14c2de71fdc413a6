"""ML-DSA-65 verification (FIPS 204), written for clarity and checked against
Wycheproof's known answers (known_answers.py). Nothing in it is secret, so nothing
in it has to take constant time."""

import functools
import hashlib

Q = 8380417
D = 13
TAU = 49  # ones in the challenge
GAMMA1 = 1 << 19
GAMMA2 = (Q - 1) // 32
K, L = 6, 5  # rows and columns of the matrix
BETA = 196
OMEGA = 55
CHALLENGE = 48  # bytes
PUBLIC_KEY = 32 + K * 320
SIGNATURE = CHALLENGE + L * 640 + OMEGA + K


def _bit_reverse(n):
    return int(format(n, "08b")[::-1], 2)


ZETAS = [pow(1753, _bit_reverse(i), Q) for i in range(256)]


def _ntt(w):
    """Algorithm 41. The coefficients of the result need not be reduced."""
    w, m, n = list(w), 0, 128
    while n:
        for s in range(0, 256, 2 * n):
            m += 1
            z = ZETAS[m]
            a, b = w[s : s + n], [z * x % Q for x in w[s + n : s + 2 * n]]
            w[s : s + n] = [x + y for x, y in zip(a, b)]
            w[s + n : s + 2 * n] = [x - y for x, y in zip(a, b)]
        n //= 2
    return w


def _inverse_ntt(w):
    """Algorithm 42."""
    w, m, n = list(w), 256, 1
    while n < 256:
        for s in range(0, 256, 2 * n):
            m -= 1
            z = -ZETAS[m]
            a, b = w[s : s + n], w[s + n : s + 2 * n]
            w[s : s + n] = [x + y for x, y in zip(a, b)]
            w[s + n : s + 2 * n] = [z * (x - y) % Q for x, y in zip(a, b)]
        n *= 2
    return [8347681 * x % Q for x in w]


def _reject_ntt(seed):
    """Algorithm 30."""
    size = 840
    while True:
        stream = hashlib.shake_128(seed).digest(size)
        out = []
        for i in range(0, size, 3):
            x = stream[i] | stream[i + 1] << 8 | (stream[i + 2] & 0x7F) << 16
            if x < Q:
                out.append(x)
                if len(out) == 256:
                    return out
        size *= 2


def _unpack(b, bits):
    """Algorithm 18: 256 numbers of so many bits, little endian."""
    n, mask = int.from_bytes(b, "little"), (1 << bits) - 1
    return [n >> i * bits & mask for i in range(256)]


@functools.lru_cache(maxsize=256)
def _expand(public_key):
    """The matrix (algorithm 32), -t1 * 2^d in the NTT domain, and the key's hash."""
    rho = public_key[:32]
    matrix = [[_reject_ntt(rho + bytes([s, r])) for s in range(L)] for r in range(K)]
    t1 = []
    for r in range(K):
        coefficients = _unpack(public_key[32 + 320 * r : 352 + 320 * r], 10)
        t1.append([-x % Q for x in _ntt([x << D for x in coefficients])])
    return matrix, t1, hashlib.shake_256(public_key).digest(64)


def _sample_in_ball(challenge):
    """Algorithm 29."""
    stream = hashlib.shake_256(challenge).digest(1024)
    signs, at = int.from_bytes(stream[:8], "little"), 8
    c = [0] * 256
    for i in range(256 - TAU, 256):
        while stream[at] > i:
            at += 1
        j = stream[at]
        at += 1
        c[i] = c[j]
        c[j] = -1 if signs >> (i + TAU - 256) & 1 else 1
    return c


def _unpack_hint(y):
    """Algorithm 21; None if y is not the encoding of a hint."""
    hints, index = [], 0
    for i in range(K):
        end = y[OMEGA + i]
        if end < index or end > OMEGA:
            return None
        ones = y[index:end]
        if any(a >= b for a, b in zip(ones, ones[1:])):
            return None
        hints.append(set(ones))
        index = end
    return None if any(y[index:OMEGA]) else hints


def _use_hint(row, ones):
    """Algorithm 40, for a polynomial."""
    out = []
    for i, r in enumerate(row):
        r0 = r % (2 * GAMMA2)
        if r0 > GAMMA2:
            r0 -= 2 * GAMMA2
        if r - r0 == Q - 1:
            r1, r0 = 0, r0 - 1
        else:
            r1 = (r - r0) // (2 * GAMMA2)
        if i in ones:
            r1 = (r1 + 1 if r0 > 0 else r1 - 1) % 16
        out.append(r1)
    return out


def verify(public_key, message, context, signature):
    """Algorithms 3 and 8: whether the signature of message under context verifies."""
    if len(public_key) != PUBLIC_KEY or len(signature) != SIGNATURE or len(context) > 255:
        return False
    challenge = signature[:CHALLENGE]
    z = []
    for i in range(L):
        at = CHALLENGE + 640 * i
        z.append([GAMMA1 - x for x in _unpack(signature[at : at + 640], 20)])
    hints = _unpack_hint(signature[CHALLENGE + 640 * L :])
    if hints is None or any(abs(x) >= GAMMA1 - BETA for row in z for x in row):
        return False
    matrix, t1, key_hash = _expand(bytes(public_key))
    mu = hashlib.shake_256(key_hash + b"\x00" + bytes([len(context)]) + context + message).digest(64)
    c = _ntt(_sample_in_ball(challenge))
    z = [_ntt(row) for row in z]
    packed = b""
    for r in range(K):
        w = [x * y for x, y in zip(c, t1[r])]
        for s in range(L):
            w = [x + y * v for x, y, v in zip(w, matrix[r][s], z[s])]
        w1 = _use_hint(_inverse_ntt([x % Q for x in w]), hints[r])
        packed += bytes(w1[i] | w1[i + 1] << 4 for i in range(0, 256, 2))
    return hashlib.shake_256(mu + packed).digest(CHALLENGE) == challenge
