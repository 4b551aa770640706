"""All blocks of a merge, streaming: the base's own, known from before, or computed.

A *place* (one block index of one tensor) is one task. The reference's block and the planned experts' blocks are decoded
into a thread's own buffers, merged tile by tile, rounded, hashed, and stored as a delta to the reference's block. A
place's *recipe* (method, coefficients or what they follow from, types and input ids, hashed) leads to its result where
it was computed before; then nothing is read. Where a method needs a pass over the whole tensor first, its inputs are
held decoded until the merge, as far as :mod:`mergepipe.merge.holding` allows.

Finished blocks are published as the merge goes, so that one that is interrupted finds them again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from mergepipe.merge.checkpoints import Finished
from mergepipe.merge.facts import TensorFacts
from mergepipe.merge.holding import ALL_HELD_BYTES, fits_in_memory, held_bytes
from mergepipe.merge.job import Job
from mergepipe.merge.levels import Previews, blocks_at, previews_of, virtual_previews
from mergepipe.merge.loaded import Loaded
from mergepipe.merge.method import Coefficients, Method
from mergepipe.merge.passes import Totals, fingerprint, measure_place, recall_all, remember
from mergepipe.merge.plan import Plan, TensorPlan
from mergepipe.merge.planner import computed_everywhere, needs_passes
from mergepipe.merge.streams import Barrier, Stream, run_streams
from mergepipe.merge.tiles import Bench, load, merge_tiles
from mergepipe.store.canonical import dump_canonical
from mergepipe.store.chunking import block_elements
from mergepipe.store.convert import convert_block
from mergepipe.store.digest import DIGEST_BYTES, Digest, hash_bytes, hash_record
from mergepipe.store.dtypes import DTYPES, DType
from mergepipe.store.frame import Kind
from mergepipe.store.manifest import TensorEntry
from mergepipe.store.objects import ObjectReader
from mergepipe.store.parallel import Progress, counter
from mergepipe.store.staging import Staging, is_stored
from mergepipe.store.statistics import block_statistics
from mergepipe.store.store import Store

_PREPARERS = 8  # each waits for one small file after the other: eight keep a disk busy
_AHEAD_PLACES = 48


@dataclass
class Run:
    """The state of one execution, shared by its threads."""

    store: Store
    plan: Plan
    method: Method
    reader: ObjectReader
    staging: Staging
    bench: Bench
    finished: Finished
    use_cache: bool
    computed: int = 0
    cached: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class _Work:
    """One tensor of the result, while it is made.

    ``reads``: for each expert the indices of its blocks to read; ``previews``: likewise, with the preview's id.
    """

    facts: TensorFacts
    planned: TensorPlan
    reads: tuple[frozenset[int], ...]
    previews: Previews
    out_type: DType
    everywhere: bool
    blocks: list[Digest]
    coefficients: Coefficients
    settled: bool
    recipe_base: bytes = b""
    held: dict[int, Loaded] = field(default_factory=dict)

    @property
    def job(self) -> Job:
        return self.facts.job

    def experts_at(self, index: int) -> tuple[Digest, ...]:
        """Each expert's block where it is read, its preview where that is, the reference's block else."""
        return blocks_at(self.facts, index, self.reads, self.previews)

    def is_read(self, index: int) -> bool:
        """Whether anything of an expert is read at a place."""
        return any(index in indices for indices in (*self.reads, *self.previews))


def compute(run: Run, facts: Sequence[TensorFacts], workers: int, progress: Progress | None) -> dict[str, TensorEntry]:
    """All tensors of the result; those that the plan leaves alone are the reference's own entries."""
    works = [_work(run, tensor, run.plan.tensors[tensor.name]) for tensor in facts if tensor.name in run.plan.tensors]
    advance = counter(progress, "merge", sum(work.job.reference.nbytes for work in works))
    run.finished.begin()
    try:
        with ThreadPoolExecutor(_PREPARERS, thread_name_prefix="read-ahead") as preparing:
            try:
                _Merging(run, preparing, advance).all(works, workers)
            finally:
                preparing.shutdown(wait=True, cancel_futures=True)
    finally:
        run.finished.end()
    made = {work.facts.name: _entry(work) for work in works}
    return {tensor.name: made.get(tensor.name) or _untouched(tensor.entry, run.plan.dtype) for tensor in facts}


def _work(run: Run, facts: TensorFacts, planned: TensorPlan) -> _Work:
    base = facts.entry
    out = DTYPES[run.plan.dtype] if run.plan.dtype is not None and base.element_type.has_statistics else None
    work = _Work(
        facts=facts,
        planned=planned,
        reads=tuple(frozenset(indices) for indices in planned.reads),
        previews=previews_of(facts, planned),
        out_type=out or base.element_type,
        everywhere=computed_everywhere(run.plan, facts, run.method),
        blocks=list(base.blocks),
        coefficients=facts.coefficients,
        settled=facts.settled,
    )
    run.bench.virtual.update(virtual_previews(facts, work.previews))
    work.recipe_base = _recipe_base(run, work)
    return work


def _entry(work: _Work) -> TensorEntry:
    reference = work.job.reference
    return TensorEntry(work.out_type.name, reference.shape, reference.chunks, tuple(work.blocks))


def _untouched(entry: TensorEntry, dtype: str | None) -> TensorEntry:
    """The reference's own tensor; an empty one, with nothing to compute, gets the result's type all the same."""
    if dtype is None or not entry.element_type.has_statistics:
        return entry
    return TensorEntry(dtype, entry.shape, entry.chunks, entry.blocks)


class _Merging:
    """The streams of all tensors that have something to compute."""

    def __init__(self, run: Run, preparing: ThreadPoolExecutor, advance: Callable[[int], None]) -> None:
        self.run = run
        self._preparing = preparing
        self._advance = advance
        self._held_bytes = 0

    def all(self, works: Sequence[_Work], workers: int) -> None:
        staged = [work for work in works if needs_passes(work.facts, self.run.method)]
        simple = [work for work in works if not needs_passes(work.facts, self.run.method)]
        run_streams(iter([self._simple(simple)]), workers)
        run_streams(self._staged(staged), workers)

    def _simple(self, works: Sequence[_Work]) -> Stream:
        """One stream over all tensors that need no pass, reading ahead by some places."""
        waiting: list[tuple[_Work, int]] = []
        for work in works:
            for index in self._pending(work):
                self._prefetch(work, index)
                waiting.append((work, index))
                if len(waiting) > _AHEAD_PLACES:
                    yield partial(self._merge, *waiting.pop(0))
        for place in waiting:
            yield partial(self._merge, *place)

    def _staged(self, works: Sequence[_Work]) -> Iterator[Stream | None]:
        for work in works:
            pending = self._pending(work)
            if not pending:
                continue
            size = held_bytes(work.job) if fits_in_memory(work.job) else 0
            while self._held_bytes and self._held_bytes + size > ALL_HELD_BYTES:
                yield None
            self._held_bytes += size
            yield self._with_passes(work, pending, size)

    def _with_passes(self, work: _Work, pending: list[int], size: int) -> Stream:
        """Passes over the whole tensor, as far as what they find is not known, then its merge."""
        method, problem = self.run.method, work.facts.problem
        with self.run.store.catalog.reading() as view:
            known = recall_all(view, method, work.job, problem, work.coefficients) if self.run.use_cache else None
        if known is not None:
            work.coefficients = known
            for index in pending:
                self._prefetch(work, index)
        else:
            indices = range(len(work.job.reference.blocks))
            for index in indices:
                self._prefetch(work, index)
            for step in method.passes(problem):
                totals = Totals(problem, step)
                for index in indices:
                    yield partial(self._measure, work, index, totals, keep=bool(size))
                yield Barrier()
                state = totals.total()
                after = step.settle(problem, work.coefficients, state)
                rows = remember(method, step, work.job, problem, work.coefficients, state, after)
                self.run.finished.add_statistics(rows)
                work.coefficients = after
        work.settled = True
        for index in pending:
            yield partial(self._merge, work, index)
        yield Barrier()
        self._held_bytes -= size
        work.held.clear()

    def _pending(self, work: _Work) -> list[int]:
        """The places that have to be computed; the others are finished here."""
        pending = []
        for index, own in enumerate(work.job.reference.blocks):
            if not work.everywhere and not work.is_read(index):
                self.run.finished.rely_on(own)
                self._finish(work, index, own)
                continue
            known = self._known(work, index) if self.run.use_cache else None
            if known is not None:
                self._finish(work, index, known)
            else:
                pending.append(index)
        return pending

    def _finish(self, work: _Work, index: int, digest: Digest) -> None:
        work.blocks[index] = digest
        self._advance(work.job.reference.block_span(index)[1])

    def _prefetch(self, work: _Work, index: int) -> None:
        """Have the system read a place's blocks; what they are deltas to is among them, or has been read before."""
        blocks = {work.job.reference.blocks[index], *work.experts_at(index)}
        made_of = [self.run.bench.virtual.get(digest) for digest in blocks]
        real = [digest if virtual is None else virtual.stored for digest, virtual in zip(blocks, made_of, strict=True)]
        self._preparing.submit(self.run.reader.prefetch_all, [digest for digest in real if digest is not None])

    def _known(self, work: _Work, index: int) -> Digest | None:
        """A block that this recipe led to before, where it is still there."""
        run = self.run
        reference = work.job.reference
        size = work.out_type.nbytes(block_elements(reference.shape, reference.chunks, index)[1])
        with run.store.catalog.reading() as view:
            found = view.get("results", recipe_id(work.recipe_base, work.job, index, work.experts_at(index)))
            row = view.object_row(Digest(found)) if found is not None and len(found) == DIGEST_BYTES else None
        if found is None or row is None or row.raw_bytes != size:
            return None
        if not is_stored(run.store.layout, run.store.catalog, Digest(found)):
            return None
        run.cached += 1
        run.finished.rely_on(Digest(found))
        return Digest(found)

    def _measure(self, work: _Work, index: int, totals: Totals, *, keep: bool) -> None:
        loaded = self._load(work, index, held=keep)
        if keep:
            work.held[index] = loaded
        part = totals.begin()
        measure_place(
            self.run.bench, self.run.method, totals.step, work.job, index, loaded, work.facts.problem,
            work.coefficients, part,
        )  # fmt: skip
        totals.add(index, part)

    def _load(self, work: _Work, index: int, *, held: bool = False) -> Loaded:
        known = work.held.get(index)
        if known is not None:
            return known
        return load(self.run.bench, work.job, index, work.experts_at(index), held=held)

    def _merge(self, work: _Work, index: int) -> None:
        run = self.run
        loaded = self._load(work, index)
        differs = bool(work.facts.places)
        if any(part is not None for part in loaded.parts) or not run.method.stays(
            work.facts.problem, work.coefficients, differs=differs
        ):
            out = merge_tiles(
                run.bench, run.method, work.coefficients, work.job, index, loaded, work.out_type,
                based=work.facts.problem.based,
            )  # fmt: skip
        else:
            out = convert_block(loaded.base, loaded.base_type, work.out_type)
        own = work.job.reference.blocks[index]
        digest = hash_bytes(out.data)
        if run.staging.claim(digest):
            against = loaded.root if work.out_type is loaded.base_type else None
            run.staging.add_block(Kind.BLOCK, digest, out, work.out_type.plane_bytes, against)
        row = None
        if digest != own:
            row = block_statistics(out, loaded.base, work.out_type, loaded.base_type, None).pack()
        recipe = recipe_id(work.recipe_base, work.job, index, work.experts_at(index))
        run.finished.add_block(recipe, digest, own, row)
        if work.held.pop(index, None) is not None:
            run.bench.pool.give(loaded)
        with run.lock:
            run.computed += 1
        self._finish(work, index, digest)


def _recipe_base(run: Run, work: _Work) -> bytes:
    """What all blocks of a tensor have in common: the method, and its coefficients or what they follow from."""
    job, problem = work.job, work.facts.problem
    common = {
        "method": [run.method.name, run.method.version],
        "based": problem.based,
        "coefficients": fingerprint(work.coefficients).hex(),
        "types": [job.reference.dtype, *(entry.dtype for entry in job.experts)],
        "out": work.out_type.name,
        "row": problem.row_elements,
    }
    if not work.settled:
        common["tensors"] = [job.reference.id.hex(), *(entry.id.hex() for entry in job.experts)]
        common["parameters"] = [dict(problem.parameters), *(dict(own) for own in problem.experts)]
    return dump_canonical(common)


def recipe_id(base: bytes, job: Job, index: int, experts: tuple[Digest, ...]) -> Digest:
    """What a block's result depends on, and nothing else: a change of another layer leaves it as it is."""
    start = block_elements(job.reference.shape, job.reference.chunks, index)[0]
    blocks = b"".join((job.reference.blocks[index], *experts))
    return hash_record("recipe", base + start.to_bytes(8, "little") + blocks)
