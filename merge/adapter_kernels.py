"""The product of two thin matrices, any part of it, compiled.

BLAS may add in another order when a matrix is cut in another place, so its results would depend on tiles. Here an
element is always the float32 sum over the rank from first to last, each product rounded before it is added, and then
scaled: the same bits for every cut, thread and machine. Columns are taken in panels, so that what the rows share stays
in a cache.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mergepipe.store.kernels import compiled, inlined

Matrix = NDArray[np.float32]
_PANEL_ELEMENTS = 32 << 10  # of the right factor, 128 KiB
_LEAST_COLUMNS = 128


@inlined
def _row(left: Matrix, right: Matrix, first: int, scale: np.float32, out: Matrix) -> None:
    """``out = scale * left @ right[:, first:][:, :out.size]`` for one row, four ranks at a time, in their order."""
    for i in range(out.size):
        out[i] = np.float32(0)
    rank = left.size
    last = first + out.size
    whole = rank // 4 * 4
    for k in range(0, whole, 4):
        w0, w1, w2, w3 = left[k], left[k + 1], left[k + 2], left[k + 3]
        r0, r1 = right[k, first:last], right[k + 1, first:last]
        r2, r3 = right[k + 2, first:last], right[k + 3, first:last]
        for i in range(out.size):
            out[i] = (((out[i] + w0 * r0[i]) + w1 * r1[i]) + w2 * r2[i]) + w3 * r3[i]
    for k in range(whole, rank):
        weight = left[k]
        row = right[k, first:last]
        for i in range(out.size):
            out[i] += weight * row[i]
    for i in range(out.size):
        out[i] *= scale


@compiled
def low_rank(left: Matrix, right: Matrix, scale: np.float32, start: int, out: Matrix) -> None:
    """Elements ``start`` to ``start + out.size`` of the flattened ``scale * left @ right``.

    ``left`` is (rows, rank), ``right`` (rank, columns), both in C order; ``out`` is one-dimensional.
    """
    columns = right.shape[1]
    stop = start + out.size
    panel = max(_PANEL_ELEMENTS // max(right.shape[0], 1), _LEAST_COLUMNS)
    for first in range(0, columns, panel):
        last = min(first + panel, columns)
        for row in range(start // columns, -(-stop // columns)):
            begin = max(row * columns + first, start)
            end = min(row * columns + last, stop)
            if begin < end:
                _row(left[row], right, begin - row * columns, scale, out[begin - start : end - start])
