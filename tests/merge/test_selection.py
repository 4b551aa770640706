"""The choice under a budget, against every other choice that there is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.merge.certificate import Item, distance
from mergepipe.merge.selection import (
    Step,
    by_norm,
    by_sketch,
    select_within_bytes,
    select_within_error,
    within_bytes,
    within_error,
)
from support.facts import items

Sequence_ = Callable[[Sequence[Item]], list[Step]]
both = pytest.mark.parametrize("by", [by_norm, by_sketch])


@st.composite
def sketched(draw: st.DrawFn) -> list[Item]:
    """Items at a few places whose sketches have a few directions, so that they add up, cancel, or neither."""
    directions = np.vstack([np.eye(64)[:3], np.random.default_rng(0).standard_normal((3, 64))])
    directions[4] = -directions[3] + 0.1 * directions[5]
    found = []
    for item in draw(items()):
        sign, way = draw(st.sampled_from([-1, 1])), draw(st.integers(-1, 5))
        part = None if way < 0 else sign * item.error * directions[way]
        found.append(replace(item, size=item.error, part=part))
    return found


def cost(found: Sequence[Item], chosen: Sequence[int]) -> int:
    return sum(found[number].stored_bytes for number in chosen)


def bound(found: Sequence[Item], chosen: Sequence[int]) -> float:
    return distance([item for number, item in enumerate(found) if number not in set(chosen)])


def choose(found: Sequence[Item], budget: int, by: Sequence_ = by_norm) -> list[int]:
    return within_bytes(found, by(found), budget)


def best(found: Sequence[Item], budget: int) -> float:
    """The smallest squared bound of all subsets within the budget."""
    subsets = itertools.chain.from_iterable(
        itertools.combinations(range(len(found)), count) for count in range(len(found) + 1)
    )
    return min(bound(found, subset) ** 2 for subset in subsets if cost(found, subset) <= budget)


@both
@given(found=sketched(), budget=st.integers(0, 100))
def test_fits_the_budget_and_reads_nothing_twice(by: Sequence_, found: list[Item], budget: int) -> None:
    chosen = choose(found, budget, by)
    assert len(set(chosen)) == len(chosen)
    assert cost(found, chosen) <= budget


@both
@given(found=sketched())
def test_nothing_at_no_budget_and_everything_at_a_full_one(by: Sequence_, found: list[Item]) -> None:
    assert choose(found, 0, by) == []
    assert sorted(choose(found, cost(found, range(len(found))), by)) == list(range(len(found)))


@both
@given(found=items(alone=True), budget=st.integers(0, 100))
def test_half_as_good_as_the_best_where_places_have_one_item(by: Sequence_, found: list[Item], budget: int) -> None:
    nothing = bound(found, []) ** 2
    drop, most = nothing - bound(found, choose(found, budget, by)) ** 2, nothing - best(found, budget)
    assert drop >= most / 2 - 1e-12 * nothing


@given(items(), st.integers(0, 100))
def test_a_third_as_good_as_the_best_where_items_share_places(found: list[Item], budget: int) -> None:
    nothing = bound(found, []) ** 2
    drop, most = nothing - bound(found, choose(found, budget)) ** 2, nothing - best(found, budget)
    assert drop >= most * (1 - 1 / math.e) / 2 - 1e-12 * nothing


@both
@given(found=items(alone=True), budget=st.integers(0, 100))
def test_the_best_where_all_cost_the_same(by: Sequence_, found: list[Item], budget: int) -> None:
    alike = [replace(item, stored_bytes=10) for item in found]
    assert bound(alike, choose(alike, budget, by)) ** 2 <= best(alike, budget) * (1 + 1e-12)


@both
@given(found=sketched())
def test_a_larger_budget_never_has_a_larger_bound(by: Sequence_, found: list[Item]) -> None:
    steps = by(found)
    bounds = [bound(found, within_bytes(found, steps, budget)) for budget in range(cost(found, range(len(found))) + 1)]
    for smaller, larger in itertools.pairwise(bounds):
        assert larger <= smaller * (1 + 1e-12)


@both
@given(found=sketched())
def test_steps_carry_the_bound_that_is_left(by: Sequence_, found: list[Item]) -> None:
    steps = by(found)
    assert sorted(number for step in steps for number in step.items) == list(range(len(found)))
    read: list[int] = []
    for step in steps:
        read += step.items
        assert step.stored_bytes == cost(found, step.items)
        assert len({(found[number].tensor, found[number].index) for number in step.items}) == 1
        assert math.isclose(math.sqrt(step.squared), bound(found, read), rel_tol=1e-9)
    if steps:
        assert steps[-1].squared == 0.0


@both
@given(found=sketched())
def test_steps_are_worth_less_and_less(by: Sequence_, found: list[Item]) -> None:
    steps = by(found)
    worth = [step.drop / step.stored_bytes for step in steps]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(worth))
    assert by(found) == steps


@both
@given(found=sketched(), share=st.floats(0, 1.2))
def test_an_error_takes_the_shortest_beginning(by: Sequence_, found: list[Item], share: float) -> None:
    wanted = share * distance(found)
    steps = by(found)
    chosen = within_error(found, steps, wanted)
    count = next(n for n in range(len(steps) + 1) if sum(len(step.items) for step in steps[:n]) == len(chosen))
    assert chosen == [number for step in steps[:count] for number in step.items]
    assert bound(found, chosen) <= wanted * (1 + 1e-9)
    if chosen:
        before = [number for step in steps[: count - 1] for number in step.items]
        assert bound(found, before) > wanted * (1 - 1e-9)


def test_what_has_no_bound_is_read_first() -> None:
    found = [Item(0, 0, (0,), 5.0, 10), Item(0, 1, (0,), math.inf, 1000), Item(0, 2, (0,), math.inf, 10)]
    assert choose(found, 1010)[:2] == [1, 2]
    assert sorted(choose(found, 1020)) == [0, 1, 2]
    assert math.isinf(bound(found, choose(found, 1000)))
    assert set(select_within_error(found, 5.0)) == {1, 2}


def test_equal_items_are_taken_in_the_models_order() -> None:
    found = [Item(number // 3, number % 3, (0,), 1.0, 10) for number in range(9)]
    assert choose(found, 45) == [0, 1, 2, 3]


def test_a_small_item_does_not_keep_out_a_large_one() -> None:
    """The first gains more for each byte; the second, which no longer fits beside it, nearly a hundred times more."""
    found = [Item(0, 0, (0,), 1.0, 1), Item(0, 1, (0,), 9.9, 100)]
    assert choose(found, 99) == [0]
    assert choose(found, 100) == [1]
    assert sorted(choose(found, 101)) == [0, 1]


def test_the_edge_is_filled() -> None:
    """After the first, the second does not fit, and the third does."""
    found = [Item(0, 0, (0,), 10.0, 10), Item(0, 1, (0,), 5.0, 20), Item(0, 2, (0,), 1.0, 10)]
    assert choose(found, 25) == [0, 2]


def test_what_fits_no_budget_keeps_nothing_out() -> None:
    """The first is worth most for each byte, and takes more than there is; the others are not one step, but seven."""
    found = [Item(0, 0, (0,), 20**0.5, 20), *(Item(0, number, (0,), 0.9**0.5, 1) for number in range(1, 8))]
    assert choose(found, 10) == [1, 2, 3, 4, 5, 6, 7]
    assert choose(found, 19) == [1, 2, 3, 4, 5, 6, 7]
    assert choose(found, 20) == [0]


def test_a_small_error_beside_a_large_one_keeps_its_worth() -> None:
    """At the first place, 1 is lost in 1e20 + 1; when the large one is read it is still there."""
    found = [Item(0, 0, (0,), 1e20, 10), Item(0, 0, (1,), 1.0, 10), Item(0, 1, (0,), 0.5, 10)]
    assert choose(found, 20) == [0, 1]


def test_items_of_one_place_add_up_before_they_are_squared() -> None:
    """Two errors of 3 at one place are worth more together than a 5 and nothing."""
    found = [Item(0, 0, (0,), 3.0, 10), Item(0, 0, (1,), 3.0, 10), Item(0, 1, (0,), 5.0, 10)]
    assert [step.items for step in by_norm(found)] == [(0,), (2,), (1,)]
    assert math.sqrt(by_norm(found)[0].squared) == pytest.approx(math.hypot(3, 5))


def along(index: int, group: int, sketch: Sequence[float], stored_bytes: int = 10) -> Item:
    """An item whose size is its sketch's length."""
    part = np.array([*sketch, *[0.0] * (64 - len(sketch))])
    size = float(np.linalg.norm(part))
    return Item(0, index, (group,), size, stored_bytes, size, part)


def test_what_cancels_is_left_out_together() -> None:
    found = [along(0, 0, [0, 3]), along(0, 1, [0, -3]), along(0, 2, [1]), along(1, 0, [0.5])]
    assert [step.items for step in by_sketch(found)] == [(2,), (3,), (0, 1)]
    assert select_within_bytes(found, 20) == [2, 3]
    assert select_within_bytes(found, 30) == [2, 3]  # one of the two alone would be worse than none
    assert set(select_within_error(found, 3.2)) == {0, 1}  # a bound does not know that they cancel


def test_what_adds_up_is_read_first() -> None:
    found = [along(0, 0, [2, 0]), along(0, 1, [0, 2]), along(1, 0, [2, 0]), along(1, 1, [2, 0])]
    assert by_sketch(found)[0].items == (2,)


def test_sketches_that_nothing_connects_are_no_reason() -> None:
    """Their cosines are noise: the order is by size for each byte, as far as that decides."""
    random = np.random.default_rng(0)
    sizes = np.exp(random.standard_normal((200, 4)))
    found = []
    for index, group in np.ndindex(*sizes.shape):
        size = float(sizes[index, group])
        found.append(Item(0, index, (group,), size, 10, size, random.standard_normal(64) * size / 8))
    left = set(range(len(found))) - set(select_within_bytes(found, cost(found, range(len(found))) // 4))
    smallest = sorted(range(len(found)), key=lambda number: found[number].size)[: len(left)]
    missing, least = (sum(found[number].size ** 2 for number in numbers) for numbers in (left, smallest))
    assert missing <= 1.02 * least


@pytest.mark.parametrize("part", [None, np.zeros(64), np.full(64, np.nan), np.full(64, np.inf)])
def test_without_sketches_sizes_decide(part: np.ndarray | None) -> None:
    errors = [3.0, 1.0, 2.5, 2.0]
    found = [Item(0, number // 2, (number % 2,), error, 10, error, part) for number, error in enumerate(errors)]
    assert [step.items for step in by_sketch(found)] == [(0,), (2,), (3,), (1,)]


@both
def test_free_items_are_always_read(by: Sequence_) -> None:
    found = [Item(0, 0, (0,), math.inf, 10), along(0, 1, [3], 0), along(0, 2, [-3], 0), along(1, 0, [1])]
    assert choose(found, 0, by) == [1, 2]
    assert choose(found, 10, by) == [1, 2, 0]
    assert sorted(choose(found, 20, by)) == [0, 1, 2, 3]
    assert within_error(found, by(found), math.inf) == [1, 2]
    assert within_error(found, by(found), 1.0) == [1, 2, 0]


def test_one_large_step_is_weighed_against_all_that_would_be_read_for_its_bytes() -> None:
    """By the bound, two that cancel are the best single step; by what is likely, nearly the worst."""
    small = [along(2 + number, 0, [1.0]) for number in range(4)]
    found = [along(0, 0, [0, 30]), along(0, 1, [0, -30, 1]), *small]
    assert sorted(select_within_bytes(found, 40)) == [2, 3, 4, 5]
