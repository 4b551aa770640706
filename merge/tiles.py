"""One place of a merge: blocks in, tiles through the method, a block out. The buffers are the thread's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.inputs import Virtual
from mergepipe.merge.job import Job
from mergepipe.merge.loaded import Loaded, Part, Pool
from mergepipe.merge.method import Coefficients, Method, Tile
from mergepipe.store.base_block import BaseBlock
from mergepipe.store.catalog import Catalog
from mergepipe.store.codecs import Bytes, scratch
from mergepipe.store.convert import from_float32
from mergepipe.store.digest import Digest
from mergepipe.store.dtypes import DType
from mergepipe.store.errors import DamagedError
from mergepipe.store.objects import ObjectReader, Role
from mergepipe.store.previews import Preview, content_size, read_preview
from mergepipe.store.statistics import to_float32

if TYPE_CHECKING:
    from mergepipe.merge.adapters import AdapterReader

_CACHE_BYTES: Final = 512 << 10  # the float32 tiles of all experts together stay in a core's second-level cache
_LEAST_ELEMENTS: Final = 8 << 10
_STEP: Final = 1024


def apply_here(method: Method, tile: Tile, coefficients: Coefficients, out: NDArray[np.float32]) -> None:
    """Apply a method to a tile on this processor."""
    method.apply(tile, coefficients, out)


@dataclass(slots=True)
class Bench:
    """What places are worked on with: the store's catalog and reader, and the virtual blocks.

    ``apply``: where tiles are merged; ``tile_bytes``: how large the float32 inputs of such a tile may be together.
    Passes run on the processor, on tiles of its own size: their sums depend on how a block is cut.
    """

    catalog: Catalog
    reader: ObjectReader
    virtual: dict[Digest, Virtual] = field(default_factory=dict)
    adapters: AdapterReader | None = None
    apply: Callable[[Method, Tile, Coefficients, NDArray[np.float32]], None] = apply_here
    tile_bytes: int = _CACHE_BYTES
    pool: Pool = field(default_factory=Pool)


def load(bench: Bench, job: Job, index: int, experts: tuple[Digest, ...], *, held: bool = False) -> Loaded:
    """Read a place. ``experts``: each one's block, the reference's where it is not read, or does not differ.

    ``held``: into memory of its own, which outlives the thread's next place.

    Raises:
        DamagedError: an input is not what it was.
    """
    own = job.reference.blocks[index]
    size = job.reference.block_span(index)[1]
    base_type = job.reference.element_type
    base = BaseBlock(bench.catalog, bench.reader)
    base.load(own, size)
    assert base.root is not None
    stack = _stack(bench, job, experts, size, held=held)
    rows = None if stack is None else stack.view(np.uint8)
    reading = _Reading(bench, base, size * 8 // base_type.bits, len(experts), rows)
    parts = tuple(
        None if digest == own else reading.part(number, digest, entry.element_type)
        for number, (digest, entry) in enumerate(zip(experts, job.experts, strict=True))
    )
    loaded = Loaded(base.own, base_type, base.root, parts, stack)
    return _hold(bench.pool, loaded) if held else loaded


def _stack(bench: Bench, job: Job, experts: tuple[Digest, ...], size: int, *, held: bool) -> NDArray[np.uint16] | None:
    """Room for all experts' blocks at once, where they are of the kind that has a short way to tiles."""
    if not experts or job.reference.dtype != "BF16" or any(entry.dtype != "BF16" for entry in job.experts):
        return None
    if any(digest in bench.virtual and bench.virtual[digest].preview is None for digest in experts):
        return None
    total = size * len(experts)
    room = bench.pool.take(total) if held else scratch.bytes("experts", total)
    return room.view("<u2").reshape(len(experts), -1)


def _hold(pool: Pool, loaded: Loaded) -> Loaded:
    """The same in memory of its own; a stack is that already."""
    copies: dict[int, Bytes] = {}

    def own(block: Bytes | None) -> Bytes | None:
        if block is None:
            return None
        if id(block) not in copies:
            copy = copies[id(block)] = pool.take(block.nbytes)
            copy[:] = block
        return copies[id(block)]

    base, root = own(loaded.base), own(loaded.root[1])
    assert base is not None
    assert root is not None
    parts = loaded.parts
    if loaded.stack is None:
        parts = tuple(part and replace(part, block=own(part.block), onto=own(part.onto)) for part in parts)
    return replace(loaded, base=base, root=(loaded.root[0], root), parts=parts)


@dataclass
class _Reading:
    """One place's experts being read, each distinct block once.

    What a virtual block is computed from is read for it alone, even where others need it too: so it is planned.
    """

    bench: Bench
    base: BaseBlock
    elements: int
    experts: int
    stack: NDArray[np.uint8] | None
    known: dict[tuple[Digest, Digest], Bytes] = field(default_factory=dict)

    def part(self, number: int, digest: Digest, dtype: DType) -> Part:
        made_of = self.bench.virtual.get(digest)
        if made_of is None and self.stack is not None:
            return Part(dtype, self._row(self.stack[number], digest))
        if made_of is None:
            return Part(dtype, self._block(f"expert{number}", digest, dtype, digest))
        if made_of.preview is not None:
            return Part(dtype, None, made_of, None, self._preview(number, made_of.preview))
        block = None
        if made_of.block is not None and made_of.dtype is not None:
            block = self._block(f"expert{number}", made_of.block, made_of.dtype, digest)
        onto_id, onto_type = made_of.onto
        onto = None if onto_id == self.base.id else self._block(f"onto{number}", onto_id, onto_type, digest)
        return Part(dtype, block, made_of, onto)

    def _row(self, row: Bytes, digest: Digest) -> Bytes:
        """One expert's row of the stack; a block that several have is read once, and copied."""
        if (digest, digest) in self.known:
            row[:] = self.known[digest, digest]
        else:
            self.bench.reader.read_block(digest, row, Role.EXPERT, self.base.root)
            self.known[digest, digest] = row
        return row

    def _preview(self, number: int, digest: Digest) -> Preview:
        """One expert's preview, in its row of all; one that several have is read once, and copied."""
        size = content_size(self.elements)
        content = scratch.bytes("previews", size * self.experts)[number * size : (number + 1) * size]
        if (digest, digest) in self.known:
            content[:] = self.known[digest, digest]
        else:
            self.bench.reader.read_block(digest, content, Role.EXPERT)
            self.known[digest, digest] = content
        try:
            preview = read_preview(content)
            if preview.base != self.base.id or preview.elements != self.elements:
                raise ValueError("it is one of another block")
        except ValueError as error:
            raise DamagedError(f"object {digest.short} is no preview of its block: {error}") from error
        return preview

    def _block(self, buffer: str, digest: Digest, dtype: DType, owner: Digest) -> Bytes:
        if (owner, digest) not in self.known:
            block = scratch.bytes(buffer, dtype.nbytes(self.elements))
            self.bench.reader.read_block(digest, block, Role.EXPERT, self.base.root)
            self.known[owner, digest] = block
        return self.known[owner, digest]


def tiles(
    bench: Bench,
    job: Job,
    index: int,
    loaded: Loaded,
    *,
    deltas: bool,
    whole_rows: bool = False,
    tile_bytes: int = _CACHE_BYTES,
) -> Iterator[tuple[Tile, NDArray[np.float32]]]:
    """A place's inputs as float32 tiles, each with room for its result, one after the other in the same buffers."""
    offset, size = job.reference.block_span(index)
    bits = loaded.base_type.bits
    first, elements = offset * 8 // bits, size * 8 // bits
    row = job.reference.shape[-1] if job.reference.shape else 1
    step = tile_elements(len(job.experts), elements, row if whole_rows else 1, tile_bytes)
    height = len(job.experts) + 2
    buffer = scratch.bytes("tiles", height * step * 4).view(np.float32)
    from mergepipe.merge import tile_kernels

    present = loaded.present
    fill = tile_kernels.deltas_of if deltas else tile_kernels.weights_of
    for start in range(0, elements, step):
        count = min(step, elements - start)
        rows = buffer[: height * count].reshape(height, count)  # contiguous, or kernels are not vectorised
        experts, base_tile, result = rows[:-2], rows[-2], rows[-1]
        if loaded.stack is not None:
            fill(loaded.stack, present, loaded.base.view("<u2"), start, rows)
            for part, out in zip(loaded.parts, experts, strict=True):
                if part is not None and part.preview is not None:
                    _fill_virtual(bench, part, first + start, start, base_tile, out, deltas=deltas)
            yield Tile(base_tile, experts, first + start, row), result
            continue
        widen(loaded.base, loaded.base_type, start, base_tile)
        for part, out in zip(loaded.parts, experts, strict=True):
            if part is None:
                out[:] = 0 if deltas else base_tile  # zero also where the base is infinite
            elif part.virtual is not None:
                _fill_virtual(bench, part, first + start, start, base_tile, out, deltas=deltas)
            elif deltas:
                _delta(part, loaded, start, base_tile, out)
            else:
                assert part.block is not None
                widen(part.block, part.dtype, start, out)
        yield Tile(base_tile, experts, first + start, row), result


def tile_elements(experts: int, elements: int, row: int, tile_bytes: int = _CACHE_BYTES) -> int:
    """How many elements a tile has: near what the cache holds, in whole rows."""
    step = max(tile_bytes // (4 * (experts + 2)) // _STEP * _STEP, _LEAST_ELEMENTS)
    if row > 1:
        step = max(step // row, 1) * row
    return max(min(step, elements), 1)


def merge_tiles(
    bench: Bench,
    method: Method,
    coefficients: Coefficients,
    job: Job,
    index: int,
    loaded: Loaded,
    out_type: DType,
    *,
    based: bool,
) -> Bytes:
    """The merged block in ``out_type``, in this thread's scratch."""
    offset, size = job.reference.block_span(index)
    elements = size * 8 // loaded.base_type.bits
    out = scratch.bytes("merged", out_type.nbytes(elements))
    stack = loaded.as_stack()
    if stack is not None and out_type.name == "BF16" and method.apply_stack and bench.apply is apply_here:
        method.apply_stack(stack, coefficients, out.view("<u2"))
        return out
    first = offset * 8 // loaded.base_type.bits
    deltas = method.takes_deltas(based=based)
    inputs = tiles(bench, job, index, loaded, deltas=deltas, whole_rows=method.rows, tile_bytes=bench.tile_bytes)
    for tile, result in inputs:
        bench.apply(method, tile, coefficients, result)
        narrow(result, out_type, tile.start - first, out)
    return out


def _delta(part: Part, loaded: Loaded, start: int, base_tile: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """An expert's delta, as its statistics were taken: float64 weights are subtracted before they are rounded."""
    assert part.block is not None
    if part.dtype.name == loaded.base_type.name == "F64":
        span = slice(start, start + out.size)
        with np.errstate(over="ignore", invalid="ignore"):
            np.subtract(part.block.view("<f8")[span], loaded.base.view("<f8")[span], out=out, casting="same_kind")
    else:
        widen(part.block, part.dtype, start, out)
        np.subtract(out, base_tile, out=out)


def _fill_virtual(
    bench: Bench,
    part: Part,
    element: int,
    start: int,
    base_tile: NDArray[np.float32],
    out: NDArray[np.float32],
    *,
    deltas: bool,
) -> None:
    """A virtual block's delta, or its weights: what it is added to, plus the delta. ``element``: in the tensor."""
    assert part.virtual is not None
    if part.virtual.low is not None:
        assert bench.adapters is not None
        bench.adapters.delta_into(part.virtual.low, element, out)
    elif part.preview is not None:
        part.preview.delta_into(start, out)
    else:
        assert part.block is not None
        assert part.virtual.dtype is not None
        widen(part.block, part.virtual.dtype, start, out)
    if part.onto is not None:
        onto = scratch.bytes("onto tile", out.size * 4).view(np.float32)
        widen(part.onto, part.virtual.onto[1], start, onto)
        np.add(out, onto, out=out)
        if deltas:
            np.subtract(out, base_tile, out=out)
    elif not deltas:
        np.add(out, base_tile, out=out)


def widen(source: Bytes, dtype: DType, start: int, out: NDArray[np.float32]) -> None:
    """Elements of a block, from ``start`` on, as float32."""
    if dtype.name == "BF16":
        from mergepipe.merge import kernels

        kernels.widen_bfloat16(source.view("<u2")[start : start + out.size], out.view(np.uint32))
    else:
        to_float32(source, dtype, start, out.size, out)


def narrow(values: NDArray[np.float32], dtype: DType, start: int, out: Bytes) -> None:
    """Round float32 values into a block, to nearest even."""
    width = dtype.bits // 8
    target = out[start * width : (start + values.size) * width]
    if dtype.name == "BF16":
        from mergepipe.merge import kernels

        kernels.round_bfloat16(values.view(np.uint32), target.view("<u2"))
    else:
        from_float32(values, dtype, target)
