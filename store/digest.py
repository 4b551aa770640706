"""Ids: BLAKE3-256 of decoded bytes, as a type with one parser and one short form.

Blocks and files are hashed plainly, so ``b3sum`` on the same bytes gives the same id. Manifest nodes, commits
and plans are hashed in BLAKE3's key-derivation mode under a context of their own, so that no checkpoint file can
be made to carry the id of a commit.
"""

from __future__ import annotations

import re
from typing import Final, TypeAlias

from blake3 import blake3

DIGEST_BYTES: Final = 32
Buffer: TypeAlias = bytes | bytearray | memoryview
_HEX = re.compile(r"[0-9a-f]{64}\Z")


class Digest(bytes):
    """A BLAKE3-256 id: 32 bytes, written as 64 lower-case hexadecimal digits."""

    __slots__ = ()

    def __new__(cls, value: bytes) -> Digest:
        if len(value) != DIGEST_BYTES:
            raise ValueError(f"an id has {DIGEST_BYTES} bytes, not {len(value)}")
        return super().__new__(cls, value)

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Read 64 lower-case hexadecimal digits; raises ValueError on anything else."""
        if not _HEX.match(text):
            raise ValueError(f"not an id: {text[:80]!r}")
        return cls(bytes.fromhex(text))

    @property
    def short(self) -> str:
        """The first twelve digits, as people see ids."""
        return self.hex()[:12]

    def __str__(self) -> str:
        return self.hex()

    def __repr__(self) -> str:
        return f"Digest({self.short})"


def hash_bytes(data: Buffer) -> Digest:
    """The id of a block or a file's content; releases the GIL for inputs over 2 KiB."""
    return Digest(blake3(data).digest())


def hash_record(kind: str, data: Buffer) -> Digest:
    """The id of a structural object (``node``, ``commit``, ``plan``, ``recipe``, ``tensor``)."""
    return Digest(blake3(data, derive_key_context=f"mergepipe v1 {kind}").digest())
