"""The inner loops of previews, compiled: coarse codes of a delta, and a delta from codes.

A segment is 1024 elements with a scale of its own. Its codes are 256 bytes of four two-bit codes: byte ``j`` has those
of elements ``j``, ``256 + j``, ``512 + j`` and ``768 + j`` from its lowest bits up, so that packing and unpacking run
along contiguous quarters. 0 is zero, 1 plus the scale, 2 minus the scale. Arithmetic is plain IEEE (no fast-math), so
codes, scales and norms do not depend on the machine.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.store.kernels import compiled, inlined

SEGMENT: Final = 1024
_QUARTER: Final = 256
_LANES: Final = 64
_FAR: Final = 8 << 7  # eight octaves, as bfloat16 patterns go


@inlined
def _reach(sizes: NDArray[np.uint16], least: np.uint16) -> int:
    """How many of a segment's magnitudes are at least this large; all as bfloat16 patterns."""
    count = np.uint16(0)
    for j in range(SEGMENT):
        count = np.uint16(count + np.uint16(sizes[j] >= least))
    return int(count)


@inlined
def _least(sizes: NDArray[np.uint16], most: int) -> int:
    """The smallest magnitude to keep, so that at most ``most`` are; found by halving.

    Where many share one magnitude this may be far fewer; where it would be less than half as many, more are kept.
    """
    top = np.uint16(0)
    for j in range(SEGMENT):
        top = max(top, sizes[j])
    low, high, few = 1, int(top) + 1, 0
    if _reach(sizes, np.uint16(low)) <= most:
        return low
    if high > _FAR:  # most of what counts is within some octaves of the largest
        count = _reach(sizes, np.uint16(high - _FAR))
        if count <= most:
            high, few = high - _FAR, count
        else:
            low = high - _FAR
    while high - low > 1:
        middle = (low + high) >> 1
        count = _reach(sizes, np.uint16(middle))
        if count <= most:
            high, few = middle, count
        else:
            low = middle
    return low if 2 * few < most else high


@inlined
def _segment(
    delta: NDArray[np.float32],
    most: int,
    sizes: NDArray[np.uint16],
    lanes: NDArray[np.float32],
    marks: NDArray[np.uint8],
    codes: NDArray[np.uint8],
    sums: NDArray[np.float64],
) -> None:
    """Codes of one segment, zeros at its end; how many it keeps, the sum of those, and the squares of all (3)."""
    for j in range(SEGMENT):
        sizes[j] = np.uint16(np.uint32(np.float32(delta[j]).view(np.uint32) & np.uint32(0x7FFFFFFF)) >> np.uint32(16))
    least = np.uint16(_least(sizes, most))
    for j in range(_LANES):
        lanes[0, j] = lanes[1, j] = lanes[2, j] = np.float32(0)
    for row in range(SEGMENT // _LANES):
        part = delta[row * _LANES : row * _LANES + _LANES]
        mine = sizes[row * _LANES : row * _LANES + _LANES]
        out = marks[row * _LANES : row * _LANES + _LANES]
        for j in range(_LANES):
            kept = mine[j] >= least
            m = abs(part[j])
            lanes[0, j] += np.float32(1) if kept else np.float32(0)
            lanes[1, j] += m if kept else np.float32(0)
            lanes[2, j] += m * m
            sign = np.uint8(np.float32(part[j]).view(np.uint32) >> np.uint32(31))
            out[j] = np.uint8(sign + np.uint8(1)) if kept else np.uint8(0)
    for i in range(3):
        total = 0.0
        for j in range(_LANES):
            total += lanes[i, j]
        sums[i] = total
    first, second = marks[:_QUARTER], marks[_QUARTER : 2 * _QUARTER]
    third, fourth = marks[2 * _QUARTER : 3 * _QUARTER], marks[3 * _QUARTER : SEGMENT]
    for j in range(_QUARTER):
        low = np.uint8(first[j] | np.uint8(second[j] << np.uint8(2)))
        codes[j] = np.uint8(low | np.uint8(np.uint8(third[j] << np.uint8(4)) | np.uint8(fourth[j] << np.uint8(6))))


@compiled
def codes_of_bfloat16(
    new: NDArray[np.uint16],
    old: NDArray[np.uint16],
    share: float,
    codes: NDArray[np.uint8],
    sums: NDArray[np.float64],
) -> None:
    """:func:`codes_of_float32` of ``new - old``, both bfloat16 bit patterns."""
    sizes = np.empty(SEGMENT, np.uint16)
    lanes = np.empty((3, _LANES), np.float32)
    marks = np.empty(SEGMENT, np.uint8)
    delta = np.empty(SEGMENT, np.float32)
    for segment in range(sums.shape[0]):
        start = segment * SEGMENT
        width = min(SEGMENT, new.size - start)
        ours, theirs = new[start : start + width], old[start : start + width]
        for j in range(width):
            a = np.uint32(np.uint32(ours[j]) << np.uint32(16)).view(np.float32)
            delta[j] = a - np.uint32(np.uint32(theirs[j]) << np.uint32(16)).view(np.float32)
        delta[width:] = np.float32(0)
        out = codes[segment * _QUARTER : (segment + 1) * _QUARTER]
        _segment(delta, int(share * width), sizes, lanes, marks, out, sums[segment])


@compiled
def codes_of_float32(
    values: NDArray[np.float32], share: float, codes: NDArray[np.uint8], sums: NDArray[np.float64]
) -> None:
    """Codes of all segments: of each the largest magnitudes, at most a share, keep their sign, and the rest is zero.

    ``codes`` is (S * 256,). ``sums`` (S, 3) gets of each segment how many are kept, the sum of their magnitudes, and
    the squares of all.
    """
    sizes = np.empty(SEGMENT, np.uint16)
    lanes = np.empty((3, _LANES), np.float32)
    marks = np.empty(SEGMENT, np.uint8)
    delta = np.empty(SEGMENT, np.float32)
    for segment in range(sums.shape[0]):
        start = segment * SEGMENT
        width = min(SEGMENT, values.size - start)
        delta[:width] = values[start : start + width]
        delta[width:] = np.float32(0)
        out = codes[segment * _QUARTER : (segment + 1) * _QUARTER]
        _segment(delta, int(share * width), sizes, lanes, marks, out, sums[segment])


@inlined
def unpack_segment(codes: NDArray[np.uint8], scale: np.float32, out: NDArray[np.float32]) -> None:
    """The 1024 deltas of one segment."""
    for quarter in range(4):
        shift = np.uint8(2 * quarter)
        part = out[quarter * _QUARTER : (quarter + 1) * _QUARTER]
        for j in range(_QUARTER):
            code = np.int32((codes[j] >> shift) & np.uint8(3))
            part[j] = scale * np.float32((code & np.int32(1)) - (code >> np.int32(1)))


@compiled
def deltas_of_codes(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], start: int, out: NDArray[np.float32]
) -> None:
    """Elements ``start`` to ``start + out.size`` of the delta that codes and scales (S,) stand for."""
    buffer = np.empty(SEGMENT, np.float32)
    done = 0
    while done < out.size:
        segment = (start + done) // SEGMENT
        skip = (start + done) % SEGMENT
        count = min(SEGMENT - skip, out.size - done)
        bytes_of = codes[segment * _QUARTER : (segment + 1) * _QUARTER]
        if count == SEGMENT:
            unpack_segment(bytes_of, scales[segment], out[done : done + SEGMENT])
        else:
            unpack_segment(bytes_of, scales[segment], buffer)
            piece = out[done : done + count]
            for j in range(count):
                piece[j] = buffer[skip + j]
        done += count
