"""Sizes in bytes, read and written the way people do: ``2GiB``, ``500 MB``, ``1.2 GiB``."""

from __future__ import annotations

import re
from typing import Final

from mergepipe.store.errors import UsageError

_UNITS: Final = {
    "": 1, "b": 1,
    "k": 1 << 10, "kib": 1 << 10, "kb": 10**3,
    "m": 1 << 20, "mib": 1 << 20, "mb": 10**6,
    "g": 1 << 30, "gib": 1 << 30, "gb": 10**9,
    "t": 1 << 40, "tib": 1 << 40, "tb": 10**12,
}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([a-zA-Z]*)\s*\Z")


def parse_size(text: str) -> int:
    """Bytes from ``"2GiB"``, ``"500MB"``, ``"4096"``.

    Raises:
        UsageError: the text is not a size.
    """
    match = _SIZE.match(text)
    unit = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise UsageError(f"{text!r} is not a size", hint="Write a number and a unit, as in 500MB or 2GiB.")
    return int(float(match.group(1)) * unit) if "." in match.group(1) else int(match.group(1)) * unit


def format_size(size_bytes: int) -> str:
    """``1.2 GiB``, ``340 B``: binary units, one decimal."""
    value = float(size_bytes)
    if abs(size_bytes) < 1024:
        return f"{size_bytes} B"
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if abs(value) < 1023.95:  # more would be written as 1024.0
            return f"{value:.1f} {unit}"
    value /= 1024
    return f"{value:.1f} TiB"
