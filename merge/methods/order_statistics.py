"""The r-th largest of a tensor's magnitudes without a sort, from counts that add up over blocks.

A magnitude's float32 pattern orders as it does. Its upper 15 bits (of 16, the sign being 0) are a bin of a histogram,
which gives the r-th largest up to the bin's width; a count of the lower 16 bits of the elements in that bin gives the
rest.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

BINS: Final = 1 << 15
NO_BIN: Final = BINS
_INFINITE_BIN: Final = 0x7F80
LOW_HALVES: Final = 1 << 16
_GROUP: Final = 256


def find_bin(histogram: NDArray[Any], rank: int) -> tuple[int, int]:
    """The bin with the rank-th largest (from 1), and how many elements are in bins above it.

    Bin 0, with all magnitudes that count as zero, where the histogram has fewer elements. NaNs count as infinities,
    which are as large as a threshold can be.
    """
    found, above = _from_above(histogram, rank)
    if found > _INFINITE_BIN:
        return _INFINITE_BIN, int(histogram[_INFINITE_BIN + 1 :].sum())
    return found, above


def is_refinable(found: int) -> bool:
    """Whether a bin's magnitudes differ, and are numbers: not those that count as zero, nor infinities."""
    return 0 < found < _INFINITE_BIN


def find_low_half(counts: NDArray[Any], rank: int) -> tuple[int, int, int]:
    """Within a bin: the lower 16 bits of its rank-th largest, how many elements reach it, and how many are above it."""
    found, above = _from_above(counts, rank)
    return found, above + int(counts[found]), above


def _from_above(counts: NDArray[Any], rank: int) -> tuple[int, int]:
    """The place with the rank-th from the end, and how many are behind it; place 0 where there are fewer.

    First by groups of 256, then within one: summing all of a histogram one by one takes longer than reading it.
    """
    groups = counts.reshape(-1, _GROUP).sum(axis=1)[::-1]
    reaching = np.cumsum(groups)
    group = int(np.searchsorted(reaching, rank))
    if group == len(groups):
        return 0, int(reaching[-1] - counts[0])
    above = int(reaching[group] - groups[group])
    start = len(counts) - (group + 1) * _GROUP
    inside = np.cumsum(counts[start : start + _GROUP][::-1])
    place = int(np.searchsorted(inside, rank - above))
    found = start + _GROUP - 1 - place
    return found, above + int(inside[place] - counts[found])
