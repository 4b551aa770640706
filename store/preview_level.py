"""How fine a model's previews are: as fine as a twelfth of its plain bytes allows.

Previews may take 8% of the model. Where all of it changed, that is 1.25 bits an element; where much of it did not, or
hardly, the same bytes buy more for the rest. How much that is is looked up before the first preview is made, in the
middle blocks of some tensors: every fourth in the order of their names, and each that is a large part of the model. So
the choice follows from the two models alone, whoever makes the previews and whenever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from mergepipe.store.codecs import Bytes
from mergepipe.store.previews import COARSE, FINE, SHARES

MOST: Final = 0.07  # of the plain bytes, as estimated: what is measured then stays below 8%
_EVERY: Final = 4
_LARGE: Final = 1 / 25  # of the model's bytes: always looked at
_SPARSE: Final = 0.3  # with fewer elements changed, the block itself takes hardly more than a preview


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tensor that may get previews. ``middle``: its middle block and the base's there, None where they are equal."""

    name: str
    nbytes: int
    bits: int
    middle: Callable[[], tuple[Bytes, Bytes] | None]


def choose_level(candidates: Sequence[Candidate], total_bytes: int) -> int:
    """The level for a model of ``total_bytes``, all its tensors together."""
    ordered = sorted(candidates, key=lambda candidate: candidate.name)
    large = [candidate for candidate in ordered if candidate.nbytes > _LARGE * total_bytes]
    small = [candidate for candidate in ordered if candidate.nbytes <= _LARGE * total_bytes]
    looked_at = small[_EVERY // 2 :: _EVERY] or small
    expected = sum(_expected_bytes(candidate) for candidate in large)
    looked = sum(candidate.nbytes for candidate in looked_at)
    if looked:
        part = sum(_expected_bytes(candidate) for candidate in looked_at)
        expected += part * sum(candidate.nbytes for candidate in small) / looked
    return FINE if expected <= MOST * total_bytes else COARSE


def _expected_bytes(candidate: Candidate) -> float:
    """What fine previews of a tensor are likely to take, from how much of its middle block changed."""
    pair = candidate.middle()
    if pair is None:
        return 0.0
    new, old = pair
    if new.nbytes != old.nbytes or candidate.bits % 8:
        changed = 1.0
    else:
        kind = np.dtype(f"<u{candidate.bits // 8}")
        changed = np.count_nonzero(new.view(kind) != old.view(kind)) / (new.nbytes * 8 // candidate.bits)
    if changed < _SPARSE:
        return 0.0
    kept = min(changed, SHARES[FINE])
    return candidate.nbytes * _entropy(kept) / candidate.bits


def _entropy(kept: float) -> float:
    """Bits an element, where this share of all keeps a sign."""
    if kept >= 1:
        return 1.0
    return kept - kept * math.log2(kept) - (1 - kept) * math.log2(1 - kept)
