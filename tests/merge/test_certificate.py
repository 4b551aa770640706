"""The bound, by its formulas and against the truth: random families, merged under a budget and in full."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mergepipe.merge import Plan, execute
from mergepipe.merge.certificate import Item, distance, estimate, items_of
from mergepipe.merge.methods import METHODS
from mergepipe.merge.plan import Bound
from mergepipe.store import Store
from mergepipe.store.errors import BudgetError, UsageError
from support.facts import Outline, facts_of, question_of
from support.families import MASKED, Family, families
from support.family import Weights
from support.merges import METHODS as PLAIN
from support.merges import (
    assert_as_planned,
    bits,
    blocks_of,
    ingest_family,
    make_plan,
    merge,
    tree_of,
    weights_of,
)
from support.stores import assert_clean

PLACES = {0: [([0], 3.0, 100), ([1, 2], 4.0, 200)], 2: [([1], 5.0, 300)]}


def items_with(method: str, weights: tuple[float, ...], **parameters: float | bool) -> list[Item]:
    found = METHODS[method]
    known = {parameter.name for parameter in found.parameters}
    given = {name: value for name, value in {"exact": False, "rescale": False}.items() if name in known}
    facts = facts_of([Outline("w", PLACES)], question_of(method, weights, **given, **parameters))
    return items_of(7, facts.tensors[0], found)


LAMBDA = {"lambda": -2.0}


@pytest.mark.parametrize(
    ("method", "parameters", "factors"),
    [
        ("linear", {"normalize": False}, (1.0, 0.75, 0.5)),
        ("linear", {"normalize": True}, (1 / 1.75, 0.75 / 1.75, 0.5 / 1.75)),
        ("task_arithmetic", {}, (1.0, 0.75, 0.5)),
        ("task_arithmetic", LAMBDA, (2.0, 1.5, 1.0)),
        ("task_arithmetic", {"normalize": True, "lambda": 3.5}, (2.0, 1.5, 1.0)),
        ("breadcrumbs", LAMBDA, (2.0, 1.5, 1.0)),
        ("dare_linear", LAMBDA, (2.0, 1.5, 1.0)),
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
    assert [item.error for item in found] == pytest.approx(expected, 1e-5)


def test_coefficients_of_a_shared_block_can_cancel() -> None:
    """All but the rest that sums in float32 may leave: 0 is said of nothing that could show."""
    assert [item.error for item in items_with("task_arithmetic", (1.0, -0.5, 0.5))] == [3.0, 4 * 2.0**-22, 2.5]


@pytest.mark.parametrize("method", ["breadcrumbs", "dare_linear"])
def test_masked_deltas_of_a_shared_block_cancel_nothing(method: str) -> None:
    """Each expert's is masked by itself, so what the one loses the other may keep."""
    errors = [item.error for item in items_with(method, (1.0, -0.5, 0.5))]
    assert errors == pytest.approx([3.0, 4.0, 2.5], 1e-5)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "breadcrumbs_ties"])
def test_consensus_takes_places_whole(method: str) -> None:
    """With a mean: lambda times the root of the squares, the shared block's once for each that has it."""
    found = items_with(method, (1.0, 0.5, 0.25), **{"lambda": -2.0, "normalize": True})
    assert [(item.index, item.groups, item.stored_bytes) for item in found] == [(0, (0, 1), 300), (2, (0,), 300)]
    assert [item.error for item in found] == pytest.approx([2 * math.sqrt(9 + 16 + 16), 10.0], 1e-5)


def test_consensus_without_a_mean_adds_up_by_weight() -> None:
    """The root of three times the sum of the squares, for three experts."""
    found = items_with("ties", (1.0, -0.5, 0.25), normalize=False)
    assert [item.error for item in found] == pytest.approx([math.sqrt(3 * (9 + 4 + 1)), math.sqrt(3) * 2.5], 1e-5)


@pytest.mark.parametrize("norm", [0.0, 1.0])
def test_what_has_no_factor_has_no_bound(norm: float) -> None:
    """Not even where the delta is zero: infinity times zero is a NaN, and orders nothing."""
    for method, parameters in (("model_stock", {"filter_wise": True}), ("ties", {"density": 0.5, "rescale": True})):
        question = question_of(method, (1.0, 1.0), **parameters)
        (facts,) = facts_of([Outline("w", {0: [([0], norm, 100)]})], question, bounded=False).tensors
        place = replace(facts.places[0], groups=(replace(facts.places[0].groups[0], norm=norm),))
        (item,) = items_of(0, replace(facts, places=(place,)), METHODS[method])
        assert item.error == math.inf


def test_consensus_has_no_bound_for_a_mean_with_weights_of_both_signs() -> None:
    assert [item.error for item in items_with("ties", (1.0, -0.5, 0.25))] == [math.inf, math.inf]


def test_errors_add_up_at_a_place_and_as_squares_between_places() -> None:
    items = [Item(0, 0, (0,), 1.0, 1), Item(0, 0, (1,), 2.0, 1), Item(0, 1, (0,), 4.0, 1), Item(1, 0, (0,), 12.0, 1)]
    assert distance(items) == 13.0
    assert distance([]) == 0.0


def test_the_estimate_sees_what_adds_up_and_what_cancels() -> None:
    """Lengths 3 and 4: alike 7, opposed 1, at right angles 5, and of unknown direction 5; the bound is 7 for all."""
    along, across = np.eye(64)[0], np.eye(64)[1]
    for other, expected in ((along, 7.0), (-along, 1.0), (across, 5.0), (None, 5.0)):
        part = None if other is None else other * 4
        items = [Item(0, 0, (0,), 3.0, 1, 3.0, along * 3), Item(0, 0, (1,), 4.0, 1, 4.0, part)]
        assert estimate(items) == pytest.approx(expected)
        assert distance(items) == 7.0
    apart = [Item(0, 0, (0,), 3.0, 1, 3.0, along * 3), Item(0, 1, (0,), 4.0, 1, 4.0, -along * 4)]
    assert estimate(apart) == distance(apart) == 5.0


# Truth.


def rounding(family: Family, name: str) -> float:
    """What float32 arithmetic can move of one tensor: a few units in the last place of the largest term."""
    base = np.abs(family.base[name].astype(np.float64))
    scale = max(1.0, abs(float(family.parameters.get("lambda", 1.0))))
    weights = [abs(own.get("weight", 1.0)) for own in family.settings.values()]
    if family.parameters.get("normalize"):
        total = abs(sum(own.get("weight", 1.0) for own in family.settings.values()))
        scale *= max(1.0, 1 / total if METHODS[family.method].error != "whole" and total else 1.0)
    largest = base
    for weight, expert in zip(weights, family.experts.values(), strict=True):
        largest = largest + scale * max(weight, 1.0) * (np.abs(expert[name].astype(np.float64)) + base)
    return float(np.sqrt((largest**2).sum())) * 2.0**-20 * (len(weights) + 2)


def l2(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(((a.astype(np.float64) - b.astype(np.float64)) ** 2).sum()))


def plan_or_reject(store: Store, method: str, settings: dict[str, dict[str, float]], **question: Any) -> Plan:
    """A plan; directions that cancel have no mean, and the method says so."""
    try:
        return make_plan(store, method, settings, **question)
    except UsageError as error:
        if "cancel out" not in error.message:
            raise
        return reject()


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
        plan = plan_or_reject(
            shared_store, family.method, settings, budget=family.budget, max_error=family.max_error, **question
        )
        assert_as_planned(plan, execute(shared_store, plan, f"{folder.name}-some", use_cache=False))
        if "exact" in plan.parameters:
            question["exact"] = plan.parameters["exact"]
        merge(shared_store, family.method, settings, f"{folder.name}-all", **question)
        covered = make_plan(shared_store, family.method, settings, budget="100%", **question)
        assert covered.bound == Bound(0.0, 0.0, 0.0, None)
        execute(shared_store, covered, f"{folder.name}-covered", use_cache=False)
        assert tree_of(shared_store, f"{folder.name}-covered") == tree_of(shared_store, f"{folder.name}-all")
        return plan, weights_of(shared_store, f"{folder.name}-some"), weights_of(shared_store, f"{folder.name}-all")

    return run


@given(family=families())
def test_the_truth_is_within_the_bound(
    merge_both: Callable[[Family], tuple[Plan, Weights, Weights]], family: Family
) -> None:
    """Measured against the merge that reads everything, with the same parameters."""
    plan, some, full = merge_both(family)
    squares = slack = 0.0
    for name in family.base:
        truth = l2(some[name], full[name])
        bound = plan.tensors[name].bound if name in plan.tensors else 0.0
        assert truth <= bound + rounding(family, name), name
        if bound == 0 and all(own.get("weight", 1.0) for own in family.settings.values()):
            # An expert that counts for nothing is not read; its place is then the base's, and not rounded anew.
            assert bits(some[name] + 0.0) == bits(full[name] + 0.0), name
        squares += truth**2
        slack += rounding(family, name)
    assert math.sqrt(squares) <= plan.bound.absolute + slack
    if family.max_error is not None:
        assert plan.bound.relative <= family.max_error * (1 + 1e-9)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, Store]]:
    """Two stores that are told the same."""
    folder = tmp_path_factory.mktemp("twins")
    with (
        Store.create(folder / "first", block_bytes=4096) as first,
        Store.create(folder / "second", block_bytes=4096) as second,
    ):
        yield first, second
        assert_clean(first)
        assert_clean(second)


@given(family=families(), shares=st.lists(st.integers(0, 100), min_size=2, max_size=4))
def test_plans_of_the_same_content_are_the_same_and_more_bytes_never_worse(
    twins: tuple[Store, Store], fresh: Callable[[], Path], family: Family, shares: list[int]
) -> None:
    """Commits carry times: all but them is equal. Masks are of the commits, and so is what is made up for them.

    A block that several places have is stored against whichever base is there first: then its size is chance.
    """
    folder = fresh()
    names = {name: f"{folder}-{name}".replace("/", "-").lstrip("-") for name in ("base", *family.experts)}
    experts = {names[name]: weights for name, weights in family.experts.items()}
    settings = {names[name]: own for name, own in family.settings.items()}
    bounds: list[float] = []
    for number, store in enumerate(twins):
        ingest_family(store, folder / str(number), family.base, experts, base_name=names["base"])
    alike = stored_sizes(twins[0], names.values()) == stored_sizes(twins[1], names.values())
    for share in sorted(shares):
        texts = set()
        for store in twins:
            question: dict[str, Any] = {"base": names["base"], "dtype": family.dtype, **family.parameters}
            plan = plan_or_reject(store, family.method, settings, budget=f"{share}%", **question)
            assert plan.costs.expert_bytes <= (plan.budget_bytes or 0)
            value = plan.as_json()
            for item in (value["base"], *value["experts"]):
                item["commit"] = ""
            texts.add(json.dumps(value))
            if store is twins[0]:
                bounds.append(plan.bound.absolute)
        assert len(texts) == 1 or not alike or (family.method in MASKED and family.parameters["rescale"])
    for smaller, larger in itertools.pairwise(bounds):
        assert larger <= smaller * (1 + 1e-9)


def stored_sizes(store: Store, refs: Iterable[str]) -> dict[bytes, int]:
    found = {}
    with store.catalog.reading() as view:
        for ref in refs:
            for block in itertools.chain.from_iterable(blocks_of(store, ref).values()):
                row = view.object_row(block)
                assert row is not None
                found[bytes(block)] = row.stored_bytes
    return found


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
@pytest.mark.parametrize("method", PLAIN)
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
