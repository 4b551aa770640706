"""One place of a merge: blocks in, tiles through the method, a block out. The buffers are the thread's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge import kernels
from mergepipe.merge.method import Coefficients, Method
from mergepipe.store.base_block import BaseBlock
from mergepipe.store.catalog import Catalog
from mergepipe.store.codecs import Bytes, scratch
from mergepipe.store.convert import from_float32
from mergepipe.store.digest import Digest, hash_bytes
from mergepipe.store.dtypes import DType
from mergepipe.store.frame import Kind
from mergepipe.store.objects import ObjectReader, Role
from mergepipe.store.staging import Staging
from mergepipe.store.statistics import DeltaStatistics, block_statistics, to_float32

_CACHE_BYTES: Final = 512 << 10  # the float32 tiles of all experts together stay in a core's second-level cache
_LEAST_ELEMENTS: Final = 8 << 10


@dataclass(frozen=True, slots=True)
class PlaceWork:
    """What one place needs. An expert that is not read, or does not differ, has the base's block in ``experts``."""

    method: Method
    coefficients: Coefficients
    base: Digest
    experts: tuple[Digest, ...]
    base_type: DType
    expert_types: tuple[DType, ...]
    out_type: DType
    size_bytes: int

    @property
    def elements(self) -> int:
        return self.size_bytes * 8 // self.base_type.bits


def merge_place(
    catalog: Catalog, reader: ObjectReader, staging: Staging, place: PlaceWork
) -> tuple[Digest, DeltaStatistics]:
    """Compute one block and stage it; returns its id, and the statistics of its difference to the base's block.

    Raises:
        DamagedError: an input is not what it was.
    """
    base = BaseBlock(catalog, reader)
    base.load(place.base, place.size_bytes)
    inputs = _read_experts(reader, place, base)
    out = scratch.bytes("merged", place.out_type.nbytes(place.elements))
    _merge_tiles(place, base.own, inputs, out)
    digest = hash_bytes(out.data)
    if staging.claim(digest):
        against = base.root if place.out_type is place.base_type else None
        staging.add_block(Kind.BLOCK, digest, out, place.out_type.plane_bytes, against)
    return digest, block_statistics(out, base.own, place.out_type, place.base_type, None)


def _read_experts(reader: ObjectReader, place: PlaceWork, base: BaseBlock) -> list[Bytes]:
    """Each expert's block, each distinct one read once."""
    blocks: dict[Digest, Bytes] = {place.base: base.own}
    for number, (digest, dtype) in enumerate(zip(place.experts, place.expert_types, strict=True)):
        if digest not in blocks:
            block = scratch.bytes(f"expert{number}", dtype.nbytes(place.elements))
            reader.read_block(digest, block, Role.EXPERT, base.root)
            blocks[digest] = block
    return [blocks[digest] for digest in place.experts]


def _merge_tiles(place: PlaceWork, base: Bytes, inputs: list[Bytes], out: Bytes) -> None:
    count = len(inputs)
    step = max(_CACHE_BYTES // (4 * (count + 2)) // 1024 * 1024, _LEAST_ELEMENTS)
    step = min(step, max(place.elements, 1))
    rows = scratch.bytes("tiles", (count + 2) * step * 4).view(np.float32).reshape(count + 2, step)
    types = [
        place.base_type if block is base else dtype for block, dtype in zip(inputs, place.expert_types, strict=True)
    ]
    for start in range(0, place.elements, step):
        size = min(step, place.elements - start)
        base_tile, result = rows[count][:size], rows[count + 1][:size]
        _widen(base, place.base_type, start, base_tile)
        experts = rows[:count, :size]
        for number, (block, dtype) in enumerate(zip(inputs, types, strict=True)):
            if place.method.takes == "weights":
                _widen(block, dtype, start, experts[number])
            else:
                _delta(block, dtype, base, place.base_type, start, base_tile, experts[number])
        place.method.apply(base_tile, experts, place.coefficients, result)
        _narrow(result, place.out_type, start, out)


def _delta(
    block: Bytes, dtype: DType, base: Bytes, base_type: DType, start: int,
    base_tile: NDArray[np.float32], out: NDArray[np.float32],
) -> None:  # fmt: skip
    """An expert's delta, as its statistics were taken: float64 weights are subtracted before they are rounded."""
    if block is base:
        out[:] = 0  # also where the base is infinite
    elif dtype.name == base_type.name == "F64":
        part = slice(start, start + out.size)
        with np.errstate(over="ignore", invalid="ignore"):
            np.subtract(block.view("<f8")[part], base.view("<f8")[part], out=out, casting="same_kind")
    else:
        _widen(block, dtype, start, out)
        kernels.subtract(out, base_tile)


def _widen(source: Bytes, dtype: DType, start: int, out: NDArray[np.float32]) -> None:
    if dtype.name == "BF16":
        kernels.widen_bfloat16(source.view("<u2")[start : start + out.size], out.view(np.uint32))
    else:
        to_float32(source, dtype, start, out.size, out)


def _narrow(values: NDArray[np.float32], dtype: DType, start: int, out: Bytes) -> None:
    width = dtype.bits // 8
    target = out[start * width : (start + values.size) * width]
    if dtype.name == "BF16":
        kernels.round_bfloat16(values.view(np.uint32), target.view("<u2"))
    else:
        from_float32(values, dtype, target)
