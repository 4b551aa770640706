"""The safetensors format: reading its header from a stranger, and writing one.

Specification: eight bytes of header length (little-endian), the header (JSON), then the tensors' bytes. The header
maps names to ``{"dtype", "shape", "data_offsets": [begin, end]}``; ``__metadata__`` maps text to text. Tensors cover
the data without gaps or overlaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mergepipe.store.canonical import brief, load_strict
from mergepipe.store.dtypes import DTYPES, DType
from mergepipe.store.errors import BadInputError

MAXIMUM_HEADER_BYTES: Final = 100_000_000  # the format's own limit
MAXIMUM_DIMENSIONS: Final = 64


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """One tensor of a file. ``begin`` and ``end`` are offsets in bytes from the first byte after the header."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A file's first bytes as they are, and what they say. ``entries`` are in the order of their offsets."""

    raw: bytes
    entries: tuple[HeaderEntry, ...]
    metadata: Mapping[str, str]

    @property
    def data_bytes(self) -> int:
        """Bytes that follow the header."""
        return self.entries[-1].end if self.entries else 0


def read_header(path: Path) -> SafetensorsHeader:
    """Read and check a file's header against the file's size.

    Raises:
        BadInputError: the file is cut off, or its header lies; the message names the file and the tensor.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAXIMUM_HEADER_BYTES, size - 8):
                raise BadInputError(
                    f"{path}: the file has {size} bytes and its header should have {length}",
                    hint="The file is cut off or is no safetensors file. Download it again.",
                )
            raw = file.read(length)
    except OSError as error:
        raise BadInputError(f"{path}: cannot be read: {os.strerror(error.errno or 0)}") from error
    return parse_header(length.to_bytes(8, "little") + raw, size - 8 - length, str(path))


def parse_header(raw: bytes, data_bytes: int | None, what: str) -> SafetensorsHeader:
    """Check header bytes (with the eight bytes of length) for a file with ``data_bytes`` after them (None: any).

    Raises:
        BadInputError: not a valid header; the message begins with ``what``.
    """
    if len(raw) < 8 or int.from_bytes(raw[:8], "little") != len(raw) - 8:
        raise BadInputError(f"{what}: the header's length is not what it says")
    value = load_strict(raw[8:], f"{what}: the header")
    if not isinstance(value, dict):
        raise BadInputError(f"{what}: the header is no JSON object")
    metadata = value.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise BadInputError(f"{what}: __metadata__ must map text to text")
    entries = sorted(
        (_entry(name, item, what) for name, item in value.items()), key=lambda entry: (entry.begin, entry.end)
    )
    _check_cover(entries, data_bytes, what)
    return SafetensorsHeader(raw, tuple(entries), metadata)


def _entry(name: str, item: Any, what: str) -> HeaderEntry:
    place = f"{what}: tensor {brief(repr(name))}"
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise BadInputError(f"{place}: needs exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(item["dtype"]) if isinstance(item["dtype"], str) else None
    if dtype is None:
        raise BadInputError(
            f"{place}: unknown dtype {brief(repr(item['dtype']))}", hint=f"Known are {', '.join(DTYPES)}."
        )
    shape, offsets = item["shape"], item["data_offsets"]
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > MAXIMUM_DIMENSIONS:
        raise BadInputError(f"{place}: shape and data_offsets must be lists of whole numbers")
    bits = math.prod(shape) * dtype.bits
    if offsets[1] - offsets[0] != bits // 8 or bits % 8:
        takes = f"{bits // 8}{str(bits % 8 / 8)[1:] if bits % 8 else ''} bytes"  # it may be more than a float can hold
        raise BadInputError(
            f"{place}: {dtype.name} {brief(shape)} takes {brief(takes)}, data_offsets say {offsets[1] - offsets[0]}"
        )
    return HeaderEntry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in value)


def _check_cover(entries: list[HeaderEntry], data_bytes: int | None, what: str) -> None:
    position = 0
    for entry in entries:
        if entry.begin != position:
            kind = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise BadInputError(f"{what}: tensor {brief(repr(entry.name))} {kind} (it begins at {entry.begin})")
        position = entry.end
    if data_bytes is not None and position != data_bytes:
        problem = "cut off" if position > data_bytes else "followed by bytes that no tensor owns"
        raise BadInputError(
            f"{what}: the tensors take {position} bytes, the file has {data_bytes}: it is {problem}",
            hint="Download or copy the file again.",
        )


def build_header(
    tensors: Iterable[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str]
) -> SafetensorsHeader:
    """A header for tensors laid one after another in the given order, padded to eight bytes with spaces."""
    value: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    entries = []
    position = 0
    for name, dtype, shape in tensors:
        end = position + dtype.nbytes(math.prod(shape))
        entries.append(HeaderEntry(name, dtype, shape, position, end))
        value[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return SafetensorsHeader(len(text).to_bytes(8, "little") + text, tuple(entries), metadata)
