"""What the kernels of :mod:`mergepipe.merge.mask_kernels` take, apart from arrays: known without a compiler."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

LANES: Final = 64
"""Sums over a tensor run in this many lanes, each in the order of its elements."""
MAGNITUDE: Final = 0x7FFFFFFF
"""The bits of a float32 without its sign. As a ceiling, all magnitudes pass."""
NOTHING: Final = 1 << 31
"""As a floor, no magnitude passes."""
ALWAYS: Final = 1 << 31
"""As a chance, all elements pass."""


class Mix(NamedTuple):
    """How sparse deltas become one: ``base + scale * sum_k(delta_k * factors_k * weights_k) / divisor``.

    ``consensus``: only of those that have the sign of the sum; ``normalize``: divided by the weights of those instead.
    """

    weights: NDArray[np.float32]
    factors: NDArray[np.float32]
    scale: np.float32
    divisor: np.float32
    consensus: bool
    normalize: bool
