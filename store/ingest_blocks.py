"""The inner work of ingest: every block of every checkpoint is read once, hashed, compared, encoded and measured.

Checkpoints that are ingested together against one base go through it side by side: the base's block is decoded once
and serves them all. Threads share the work by block; what they share is guarded by one lock, held for microseconds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mergepipe.store.catalog import Catalog
from mergepipe.store.checkpoint import TensorSource
from mergepipe.store.chunking import block_count, block_elements, chunk_shape
from mergepipe.store.codecs import Bytes, scratch
from mergepipe.store.digest import Digest, hash_bytes
from mergepipe.store.frame import Encoding, Kind
from mergepipe.store.manifest import TensorEntry
from mergepipe.store.objects import ObjectReader, Role
from mergepipe.store.staging import Staging
from mergepipe.store.statistics import (
    HISTOGRAM_BINS,
    block_statistics,
    pack_histogram,
)

Item = TypeVar("Item")
_PREFETCH_BLOCKS = 6


@dataclass
class TensorWork:
    """One tensor on its way in. ``base`` is the tensor that deltas are taken to, where there is one."""

    name: str
    source: TensorSource
    chunks: tuple[int, ...]
    base: TensorEntry | None
    blocks: list[Digest | None]
    left: int
    histogram: NDArray[np.int64] | None = None
    uncounted: list[int] = field(default_factory=list)
    reused: int = 0
    written_bytes: int = 0

    def span(self, index: int) -> tuple[int, int]:
        start, count = block_elements(self.source.shape, self.chunks, index)
        return self.source.dtype.nbytes(start), self.source.dtype.nbytes(count)

    def base_block(self, index: int) -> tuple[Digest, int] | None:
        """Id and size in bytes of the base's block that holds the same elements."""
        base = self.base
        if base is None or index >= len(base.blocks):
            return None
        if block_elements(base.shape, base.chunks, index) != block_elements(self.source.shape, self.chunks, index):
            return None
        return base.blocks[index], base.block_span(index)[1]

    def entry(self) -> TensorEntry:
        """The finished manifest entry."""
        blocks = tuple(block for block in self.blocks if block is not None)
        return TensorEntry(self.source.dtype.name, self.source.shape, self.chunks, blocks)


def plan_tensor(name: str, source: TensorSource, base: TensorEntry | None, target_bytes: int) -> TensorWork:
    """Choose the chunk shape: the base's where rows agree, so that blocks line up."""
    if base is not None and base.shape and base.shape[1:] == source.shape[1:]:
        chunks = base.chunks
    else:
        chunks = chunk_shape(source.shape, source.dtype.bits, target_bytes)
    count = block_count(source.shape, chunks)
    return TensorWork(name, source, chunks, base, [None] * count, count)


@dataclass
class BlockPipeline:
    """Runs tensors of several checkpoints through reading, hashing, encoding and statistics.

    After :meth:`run`, ``deltas`` and ``tensor_rows`` hold the catalog rows to publish, ``relied_on`` the ids of
    objects that were in the store already.
    """

    catalog: Catalog
    reader: ObjectReader
    staging: Staging
    workers: int
    advance: Callable[[int], None]
    deltas: dict[bytes, bytes] = field(default_factory=dict)
    tensor_rows: dict[bytes, bytes] = field(default_factory=dict)
    relied_on: set[Digest] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: bool = False

    def run(self, groups: Iterable[list[TensorWork]]) -> None:
        """Process groups of tensors that share a name, and so a base, block by block."""
        places = ((group, index) for group in groups for index in range(max(len(work.blocks) for work in group)))
        with ThreadPoolExecutor(self.workers, thread_name_prefix="ingest") as pool:
            try:
                run_bounded(pool, self._place, places, ahead=2 * self.workers)
            except BaseException:
                self._stopped = True
                raise

    def _place(self, place: tuple[list[TensorWork], int]) -> None:
        group, index = place
        base = _BaseBlock(self.catalog, self.reader)
        for work in group:
            if index < len(work.blocks) and not self._stopped:
                self._block(work, index, base)

    def _block(self, work: TensorWork, index: int, base: _BaseBlock) -> None:
        offset, size = work.span(index)
        data = scratch.bytes("incoming", size)
        if index % _PREFETCH_BLOCKS == 0:
            work.source.prefetch(offset + size, 2 * _PREFETCH_BLOCKS * size)
        work.source.read_into(offset, data)
        digest = hash_bytes(data.data)
        at_base = work.base_block(index)
        measured = False
        written = 0
        if at_base is None or at_base[0] != digest:
            new = self.staging.claim(digest)
            comparable = at_base is not None and _comparable(work)
            unmeasured = comparable and at_base is not None and not self._has_statistics(at_base[0], digest)
            if at_base is not None and (unmeasured or (new and at_base[1] == size)):
                base.load(*at_base)
            if new:
                written = self._store(work, digest, data, base, at_base)
            else:
                self.relied_on.add(digest)
            if unmeasured and at_base is not None:
                self._measure(work, digest, data, base.own, at_base[0])
                measured = True
        else:
            self.relied_on.add(digest)
        self._finish(work, index, digest, at_base, measured=measured, written=written)
        self.advance(size)

    def _store(
        self,
        work: TensorWork,
        digest: Digest,
        data: Bytes,
        base: _BaseBlock,
        at_base: tuple[Digest, int] | None,
    ) -> int:
        against = None
        if at_base is not None and at_base[1] == data.nbytes and work.base is not None and _same_type(work):
            against = base.root
        row = self.staging.add_block(Kind.BLOCK, digest, data, work.source.dtype.plane_bytes, against)
        return row.stored_bytes

    def _has_statistics(self, base: Digest, digest: Digest) -> bool:
        key = base + digest
        if key in self.deltas:
            return True
        with self.catalog.reading() as view:
            return view.get("deltas", key) is not None

    def _measure(self, work: TensorWork, digest: Digest, data: Bytes, base: Bytes, base_id: Digest) -> None:
        assert work.base is not None
        histogram = scratch.bytes("histogram", HISTOGRAM_BINS * 8).view(np.int64)
        histogram.fill(0)
        row = block_statistics(data, base, work.source.dtype, work.base.element_type, histogram)
        with self._lock:
            self.deltas[base_id + digest] = row.pack()
            _add_histogram(work, histogram)

    def _finish(
        self, work: TensorWork, index: int, digest: Digest, at_base: tuple[Digest, int] | None, *,
        measured: bool, written: int,
    ) -> None:  # fmt: skip
        with self._lock:
            work.blocks[index] = digest
            work.written_bytes += written
            work.reused += written == 0
            work.left -= 1
            if at_base is not None and at_base[0] == digest:
                _add_zeros(work, block_elements(work.source.shape, work.chunks, index)[1])
            elif at_base is not None and not measured:
                work.uncounted.append(index)
            last = work.left == 0
        if last and work.base is not None and _comparable(work):
            self._finish_tensor(work)

    def _finish_tensor(self, work: TensorWork) -> None:
        """Keep the magnitude histogram of a whole tensor, if it is not known and covers all elements."""
        assert work.base is not None
        entry = work.entry()
        if entry.blocks == work.base.blocks or entry.shape != work.base.shape:
            return
        key = work.base.id + entry.id
        with self.catalog.reading() as view:
            if view.get("tensors", key) is not None:
                return
        for index in work.uncounted:  # blocks whose own statistics were known from elsewhere
            self._count_again(work, index)
        if work.histogram is not None:
            with self._lock:
                self.tensor_rows[key] = pack_histogram(work.histogram)
                work.histogram = None

    def _count_again(self, work: TensorWork, index: int) -> None:
        at_base = work.base_block(index)
        assert at_base is not None
        assert work.base is not None
        offset, size = work.span(index)
        data = scratch.bytes("incoming", size)
        work.source.read_into(offset, data)
        base = _BaseBlock(self.catalog, self.reader)
        base.load(*at_base)
        histogram = scratch.bytes("histogram", HISTOGRAM_BINS * 8).view(np.int64)
        histogram.fill(0)
        block_statistics(data, base.own, work.source.dtype, work.base.element_type, histogram)
        with self._lock:
            _add_histogram(work, histogram)


class _BaseBlock:
    """The base's block of one place, decoded when first needed, and what deltas of it may be stored against.

    ``own`` is the base model's block; ``root`` an id and bytes that are no delta themselves: the block itself, or the
    block that it was stored against.
    """

    def __init__(self, catalog: Catalog, reader: ObjectReader) -> None:
        self._catalog = catalog
        self._reader = reader
        self._loaded: tuple[Digest, Bytes] | None = None
        self.root: tuple[Digest, Bytes] | None = None

    @property
    def own(self) -> Bytes:
        assert self._loaded is not None
        return self._loaded[1]

    def load(self, digest: Digest, size: int) -> None:
        if self._loaded is not None and self._loaded[0] == digest:
            return
        with self._catalog.reading() as view:
            row = view.object_row(digest)
        block = scratch.bytes("base", size)
        if row is not None and row.encoding is Encoding.DELTA and row.base is not None:
            root = scratch.bytes("root", size)
            self._reader.read_block(row.base, root, Role.BASE)
            self.root = (row.base, root)
            self._reader.read_block(digest, block, Role.BASE, self.root)
        else:
            self._reader.read_block(digest, block, Role.BASE)
            self.root = (digest, block)
        self._loaded = (digest, block)


def run_bounded(pool: ThreadPoolExecutor, work: Callable[[Item], None], items: Iterable[Item], ahead: int) -> None:
    """Run ``work`` over ``items`` in order, ``ahead`` at a time; the first error stops it and is raised."""
    waiting: set[Future[None]] = set()
    source: Iterator[Item] = iter(items)
    try:
        for item in source:
            waiting.add(pool.submit(work, item))
            if len(waiting) >= ahead:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
    except BaseException:
        for future in waiting:
            future.cancel()
        raise


def _comparable(work: TensorWork) -> bool:
    return work.base is not None and work.source.dtype.has_statistics and work.base.element_type.has_statistics


def _same_type(work: TensorWork) -> bool:
    return work.base is not None and work.base.dtype == work.source.dtype.name and work.source.dtype.is_float


def _add_histogram(work: TensorWork, histogram: NDArray[np.int64]) -> None:
    if work.histogram is None:
        work.histogram = np.zeros(HISTOGRAM_BINS, np.int64)
    work.histogram += histogram


def _add_zeros(work: TensorWork, count: int) -> None:
    if work.histogram is None:
        work.histogram = np.zeros(HISTOGRAM_BINS, np.int64)
    work.histogram[0] += count
