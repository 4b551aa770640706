"""The merge's inner loops over one tile, compiled: float32 in, float32 out, the GIL released.

``experts`` is (K, n) float32, one row for each expert; ``base`` and ``out`` are (n,) float32. Sums over experts run in
their order, so a result does not depend on tiles or threads.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mergepipe.store.kernels import compiled

Tile = NDArray[np.float32]


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


@compiled
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


@compiled
def add_weighted(base: Tile, deltas: NDArray[np.float32], weights: Tile, scale: np.float32, out: Tile) -> None:
    """``out = base + scale * sum_k weights[k] * deltas[k]``."""
    weighted_sum(deltas, weights, np.float32(1), out)
    for i in range(out.size):
        out[i] = base[i] + scale * out[i]


@compiled
def keep_largest(deltas: NDArray[np.float32], thresholds: NDArray[np.uint32]) -> None:
    """Set to zero, in place, what is below its expert's threshold; thresholds are float32 bit patterns."""
    for k in range(thresholds.size):
        limit = np.uint32(thresholds[k]).view(np.float32)
        if limit > np.float32(0):
            row = deltas[k]
            for i in range(row.size):
                if abs(row[i]) < limit:
                    row[i] = np.float32(0)


@compiled
def elect_and_merge(
    base: Tile, deltas: NDArray[np.float32], weights: Tile, scale: np.float32, normalize: bool, out: Tile
) -> None:
    """TIES: elect each element's sign by the weighted sum, then mix the deltas that agree with it."""
    weighted_sum(deltas, weights, np.float32(1), out)
    for i in range(out.size):
        positive = out[i] >= np.float32(0)
        total = np.float32(0)
        divisor = np.float32(0)
        for k in range(weights.size):
            value = weights[k] * deltas[k, i]
            agrees = value > np.float32(0) if positive else value < np.float32(0)
            total += value if agrees else np.float32(0)
            divisor += weights[k] if agrees else np.float32(0)
        if normalize and divisor != np.float32(0):
            total /= divisor
        out[i] = base[i] + scale * total
