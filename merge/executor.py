"""Carrying out a plan: streaming, within the budget by measured bytes, and nothing twice.

Each place is one task: the base's block and the planned experts' blocks are decoded into a thread's own buffers, merged
tile by tile, rounded, hashed, and stored as a delta to the base's block. A place's *recipe* (method, coefficients,
types and input ids, hashed) leads to its result where it was computed before; then nothing is read.
"""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from mergepipe.merge.methods import find_method
from mergepipe.merge.plan import Plan, TensorPlan
from mergepipe.merge.planner import coefficients_of
from mergepipe.merge.tiles import PlaceWork, merge_place
from mergepipe.merge.validate import check_plan
from mergepipe.store.canonical import dump_canonical
from mergepipe.store.chunking import block_count
from mergepipe.store.commits import Commit, Parent, default_author, timestamp_now
from mergepipe.store.digest import Digest, hash_record
from mergepipe.store.dtypes import DTYPES, DType
from mergepipe.store.errors import BudgetError, ConflictError
from mergepipe.store.frame import Kind
from mergepipe.store.manifest import TensorEntry, build_tree
from mergepipe.store.objects import ObjectReader, Role
from mergepipe.store.parallel import Progress, default_workers, run_bounded
from mergepipe.store.publish import Changes, RefUpdate, publish
from mergepipe.store.refs import check_ref_name, find_ref
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.staging import Staging, is_stored
from mergepipe.store.store import Store
from mergepipe.store.version import TOOL


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What a merge did. Bytes as measured by the reader and the writer, never estimated."""

    ref: str
    commit: Digest
    plan: Digest
    budget_bytes: int | None
    expert_bytes_read: int
    base_bytes_read: int
    written_bytes: int
    computed_blocks: int
    cached_blocks: int
    referenced_blocks: int
    elapsed_seconds: float
    peak_memory_bytes: int
    unchanged: bool = False


@dataclass
class _Tensor:
    """One tensor that is computed: its inputs, and the ids of its blocks as they come."""

    name: str
    plan: TensorPlan
    base: TensorEntry
    experts: tuple[TensorEntry, ...]
    out_type: DType
    blocks: list[Digest | None]


@dataclass
class _Run:
    """The state of one execution, shared by its threads."""

    store: Store
    plan: Plan
    reader: ObjectReader
    staging: Staging
    use_cache: bool
    results: dict[bytes, Digest] = field(default_factory=dict)
    relied_on: set[Digest] = field(default_factory=set)
    computed: int = 0
    cached: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def execute(
    store: Store,
    plan: Plan,
    ref: str,
    *,
    message: str = "",
    author: str = "",
    use_cache: bool = True,
    workers: int | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Carry out a plan and let ``ref`` point at the result.

    Raises:
        BadInputError: the plan does not hold for this store's objects, or was edited.
        NotFoundError: a commit of the plan is not in the store.
        BudgetError: more expert bytes were read than the budget allows; nothing is published.
        ConflictError: the ref is a tag, or moved meanwhile.
    """
    started = time.monotonic()
    check_ref_name(ref)
    base, experts = check_plan(store, plan)
    with store.catalog.reading() as view:
        before = find_ref(view, ref)
    if before is not None and before.kind == "tag":
        raise ConflictError(f"{ref!r} is a tag, and tags do not move", hint="Choose another name with --as.")
    reader = ObjectReader(store.layout)
    with Staging(store.layout, store.catalog) as staging:
        run = _Run(store, plan, reader, staging, use_cache)
        tensors = _compute(run, base, experts, workers or default_workers(), progress)
        expert_bytes = reader.counters.stored[Role.EXPERT]
        if plan.budget_bytes is not None and expert_bytes > plan.budget_bytes:
            raise BudgetError(
                f"{expert_bytes} expert bytes were read, and the budget is {plan.budget_bytes}: nothing was published",
                hint="Make the plan again. If it happens again, it is a bug: please report it.",
            )
        shards = base.shards if plan.dtype is None else ()
        tree = build_tree(tensors, base.files, shards, lambda data: staging.add_record(Kind.NODE, data))
        plan_id = staging.add_record(Kind.PLAN, plan.encode())
        referenced = sum(len(entry.blocks) for entry in tensors.values()) - run.computed - run.cached
        measured: dict[str, int | float] = {
            "expert_bytes_read": expert_bytes,
            "base_bytes_read": reader.counters.stored[Role.BASE],
            "written_bytes": staging.written_bytes,
            "computed_blocks": run.computed,
            "cached_blocks": run.cached,
            "referenced_blocks": referenced,
            "elapsed_seconds": round(time.monotonic() - started, 3),
        }
        changes = Changes(results=run.results, relied_on=tuple(run.relied_on))
        commit_id, unchanged = _commit(run, tree, plan_id, ref, before.commit if before else None, message, author,
                                       measured, changes)  # fmt: skip
        publish(store.catalog, staging, changes)
        return MergeResult(
            ref=ref,
            commit=commit_id,
            plan=plan_id,
            budget_bytes=plan.budget_bytes,
            expert_bytes_read=expert_bytes,
            base_bytes_read=reader.counters.stored[Role.BASE],
            written_bytes=staging.written_bytes,
            computed_blocks=run.computed,
            cached_blocks=run.cached,
            referenced_blocks=referenced,
            elapsed_seconds=round(time.monotonic() - started, 3),
            peak_memory_bytes=peak_memory_bytes(),
            unchanged=unchanged,
        )


def _compute(
    run: _Run, base: Snapshot, experts: list[Snapshot], workers: int, progress: Progress | None
) -> dict[str, TensorEntry]:
    """All tensors of the result; those that the plan leaves alone are the base's own entries."""
    works = {
        name: _tensor_work(run.plan, name, tensor, base.tensors[name], [e.tensors[name] for e in experts])
        for name, tensor in run.plan.tensors.items()
    }
    total = sum(work.base.nbytes for work in works.values())
    done = 0

    def one(place: tuple[_Tensor, int]) -> None:
        nonlocal done
        work, index = place
        digest = _place(run, work, index)
        with run.lock:
            work.blocks[index] = digest
            done += work.base.block_span(index)[1]
            if progress is not None:
                progress("merge", done, total)

    def places() -> Iterator[tuple[_Tensor, int]]:
        for work in works.values():
            for index in range(len(work.base.blocks)):
                yield work, index

    def prefetch(place: tuple[_Tensor, int]) -> None:
        work, index = place
        readers = [number for number, indices in enumerate(work.plan.reads) if index in _as_set(indices)]
        if readers:
            run.reader.prefetch(work.base.blocks[index])
        for number in readers:
            run.reader.prefetch(work.experts[number].blocks[index])

    with ThreadPoolExecutor(workers, thread_name_prefix="merge") as pool:
        run_bounded(pool, one, places(), ahead=4 * workers, prepare=prefetch)
    return {name: _entry(works[name]) if name in works else entry for name, entry in base.tensors.items()}


def _tensor_work(plan: Plan, name: str, tensor: TensorPlan, base: TensorEntry, experts: list[TensorEntry]) -> _Tensor:
    out_type = DTYPES[plan.dtype] if plan.dtype is not None else base.element_type
    return _Tensor(name, tensor, base, tuple(experts), out_type, [None] * len(base.blocks))


def _entry(work: _Tensor) -> TensorEntry:
    blocks = tuple(block for block in work.blocks if block is not None)
    assert len(blocks) == block_count(work.base.shape, work.base.chunks)
    return TensorEntry(work.out_type.name, work.base.shape, work.base.chunks, blocks)


def _place(run: _Run, work: _Tensor, index: int) -> Digest:
    """One output block: the base's own, a cached one, or a computed one."""
    reads = [index in _as_set(indices) for indices in work.plan.reads]
    base_id = work.base.blocks[index]
    if not any(reads) and not _everywhere(run.plan):
        with run.lock:
            run.relied_on.add(base_id)
        return base_id
    experts = tuple(entry.blocks[index] if read else base_id for entry, read in zip(work.experts, reads, strict=True))
    recipe = recipe_id(run.plan, work.plan, base_id, experts, work.base, work.experts, work.out_type)
    if run.use_cache:
        known = _known_result(run, recipe)
        if known is not None:
            return known
    method = find_method(run.plan.method)
    coefficients = coefficients_of(method, run.plan.experts, run.plan.parameters, work.plan.thresholds)
    place = PlaceWork(
        method=method,
        coefficients=coefficients,
        base=base_id,
        experts=experts,
        base_type=work.base.element_type,
        expert_types=tuple(entry.element_type for entry in work.experts),
        out_type=work.out_type,
        size_bytes=work.base.block_span(index)[1],
    )
    digest = merge_place(run.store.catalog, run.reader, run.staging, place)
    with run.lock:
        run.computed += 1
        run.results[recipe] = digest
    return digest


def _known_result(run: _Run, recipe: Digest) -> Digest | None:
    with run.store.catalog.reading() as view:
        found = view.get("results", recipe)
    if found is None or not is_stored(run.store.layout, run.store.catalog, Digest(found)):
        return None
    digest = Digest(found)
    with run.lock:
        run.cached += 1
        run.relied_on.add(digest)
    return digest


def recipe_id(
    plan: Plan, tensor: TensorPlan, base: Digest, experts: tuple[Digest, ...],
    base_entry: TensorEntry, expert_entries: tuple[TensorEntry, ...], out_type: DType,
) -> Digest:  # fmt: skip
    """What a block's result depends on, and nothing else: a change of another layer leaves it as it is."""
    recipe = {
        "method": [plan.method, plan.method_version],
        "parameters": dict(plan.parameters),
        "experts": [
            [block.hex(), entry.dtype, {k: v for k, v in sorted(item.parameters.items()) if k != "density"}, bits]
            for block, entry, item, bits in zip(experts, expert_entries, plan.experts, tensor.thresholds, strict=True)
        ],
        "base": [base.hex(), base_entry.dtype],
        "out": out_type.name,
    }
    return hash_record("recipe", dump_canonical(recipe))


def _everywhere(plan: Plan) -> bool:
    from mergepipe.merge.planner import keeps_base

    return plan.dtype is not None or not keeps_base(find_method(plan.method), plan.experts, plan.parameters)


def _as_set(indices: tuple[int, ...]) -> frozenset[int]:
    return frozenset(indices)


def _commit(
    run: _Run, tree: Digest, plan_id: Digest, ref: str, before: Digest | None, message: str, author: str,
    measured: dict[str, int | float], changes: Changes,
) -> tuple[Digest, bool]:  # fmt: skip
    """Stage the commit, unless the ref has this very result of this very plan already."""
    if before is not None:
        previous = run.store.commit(before)
        if previous.tree == tree and previous.plan == plan_id:
            return before, True
    plan = run.plan
    parents = [Parent(before, "previous", ref)] if before is not None else []
    parents.append(Parent(plan.base.commit, "base", plan.base.name))
    parents += [Parent(expert.commit, "expert", expert.name) for expert in plan.experts]
    commit = Commit(
        tree=tree,
        parents=tuple(parents),
        kind="merge",
        message=message or describe(plan),
        author=author or default_author(),
        time=timestamp_now(),
        tool=TOOL,
        plan=plan_id,
        measured=measured,
    )
    commit_id = run.staging.add_record(Kind.COMMIT, commit.encode())
    changes.commits.append(commit)
    changes.refs.append(RefUpdate(ref, before, commit_id, "branch", "merge", commit.author))
    return commit_id, False


def describe(plan: Plan) -> str:
    """``ties of math:0.6 and code:0.4 on base``."""
    experts = [f"{expert.name}:{float(expert.parameters['weight']):g}" for expert in plan.experts]
    together = " and ".join([", ".join(experts[:-1]), experts[-1]] if len(experts) > 1 else experts)
    return f"{plan.method} of {together} on {plan.base.name}"


def peak_memory_bytes() -> int:
    """The most memory that this process ever had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
