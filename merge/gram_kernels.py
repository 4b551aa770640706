"""Inner products of tiles, and linear combinations of them, compiled: float32 in and out, float64 between.

A product of two float32 numbers is exact in float64, so a Gram matrix is as good as its sums. Sums run in a fixed
order: within pieces of 512 elements along a fixed tree that vector units can follow, the pieces one after another. So
results depend on neither threads nor the machine. Zeros fill the last piece.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergepipe.store.kernels import compiled, inlined

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
_PIECE = 512
_LANES = _PIECE // 8


@inlined
def _widen(vector: Float32, start: int, stop: int, wide: Float64) -> None:
    """A piece of a vector as float64, with zeros behind it."""
    piece = vector[start:stop]  # an index that may be negative would keep the loop from being vectorised
    for i in range(piece.size):
        wide[i] = piece[i]
    for i in range(stop - start, _PIECE):
        wide[i] = 0.0


@inlined
def _product(a: Float64, b: Float64, lanes: Float64) -> Any:
    """The inner product of two pieces: 64 lanes of 8 products, folded onto each other."""
    for j in range(_LANES):
        lanes[j] = (
            (a[j] * b[j] + a[j + 64] * b[j + 64])
            + (a[j + 128] * b[j + 128] + a[j + 192] * b[j + 192])
            + (a[j + 256] * b[j + 256] + a[j + 320] * b[j + 320])
            + (a[j + 384] * b[j + 384] + a[j + 448] * b[j + 448])
        )
    for j in range(32):
        lanes[j] += lanes[j + 32]
    for j in range(16):
        lanes[j] += lanes[j + 16]
    for j in range(8):
        lanes[j] += lanes[j + 8]
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]))


@inlined
def _add_products(wide: Float64, lanes: Float64, gram: Float64) -> None:
    count = gram.shape[0]
    for a in range(count):
        for b in range(a, count):
            gram[a, b] += _product(wide[a], wide[b], lanes)


@compiled
def add_gram(vectors: Float32, gram: Float64) -> None:
    """Add the inner products of ``vectors`` (K, n) to the upper triangle of ``gram`` (K, K)."""
    wide = np.empty((vectors.shape[0], _PIECE), np.float64)
    lanes = np.empty(_LANES, np.float64)
    for start in range(0, vectors.shape[1], _PIECE):
        for k in range(vectors.shape[0]):
            _widen(vectors[k], start, min(start + _PIECE, vectors.shape[1]), wide[k])
        _add_products(wide, lanes, gram)


@compiled
def add_pair_gram(first: Float32, second: Float32, gram: Float64) -> None:
    """:func:`add_gram` of two vectors (n,) that do not lie side by side."""
    wide = np.empty((2, _PIECE), np.float64)
    lanes = np.empty(_LANES, np.float64)
    for start in range(0, first.size, _PIECE):
        stop = min(start + _PIECE, first.size)
        _widen(first, start, stop, wide[0])
        _widen(second, start, stop, wide[1])
        _add_products(wide, lanes, gram)


@compiled
def row_grams(vectors: Float32, row: int, grams: Float64) -> None:
    """The Gram matrices of rows of ``row`` elements into the upper triangles of ``grams`` (K, K, rows)."""
    count = vectors.shape[0]
    wide = np.empty((count, _PIECE), np.float64)
    lanes = np.empty(_LANES, np.float64)
    gram = np.empty((count, count), np.float64)
    for r in range(grams.shape[2]):
        gram[:] = 0.0
        for start in range(r * row, (r + 1) * row, _PIECE):
            for k in range(count):
                _widen(vectors[k], start, min(start + _PIECE, (r + 1) * row), wide[k])
            _add_products(wide, lanes, gram)
        for a in range(count):
            for b in range(a, count):
                grams[a, b, r] = gram[a, b]


@compiled
def add_columns(vectors: Float32, start: int, sums: Float64) -> None:
    """Add two vectors' inner products, column by column: ``sums`` (3, columns) are those of aa, ab and bb.

    ``vectors`` (2, n) are a run of rows of ``columns`` elements, which begins at element ``start`` of the tensor.
    """
    columns = sums.shape[1]
    first, second = vectors[0], vectors[1]
    done = 0
    while done < first.size:
        column = (start + done) % columns
        width = min(columns - column, first.size - done)
        for i in range(width):
            a = np.float64(first[done + i])
            b = np.float64(second[done + i])
            sums[0, column + i] += a * a
            sums[1, column + i] += a * b
            sums[2, column + i] += b * b
        done += width


@inlined
def _combine_piece(
    base: Float32, experts: Float32, start: int, stop: int, base_factor: float, factors: Float64, total: Float64
) -> None:
    """One piece of a combination; the base is not looked at where its factor is 0."""
    origin = base[start:stop]
    if base_factor != 0:
        for i in range(origin.size):
            total[i] = base_factor * origin[i]
    else:
        for i in range(origin.size):
            total[i] = 0.0
    for k in range(experts.shape[0]):
        row = experts[k][start:stop]
        factor = factors[k]
        for i in range(row.size):
            total[i] += factor * row[i]


@compiled
def combine(base: Float32, experts: Float32, base_factor: float, factors: Float64, out: Float32) -> None:
    """``out = base_factor * base + sum_k factors[k] * experts[k]``, rounded once."""
    total = np.empty(_PIECE, np.float64)
    for start in range(0, out.size, _PIECE):
        stop = min(start + _PIECE, out.size)
        _combine_piece(base, experts, start, stop, base_factor, factors, total)
        piece = out[start:stop]
        for i in range(piece.size):
            piece[i] = total[i]


@compiled
def combine_rows(base: Float32, experts: Float32, base_factor: float, factors: Float64, out: Float32) -> None:
    """:func:`combine` with factors (K, rows) for each row."""
    rows = factors.shape[1]
    width = out.size // rows
    total = np.empty(_PIECE, np.float64)
    own = np.empty(factors.shape[0], np.float64)
    for r in range(rows):
        for k in range(own.size):
            own[k] = factors[k, r]
        for start in range(r * width, (r + 1) * width, _PIECE):
            stop = min(start + _PIECE, (r + 1) * width)
            _combine_piece(base, experts, start, stop, base_factor, own, total)
            piece = out[start:stop]
            for i in range(piece.size):
                piece[i] = total[i]


@compiled
def combine_columns(
    base: Float32, experts: Float32, start: int, base_factor: float, factors: Float64, out: Float32
) -> None:
    """:func:`combine` of two experts with factors (2, columns) for each column; ``start`` as in :func:`add_columns`."""
    columns = factors.shape[1]
    first, second = experts[0], experts[1]
    done = 0
    while done < out.size:
        column = (start + done) % columns
        width = min(columns - column, out.size - done)
        for i in range(width):
            mixed = factors[0, column + i] * first[done + i] + factors[1, column + i] * second[done + i]
            out[done + i] = base_factor * base[done + i] + mixed if base_factor != 0 else mixed
        done += width
