"""Experts that are adapters and task vectors: the merge of the whole models that they stand for, at their own cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergepipe.merge import Expert, Plan, decode_plan, execute, parse_budget, plan_merge
from mergepipe.merge.build import jobs_of_plan
from mergepipe.merge.inputs import open_models, virtual_blocks
from mergepipe.merge.methods import METHODS
from mergepipe.merge.plan import Input
from mergepipe.store import Store
from mergepipe.store.digest import hash_bytes
from mergepipe.store.errors import BadInputError, BudgetError, ConflictError, NotFoundError, UsageError
from mergepipe.store.gc import collect
from mergepipe.store.publish import Changes, RefUpdate, publish
from mergepipe.store.refs import all_refs
from support.family import Weights
from support.merges import NUMPY, USUAL, assert_as_planned, bits, blocks_of, ingest_model, tree_of, weights_of
from support.stores import assert_clean, object_files
from support.virtual import (
    NORM,
    RANK,
    SHAPES,
    UP,
    Q,
    adapted,
    base_model,
    exact,
    factors,
    ingest_adapter,
    ingest_both,
)

VIRTUAL = (Expert("lora"), Expert("tv", kind="task_vector"), Expert("small"))
WHOLE = (Expert("lora-whole"), Expert("tv-whole"), Expert("small-whole"))
SEEDED = {"dare_linear", "dare_ties", "della", "della_linear"}  # masks are of the commits


@pytest.fixture
def both(store: Store, tmp_path: Path) -> Store:
    ingest_both(store, tmp_path)
    return store


def plan_for(
    store: Store, experts: Sequence[Expert], method: str, *, budget: str | None = None, base: str | None = "base",
    **parameters: Any,
) -> Plan:  # fmt: skip
    given = {**USUAL.get(method, {}), **parameters}
    return plan_merge(store, base, experts, method, parameters=given, budget=parse_budget(budget))


def merged(store: Store, plan: Plan, ref: str) -> Weights:
    """The result, with everything computed and counted."""
    assert decode_plan(plan.encode(), "plan") == plan
    assert_as_planned(plan, execute(store, plan, ref, use_cache=False))
    return weights_of(store, ref)


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].dtype == expected[name].dtype
        assert bits(found[name]) == bits(expected[name]), name


@pytest.mark.parametrize("method", [name for name in METHODS if name not in SEEDED])
def test_results_are_those_of_the_whole_models(both: Store, method: str) -> None:
    count = min(METHODS[method].experts[1] or 3, 3)
    for start in range(0, 3, count):
        virtual, whole = VIRTUAL[start : start + count], WHOLE[start : start + count]
        if len(virtual) < METHODS[method].experts[0]:
            continue
        found = merged(both, plan_for(both, virtual, method), "virtual")
        assert_same(found, merged(both, plan_for(both, whole, method), "whole"))
    assert_clean(both)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "model_stock", "nuslerp"])
def test_bounds_under_a_budget_are_those_of_the_whole_models(both: Store, method: str) -> None:
    """Virtual blocks are measured as whole ones are; only what they cost differs, and so what is chosen."""
    virtual, whole = VIRTUAL[: METHODS[method].experts[1]], WHOLE[: METHODS[method].experts[1]]
    plans = [plan_for(both, experts, method, budget="99%") for experts in (virtual, whole)]
    assert plans[0].bound.update == pytest.approx(plans[1].bound.update, 1e-9)
    for plan in plans:
        some = merged(both, plan, "some")
        full = merged(both, plan_for(both, virtual, method, **exactness(plan)), "full")
        truth = sum(float(((some[name].astype(float) - full[name]) ** 2).sum()) for name in full) ** 0.5
        assert truth <= plan.bound.absolute * (1 + 1e-6) + 1e-6


def exactness(plan: Plan) -> dict[str, Any]:
    return {"exact": plan.parameters["exact"]} if "exact" in plan.parameters else {}


def sizes(store: Store, ref: str, *ends: str) -> int:
    """Bytes on disk of all blocks of tensors whose names end so."""
    files = object_files(store)
    return sum(
        files[block.hex()] for name, blocks in blocks_of(store, ref).items() if name.endswith(ends) for block in blocks
    )


@pytest.mark.parametrize("method", ["linear", "ties", "model_stock"])
def test_an_adapter_costs_its_own_bytes(both: Store, method: str) -> None:
    experts = [Expert("lora"), Expert("small")]
    plan = plan_for(both, experts, method)
    cost = sizes(both, "lora", "weight") + sizes(both, "small", "weight")
    assert plan.costs.expert_bytes == plan.costs.expert_bytes_full == cost
    assert cost < sizes(both, "lora-whole", "proj.weight")
    assert_as_planned(plan, execute(both, plan, "merged", use_cache=False))
    whole = plan_for(both, experts, method, budget=str(cost))
    assert whole.bound.absolute == 0
    assert_as_planned(whole, execute(both, whole, "covered", use_cache=False))
    assert tree_of(both, "covered") == tree_of(both, "merged")
    with pytest.raises(BudgetError, match=f"the adapters alone, which are read whole, take {cost}"):
        plan_for(both, experts, method, budget=str(cost - 1))


def test_a_task_vector_costs_its_own_bytes(both: Store) -> None:
    plan = plan_for(both, [Expert("tv", kind="task_vector")], "linear")
    assert plan.costs.expert_bytes == sizes(both, "tv", "weight")
    merged(both, plan, "merged")
    assert plan_for(both, [Expert("tv", kind="task_vector")], "linear", budget="0").costs.expert_bytes == 0


def test_beside_models_adapters_are_always_read(both: Store) -> None:
    """What is left of the budget goes to the models."""
    adapter = sizes(both, "lora", "weight")
    experts = [Expert("lora"), Expert("tv-whole")]
    full = plan_for(both, experts, "linear").costs.expert_bytes
    for budget in (adapter, (adapter + full) // 2, full - 1):
        plan = plan_for(both, experts, "linear", budget=str(budget))
        assert adapter <= plan.costs.expert_bytes <= budget
        assert plan.tensors[Q].reads[0] == plan.tensors[UP].reads[0] or plan.bound.absolute > 0
        merged(both, plan, "merged")


def test_factors_with_a_block_in_common_are_read_and_counted_for_each(store: Store, tmp_path: Path) -> None:
    """Zeros, as training begins with them, are one block in every layer; and in every part of a large one."""
    ingest_model(store, tmp_path, "base", {name: exact((64, 64), number) for number, name in enumerate((Q, UP))})
    a, b = exact((RANK, 64), 1), exact((64, RANK), 2)
    pairs = {Q: (a, np.zeros_like(b)), UP: (exact((RANK, 64), 3), np.zeros_like(b))}
    ingest_adapter(store, tmp_path, "zeros", pairs)
    ingest_adapter(store, tmp_path, "shared", {Q: (a, b), UP: (a, exact((64, RANK), 4))})
    for name in ("zeros", "shared"):
        for method in ("linear", "ties"):
            plan = plan_for(store, [Expert(name)], method)
            assert plan.costs.expert_bytes > sum(
                object_files(store)[block.hex()] for block in {b for bs in blocks_of(store, name).values() for b in bs}
            )
            merged(store, plan, "merged")
            merged(store, plan_for(store, [Expert(name)], method, budget=str(plan.costs.expert_bytes)), "covered")
    assert_same(weights_of(store, "covered"), weights_of(store, "merged"))


def test_an_adapter_goes_onto_another_model(both: Store, tmp_path: Path) -> None:
    """It is that model where it changes nothing; the other model's blocks are read for it, and counted."""
    other = adapted(base_model(), factors(70, UP))
    other[NORM] = other[NORM] + np.float32(0.5)
    ingest_model(both, tmp_path, "other", other, base="base")
    ingest_model(both, tmp_path, "expected", adapted(other, factors(10, Q, UP)), base="base")
    plan = plan_for(both, [Expert("lora", onto="other")], "task_arithmetic")
    assert plan.experts[0].onto == both.resolve("other")
    expected = merged(both, plan_for(both, [Expert("expected")], "task_arithmetic"), "whole")
    assert_same(merged(both, plan, "merged"), expected)
    assert plan.costs.expert_bytes > sizes(both, "lora", "weight")
    alone = plan_for(both, [Expert("lora")], "task_arithmetic")
    assert alone.tensors != plan.tensors


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_what_several_experts_are_computed_from_costs_as_planned(both: Store, tmp_path: Path, method: str) -> None:
    """A model, and adapters onto it: its blocks are read for each."""
    ingest_model(both, tmp_path, "other", adapted(base_model(), factors(70, Q, UP)), base="base")
    experts = [Expert("other"), Expert("lora", onto="other"), Expert("small", onto="other")]
    plan = plan_for(both, experts, method)
    merged(both, plan, "merged")
    for budget in ("90%", "60%"):
        some = plan_for(both, experts, method, budget=budget)
        result = execute(both, some, "some", use_cache=False)
        left = sum(  # factors are counted whatever is read: these are of tensors in which an adapter is left out
            sizes(both, expert.name, f"{name.removesuffix('.weight')}.lora_{side}.weight")
            for name, tensor in some.tensors.items()
            for expert, indices in zip(some.experts, tensor.reads, strict=True)
            if expert.kind == "adapter" and not indices
            for side in "AB"
        )
        assert result.expert_bytes_read == some.costs.expert_bytes - left
        assert some.costs.expert_bytes <= (some.budget_bytes or 0)


def test_a_tensor_that_an_adapter_or_a_task_vector_lacks_is_the_bases(both: Store) -> None:
    plan = plan_for(both, [Expert("small"), Expert("tv", kind="task_vector")], "linear")
    models = open_models(both, plan.models)
    base = models[0].tensors
    assert {name for name in base if models[1].tensors[name] != base[name]} == {Q}
    assert {name for name in base if models[2].tensors[name] != base[name]} == {UP, NORM}
    assert all(entry.dtype == "F32" for model in models[1:] for entry in model.tensors.values())


def test_virtual_blocks_are_named_by_what_they_are_made_from(both: Store, tmp_path: Path) -> None:
    """The same ids for the same content, whoever asks and wherever it is; others for another scale or base."""

    def blocks(*experts: Expert, base: str = "base") -> set[bytes]:
        return set(virtual_blocks(jobs_of_plan(both, plan_for(both, experts, "linear", base=base))[0]))

    first = blocks(Expert("lora"))
    assert len(first) == sum(len(blocks_of(both, "base")[name]) for name in (Q, UP))
    assert blocks(Expert("lora", {"weight": 0.25})) == first
    assert first < blocks(Expert("lora"), Expert("small"))
    assert not first & blocks(Expert("lora"), base="tv-whole") - blocks_in_common(both)
    ingest_adapter(both, tmp_path / "again", "lora", factors(10, Q, UP))
    assert blocks(Expert("lora")) == first
    ingest_adapter(both, tmp_path / "other", "lora", factors(11, Q, UP))
    assert not blocks(Expert("lora")) & first


def blocks_in_common(store: Store) -> set[bytes]:
    """Virtual blocks onto blocks that are the same in two bases."""
    models = open_models(
        store, [Input(store.resolve("base"), "base"), Input(store.resolve("lora"), "lora", {}, "adapter")]
    )
    theirs = {block for blocks in blocks_of(store, "tv-whole").values() for block in blocks}
    return {digest for digest, made_of in models[1].virtual.items() if made_of.onto[0] in theirs}


def test_a_result_of_virtual_experts_is_known_the_next_time(both: Store) -> None:
    plan = plan_for(both, VIRTUAL, "ties")
    first = execute(both, plan, "merged")
    again = execute(both, plan, "again")
    assert (again.computed_blocks, again.expert_bytes_read) == (0, 0)
    assert tree_of(both, "again") == both.commit(first.commit).tree
    other = execute(both, plan_for(both, [*VIRTUAL[:2], Expert("small", {"weight": 0.5})], "ties"), "other")
    assert other.cached_blocks < again.cached_blocks


@pytest.mark.parametrize("experts", [[Expert("tv-whole"), Expert("lora")], [Expert("lora")],
                                     [Expert("tv", kind="task_vector")]])  # fmt: skip
def test_without_a_base_deltas_are_deltas_to_nothing(both: Store, experts: list[Expert]) -> None:
    """What experts are compared with is no input of the merge, so nothing goes onto it by chance."""
    with pytest.raises(UsageError, match="is no whole model, and nothing says which model it goes onto") as caught:
        plan_for(both, experts, "linear", base=None)
    assert "--base" in str(caught.value.hint)
    named = plan_for(both, [Expert("tv-whole"), Expert("lora", onto="base")], "linear", base=None)
    whole = plan_for(both, [Expert("tv-whole"), Expert("lora-whole")], "linear")
    assert_same(merged(both, named, "named"), merged(both, whole, "whole"))


def test_what_is_no_task_vector(both: Store, tmp_path: Path) -> None:
    ingest_model(both, tmp_path, "strange", {"nobody.weight": exact((4, 4), 1)})
    with pytest.raises(BadInputError, match=r"'strange' has tensors that the base has not: nobody\.weight"):
        plan_for(both, [Expert("strange", kind="task_vector")], "linear")
    ingest_model(both, tmp_path, "shorter", {UP: exact((64, 64), 1)})
    with pytest.raises(BadInputError, match=f"'{UP}' of the task vector 'shorter' has another shape") as caught:
        plan_for(both, [Expert("shorter", kind="task_vector")], "linear")
    assert "--base" in str(caught.value.hint)


def test_whole_numbers_of_a_task_vector_are_left_alone(both: Store, tmp_path: Path) -> None:
    base: Weights = {"ids": np.arange(9), "w": exact((64, 64), 1)}
    ingest_model(both, tmp_path, "numbers", base)
    ingest_model(both, tmp_path, "shift", {"ids": np.full(9, 7), "w": exact((64, 64), 2)})
    plan = plan_for(both, [Expert("shift", kind="task_vector")], "task_arithmetic", base="numbers")
    found = merged(both, plan, "merged")
    assert bits(found["ids"]) == bits(base["ids"])
    assert (found["w"] == base["w"] + exact((64, 64), 2)).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F64"])
def test_deltas_of_any_type(both: Store, tmp_path: Path, dtype: str) -> None:
    """Small numbers that all types have."""
    deltas = {UP: exact(SHAPES[UP], 30), NORM: exact(SHAPES[NORM], 31)}
    typed: Weights = {name: array.astype(NUMPY[dtype]) for name, array in deltas.items()}
    cut_as_base(both, tmp_path, "typed", typed)
    plan = plan_for(both, [Expert("typed", kind="task_vector")], "task_arithmetic")
    expected = merged(both, plan_for(both, [Expert("tv-whole")], "task_arithmetic"), "whole")
    assert_same(merged(both, plan, "merged"), expected)


def cut_as_base(store: Store, folder: Path, name: str, weights: Weights) -> None:
    """Other types have other blocks unless they are ingested against the base."""
    ingest_model(store, folder, name, {**{k: v * 0 for k, v in base_model().items() if k not in weights}, **weights},
                 base="base")  # fmt: skip


def test_a_commit_that_is_not_here(both: Store) -> None:
    nobody = Input(hash_bytes(b"nobody"), "nobody")
    with pytest.raises(NotFoundError, match="'nobody' of the plan is commit"):
        open_models(both, [Input(both.resolve("base"), "base"), nobody])


def test_nothing_that_is_read_is_collected_meanwhile(
    both: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No ref leads to the models any more, neither when a plan is made, nor when it is checked, nor in the merge."""
    ingest_model(both, tmp_path, "other", adapted(base_model(), factors(70, UP)), base="base")
    experts = [Expert("lora", onto="other"), Expert("tv", kind="task_vector")]
    gone: list[int] = []

    def without_refs(function: Callable[..., Any]) -> Callable[..., Any]:
        def first_collect(*arguments: Any, **options: Any) -> Any:
            with both.catalog.reading() as view:
                refs = all_refs(view)
            publish(both.catalog, None, Changes(refs=[RefUpdate(ref.name, ref.commit, None) for ref in refs]))
            gone.append(collect(both, apply=True, grace_seconds=0).commits)
            with both.catalog.reading() as view:
                left = [ref for ref in refs if view.get("commits", ref.commit) is not None]
            publish(both.catalog, None, Changes(refs=[RefUpdate(ref.name, None, ref.commit) for ref in left]))
            return function(*arguments, **options)

        return first_collect

    for name in ("merge.build.plan_jobs", "merge.validate.facts_of", "merge.executor.compute"):
        module, function = f"mergepipe.{name}".rsplit(".", 1)
        with monkeypatch.context() as patch:
            patch.setattr(f"{module}.{function}", without_refs(getattr(import_module(module), function)))
            plan = plan_for(both, experts, "task_arithmetic")
            if "executor" in name:
                with pytest.raises(ConflictError, match=r"'validate' was .* and is now gone"):
                    execute(both, plan, "validate")
            execute(both, plan, name.split(".")[1])
    assert_clean(both)
    assert len(gone) == 4
    assert gone[0] > 0  # of those that nobody read
