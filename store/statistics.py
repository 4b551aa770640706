"""Delta statistics: what the planner knows of a block before anything is read.

Kept by the pair (base block, block), so that models that share blocks share their statistics. All values are of the
delta ``new - base`` taken in float32 (float64 for F64 tensors), over one block.

The sketch is a random projection with ±1 entries into 64 sums: element ``i`` is added to sum ``i mod 64`` with a
sign that depends on ``i`` alone, so for two experts at the same place ``dot(sketch_a, sketch_b)`` is an unbiased
estimate of ``dot(delta_a, delta_b)`` (a count sketch: Charikar, Chen and Farach-Colton, 2002).

The magnitude histogram of a whole tensor counts ``|delta|`` by the upper 15 bits of its float32 pattern (8 of
exponent, 7 of mantissa), 32,768 bins that add up over blocks.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.store.codecs import Bytes, scratch
from mergepipe.store.dtypes import DType
from mergepipe.store.errors import DamagedError

SKETCH_SIZE: Final = 64
HISTOGRAM_BINS: Final = 1 << 15
TILE_ELEMENTS: Final = 1 << 15
_ROW = struct.Struct("<QQddd")


@dataclass(frozen=True, slots=True)
class DeltaStatistics:
    """Of one block's delta: elements, how many changed, L2 norm, L1 norm, largest magnitude, and the sketch."""

    elements: int
    changed: int
    l2: float
    l1: float
    largest: float
    sketch: NDArray[np.float32]

    def pack(self) -> bytes:
        """The catalog row: two u64, three f64, 64 f32, little-endian."""
        head = _ROW.pack(self.elements, self.changed, self.l2, self.l1, self.largest)
        return head + self.sketch.astype("<f4").tobytes()


def unpack_statistics(data: bytes) -> DeltaStatistics:
    """Inverse of :meth:`DeltaStatistics.pack`; raises DamagedError."""
    if len(data) != _ROW.size + 4 * SKETCH_SIZE:
        raise DamagedError("a row of delta statistics cannot be read", hint="Run `mp verify`.")
    return DeltaStatistics(*_ROW.unpack(data[: _ROW.size]), np.frombuffer(data, "<f4", offset=_ROW.size))


def block_statistics(
    new: Bytes, old: Bytes, new_type: DType, old_type: DType, histogram: NDArray[np.int64] | None
) -> DeltaStatistics:
    """Statistics of ``new - old``, both the bytes of one block; adds magnitudes to ``histogram`` (32,768 bins)."""
    with np.errstate(all="ignore"):  # infinities and NaNs in weights are data, not mistakes of ours
        return _block_statistics(new, old, new_type, old_type, histogram)


def _block_statistics(
    new: Bytes, old: Bytes, new_type: DType, old_type: DType, histogram: NDArray[np.int64] | None
) -> DeltaStatistics:
    elements = new.nbytes * 8 // new_type.bits
    signs = _signs()
    sketch = np.zeros(SKETCH_SIZE, np.float64)
    squares = total = largest = 0.0
    changed = 0
    for start in range(0, elements, TILE_ELEMENTS):
        count = min(TILE_ELEMENTS, elements - start)
        delta = _delta_tile(new, old, new_type, old_type, start, count)
        squares += float(np.dot(delta, delta))
        changed += int(np.count_nonzero(delta))
        sketch += _project(delta, signs, start)
        np.abs(delta, out=delta)
        total += float(np.add.reduce(delta))
        largest = max(largest, float(np.maximum.reduce(delta)))
        if histogram is not None:
            _count_magnitudes(delta, histogram)
    return DeltaStatistics(elements, changed, squares**0.5, total, largest, sketch.astype(np.float32))


def magnitude_bin(magnitude: float) -> int:
    """The histogram bin of a magnitude."""
    return int(np.float32(magnitude).view(np.uint32)) >> 16


def bin_floor(index: int) -> float:
    """The smallest magnitude of a bin."""
    return float(np.uint32(index << 16).view(np.float32))


def pack_histogram(histogram: NDArray[np.int64]) -> bytes:
    """The catalog row: the number of non-empty bins (u32), their indices (u16 each), their counts (u64 each)."""
    bins = np.flatnonzero(histogram)
    return (
        len(bins).to_bytes(4, "little")
        + bins.astype("<u2").tobytes()
        + histogram[bins].astype("<u8").tobytes()
    )


def unpack_histogram(data: bytes) -> NDArray[np.int64]:
    """Inverse of :func:`pack_histogram`; raises DamagedError."""
    count = int.from_bytes(data[:4], "little")
    if len(data) != 4 + 10 * count:
        raise DamagedError("a magnitude histogram cannot be read", hint="Run `mp verify`.")
    histogram = np.zeros(HISTOGRAM_BINS, np.int64)
    bins = np.frombuffer(data, "<u2", count, 4)
    if count and int(bins.max()) >= HISTOGRAM_BINS:
        raise DamagedError("a magnitude histogram has a bin that does not exist")
    histogram[bins] = np.frombuffer(data, "<u8", count, 4 + 2 * count).astype(np.int64)
    return histogram


def to_float32(source: Bytes, dtype: DType, start: int, count: int, out: NDArray[np.float32]) -> None:
    """Elements ``start`` to ``start + count`` of a block as float32."""
    if dtype.name == "BF16":
        bits = out.view(np.uint32)
        np.copyto(bits, source.view("<u2")[start : start + count])
        np.left_shift(bits, 16, out=bits)
    else:
        kind = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype.name]
        np.copyto(out, source.view(kind)[start : start + count], casting="same_kind")


def _delta_tile(
    new: Bytes, old: Bytes, new_type: DType, old_type: DType, start: int, count: int
) -> NDArray[np.float32]:
    delta = scratch.bytes("delta", TILE_ELEMENTS * 4).view(np.float32)[:count]
    if new_type.name == "F64" and old_type.name == "F64":
        span = slice(start, start + count)
        np.copyto(delta, new.view("<f8")[span] - old.view("<f8")[span], casting="same_kind")
        return delta
    other = scratch.bytes("other", TILE_ELEMENTS * 4).view(np.float32)[:count]
    to_float32(new, new_type, start, count, delta)
    to_float32(old, old_type, start, count, other)
    np.subtract(delta, other, out=delta)
    return delta


def _project(delta: NDArray[np.float32], signs: NDArray[np.float32], start: int) -> NDArray[Any]:
    """This tile's share of the sketch; tiles differ by a sign, so that repeated tiles do not add up."""
    count = delta.size
    signed = scratch.bytes("other", TILE_ELEMENTS * 4).view(np.float32)[:count]
    np.multiply(delta, signs[:count], out=signed)
    whole = count // SKETCH_SIZE * SKETCH_SIZE
    sums = _ones(whole // SKETCH_SIZE) @ signed[:whole].reshape(-1, SKETCH_SIZE)
    if whole < count:
        sums[: count - whole] += signed[whole:]
    tile = start // TILE_ELEMENTS
    return -sums if (tile * 0x9E3779B1 >> 16) & 1 else sums


def _count_magnitudes(magnitudes: NDArray[np.float32], histogram: NDArray[np.int64]) -> None:
    """Add one tile's magnitudes; the upper half of a float32 is its bin."""
    index = scratch.bytes("index", TILE_ELEMENTS * 8).view(np.int64)[: magnitudes.size]
    np.copyto(index, magnitudes.view("<u2")[1::2])
    counts = np.bincount(index)
    # A NaN may carry a sign bit; it counts as the largest magnitude there is.
    if counts.size > HISTOGRAM_BINS:
        counts[HISTOGRAM_BINS - 1] += counts[HISTOGRAM_BINS:].sum()
        counts = counts[:HISTOGRAM_BINS]
    histogram[: counts.size] += counts


def _signs() -> NDArray[np.float32]:
    found = _tables.get("signs")
    if found is None:
        generator = np.random.Generator(np.random.Philox(key=20260213))
        found = (generator.integers(0, 2, TILE_ELEMENTS).astype(np.float32) * 2 - 1).astype(np.float32)
        _tables["signs"] = found
    return found


def _ones(count: int) -> NDArray[np.float32]:
    found = _tables.get("ones")
    if found is None:
        found = _tables["ones"] = np.ones(TILE_ELEMENTS // SKETCH_SIZE, np.float32)
    return found[:count]


_tables: dict[str, NDArray[np.float32]] = {}
