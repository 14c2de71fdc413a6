"""The one encoding of everything that is signed or hashed: CBOR in core
deterministic form (RFC 8949, section 4.2.1), restricted to integers, byte and text
strings, arrays, maps and booleans. Decoding is strict: whatever is not exactly what
encode would write is refused. A schema then says which fields a map must have."""

MAX_SIZE = 8 << 20
MAX_DEPTH = 16


class Refused(Exception):
    """What was given does not hold. Its text says why."""


def encode(v):
    if v is True or v is False:
        return b"\xf5" if v else b"\xf4"
    if isinstance(v, int):
        return _head(0, v) if v >= 0 else _head(1, -1 - v)
    if isinstance(v, bytes):
        return _head(2, len(v)) + v
    if isinstance(v, str):
        b = v.encode()
        return _head(3, len(b)) + b
    if isinstance(v, list):
        return _head(4, len(v)) + b"".join(map(encode, v))
    pairs = sorted((encode(k), encode(x)) for k, x in v.items())
    return _head(5, len(v)) + b"".join(k + x for k, x in pairs)


def _head(major, n):
    if n < 24:
        return bytes([major << 5 | n])
    for info, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if n < 1 << 8 * size:
            return bytes([major << 5 | info]) + n.to_bytes(size, "big")
    raise Refused("canon: a number is too large")


def decode(b):
    if len(b) > MAX_SIZE:
        raise Refused(f"canon: {len(b)} bytes exceed the limit")
    v, end = _item(b, 0, 0)
    if end != len(b):
        raise Refused("canon: bytes follow the value")
    return v


def _item(b, at, depth):
    if depth > MAX_DEPTH:
        raise Refused("canon: nested too deeply")
    major, n, at = _read_head(b, at)
    if major == 0:
        return n, at
    if major == 1:
        return -1 - n, at
    if major in (2, 3):
        if n > len(b) - at:
            raise Refused("canon: a string is cut short")
        s = bytes(b[at : at + n])
        if major == 2:
            return s, at + n
        try:
            return s.decode("utf-8"), at + n
        except UnicodeDecodeError as e:
            raise Refused("canon: a text is not UTF-8") from e
    if major == 4:
        if n > 100_000:
            raise Refused("canon: an array is too long")
        items = []
        for _ in range(n):
            v, at = _item(b, at, depth + 1)
            items.append(v)
        return items, at
    if major == 5:
        return _map(b, at, n, depth)
    if major == 7 and n in (20, 21):
        return n == 21, at
    raise Refused("canon: a kind of value that has no place here")


def _map(b, at, n, depth):
    if n > 10_000:
        raise Refused("canon: a map is too long")
    out, last = {}, b""
    for _ in range(n):
        start = at
        k, at = _item(b, at, depth + 1)
        encoded = b[start:at]
        if not isinstance(k, str) or encoded <= last:
            raise Refused("canon: the fields of a map are not in order, or one is there twice")
        last = encoded
        out[k], at = _item(b, at, depth + 1)
    return out, at


def _read_head(b, at):
    if at >= len(b):
        raise Refused("canon: it is cut short")
    major, info = b[at] >> 5, b[at] & 31
    if info < 24:
        return major, info, at + 1
    size = {24: 1, 25: 2, 26: 4, 27: 8}.get(info)
    if size is None or major == 7 or at + 1 + size > len(b):
        raise Refused("canon: it is cut short, or has a form that has no place here")
    n = int.from_bytes(b[at + 1 : at + 1 + size], "big")
    if n < (24 if size == 1 else 1 << 4 * size):
        raise Refused("canon: a number is not in its shortest form")
    return major, n, at + 1 + size


# Schemas: functions that refuse what does not have the type.


def text(v):
    if not isinstance(v, str):
        raise Refused("canon: a text is missing")


def data(v):
    if not isinstance(v, bytes):
        raise Refused("canon: a byte string is missing")


def boolean(v):
    if not isinstance(v, bool):
        raise Refused("canon: a truth value is missing")


def uint(bits):
    def check(v):
        if isinstance(v, bool) or not isinstance(v, int) or not 0 <= v < 1 << bits:
            raise Refused(f"canon: a number of {bits} bits is missing")

    return check


def int64(v):
    if isinstance(v, bool) or not isinstance(v, int) or not -(1 << 63) <= v < 1 << 63:
        raise Refused("canon: a signed number of 64 bits is missing")


def array(of):
    def check(v):
        if not isinstance(v, list):
            raise Refused("canon: an array is missing")
        for x in v:
            of(x)

    return check


class Struct:
    """A map with exactly these fields. An optional one is left out where its value
    is false, 0 or empty, and only there; omitted gives it back as that value."""

    def __init__(self, fields, omitted=None):
        self.fields, self.omitted = fields, omitted or {}

    def __call__(self, v):
        if not isinstance(v, dict):
            raise Refused("canon: a map is missing")
        for name, of in self.fields.items():
            if name in v:
                of(v[name])
                if name in self.omitted and v[name] == self.omitted[name]:
                    raise Refused(f"canon: the field {name} is empty and should not be there")
            elif name in self.omitted:
                v[name] = self.omitted[name]
            else:
                raise Refused(f"canon: the field {name} is missing")
        if len(v) != len(self.fields):
            raise Refused("canon: a field is not known")

    def parse(self, b):
        v = decode(b)
        self(v)
        return v
