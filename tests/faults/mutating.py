"""Damages to the content of a file."""

from __future__ import annotations

import random

STRANGE = [b"\x00", b"\xff\xfe", b"!!python/object/apply:os.system [true]", b": ", b"- [", b"&a *a",
           b"1e999", b"-1", b"null", b"{", b'"', b"\n\n\t", b"99999999999999999999"]  # fmt: skip


def mutate(content: bytes, chance: random.Random) -> bytes:
    """Cut, insert something strange, repeat or overwrite a part, or flip some bits."""
    kind, where = chance.randrange(6), chance.randrange(max(len(content), 1))
    if kind == 0:
        return content[:where]
    if kind == 1:
        return content[:where] + chance.choice(STRANGE) + content[where:]
    if kind == 2:
        return content[:where] + content[where : where + chance.randrange(400)] * 2
    if kind == 3:
        return content[:where] + chance.randbytes(chance.randrange(1, 64)) + content[where + 8 :]
    changed = bytearray(content)
    for _ in range(chance.randrange(1, 11)):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)
