"""Previews in plans: what they promise holds, they cost what they say, and the choice is as good as it claims."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.merge import Plan, decode_plan, execute
from mergepipe.merge.audit import audit
from mergepipe.merge.build import facts_of, jobs_of_plan
from mergepipe.merge.certificate import Item, distance, left_out
from mergepipe.merge.facts import Facts
from mergepipe.merge.levels import previews_of
from mergepipe.merge.methods import METHODS
from mergepipe.merge.selection import Step, by_norm, by_sketch, select_within_bytes, within_bytes
from mergepipe.merge.validate import check_plan
from mergepipe.store import Store
from mergepipe.store.errors import BadInputError, BudgetError, ConflictError, DamagedError
from mergepipe.store.previews import WORTH_IT
from support.levels import (
    BLOCK_BYTES,
    TAKING,
    Choice,
    LevelFamily,
    best_fractional,
    best_of_all,
    choices,
    crowded_items,
    fixed_family,
    ingest_levels,
    items_with,
    level_families,
    level_plan,
    preview_delta,
)
from support.merges import assert_as_planned, bits, tree_of, weights_of
from support.stores import assert_clean, object_path, state_of

Sequence_ = Callable[[Sequence[Item]], list[Step]]
both = pytest.mark.parametrize("by", [by_norm, by_sketch])
pairs = st.lists(st.integers(0, 100), min_size=2, max_size=4)


# The choice, against every other choice that there is.


def cost_of(items: Sequence[Item], read: Iterable[int]) -> int:
    return sum(items[number].stored_bytes for number in read)


def bound_of(items: Sequence[Item], read: Iterable[int]) -> float:
    return distance(left_out(items, set(read)))


def squared(chosen: list[Choice], read: list[int]) -> float:
    """What is left by the certificate."""
    items = items_with(chosen)
    return math.fsum(item.error**2 for item in left_out(items, set(read)))


@both
@given(chosen=choices(), share=st.floats(0, 1))
def test_half_as_good_as_the_best_of_all_choices(by: Sequence_, chosen: list[Choice], share: float) -> None:
    """Of what could be gained at most: of all choices where no block takes more than the budget, and of those that read
    no preview that is worth less for each byte than its block otherwise. And but for one step it is as good as where
    options may be mixed."""
    budget = int(share * sum(each.stored_bytes for each in chosen))
    items = items_with(chosen)
    read = within_bytes(items, by(items), budget)
    assert cost_of(items, read) <= budget
    nothing = sum(each.norm**2 for each in chosen)
    left, best = squared(chosen, read), best_of_all(chosen, budget)
    worthwhile = best_of_all(chosen, budget, worthwhile=True)
    assert left >= worthwhile - 1e-9 * nothing
    assert worthwhile >= best
    assert nothing - left >= (nothing - worthwhile) / 2 - 1e-9 * nothing
    if budget >= max(each.stored_bytes for each in chosen):
        assert nothing - left >= (nothing - best) / 2 - 1e-9 * nothing
    mixed, step = best_fractional(chosen, budget)
    assert mixed <= best + 1e-9 * nothing
    assert left <= mixed + step + 1e-9 * nothing


@both
@given(chosen=choices())
def test_more_bytes_are_never_worse(by: Sequence_, chosen: list[Choice]) -> None:
    for previews in (True, False):
        items = items_with(chosen, previews=previews)
        steps = by(items)
        total = sum(each.stored_bytes for each in chosen)
        bounds = [bound_of(items, within_bytes(items, steps, budget)) for budget in range(total + 1)]
        assert all(larger <= smaller * (1 + 1e-12) for smaller, larger in itertools.pairwise(bounds))
        assert bounds[-1] == 0


@both
@given(items=crowded_items())
def test_more_bytes_are_never_worse_where_experts_meet(by: Sequence_, items: list[Item]) -> None:
    """And a block is never read on top of a preview that is not."""
    steps = by(items)
    bounds = []
    for budget in range(cost_of(items, range(len(items))) + 1):
        read = set(within_bytes(items, steps, budget))
        assert cost_of(items, read) <= budget
        assert all(number - 1 in read for number in read if items[number].after)
        bounds.append(bound_of(items, read))
    assert all(larger <= smaller * (1 + 1e-12) for smaller, larger in itertools.pairwise(bounds))
    assert bounds[-1] == 0


@given(chosen=choices(), share=st.floats(0, 1))
def test_what_is_off_the_hull_is_never_read_by_itself(chosen: list[Choice], share: float) -> None:
    """A preview that is worth less for each byte than the whole block."""
    items = items_with(chosen)
    read = set(select_within_bytes(items, int(share * sum(each.stored_bytes for each in chosen))))
    for number, item in enumerate(items):
        if not item.preview:
            continue
        each = chosen[item.index]
        assert each.preview is not None
        drop = each.norm**2 - each.preview[1] ** 2
        assert drop / each.preview[0] > each.norm**2 / each.stored_bytes * (1 - 1e-9)
        assert number in read or number + 1 not in read, "nothing is added to what is not there"
    worth = sum(item.preview for item in items)
    assert len(items) == len(chosen) + worth
    for each, own in zip(chosen, _by_place(chosen), strict=True):
        assert cost_of(own, range(len(own))) == each.stored_bytes


def _by_place(chosen: list[Choice]) -> list[list[Item]]:
    found: list[list[Item]] = [[] for _ in chosen]
    for item in items_with(chosen):
        found[item.index].append(item)
    return found


def test_a_block_that_its_preview_keeps_out_is_read_with_it() -> None:
    """After the other and the preview the rest does not fit; the block alone is worth nearly all."""
    chosen = [Choice(1.0, 5, None), Choice(9.9**0.5, 100, (10, 8.9**0.5))]
    assert squared(chosen, select_within_bytes(items_with(chosen), 100)) == pytest.approx(1.0)


def test_the_room_at_the_edge_is_filled_with_previews() -> None:
    """The rest of the first block is next, and fits no budget here; ten previews do."""
    chosen = [Choice(10.0, 1000, (1, 9.9)), *(Choice(0.4, 100, (2, 0.3)) for _ in range(10))]
    items = items_with(chosen)
    assert sorted(select_within_bytes(items, 21)) == [0, *range(2, 22, 2)]


# Whole merges.


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One store for many families, whose blocks are large enough for previews."""
    with Store.create(tmp_path_factory.mktemp("levels") / "store", block_bytes=BLOCK_BYTES) as store:
        yield store
        assert_clean(store)


@pytest.fixture
def ingested(levels: Store, fresh: Callable[[], Path]) -> Callable[[LevelFamily], str]:
    """Ingests a family under names of its own; returns what they begin with."""

    def run(family: LevelFamily) -> str:
        folder = fresh()
        prefix = f"{folder.parent.name}-{folder.name}-"
        ingest_levels(levels, folder, family, prefix)
        return prefix

    return run


def l2(array: np.ndarray) -> float:
    return float(np.sqrt((array.astype(np.float64) ** 2).sum()))


def rounding(family: LevelFamily, name: str) -> float:
    """What float32 can move of one tensor: a few units in the last place of the largest terms."""
    base = np.abs(family.base[name].astype(np.float64))
    terms = base + sum(2 * (np.abs(expert[name].astype(np.float64)) + base) for expert in family.experts.values())
    return l2(terms) * 2.0**-20 * (len(family.experts) + 2)


def level_facts(store: Store, plan: Plan) -> Facts:
    models, jobs = jobs_of_plan(store, plan)
    return facts_of(store, models, jobs, plan.settings, METHODS[plan.method], bounded=True)


def reference_bound(store: Store, plan: Plan) -> float:
    """The certificate by its formula, from norms and what previews leave out."""
    method = METHODS[plan.method]
    total = 0.0
    for tensor in level_facts(store, plan).tensors:
        planned = plan.tensors.get(tensor.name)
        factors = method.reach(tensor.problem, tensor.coefficients) if tensor.places else []
        for place in tensor.places:
            error = 0.0
            for group in place.groups:
                mine = [float(factors[expert]) for expert in group.experts]
                size = group.norm
                if planned is not None:
                    exact, coarse = planned.levels[group.experts[0]]
                    if place.index in coarse:
                        assert group.preview is not None
                        assert group.preview.stored_bytes < group.stored_bytes
                        size = group.preview.residual
                    size = 0.0 if place.index in exact else size
                signed, both_ways = abs(sum(mine)), sum(map(abs, mine))
                error += size * (max(signed, both_ways * 2.0**-22) if method.error == "linear" else both_ways)
            total += error**2
    return math.sqrt(total)


def merged(store: Store, plan: Plan, ref: str) -> Any:
    assert_as_planned(plan, execute(store, plan, ref, use_cache=False))
    return weights_of(store, ref)


@given(family=level_families(), share=st.integers(1, 99), previews=st.sampled_from([True, True, False]))
def test_the_truth_is_within_the_bound(
    levels: Store, ingested: Callable[[LevelFamily], str], family: LevelFamily, share: int, previews: bool
) -> None:
    prefix = ingested(family)
    plan = level_plan(levels, family, f"{share}%", prefix=prefix, previews=previews)
    assert plan.costs.expert_bytes <= (plan.budget_bytes or 0)
    assert previews or all(tensor.previews is None for tensor in plan.tensors.values())
    assert decode_plan(plan.encode(), "again") == plan
    assert check_plan(levels, plan).plan == plan
    assert plan.bound.absolute == pytest.approx(reference_bound(levels, plan), rel=1e-9, abs=1e-300)
    some = merged(levels, plan, f"{prefix}some")
    full = merged(levels, level_plan(levels, family, prefix=prefix), f"{prefix}full")
    squares = slack = 0.0
    for name in family.base:
        truth = l2(some[name].astype(np.float64) - full[name].astype(np.float64))
        bound = plan.tensors[name].bound if name in plan.tensors else 0.0
        assert truth <= bound * (1 + 1e-6) + rounding(family, name), name
        squares += truth**2
        slack += rounding(family, name)
    assert math.sqrt(squares) <= plan.bound.absolute * (1 + 1e-6) + slack
    found = audit(levels, plan)
    assert found.deviation <= plan.bound.absolute * (1 + 1e-6) + slack


@given(family=level_families(("task_arithmetic",)), share=st.integers(1, 99))
def test_a_merge_is_what_arithmetic_makes_of_its_levels(
    levels: Store, ingested: Callable[[LevelFamily], str], family: LevelFamily, share: int
) -> None:
    """Block by block, from the models as they came and the previews' codes; and what previews say of themselves."""
    prefix = ingested(family)
    plan = level_plan(levels, family, f"{share}%", prefix=prefix)
    some = merged(levels, plan, f"{prefix}some")
    entries = {ref: levels.snapshot(f"{prefix}{ref}").tensors for ref in ("base", *family.experts)}
    for name, base in family.base.items():
        planned = plan.tensors.get(name)
        expected = base.astype(np.float64).reshape(-1)
        own = entries["base"][name]
        for number, (ref, weights) in enumerate(family.experts.items()):
            exact, coarse = planned.levels[number] if planned else (frozenset[int](), frozenset[int]())
            delta = (weights[name].astype(np.float32) - base.astype(np.float32)).reshape(-1)
            for index, (mine, theirs) in enumerate(zip(own.blocks, entries[ref][name].blocks, strict=True)):
                start, size = own.block_span(index)
                here = slice(start * 8 // own.element_type.bits, (start + size) * 8 // own.element_type.bits)
                known = preview_delta(levels, mine, theirs, delta[here].size)
                if known is not None:
                    codes, row = known
                    assert l2(delta[here].astype(np.float64) - codes) <= row.residual
                    assert row.stored_bytes <= WORTH_IT * levels_cost(levels, theirs)
                if index in coarse:
                    assert known is not None
                    expected[here] += family.settings[ref]["weight"] * known[0].astype(np.float64)
                if index in exact:
                    expected[here] += family.settings[ref]["weight"] * delta[here].astype(np.float64)
        assert l2(some[name].astype(np.float64).reshape(-1) - expected) <= rounding(family, name), name


def levels_cost(store: Store, block: Any) -> int:
    with store.catalog.reading() as view:
        row = view.object_row(block)
    assert row is not None
    return row.stored_bytes


@given(family=level_families(), shares=pairs)
def test_a_larger_budget_never_has_a_larger_bound(
    levels: Store, ingested: Callable[[LevelFamily], str], family: LevelFamily, shares: list[int]
) -> None:
    prefix = ingested(family)
    for previews in (True, False):
        plans = [level_plan(levels, family, f"{share}%", prefix=prefix, previews=previews) for share in sorted(shares)]
        for smaller, larger in itertools.pairwise(plans):
            assert larger.bound.absolute <= smaller.bound.absolute * (1 + 1e-9)
    for wanted in (0.0, 0.2, 0.7):
        plan = level_plan(levels, family, prefix=prefix, max_error=wanted)
        assert plan.bound.relative <= wanted * (1 + 1e-9)


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, Store]]:
    folder = tmp_path_factory.mktemp("apart")
    with (
        Store.create(folder / "first", block_bytes=BLOCK_BYTES) as first,
        Store.create(folder / "second", block_bytes=BLOCK_BYTES) as second,
    ):
        yield first, second
        assert_clean(first)
        assert_clean(second)


@given(family=level_families([name for name in TAKING if name != "dare_linear"]), share=st.integers(0, 100))
def test_plans_of_the_same_content_are_the_same(
    apart: tuple[Store, Store], fresh: Callable[[], Path], family: LevelFamily, share: int
) -> None:
    """In stores that were told the same, but for the commits' ids, which carry times."""
    folder = fresh()
    prefix = f"{folder.parent.name}-{folder.name}-"
    texts = []
    for number, store in enumerate(apart):
        ingest_levels(store, folder / str(number), family, prefix)
        value = level_plan(store, family, f"{share}%", prefix=prefix).as_json()
        for item in (value["base"], *value["experts"]):
            item["commit"] = ""
        texts.append(json.dumps(value))
    assert texts[0] == texts[1]


# One family, looked at closely.


@pytest.fixture(scope="module")
def fixed() -> LevelFamily:
    return fixed_family()


@pytest.fixture(scope="module")
def closely(tmp_path_factory: pytest.TempPathFactory, fixed: LevelFamily) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("closely")
    with Store.create(folder / "store", block_bytes=BLOCK_BYTES) as store:
        ingest_levels(store, folder, fixed)
        yield store
        assert_clean(store)


@pytest.fixture
def mixed(closely: Store, fixed: LevelFamily) -> Plan:
    """A plan with all levels."""
    plan = level_plan(closely, fixed, "40%")
    levels = [levels for tensor in plan.tensors.values() for levels in tensor.levels]
    assert any(exact for exact, _ in levels)
    assert any(coarse for _, coarse in levels)
    return plan


def test_everything_is_the_full_merge(closely: Store, fixed: LevelFamily) -> None:
    whole = merged(closely, level_plan(closely, fixed), "whole")
    for budget in ("100%", "100GiB"):
        plan = level_plan(closely, fixed, budget)
        assert all(tensor.previews is None for tensor in plan.tensors.values())
        found = merged(closely, plan, "all")
        assert tree_of(closely, "all") == tree_of(closely, "whole")
        assert all(bits(found[name]) == bits(whole[name]) for name in whole)
    certain = level_plan(closely, fixed, max_error=0.0)
    assert certain.bound.absolute == 0
    merged(closely, certain, "certain")
    assert tree_of(closely, "certain") == tree_of(closely, "whole")


def test_previews_are_worth_more_than_blocks(closely: Store, fixed: LevelFamily) -> None:
    for budget in ("5%", "10%", "20%", "40%"):
        coarse = level_plan(closely, fixed, budget)
        exact = level_plan(closely, fixed, budget, previews=False)
        assert coarse.bound.absolute < 0.9 * exact.bound.absolute
        assert "previews" not in json.dumps(exact.as_json())


def test_exact_blocks_alone_are_chosen_as_without_previews(tmp_path: Path, closely: Store, fixed: LevelFamily) -> None:
    with Store.create(tmp_path / "plain", block_bytes=BLOCK_BYTES) as plain:
        ingest_levels(plain, tmp_path, fixed, previews=False)
        for budget in ("5%", "40%", "100%"):
            one = level_plan(plain, fixed, budget)
            other = level_plan(closely, fixed, budget, previews=False)
            assert (one.tensors, one.costs, one.bound) == (other.tensors, other.costs, other.bound)


def test_again_it_reads_nothing(closely: Store, mixed: Plan) -> None:
    first = execute(closely, mixed, "first", use_cache=False)
    assert_as_planned(mixed, first)
    execute(closely, mixed, "once")
    again = execute(closely, mixed, "again")
    assert (again.expert_bytes_read, again.base_bytes_read, again.computed_blocks) == (0, 0, 0)
    assert again.cached_blocks == mixed.costs.computed_blocks
    assert tree_of(closely, "first") == tree_of(closely, "again")


@pytest.mark.parametrize("budget", ["10%", "40%"])
def test_what_a_preview_made_is_not_taken_for_what_the_block_makes(
    closely: Store, fixed: LevelFamily, budget: str
) -> None:
    """The cache tells results by what they were read from."""
    coarse, whole = level_plan(closely, fixed, budget), level_plan(closely, fixed)
    for first, second in ((coarse, whole), (whole, coarse)):
        expected = execute(closely, second, "expected", use_cache=False)
        execute(closely, first, "one")
        execute(closely, second, "two")
        assert tree_of(closely, "two") == closely.commit(expected.commit).tree


@pytest.mark.parametrize("done", [1, 4])
def test_it_goes_on_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fixed: LevelFamily, done: int
) -> None:
    monkeypatch.setattr("mergepipe.merge.checkpoints.INTERVAL_SECONDS", 0.0)
    with Store.create(tmp_path / "store", block_bytes=BLOCK_BYTES) as store:
        ingest_levels(store, tmp_path, fixed)
        plan = level_plan(store, fixed, "40%")
        seen = 0

        def stop(stage: str, _done: int, _total: int) -> None:
            nonlocal seen
            seen += stage == "merge"
            if seen > done:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            execute(store, plan, "merged", progress=stop)
        result = execute(store, plan, "merged")
        assert result.computed_blocks + result.cached_blocks == plan.costs.computed_blocks
        assert result.expert_bytes_read <= plan.costs.expert_bytes
        execute(store, plan, "fresh", use_cache=False)
        assert tree_of(store, "merged") == tree_of(store, "fresh")
        assert_clean(store)


# Plans that were edited.


def edited(plan: Plan, change: Callable[[dict[str, Any]], None]) -> Plan:
    value = plan.as_json()
    change(value)
    return decode_plan(json.dumps(value).encode(), "edited")


def test_a_plan_comes_back_from_its_file(mixed: Plan, tmp_path: Path) -> None:
    from mergepipe.merge import read_plan

    mixed.write(tmp_path / "p.json")
    assert read_plan(tmp_path / "p.json") == mixed
    assert read_plan(tmp_path / "p.json").id == mixed.id


def some_preview(plan: Plan) -> tuple[str, int, int]:
    return next(
        (name, expert, min(coarse))
        for name, tensor in plan.tensors.items()
        for expert, (_, coarse) in enumerate(tensor.levels)
        if coarse
    )


def test_previews_that_cannot_be(closely: Store, mixed: Plan, fixed: LevelFamily) -> None:
    name, expert, index = some_preview(mixed)
    previews = ["", ""]

    def beyond(value: dict[str, Any]) -> None:
        value["tensors"][name]["previews"] = [*previews[:expert], "99", *previews[expert + 1 :]]

    with pytest.raises(BadInputError, match="preview of block 99"):
        check_plan(closely, edited(mixed, beyond))

    def twice(value: dict[str, Any]) -> None:
        value["tensors"][name]["reads"][expert] = str(index)
        value["tensors"][name]["previews"][expert] = str(index)

    with pytest.raises(BadInputError, match="a block and its preview"):
        edited(mixed, twice)

    for wrong in ([], ["", ""], ["0"], ["0", "0", "0"], ["x", ""], "0", None, {}, [0, 0]):

        def odd(value: dict[str, Any], wrong: Any = wrong) -> None:
            value["tensors"][name]["previews"] = wrong

        with pytest.raises(BadInputError):
            edited(mixed, odd)

    def without(value: dict[str, Any]) -> None:
        del value["tensors"][name]["previews"]

    with pytest.raises(BadInputError):
        check_plan(closely, edited(mixed, without))

    def more(value: dict[str, Any]) -> None:
        value["budget_bytes"] = mixed.costs.expert_bytes - 1

    with pytest.raises(BudgetError):
        check_plan(closely, edited(mixed, more))
    everything = level_plan(closely, fixed)
    with pytest.raises(BadInputError, match="reads everything, and does not"):
        check_plan(closely, replace(everything, tensors=mixed.tensors))


def test_previews_for_a_method_that_takes_none(closely: Store, fixed: LevelFamily, mixed: Plan) -> None:
    ties = level_plan(closely, replace(fixed, method="ties"), "40%", density=0.3)
    assert all(tensor.previews is None for tensor in ties.tensors.values())
    name, _, index = some_preview(mixed)

    def coarse(value: dict[str, Any]) -> None:
        value["tensors"].setdefault(name, {"setting": 0, "sources": None, "pinned": {}, "bound": 0.0})
        value["tensors"][name]["reads"] = ["", ""]
        value["tensors"][name]["previews"] = [str(index), str(index)]

    with pytest.raises(BadInputError):
        check_plan(closely, edited(ties, coarse))


def test_previews_that_a_store_has_not(tmp_path: Path, fixed: LevelFamily) -> None:
    """A plan that relies on them is refused in a store where they were never made, or were dropped."""
    from mergepipe.store.drop_previews import drop_previews

    with Store.create(tmp_path / "store", block_bytes=BLOCK_BYTES) as store:
        ingest_levels(store, tmp_path, fixed)
        plan = level_plan(store, fixed, "40%")
        drop_previews(store)
        for look in (check_plan, audit, lambda store, plan: execute(store, plan, "merged")):
            with pytest.raises(BadInputError, match="preview"):
                look(store, plan)
        again = level_plan(store, fixed, "40%")
        assert all(tensor.previews is None for tensor in again.tensors.values())
        ingest_levels(store, tmp_path / "again", fixed)
        assert level_plan(store, fixed, "40%").tensors == plan.tensors
        assert_clean(store)


def test_previews_that_are_dropped_after_the_check(tmp_path: Path, fixed: LevelFamily) -> None:
    """No damage is reported, for none is there; what is damaged is still said."""
    from mergepipe.store.drop_previews import drop_previews

    with Store.create(tmp_path / "store", block_bytes=BLOCK_BYTES) as store:
        ingest_levels(store, tmp_path, fixed)
        checked = check_plan(store, level_plan(store, fixed, "40%"))
        name, _, _ = some_preview(checked.plan)
        facts = next(facts for facts in checked.facts.tensors if facts.name == name)
        levels = previews_of(facts, checked.plan.tensors[name])
        read = next(preview for coarse in levels for preview in coarse.values())
        object_path(store, read).rename(tmp_path / "away")
        with pytest.raises(DamagedError, match=read.short):
            execute(store, checked, "merged")
        (tmp_path / "away").rename(object_path(store, read))
        drop_previews(store)
        before = state_of(store)
        with pytest.raises(ConflictError, match="previews that the plan reads were dropped"):
            execute(store, checked, "merged")
        assert state_of(store) == before
        assert_clean(store)
