"""From blocks to tiles, compiled: all experts of a place at once, where they are bfloat16 as their reference is.

``stack`` is (K, n) bit patterns of the experts' blocks, ``base`` (n,) those of the reference's; an expert that is not
``present`` has the reference's block. ``rows`` is (K + 2, m), contiguous, or the loops are not vectorised. One call
makes a whole tile: calls cost more than the work on a short row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.kernels import dividing
from mergepipe.merge.method import Looks
from mergepipe.store.kernels import compiled, inlined
from mergepipe.store.preview_kernels import SEGMENT

Bits = NDArray[np.uint16]
Floats = NDArray[np.float32]
_PIECE = 2048
_QUARTER = SEGMENT // 4


@compiled
def weights_of(stack: Bits, present: NDArray[np.bool_], base: Bits, start: int, rows: Floats) -> None:
    """The elements from ``start`` on as float32: the experts' into the first K rows, the reference's into the next."""
    base_out = rows[present.size]
    bits = base_out.view(np.uint32)
    old = base[start : start + base_out.size]
    for i in range(base_out.size):
        bits[i] = np.uint32(np.uint32(old[i]) << np.uint32(16))
    for k in range(present.size):
        row = rows[k]
        if present[k]:
            source = stack[k][start : start + base_out.size]
            target = row.view(np.uint32)
            for i in range(row.size):
                target[i] = np.uint32(np.uint32(source[i]) << np.uint32(16))
        else:
            for i in range(row.size):
                row[i] = base_out[i]


@compiled
def deltas_of(stack: Bits, present: NDArray[np.bool_], base: Bits, start: int, rows: Floats) -> None:
    """What each expert adds to the reference's elements from ``start`` on; laid out as by :func:`weights_of`.

    An expert that is not present adds zero, also where the reference is infinite.
    """
    base_out = rows[present.size]
    bits = base_out.view(np.uint32)
    old = base[start : start + base_out.size]
    for i in range(base_out.size):
        bits[i] = np.uint32(np.uint32(old[i]) << np.uint32(16))
    for k in range(present.size):
        row = rows[k]
        if present[k]:
            source = stack[k][start : start + base_out.size]
            for i in range(row.size):
                value = np.uint32(np.uint32(source[i]) << np.uint32(16)).view(np.float32)
                row[i] = value - base_out[i]
        else:
            for i in range(row.size):
                row[i] = np.float32(0)


@inlined
def _widened(bits: np.uint16) -> np.float32:
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@inlined
def _narrowed(value: np.float32) -> np.uint16:
    """To nearest even; a NaN stays one. As :func:`mergepipe.merge.kernels.round_bfloat16` does it."""
    x = np.float32(value).view(np.uint32)
    odd = np.uint32((x >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint16(np.uint32(x + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    quiet = np.uint16(np.uint16(x >> np.uint32(16)) | np.uint16(0x40))
    return quiet if np.uint32(x & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else rounded


@inlined
def _look(codes: NDArray[np.uint8], quarter: int, j: int) -> np.float32:
    """The sign of an element's code, or zero, as :func:`mergepipe.store.preview_kernels.unpack_segment` has it."""
    code = np.int32((codes[j] >> np.uint8(2 * quarter)) & np.uint8(3))
    return np.float32((code & np.int32(1)) - (code >> np.int32(1)))


@dividing
def add_weighted_stack(
    stack: Bits,
    present: NDArray[np.bool_],
    base: Bits,
    looks: Looks,
    weights: Floats,
    scale: np.float32,
    divisor: np.float32,
    out: Bits,
) -> None:
    """:func:`mergepipe.merge.kernels.add_weighted` of a whole block, operation by operation, without tiles."""
    total = np.empty(SEGMENT, np.float32)
    origin = np.empty(SEGMENT, np.float32)
    zero, one = np.float32(0), np.float32(1)
    for start in range(0, base.size, SEGMENT):
        old, new = base[start : start + SEGMENT], out[start : start + SEGMENT]
        for i in range(old.size):
            origin[i] = _widened(old[i])
            total[i] = zero
        for k in range(weights.size):
            weight = weights[k]
            if looks.coarse[k]:
                segment = start // SEGMENT
                size = looks.scales[k, segment]
                first = looks.start + segment * _QUARTER
                codes = looks.contents[k][first : first + _QUARTER]
                for quarter in range(4):
                    part = total[quarter * _QUARTER : (quarter + 1) * _QUARTER]
                    if k == 0:
                        for j in range(_QUARTER):
                            part[j] = weight * (size * _look(codes, quarter, j))
                    else:
                        for j in range(_QUARTER):
                            part[j] += weight * (size * _look(codes, quarter, j))
                continue
            row = stack[k][start : start + SEGMENT]
            if not present[k]:
                for i in range(old.size):
                    total[i] = weight * zero if k == 0 else total[i] + weight * zero
            elif k == 0:
                for i in range(old.size):
                    total[i] = weight * (_widened(row[i]) - origin[i])
            else:
                for i in range(old.size):
                    total[i] += weight * (_widened(row[i]) - origin[i])
        if divisor != one:
            for i in range(old.size):
                total[i] /= divisor
        for i in range(old.size):
            new[i] = _narrowed(origin[i] + scale * total[i])


@dividing
def weighted_sum_stack(
    stack: Bits,
    present: NDArray[np.bool_],
    base: Bits,
    looks: Looks,
    weights: Floats,
    divisor: np.float32,
    out: Bits,
) -> None:
    """:func:`mergepipe.merge.kernels.weighted_sum` of a whole block, operation by operation, without tiles."""
    total = np.empty(SEGMENT, np.float32)
    origin = np.empty(SEGMENT, np.float32)
    one = np.float32(1)
    for start in range(0, base.size, SEGMENT):
        old, new = base[start : start + SEGMENT], out[start : start + SEGMENT]
        for i in range(old.size):
            origin[i] = _widened(old[i])
        for k in range(weights.size):
            weight = weights[k]
            if looks.coarse[k]:
                segment = start // SEGMENT
                size = looks.scales[k, segment]
                first = looks.start + segment * _QUARTER
                codes = looks.contents[k][first : first + _QUARTER]
                for quarter in range(4):
                    part = total[quarter * _QUARTER : (quarter + 1) * _QUARTER]
                    there = origin[quarter * _QUARTER : (quarter + 1) * _QUARTER]
                    if k == 0:
                        for j in range(_QUARTER):
                            part[j] = weight * (size * _look(codes, quarter, j) + there[j])
                    else:
                        for j in range(_QUARTER):
                            part[j] += weight * (size * _look(codes, quarter, j) + there[j])
                continue
            row = stack[k][start : start + SEGMENT] if present[k] else old
            if k == 0:
                for i in range(old.size):
                    total[i] = weight * _widened(row[i])
            else:
                for i in range(old.size):
                    total[i] += weight * _widened(row[i])
        if divisor != one:
            for i in range(old.size):
                total[i] /= divisor
        for i in range(old.size):
            new[i] = _narrowed(total[i])


@compiled
def count_low_halves_stack(
    stack: Bits, present: NDArray[np.bool_], base: Bits, bins: NDArray[np.uint32], counts: NDArray[np.int64]
) -> None:
    """:func:`mergepipe.merge.mask_kernels.count_low_halves` of a whole block's deltas.

    The matches of a piece are gathered first, without a branch: of bfloat16 deltas many share a magnitude.
    """
    found = np.empty(_PIECE + 1, np.uint16)
    deltas = np.empty(_PIECE, np.uint32)
    for k in range(present.size):
        if not present[k]:
            continue  # all zeros, which are in no bin that is refined
        for start in range(0, base.size, _PIECE):
            old, row = base[start : start + _PIECE], stack[k][start : start + _PIECE]
            for i in range(old.size):
                delta = np.float32(_widened(row[i]) - _widened(old[i]))
                deltas[i] = np.uint32(delta.view(np.uint32) & np.uint32(0x7FFFFFFF))
            for m in range(bins.shape[1]):
                wanted = bins[k, m]
                if wanted > np.uint32(0x7FFF):
                    continue
                size = 0
                for i in range(old.size):
                    found[size] = np.uint16(deltas[i])
                    size += np.uint32(deltas[i] >> np.uint32(16)) == wanted
                for i in range(size):
                    counts[k, m, found[i]] += 1
