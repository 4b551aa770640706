"""Statistics that the catalog lacks: pairs of tensors that were ingested without each other are read once.

Whole models are measured by the store. An adapter's or a task vector's blocks are virtual; their deltas are computed
here, as they will be in the merge.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.bench import open_bench
from mergepipe.merge.facts import Missing
from mergepipe.merge.inputs import Model, virtual_blocks
from mergepipe.merge.job import Job
from mergepipe.merge.tiles import Bench, load, tiles
from mergepipe.store.analyze import analyze
from mergepipe.store.codecs import scratch
from mergepipe.store.dtypes import DTYPES
from mergepipe.store.norms import HISTOGRAM_BINS
from mergepipe.store.objects import ObjectReader
from mergepipe.store.parallel import Progress, counter, default_workers, run_bounded
from mergepipe.store.publish import Changes, publish
from mergepipe.store.statistics import block_statistics, pack_histogram
from mergepipe.store.store import Store


def measure_missing(
    store: Store, models: Sequence[Model], missing: Sequence[Missing], progress: Progress | None = None
) -> None:
    """Measure what is missing, and keep it."""
    virtual = virtual_blocks(models)
    real = [gap for gap in missing if not any(block in virtual for block in gap.expert.blocks)]
    if real:
        analyze(store, [(gap.reference, gap.expert) for gap in real], progress)
    others = [gap for gap in missing if gap not in real]
    if not others:
        return
    bench = open_bench(store, ObjectReader(store.layout), virtual)
    advance = counter(progress, "analyze", sum(gap.expert.nbytes for gap in others))
    changes = Changes()
    workers = default_workers()
    with ThreadPoolExecutor(workers, thread_name_prefix="analyze") as pool:
        for gap in others:
            job = Job("", 0, None, gap.reference, (gap.expert,), (0,))
            histogram = np.zeros(HISTOGRAM_BINS, np.int64)
            lock = threading.Lock()

            def work(
                index: int, job: Job = job, histogram: NDArray[np.int64] = histogram, lock: threading.Lock = lock
            ) -> None:
                row, part = _measure(bench, job, index)
                with lock:
                    np.add(histogram, part, out=histogram)
                    changes.deltas[job.reference.blocks[index] + job.experts[0].blocks[index]] = row
                advance(job.experts[0].block_span(index)[1])

            run_bounded(pool, work, range(len(gap.reference.blocks)), ahead=2 * workers)
            changes.tensors[gap.reference.id + gap.expert.id] = pack_histogram(histogram)
    publish(store.catalog, None, changes)


def _measure(bench: Bench, job: Job, index: int) -> tuple[bytes, NDArray[np.int64]]:
    """One virtual block's statistics row, and its histogram: its delta compared with zeros."""
    loaded = load(bench, job, index, (job.experts[0].blocks[index],))
    offset, size = job.reference.block_span(index)
    bits = job.reference.element_type.bits
    elements, first = size * 8 // bits, offset * 8 // bits
    delta = scratch.bytes("measured delta", elements * 4).view(np.float32)
    for tile, _ in tiles(bench, job, index, loaded, deltas=True):
        delta[tile.start - first : tile.start - first + tile.base.size] = tile.experts[0]
    zeros = scratch.bytes("zeros", elements * 4)
    zeros.fill(0)
    histogram = np.zeros(HISTOGRAM_BINS, np.int64)
    single = DTYPES["F32"]
    return block_statistics(delta.view(np.uint8), zeros, single, single, histogram).pack(), histogram
