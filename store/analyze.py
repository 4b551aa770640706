"""Statistics for a pair of tensors that were ingested without each other: both are read once, and it is kept."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mergepipe.store.codecs import scratch
from mergepipe.store.manifest import TensorEntry
from mergepipe.store.norms import HISTOGRAM_BINS
from mergepipe.store.parallel import Progress, counter, default_workers, run_bounded
from mergepipe.store.publish import Changes, publish
from mergepipe.store.statistics import block_statistics, pack_histogram

if TYPE_CHECKING:
    from mergepipe.store.store import Store


@dataclass
class _Pair:
    """One pair of tensors with one grid, and what was measured of it so far; the histogram only while it is filled."""

    base: TensorEntry
    other: TensorEntry
    left: int
    histogram: NDArray[np.int64] | None = None


def analyze(store: Store, pairs: Sequence[tuple[TensorEntry, TensorEntry]], progress: Progress | None = None) -> int:
    """Measure ``other - base`` for pairs of tensors that are cut alike; returns the bytes that were decoded.

    The statistics are published even where the caller then fails: they are true whatever comes of it.
    """
    work = [_Pair(base, other, len(base.blocks)) for base, other in pairs if base.blocks]
    total = sum(pair.other.nbytes for pair in work)
    advance = counter(progress, "analyze", total)
    changes = Changes()
    lock = threading.Lock()

    def one(place: tuple[_Pair, int]) -> None:
        pair, index = place
        row, histogram = _measure(store, pair, index)
        with lock:
            if row is not None:
                changes.deltas[pair.base.blocks[index] + pair.other.blocks[index]] = row
            pair.histogram = histogram.copy() if pair.histogram is None else pair.histogram + histogram
            pair.left -= 1
            if pair.left == 0:
                changes.tensors[pair.base.id + pair.other.id] = pack_histogram(pair.histogram)
                pair.histogram = None
        advance(pair.other.block_span(index)[1])

    places = ((pair, index) for pair in work for index in range(len(pair.base.blocks)))
    workers = default_workers()
    with ThreadPoolExecutor(workers, thread_name_prefix="analyze") as pool:
        run_bounded(pool, one, places, ahead=2 * workers)
    publish(store.catalog, None, changes)
    return total


def _measure(store: Store, pair: _Pair, index: int) -> tuple[bytes | None, NDArray[np.int64]]:
    """One block's statistics row (None where it is the base's own), and its histogram in this thread's scratch."""
    base_id, other_id = pair.base.blocks[index], pair.other.blocks[index]
    size, other_size = pair.base.block_span(index)[1], pair.other.block_span(index)[1]
    histogram = scratch.bytes("histogram", HISTOGRAM_BINS * 8).view(np.int64)
    histogram.fill(0)
    if base_id == other_id and pair.base.dtype == pair.other.dtype:
        histogram[0] = size * 8 // pair.base.element_type.bits
        return None, histogram
    base, other = scratch.bytes("base", size), scratch.bytes("incoming", other_size)
    store.reader.read_block(base_id, base)
    store.reader.read_block(other_id, other, base=(base_id, base))
    row = block_statistics(other, base, pair.other.element_type, pair.base.element_type, histogram)
    return row.pack(), histogram
