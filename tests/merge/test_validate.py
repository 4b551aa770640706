"""A plan held against a store: what was edited is refused before anything is read or written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergepipe.merge import Plan, decode_plan, execute
from mergepipe.merge.validate import check_plan
from mergepipe.store import Store
from mergepipe.store.errors import BadInputError, BudgetError, MergePipeError, NotFoundError
from support.family import base_weights, fine_tune
from support.hostile import at, mutated_json, with_change, without
from support.merges import FAMILIES, ingest_family, ingest_model, make_plan
from support.stores import state_of, writers_left

WEIGHTS = {"math": {"weight": 0.75}, "code": {"weight": 0.5}}
UP = "model.layers.1.mlp.up_proj.weight"
NOTHING = {"setting": 0, "sources": None, "reads": ["", ""], "pinned": {}, "bound": 0.0}
Refused = Callable[..., MergePipeError]


def edited(plan: Plan, path: tuple[str | int, ...], value: Any) -> Plan:
    return decode_plan(json.dumps(with_change(plan.as_json(), path, value)).encode(), "edited")


@pytest.fixture
def refused(shared_family: Store) -> Refused:
    """Executes a plan that must be refused, with the store left as it was but for statistics where there were none."""

    def run(plan: Plan, kind: type[MergePipeError] = BadInputError, match: str = ".", *, measured: bool = False) -> Any:
        if measured:  # of models that nobody had compared yet; they are true whatever the plan is
            with pytest.raises(kind):
                check_plan(shared_family, plan)
        before = state_of(shared_family)
        with pytest.raises(kind, match=match) as caught:
            execute(shared_family, plan, "hostile")
        assert type(caught.value) is kind
        assert state_of(shared_family) == before
        assert writers_left(shared_family) == []
        return caught.value

    return run


@pytest.fixture
def partial(shared_family: Store) -> Plan:
    """A plan that reads a part of some tensors."""
    plan = make_plan(shared_family, "ties", WEIGHTS, budget="40%", density=0.3)
    assert any(tensor.bound and any(tensor.reads) for tensor in plan.tensors.values())
    return plan


@pytest.fixture
def additive(shared_family: Store) -> Plan:
    return make_plan(shared_family, "task_arithmetic", WEIGHTS, budget="40%")


@pytest.mark.parametrize("method", FAMILIES)
@pytest.mark.parametrize("budget", [None, "0", "40%", "100%"])
@pytest.mark.parametrize("dtype", [None, "F32"])
def test_what_the_planner_made_holds(shared_family: Store, method: str, budget: str | None, dtype: str | None) -> None:
    plan = make_plan(shared_family, method, {"math": 0.75, "code": 0.5}, budget=budget, dtype=dtype)
    checked = check_plan(shared_family, decode_plan(plan.encode(), "plan"))
    assert checked.plan == plan
    assert [model.snapshot.commit_id for model in checked.models] == [
        shared_family.resolve(name) for name in ("base", "math", "code")
    ]
    assert checked.facts.bounded == (budget in ("0", "40%"))


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("costs", "computed_blocks"), 0, "plan's costs computed_blocks is 0, and follows as"),
        (("costs", "referenced_blocks"), 10**6, "referenced_blocks"),
        (("bound", "absolute"), 0.0, "plan's bound absolute is 0.0"),
        (("bound", "absolute"), 1e9, "bound absolute"),
        (("bound", "relative"), 0.0, "bound relative"),
        (("bound", "update"), 1e9, "bound update"),
        (("bound", "update"), None, "says that it reads everything, and does not"),
        (("bound", "estimate"), 0.0, "bound estimate"),
        (("tensors", UP, "bound"), 0.0, "bound is 0.0"),
        (("tensors", UP, "pinned", "thresholds", 0), 0, "thresholds"),
        (("tensors", UP, "pinned", "thresholds", 1), 0x3F800000, "thresholds"),
        (("tensors", UP, "pinned", "kept", 0), -1, "kept"),
        (("tensors", UP, "pinned"), {}, "'kept'"),
        (("tensors", UP, "pinned", "speed"), [1], "speed"),
        (("tensors", UP, "sources"), ["lm_head.weight"] * 3, "sources"),
        (("tensors", UP, "sources"), [UP] * 3, "sources"),
        (("method",), "tie", "no method 'tie'"),
        (("method",), "breadcrumbs", "is for version 2 of breadcrumbs"),
        (("method",), "linear", "is for version 2 of linear"),
        (("method_version",), 99, "version 99 of ties, this is "),
        (("method_version",), 0, "version 0"),
        (("based",), False, "ties needs a base model"),
        (("complete",), True, "follows as|does not speak"),
        (("variants",), [{"reference": 0, "based": True, "experts": [], "parameters": {}, "own": []}], "variants"),
        (("base", "kind"), "adapter", "no whole model"),
        (("parameters", "rescale"), 0, "exactly the method's parameters"),
        (("parameters",), {}, "exactly the method's parameters"),
        (("parameters", "lambda"), 2.0, "follows as"),
        (("parameters", "lambda"), True, "must be a number"),
        (("parameters", "lambda"), 1e39, "lambda"),
        (("parameters", "normalize"), 1, "exactly the method's parameters"),
        (("parameters", "normalize"), False, "follows as"),
        (("parameters", "density"), 0.3, "exactly the method's parameters"),
        (("parameters", "speed"), 1, "no parameter 'speed'"),
        (("experts", 0, "parameters"), {}, "exactly the method's parameters"),
        (("experts", 0, "parameters", "weight"), True, "must be a number"),
        (("experts", 0, "parameters", "weight"), 1e39, "weight"),
        (("experts", 0, "parameters", "lambda"), 1.0, "exactly the method's parameters"),
        (("experts", 0, "parameters", "density"), 0.5, "follows as"),
        (("experts", 0, "parameters", "density"), 1.5, "density"),
        (("experts", 0, "parameters", "density"), -0.5, "density"),
        (("base", "parameters"), {"weight": 1.0}, "gives the base parameters"),
        (("dtype",), "F33", "is not one to merge to"),
        (("dtype",), "bf16", "is not one to merge to"),
        (("dtype",), "I32", "is not one to merge to"),
        (("dtype",), "F32", "config is not what follows from its dtype"),
        (("config",), {"torch_dtype": "float32"}, "config is not what follows from its dtype"),
        (("config",), {"num_hidden_layers": 3}, "another number of layers than its tensors"),
        (("tensors", "no.such.tensor"), NOTHING, "the plan speaks of 'no.such.tensor'"),
        (("tensors", "lm_head.weight"), NOTHING, "the plan speaks of 'lm_head.weight', where there is nothing to do"),
        (("tensors",), {}, "follows as"),
    ],
    ids=lambda part: str(part)[:50],
)  # fmt: skip
def test_an_edited_field_is_refused(
    partial: Plan, refused: Refused, path: tuple[str | int, ...], value: Any, match: str
) -> None:
    error = refused(edited(partial, path, value), match=match)
    assert error.hint


@pytest.mark.parametrize("reads", ["", "0", "0-3,5", "0-1", "0-99"])
def test_edited_reads_are_refused(partial: Plan, additive: Plan, refused: Refused, reads: str) -> None:
    """Fewer, or others: of one expert or of both."""
    for plan in (partial, additive):
        tensor, number = next(
            (name, number)
            for name, found in plan.tensors.items()
            for number, indices in enumerate(found.reads)
            if indices
        )
        free = replace(plan, budget_bytes=None)
        refused(edited(free, ("tensors", tensor, "reads", number), reads))
        refused(edited(free, ("tensors", tensor, "reads"), [reads, reads]))


def test_more_reads_are_refused(shared_family: Store, partial: Plan, additive: Plan, refused: Refused) -> None:
    """What goes over the budget is called that; where there is room, the costs are not what they are said to be."""
    everything = (
        make_plan(shared_family, "ties", WEIGHTS, density=0.3, exact=False),
        make_plan(shared_family, "task_arithmetic", WEIGHTS),
    )
    for plan, full in zip((partial, additive), everything, strict=True):
        more = replace(plan, tensors=full.tensors)
        refused(more, BudgetError, "more than its budget")
        refused(replace(more, budget_bytes=None), match="follows as")


@pytest.mark.parametrize("field", ["expert_bytes", "expert_bytes_full", "base_bytes"])
@pytest.mark.parametrize("value", [0, 1, 10**9])
def test_bytes_are_counted_anew_for_this_store(shared_family: Store, partial: Plan, field: str, value: int) -> None:
    """Another store may have the blocks in other encodings; what a plan claims of bytes is not believed, nor kept."""
    claimed = edited(partial, ("costs", field), value)
    assert claimed.id != partial.id
    assert check_plan(shared_family, claimed).plan == partial
    assert execute(shared_family, claimed, "claimed", use_cache=False).plan == partial.id


def test_a_plan_of_everything_leaves_nothing_out(shared_family: Store, refused: Refused) -> None:
    """It has no certificate, so whatever it leaves out is nowhere bounded."""
    for method in ("ties", "task_arithmetic", "model_stock"):
        plan = make_plan(shared_family, method, {"math": 0.75, "code": 0.5})
        for reads in (["", ""], ["0", "0"], ["0-3", ""]):
            refused(edited(plan, ("tensors", UP, "reads"), reads), match=f"does not in '{UP}'")
        refused(decode_plan(json.dumps(without(plan.as_json(), ("tensors", UP))).encode(), "edited"))
        refused(edited(plan, ("bound", "absolute"), 1.0), match="bound absolute")
        refused(replace(plan, budget_bytes=plan.costs.expert_bytes - 1), BudgetError, "more than its budget")


def test_a_part_of_what_belongs_together_is_refused(partial: Plan, refused: Refused) -> None:
    """For ties, one expert of a place read and another not would move the result further than either."""
    tensor = next(name for name, found in partial.tensors.items() if all(found.reads))
    refused(edited(partial, ("tensors", tensor, "reads", 1), ""), match="a part of what belongs together")


def test_a_block_that_is_the_bases_own_is_not_read(additive: Plan, refused: Refused) -> None:
    value = with_change(additive.as_json(), ("tensors", "lm_head.weight"), at(additive.as_json(), ("tensors", UP)))
    value = with_change(value, ("tensors", "lm_head.weight", "reads"), ["0", ""])
    refused(decode_plan(json.dumps(value).encode(), "edited"), match="which is the base's own, or does not exist")


def test_a_tensor_that_is_left_out_is_missed(additive: Plan, refused: Refused) -> None:
    value = without(additive.as_json(), ("tensors", UP))
    refused(decode_plan(json.dumps(value).encode(), "edited"))


def test_a_budget_below_its_reads_is_refused(partial: Plan, additive: Plan, refused: Refused) -> None:
    for plan in (partial, additive):
        refused(replace(plan, budget_bytes=plan.costs.expert_bytes - 1), BudgetError, "more than its budget")
        refused(replace(plan, budget_bytes=0), BudgetError)


def test_commits_that_are_not_here_are_named(partial: Plan, refused: Refused) -> None:
    nobody = "12" * 32
    error = refused(
        edited(partial, ("base", "commit"), nobody), NotFoundError, "'base' of the plan is commit 121212121212"
    )
    assert "Ingest it here" in str(error.hint)
    refused(edited(partial, ("experts", 1, "commit"), nobody), NotFoundError, "'code' of the plan is commit")


def test_ids_of_other_things_are_no_commits(shared_family: Store, partial: Plan, refused: Refused) -> None:
    for digest in (
        shared_family.commit(shared_family.resolve("base")).tree,
        shared_family.snapshot("base").entry(UP).blocks[0],
        partial.id,
    ):
        refused(edited(partial, ("base", "commit"), digest.hex()), NotFoundError)


def test_somebody_elses_commits_are_refused(
    shared_family: Store, partial: Plan, refused: Refused, tmp_path: Path
) -> None:
    """Experts that were not planned for, the base as an expert, experts in another order, another model."""
    base = base_weights()
    ingest_model(shared_family, tmp_path, "other", fine_tune(base, 9), base="base")
    ingest_model(shared_family, tmp_path, "small", {"w": np.ones((4, 4), np.float32)})
    for name in ("other", "base", "small"):
        refused(edited(partial, ("experts", 0, "commit"), shared_family.resolve(name).hex()))
    for name in ("other", "math", "small"):
        refused(edited(partial, ("base", "commit"), shared_family.resolve(name).hex()), measured=True)
    refused(replace(partial, experts=tuple(reversed(partial.experts))))


def test_an_expert_of_another_kind_is_refused(partial: Plan, refused: Refused) -> None:
    """Whole weights taken for deltas, and a model taken for an adapter."""
    refused(edited(partial, ("experts", 0, "kind"), "task_vector"), measured=True)
    refused(edited(partial, ("experts", 0, "kind"), "adapter"), match="adapter_config.json")


def test_parameters_of_another_method_are_refused(additive: Plan, refused: Refused) -> None:
    refused(replace(additive, method="linear"), match="linear has no parameter")


def test_a_weight_that_moves_the_bound_is_refused(partial: Plan, additive: Plan, refused: Refused) -> None:
    refused(edited(additive, ("experts", 0, "parameters", "weight"), 0.7), match="follows as")
    refused(edited(partial, ("experts", 0, "parameters", "weight"), -0.75), BudgetError, "both signs")


def test_an_edit_that_is_another_valid_plan_has_another_id(shared_family: Store, partial: Plan) -> None:
    """A weight of a normalized consensus does not enter its bound, and names, types and larger budgets are free.

    Such a plan is taken for what it says: another plan, with an id of its own, and another result.
    """
    first = execute(shared_family, partial, "first")
    edits: list[tuple[tuple[str | int, ...], Any]] = [
        (("experts", 0, "parameters", "weight"), 0.25),
        (("experts", 0, "name"), "somebody's"),
        (("budget_bytes",), 10**12),
        (("budget_bytes",), None),
    ]
    ids = {partial.id}
    for path, value in edits:
        plan = edited(partial, path, value)
        result = execute(shared_family, plan, "second")
        assert result.plan == plan.id
        assert plan.id not in ids
        ids.add(plan.id)
        assert shared_family.commit(result.commit).plan == plan.id
        same = shared_family.commit(result.commit).tree == shared_family.commit(first.commit).tree
        assert same == (path[-1] != "weight")


def test_weights_that_sum_to_zero_are_the_plans_fault(shared_family: Store, refused: Refused) -> None:
    plan = make_plan(shared_family, "linear", {"math": 0.5, "code": 1.0})
    refused(edited(plan, ("experts", 0, "parameters", "weight"), -1.0), match="sum to zero")


def test_what_has_no_bound_cannot_be_left_out(store: Store, tmp_path: Path) -> None:
    base = {"w": np.zeros(3000, np.float32)}
    tuned = {"w": np.where(np.arange(3000) == 2000, np.nan, 1).astype(np.float32)}
    ingest_family(store, tmp_path, base, {"tuned": tuned})
    plan = make_plan(store, "linear", {"tuned": 1.0}, max_error=0.0)
    assert plan.bound.update
    before = state_of(store)
    with pytest.raises(BudgetError, match="no bound exists while 'w'"):
        execute(store, edited(plan, ("tensors", "w", "reads"), ["0,2"]), "hostile")
    assert state_of(store) == before


def test_statistics_that_are_missing_are_made_before_a_plan_is_believed(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    """A store that has the objects and not the statistics refuses the same edits."""
    base = base_weights()
    first, second = make_store(), make_store()
    for store in (first, second):
        ingest_family(store, tmp_path / store.layout.root.name, base, {"math": fine_tune(base, 1)}, against_base=False)
    plan = make_plan(first, "ties", {"math": 1.0}, density=0.3, budget="50%")
    commits = {name: second.resolve(name).hex() for name in ("base", "math")}
    moved = edited(edited(plan, ("base", "commit"), commits["base"]), ("experts", 0, "commit"), commits["math"])
    tensor = next(iter(moved.tensors))
    with pytest.raises(BadInputError, match="thresholds"):
        execute(second, edited(moved, ("tensors", tensor, "pinned", "thresholds"), [0]), "hostile")
    with pytest.raises(BadInputError, match="bound"):
        execute(second, edited(moved, ("bound", "absolute"), 0.0), "hostile")
    execute(second, moved, "merged")


def test_a_plan_holds_where_the_blocks_are_kept_in_other_encodings(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    """One store has the expert as deltas, the other whole: other bytes on disk, the same tree."""
    base = base_weights()
    first, second = make_store(), make_store()
    for store, against_base in ((first, True), (second, False)):
        folder = tmp_path / store.layout.root.name
        ingest_family(store, folder, base, {"math": fine_tune(base, 1)}, against_base=against_base)
    plan = make_plan(first, "ties", {"math": 1.0}, density=0.3)
    commits = {name: second.resolve(name).hex() for name in ("base", "math")}
    moved = edited(edited(plan, ("base", "commit"), commits["base"]), ("experts", 0, "commit"), commits["math"])
    here = execute(first, plan, "merged")
    there = execute(second, moved, "merged")
    assert there.expert_bytes_read > here.expert_bytes_read == plan.costs.expert_bytes
    assert first.commit(here.commit).tree == second.commit(there.commit).tree
    tight = replace(moved, budget_bytes=plan.costs.expert_bytes)
    with pytest.raises(BudgetError, match="more than its budget"):
        execute(second, tight, "tight")


def test_passes_are_made_before_a_plan_is_believed(make_store: Callable[..., Store], tmp_path: Path) -> None:
    """A store that never saw the question finds the same angles, and refuses a bound that does not follow."""
    base = base_weights()
    first, second = make_store(), make_store()
    for store in (first, second):
        folder = tmp_path / store.layout.root.name
        ingest_family(store, folder, base, {"math": fine_tune(base, 1), "code": fine_tune(base, 2)})
    plan = make_plan(first, "model_stock", {"math": 1.0, "code": 1.0}, budget="50%")
    moved = edited(plan, ("base", "commit"), second.resolve("base").hex())
    for number, name in enumerate(("math", "code")):
        moved = edited(moved, ("experts", number, "commit"), second.resolve(name).hex())
    with pytest.raises(BadInputError, match="bound absolute"):
        execute(second, edited(moved, ("bound", "absolute"), plan.bound.absolute / 2), "hostile")
    trees = [
        store.commit(execute(store, question, "merged").commit).tree
        for store, question in ((first, plan), (second, moved))
    ]
    assert trees[0] == trees[1]


@settings(max_examples=max(200, settings().max_examples))
@given(data=st.data())
def test_a_mutated_plan_is_refused_or_true(shared_family: Store, data: st.DataObject) -> None:
    """One change anywhere. What is still accepted keeps its word: the costs counted here are those measured."""
    method = data.draw(st.sampled_from(["ties", "task_arithmetic", "model_stock"]), label="method")
    budget = data.draw(st.sampled_from(["40%", None]), label="budget")
    plan = make_plan(shared_family, method, {"math": 0.75, "code": 0.5}, budget=budget)
    before = state_of(shared_family)
    try:
        found = decode_plan(data.draw(mutated_json(plan.as_json())), "p.json")
        here = check_plan(shared_family, found).plan
    except MergePipeError:
        pass
    else:
        assert found.tensors == plan.tensors
        assert found.bound == plan.bound
        if found != plan:
            result = execute(shared_family, found, "mutated", use_cache=False)
            assert result.expert_bytes_read == here.costs.expert_bytes
            assert result.base_bytes_read == here.costs.base_bytes
            assert result.computed_blocks == here.costs.computed_blocks
            assert result.plan == here.id
            return
    assert state_of(shared_family) == before
