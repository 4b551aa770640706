"""The choice under a budget, against every other choice that there is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.merge.certificate import Item, distance
from mergepipe.merge.selection import sequence, within_bytes, within_error
from support.facts import items


def cost(found: Sequence[Item], chosen: Sequence[int]) -> int:
    return sum(found[number].stored_bytes for number in chosen)


def bound(found: Sequence[Item], chosen: Sequence[int]) -> float:
    return distance([item for number, item in enumerate(found) if number not in set(chosen)])


def choose(found: Sequence[Item], budget: int) -> list[int]:
    return within_bytes(found, sequence(found), budget)


def best(found: Sequence[Item], budget: int) -> float:
    """The smallest squared bound of all subsets within the budget."""
    subsets = itertools.chain.from_iterable(
        itertools.combinations(range(len(found)), count) for count in range(len(found) + 1)
    )
    return min(bound(found, subset) ** 2 for subset in subsets if cost(found, subset) <= budget)


@given(items(), st.integers(0, 100))
def test_fits_the_budget_and_reads_nothing_twice(found: list[Item], budget: int) -> None:
    chosen = choose(found, budget)
    assert len(set(chosen)) == len(chosen)
    assert cost(found, chosen) <= budget


@given(items())
def test_nothing_at_no_budget_and_everything_at_a_full_one(found: list[Item]) -> None:
    assert choose(found, 0) == []
    assert sorted(choose(found, cost(found, range(len(found))))) == list(range(len(found)))


@given(items(alone=True), st.integers(0, 100))
def test_half_as_good_as_the_best_where_places_have_one_item(found: list[Item], budget: int) -> None:
    nothing = bound(found, []) ** 2
    drop, most = nothing - bound(found, choose(found, budget)) ** 2, nothing - best(found, budget)
    assert drop >= most / 2 - 1e-12 * nothing


@given(items(), st.integers(0, 100))
def test_a_third_as_good_as_the_best_where_items_share_places(found: list[Item], budget: int) -> None:
    nothing = bound(found, []) ** 2
    drop, most = nothing - bound(found, choose(found, budget)) ** 2, nothing - best(found, budget)
    assert drop >= most * (1 - 1 / math.e) / 2 - 1e-12 * nothing


@given(items(alone=True), st.integers(0, 100))
def test_the_best_where_all_cost_the_same(found: list[Item], budget: int) -> None:
    alike = [replace(item, stored_bytes=10) for item in found]
    assert bound(alike, choose(alike, budget)) ** 2 <= best(alike, budget) * (1 + 1e-12)


@given(items())
def test_a_larger_budget_never_has_a_larger_bound(found: list[Item]) -> None:
    steps = sequence(found)
    bounds = [bound(found, within_bytes(found, steps, budget)) for budget in range(cost(found, range(len(found))) + 1)]
    for smaller, larger in itertools.pairwise(bounds):
        assert larger <= smaller * (1 + 1e-12)


@given(items())
def test_steps_carry_the_bound_that_is_left(found: list[Item]) -> None:
    steps = sequence(found)
    assert sorted(step.item for step in steps) == list(range(len(found)))
    for count in range(1, len(steps) + 1):
        left = bound(found, [step.item for step in steps[:count]])
        assert math.isclose(math.sqrt(steps[count - 1].squared), left, rel_tol=1e-9)
    if steps:
        assert steps[-1].squared == 0.0


@given(items(), st.floats(0, 1.2))
def test_an_error_takes_the_shortest_beginning(found: list[Item], share: float) -> None:
    wanted = share * distance(found)
    steps = sequence(found)
    chosen = within_error(found, steps, wanted)
    assert chosen == [step.item for step in steps[: len(chosen)]]
    assert bound(found, chosen) <= wanted * (1 + 1e-9)
    if chosen:
        assert bound(found, chosen[:-1]) > wanted * (1 - 1e-9)


def test_what_has_no_bound_is_read_first() -> None:
    found = [Item(0, 0, (0,), 5.0, 10), Item(0, 1, (0,), math.inf, 1000), Item(0, 2, (0,), math.inf, 10)]
    assert choose(found, 1010)[:2] == [1, 2]
    assert sorted(choose(found, 1020)) == [0, 1, 2]
    assert math.isinf(bound(found, choose(found, 1000)))
    assert set(within_error(found, sequence(found), 5.0)) == {1, 2}


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


def test_a_small_error_beside_a_large_one_keeps_its_worth() -> None:
    """At the first place, 1 is lost in 1e20 + 1; when the large one is read it is still there."""
    found = [Item(0, 0, (0,), 1e20, 10), Item(0, 0, (1,), 1.0, 10), Item(0, 1, (0,), 0.5, 10)]
    assert choose(found, 20) == [0, 1]


def test_items_of_one_place_add_up_before_they_are_squared() -> None:
    """Two errors of 3 at one place are worth more together than a 5 and nothing."""
    found = [Item(0, 0, (0,), 3.0, 10), Item(0, 0, (1,), 3.0, 10), Item(0, 1, (0,), 5.0, 10)]
    assert [step.item for step in sequence(found)] == [0, 2, 1]
    assert math.sqrt(sequence(found)[0].squared) == pytest.approx(math.hypot(3, 5))
