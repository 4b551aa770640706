"""Which tensors of which models make each tensor of the result, and what is said where they do not fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergepipe.merge import Expert, Plan, decode_plan, execute, parse_budget, plan_merge
from mergepipe.merge.assemble import in_order, jobs_from, jobs_of, misfit
from mergepipe.merge.inputs import open_models
from mergepipe.merge.job import Setting, mask_key
from mergepipe.merge.methods import METHODS
from mergepipe.merge.plan import Input
from mergepipe.merge.validate import check_plan
from mergepipe.store import Store
from mergepipe.store.errors import BadInputError
from mergepipe.store.manifest import TensorEntry
from support.family import Weights, base_weights, fine_tune
from support.merges import (
    FAMILIES,
    USUAL,
    assert_as_planned,
    bits,
    ingest_family,
    ingest_model,
    make_plan,
    merge,
    tree_of,
    weights_of,
)

BASE = base_weights()
TUNES = {"math": fine_tune(BASE, 1), "code": fine_tune(BASE, 2, scale=3e-3), "chat": fine_tune(BASE, 3)}
UP, Q = "model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.q_proj.weight"
LACKING = {"math": {UP}, "code": {UP, Q}, "chat": set[str]()}


@pytest.fixture
def gaps(store: Store, tmp_path: Path) -> Store:
    """``math`` and ``code`` lack tensors that ``chat`` has; ``-full`` are the same with all of them."""
    experts = {
        name: {tensor: weights for tensor, weights in tuned.items() if tensor not in LACKING[name]}
        for name, tuned in TUNES.items()
    }
    ingest_family(store, tmp_path, BASE, experts)
    for name, tuned in TUNES.items():
        ingest_model(store, tmp_path, f"{name}-full", tuned, base="base")
    return store


def plan_gaps(
    store: Store, method: str, weights: Mapping[str, float], *, allow_missing: bool = True, budget: str | None = None
) -> Plan:
    weighted = any(parameter.name == "weight" for parameter in METHODS[method].parameters)
    return plan_merge(
        store, "base", [Expert(name, {"weight": weight} if weighted else {}) for name, weight in weights.items()],
        method, parameters=USUAL.get(method, {}), budget=parse_budget(budget), allow_missing=allow_missing,
    )  # fmt: skip


ALL = {"math": 0.5, "code": 0.25, "chat": 1.0}
SEEDLESS = [name for name in FAMILIES if name not in ("dare_linear", "della", "nuslerp")]


@pytest.mark.parametrize("method", SEEDLESS)
def test_each_tensor_is_merged_from_the_models_that_have_it(gaps: Store, method: str) -> None:
    """As if there were a merge for each set of models; where they are too few for the method the base's own stays."""
    plan = plan_gaps(gaps, method, ALL)
    assert plan.complete
    assert decode_plan(plan.encode(), "plan") == plan
    assert check_plan(gaps, plan).plan == plan
    assert_as_planned(plan, execute(gaps, plan, "merged", use_cache=False))
    found = weights_of(gaps, "merged")
    least = METHODS[method].experts[0]
    expected: dict[str, Weights] = {}
    for missing in (set[str](), {"math", "code"}, {"code"}):
        there = {f"{name}-full": weight for name, weight in ALL.items() if name not in missing}
        if len(there) >= least:
            merge(gaps, method, there, "expected")
            expected["".join(sorted(missing))] = weights_of(gaps, "expected")
        else:
            expected["".join(sorted(missing))] = BASE
    for name in BASE:
        missing = {model for model, lacking in LACKING.items() if name in lacking}
        assert bits(found[name]) == bits(expected["".join(sorted(missing))][name]), name


def test_settings_are_shared(gaps: Store) -> None:
    """One for each set of models, numbered as they come; all tensors are listed, in the model's order."""
    plan = plan_gaps(gaps, "linear", ALL)
    assert [setting.experts for setting in plan.settings] == [(1, 2, 3), (3,), (1, 3)]
    assert {name: tensor.setting for name, tensor in plan.tensors.items() if tensor.setting} == {UP: 1, Q: 2}
    assert list(plan.tensors) == in_order(BASE)
    assert plan.settings[1].own == ({"weight": 1.0},)
    few = plan_gaps(gaps, "model_stock", {"math": 1.0, "code": 1.0})
    assert [setting.experts for setting in few.settings] == [(1, 2), ()]
    assert {name for name, tensor in few.tensors.items() if tensor.setting} == {UP, Q}


@pytest.mark.parametrize("budget", ["0", "30%", "100%"])
@pytest.mark.parametrize("method", ["linear", "ties", "model_stock"])
def test_budgets_hold_for_incomplete_models_too(gaps: Store, method: str, budget: str) -> None:
    plan = plan_gaps(gaps, method, ALL, budget=budget)
    assert check_plan(gaps, decode_plan(plan.encode(), "plan")).plan == plan
    result = execute(gaps, plan, "merged", use_cache=False)
    assert_as_planned(plan, result)
    assert budget != "0" or tree_of(gaps, "merged") == tree_of(gaps, "base")


def test_where_nothing_is_missing_the_plan_is_as_without_asking(family: Store) -> None:
    assert plan_gaps(family, "ties", {"math": 0.75, "code": 0.5}) == make_plan(
        family, "ties", {"math": 0.75, "code": 0.5}
    )


def test_missing_tensors_are_an_error_unless_they_are_allowed(gaps: Store) -> None:
    with pytest.raises(BadInputError, match=f"expert 'math' does not fit the base: {UP} is missing") as caught:
        plan_gaps(gaps, "linear", ALL, allow_missing=False)
    assert "--allow-missing" in str(caught.value.hint)


def test_what_has_another_shape_is_no_missing_tensor(gaps: Store, tmp_path: Path) -> None:
    wrong = {name: weights for name, weights in TUNES["chat"].items() if name != Q}
    wrong[UP] = wrong[UP][:32]
    ingest_model(gaps, tmp_path, "wrong", wrong)
    with pytest.raises(BadInputError, match=r"'wrong' does not fit the base: .*in the base"):
        plan_gaps(gaps, "linear", {"wrong": 1.0})


SHAPE = TensorEntry("F32", (64, 32), (32, 32), ())


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (None, "w is missing"),
        (replace(SHAPE, shape=(64, 31)), r"w is \[64, 31\], in the base \[64, 32\]"),
        (replace(SHAPE, shape=(64,), chunks=(64,)), r"w is \[64\], in the base"),
        (replace(SHAPE, dtype="I32"), "w is I32, in the base F32"),
        (replace(SHAPE, dtype="F8_E5M2"), "w is F8_E5M2, in the base F32"),
        (replace(SHAPE, chunks=(16, 32)), "w is cut into other blocks"),
        (replace(SHAPE, dtype="BF16"), None),
        (SHAPE, None),
    ],
)
def test_what_does_not_fit(entry: TensorEntry | None, match: str | None) -> None:
    found = misfit("w", entry, SHAPE)
    assert (found is None) if match is None else (found is not None and re.match(match, found) is not None)


def test_a_type_without_statistics_fits_itself_alone() -> None:
    assert misfit("w", replace(SHAPE, dtype="I32"), replace(SHAPE, dtype="I32")) is None
    assert misfit("w", SHAPE, replace(SHAPE, dtype="I32")) == "w is F32, in the base I32"


def models_of(store: Store, *names: str) -> Any:
    return open_models(store, [Input(store.resolve(name), name) for name in names])


def test_sources_are_the_models_own_names(family: Store) -> None:
    """A tensor of the result may come from others of the models, and be compared with any of them."""
    models = models_of(family, "base", "math", "code")
    settings = [Setting(0, True, (1, 2), {}, ({}, {})), Setting(2, False, (1,), {}, ({},))]
    first = "model.layers.0.self_attn.q_proj.weight"
    jobs = jobs_from(models, settings, {"new.weight": (0, (first, Q, first)), Q: (1, None)})
    assert [job.name for job in jobs] == ["new.weight", Q]
    assert jobs[0].reference == models[0].tensors[first]
    assert jobs[0].experts == (models[1].tensors[Q], models[2].tensors[first])
    assert jobs[1].reference == models[2].tensors[Q]
    assert jobs[1].experts == (models[1].tensors[Q],)
    assert jobs[0].keys == tuple(mask_key("new.weight", family.resolve(name)) for name in ("math", "code"))
    assert len({*jobs[0].keys, *jobs[1].keys}) == 3, "a mask is of a tensor's name and an expert"
    problem = jobs[1].problem(settings[1])
    assert (problem.based, problem.keys, problem.shape) == (False, jobs[1].keys, (64, 64))


@pytest.mark.parametrize(
    ("sources", "match"),
    [
        (("nobody", Q, Q), "the base 'base' is not what the merge is for: nobody is missing"),
        ((Q, "nobody", Q), "'math' does not fit the base: nobody is missing"),
        ((Q, Q, UP), f"'code' does not fit the base: {UP} is"),
    ],
)
def test_sources_that_do_not_fit_are_named(family: Store, sources: tuple[str, ...], match: str) -> None:
    models = models_of(family, "base", "math", "code")
    with pytest.raises(BadInputError, match=match):
        jobs_from(models, [Setting(0, True, (1, 2), {}, ({}, {}))], {"new": (0, sources)})


def test_of_many_misfits_three_are_shown(family: Store, tmp_path: Path) -> None:
    ingest_model(family, tmp_path, "tiny", {"w": np.ones(3, np.float32)})
    models = models_of(family, "base", "tiny")
    with pytest.raises(BadInputError, match=r"is missing; .* is missing; .* is missing \(and 9 more\)$"):
        jobs_from(models, [Setting(0, True, (1,), {}, ({},))], dict.fromkeys(models[0].tensors, (0, None)))


def test_a_complete_plan_has_the_tensors_that_it_lists(family: Store) -> None:
    plan = make_plan(family, "linear", {"math": 1.0})
    models = models_of(family, "base", "math")
    assert [job.name for job in jobs_of(models, plan)] == list(models[0].tensors)
    listed = replace(plan, complete=True, tensors=dict(reversed(plan.tensors.items())))
    assert [job.name for job in jobs_of(models, listed)] == in_order(plan.tensors) != list(listed.tensors)


def test_layers_are_in_the_order_of_their_numbers() -> None:
    names = ["model.layers.10.w", "lm_head.w", "model.layers.9.w", "model.embed.w", "model.layers.9.b"]
    assert in_order(names) == [
        "lm_head.w", "model.embed.w", "model.layers.9.b", "model.layers.9.w", "model.layers.10.w"
    ]  # fmt: skip


@pytest.fixture
def renamed(family: Store) -> Callable[..., Plan]:
    """A complete plan by hand: one tensor, from others of the models."""

    def make(**changes: Any) -> Plan:
        plan = make_plan(family, "linear", {"math": 0.5, "code": 0.5})
        first = "model.layers.0.self_attn.q_proj.weight"
        tensor = replace(plan.tensors[Q], sources=(first, Q, first))
        blocks = len(family.snapshot("base").entry(Q).blocks)
        costs = replace(plan.costs, computed_blocks=blocks, referenced_blocks=0)
        return replace(plan, complete=True, tensors={"new.weight": tensor}, costs=costs, **changes)

    return make


def test_a_plan_with_sources_is_carried_out(family: Store, renamed: Callable[..., Plan]) -> None:
    plan = decode_plan(renamed().encode(), "plan")
    result = execute(family, plan, "merged", use_cache=False)
    checked = check_plan(family, plan).plan
    assert_as_planned(checked, result)
    found = weights_of(family, "merged")
    assert list(found) == ["new.weight"]
    math, code = (weights_of(family, name) for name in ("math", "code"))
    expected = (math[Q].astype(np.float32) + code["model.layers.0.self_attn.q_proj.weight"].astype(np.float32)) / 2
    assert bits(found["new.weight"]) == bits(expected.astype(found["new.weight"].dtype))
