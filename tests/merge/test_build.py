"""From what a user asks for to a plan, and what is said where it cannot be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergepipe.merge import Expert, parse_expert, plan_merge
from mergepipe.merge.build import parse_value
from mergepipe.store import Store
from mergepipe.store.errors import BadInputError, DamagedError, MergePipeError, NotFoundError, UsageError
from support.checkpoints import raw, write_safetensors
from support.family import Weights, base_weights, fine_tune
from support.merges import METHODS, ingest_family, ingest_model, make_plan, merge, without_weights
from support.stores import catalog_rows, state_of

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("text", "expert"),
    [
        ("math", Expert("math", {})),
        ("math:0.6", Expert("math", {"weight": 0.6})),
        ("experts/math~1:-2", Expert("experts/math~1", {"weight": -2.0})),
        ("math:0.6,density=0.2", Expert("math", {"weight": 0.6, "density": 0.2})),
        ("math,weight=0.6, density = 1e-1", Expert("math", {"weight": 0.6, "density": 0.1})),
        ("math,normalize=true", Expert("math", {"normalize": True})),
        ("tv:0.5,as=task_vector", Expert("tv", {"weight": 0.5}, "task_vector")),
        ("lora,as=adapter,onto=experts/chat,weight=2", Expert("lora", {"weight": 2.0}, "adapter", "experts/chat")),
    ],
)
def test_an_expert_as_text(text: str, expert: Expert) -> None:
    assert parse_expert(text) == expert


@pytest.mark.parametrize(
    "text",
    ["", ":0.5", "math:", "math:x", "math:0.5:0.5", "math,density", "math,density=", "math,density=a", ",density=1",
     "math:0.5,weight=0.6", "math,density=0.1,density=0.2", "math,", "math,as=lora"],
)  # fmt: skip
def test_what_is_no_expert(text: str) -> None:
    with pytest.raises(UsageError):
        parse_expert(text)


@pytest.mark.parametrize(("text", "value"), [("true", True), (" False ", False), ("1", 1.0), ("-1e-3", -1e-3)])
def test_a_value_as_text(text: str, value: float | bool) -> None:
    found = parse_value(text, "here")
    assert found == value
    assert type(found) is type(value)


def test_parameters_are_shared_by_experts_that_have_none_of_their_own(shared_family: Store) -> None:
    plan = make_plan(
        shared_family, "ties", {"math": {"weight": 0.6}, "code": {"density": 0.5}}, density=0.25, weight=2.0
    )
    assert plan.experts[0].parameters == {"weight": 0.6, "density": 0.25}
    assert plan.experts[1].parameters == {"weight": 2.0, "density": 0.5}
    assert plan.parameters == {"lambda": 1.0, "normalize": True, "rescale": False, "exact": True}


@pytest.mark.parametrize(("name", "dtype"), [("bf16", "BF16"), ("float32", "F32"), ("F16", "F16"), (None, None)])
def test_types_by_their_usual_names(shared_family: Store, name: str | None, dtype: str | None) -> None:
    assert make_plan(shared_family, "linear", {"math": 1.0}, dtype=name).dtype == dtype


def test_names_are_pinned_to_commits(family: Store, tmp_path: Path) -> None:
    plan = make_plan(family, "linear", {"math": 1.0})
    ingest_model(family, tmp_path / "moved", "math", fine_tune(base_weights(), 5), base="base")
    assert plan.experts[0].commit == family.resolve("math~1")
    assert make_plan(family, "linear", {"math": 1.0}).experts[0].commit == family.resolve("math")
    again = make_plan(family, "linear", {"math~1": 1.0})
    assert again.experts[0].commit == plan.experts[0].commit
    assert again.tensors == plan.tensors


ONE: Mapping[str, Any] = {"math": 1.0}


@pytest.mark.parametrize(
    ("experts", "options", "kind", "match", "hint"),
    [
        ({}, {}, UsageError, "at least one expert", "--expert"),
        ({"math": math.nan}, {}, UsageError, "expert 'math': weight is nan", None),
        ({"math": math.inf}, {}, UsageError, "expert 'math': weight is inf", None),
        ({"math": 1e39}, {}, UsageError, "expert 'math': weight", None),
        ({"math": {"density": 0.0}}, {}, UsageError, r"expert 'math': density is 0.0, and must be .*\(0, 1\]", None),
        (ONE, {"base": None}, UsageError, "ties needs a base model", "--base"),
        (
            ONE,
            {"method": "model_stock"},
            UsageError,
            "model_stock takes at least 2 experts beside the base, not 1",
            None,
        ),
        (
            {"math": {}, "code": {}},
            {"method": "slerp"},
            UsageError,
            "slerp takes 1 expert beside the base, not 2",
            None,
        ),
        (ONE, {"method": "slerp", "t": math.nan}, UsageError, "t is nan", None),
        ({"math": {"density": 1.5}}, {}, UsageError, "expert 'math': density is 1.5", None),
        (ONE, {"density": -1.0}, UsageError, "density", None),
        (ONE, {"lambda": math.nan}, UsageError, "lambda is nan", None),
        (ONE, {"normalize": 0.5}, UsageError, "normalize must be true or false", None),
        (ONE, {"method": "teis"}, UsageError, "no method 'teis'", "'ties'"),
        (ONE, {"densty": 0.5}, UsageError, "no parameter 'densty'", "'density'"),
        ({"math": {"wieght": 0.5}}, {}, UsageError, "no parameter 'wieght'", "'weight'"),
        ({"math": {"lambda": 0.5}}, {}, UsageError, "lambda is one for the whole merge", "--param"),
        ({"mat": 1.0}, {}, NotFoundError, "no ref or commit 'mat'", "'math'"),
        (ONE, {"base": "bass"}, NotFoundError, "no ref or commit 'bass'", "'base'"),
        (ONE, {"dtype": "int8"}, UsageError, "'int8' is not a type to convert to", None),
        ({"math": 1.0, "code": -1.0}, {"method": "linear"}, UsageError, "sum to zero", "normalize=false"),
    ],
)
def test_a_question_that_cannot_be_answered_says_why(
    shared_family: Store, experts: Any, options: Any, kind: type[MergePipeError], match: str, hint: str | None
) -> None:
    before = state_of(shared_family)
    with pytest.raises(kind, match=match) as caught:
        make_plan(shared_family, **{"method": "ties", "experts": experts, **options})
    assert type(caught.value) is kind
    assert hint is None or hint in str(caught.value.hint)
    assert state_of(shared_family) == before


def changed(weights: Weights, **tensors: Any) -> Weights:
    return {
        name: tensors.get(name, weight) for name, weight in weights.items() if tensors.get(name, weight) is not None
    }


BASE = base_weights()
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("expert", "match"),
    [
        (changed(BASE, **{UP: None}), f"{UP} is missing"),
        (changed(BASE, **{UP: BASE[UP].reshape(64, 128)}), rf"{UP} is \[64, 128\], in the base \[128, 64\]"),
        (changed(BASE, **{NORM: BASE[NORM][:32]}), rf"{NORM} is \[32\], in the base \[64\]"),
        (changed(BASE, **{NORM: np.ones(64, np.int16)}), f"{NORM} is I16, in the base BF16"),
        (changed(BASE, **{UP: BASE[UP].astype(np.float32)}), f"{UP} is cut into other blocks.*--base"),
        ({"w": np.ones(4, np.float32)}, r"is missing; .* is missing; .* is missing \(and 9 more\)"),
    ],
    ids=["lacks a tensor", "another shape", "shorter", "integers", "other blocks", "another model"],
)
@pytest.mark.parametrize("method", METHODS)
def test_an_expert_that_does_not_fit_is_named_with_its_tensors(
    shared_family: Store, tmp_path: Path, method: str, expert: Weights, match: str
) -> None:
    ingest_model(shared_family, tmp_path, "odd", expert)
    before = state_of(shared_family)
    with pytest.raises(BadInputError, match=f"expert 'odd' does not fit the base: .*{match}"):
        make_plan(shared_family, method, {"math": 1.0, "odd": 1.0})
    assert state_of(shared_family) == before


def test_a_base_with_other_tensors_is_no_base(family: Store, tmp_path: Path) -> None:
    ingest_model(family, tmp_path, "bigger", {**BASE, "extra.weight": np.ones((4, 4), np.float32)})
    with pytest.raises(BadInputError, match=r"extra\.weight is missing"):
        make_plan(family, "linear", {"math": 1.0}, base="bigger")


def test_an_adapter_is_no_expert_as_a_model(family: Store, tmp_path: Path) -> None:
    """A LoRA's factors have names of their own: the error names the model's tensors that are not there."""
    factors = {
        f"base_model.model.model.layers.1.mlp.up_proj.lora_{side}.weight": raw(np.ones(shape, np.float32))
        for side, shape in (("A", (4, 64)), ("B", (128, 4)))
    }
    write_safetensors(tmp_path / "lora" / "adapter_model.safetensors", factors)
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    family.ingest([tmp_path / "lora"], base="base")
    with pytest.raises(
        BadInputError, match=r"expert 'lora' does not fit the base: .*model\.embed_tokens\.weight is missing"
    ):
        plan_merge(family, "base", [Expert("lora", kind="model")], "linear")
    assert plan_merge(family, "base", [Expert("lora")], "linear").experts[0].kind == "adapter", "known by its files"
    with pytest.raises(UsageError, match="'math' is no adapter, and cannot go onto 'code'"):
        plan_merge(family, "base", [Expert("math", onto="code")], "linear")


def test_without_a_base_experts_are_compared_with_the_one_that_they_came_from(family: Store, tmp_path: Path) -> None:
    plan = make_plan(family, "linear", {"math": 0.5, "code": 0.5}, base=None)
    named = make_plan(family, "linear", {"math": 0.5, "code": 0.5})
    assert plan == named
    assert not plan.based
    assert plan.base.commit == family.resolve("base")
    both = make_plan(family, "nuslerp", {"math": 0.5, "code": 0.5})
    assert both.based
    assert not make_plan(family, "nuslerp", {"math": 0.5, "code": 0.5}, base=None).based
    ingest_model(family, tmp_path, "alone", fine_tune(BASE, 5))
    odd = make_plan(family, "linear", {"math": 0.5, "alone": 0.5}, base=None)
    assert odd.base.commit == family.resolve("math"), "they have no base in common: the first is as good as any"
    first = merge(family, "linear", {"math": 0.5, "alone": 0.5}, base=None)
    second = merge(family, "linear", {"math": 0.5, "alone": 0.5})
    assert family.commit(first.commit).tree == family.commit(second.commit).tree, "what it is compared with is no input"


@pytest.mark.parametrize("method", METHODS)
def test_missing_statistics_are_made_once(hurt_store: Store, tmp_path: Path, method: str) -> None:
    """A model that was ingested by itself is read at the first plan; later ones need no weights."""
    ingest_family(hurt_store, tmp_path, BASE, {"math": fine_tune(BASE, 1)}, against_base=False)
    assert not catalog_rows(hurt_store, "deltas", "tensors")["deltas"]
    first = make_plan(hurt_store, method, {"math": 0.5}, budget="50%")
    known = catalog_rows(hurt_store, "deltas", "tensors")
    assert known["deltas"]
    assert known["tensors"]
    without_weights(hurt_store)
    for again in METHODS:
        make_plan(hurt_store, again, {"math": 0.5})
        make_plan(hurt_store, again, {"math": 0.5}, budget="20%")
    assert make_plan(hurt_store, method, {"math": 0.5}, budget="50%").encode() == first.encode()
    assert catalog_rows(hurt_store, "deltas", "tensors") == known


def test_statistics_that_cannot_be_made_are_not_made_up(hurt_store: Store, tmp_path: Path) -> None:
    ingest_family(hurt_store, tmp_path, BASE, {"math": fine_tune(BASE, 1)}, against_base=False)
    without_weights(hurt_store)
    with pytest.raises(DamagedError):
        make_plan(hurt_store, "linear", {"math": 0.5}, budget="50%")
    with pytest.raises(DamagedError):
        make_plan(hurt_store, "ties", {"math": 0.5})
    assert not catalog_rows(hurt_store, "deltas")["deltas"]


@pytest.mark.parametrize("method", METHODS)
def test_statistics_made_later_are_those_of_ingest(
    make_store: Callable[..., Store], tmp_path: Path, method: str
) -> None:
    """Models ingested against their base, and by themselves: the same thresholds, counts and bounds."""
    plans = []
    for against_base in (True, False):
        store = make_store()
        experts = {"math": fine_tune(BASE, 7), "code": fine_tune(BASE, 8, scale=1e-2)}
        ingest_family(store, tmp_path / str(against_base), BASE, experts, against_base=against_base)
        plans.append(make_plan(store, method, {"math": 0.5, "code": 0.25}, budget="0"))
    assert plans[0].tensors == plans[1].tensors
    assert plans[0].bound == plans[1].bound
    assert plans[0].costs.expert_bytes_full < plans[1].costs.expert_bytes_full
