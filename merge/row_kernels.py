"""What needs whole rows, compiled: ranks within a row (DELLA), the divergence of two rows' softmaxes (Arcee Fusion).

Exponentials and logarithms are polynomials in float64, correct to about 1e-15, so that they are the same on every
machine and run as vector operations.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.kernels import dividing
from mergepipe.merge.mask_kernels import add_magnitudes, hash_elements
from mergepipe.merge.mix import ALWAYS, MAGNITUDE
from mergepipe.store.kernels import compiled, inlined

Row = NDArray[np.float32]
Float64 = NDArray[np.float64]
_SHORT_ROW: Final = 800
_WIDE_DIGIT: Final = 11
_NARROW_DIGIT: Final = 8
_DIGITS: Final = 4  # at most: 31 bits
_LANES: Final = 16
_EPSILON: Final = 1e-8


@compiled
def _count_digits(patterns: NDArray[np.uint32], width: int, counts: NDArray[np.int64]) -> int:
    """For each digit of ``width`` bits of the magnitudes, where each of its values begins in sorted order.

    Returns a bit for each digit that is the same in all.
    """
    counts[:] = 0
    mask = np.uint32((1 << width) - 1)
    for i in range(patterns.size):
        rest = np.uint32(patterns[i] & np.uint32(MAGNITUDE))
        for digit in range(counts.shape[0]):
            counts[digit, rest & mask] += 1
            rest = np.uint32(rest >> np.uint32(width))
    same = 0
    for digit in range(counts.shape[0]):
        total = 0
        for value in range(1 << width):
            count = counts[digit, value]
            counts[digit, value] = total
            total += count
            same |= (count == patterns.size) << digit
    return same


@compiled
def _sort(row: Row, items: NDArray[np.uint64], counts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A radix sort: the row's magnitudes in rising order, with their indices as lower halves; equal ones in order.

    ``items`` (2, n) is where it sorts, ``counts`` is (4, 2048). Digits that all magnitudes share, as the low ones of
    what was a bfloat16, take no turn.
    """
    patterns = row.view(np.uint32)
    width = _WIDE_DIGIT if row.size > _SHORT_ROW else _NARROW_DIGIT
    digits = (31 + width - 1) // width
    same: int = _count_digits(patterns, width, counts[:digits])
    mask = np.uint64((1 << width) - 1)
    source: NDArray[np.uint64] = items[0]
    target: NDArray[np.uint64] = items[1]
    for i in range(row.size):
        source[i] = (np.uint64(patterns[i] & np.uint32(MAGNITUDE)) << np.uint64(32)) | np.uint64(i)
    for digit in range(digits):
        if same >> digit & 1:
            continue
        shift = np.uint64(32 + digit * width)
        places = counts[digit]
        for i in range(row.size):
            value = (source[i] >> shift) & mask
            place = places[value]
            places[value] = place + 1
            target[place] = source[i]
        source, target = target, source
    return source


@compiled
def _drop_by_rank(row: Row, bits: NDArray[np.uint32], lowest: float, step: float, ordered: NDArray[np.uint64]) -> None:
    """Set an element to zero, in place, unless the upper 31 of its bits are below ``lowest + step * rank``.

    ``bits`` become masks first: deciding element by element takes a branch, which would be guessed wrong.
    """
    for rank in range(row.size):
        place = np.int64(ordered[rank] & np.uint64(0xFFFFFFFF))
        chance = np.uint32(lowest + step * rank)
        bits[place] = np.uint32(0xFFFFFFFF) if np.uint32(bits[place] >> np.uint32(1)) < chance else np.uint32(0)
    patterns = row.view(np.uint32)
    for i in range(row.size):
        patterns[i] &= bits[i]


@compiled
def _drop_row(
    row: Row,
    first: int,
    key: np.uint64,
    chances: NDArray[np.uint32],
    work: tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int64]],
) -> None:
    """DELLA's mask on one row, in place: ``chances`` (2,) are those of its smallest and largest, of 2**31.

    A row of one element has their mean.
    """
    if chances[0] >= np.uint32(ALWAYS):
        return
    pairs, items, counts = work
    hash_elements(key, first, row.size, pairs)
    low, high = float(chances[0]), float(chances[1])
    step = (high - low) / (row.size - 1) if row.size > 1 else 0.0
    low = low if row.size > 1 else (low + high) / 2
    _drop_by_rank(row, pairs.view(np.uint32)[first & 1 :], low, step, _sort(row, items, counts))


@compiled
def _work(width: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int64]]:
    pairs = np.empty(width // 2 + 2, np.uint64)
    return pairs, np.empty((2, width), np.uint64), np.empty((_DIGITS, 1 << _WIDE_DIGIT), np.int64)


@compiled
def drop_rows(
    experts: NDArray[np.float32], first: int, width: int, keys: NDArray[np.uint64], chances: NDArray[np.uint32]
) -> None:
    """DELLA's masks on whole rows of ``width`` of (K, n) deltas, in place; ``chances`` is (K, 2)."""
    work = _work(width)
    for k in range(keys.size):
        for start in range(0, experts.shape[1], width):
            _drop_row(experts[k, start : start + width], first + start, keys[k], chances[k], work)


@compiled
def add_ranked(
    experts: NDArray[np.float32],
    first: int,
    width: int,
    keys: NDArray[np.uint64],
    chances: NDArray[np.uint32],
    lanes: NDArray[np.float64],
) -> None:
    """Magnitudes of each delta before and after :func:`drop_rows` into ``lanes`` (K, 2, 64)."""
    work = _work(width)
    for k in range(keys.size):
        for start in range(0, experts.shape[1], width):
            row = experts[k, start : start + width]
            add_magnitudes(row, first + start, lanes[k, 0])
            _drop_row(row, first + start, keys[k], chances[k], work)
            add_magnitudes(row, first + start, lanes[k, 1])


@inlined
def _exponential(x: float) -> float:
    """``exp(x)`` for x <= 0; below -700 it is that of -700."""
    x = max(x, -700.0)
    whole = np.floor(x * 1.4426950408889634 + 0.5)
    r = (x - whole * 0.693147180369123816490) - whole * 1.90821492927058770002e-10
    p = 1.0 + r / 13.0
    p = 1.0 + r * p / 12.0
    p = 1.0 + r * p * (1.0 / 11.0)
    p = 1.0 + r * p * (1.0 / 10.0)
    p = 1.0 + r * p * (1.0 / 9.0)
    p = 1.0 + r * p * (1.0 / 8.0)
    p = 1.0 + r * p * (1.0 / 7.0)
    p = 1.0 + r * p * (1.0 / 6.0)
    p = 1.0 + r * p * (1.0 / 5.0)
    p = 1.0 + r * p * (1.0 / 4.0)
    p = 1.0 + r * p * (1.0 / 3.0)
    p = 1.0 + r * p * (1.0 / 2.0)
    p = 1.0 + r * p
    return float(p * np.int64((np.int64(whole) + 1023) << 52).view(np.float64))


@inlined
def _logarithm(x: float) -> float:
    """``log(x)`` for normal x > 0: the exponent, and a series in ``(m - 1) / (m + 1)``."""
    bits = np.float64(x).view(np.int64)
    exponent = (bits - np.int64(0x3FE6A09E667F3BCD)) >> 52
    m = np.int64(bits - (exponent << 52)).view(np.float64)
    s = (m - 1.0) / (m + 1.0)
    t = s * s
    p = 1.0 / 21.0 + t * (1.0 / 23.0)
    p = 1.0 / 19.0 + t * p
    p = 1.0 / 17.0 + t * p
    p = 1.0 / 15.0 + t * p
    p = 1.0 / 13.0 + t * p
    p = 1.0 / 11.0 + t * p
    p = 1.0 / 9.0 + t * p
    p = 1.0 / 7.0 + t * p
    p = 1.0 / 5.0 + t * p
    p = 1.0 / 3.0 + t * p
    return exponent * 0.6931471805599453 + 2.0 * s * (1.0 + t * p)


@dividing
def _softmax(row: Row, out: Float64) -> None:
    """Softmax plus 1e-8. Sums run in 16 lanes."""
    largest = row[0]
    for i in range(1, row.size):
        largest = row[i] if row[i] > largest else largest
    top = np.float64(largest)
    for i in range(row.size):
        out[i] = _exponential(np.float64(row[i]) - top)
    total = _sum(out)
    for i in range(row.size):
        out[i] = out[i] / total + _EPSILON


@compiled
def _sum(values: Float64) -> np.float64:
    lanes = np.zeros(_LANES, np.float64)
    stop = values.size // _LANES * _LANES
    for i in range(0, stop, _LANES):
        line = values[i : i + _LANES]
        for j in range(_LANES):
            lanes[j] += line[j]
    for i in range(stop, values.size):
        lanes[i - stop] += values[i]
    total = np.float64(0)
    for lane in lanes:
        total = np.float64(total + lane)
    return total


@dividing
def _divergence(expert: Row, base: Row, work: Float64) -> np.float32:
    """Kullback-Leibler divergence of the rows' softmaxes, each with 1e-8 added; ``work`` is (2, n)."""
    p, q = work[0], work[1]
    _softmax(expert, p)
    _softmax(base, q)
    for i in range(expert.size):
        p[i] *= _logarithm(p[i] / q[i])
    return np.float32(max(_sum(p), 0.0))


@dividing
def importances(expert: Row, base: Row, width: int, out: Row) -> None:
    """``|expert - base|`` times the divergence of its row, for whole rows of ``width``."""
    work = np.empty((2, width), np.float64)
    for start in range(0, out.size, width):
        new, old, result = expert[start : start + width], base[start : start + width], out[start : start + width]
        apart = _divergence(new, old, work)
        for i in range(width):
            result[i] = abs(new[i] - old[i]) * apart


@compiled
def count_not_zero(values: Row, histogram: NDArray[np.int64]) -> None:
    """Count values that are not zero by the upper 15 bits of their magnitudes' patterns (32768 bins)."""
    patterns = values.view(np.uint32)
    for i in range(patterns.size):
        bits = np.uint32(patterns[i] & np.uint32(MAGNITUDE))
        histogram[bits >> np.uint32(16)] += bits != np.uint32(0)


@compiled
def fuse(base: Row, expert: Row, threshold: np.float32, out: Row) -> None:
    """The expert's weight where the importance, which ``out`` has, reaches the threshold."""
    for i in range(out.size):
        out[i] = base[i] + (expert[i] - base[i]) * (np.float32(1) if out[i] >= threshold else np.float32(0))
