"""Tensors with their rows rearranged, streaming: input blocks in, output blocks staged.

The output is made in bands of whole chunks, at most ``BAND_BYTES`` of it at once. For each band every input block that
it needs is decoded once, and its rows go where the map says; then the band's blocks are hashed, encoded and staged.
What was made before is known by its recipe (input tensors and map, hashed) and costs no reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.vocabulary import RowMap
from mergepipe.store.canonical import dump_canonical
from mergepipe.store.chunking import block_count
from mergepipe.store.codecs import Bytes, scratch
from mergepipe.store.digest import DIGEST_BYTES, Digest, hash_bytes, hash_record
from mergepipe.store.dtypes import DType
from mergepipe.store.errors import BadInputError
from mergepipe.store.frame import Kind
from mergepipe.store.manifest import TensorEntry
from mergepipe.store.parallel import default_workers, run_bounded
from mergepipe.store.staging import Staging, is_stored
from mergepipe.store.store import Store

BAND_BYTES: Final = 64 << 20
_LEVELS: Final = 4
_NUMPY: Final[Mapping[str, Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}  # fmt: skip
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor to make: rows of ``sources`` (by the model's index), arranged as ``rows`` says for model ``own``."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    rows: RowMap
    own: int
    sources: Mapping[int, TensorEntry]

    @property
    def row_bytes(self) -> int:
        return self.dtype.nbytes(_inner(self.shape))

    @property
    def recipe(self) -> Digest:
        """What the result depends on."""
        places = {number: place for place, number in enumerate(self.sources)}
        others = [
            [row, [[places[source], origin] for source, origin in terms]]
            for row, terms in sorted(self.rows.others.items())
        ]
        value = {
            "rearranged": 1,
            "rows": [self.rows.rows, self.rows.real_rows, places[self.own]],
            "runs": [[run.out_start, run.in_start, run.count] for run in self.rows.runs],
            "others": others,
            "sources": [entry.id.hex() for entry in self.sources.values()],
            "out": [self.dtype.name, list(self.shape), list(self.chunks)],
        }
        return hash_record("recipe", dump_canonical(value))


@dataclass
class Rearranging:
    """What is shared by the tensors of one run. ``results`` maps new recipes to their blocks."""

    store: Store
    staging: Staging
    pool: ThreadPoolExecutor
    results: dict[bytes, Digest] = field(default_factory=dict)
    relied_on: set[Digest] = field(default_factory=set)

    def each(self, work: Callable[[Any], None], items: Iterator[Any]) -> None:
        run_bounded(self.pool, work, items, ahead=2 * default_workers())


def rearrange(run: Rearranging, target: Target) -> TensorEntry:
    """The tensor with its blocks stored or staged.

    Raises:
        BadInputError: its type is one that rows cannot be cut from, or averaged in.
        DamagedError: an input block is not what it was.
    """
    if _inner(target.shape) * target.dtype.bits % 8:
        raise BadInputError(f"{target.name}: rows of {target.dtype.name} are no whole bytes, and cannot be rearranged")
    entry = TensorEntry(target.dtype.name, target.shape, target.chunks, ())
    count = block_count(target.shape, target.chunks)
    recipe = target.recipe
    keys = [hash_record("recipe", recipe + index.to_bytes(8, "little")) for index in range(count)]
    sizes = [entry.block_span(index)[1] for index in range(count)]
    blocks = _known(run, keys, sizes) or _make(run, target, sizes)
    run.results.update(zip(keys, blocks, strict=True))
    run.relied_on.update(blocks)
    return TensorEntry(target.dtype.name, target.shape, target.chunks, blocks)


def _known(run: Rearranging, keys: list[Digest], sizes: list[int]) -> tuple[Digest, ...] | None:
    """The result's blocks where all of them are stored already."""
    blocks = []
    for key, size in zip(keys, sizes, strict=True):
        with run.store.catalog.reading() as view:
            found = view.get("results", key)
            row = view.object_row(Digest(found)) if found is not None and len(found) == DIGEST_BYTES else None
        if found is None or row is None or row.raw_bytes != size:
            return None
        if not is_stored(run.store.layout, run.store.catalog, Digest(found)):
            return None
        blocks.append(Digest(found))
    return tuple(blocks)


def _make(run: Rearranging, target: Target, sizes: list[int]) -> tuple[Digest, ...]:
    blocks: list[Digest] = []
    chunk = max(target.chunks[0], 1)
    step = max(BAND_BYTES // max(chunk * target.row_bytes, 1), 1) * chunk
    total = _ColumnSums(target) if target.rows.rows > target.rows.real_rows else None
    for start in range(0, target.rows.rows, step):
        band = np.zeros((min(step, target.rows.rows - start), target.row_bytes), np.uint8)
        _fill(run, target, start, band)
        if total is not None:
            real = min(max(target.rows.real_rows - start, 0), len(band))
            total.add(_widened(band[:real], target.dtype, total.wide))
            if real < len(band):
                band[real:] = _narrowed(total.mean(), target.dtype)
        blocks += _store(run, target, band, sizes[len(blocks) :])
    return tuple(blocks)


def _fill(run: Rearranging, target: Target, start: int, band: Bytes) -> None:
    """Put every row of a band where it belongs; those of no source stay zeros."""
    stop = start + len(band)
    own = [part for part in target.rows.runs if part.out_start < stop and part.out_start + part.count > start]
    out = [np.arange(max(part.out_start, start), min(part.out_start + part.count, stop)) for part in own]
    origin = [rows + (part.in_start - part.out_start) for rows, part in zip(out, own, strict=True)]
    copies = {target.own: (np.concatenate(out), np.concatenate(origin))} if own else {}
    others = {row: terms for row in range(start, stop) if (terms := target.rows.others.get(row))}
    for number in target.sources:
        single = [(row, terms[0][1]) for row, terms in others.items() if len(terms) == 1 and terms[0][0] == number]
        if single:
            _copy(run, target, number, _columns(single), start, band)
    for number, (rows, origins) in copies.items():
        _copy(run, target, number, (rows, origins), start, band)
    means = {row: terms for row, terms in others.items() if len(terms) > 1}
    if means:
        _average(run, target, means, start, band)


def _copy(
    run: Rearranging, target: Target, number: int, pairs: tuple[Indices, Indices], start: int, band: Bytes
) -> None:
    rows, origins = pairs
    dtype = target.sources[number].element_type

    def put(places: Indices, data: Bytes) -> None:
        if dtype.name != target.dtype.name:
            data = _narrowed(_widened(data, dtype, _wide(dtype, target.dtype)), target.dtype)
        band[rows[places] - start] = data

    _gather(run, target.sources[number], origins, put)


def _average(run: Rearranging, target: Target, means: Mapping[int, Any], start: int, band: Bytes) -> None:
    """Rows that are the mean of several models': summed in the order of the terms, then divided."""
    wide = _wide(target.dtype, *(entry.element_type for entry in target.sources.values()))
    rows = np.fromiter(means, np.int64, len(means))
    sums = np.zeros((len(rows), _inner(target.shape)), wide)
    for number, entry in target.sources.items():
        found = [
            (place, origin)
            for place, terms in enumerate(means.values())
            for source, origin in terms
            if source == number
        ]
        if not found:
            continue
        where, origins = _columns(found)

        def put(places: Indices, data: Bytes, where: Indices = where, dtype: DType = entry.element_type) -> None:
            sums[where[places]] += _widened(data, dtype, wide)

        _gather(run, entry, origins, put)
    sums /= np.array([len(terms) for terms in means.values()], wide)[:, None]
    band[rows - start] = _narrowed(sums, target.dtype)


def _columns(pairs: list[tuple[int, int]]) -> tuple[Indices, Indices]:
    table = np.array(pairs, np.int64)
    return table[:, 0], table[:, 1]


def _gather(run: Rearranging, entry: TensorEntry, origins: Indices, put: Callable[[Indices, Bytes], None]) -> None:
    """Call ``put(places, rows)`` from several threads with every row ``origins[places]`` of a tensor."""
    units = origins // entry.chunks[0]
    order = np.argsort(units, kind="stable")
    cuts = np.flatnonzero(np.diff(units[order])) + 1

    def work(places: Indices) -> None:
        unit = int(units[places[0]])
        put(places, _read_unit(run, entry, unit)[origins[places] - unit * entry.chunks[0]])

    run.each(work, iter(np.split(order, cuts)))


def _read_unit(run: Rearranging, entry: TensorEntry, unit: int) -> Bytes:
    """The rows of one chunk along the first axis: one block, or several where one row takes more than a block."""
    rows = min(entry.chunks[0], entry.shape[0] - unit * entry.chunks[0])
    row_bytes = entry.element_type.nbytes(_inner(entry.shape))
    out = scratch.bytes("rows", rows * row_bytes)
    blocks = len(entry.blocks) // -(-entry.shape[0] // entry.chunks[0])
    done = 0
    for index in range(unit * blocks, (unit + 1) * blocks):
        size = entry.block_span(index)[1]
        run.store.reader.read_block(entry.blocks[index], out[done : done + size])
        done += size
    return out.reshape(rows, row_bytes)


def _store(run: Rearranging, target: Target, band: Bytes, sizes: list[int]) -> list[Digest]:
    """Stage a band's blocks; ``sizes``: those of its blocks and of all after it."""
    data = band.reshape(-1)
    spans: list[tuple[int, int]] = []
    while sum(spans[-1]) < data.nbytes if spans else data.nbytes:
        spans.append((sum(spans[-1]) if spans else 0, sizes[len(spans)]))
    digests: list[Digest | None] = [None] * len(spans)

    def work(index: int) -> None:
        offset, size = spans[index]
        block = data[offset : offset + size]
        digests[index] = digest = hash_bytes(block.data)
        if run.staging.claim(digest):
            run.staging.add_block(Kind.BLOCK, digest, block, target.dtype.plane_bytes)

    run.each(work, iter(range(len(spans))))
    return [digest for digest in digests if digest is not None]


class _ColumnSums:
    """Sums over rows, in runs, runs of runs and so on, four deep: bit for bit torch's where a row has 64 n elements."""

    def __init__(self, target: Target) -> None:
        self.wide = _wide(target.dtype)
        self._rows = target.rows.real_rows
        self._power = max(4, (self._rows - 1).bit_length() // _LEVELS)
        self._sums = np.zeros((_LEVELS, _inner(target.shape)), self.wide)
        self._added = 0

    def add(self, rows: NDArray[Any]) -> None:
        """The next rows, in order."""
        whole = self._rows >> self._power << self._power
        mask = (1 << self._power) - 1
        for row in rows:
            self._sums[0] += row
            self._added += 1
            if self._added > whole or self._added & mask:
                continue
            for level in range(1, _LEVELS):
                self._sums[level] += self._sums[level - 1]
                self._sums[level - 1] = 0
                if self._added & (mask << (level * self._power)):
                    break

    def mean(self) -> NDArray[Any]:
        """The mean of all rows, of which none may be left to add."""
        total = self._sums[0].copy()
        for level in range(1, _LEVELS):
            total += self._sums[level]
        total /= self._rows
        mean: NDArray[Any] = total[None, :]
        return mean


def _inner(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape[1:], dtype=np.int64))


def _wide(*types: DType) -> np.dtype[Any]:
    return np.dtype(np.float64) if any(dtype.name == "F64" for dtype in types) else np.dtype(np.float32)


def _numpy(dtype: DType) -> Any:
    if dtype.name not in _NUMPY:
        raise BadInputError(f"rows of {dtype.name} can be moved, but not averaged or converted")
    return _NUMPY[dtype.name]


def _widened(rows: Bytes, dtype: DType, wide: np.dtype[Any]) -> NDArray[Any]:
    wider: NDArray[Any] = np.ascontiguousarray(rows).view(_numpy(dtype)).astype(wide)
    return wider


def _narrowed(values: NDArray[Any], dtype: DType) -> Bytes:
    with np.errstate(over="ignore", invalid="ignore"):  # beyond the type's range is infinity; NaNs are data
        narrow: NDArray[Any] = values.astype(_numpy(dtype))
    return narrow.view(np.uint8)
