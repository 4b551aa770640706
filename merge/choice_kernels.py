"""Mixing by what the experts have in common, compiled: RAM counts who changes an element, SCE how much they differ.

``experts`` is (K, n) float32 in C order, the deltas; ``base`` and ``out`` are (n,). Tiles go through in short pieces,
row by row (see :mod:`mergepipe.merge.mask_kernels`).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.kernels import dividing
from mergepipe.merge.mix import LANES
from mergepipe.store.kernels import compiled

Row = NDArray[np.float32]
PIECE: Final = 1024


@compiled
def _count_changes(experts: NDArray[np.float32], start: int, epsilon: np.float32, counts: Row) -> None:
    """How many experts change each element by more than ``epsilon``."""
    for i in range(counts.size):
        counts[i] = np.float32(0)
    for k in range(experts.shape[0]):
        row = experts[k, start : start + counts.size]
        for i in range(counts.size):
            counts[i] += np.float32(1) if abs(row[i]) > epsilon else np.float32(0)


@dividing
def merge_reinforced(base: Row, experts: NDArray[np.float32], epsilon: np.float32, gains: Row, out: Row) -> None:
    """RAM: the mean of those that change an element; where it is one alone, its delta times its gain (K,)."""
    zero, one = np.float32(0), np.float32(1)
    counts = np.empty(PIECE, np.float32)
    total = np.empty(PIECE, np.float32)
    alone = np.empty(PIECE, np.float32)
    for start in range(0, out.size, PIECE):
        size = min(PIECE, out.size - start)
        _count_changes(experts, start, epsilon, counts[:size])
        for i in range(size):
            total[i] = zero
            alone[i] = one if counts[i] == one else zero
            counts[i] = max(counts[i], one)
        for k in range(experts.shape[0]):
            row = experts[k, start : start + size]
            gain = gains[k]
            for i in range(size):
                value = row[i] * (one if abs(row[i]) > epsilon else zero)
                total[i] += value * (gain if alone[i] == one else one) / counts[i]
        for i in range(size):
            out[start + i] = base[start + i] + total[i]


@compiled
def count_shared(experts: NDArray[np.float32], epsilon: np.float32, shared: NDArray[np.int64]) -> None:
    """For each expert, how many of its changes others share, and how many are its own, into ``shared`` (K, 2)."""
    counts = np.empty(PIECE, np.float32)
    for start in range(0, experts.shape[1], PIECE):
        size = min(PIECE, experts.shape[1] - start)
        _count_changes(experts, start, epsilon, counts[:size])
        for k in range(experts.shape[0]):
            row = experts[k, start : start + size]
            both = alone = np.int32(0)
            for i in range(size):
                changed = abs(row[i]) > epsilon
                both += np.int32(changed & (counts[i] > np.float32(1)))
                alone += np.int32(changed & (counts[i] == np.float32(1)))
            shared[k, 0] += both
            shared[k, 1] += alone


@dividing
def _variances(experts: NDArray[np.float32], start: int, means: NDArray[np.float64], out: Row) -> None:
    """The experts' variance at each element (divided by K), in float64, rounded to float32."""
    count = experts.shape[0]
    sums = means[1]
    mean = means[0]
    for i in range(out.size):
        mean[i] = 0.0
        sums[i] = 0.0
    for k in range(count):
        row = experts[k, start : start + out.size]
        for i in range(out.size):
            mean[i] += np.float64(row[i])
    for i in range(out.size):
        mean[i] /= count
    for k in range(count):
        row = experts[k, start : start + out.size]
        for i in range(out.size):
            off = np.float64(row[i]) - mean[i]
            sums[i] += off * off
    for i in range(out.size):
        out[i] = np.float32(sums[i] / count)


@compiled
def count_variances(experts: NDArray[np.float32], histogram: NDArray[np.int64]) -> None:
    """Count variances that are not zero by the upper 15 bits of their float32 patterns (32768 bins)."""
    means = np.empty((2, PIECE), np.float64)
    variances = np.empty(PIECE, np.float32)
    patterns = variances.view(np.uint32)
    for start in range(0, experts.shape[1], PIECE):
        size = min(PIECE, experts.shape[1] - start)
        _variances(experts, start, means, variances[:size])
        for i in range(size):
            histogram[(patterns[i] >> np.uint32(16)) & np.uint32(0x7FFF)] += patterns[i] != np.uint32(0)


@compiled
def count_variances_within(experts: NDArray[np.float32], chosen: np.uint32, counts: NDArray[np.int64]) -> None:
    """Count the lower 16 bits of those variances that are in the bin ``chosen``, into ``counts`` (65536,)."""
    means = np.empty((2, PIECE), np.float64)
    variances = np.empty(PIECE, np.float32)
    patterns = variances.view(np.uint32)
    for start in range(0, experts.shape[1], PIECE):
        size = min(PIECE, experts.shape[1] - start)
        _variances(experts, start, means, variances[:size])
        for i in range(size):
            counts[patterns[i] & np.uint32(0xFFFF)] += patterns[i] >> np.uint32(16) == chosen


@compiled
def add_squares(experts: NDArray[np.float32], first: int, floor: np.uint32, lanes: NDArray[np.float64]) -> None:
    """Squares of each delta whose variance reaches ``floor``, a bit pattern, into ``lanes`` (K, 64)."""
    means = np.empty((2, PIECE), np.float64)
    variances = np.zeros(PIECE, np.float32)
    patterns = variances.view(np.uint32)
    for start in range(0, experts.shape[1], PIECE):
        size = min(PIECE, experts.shape[1] - start)
        if floor > np.uint32(0):
            _variances(experts, start, means, variances[:size])
        for k in range(experts.shape[0]):
            _add_reaching(experts[k, start : start + size], patterns[:size], floor, first + start, lanes[k])


@compiled
def _add_reaching(
    row: Row, patterns: NDArray[np.uint32], floor: np.uint32, start: int, lanes: NDArray[np.float64]
) -> None:
    head = min((LANES - start % LANES) % LANES, row.size)
    for i in range(head):
        value = np.float64(row[i]) if patterns[i] >= floor else 0.0
        lanes[(start + i) % LANES] += value * value
    stop = head + (row.size - head) // LANES * LANES
    for i in range(head, stop, LANES):
        line, pattern = row[i : i + LANES], patterns[i : i + LANES]
        for j in range(LANES):
            value = np.float64(line[j] if pattern[j] >= floor else np.float32(0))
            lanes[j] += value * value
    for i in range(stop, row.size):
        value = np.float64(row[i]) if patterns[i] >= floor else 0.0
        lanes[i - stop] += value * value


@dividing
def merge_selected(base: Row, experts: NDArray[np.float32], weights: Row, floor: np.uint32, out: Row) -> None:
    """SCE: where the variance reaches ``floor``, the weighted mean of the deltas with the sign of their sum.

    The base elsewhere. ``floor`` is a float32 bit pattern; 0 takes all.
    """
    zero, one, least = np.float32(0), np.float32(1), np.float32(1e-6)
    means = np.empty((2, PIECE), np.float64)
    variances, total, divisor = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    sign = np.empty(PIECE, np.float32)
    patterns = variances.view(np.uint32)
    for start in range(0, out.size, PIECE):
        size = min(PIECE, out.size - start)
        if floor > np.uint32(0):
            _variances(experts, start, means, variances[:size])
        for i in range(size):
            total[i] = zero
            divisor[i] = zero
            sign[i] = zero
        for k in range(weights.size):
            row = experts[k, start : start + size]
            for i in range(size):
                sign[i] += row[i]
        for i in range(size):
            sign[i] = one if sign[i] >= zero else -one
        for k in range(weights.size):
            row = experts[k, start : start + size]
            for i in range(size):
                share = weights[k] if row[i] * sign[i] > zero else zero
                total[i] += row[i] * share
                divisor[i] += share
        result, under = out[start : start + size], base[start : start + size]
        for i in range(size):
            mixed = total[i] / max(divisor[i], least)
            chosen = (floor == np.uint32(0)) | (patterns[i] >= floor)
            result[i] = under[i] + (mixed if chosen else zero)
