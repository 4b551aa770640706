"""Statistics for a pair of tensors that were ingested without each other: both are read once, and it is kept."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mergepipe.store.codecs import scratch
from mergepipe.store.kernels import HISTOGRAM_BINS
from mergepipe.store.manifest import TensorEntry
from mergepipe.store.parallel import Progress, default_workers, run_bounded
from mergepipe.store.publish import Changes, publish
from mergepipe.store.statistics import block_statistics, pack_histogram

if TYPE_CHECKING:
    from mergepipe.store.store import Store


@dataclass
class _Pair:
    """One pair of tensors with one grid, and what was measured of it so far."""

    base: TensorEntry
    other: TensorEntry
    rows: dict[bytes, bytes] = field(default_factory=dict)
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(HISTOGRAM_BINS, np.int64))
    lock: threading.Lock = field(default_factory=threading.Lock)


def analyze(store: Store, pairs: Sequence[tuple[TensorEntry, TensorEntry]], progress: Progress | None = None) -> int:
    """Measure ``other - base`` for pairs of tensors that are cut alike; returns the bytes that were decoded.

    The statistics are published even where the caller then fails: they are true whatever comes of it.
    """
    work = [_Pair(base, other) for base, other in pairs]
    places = [(pair, index) for pair in work for index in range(len(pair.base.blocks))]
    total = sum(pair.other.nbytes for pair in work)
    done = 0
    lock = threading.Lock()

    def one(place: tuple[_Pair, int]) -> None:
        nonlocal done
        size = _measure(store, *place)
        with lock:
            done += size
            if progress is not None:
                progress("analyze", done, total)

    workers = default_workers()
    with ThreadPoolExecutor(workers, thread_name_prefix="analyze") as pool:
        run_bounded(pool, one, places, ahead=2 * workers)
    changes = Changes()
    for pair in work:
        changes.deltas.update(pair.rows)
        changes.tensors[pair.base.id + pair.other.id] = pack_histogram(pair.histogram)
    publish(store.catalog, None, changes)
    return total


def _measure(store: Store, pair: _Pair, index: int) -> int:
    base_id, other_id = pair.base.blocks[index], pair.other.blocks[index]
    size, other_size = pair.base.block_span(index)[1], pair.other.block_span(index)[1]
    if base_id == other_id:
        with pair.lock:
            pair.histogram[0] += size * 8 // pair.base.element_type.bits
        return other_size
    base, other = scratch.bytes("base", size), scratch.bytes("incoming", other_size)
    store.reader.read_block(base_id, base)
    store.reader.read_block(other_id, other, base=(base_id, base))
    histogram = scratch.bytes("histogram", HISTOGRAM_BINS * 8).view(np.int64)
    histogram.fill(0)
    row = block_statistics(other, base, pair.other.element_type, pair.base.element_type, histogram)
    with pair.lock:
        pair.rows[base_id + other_id] = row.pack()
        pair.histogram += histogram
    return other_size
