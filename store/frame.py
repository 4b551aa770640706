"""One object's file: a 96-byte header that describes itself, then the payload.

::

    offset  bytes  content
    0       8      magic 89 4D 50 4F 0D 0A 1A 0A ("\\x89MPO\\r\\n\\x1a\\n")
    8       1      format version, 1
    9       1      kind
    10      1      encoding
    11      1      width: bytes per element that the encoding splits into planes
    12      4      zero
    16      8      raw size: bytes after decoding, little-endian
    24      8      payload size: bytes after this header, little-endian
    32      32     id of the base block for a delta, else zero
    64      32     check: BLAKE3-256 of bytes 0 to 63 followed by the payload
    96             payload

The name of the file is the object's id: the hash of the *decoded* bytes, whatever the encoding. The check lets a
copy be verified without decoding it and without its base; the id is what decoding must give.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from blake3 import blake3

from mergepipe.store.digest import Buffer, Digest

MAGIC: Final = b"\x89MPO\r\n\x1a\n"
VERSION: Final = 1
HEADER_BYTES: Final = 96
_HEAD = struct.Struct("<8sBBBB4xQQ32s")
_NO_BASE: Final = bytes(32)


class Kind(IntEnum):
    """What an object is. Blocks, files and previews share one id space; the others have one each."""

    BLOCK = 1
    FILE = 2
    NODE = 3
    COMMIT = 4
    PLAN = 5
    PREVIEW = 6


class Encoding(IntEnum):
    """How an object's payload is encoded."""

    RAW = 0
    PLANES = 1
    DELTA = 2
    DEFLATE = 3


@dataclass(frozen=True, slots=True)
class Header:
    """The header's fields. Sizes in bytes."""

    kind: Kind
    encoding: Encoding
    width: int
    raw_bytes: int
    payload_bytes: int
    base: Digest | None

    @property
    def stored_bytes(self) -> int:
        """Bytes of the whole file."""
        return HEADER_BYTES + self.payload_bytes


def pack_header(header: Header, payload: list[Buffer]) -> bytes:
    """The 96 header bytes for a payload given as parts."""
    head = _HEAD.pack(
        MAGIC,
        VERSION,
        header.kind,
        header.encoding,
        header.width,
        header.raw_bytes,
        header.payload_bytes,
        header.base or _NO_BASE,
    )
    hasher = blake3(head)
    for part in payload:
        hasher.update(part)
    return head + hasher.digest()


def unpack_header(data: Buffer) -> Header:
    """Read a header; raises ValueError that says what is wrong."""
    if len(data) < HEADER_BYTES:
        raise ValueError(f"the file has {len(data)} bytes, less than a header")
    magic, version, kind, encoding, width, raw, payload, base = _HEAD.unpack(data[: _HEAD.size])
    if magic != MAGIC:
        raise ValueError("the file does not begin as an object does")
    if version != VERSION:
        raise ValueError(f"object format version {version} is not known here")
    if kind not in set(Kind) or encoding not in set(Encoding) or width not in (1, 2, 4, 8):
        raise ValueError("the header's kind, encoding or width is not known")
    if bytes(data[12:16]) != bytes(4) or (encoding == Encoding.DELTA) == (base == _NO_BASE):
        raise ValueError("the header contradicts itself")
    found = Digest(base) if encoding == Encoding.DELTA else None
    return Header(Kind(kind), Encoding(encoding), width, raw, payload, found)


def check_matches(data: Buffer) -> bool:
    """Whether a whole file's check is right."""
    view = memoryview(data)
    hasher = blake3(view[:64])
    hasher.update(view[HEADER_BYTES:])
    return hasher.digest() == bytes(view[64:HEADER_BYTES])
