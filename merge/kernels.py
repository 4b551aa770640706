"""The merge's inner loops over one tile, compiled: float32 in, float32 out, the GIL released.

``experts`` is (K, n) float32, one row for each expert; ``base`` and ``out`` are (n,) float32. Sums over experts run in
their order, so a result does not depend on tiles or threads.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mergepipe.store.kernels import compiled

Tile = NDArray[np.float32]
_PIECE = 2048


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
def add_weighted(
    base: Tile, deltas: NDArray[np.float32], weights: Tile, scale: np.float32, divisor: np.float32, out: Tile
) -> None:
    """``out = base + scale * (sum_k weights[k] * deltas[k] / divisor)``."""
    weighted_sum(deltas, weights, divisor, out)
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
                row[i] = row[i] if abs(row[i]) >= limit else np.float32(0)


@compiled
def elect_and_merge(
    base: Tile, deltas: NDArray[np.float32], weights: Tile, scale: np.float32, normalize: bool, out: Tile
) -> None:
    """TIES: elect each element's sign by the weighted sum, then mix the deltas that agree with it.

    Goes through the experts row by row on short pieces, so that each inner loop is one vector operation after another.
    """
    sign = np.empty(_PIECE, np.float32)
    total = np.empty(_PIECE, np.float32)
    divisor = np.empty(_PIECE, np.float32)
    zero, one = np.float32(0), np.float32(1)
    for start in range(0, out.size, _PIECE):
        stop = min(start + _PIECE, out.size)
        for i in range(stop - start):
            sign[i] = zero
            total[i] = zero
            divisor[i] = zero
        for k in range(weights.size):
            weight = weights[k]
            piece = deltas[k, start:stop]
            for i in range(piece.size):
                sign[i] += weight * piece[i]
        for i in range(stop - start):
            sign[i] = one if sign[i] >= zero else -one
        for k in range(weights.size):
            weight = weights[k]
            piece = deltas[k, start:stop]
            for i in range(piece.size):
                value = weight * piece[i]
                agrees = value * sign[i] > zero
                total[i] += value if agrees else zero
                divisor[i] += weight if agrees else zero
        base_piece = base[start:stop]
        result = out[start:stop]
        for i in range(result.size):
            by = divisor[i] if normalize and divisor[i] != zero else one
            result[i] = base_piece[i] + scale * (total[i] / by)
