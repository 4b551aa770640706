"""The inner loops, compiled: splitting and joining byte planes, ordered differences, delta statistics.

Each is one pass over a block, compiled by numba on first use and kept in its cache. They release the GIL for the whole
block, so threads scale; the same expressions as numpy calls on tiles measured 10 times slower here and kept two threads
waiting for each other (``docs/adr/0002-compiled-kernels.md``). Arithmetic is exact on integers and plain IEEE float32
and float64 on statistics (no fast-math), so results do not depend on the machine.

Arrays are one-dimensional and contiguous. ``p0`` is the least significant plane.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from mergepipe.store.compiling import compile_cached
from mergepipe.store.norms import SKETCH_SIZE

_GROUP_ROWS: Final = 4  # rows of 64 elements that are summed at once
_GROUP: Final = _GROUP_ROWS * SKETCH_SIZE
_FLUSH_GROUPS: Final = 16  # float32 sums are moved to float64 after this many groups, which bounds their error


def compiled(function: Callable[..., Any]) -> Any:
    """Compile on first use, release the GIL, keep the machine code in a cache where one can be written."""
    return compile_cached(function)


def inlined(function: Callable[..., Any]) -> Any:
    """A piece of the kernels below, compiled into each of them."""
    return njit(nogil=True, inline="always")(function)


@compiled
def split2(source: NDArray[np.uint16], p0: NDArray[np.uint8], p1: NDArray[np.uint8]) -> None:
    """Two-byte elements into two planes."""
    for i in range(source.size):
        p0[i] = np.uint8(source[i])
        p1[i] = np.uint8(source[i] >> 8)


@compiled
def join2(p0: NDArray[np.uint8], p1: NDArray[np.uint8], out: NDArray[np.uint16]) -> None:
    """Inverse of :func:`split2`."""
    for i in range(out.size):
        out[i] = np.uint16(p0[i]) | np.uint16(np.uint16(p1[i]) << 8)


@compiled
def split4(
    source: NDArray[np.uint32],
    p0: NDArray[np.uint8],
    p1: NDArray[np.uint8],
    p2: NDArray[np.uint8],
    p3: NDArray[np.uint8],
) -> None:
    """Four-byte elements into four planes."""
    for i in range(source.size):
        x = source[i]
        p0[i] = np.uint8(x)
        p1[i] = np.uint8(x >> 8)
        p2[i] = np.uint8(x >> 16)
        p3[i] = np.uint8(x >> 24)


@compiled
def join4(
    p0: NDArray[np.uint8],
    p1: NDArray[np.uint8],
    p2: NDArray[np.uint8],
    p3: NDArray[np.uint8],
    out: NDArray[np.uint32],
) -> None:
    """Inverse of :func:`split4`."""
    for i in range(out.size):
        low = np.uint32(p0[i]) | np.uint32(np.uint32(p1[i]) << 8)
        out[i] = low | np.uint32(np.uint32(p2[i]) << 16) | np.uint32(np.uint32(p3[i]) << 24)


@compiled
def difference1(new: NDArray[np.int8], old: NDArray[np.int8], out: NDArray[np.uint8]) -> None:
    """Zigzag of the ordered difference, one-byte elements."""
    for i in range(new.size):
        a = new[i]
        b = old[i]
        a = np.int8(a ^ ((a >> 7) & 0x7F))
        b = np.int8(b ^ ((b >> 7) & 0x7F))
        d = np.int8(a - b)
        out[i] = np.uint8(np.uint8(d << 1) ^ np.uint8(d >> 7))


@compiled
def sum1(difference: NDArray[np.uint8], old: NDArray[np.int8], out: NDArray[np.int8]) -> None:
    """Inverse of :func:`difference1`."""
    for i in range(out.size):
        z = difference[i]
        d = np.int8(np.int8(z >> 1) ^ np.int8(-np.int8(z & 1)))
        b = old[i]
        a = np.int8(np.int8(b ^ ((b >> 7) & 0x7F)) + d)
        out[i] = np.int8(a ^ ((a >> 7) & 0x7F))


@compiled
def difference2(new: NDArray[np.int16], old: NDArray[np.int16], p0: NDArray[np.uint8], p1: NDArray[np.uint8]) -> None:
    """Zigzag of the ordered difference of two-byte elements, split into two planes."""
    for i in range(new.size):
        a = new[i]
        b = old[i]
        a = np.int16(a ^ ((a >> 15) & 0x7FFF))
        b = np.int16(b ^ ((b >> 15) & 0x7FFF))
        d = np.int16(a - b)
        z = np.uint16(np.uint16(d << 1) ^ np.uint16(d >> 15))
        p0[i] = np.uint8(z)
        p1[i] = np.uint8(z >> 8)


@compiled
def sum2(p0: NDArray[np.uint8], p1: NDArray[np.uint8], old: NDArray[np.int16], out: NDArray[np.int16]) -> None:
    """Inverse of :func:`difference2`."""
    for i in range(out.size):
        z = np.uint16(np.uint16(p0[i]) | np.uint16(np.uint16(p1[i]) << 8))
        d = np.int16(np.int16(z >> 1) ^ np.int16(-np.int16(z & 1)))
        b = old[i]
        a = np.int16(np.int16(b ^ ((b >> 15) & 0x7FFF)) + d)
        out[i] = np.int16(a ^ ((a >> 15) & 0x7FFF))


@compiled
def difference4(new: NDArray[np.int32], old: NDArray[np.int32], out: NDArray[np.uint32]) -> None:
    """Zigzag of the ordered difference, four-byte elements."""
    for i in range(new.size):
        a = new[i]
        b = old[i]
        a = np.int32(a ^ ((a >> 31) & 0x7FFFFFFF))
        b = np.int32(b ^ ((b >> 31) & 0x7FFFFFFF))
        d = np.int32(a - b)
        out[i] = np.uint32(np.uint32(d << 1) ^ np.uint32(d >> 31))


@compiled
def sum4(difference: NDArray[np.uint32], old: NDArray[np.int32], out: NDArray[np.int32]) -> None:
    """Inverse of :func:`difference4`."""
    for i in range(out.size):
        z = difference[i]
        d = np.int32(np.int32(z >> 1) ^ np.int32(-np.int32(z & 1)))
        b = old[i]
        a = np.int32(np.int32(b ^ ((b >> 31) & 0x7FFFFFFF)) + d)
        out[i] = np.int32(a ^ ((a >> 31) & 0x7FFFFFFF))


@inlined
def signs_of_row(row: int) -> np.uint64:
    """64 random signs for row ``row`` of 64 elements: the splitmix64 output for that index."""
    z = np.uint64(row + 1) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@inlined
def _flipped(x: np.float32, signs: np.uint32, place: int) -> np.float32:
    """``x``, its sign flipped where bit ``place`` of 32 is set."""
    flip = np.uint32(np.uint32(signs << np.uint32(31 - place)) & np.uint32(0x80000000))
    return np.uint32(np.float32(x).view(np.uint32) ^ flip).view(np.float32)


@inlined
def _rows(
    delta: NDArray[np.float32],
    count: int,
    group: int,
    lanes: NDArray[np.float32],
    bins: NDArray[np.uint32],
    histogram: NDArray[np.uint32],
) -> np.uint32:
    """A group of rows, ``count`` elements and zeros after them; returns how many are not zero.

    ``lanes`` are squares, magnitudes, largest magnitudes and signed sums. Each lane takes its rows one after the other:
    a group of them between two visits to memory. A histogram without bins counts nothing.
    """
    changed = np.uint32(0)
    for i in range(_GROUP):
        changed = np.uint32(changed + np.uint32(delta[i] != 0))
    for j in range(SKETCH_SIZE):
        squares, total, largest = lanes[0, j], lanes[1, j], lanes[2, j]
        for row in range(_GROUP_ROWS):
            x = delta[row * SKETCH_SIZE + j]
            m = abs(x)
            squares += x * x
            total += m
            largest = m if m > largest else largest
        lanes[0, j], lanes[1, j], lanes[2, j] = squares, total, largest
    s0, s1 = signs_of_row(group * _GROUP_ROWS), signs_of_row(group * _GROUP_ROWS + 1)
    s2, s3 = signs_of_row(group * _GROUP_ROWS + 2), signs_of_row(group * _GROUP_ROWS + 3)
    for half in range(2):
        shift = np.uint64(32 * half)
        w0, w1, w2, w3 = np.uint32(s0 >> shift), np.uint32(s1 >> shift), np.uint32(s2 >> shift), np.uint32(s3 >> shift)
        for i in range(32):
            j = 32 * half + i
            signed = lanes[3, j]
            signed += _flipped(delta[j], w0, i)
            signed += _flipped(delta[SKETCH_SIZE + j], w1, i)
            signed += _flipped(delta[2 * SKETCH_SIZE + j], w2, i)
            signed += _flipped(delta[3 * SKETCH_SIZE + j], w3, i)
            lanes[3, j] = signed
    if histogram.shape[1] > 0:
        for i in range(_GROUP):
            bins[i] = np.uint32(np.float32(abs(delta[i])).view(np.uint32) >> np.uint32(16))
        for i in range(count):
            histogram[i & 1, bins[i]] += np.uint32(1)
    return changed


@inlined
def _flush(lanes: NDArray[np.float32], sketch: NDArray[np.float64], out: NDArray[np.float64]) -> None:
    """Move the lanes' float32 sums to float64."""
    squares, total, largest = out[1], out[2], out[3]
    for j in range(SKETCH_SIZE):
        squares += lanes[0, j]
        total += lanes[1, j]
        largest = max(largest, lanes[2, j])
    out[1], out[2], out[3] = squares, total, largest
    for j in range(SKETCH_SIZE):
        sketch[j] += lanes[3, j]
        lanes[0, j] = lanes[1, j] = lanes[3, j] = 0


@compiled
def statistics_bfloat16(
    new: NDArray[np.uint16],
    old: NDArray[np.uint16],
    histogram: NDArray[np.uint32],
    sketch: NDArray[np.float64],
    out: NDArray[np.float64],
) -> None:
    """:func:`statistics_float32` of ``new - old``, both bfloat16 bit patterns."""
    lanes = np.zeros((4, SKETCH_SIZE), np.float32)
    delta = np.zeros(_GROUP, np.float32)
    bins = np.zeros(_GROUP, np.uint32)
    groups = (new.size + _GROUP - 1) // _GROUP
    for group in range(groups):
        start = group * _GROUP
        count = min(_GROUP, new.size - start)
        for i in range(count):
            a = np.uint32(np.uint32(new[start + i]) << np.uint32(16)).view(np.float32)
            delta[i] = a - np.uint32(np.uint32(old[start + i]) << np.uint32(16)).view(np.float32)
        delta[count:] = 0
        out[0] += _rows(delta, count, group, lanes, bins, histogram)
        if group % _FLUSH_GROUPS == _FLUSH_GROUPS - 1 or group == groups - 1:
            _flush(lanes, sketch, out)


@compiled
def statistics_float32(
    delta: NDArray[np.float32],
    histogram: NDArray[np.uint32],
    sketch: NDArray[np.float64],
    out: NDArray[np.float64],
) -> None:
    """Changed count, squared norm, sum and largest of magnitudes into ``out`` (4); adds to histogram and sketch.

    ``histogram`` is (2, 32768): two tables take turns, so that equal neighbours do not wait for each other.
    Sums run in 64 lanes, one for each place in a row.
    """
    lanes = np.zeros((4, SKETCH_SIZE), np.float32)
    rows = np.zeros(_GROUP, np.float32)
    bins = np.zeros(_GROUP, np.uint32)
    groups = (delta.size + _GROUP - 1) // _GROUP
    for group in range(groups):
        start = group * _GROUP
        count = min(_GROUP, delta.size - start)
        for i in range(count):
            rows[i] = delta[start + i]
        rows[count:] = 0
        out[0] += _rows(rows, count, group, lanes, bins, histogram)
        if group % _FLUSH_GROUPS == _FLUSH_GROUPS - 1 or group == groups - 1:
            _flush(lanes, sketch, out)


READY: Final = True  # a thread that finds this module half loaded looks here
