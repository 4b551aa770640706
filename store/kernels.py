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

from mergepipe.store.norms import SKETCH_SIZE

_FLUSH_ROWS: Final = 64  # float32 sums are moved to float64 after this many rows, which bounds their error


def compiled(function: Callable[..., Any]) -> Any:
    """Compile on first use, release the GIL, keep the machine code in a cache where one can be written."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return njit(nogil=True)(function)


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
def _row(
    delta: NDArray[np.float32],
    width: int,
    row: int,
    lanes: NDArray[np.float32],
    bins: NDArray[np.uint32],
    histogram: NDArray[np.uint32],
) -> int:
    """One row of at most 64 elements; returns how many are not zero.

    ``lanes`` are squares, magnitudes, largest magnitudes and signed sums. A histogram without bins counts nothing.
    """
    signs = signs_of_row(row)
    changed = 0
    for j in range(width):
        x = delta[j]
        flip = np.uint32(np.uint32((signs >> np.uint64(j)) & np.uint64(1)) << np.uint32(31))
        lanes[3, j] += np.uint32(np.float32(x).view(np.uint32) ^ flip).view(np.float32)
        m = abs(x)
        lanes[0, j] += x * x
        lanes[1, j] += m
        lanes[2, j] = m if m > lanes[2, j] else lanes[2, j]
        changed += x != 0
        bins[j] = np.uint32(np.float32(m).view(np.uint32) >> np.uint32(16))
    if histogram.shape[1] > 0:
        for j in range(width):
            histogram[j & 1, bins[j]] += np.uint32(1)
    return changed


@inlined
def _flush(lanes: NDArray[np.float32], sketch: NDArray[np.float64], out: NDArray[np.float64]) -> None:
    """Move the lanes' float32 sums to float64."""
    for j in range(SKETCH_SIZE):
        out[1] += lanes[0, j]
        out[2] += lanes[1, j]
        out[3] = max(out[3], lanes[2, j])
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
    delta = np.zeros(SKETCH_SIZE, np.float32)
    bins = np.zeros(SKETCH_SIZE, np.uint32)
    rows = (new.size + SKETCH_SIZE - 1) // SKETCH_SIZE
    for row in range(rows):
        start = row * SKETCH_SIZE
        width = min(SKETCH_SIZE, new.size - start)
        for j in range(width):
            a = np.uint32(np.uint32(new[start + j]) << np.uint32(16)).view(np.float32)
            delta[j] = a - np.uint32(np.uint32(old[start + j]) << np.uint32(16)).view(np.float32)
        out[0] += _row(delta, width, row, lanes, bins, histogram)
        if row % _FLUSH_ROWS == _FLUSH_ROWS - 1 or row == rows - 1:
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
    bins = np.zeros(SKETCH_SIZE, np.uint32)
    rows = (delta.size + SKETCH_SIZE - 1) // SKETCH_SIZE
    for row in range(rows):
        start = row * SKETCH_SIZE
        width = min(SKETCH_SIZE, delta.size - start)
        out[0] += _row(delta[start : start + width], width, row, lanes, bins, histogram)
        if row % _FLUSH_ROWS == _FLUSH_ROWS - 1 or row == rows - 1:
            _flush(lanes, sketch, out)


READY: Final = True  # a thread that finds this module half loaded looks here
