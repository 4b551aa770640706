"""What ingest would have measured: statistics and previews of a pair of models that were stored without each other."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mergepipe.store.catalog import Reading
from mergepipe.store.chunking import block_elements
from mergepipe.store.codecs import Bytes, expect, scratch
from mergepipe.store.digest import Digest
from mergepipe.store.manifest import TensorEntry
from mergepipe.store.norms import HISTOGRAM_BINS
from mergepipe.store.objects import ObjectReader
from mergepipe.store.parallel import Progress, counter, default_workers, run_bounded
from mergepipe.store.preview_level import Candidate, choose_level
from mergepipe.store.previews import lacks_preview, preview_key, preview_rows, store_preview
from mergepipe.store.publish import Changes, publish
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.staging import Staging
from mergepipe.store.statistics import block_statistics, pack_histogram

if TYPE_CHECKING:
    from mergepipe.store.store import Store

Pair = tuple[TensorEntry, TensorEntry]


@dataclass(frozen=True, slots=True)
class Analysis:
    """What was done.

    ``read_bytes``: decoded bytes of the models; ``stored_bytes``: of all files that were read for it. ``previews``: how
    many were made, ``preview_bytes`` their files, and ``previewed_bytes`` the decoded bytes that they stand for.
    """

    tensors: int = 0
    read_bytes: int = 0
    stored_bytes: int = 0
    previews: int = 0
    preview_bytes: int = 0
    previewed_bytes: int = 0


@dataclass
class _Pair:
    """One pair of tensors, the indices of blocks that line up, and the histogram only while it is filled."""

    base: TensorEntry
    other: TensorEntry
    places: list[int]
    left: int
    histogram: NDArray[np.int64] | None = None


@dataclass
class _Work:
    store: Store
    staging: Staging | None
    reader: ObjectReader
    level: int
    changes: Changes = field(default_factory=Changes)
    looked_into: set[bytes] = field(default_factory=set)
    previewed_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def place(self, pair: _Pair, index: int) -> None:
        row, histogram = self._measure(pair, index)
        key = pair.base.blocks[index] + pair.other.blocks[index]
        with self.lock:
            if row is not None:
                self.changes.deltas[key] = row
            pair.histogram = histogram.copy() if pair.histogram is None else pair.histogram + histogram
            pair.left -= 1
            if pair.left == 0:
                if pair.base.same_grid(pair.other):
                    self.changes.tensors[pair.base.id + pair.other.id] = pack_histogram(pair.histogram)
                pair.histogram = None

    def _measure(self, pair: _Pair, index: int) -> tuple[bytes | None, NDArray[np.int64]]:
        """A block's row (None where it is the base's own), and its histogram in this thread's scratch."""
        base_id, other_id = pair.base.blocks[index], pair.other.blocks[index]
        size, other_size = pair.base.block_span(index)[1], pair.other.block_span(index)[1]
        histogram = scratch.bytes("histogram", HISTOGRAM_BINS * 8).view(np.int64)
        histogram.fill(0)
        types = pair.other.element_type, pair.base.element_type
        if base_id == other_id and pair.base.dtype == pair.other.dtype:
            histogram[0] = size * 8 // pair.base.element_type.bits
            return None, histogram
        base, other = scratch.bytes("base", size), scratch.bytes("incoming", other_size)
        self.reader.read_block(base_id, base)
        self.reader.read_block(other_id, other, base=(base_id, base))
        row = block_statistics(other, base, *types, histogram)
        if self.staging is not None:
            self._preview(self.staging, other, base, pair, index)
        return row.pack(), histogram

    def _preview(self, staging: Staging, other: Bytes, base: Bytes, pair: _Pair, index: int) -> None:
        base_id, other_id = pair.base.blocks[index], pair.other.blocks[index]
        key = preview_key(base_id, other_id, self.level)
        with self.lock:
            if key in self.looked_into:
                return
            self.looked_into.add(key)  # this thread makes it
        exact = staging.row_of(other_id)
        with self.store.catalog.reading() as view:
            if exact is None or not lacks_preview(self.store.layout, view, base_id, other_id):
                return
        types = pair.other.element_type, pair.base.element_type
        made = store_preview(staging, other, base, *types, base_id, other_id, exact.stored_bytes, self.level)
        with self.store.catalog.reading() as view:
            rows = preview_rows(view, base_id, other_id, self.level, made)
        with self.lock:
            self.changes.previews.update(rows)
            if made is not None:
                self.previewed_bytes += other.nbytes


def analyze(
    store: Store, pairs: Sequence[Pair], progress: Progress | None = None, *, previews: int | None = None
) -> Analysis:
    """Measure ``other - base`` for pairs of tensors that are cut alike; with ``previews``, make those of that level.

    The statistics are published even where the caller then fails: they are true whatever comes of it.
    """
    if previews is None:
        return _analyze(store, None, pairs, progress, 0)
    with Staging(store.layout, store.catalog) as staging:
        return _analyze(store, staging, pairs, progress, previews)


def level_for(store: Store, base: Snapshot, other: Snapshot) -> int:
    """The level of the previews of ``other - base``; reads a few blocks."""

    def middle(mine: TensorEntry, theirs: TensorEntry) -> tuple[Bytes, Bytes] | None:
        index = len(theirs.blocks) // 2
        if index >= len(mine.blocks) or mine.block_span(index) != theirs.block_span(index):
            return None
        base_id, other_id = mine.blocks[index], theirs.blocks[index]
        if base_id == other_id:
            return None
        size = theirs.block_span(index)[1]
        old, new = scratch.bytes("base", size), scratch.bytes("incoming", size)
        store.reader.read_block(base_id, old)
        store.reader.read_block(other_id, new, base=(base_id, old))
        return new, old

    candidates = [
        Candidate(name, theirs.nbytes, theirs.element_type.bits, partial(middle, mine, theirs))
        for name, theirs in other.tensors.items()
        if (mine := base.tensors.get(name)) is not None and _comparable(mine, theirs)
    ]
    return choose_level(candidates, sum(entry.nbytes for entry in other.tensors.values()))


def _comparable(mine: TensorEntry, theirs: TensorEntry) -> bool:
    return bool(theirs.blocks) and mine.element_type.has_statistics and theirs.element_type.has_statistics


def _analyze(
    store: Store, staging: Staging | None, pairs: Sequence[Pair], progress: Progress | None, level: int
) -> Analysis:
    found = [(base, other, _places(base, other)) for base, other in pairs]
    todo = [_Pair(base, other, places, len(places)) for base, other, places in found if places]
    total = sum(pair.other.block_span(index)[1] for pair in todo for index in pair.places)
    advance = counter(progress, "analyze", total)
    expect(total, differences=True)
    reader = ObjectReader(store.layout)  # for counters of its own
    work = _Work(store, staging, reader, level)

    def one(place: tuple[_Pair, int]) -> None:
        work.place(*place)
        advance(place[0].other.block_span(place[1])[1])

    places = ((pair, index) for pair in todo for index in pair.places)
    workers = default_workers()
    with ThreadPoolExecutor(workers, thread_name_prefix="analyze") as pool:
        run_bounded(pool, one, places, ahead=2 * workers)
    publish(store.catalog, staging, work.changes)
    return Analysis(
        tensors=len(todo),
        read_bytes=total,
        stored_bytes=sum(reader.counters.stored.values()),
        previews=sum(map(bool, work.changes.previews.values())),
        preview_bytes=staging.written_bytes if staging is not None else 0,
        previewed_bytes=work.previewed_bytes,
    )


def lacking(store: Store, base: Snapshot, other: Snapshot, *, previews: bool) -> list[Pair]:
    """The pairs of tensors of two models of which the catalog lacks statistics, or previews where they are wanted.

    A preview whose object is missing, or marked as damaged, is lacking. Tensors that only one of them has, that differ
    in more than rows at the end, or that are not numbers to subtract, are none.
    """
    found: dict[tuple[Digest, Digest], Pair] = {}
    with store.catalog.reading() as view:
        for name, entry in other.tensors.items():
            mine = base.tensors.get(name)
            if mine is None or mine.blocks == entry.blocks:
                continue
            measurable = mine.element_type.has_statistics and entry.element_type.has_statistics
            if measurable and _lacks(store, view, mine, entry, previews=previews):
                found[mine.id, entry.id] = mine, entry
    return list(found.values())


def _places(base: TensorEntry, other: TensorEntry) -> list[int]:
    """Indices of blocks that hold the same elements in both: all, or those before rows that only one of them has."""
    if base.same_grid(other):
        return list(range(len(base.blocks)))
    if not base.shape or not other.shape or base.shape[1:] != other.shape[1:] or base.chunks != other.chunks:
        return []
    ours, theirs = ((entry.shape, entry.chunks) for entry in (base, other))
    both = range(min(len(base.blocks), len(other.blocks)))
    return [index for index in both if block_elements(*ours, index) == block_elements(*theirs, index)]


def _lacks(store: Store, view: Reading, base: TensorEntry, other: TensorEntry, *, previews: bool) -> bool:
    if base.same_grid(other) and view.get("tensors", base.id + other.id) is None:
        return True
    pairs = [(base.blocks[index], other.blocks[index]) for index in _places(base, other)]
    return any(_block_lacks(store, view, *pair, previews=previews) for pair in pairs if pair[0] != pair[1])


def _block_lacks(store: Store, view: Reading, base: Digest, other: Digest, *, previews: bool) -> bool:
    if view.get("deltas", base + other) is None:
        return True
    return previews and lacks_preview(store.layout, view, base, other)
