"""Carrying out a plan: within the budget by measured bytes, published once, with what it cost.

The work itself is in :mod:`mergepipe.merge.blocks`; here are its frame, its accounts and its commit.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from mergepipe.merge.bench import open_bench
from mergepipe.merge.blocks import Run, compute
from mergepipe.merge.checked import CheckedPlan
from mergepipe.merge.checkpoints import Finished
from mergepipe.merge.files import result_files
from mergepipe.merge.inputs import virtual_blocks
from mergepipe.merge.levels import previews_of
from mergepipe.merge.plan import Input, Plan, commits_of
from mergepipe.merge.validate import check_plan
from mergepipe.store.commits import Commit, Parent, default_author, timestamp_now
from mergepipe.store.digest import Digest
from mergepipe.store.errors import BudgetError, ConflictError, DamagedError, NotFoundError
from mergepipe.store.frame import Kind
from mergepipe.store.manifest import TensorEntry, build_tree
from mergepipe.store.objects import ObjectReader, Role
from mergepipe.store.parallel import Progress, default_workers
from mergepipe.store.publish import Changes, RefUpdate, publish
from mergepipe.store.refs import check_ref_name, find_ref
from mergepipe.store.snapshot import Snapshot, unless_collected
from mergepipe.store.staging import Staging
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


def execute(
    store: Store,
    plan: Plan | CheckedPlan,
    ref: str,
    *,
    message: str = "",
    author: str = "",
    use_cache: bool = True,
    workers: int | None = None,
    progress: Progress | None = None,
    device: str = "cpu",
) -> MergeResult:
    """Carry out a plan and let ``ref`` point at the result. One that was checked, or just made here, is not checked.

    ``device``: a torch device that merges the tiles, such as ``cuda``; results are then equal to some ulps of float32,
    not bit for bit, and so neither taken from nor put into the cache of results.

    Raises:
        BadInputError: the plan does not hold for this store's objects, or was edited.
        NotFoundError: a commit of the plan is not in the store.
        BudgetError: more expert bytes were read than the budget allows; nothing is published.
        ConflictError: the ref is a tag, or moved meanwhile; or an input was collected meanwhile, or a preview dropped.
    """
    started = time.monotonic()
    before = _ref_before(store, ref)
    checked = plan if isinstance(plan, CheckedPlan) else check_plan(store, plan, progress)
    inputs = commits_of(checked.plan.models)
    with (
        _unless_dropped(store, checked),
        unless_collected(store.layout, inputs),
        Staging(store.layout, store.catalog) as staging,
    ):
        staging.pin(inputs)
        run = _open_run(store, checked, staging, device, use_cache=use_cache and device == "cpu")
        tensors = compute(run, checked.facts.tensors, workers or default_workers(), progress)
        run.finished.check()
        _hold_to_budget(run)
        donor = checked.models[run.plan.files].snapshot
        files = result_files(donor, run.plan, staging)
        shards = donor.shards if _same_layout(donor, tensors) else ()
        tree = build_tree(tensors, files, shards, lambda data: staging.add_record(Kind.NODE, data))
        plan_id = staging.add_record(Kind.PLAN, run.plan.encode())
        changes = run.finished.take()
        commit_id, unchanged = before, True
        if before is None or not _is_result(store, before, tree, plan_id):
            measured = {**_measured(run, tensors), "elapsed_seconds": round(time.monotonic() - started, 3)}
            commit = _commit(run.plan, tree, plan_id, before, ref, message, author, measured)
            commit_id, unchanged = staging.add_record(Kind.COMMIT, commit.encode()), False
            changes.commits.append(commit)
            changes.refs.append(RefUpdate(ref, before, commit_id, "branch", "merge", commit.author))
        else:
            staging.add_record(Kind.COMMIT, store.commit(before).encode())  # writes it only where its file was lost
        _publish(store, staging, changes)
        assert commit_id is not None
        return MergeResult(
            ref=ref,
            commit=commit_id,
            plan=plan_id,
            budget_bytes=run.plan.budget_bytes,
            **_measured(run, tensors),
            elapsed_seconds=round(time.monotonic() - started, 3),
            peak_memory_bytes=peak_memory_bytes(),
            unchanged=unchanged,
        )


@contextmanager
def _unless_dropped(store: Store, checked: CheckedPlan) -> Iterator[None]:
    """Raises ConflictError, and not DamagedError, where previews that the plan reads were dropped meanwhile."""
    try:
        yield
    except DamagedError as error:
        tensors = [(facts, checked.plan.tensors.get(facts.name)) for facts in checked.facts.tensors]
        levels = [previews_of(facts, planned) for facts, planned in tensors if planned is not None]
        wanted = {preview for level in levels for expert in level for preview in expert.values()}
        with store.catalog.reading() as view:
            if all(view.get("objects", preview) is not None for preview in wanted):
                raise
        raise ConflictError(
            "previews that the plan reads were dropped meanwhile, by `mp gc --previews`",
            hint="Make the plan again, or the previews: mp analyze EXPERT --previews",
        ) from error


def _open_run(store: Store, checked: CheckedPlan, staging: Staging, device: str, *, use_cache: bool) -> Run:
    reader = ObjectReader(store.layout)
    return Run(
        store=store,
        plan=checked.plan,
        method=checked.method,
        reader=reader,
        staging=staging,
        bench=open_bench(store, reader, virtual_blocks(checked.models), checked.method, device),
        finished=Finished(store, staging, keep_results=device == "cpu"),
        use_cache=use_cache,
    )


def _same_layout(donor: Snapshot, tensors: Mapping[str, TensorEntry]) -> bool:
    """Whether the result fits the donor's shards: the same tensors in the same types and shapes."""
    theirs = donor.tensors
    return theirs.keys() == tensors.keys() and all(
        entry.dtype == theirs[name].dtype and entry.shape == theirs[name].shape for name, entry in tensors.items()
    )


def _publish(store: Store, staging: Staging, changes: Changes) -> None:
    """Publish; where a ref moved meanwhile, the blocks stay all the same, so that the next try finds them."""
    try:
        publish(store.catalog, staging, changes)
    except ConflictError:
        kept = Changes(results=changes.results, deltas=changes.deltas, tensors=changes.tensors)
        publish(store.catalog, staging, kept)
        raise


def _ref_before(store: Store, ref: str) -> Digest | None:
    """Where the ref points now; raises ConflictError for a tag."""
    check_ref_name(ref)
    with store.catalog.reading() as view:
        found = find_ref(view, ref)
    if found is not None and found.kind == "tag":
        raise ConflictError(f"{ref!r} is a tag, and tags do not move", hint="Choose another name with --as.")
    return found.commit if found is not None else None


def _hold_to_budget(run: Run) -> None:
    """Raises BudgetError where more was read than the plan's budget allows."""
    budget, read = run.plan.budget_bytes, run.reader.counters.stored[Role.EXPERT]
    if budget is not None and read > budget:
        raise BudgetError(
            f"{read} expert bytes were read, and the budget is {budget}: nothing was published",
            hint="Make the plan again. If it happens again, it is a bug: please report it.",
        )


def _measured(run: Run, tensors: Mapping[str, TensorEntry]) -> dict[str, int]:
    """The run's counters, as they are now."""
    return {
        "expert_bytes_read": run.reader.counters.stored[Role.EXPERT],
        "base_bytes_read": run.reader.counters.stored[Role.BASE],
        "written_bytes": run.staging.written_bytes,
        "computed_blocks": run.computed,
        "cached_blocks": run.cached,
        "referenced_blocks": sum(len(entry.blocks) for entry in tensors.values()) - run.computed - run.cached,
    }


def _is_result(store: Store, commit: Digest, tree: Digest, plan: Digest) -> bool:
    """Whether a commit is this very result of this very plan already."""
    try:
        found = store.commit(commit)
    except NotFoundError:  # the ref went away meanwhile, and the commit with it: publication will say so
        return False
    return found.tree == tree and found.plan == plan


def _commit(
    plan: Plan, tree: Digest, plan_id: Digest, before: Digest | None, ref: str, message: str, author: str,
    measured: dict[str, int | float],
) -> Commit:  # fmt: skip
    parents = [Parent(before, "previous", ref)] if before is not None else []
    parents.append(Parent(plan.base.commit, "base", plan.base.name))
    parents += [Parent(expert.commit, "expert", expert.name) for expert in plan.experts]
    return Commit(
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


def describe(plan: Plan) -> str:
    """``ties of math:0.6 and code:0.4 on base``."""
    experts = [_named(expert) for expert in plan.experts]
    together = " and ".join([", ".join(experts[:-1]), experts[-1]] if len(experts) > 1 else experts)
    return f"{plan.method} of {together}" + (f" on {plan.base.name}" if plan.based else "")


def _named(expert: Input) -> str:
    weight = expert.parameters.get("weight")
    return expert.name if weight is None else f"{expert.name}:{float(weight):g}"


def peak_memory_bytes() -> int:
    """The most memory that this process ever had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
