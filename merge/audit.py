"""The true deviation of a budgeted merge: everything is read once more, and both results are compared.

Both are taken in float32, before they are rounded to the result's type, as the certificate bounds them.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from mergepipe.merge.bench import open_bench
from mergepipe.merge.checked import CheckedPlan
from mergepipe.merge.facts import TensorFacts
from mergepipe.merge.inputs import virtual_blocks
from mergepipe.merge.levels import blocks_at, previews_of, virtual_previews
from mergepipe.merge.plan import Plan
from mergepipe.merge.tiles import Bench, load, tiles
from mergepipe.merge.validate import check_plan
from mergepipe.store.objects import ObjectReader
from mergepipe.store.parallel import Progress, counter, default_workers, run_bounded
from mergepipe.store.store import Store

_ROUNDING: Final = 2.0**-21  # of a weight: sums of a few experts' weights, each rounded to float32


@dataclass(frozen=True, slots=True)
class TensorAudit:
    """One tensor: its true L2 distance from the full merge's, and what the plan certified.

    ``rounding``: what float32 arithmetic may add to that on the way: some parts in a million of the tensor's length.
    """

    name: str
    deviation: float
    bound: float
    rounding: float = 0.0


@dataclass(frozen=True, slots=True)
class Audit:
    """The whole model. ``update``: the L2 length of the full merge's true update. ``rounding``: as of a tensor.

    ``read_bytes``: what the audit itself read.
    """

    deviation: float
    update: float
    bound: float
    estimate: float
    tensors: tuple[TensorAudit, ...]
    read_bytes: int
    rounding: float = 0.0

    @property
    def relative(self) -> float:
        """The deviation as a share of the full update."""
        return self.deviation / self.update if self.update else 0.0

    @property
    def holds(self) -> bool:
        """Whether every distance is within its bound, but for what float32 sums round."""
        slack = 1 + 2.0**-16
        return self.deviation <= self.bound * slack + self.rounding and all(
            tensor.deviation <= tensor.bound * slack + tensor.rounding for tensor in self.tensors
        )


@dataclass
class _Sums:
    deviation: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    update: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


def audit(store: Store, plan: Plan, progress: Progress | None = None) -> Audit:
    """Read everything that the plan's full merge needs, and measure how far the plan's result is from it.

    Raises:
        BadInputError: the plan does not hold for this store's objects.
    """
    checked = check_plan(store, plan)
    if plan.bound.update is None:
        return Audit(0.0, 0.0, 0.0, 0.0, (), 0)
    reader = ObjectReader(store.layout)
    bench = open_bench(store, reader, virtual_blocks(checked.models))
    for tensor in checked.facts.tensors:
        planned = checked.plan.tensors.get(tensor.name)
        if planned is not None:
            bench.virtual.update(virtual_previews(tensor, previews_of(tensor, planned)))
    sums = _Sums()
    places = [(tensor, place.index) for tensor in checked.facts.tensors for place in tensor.places]
    advance = counter(progress, "audit", sum(tensor.entry.block_span(index)[1] for tensor, index in places))

    def work(place: tuple[TensorFacts, int]) -> None:
        tensor, index = place
        deviation, update, weights = _compare(bench, checked, tensor, index)
        with sums.lock:
            sums.weights[tensor.name] = sums.weights.get(tensor.name, 0.0) + weights
            sums.deviation[tensor.name] = sums.deviation.get(tensor.name, 0.0) + deviation
            sums.update += update
        advance(tensor.entry.block_span(index)[1])

    workers = default_workers()
    with ThreadPoolExecutor(workers, thread_name_prefix="audit") as pool:
        run_bounded(pool, work, places, ahead=2 * workers)
    return Audit(
        deviation=math.sqrt(math.fsum(sums.deviation.values())),
        update=math.sqrt(sums.update),
        bound=plan.bound.absolute,
        estimate=plan.bound.estimate,
        tensors=tuple(
            TensorAudit(
                name,
                math.sqrt(squared),
                plan.tensors[name].bound if name in plan.tensors else 0.0,
                _ROUNDING * math.sqrt(sums.weights[name]),
            )
            for name, squared in sorted(sums.deviation.items(), key=lambda item: -item[1])
            if squared > 0
        ),
        read_bytes=sum(reader.counters.stored.values()),
        rounding=_ROUNDING * math.sqrt(math.fsum(sums.weights.values())),
    )


def _compare(bench: Bench, checked: CheckedPlan, tensor: TensorFacts, index: int) -> tuple[float, float, float]:
    """The squared distance of the planned block from the full one, of the full one from the reference's, and the full
    one's squared length."""
    method, job = checked.method, tensor.job
    planned = checked.plan.tensors.get(tensor.name)
    blocks = [tuple(entry.blocks[index] for entry in job.experts), (job.reference.blocks[index],) * len(job.experts)]
    if planned is not None:
        reads = [frozenset(indices) for indices in planned.reads]
        blocks[1] = blocks_at(tensor, index, reads, previews_of(tensor, planned))
    deltas = method.takes_deltas(based=tensor.problem.based)
    stays = method.stays(tensor.problem, tensor.coefficients, differs=True)
    elements = job.reference.block_span(index)[1] * 8 // job.reference.element_type.bits
    results = np.empty((2, elements), np.float32)
    base = np.empty(elements, np.float32)
    for row, experts in enumerate(blocks):
        loaded = load(bench, job, index, experts)
        done = 0
        for tile, out in tiles(bench, job, index, loaded, deltas=deltas, whole_rows=method.rows):
            base[done : done + out.size] = tile.base
            if any(part is not None for part in loaded.parts) or not stays:
                method.apply(tile, tensor.coefficients, out)
            else:
                out[:] = tile.base
            results[row, done : done + out.size] = out
            done += out.size
    with np.errstate(invalid="ignore", over="ignore"):
        off = results[1].astype(np.float64) - results[0]
        moved = results[0].astype(np.float64) - base
        length = float(np.square(results[0], dtype=np.float64).sum())
    return float(off @ off), float(moved @ moved), length
