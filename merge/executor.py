"""Carrying out a plan: within the budget by measured bytes, published once, with what it cost.

The work itself is in :mod:`mergepipe.merge.blocks`; here are its frame, its accounts and its commit.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

from mergepipe.merge.blocks import Run, compute
from mergepipe.merge.plan import Plan
from mergepipe.merge.validate import check_plan
from mergepipe.store.commits import Commit, Parent, default_author, timestamp_now
from mergepipe.store.digest import Digest
from mergepipe.store.errors import BudgetError, ConflictError
from mergepipe.store.frame import Kind
from mergepipe.store.manifest import build_tree
from mergepipe.store.objects import ObjectReader, Role
from mergepipe.store.parallel import Progress, default_workers
from mergepipe.store.publish import Changes, RefUpdate, publish
from mergepipe.store.refs import check_ref_name, find_ref
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
        run = Run(store, plan, reader, staging, use_cache)
        tensors = compute(run, base, experts, workers or default_workers(), progress)
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


def _commit(
    run: Run, tree: Digest, plan_id: Digest, ref: str, before: Digest | None, message: str, author: str,
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
