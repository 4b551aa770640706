"""The head of a row of delta statistics, without what is needed to compute one: quick to import.

A row of the catalog's ``deltas`` begins with two u64 (elements, changed) and three f64 (L2 norm, L1 norm, largest
magnitude), little-endian; :mod:`mergepipe.store.statistics` has the rest.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from mergepipe.store.catalog import Reading
from mergepipe.store.digest import Digest
from mergepipe.store.errors import DamagedError

HEAD: Final = struct.Struct("<QQddd")
SKETCH_SIZE: Final = 64
HISTOGRAM_BINS: Final = 1 << 15


@dataclass(frozen=True, slots=True)
class Norms:
    """Of a delta: elements, how many changed, L2 norm, L1 norm, largest magnitude."""

    elements: int
    changed: int
    l2: float
    l1: float
    largest: float


def read_norms(view: Reading, base: Digest, block: Digest) -> Norms | None:
    """What the catalog knows of ``block - base``, or of ``base - block``, which has the same norms; else None."""
    row = view.get("deltas", base + block) or view.get("deltas", block + base)
    if row is None:
        return None
    if len(row) < HEAD.size:
        raise DamagedError("a row of delta statistics cannot be read", hint="Run `mp verify`.")
    return Norms(*HEAD.unpack(row[: HEAD.size]))


def add_norms(parts: Iterable[Norms]) -> Norms:
    """The norms of several blocks' delta as a whole."""
    known = list(parts)
    return Norms(
        sum(part.elements for part in known),
        sum(part.changed for part in known),
        math.sqrt(sum(part.l2**2 for part in known)),
        sum(part.l1 for part in known),
        max((part.largest for part in known), default=0.0),
    )
