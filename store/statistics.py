"""Delta statistics: what the planner knows of a block before anything is read.

Kept by the pair (base block, block), so that models that share blocks share their statistics. All values are of the
delta ``new - base`` taken in float32 (float64 for F64 tensors), over one block.

The sketch is a random projection with ±1 entries into 64 sums: element ``i`` is added to sum ``i mod 64`` with a
sign that depends on ``i`` alone (bit ``i mod 64`` of splitmix64's output number ``i // 64``), so for two experts at the
same place ``dot(sketch_a, sketch_b)`` is an unbiased
estimate of ``dot(delta_a, delta_b)`` (a count sketch: Charikar, Chen and Farach-Colton, 2002).

The magnitude histogram of a whole tensor counts ``|delta|`` by the upper 15 bits of its float32 pattern (8 of
exponent, 7 of mantissa), 32,768 bins that add up over blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.store.codecs import Bytes, scratch
from mergepipe.store.dtypes import DType
from mergepipe.store.errors import DamagedError
from mergepipe.store.norms import HEAD, HISTOGRAM_BINS, SKETCH_SIZE

_NO_COUNTS: Final = np.empty((2, 0), np.uint32)


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
        head = HEAD.pack(self.elements, self.changed, self.l2, self.l1, self.largest)
        return head + self.sketch.astype("<f4").tobytes()


def unpack_statistics(data: bytes) -> DeltaStatistics:
    """Inverse of :meth:`DeltaStatistics.pack`; raises DamagedError."""
    if len(data) != HEAD.size + 4 * SKETCH_SIZE:
        raise DamagedError("a row of delta statistics cannot be read", hint="Run `mp verify`.")
    elements, changed, l2, l1, largest = HEAD.unpack(data[: HEAD.size])
    return DeltaStatistics(elements, changed, l2, l1, largest, np.frombuffer(data, "<f4", offset=HEAD.size))


def block_statistics(
    new: Bytes, old: Bytes, new_type: DType, old_type: DType, histogram: NDArray[np.int64] | None
) -> DeltaStatistics:
    """Statistics of ``new - old``, both the bytes of one block; adds magnitudes to ``histogram`` (32,768 bins)."""
    with np.errstate(all="ignore"):  # infinities and NaNs in weights are data, not mistakes of ours
        return _block_statistics(new, old, new_type, old_type, histogram)


def _block_statistics(
    new: Bytes, old: Bytes, new_type: DType, old_type: DType, histogram: NDArray[np.int64] | None
) -> DeltaStatistics:
    from mergepipe.store import kernels  # here: most who read statistics make none, and a compiler loads slowly

    elements = new.nbytes * 8 // new_type.bits
    counts = _NO_COUNTS
    if histogram is not None:
        counts = scratch.bytes("counts", 2 * HISTOGRAM_BINS * 4).view(np.uint32).reshape(2, HISTOGRAM_BINS)
        counts.fill(0)
    sketch = np.zeros(SKETCH_SIZE, np.float64)
    sums = np.zeros(4, np.float64)
    if new_type.name == old_type.name == "BF16":
        kernels.statistics_bfloat16(new.view("<u2"), old.view("<u2"), counts, sketch, sums)
    else:
        kernels.statistics_float32(float32_delta(new, old, new_type, old_type, elements), counts, sketch, sums)
    if histogram is not None:
        histogram += counts[0]
        histogram += counts[1]
    changed, squares, total, largest = (float(value) for value in sums)
    return DeltaStatistics(elements, int(changed), squares**0.5, total, largest, sketch.astype(np.float32))


def magnitude_bin(magnitude: float) -> int:
    """The histogram bin of a magnitude."""
    return int(np.float32(magnitude).view(np.uint32)) >> 16


def bin_floor(index: int) -> float:
    """The smallest magnitude of a bin."""
    return float(np.uint32(index << 16).view(np.float32))


def pack_histogram(histogram: NDArray[np.int64]) -> bytes:
    """The catalog row: the number of non-empty bins (u32), their indices (u16 each), their counts (u64 each)."""
    bins = np.flatnonzero(histogram)
    return len(bins).to_bytes(4, "little") + bins.astype("<u2").tobytes() + histogram[bins].astype("<u8").tobytes()


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


def float32_delta(new: Bytes, old: Bytes, new_type: DType, old_type: DType, elements: int) -> NDArray[np.float32]:
    """``new - old`` in this thread's scratch, as statistics are taken of it."""
    delta = scratch.bytes("delta", elements * 4).view(np.float32)
    if new_type.name == old_type.name == "F64":
        np.subtract(new.view("<f8"), old.view("<f8"), out=delta, casting="same_kind")
        return delta
    other = scratch.bytes("other", elements * 4).view(np.float32)
    to_float32(new, new_type, 0, elements, delta)
    to_float32(old, old_type, 0, elements, other)
    np.subtract(delta, other, out=delta)
    return delta
