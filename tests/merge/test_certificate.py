"""The bound, by its formulas and against the truth: random families, merged under a budget and in full."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file

from mergepipe.merge import Plan, execute
from mergepipe.merge.certificate import Item, distance, items_of
from mergepipe.merge.methods import find_method
from mergepipe.merge.planner import coefficients_of
from mergepipe.store import Store
from mergepipe.store.errors import BudgetError
from support.facts import input_named, tensor_facts
from support.family import Weights
from support.merges import METHODS, NUMPY, bits, ingest_family, make_plan, merge, weights_of

PLACES = {0: [([0], 3.0, 100), ([1, 2], 4.0, 200)], 2: [([1], 5.0, 300)]}


def items_with(method: str, weights: tuple[float, ...], **parameters: float | bool) -> list[Item]:
    found = find_method(method)
    facts = tensor_facts("w", PLACES, experts=3)
    experts = [input_named(str(number), weight=weight) for number, weight in enumerate(weights)]
    settled = found.settle(parameters, "test", per_expert=False)
    return items_of(7, facts, found, coefficients_of(found, experts, settled, [0, 0, 0]))


@pytest.mark.parametrize(
    ("method", "parameters", "factors"),
    [
        ("linear", {"normalize": False}, (1.0, 0.75, 0.5)),
        ("linear", {"normalize": True}, (1 / 1.75, 0.75 / 1.75, 0.5 / 1.75)),
        ("task_arithmetic", {}, (1.0, 0.75, 0.5)),
        ("task_arithmetic", {"lambda": -2.0}, (2.0, 1.5, 1.0)),
        ("task_arithmetic", {"normalize": True, "lambda": 3.5}, (2.0, 1.5, 1.0)),
    ],
)
def test_additive_groups_count_by_the_sum_of_their_coefficients(
    method: str, parameters: dict[str, float | bool], factors: tuple[float, ...]
) -> None:
    """Weights 1, 0.5 and 0.25: the first alone, the two that share a block, and the second alone."""
    found = items_with(method, (1.0, 0.5, 0.25), **parameters)
    assert [(item.tensor, item.index, item.groups, item.stored_bytes) for item in found] == [
        (7, 0, (0,), 100), (7, 0, (1,), 200), (7, 2, (0,), 300)
    ]  # fmt: skip
    expected = [factor * norm for factor, norm in zip(factors, (3.0, 4.0, 5.0), strict=True)]
    assert [item.error for item in found] == pytest.approx(expected)


def test_coefficients_of_a_shared_block_can_cancel() -> None:
    """All but the rest that sums in float32 may leave: 0 is said of nothing that could show."""
    assert [item.error for item in items_with("task_arithmetic", (1.0, -0.5, 0.5))] == [3.0, 4 * 2.0**-22, 2.5]


def test_consensus_takes_places_whole() -> None:
    """With a mean: lambda times the root of the squares, the shared block's once for each that has it."""
    found = items_with("ties", (1.0, 0.5, 0.25), **{"lambda": -2.0})
    assert [(item.index, item.groups, item.stored_bytes) for item in found] == [(0, (0, 1), 300), (2, (0,), 300)]
    assert [item.error for item in found] == pytest.approx([2 * math.sqrt(9 + 16 + 16), 10.0])


def test_consensus_without_a_mean_adds_up_by_weight() -> None:
    found = items_with("ties", (1.0, -0.5, 0.25), normalize=False)
    assert [item.error for item in found] == pytest.approx([3 + 0.5 * 4 + 0.25 * 4, 0.5 * 5])


def test_consensus_has_no_bound_for_a_mean_with_weights_of_both_signs() -> None:
    assert [item.error for item in items_with("ties", (1.0, -0.5, 0.25))] == [math.inf, math.inf]


def test_errors_add_up_at_a_place_and_as_squares_between_places() -> None:
    items = [Item(0, 0, (0,), 1.0, 1), Item(0, 0, (1,), 2.0, 1), Item(0, 1, (0,), 4.0, 1), Item(1, 0, (0,), 12.0, 1)]
    assert distance(items) == 13.0
    assert distance([]) == 0.0


# Truth.

SHAPES = ((), (0,), (7,), (40, 30), (64, 64), (2100,), (3, 20, 40))
WEIGHTS = st.sampled_from([1.0, 0.5, 0.3, 2.0, 0.0, 0.01, 1.7])


@dataclass(frozen=True)
class Family:
    """Models, and the question that is asked of them."""

    base: Weights
    experts: dict[str, Weights]
    method: str
    settings: dict[str, dict[str, float]]
    parameters: dict[str, float | bool]
    budget: str | None
    max_error: float | None
    dtype: str | None


def _delta(draw: st.DrawFn, generator: np.random.Generator, size: int, others: list[NDArray[np.float32]]) -> np.ndarray:
    """One expert's difference at one tensor: none, one that another has, dense, sparse, in one place, tiny or huge."""
    kind = draw(st.sampled_from(["none", "shared", "opposite", "dense", "dense", "sparse", "local", "tiny", "huge"]))
    if kind == "none" or (kind in ("shared", "opposite") and not others):
        return np.zeros(size, np.float32)
    if kind in ("shared", "opposite"):
        other = others[draw(st.integers(0, len(others) - 1))]
        return other if kind == "shared" else -other
    scale = {"tiny": 1e-30, "huge": 1e3}.get(kind, 10.0 ** -draw(st.integers(0, 5)))
    delta = (generator.standard_normal(size) * scale).astype(np.float32)
    if kind == "sparse":
        delta[generator.random(size) < 0.97] = 0
    if kind == "local":
        delta[size // 2 :] = 0
    return delta


@st.composite
def families(draw: st.DrawFn) -> Family:
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 4))
    types = draw(st.sampled_from([("F32", None), ("F32", None), ("BF16", "F32"), ("F16", "F32")]))
    base: Weights = {}
    experts: dict[str, Weights] = {f"expert{number}": {} for number in range(count)}
    for number, shape in enumerate(draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))):
        name, size = f"layers.{number}.weight", math.prod(shape)
        plain = (generator.standard_normal(size) * draw(st.sampled_from([0.0, 0.02, 1.0]))).astype(NUMPY[types[0]])
        base[name] = plain.reshape(shape)
        deltas: list[NDArray[np.float32]] = []
        for weights in experts.values():
            deltas.append(_delta(draw, generator, size, deltas))
            weights[name] = (plain.astype(np.float32) + deltas[-1]).astype(plain.dtype).reshape(shape)
    method = draw(st.sampled_from(METHODS))
    normalize = draw(st.booleans())
    signs = st.sampled_from([1.0, 1.0, -1.0]) if not normalize or method != "ties" else st.just(1.0)
    settings = {name: {"weight": draw(WEIGHTS) * draw(signs)} for name in experts}
    if normalize and method != "ties" and abs(sum(own["weight"] for own in settings.values())) < 0.1:
        settings["expert0"]["weight"] += 1.0 if sum(own["weight"] for own in settings.values()) > -0.5 else -1.0
    if method == "ties":
        for own in settings.values():
            own["density"] = draw(st.sampled_from([0.01, 0.2, 0.7, 1.0]))
    parameters: dict[str, float | bool] = {"normalize": normalize}
    if method != "linear":
        parameters["lambda"] = draw(st.sampled_from([1.0, 0.5, -1.5]))
    share = draw(st.one_of(st.none(), st.integers(0, 99)))
    return Family(
        base, experts, method, settings, parameters,
        budget=None if share is None else f"{share}%",
        max_error=draw(st.sampled_from([0.0, 0.1, 0.5, 0.9])) if share is None else None,
        dtype=types[1],
    )  # fmt: skip


def rounding(family: Family, name: str) -> float:
    """What float32 arithmetic can move of one tensor: a few units in the last place of the largest term."""
    total = np.abs(family.base[name].astype(np.float64))
    weights = [own["weight"] for own in family.settings.values()]
    divisor = abs(sum(weights)) if family.parameters["normalize"] and family.method != "ties" else 1.0
    scale = abs(float(family.parameters.get("lambda", 1.0))) / divisor
    for weight, expert in zip(weights, family.experts.values(), strict=True):
        total = total + scale * abs(weight) * (np.abs(expert[name].astype(np.float64)) + np.abs(family.base[name]))
        if family.method == "ties" and family.parameters["normalize"]:
            total = total + scale * np.abs(expert[name].astype(np.float64))
    return float(np.sqrt((total**2).sum())) * 2.0**-22 * (len(weights) + 2)


def l2(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(((a.astype(np.float64) - b.astype(np.float64)) ** 2).sum()))


@pytest.fixture
def merge_both(shared_store: Store, fresh: Callable[[], Path]) -> Callable[[Family], tuple[Plan, Weights, Weights]]:
    """Ingests a family under names of its own, and merges it under its budget and in full."""

    def run(family: Family) -> tuple[Plan, Weights, Weights]:
        folder = fresh()
        names = {name: f"{folder.name}-{name}" for name in family.experts}
        experts = {names[name]: weights for name, weights in family.experts.items()}
        ingest_family(shared_store, folder, family.base, experts, base_name=f"{folder.name}-base")
        settings = {names[name]: own for name, own in family.settings.items()}
        question: dict[str, Any] = {"base": f"{folder.name}-base", "dtype": family.dtype, **family.parameters}
        plan = make_plan(
            shared_store, family.method, settings, budget=family.budget, max_error=family.max_error, **question
        )
        result = execute(shared_store, plan, f"{folder.name}-some", use_cache=False)
        assert result.expert_bytes_read == plan.costs.expert_bytes
        assert result.base_bytes_read == plan.costs.base_bytes
        merge(shared_store, family.method, settings, f"{folder.name}-all", **question)
        return plan, weights_of(shared_store, f"{folder.name}-some"), weights_of(shared_store, f"{folder.name}-all")

    return run


@given(family=families())
def test_the_truth_is_within_the_bound(
    merge_both: Callable[[Family], tuple[Plan, Weights, Weights]], family: Family
) -> None:
    plan, some, full = merge_both(family)
    squares = slack = 0.0
    for name in family.base:
        truth = l2(some[name], full[name])
        bound = plan.tensors[name].bound if name in plan.tensors else 0.0
        assert truth <= bound + rounding(family, name), name
        if bound == 0:
            assert bits(some[name] + 0.0) == bits(full[name] + 0.0), name
        squares += truth**2
        slack += rounding(family, name)
    assert math.sqrt(squares) <= plan.bound.absolute + slack
    if family.max_error is not None:
        assert plan.bound.relative <= family.max_error * (1 + 1e-9)


def test_exports_are_what_the_bound_speaks_of(shared_store: Store, tmp_path: Path) -> None:
    """The same, through files as others read them."""
    generator = np.random.default_rng(0)
    base: Weights = {f"layers.{n}.weight": generator.standard_normal((64, 64)).astype(np.float32) for n in range(3)}
    experts: dict[str, Weights] = {
        f"expert{k}": {
            name: (w + generator.standard_normal(w.shape) * 10.0**-k).astype(np.float32) for name, w in base.items()
        }
        for k in range(3)
    }
    ingest_family(shared_store, tmp_path, base, experts)
    settings = {"expert0": 0.5, "expert1": -0.25, "expert2": 1.0}
    merge(shared_store, "task_arithmetic", settings, "all")
    shared_store.snapshot("all").export(tmp_path / "all")
    full = load_file(tmp_path / "all" / "model.safetensors")
    for budget in ("0%", "20%", "50%", "80%"):
        plan = make_plan(shared_store, "task_arithmetic", settings, budget=budget)
        execute(shared_store, plan, "some")
        shared_store.snapshot("some").export(tmp_path / "some", force=True)
        some = load_file(tmp_path / "some" / "model.safetensors")
        truth = math.sqrt(sum(l2(some[name], full[name]) ** 2 for name in full))
        assert 0 < truth <= plan.bound.absolute * (1 + 1e-6)
        for name, tensor in plan.tensors.items():
            assert l2(some[name], full[name]) <= tensor.bound * (1 + 1e-6) + 1e-5, name


def test_the_bound_of_one_expert_is_the_distance_itself(shared_store: Store, tmp_path: Path) -> None:
    """It is no vaguer than it must be: one delta left out is off by its norm, to a few parts in a million."""
    base = {"w": np.zeros((64, 64), np.float32)}
    tuned = {"w": np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)}
    ingest_family(shared_store, tmp_path, base, {"tuned": tuned})
    plan = make_plan(shared_store, "task_arithmetic", {"tuned": 0.5}, budget="50%")
    execute(shared_store, plan, "some")
    merge(shared_store, "task_arithmetic", {"tuned": 0.5}, "all")
    truth = l2(weights_of(shared_store, "some")["w"], weights_of(shared_store, "all")["w"])
    assert truth <= plan.bound.absolute <= truth * (1 + 1e-5)


def test_deltas_whose_squares_vanish_are_bounded_still(shared_store: Store, tmp_path: Path) -> None:
    base = {"w": np.zeros(3000, np.float32)}
    ingest_family(shared_store, tmp_path, base, {"tuned": {"w": np.full(3000, 1e-30, np.float32)}})
    plan = make_plan(shared_store, "task_arithmetic", {"tuned": 1.0}, budget="0%")
    assert plan.bound.absolute >= math.sqrt(3000) * 1e-30
    assert plan.bound.absolute < 1e-15


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("method", METHODS)
def test_without_a_bound_a_tensor_is_read_or_named(
    shared_store: Store, tmp_path: Path, method: str, odd: float
) -> None:
    """1e30 is finite, but its square is no float32."""
    base: Weights = {"fine": np.zeros(3000, np.float32), "odd": np.zeros(3000, np.float32)}
    tuned = {name: weights + np.float32(1e-3) for name, weights in base.items()}
    tuned["odd"][17] = odd
    ingest_family(shared_store, tmp_path, base, {"tuned": tuned})
    with pytest.raises(BudgetError, match="no bound exists while 'odd' is not read whole"):
        make_plan(shared_store, method, {"tuned": 1.0}, budget="10%")
    some = make_plan(shared_store, method, {"tuned": 1.0}, budget="99%")
    assert 0 in some.tensors["odd"].reads[0]
    merge(shared_store, method, {"tuned": 1.0}, "all")
    execute(shared_store, some, "some")
    full, found = weights_of(shared_store, "all"), weights_of(shared_store, "some")
    assert np.isinf(full["odd"][17]) == np.isinf(odd) or method == "ties"
    assert bits(found["odd"][:1024]) == bits(full["odd"][:1024])
    assert (
        l2(found["fine"], full["fine"]) ** 2 + l2(found["odd"][1024:], full["odd"][1024:]) ** 2
        <= (some.bound.absolute * (1 + 1e-6)) ** 2
    )
