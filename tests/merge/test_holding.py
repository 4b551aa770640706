"""A tensor that is too large to be held is read again, and the plan says so beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergepipe.merge import blocks, execute, holding
from mergepipe.merge.build import jobs_of_plan
from mergepipe.merge.holding import fits_in_memory, held_bytes
from mergepipe.merge.methods import METHODS
from mergepipe.merge.validate import check_plan
from mergepipe.store import Store
from support.family import Weights, base_weights, fine_tune
from support.merges import FAMILIES, assert_as_planned, ingest_family, make_plan, merge, tree_of

WEIGHTS = {"math": 0.75, "code": 0.5}
UP = "model.layers.1.mlp.up_proj.weight"
PASSES = [name for name in (*FAMILIES, "multislerp") if name not in ("linear", "task_arithmetic")]


@pytest.fixture
def partly(store: Store, tmp_path: Path) -> Store:
    """A family of which one tensor has blocks in which nobody differs."""
    base = base_weights()
    experts: dict[str, Weights] = {"math": fine_tune(base, 1), "code": fine_tune(base, 2)}
    for weights in experts.values():
        weights[UP] = weights[UP].copy()
        weights[UP][32:64] = base[UP][32:64]
    ingest_family(store, tmp_path, base, experts)
    return store


def passes_of(store: Store, method: str) -> int:
    """How many passes a method takes over each tensor of a plan."""
    facts = check_plan(store, make_plan(store, method, WEIGHTS)).facts
    (count,) = {len(METHODS[method].passes(tensor.problem)) for tensor in facts.tensors if tensor.places}
    return count


@pytest.mark.parametrize("dtype", [None, "F32"])
@pytest.mark.parametrize("method", PASSES)
def test_what_is_not_held_is_read_for_each_pass_and_for_the_merge(
    partly: Store, monkeypatch: pytest.MonkeyPatch, method: str, dtype: str | None
) -> None:
    held = make_plan(partly, method, WEIGHTS, dtype=dtype)
    assert_as_planned(held, execute(partly, held, "held", use_cache=False))
    monkeypatch.setattr(holding, "MOST_HELD_BYTES", 0)
    plan = make_plan(partly, method, WEIGHTS, dtype=dtype)
    count = passes_of(partly, method)
    assert count >= 1
    assert plan.costs.expert_bytes == plan.costs.expert_bytes_full == (1 + count) * held.costs.expert_bytes
    assert held.costs.base_bytes < plan.costs.base_bytes <= (1 + count) * held.costs.base_bytes
    assert_as_planned(plan, execute(partly, plan, "again", use_cache=False))
    assert tree_of(partly, "again") == tree_of(partly, "held")
    assert plan.tensors == held.tensors


def test_the_limit_is_of_each_tensor(family: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its inputs as they are decoded."""
    plan = make_plan(family, "model_stock", WEIGHTS)
    _, jobs = jobs_of_plan(family, plan)
    sizes = {job.name: held_bytes(job) for job in jobs}
    assert sizes[UP] == 3 * family.snapshot("base").entry(UP).nbytes
    held = plan.costs.expert_bytes
    monkeypatch.setattr(holding, "MOST_HELD_BYTES", sizes[UP])
    assert all(fits_in_memory(job) for job in jobs if job.name in plan.tensors)
    assert make_plan(family, "model_stock", WEIGHTS).costs.expert_bytes == held
    monkeypatch.setattr(holding, "MOST_HELD_BYTES", sizes[UP] - 1)
    some = make_plan(family, "model_stock", WEIGHTS)
    assert held < some.costs.expert_bytes < 2 * held
    assert_as_planned(some, execute(family, some, "merged", use_cache=False))


def test_a_sweep_reads_what_is_not_held_once(family: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pass found is known by then."""
    monkeypatch.setattr(holding, "MOST_HELD_BYTES", 0)
    first = execute(family, make_plan(family, "slerp", {"math": 1.0}, t=0.3), "merged")
    second = execute(family, make_plan(family, "slerp", {"math": 1.0}, t=0.7), "merged")
    assert first.expert_bytes_read == 2 * second.expert_bytes_read > 0
    assert first.base_bytes_read == 2 * second.base_bytes_read
    merge(family, "slerp", {"math": 1.0}, "checked", t=0.7)
    assert tree_of(family, "checked") == tree_of(family, "merged")


@pytest.mark.parametrize("share", [0.4, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("method", ["model_stock", "ties", "karcher"])
def test_a_budget_counts_passes_only_where_they_are_made_in_the_merge(
    family: Store, monkeypatch: pytest.MonkeyPatch, method: str, share: float
) -> None:
    """Under a budget they are made when the plan is: then half of the bytes may be enough for everything."""
    monkeypatch.setattr(holding, "MOST_HELD_BYTES", 0)
    free = make_plan(family, method, WEIGHTS, exact=False) if method == "ties" else make_plan(family, method, WEIGHTS)
    full = make_plan(family, method, WEIGHTS).costs.expert_bytes
    plan = make_plan(family, method, WEIGHTS, budget=f"{int(share * full)}")
    assert plan.bound.update
    assert (plan.bound.absolute == 0) == (share >= 0.5)
    assert_as_planned(plan, execute(family, plan, "merged", use_cache=False))
    if share >= 0.5:
        execute(family, free, "full", use_cache=False)
        assert tree_of(family, "merged") == tree_of(family, "full")


@pytest.mark.parametrize("limit", [0, 1, 40_000])
def test_tensors_in_work_share_what_may_be_held(family: Store, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """One goes on alone even where it is more than all may have; the others wait for it."""
    plan = make_plan(family, "model_stock", WEIGHTS)
    execute(family, plan, "wanted", use_cache=False)
    monkeypatch.setattr(blocks, "ALL_HELD_BYTES", limit)
    most = 0
    original = blocks._Merging._with_passes

    def watched(self: blocks._Merging, *arguments: object) -> object:
        nonlocal most
        most = max(most, self._held_bytes)
        return original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(blocks._Merging, "_with_passes", watched)
    assert_as_planned(plan, execute(family, plan, "merged", use_cache=False))
    assert tree_of(family, "merged") == tree_of(family, "wanted")
    _, jobs = jobs_of_plan(family, plan)
    assert 0 < most <= max(limit, *(held_bytes(job) for job in jobs))
