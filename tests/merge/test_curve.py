"""A sweep over budgets says what the plans would say, and makes none."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mergepipe.merge.curve as module
from mergepipe.merge import Plan
from mergepipe.merge.curve import EVERYTHING, SHARES, Point, curve, facts_for_sweep, sweep
from mergepipe.merge.explain import counts, reading
from mergepipe.merge.methods import METHODS
from mergepipe.store import Store
from support.facts import Outline, facts_of, question_of
from support.levels import BLOCK_BYTES, LevelFamily, fixed_family, ingest_levels, level_plan
from support.merges import ingest_family, make_plan, without_weights
from support.stores import assert_clean, state_of


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("curve")
    with Store.create(folder / "store", block_bytes=BLOCK_BYTES) as store:
        ingest_levels(store, folder, fixed_family())
        yield store
        assert_clean(store)


def everything(store: Store, family: LevelFamily, **options: Any) -> Plan:
    return level_plan(store, family, max_error=EVERYTHING.relative_error, **options)


@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "ties", "model_stock"])
def test_each_point_is_what_a_plan_says(store: Store, method: str) -> None:
    asked = {"density": 0.3} if method == "ties" else {}
    family = replace(fixed_family(method))
    if method == "model_stock":
        family = replace(family, settings={name: {} for name in family.settings})
    found = sweep(*facts_for_sweep(store, everything(store, family, **asked)))
    assert bool(found.with_previews) == (method != "ties")
    for points, previews in ((found.with_previews, True), (found.exact_only, False)):
        for share, point in zip(SHARES, points, strict=bool(points)):
            plan = level_plan(store, family, f"{share:.1%}", previews=previews, **asked)
            assert point.expert_bytes == plan.costs.expert_bytes
            assert (point.preview_blocks, point.exact_blocks) == counts(plan)
            assert point.preview_bytes == reading(store, plan).preview_bytes
            assert point.absolute == pytest.approx(plan.bound.absolute, rel=1e-12)
            assert found.relative(point.absolute) == pytest.approx(plan.bound.relative, rel=1e-12)
            if share < 1:
                assert point.budget_bytes == plan.budget_bytes
                assert point.estimate == pytest.approx(plan.bound.estimate, rel=1e-12)
    certain = everything(store, family, **asked)
    assert (found.certain.expert_bytes, found.certain.absolute) == (certain.costs.expert_bytes, 0.0)
    assert found.full_bytes == certain.costs.expert_bytes_full
    assert found.update == certain.bound.update
    assert found.raw_bytes == 2 * sum(array.nbytes for array in family.base.values())


def test_more_bytes_are_never_worse_and_previews_better(store: Store) -> None:
    found = sweep(*facts_for_sweep(store, everything(store, fixed_family())))
    for points in (found.with_previews, found.exact_only):
        assert all(larger.absolute <= smaller.absolute for smaller, larger in itertools.pairwise(points))
        assert points[-1].absolute == 0
    assert any(a.absolute < 0.8 * b.absolute for a, b in zip(found.with_previews, found.exact_only, strict=True))
    assert found.best == found.with_previews
    alone = sweep(*facts_for_sweep(store, everything(store, fixed_family())), previews=False)
    assert (alone.with_previews, alone.best) == ((), found.exact_only)


def test_steps_are_put_in_order_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, method = facts_for_sweep(store, everything(store, fixed_family()))
    calls: list[int] = []
    original = module.by_sketch
    monkeypatch.setattr(module, "by_sketch", lambda items: calls.append(1) or original(items))
    sweep(facts, method)
    assert len(calls) == 2, "with previews, and without"
    calls.clear()
    assert len(curve(facts, method, range(0, 100_000, 1000))) == 100
    assert len(calls) == 1


def test_nothing_is_read_or_kept(tmp_path: Path) -> None:
    with Store.create(tmp_path / "store", block_bytes=BLOCK_BYTES) as store:
        ingest_levels(store, tmp_path, fixed_family())
        without_weights(store)
        before = state_of(store)
        sweep(*facts_for_sweep(store, everything(store, fixed_family())))
        assert state_of(store) == before


def test_what_a_sweep_knows_of_a_plan_that_knows_nothing(store: Store) -> None:
    """A plan that reads everything has no norms; those that a sweep needs come from the catalog."""
    facts, method = facts_for_sweep(store, level_plan(store, fixed_family()))
    assert facts.bounded
    assert sweep(facts, method).update > 0


def test_budgets_that_nothing_is_known_of() -> None:
    """A delta that is not finite has to be read: before that there is no bound. And adapters are read whole."""
    places = {0: [([0], math.inf, 100)], 1: [([0], 1.0, 50)]}
    facts = facts_of([Outline("w", places)], question_of("task_arithmetic", (1.0,)))
    method = METHODS["task_arithmetic"]
    points = curve(facts, method, [0, 99, 100, 150])
    assert [(point.expert_bytes, point.absolute) for point in points] == [
        (0, math.inf), (0, math.inf), (100, pytest.approx(1.0)), (150, 0.0),
    ]  # fmt: skip
    found = sweep(facts, method)
    assert found.relative(math.inf) is None
    assert found.as_json()["exact_only"][0]["bound"] is None
    assert found.certain == Point(150, 150, 0.0, 0.0, 0, 0, 2)
    adapted = replace(facts, adapter_bytes=40)
    assert [point.budget_bytes for point in curve(adapted, method, [0, 39, 40, 190])] == [40, 190]
    assert curve(adapted, method, [190])[0].expert_bytes == 190


def test_a_model_in_which_nothing_differs(tmp_path: Path) -> None:
    with Store.create(tmp_path / "store", block_bytes=4096) as store:
        base = {"w": np.ones(2000, np.float32)}
        ingest_family(store, tmp_path, base, {"same": dict(base)})
        found = sweep(*facts_for_sweep(store, make_plan(store, "linear", {"same": 1.0})))
        assert (found.full_bytes, found.update) == (0, 0.0)
        assert found.relative(0.0) == 0.0
        assert {point.expert_bytes for point in found.best} == {0}
        assert found.as_json()["exact_only"][0]["share"] == 0.0
