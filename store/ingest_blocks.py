"""The inner work of ingest: every block of every checkpoint is read once, hashed, compared, encoded and measured.

Checkpoints that are ingested together against one base go through it side by side: the base's block is decoded once
and serves them all. Threads share the work by block; what they share is guarded by one lock, held for microseconds.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mergepipe.store.base_block import BaseBlock
from mergepipe.store.catalog import Catalog
from mergepipe.store.checkpoint import TensorSource
from mergepipe.store.chunking import block_count, block_elements, chunk_shape
from mergepipe.store.codecs import Bytes, scratch
from mergepipe.store.digest import Digest, hash_bytes
from mergepipe.store.frame import Kind
from mergepipe.store.manifest import TensorEntry
from mergepipe.store.norms import HISTOGRAM_BINS
from mergepipe.store.objects import ObjectReader, Role
from mergepipe.store.parallel import run_bounded
from mergepipe.store.preview_level import Candidate, choose_level
from mergepipe.store.previews import COARSE, lacks_preview, preview_key, preview_rows, store_preview
from mergepipe.store.staging import Staging
from mergepipe.store.statistics import DeltaStatistics, block_statistics, pack_histogram

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
    preview_level: int = COARSE
    previews: int = 0
    preview_bytes: int = 0

    def span(self, index: int) -> tuple[int, int]:
        start, count = block_elements(self.source.shape, self.chunks, index)
        return self.source.dtype.nbytes(start), self.source.dtype.nbytes(count)

    @property
    def nbytes(self) -> int:
        return self.source.dtype.nbytes(math.prod(self.source.shape))

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

    After :meth:`run`, ``deltas``, ``previews`` and ``tensor_rows`` hold the catalog rows to publish, ``relied_on`` the
    ids of objects that were in the store already.
    """

    catalog: Catalog
    reader: ObjectReader
    staging: Staging
    workers: int
    advance: Callable[[int], None]
    with_previews: bool = False
    previews: dict[bytes, bytes] = field(default_factory=dict)
    deltas: dict[bytes, bytes] = field(default_factory=dict)
    tensor_rows: dict[bytes, bytes] = field(default_factory=dict)
    relied_on: set[Digest] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: bool = False
    _looked_into: set[bytes] = field(default_factory=set)
    _put_off: list[tuple[TensorWork, int]] = field(default_factory=list)

    def run(self, groups: Iterable[list[TensorWork]]) -> None:
        """Process groups of tensors that share a name, and so a base, block by block."""
        places = ((group, index) for group in groups for index in range(max(len(work.blocks) for work in group)))
        with ThreadPoolExecutor(self.workers, thread_name_prefix="ingest") as pool:
            try:
                run_bounded(pool, self._place, places, ahead=2 * self.workers)
            except BaseException:
                self._stopped = True
                raise
        put_off, self._put_off = self._put_off, []
        for work, index in put_off:
            digest, data, base = self._read_again(work, index)
            self._preview(work, index, digest, data, base)

    def _place(self, place: tuple[list[TensorWork], int]) -> None:
        group, index = place
        base = BaseBlock(self.catalog, self.reader)
        for work in group:
            if index < len(work.blocks) and not self._stopped:
                self._block(work, index, base)

    def _block(self, work: TensorWork, index: int, base: BaseBlock) -> None:
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
            unseen = comparable and at_base is not None and self._wants_preview(work, at_base[0], digest)
            if at_base is not None and (unmeasured or unseen or (new and at_base[1] == size)):
                base.load(*at_base)
            if new:
                written = self._store(work, digest, data, base, at_base)
            else:
                self.relied_on.add(digest)
            if unmeasured and at_base is not None:
                self._measure(work, digest, data, base.own, at_base[0])
                measured = True
            if unseen and at_base is not None:
                self._preview(work, index, digest, data, base)
        elif self.staging.claim(digest):  # the base's own object was lost: write it anew
            written = self.staging.add_block(Kind.BLOCK, digest, data, work.source.dtype.plane_bytes).stored_bytes
        else:
            self.relied_on.add(digest)
        self._finish(work, index, digest, at_base, measured=measured, written=written)
        self.advance(size)

    def _store(
        self,
        work: TensorWork,
        digest: Digest,
        data: Bytes,
        base: BaseBlock,
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
        row = self._histogram(work, data, base)
        with self._lock:
            self.deltas[base_id + digest] = row.pack()
            _add_histogram(work, scratch.bytes("histogram", HISTOGRAM_BINS * 8).view(np.int64))

    def _wants_preview(self, work: TensorWork, base: Digest, digest: Digest) -> bool:
        """Whether this block's preview is to be made, and nobody has begun to."""
        if not self.with_previews:
            return False
        key = preview_key(base, digest, work.preview_level)
        with self._lock:
            if key in self._looked_into:
                return False
            self._looked_into.add(key)  # this thread makes it
        with self.catalog.reading() as view:
            return lacks_preview(self.staging.layout, view, base, digest)

    def _preview(self, work: TensorWork, index: int, digest: Digest, data: Bytes, base: BaseBlock) -> None:
        """Make the preview of a block."""
        assert work.base is not None
        exact = self.staging.row_of(digest)
        if exact is None:  # another thread, at another place with these bytes, is writing it
            with self._lock:
                self._put_off.append((work, index))
            return
        types = work.source.dtype, work.base.element_type
        level = work.preview_level
        found = store_preview(self.staging, data, base.own, *types, base.id, digest, exact.stored_bytes, level)
        with self.catalog.reading() as view:
            rows = preview_rows(view, base.id, digest, level, found)
        with self._lock:
            self.previews.update(rows)
            if found is not None:
                work.previews += 1
                if found.id in self.staging.rows:  # else its object was there
                    work.preview_bytes += found.stored_bytes

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
            self._read_again(work, index)
            with self._lock:
                _add_histogram(work, scratch.bytes("histogram", HISTOGRAM_BINS * 8).view(np.int64))
        if work.histogram is not None:
            with self._lock:
                self.tensor_rows[key] = pack_histogram(work.histogram)
                work.histogram = None

    def _read_again(self, work: TensorWork, index: int) -> tuple[Digest, Bytes, BaseBlock]:
        """A block that is done, its bytes and the base's; its histogram is in this thread's scratch."""
        at_base, digest = work.base_block(index), work.blocks[index]
        assert at_base is not None
        assert digest is not None
        offset, size = work.span(index)
        data = scratch.bytes("incoming", size)
        work.source.read_into(offset, data)
        base = BaseBlock(self.catalog, self.reader, "recount")  # the caller's own base block is still in use
        base.load(*at_base)
        self._histogram(work, data, base.own)
        return digest, data, base

    def _histogram(self, work: TensorWork, data: Bytes, base: Bytes) -> DeltaStatistics:
        """Statistics of a block's delta, and its histogram in this thread's scratch."""
        assert work.base is not None
        histogram = scratch.bytes("histogram", HISTOGRAM_BINS * 8).view(np.int64)
        histogram.fill(0)
        return block_statistics(data, base, work.source.dtype, work.base.element_type, histogram)


def preview_level(works: Sequence[TensorWork], reader: ObjectReader) -> int:
    """The level of the previews of a model that is on its way in; reads a few blocks, which are read again soon."""

    def middle(work: TensorWork) -> tuple[Bytes, Bytes] | None:
        index = len(work.blocks) // 2
        at_base = work.base_block(index)
        offset, size = work.span(index)
        if at_base is None or at_base[1] != size:
            return None
        new = scratch.bytes("incoming", size)
        work.source.read_into(offset, new)
        if hash_bytes(new.data) == at_base[0]:
            return None
        old = scratch.bytes("base", size)
        reader.read_block(at_base[0], old, Role.BASE)
        return new, old

    candidates = [
        Candidate(work.name, work.nbytes, work.source.dtype.bits, partial(middle, work))
        for work in works
        if work.blocks and _comparable(work)
    ]
    return choose_level(candidates, sum(work.nbytes for work in works))


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
