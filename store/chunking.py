"""From a shape to a chunk grid: every block is one contiguous slice of the tensor's bytes.

A chunk has the shape ``(1, …, 1, r, full, …, full)``. In C order such chunks follow one another without gaps, so a
block is found by an offset and a length, and rows appended at the end leave all earlier blocks as they were,
except a last one that was not full. Pure functions; nothing here reads or writes.

>>> chunk_shape((151936, 1024), bits=16, target_bytes=2 << 20)
(1024, 1024)
>>> chunk_shape((64, 3072, 1024), bits=16, target_bytes=2 << 20)
(1, 1024, 1024)
"""

from __future__ import annotations

import math

DEFAULT_BLOCK_BYTES = 2 << 20
MINIMUM_BLOCK_BYTES = 4 << 10
MAXIMUM_BLOCK_BYTES = 64 << 20


def chunk_shape(shape: tuple[int, ...], bits: int, target_bytes: int) -> tuple[int, ...]:
    """The chunk shape for a tensor of ``shape`` elements of ``bits`` bits, near ``target_bytes`` a chunk.

    Rows of packed types narrower than a byte are grouped so that each chunk starts on a byte.
    """
    if math.prod(shape) * bits <= target_bytes * 8:
        return tuple(max(extent, 1) for extent in shape)
    for axis in range(len(shape)):
        row_bits = math.prod(shape[axis + 1 :]) * bits
        rows = target_bytes * 8 // row_bits
        # A split further in would start chunks inside of a byte where a row is no whole number of bytes.
        if rows >= 1 or axis == len(shape) - 1 or row_bits % 8:
            step = 8 // math.gcd(row_bits, 8)
            rows = max(rows // step * step, step)
            return (1,) * axis + (min(rows, shape[axis]),) + shape[axis + 1 :]
    return ()


def grid_shape(shape: tuple[int, ...], chunks: tuple[int, ...]) -> tuple[int, ...]:
    """Chunks along each axis; 0 where the axis is empty."""
    return tuple(-(-extent // chunk) for extent, chunk in zip(shape, chunks, strict=True))


def block_count(shape: tuple[int, ...], chunks: tuple[int, ...]) -> int:
    """Blocks that a tensor has; 0 for an empty tensor, 1 for a scalar."""
    return math.prod(grid_shape(shape, chunks))


def is_contiguous(shape: tuple[int, ...], chunks: tuple[int, ...], bits: int) -> bool:
    """Whether chunks of this shape are slices of whole bytes: ``(1, …, 1, r, full, …, full)``."""
    if len(shape) != len(chunks) or any(chunk < 1 for chunk in chunks):
        return False
    split = next((axis for axis, chunk in enumerate(chunks) if chunk != 1), len(chunks))
    after = zip(shape[split + 1 :], chunks[split + 1 :], strict=True)
    if not all(chunk == max(extent, 1) for extent, chunk in after):
        return False
    inner = math.prod(shape[split + 1 :]) * bits
    along = [chunks[split] * inner] if split < len(shape) and chunks[split] < shape[split] else []
    around = [shape[split] * inner] if split < len(shape) and math.prod(shape[:split]) > 1 else []
    return all(size % 8 == 0 for size in along + around)


def block_elements(shape: tuple[int, ...], chunks: tuple[int, ...], index: int) -> tuple[int, int]:
    """``(start, count)`` of block ``index`` (C order over the grid), in elements of the flattened tensor.

    Blocks at the end of the split axis are shorter: a block holds the tensor's bytes alone, without the fill
    that a zarr chunk has there.
    """
    split = next((axis for axis, chunk in enumerate(chunks) if chunk != 1), max(len(chunks) - 1, 0))
    if not shape:
        return 0, 1
    inner = math.prod(shape[split + 1 :])
    per_axis = -(-shape[split] // chunks[split])
    outer, step = divmod(index, per_axis)
    start = step * chunks[split]
    rows = min(chunks[split], shape[split] - start)
    return (outer * shape[split] + start) * inner, rows * inner
