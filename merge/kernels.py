"""The merge's inner loops over one tile, compiled: float32 in, float32 out, the GIL released.

``experts`` is (K, n) float32, one row for each expert; ``base`` and ``out`` are (n,) float32. Sums over experts run in
their order, so a result does not depend on tiles or threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergepipe.store.compiling import compile_cached
from mergepipe.store.kernels import compiled

Tile = NDArray[np.float32]


def dividing(function: Callable[..., Any]) -> Any:
    """As ``compiled``, but dividing by zero gives an infinity, not an exception, so loops that divide vectorise."""
    return compile_cached(function, error_model="numpy")


@compiled
def widen_bfloat16(source: NDArray[np.uint16], out: NDArray[np.uint32]) -> None:
    """bfloat16 bit patterns to those of float32."""
    for i in range(source.size):
        out[i] = np.uint32(np.uint32(source[i]) << np.uint32(16))


@compiled
def round_bfloat16(source: NDArray[np.uint32], out: NDArray[np.uint16]) -> None:
    """float32 bit patterns to bfloat16, to nearest even; a NaN stays one."""
    for i in range(source.size):
        x = source[i]
        if np.uint32(x & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
            out[i] = np.uint16(np.uint16(x >> np.uint32(16)) | np.uint16(0x40))
        else:
            odd = np.uint32((x >> np.uint32(16)) & np.uint32(1))
            out[i] = np.uint16(np.uint32(x + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@compiled
def subtract(values: Tile, base: Tile) -> None:
    """Turn an expert's weights into its delta, in place."""
    for i in range(values.size):
        values[i] -= base[i]


@dividing
def weighted_sum(experts: NDArray[np.float32], weights: Tile, divisor: np.float32, out: Tile) -> None:
    """``out = sum_k weights[k] * experts[k] / divisor``."""
    for i in range(out.size):
        out[i] = weights[0] * experts[0, i]
    for k in range(1, weights.size):
        for i in range(out.size):
            out[i] += weights[k] * experts[k, i]
    if divisor != np.float32(1):
        for i in range(out.size):
            out[i] /= divisor


@dividing
def add_weighted(
    base: Tile, deltas: NDArray[np.float32], weights: Tile, scale: np.float32, divisor: np.float32, out: Tile
) -> None:
    """``out = base + scale * (sum_k weights[k] * deltas[k] / divisor)``."""
    weighted_sum(deltas, weights, divisor, out)
    for i in range(out.size):
        out[i] = base[i] + scale * out[i]


@compiled
def scaled(source: Tile, factor: np.float32, out: Tile) -> None:
    """``out = factor * source``."""
    for i in range(out.size):
        out[i] = source[i] * factor


@dividing
def swap_near(base: Tile, expert: Tile, reach: np.float32, out: Tile) -> None:
    """NearSwap: the expert's weight where it is within ``reach`` of the base's, and less of it the farther it is.

    A result is never outside of the two, which rounding alone could make it.
    """
    least, zero, one = np.float32(1e-6), np.float32(0), np.float32(1)
    for i in range(out.size):
        a, b = base[i], expert[i]
        distance = abs(a - b)
        distance = least if distance < least else distance
        share = (one / distance) * reach
        share = zero if share < zero else share
        share = one if share > one else share
        mixed = share * b + (one - share) * a
        low = a if a < b else b
        high = b if a < b else a
        mixed = low if mixed < low else mixed
        out[i] = high if mixed > high else mixed
