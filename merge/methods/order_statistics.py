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


def find_bin(histogram: NDArray[Any], rank: int) -> tuple[int, int]:
    """The bin with the rank-th largest (from 1), and how many elements are in bins above it.

    Bin 0, with all magnitudes that count as zero, where the histogram has fewer elements. NaNs count as infinities,
    which are as large as a threshold can be.
    """
    reaching = np.cumsum(histogram[::-1])
    place = min(int(np.searchsorted(reaching, rank)), len(histogram) - 1)
    place = max(place, len(histogram) - 1 - _INFINITE_BIN)
    return len(histogram) - 1 - place, int(reaching[place] - histogram[len(histogram) - 1 - place])


def is_refinable(found: int) -> bool:
    """Whether a bin's magnitudes differ, and are numbers: not those that count as zero, nor infinities."""
    return 0 < found < _INFINITE_BIN


def find_low_half(counts: NDArray[Any], rank: int) -> tuple[int, int, int]:
    """Within a bin: the lower 16 bits of its rank-th largest, how many elements reach it, and how many are above it."""
    reaching = np.cumsum(counts[::-1])
    place = min(int(np.searchsorted(reaching, rank)), LOW_HALVES - 1)
    return LOW_HALVES - 1 - place, int(reaching[place]), int(reaching[place] - counts[LOW_HALVES - 1 - place])
