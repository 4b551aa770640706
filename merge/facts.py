"""What the planner knows: manifests and catalog rows of the inputs, gathered once, no weights read.

A *place* is one block index of one tensor. Experts whose block at a place is the reference's own contribute nothing
there; experts with one and the same block there are one *group*: it is read once and serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.inputs import Model, Reads, virtual_blocks
from mergepipe.merge.job import Job, Setting
from mergepipe.merge.method import Coefficients, Method, Problem
from mergepipe.store.catalog import Catalog, Reading
from mergepipe.store.digest import Digest
from mergepipe.store.errors import UsageError
from mergepipe.store.manifest import TensorEntry
from mergepipe.store.previews import PreviewRow, find_preview
from mergepipe.store.statistics import DeltaStatistics, unpack_histogram, unpack_statistics
from mergepipe.store.store import Store

Settle = Callable[[Job, Problem, Coefficients], Coefficients | None]
"""The coefficients after all passes over a tensor, from what is kept of them; None where that is not known."""


@dataclass(frozen=True, slots=True)
class Group:
    """Experts that have one block at a place: which, its id, and the bytes to read it.

    ``norm``: a bound of its delta's L2 norm, and ``sketch`` the delta's; a NaN and None where nobody asked for them.
    ``preview``: what can be read in its stead, where there is one that takes fewer bytes.
    """

    experts: tuple[int, ...]
    block: Digest
    norm: float
    stored_bytes: int
    sketch: NDArray[np.float32] | None = None
    preview: PreviewRow | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """One block index of a tensor where some expert differs from the reference."""

    index: int
    groups: tuple[Group, ...]
    base_bytes: int


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """One output tensor, and where the experts differ from its reference.

    ``coefficients``: as the method knows them before anything is read, or, for a plan with a budget, after its passes.
    ``settled``: whether they are final; ``passes``: how many it takes until they are. ``base_bytes``: bytes to read
    each of the reference's blocks.
    """

    job: Job
    problem: Problem
    coefficients: Coefficients
    settled: bool
    places: tuple[Place, ...]
    base_bytes: tuple[int, ...]
    passes: int = 0

    @property
    def name(self) -> str:
        return self.job.name

    @property
    def entry(self) -> TensorEntry:
        """The reference's tensor."""
        return self.job.reference


@dataclass(frozen=True, slots=True)
class Missing:
    """A pair of tensors whose statistics the catalog does not have yet: the reference's, and an expert's."""

    reference: TensorEntry
    expert: TensorEntry


@dataclass(frozen=True, slots=True)
class Facts:
    """All that the planner needs to know. ``missing`` and ``unsettled`` are empty where they are complete.

    ``adapter_bytes``: what reading the low-rank factors takes, whatever else is read. ``bounded``: whether norms and
    final coefficients are known.
    """

    tensors: list[TensorFacts]
    missing: list[Missing]
    unsettled: list[TensorFacts]
    adapter_bytes: int
    bounded: bool


def gather(
    store: Store,
    models: Sequence[Model],
    jobs: Sequence[Job],
    settings: Sequence[Setting],
    method: Method,
    *,
    bounded: bool,
    settle: Settle | None = None,
) -> Facts:
    """Facts for all jobs. ``bounded``: with norms, sketches and final coefficients, as a budget needs them."""
    if method.histograms:
        store.catalog.read_ahead()
    with store.catalog.reading() as view:
        reads = Reads(view, virtual_blocks(models))
        return _Gathering(store.catalog, view, reads, method, bounded, settle).all(models, jobs, settings)


class StoredHistograms(Sequence[NDArray[np.int64] | None]):
    """Each expert's histogram, read from the catalog when it is looked at: all of a large model's would fill memory."""

    def __init__(self, catalog: Catalog, keys: tuple[bytes | None, ...]) -> None:
        self._catalog = catalog
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: Any) -> Any:
        key = self._keys[index]
        if key is None:
            return None
        with self._catalog.reading() as view:
            row = view.get("tensors", key)
        return None if row is None else unpack_histogram(row)


@dataclass
class _Gathering:
    catalog: Catalog
    view: Reading
    reads: Reads
    method: Method
    bounded: bool
    settle: Settle | None

    def all(self, models: Sequence[Model], jobs: Sequence[Job], settings: Sequence[Setting]) -> Facts:
        missing: list[Missing] = []
        tensors = [self._tensor(job, settings[job.setting], missing) for job in jobs]
        unsettled = [facts for facts in tensors if self.bounded and not facts.settled and self._is_computed(facts)]
        factors: set[tuple[Digest, ...]] = set()  # each pair is read for itself, whatever blocks it shares
        for facts in tensors:
            for number, source in _sources(facts.job, settings[facts.job.setting]):
                factors.add(models[number].adapter_blocks.get(source, ()))
        adapter_bytes = sum(self.reads.own_bytes(block) for blocks in factors for block in blocks)
        return Facts(tensors, missing, unsettled, adapter_bytes, self.bounded)

    def _is_computed(self, facts: TensorFacts) -> bool:
        differs = bool(facts.places)
        return differs or not self.method.stays(facts.problem, facts.coefficients, differs=differs)

    def _tensor(self, job: Job, setting: Setting, missing: list[Missing]) -> TensorFacts:
        entry = job.reference
        costs = tuple(self.reads.own_bytes(block) for block in entry.blocks)
        problem = job.problem(setting)
        if not entry.element_type.has_statistics or not job.experts:
            return TensorFacts(job, problem, {}, True, (), costs)
        lacking: set[int] = set()
        places = tuple(
            Place(index, groups, costs[index])
            for index, block in enumerate(entry.blocks)
            if (groups := self._groups(block, index, job.experts, lacking))
        )
        if self.method.histograms:
            problem = replace(problem, histograms=self._histograms(job, lacking))
        missing += [Missing(entry, job.experts[number]) for number in sorted(lacking)]
        coefficients = {} if lacking else self.method.start(problem)
        passes = 0 if lacking else len(self.method.passes(problem))
        settled = not passes
        if self.bounded and not settled and self.settle is not None:
            final = self.settle(job, problem, coefficients)
            coefficients, settled = (coefficients, False) if final is None else (final, True)
        if places:
            _check_rows(job, self.method)
        return TensorFacts(job, problem, coefficients, settled, places, costs, passes)

    def _groups(
        self, base: Digest, index: int, others: tuple[TensorEntry, ...], lacking: set[int]
    ) -> tuple[Group, ...]:
        members: dict[Digest, list[int]] = {}
        for number, other in enumerate(others):
            block = other.blocks[index]
            if block != base:
                members.setdefault(block, []).append(number)
        groups = []
        for block, numbers in members.items():
            norm, sketch, preview = math.nan, None, None
            if self.bounded:
                row = self.view.get("deltas", base + block)
                if row is None:
                    lacking.update(numbers)
                else:
                    statistics = unpack_statistics(row)
                    norm, sketch = norm_bound(statistics), statistics.sketch
                    preview = find_preview(self.view, base, block)
            cost = self.reads.expert_bytes(block, base)
            if preview is not None and preview.stored_bytes >= cost:
                preview = None
            groups.append(Group(tuple(numbers), block, norm, cost, sketch, preview))
        return tuple(groups)

    def _histograms(self, job: Job, lacking: set[int]) -> StoredHistograms:
        keys = []
        for number, other in enumerate(job.experts):
            key = job.reference.id + other.id if other.blocks != job.reference.blocks else None
            if key is not None and self.view.get("tensors", key) is None:
                lacking.add(number)
            keys.append(key)
        return StoredHistograms(self.catalog, tuple(keys))


def _check_rows(job: Job, method: Method) -> None:
    """Raises UsageError where a method needs whole rows, and a block has only a part of one."""
    entry = job.reference
    if method.rows and entry.shape and entry.chunks[-1] < entry.shape[-1]:
        raise UsageError(
            f"{method.name} needs whole rows, and those of {job.name!r} are longer than a block",
            hint="Ingest the models into a store with larger blocks.",
        )


def _sources(job: Job, setting: Setting) -> Iterator[tuple[int, str]]:
    """Each expert's number in the plan, and the tensor's name in it."""
    for position, number in enumerate(setting.experts):
        yield number, job.name if job.sources is None else job.sources[1 + position]


def norm_bound(statistics: DeltaStatistics) -> float:
    """At least the delta's L2 norm, and hardly more.

    Statistics sum squares in float32, 64 in a run, so the norm may be up to ``2**-19`` of itself too small; and squares
    of magnitudes below ``2**-63`` lose digits, or vanish.
    """
    lost = math.sqrt(statistics.changed) * min(statistics.largest, 2.0**-63)
    return statistics.l2 * (1 + 2.0**-18) + lost
