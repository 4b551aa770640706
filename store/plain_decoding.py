"""Decoding with numpy alone: what :mod:`mergepipe.store.kernels` does, for processes that have not loaded it.

Tiles of 512 KiB: large enough that threads seldom meet at the interpreter's lock, small enough for a shared cache.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_TILE_BYTES: Final = 512 << 10


def join(planes: list[NDArray[np.uint8]], out: NDArray[Any]) -> None:
    """Put byte planes (least significant first) together into unsigned integers of as many bytes."""
    step = _TILE_BYTES // out.itemsize
    temporary = np.empty(min(step, out.size), out.dtype)
    for start in range(0, out.size, step):
        tile = out[start : start + step]
        span = slice(start, start + tile.size)
        np.copyto(tile, planes[-1][span])
        for plane in planes[-2::-1]:
            np.left_shift(tile, 8, out=tile)
            np.copyto(temporary[: tile.size], plane[span])
            np.bitwise_or(tile, temporary[: tile.size], out=tile)


def add_difference(planes: list[NDArray[np.uint8]], old: NDArray[Any], out: NDArray[Any]) -> None:
    """Undo the zigzag of the ordered difference in ``planes`` and add it to ``old``; signed integers of one type."""
    unsigned = np.dtype(f"<u{out.itemsize}")
    join(planes, out.view(unsigned))
    step = _TILE_BYTES // out.itemsize
    buffers = [np.empty(min(step, out.size), out.dtype) for _ in range(2)]
    for start in range(0, out.size, step):
        tile = out[start : start + step]
        first, second = (buffer[: tile.size] for buffer in buffers)
        np.bitwise_and(tile, 1, out=first)
        np.negative(first, out=first)
        np.right_shift(tile.view(unsigned), 1, out=tile.view(unsigned))
        np.bitwise_xor(tile, first, out=tile)
        _ordered(old[start : start + tile.size], first, second)
        np.add(tile, first, out=first)
        _ordered(first, tile, second)


def _ordered(source: NDArray[Any], out: NDArray[Any], temporary: NDArray[Any]) -> None:
    """Sign-magnitude bit patterns to integers in the floats' order; its own inverse."""
    bits = source.itemsize * 8
    np.right_shift(source, bits - 1, out=temporary)
    np.bitwise_and(temporary, (1 << (bits - 1)) - 1, out=temporary)
    np.bitwise_xor(source, temporary, out=out)
