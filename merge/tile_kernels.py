"""From blocks to tiles, compiled: all experts of a place at once, where they are bfloat16 as their reference is.

``stack`` is (K, n) bit patterns of the experts' blocks, ``base`` (n,) those of the reference's; an expert that is not
``present`` has the reference's block. ``rows`` is (K + 2, m), contiguous, or the loops are not vectorised. One call
makes a whole tile: calls cost more than the work on a short row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mergepipe.store.kernels import compiled

Bits = NDArray[np.uint16]
Floats = NDArray[np.float32]


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
