"""Task vectors made sparse and mixed, compiled: what TIES, DARE, breadcrumbs and DELLA have in common.

``experts`` is (K, n) float32 in C order, the deltas, which are overwritten; ``base`` and ``out`` are (n,). A tile goes
through in pieces that fit the first cache, row by row, so that each inner loop is one vector operation after another.
An element's result depends on its own column alone, and a random mask on the element's index in its tensor, so tiles
can be cut anywhere.

Thresholds are bit patterns of float32 magnitudes, which order as the magnitudes do; a NaN is above all.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.kernels import dividing
from mergepipe.merge.mix import ALWAYS, LANES, MAGNITUDE, Mix
from mergepipe.store.kernels import compiled, inlined

Row = NDArray[np.float32]
Lanes = NDArray[np.float64]
PIECE: Final = 1024
GROUP: Final = 32
MAGNITUDES: Final = np.uint32(MAGNITUDE)
SHIFT: Final = np.uint32(16)


class Work(NamedTuple):
    """A piece's sums."""

    sign: Row
    total: Row
    divisor: Row


@inlined
def hash_pair(key: np.uint64, pair: np.uint64) -> np.uint64:
    """64 random bits: splitmix64's output number ``pair`` from the state ``key`` (Steele, Lea and Flood, 2014).

    The lower half is for element ``2 * pair``, the upper for the next.
    """
    z = key + (pair + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@compiled
def hash_elements(key: np.uint64, start: int, count: int, out: NDArray[np.uint64]) -> None:
    """Random bits of elements ``start & ~1`` and on, two to each of ``out``, at least those of ``count`` elements."""
    first = np.uint64(start >> 1)
    for i in range((count + (start & 1) + 1) >> 1):
        out[i] = hash_pair(key, first + np.uint64(i))


@compiled
def drop(row: Row, bits: NDArray[np.uint32], chance: np.uint32) -> None:
    """Set an element to zero, in place, unless the upper 31 of its bits are below ``chance``."""
    for i in range(row.size):
        row[i] = row[i] if np.uint32(bits[i] >> np.uint32(1)) < chance else np.float32(0)


@compiled
def keep_between(row: Row, floor: np.uint32, ceiling: np.uint32) -> None:
    """Set to zero, in place, magnitudes that are not from ``floor`` to ``ceiling``."""
    if floor == np.uint32(0) and ceiling >= np.uint32(MAGNITUDE):
        return
    patterns = row.view(np.uint32)
    for i in range(row.size):
        magnitude = np.uint32(patterns[i] & np.uint32(MAGNITUDE))
        row[i] = row[i] if (magnitude >= floor) & (magnitude <= ceiling) else np.float32(0)


@compiled
def add_magnitudes(row: Row, start: int, lanes: Lanes) -> None:
    """Add each magnitude to the lane of its index in the tensor: a lane's order, so its sum, has nothing to do with
    tiles."""
    head = min((LANES - start % LANES) % LANES, row.size)
    for i in range(head):
        lanes[(start + i) % LANES] += np.float64(abs(row[i]))
    stop = head + (row.size - head) // LANES * LANES
    for i in range(head, stop, LANES):
        line = row[i : i + LANES]
        for j in range(LANES):
            lanes[j] += np.float64(abs(line[j]))
    for i in range(stop, row.size):
        lanes[i - stop] += np.float64(abs(row[i]))


@dividing
def _mix(base: Row, experts: NDArray[np.float32], start: int, mix: Mix, work: Work, out: Row) -> None:
    """One piece, its experts already multiplied by their weights."""
    sign, total, divisor = work
    zero, one = np.float32(0), np.float32(1)
    size = out.size
    for i in range(size):
        sign[i] = zero
        total[i] = zero
        divisor[i] = zero
    for k in range(mix.weights.size):
        row = experts[k, start : start + size]
        for i in range(size):
            sign[i] += row[i]
    if mix.consensus:
        for i in range(size):
            sign[i] = one if sign[i] >= zero else -one
        for k in range(mix.weights.size):
            weight = mix.weights[k]
            row = experts[k, start : start + size]
            for i in range(size):
                agrees = one if row[i] * sign[i] > zero else zero
                total[i] += row[i] * agrees
                divisor[i] += weight * agrees
        if mix.normalize:
            for i in range(size):
                total[i] /= one if divisor[i] == zero else divisor[i]
    else:
        for i in range(size):
            total[i] = sign[i] / mix.divisor
    for i in range(size):
        out[i] = base[i] + mix.scale * total[i]


@compiled
def _weigh(row: Row, factor: np.float32, weight: np.float32) -> None:
    if factor != np.float32(1):
        for i in range(row.size):
            row[i] *= factor
    for i in range(row.size):
        row[i] *= weight


@compiled
def _work() -> Work:
    return Work(np.empty(PIECE, np.float32), np.empty(PIECE, np.float32), np.empty(PIECE, np.float32))


@dividing
def merge_between(
    base: Row,
    experts: NDArray[np.float32],
    floors: NDArray[np.uint32],
    ceilings: NDArray[np.uint32],
    mix: Mix,
    out: Row,
) -> None:
    """Mix the deltas' magnitudes from their floor to their ceiling."""
    work = _work()
    for start in range(0, out.size, PIECE):
        stop = min(start + PIECE, out.size)
        for k in range(mix.weights.size):
            row = experts[k, start:stop]
            keep_between(row, floors[k], ceilings[k])
            _weigh(row, mix.factors[k], mix.weights[k])
        _mix(base[start:stop], experts, start, mix, work, out[start:stop])


@dividing
def merge_all(base: Row, experts: NDArray[np.float32], mix: Mix, out: Row) -> None:
    """Mix the deltas as they are."""
    work = _work()
    for start in range(0, out.size, PIECE):
        stop = min(start + PIECE, out.size)
        for k in range(mix.weights.size):
            _weigh(experts[k, start:stop], mix.factors[k], mix.weights[k])
        _mix(base[start:stop], experts, start, mix, work, out[start:stop])


@dividing
def merge_dropped(
    base: Row,
    experts: NDArray[np.float32],
    first: int,
    keys: NDArray[np.uint64],
    chances: NDArray[np.uint32],
    mix: Mix,
    out: Row,
) -> None:
    """Mix what random masks leave of the deltas; ``first`` is the tile's place in its tensor."""
    work = _work()
    pairs = np.empty(PIECE // 2 + 1, np.uint64)
    bits = pairs.view(np.uint32)
    for start in range(0, out.size, PIECE):
        stop = min(start + PIECE, out.size)
        odd = (first + start) & 1
        for k in range(mix.weights.size):
            row = experts[k, start:stop]
            if chances[k] < np.uint32(ALWAYS):
                hash_elements(keys[k], first + start, stop - start, pairs)
                drop(row, bits[odd:], chances[k])
            _weigh(row, mix.factors[k], mix.weights[k])
        _mix(base[start:stop], experts, start, mix, work, out[start:stop])


@compiled
def add_between(
    experts: NDArray[np.float32],
    first: int,
    floors: NDArray[np.uint32],
    ceilings: NDArray[np.uint32],
    lanes: NDArray[np.float64],
) -> None:
    """Magnitudes of each delta before and after :func:`keep_between` into ``lanes`` (K, 2, 64)."""
    for k in range(floors.size):
        for start in range(0, experts.shape[1], PIECE):
            row = experts[k, start : min(start + PIECE, experts.shape[1])]
            add_magnitudes(row, first + start, lanes[k, 0])
            keep_between(row, floors[k], ceilings[k])
            add_magnitudes(row, first + start, lanes[k, 1])


@compiled
def add_dropped(
    experts: NDArray[np.float32],
    first: int,
    keys: NDArray[np.uint64],
    chances: NDArray[np.uint32],
    lanes: NDArray[np.float64],
) -> None:
    """Magnitudes of each delta before and after :func:`drop` into ``lanes`` (K, 2, 64)."""
    pairs = np.empty(PIECE // 2 + 1, np.uint64)
    bits = pairs.view(np.uint32)
    for k in range(keys.size):
        for start in range(0, experts.shape[1], PIECE):
            row = experts[k, start : min(start + PIECE, experts.shape[1])]
            add_magnitudes(row, first + start, lanes[k, 0])
            hash_elements(keys[k], first + start, row.size, pairs)
            drop(row, bits[(first + start) & 1 :], chances[k])
            add_magnitudes(row, first + start, lanes[k, 1])


@inlined
def _count_matches(patterns: NDArray[np.uint32], wanted: np.uint32, counts: NDArray[np.int64]) -> None:
    for i in range(patterns.size):
        if np.uint32(np.uint32(patterns[i] & MAGNITUDES) >> SHIFT) == wanted:
            counts[np.uint16(patterns[i])] += 1


@compiled
def count_low_halves(experts: NDArray[np.float32], bins: NDArray[np.uint32], counts: NDArray[np.int64]) -> None:
    """Count the lower 16 bits of those elements whose upper 15 bits of magnitude are a bin of ``bins`` (K, m).

    ``counts`` is (K, m, 65536); a bin of 32768 or more is none. Few elements match: groups of them are tested at once,
    without a branch, and only a group with a match is gone through.
    """
    for k in range(bins.shape[0]):
        patterns = experts[k].view(np.uint32)
        whole = patterns.size // GROUP * GROUP
        for m in range(bins.shape[1]):
            wanted = bins[k, m]
            if wanted > np.uint32(0x7FFF):
                continue
            for start in range(0, whole, GROUP):
                group = patterns[start : start + GROUP]
                matches = np.uint32(0)
                for i in range(GROUP):
                    matches |= np.uint32(np.uint32(np.uint32(group[i] & MAGNITUDES) >> SHIFT) == wanted)
                if matches != 0:
                    _count_matches(group, wanted, counts[k, m])
            _count_matches(patterns[whole:], wanted, counts[k, m])
