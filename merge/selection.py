"""Which blocks to read under a budget.

The items of one place are put in an order, and the order is cut into *steps*: items that are worth reading only
together, such as two deltas that nearly cancel, are one step. Steps of all places, by what they are worth for each
stored byte, are one sequence for all budgets. There are two such sequences:

*by sketch*, for a budget of bytes: what counts is the likely squared length of what is missing at a place: each
item's own is its error's, and the cosines between items are those of their sketches. So what adds up is read first, and
what cancels is left out together.

*by norm*, for a bound on the error: what counts is the bound itself, as if all that is missing at a place adds up.

At a place the order is greedy, by the drop for each byte; what a block adds to its preview comes after that. Its steps
are the vertices of the lower convex hull of (bytes read, what is missing), so they are worth less and less, and sorting
them all is the greedy choice over the model: the multiple-choice knapsack's, up to one step.

A budget takes the longest beginning of the sequence that fits, and fills the room at the edge with what comes after, by
the drop of the bound for each byte. Or a single step (or a block with its preview), where that has the lower bound: a
large step is not kept out by small ones before it. Both have a bound that no larger budget makes larger, see
:func:`within_bytes`, and so has the lower of the two. Where each place is one group, the squared bound drops by at
least half as much as it could at best: if the first step that fits the budget but not the room could be cut, nothing
would be better, and that step, or the block that it belongs to, is weighed alone. (Previews that are not on the hull
are no options here; they could only help where their blocks take more than the whole budget.) By norm it drops by 31%
of the best otherwise (Khuller, Moss and Naor, "The budgeted maximum coverage problem", 1999).

Free items are always read. Items without a bound come next: without them nothing is bounded. Ties are broken by the
items' order, which is the model's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.certificate import Item, distance
from mergepipe.merge.cosines import Cosines
from mergepipe.store.norms import SKETCH_SIZE

Floats = NDArray[np.float64]
Numbers = NDArray[np.intp]
Selector = Callable[[Sequence[Item], int], list[int]]
"""The numbers of the items to read, of all items and within a budget of stored bytes."""

_SAME: Final = 1 + 2.0**-44  # what rounding can make of one number
_BATCH: Final = 1 << 21  # matrix elements worked on at once: 16 MiB


@dataclass(frozen=True, slots=True)
class Step:
    """Items of one place that are read together.

    ``drop``: by how much they lower what the sequence is by. ``squared``: the squared bound when they and all before
    them are read. ``opens``: whether they are worth reading where nothing before them at their place is. ``head``: they
    are free, or have no bound, and every choice that has the room begins with all such.
    """

    items: tuple[int, ...]
    stored_bytes: int
    drop: float
    squared: float
    opens: bool
    head: bool


def select_within_bytes(items: Sequence[Item], budget: int) -> list[int]:
    """The numbers of the items to read within ``budget`` stored bytes."""
    return within_bytes(items, by_sketch(items), budget)


def select_within_error(items: Sequence[Item], bound: float) -> list[int]:
    """The numbers of the items to read so that the bound is at most ``bound``."""
    return within_error(items, by_norm(items), bound)


def by_sketch(items: Sequence[Item]) -> list[Step]:
    """All items in the order in which the likely error falls fastest."""
    rows = list(_rows(items))
    return _sequence(
        items, rows, np.array([item.size or item.error for item in items], np.float64), Cosines(items, rows).at
    )


def by_norm(items: Sequence[Item]) -> list[Step]:
    """All items in the order in which the bound falls fastest."""
    errors = np.array([item.error for item in items], np.float64)
    return _sequence(items, list(_rows(items)), errors, lambda numbers: np.ones((*numbers.shape, 1)))


def _sequence(
    items: Sequence[Item], rows: Sequence[Numbers], lengths: Floats, cosines: Callable[[Numbers], Floats]
) -> list[Step]:
    """``lengths``: of all items. ``cosines``: of items (P, K), those between the items of one row (P, K, K)."""
    free = [number for number, item in enumerate(items) if not item.stored_bytes]
    boundless = [number for number, item in enumerate(items) if item.stored_bytes and not math.isfinite(item.error)]
    costs = np.array([item.stored_bytes for item in items], np.float64)
    later = np.array([item.after for item in items], np.bool_)
    runs: list[_Run] = []
    for numbers in rows:
        own = lengths[numbers]
        gram = own[:, :, None] * own[:, None, :] * cosines(numbers)
        runs += _runs_of(numbers, gram, costs[numbers], later[numbers])
    runs.sort(key=lambda run: (-run.worth, run.place, run.number))
    first = [_Run(math.inf, 0, 0, (number,), True, head=True) for number in (*free, *boundless)]
    return _with_bounds(items, [*first, *runs])


@dataclass(frozen=True, slots=True)
class _Run:
    """A step without its bound. ``worth``: its drop for each byte; ``number``: of the steps of its place, which one."""

    worth: float
    place: int
    number: int
    items: tuple[int, ...]
    opens: bool
    head: bool = False


def _rows(items: Sequence[Item]) -> Iterator[Numbers]:
    """Items that cost something and have a bound, by their places: arrays (P, K) of P places with K items each."""
    places: dict[tuple[int, int], list[int]] = {}
    for number, item in enumerate(items):
        if item.stored_bytes and math.isfinite(item.error):
            places.setdefault((item.tensor, item.index), []).append(number)
    alike: dict[int, list[list[int]]] = {}
    for members in places.values():
        alike.setdefault(len(members), []).append(members)
    for count, rows in sorted(alike.items()):
        most = max(1, _BATCH // ((count + 1) * (count + SKETCH_SIZE)))
        for first in range(0, len(rows), most):
            yield np.array(rows[first : first + most], np.intp)


def _runs_of(numbers: Numbers, gram: Floats, costs: Floats, later: NDArray[np.bool_]) -> Iterator[_Run]:
    """The steps of P places. ``numbers``, ``costs`` and ``later`` are (P, K), ``gram`` (P, K, K)."""
    order, gains = _greedy(gram, costs, later)
    starts, worth = _hull(gains, np.take_along_axis(costs, order, 1))
    # Worth reading first at its place, and possible.
    early = (2 * gram.sum(2) - np.diagonal(gram, axis1=1, axis2=2) > 0) & ~later
    ordered = np.take_along_axis(numbers, order, 1)
    opening = np.take_along_axis(early, order, 1)
    for place in range(len(numbers)):
        members = ordered[place].tolist()
        cuts = [*np.flatnonzero(starts[place]).tolist(), len(members)]
        for step, (start, end) in enumerate(itertools.pairwise(cuts)):
            slope = float(worth[place, start])
            opens = step == 0 or (end - start == 1 and bool(opening[place, start]))
            yield _Run(slope, int(numbers[place, 0]), step, tuple(members[start:end]), opens)


def _greedy(gram: Floats, costs: Floats, later: NDArray[np.bool_]) -> tuple[NDArray[np.intp], Floats]:
    """An order of the K items of each place, by the drop of what is missing for each byte, and the drops: both (P, K).

    ``later``: items that can only come after the one before them in their row. Each drop is summed anew: taking one
    product off a sum would leave nothing of small ones beside large ones.
    """
    places, count = costs.shape
    every = np.arange(places)
    own = np.diagonal(gram, axis1=1, axis2=2)
    unread = np.ones((places, count))
    barred = later.copy()
    order = np.empty((places, count), np.intp)
    gains = np.empty((places, count))
    for step in range(count):
        gain = 2 * (gram * unread[:, None, :]).sum(2) - own
        pick = np.where((unread > 0) & ~barred, gain / costs, -np.inf).argmax(1)
        order[:, step], gains[:, step] = pick, gain[every, pick]
        unread[every, pick] = 0
        barred[every, np.minimum(pick + 1, count - 1)] = False
    return order, gains


def _hull(gains: Floats, costs: Floats) -> tuple[NDArray[np.bool_], Floats]:
    """Where steps start in the order, and what each item's step is worth for each byte; (P, K), not rising."""
    places, count = gains.shape
    zero = np.zeros((places, 1))
    missing = np.maximum(np.hstack([np.cumsum(gains[:, ::-1], 1)[:, ::-1], zero]), 0)
    spent = np.hstack([zero, np.cumsum(costs, 1)])
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = (missing[:, :, None] - missing[:, None, :]) / (spent[:, None, :] - spent[:, :, None])
    slopes[:, ~np.triu(np.ones((count + 1, count + 1), bool), 1)] = -np.inf
    ends = slopes.argmax(2)
    starts = np.empty((places, count), bool)
    worth = np.empty((places, count))
    at, slope = np.zeros(places, np.intp), np.zeros(places)
    for position in range(count):
        starts[:, position] = at == position
        slope = np.where(starts[:, position], slopes[np.arange(places), position, ends[:, position]], slope)
        at = np.where(starts[:, position], ends[:, position], at)
        worth[:, position] = slope
    return starts, np.minimum.accumulate(worth, 1)


def _with_bounds(items: Sequence[Item], runs: Sequence[_Run]) -> list[Step]:
    """The bound after each step, summed from the end, so that the last is exactly 0 and none is negative."""
    at: dict[tuple[int, int], float] = {}
    squared = 0.0
    found: list[Step] = []
    for run in reversed(runs):
        size = sum(items[number].stored_bytes for number in run.items)
        drop = run.worth * size if size else 0.0
        found.append(Step(run.items, size, drop, squared, run.opens, run.head))
        place = _place(items, run.items)
        error = math.fsum(items[number].error for number in run.items)
        before = at.get(place, 0.0)
        at[place] = before + error
        squared += error * (2 * before + error) if error else 0.0
    return found[::-1]


def _place(items: Sequence[Item], members: Sequence[int]) -> tuple[int, int]:
    return items[members[0]].tensor, items[members[0]].index


def within_bytes(items: Sequence[Item], steps: Sequence[Step], budget: int) -> list[int]:
    """The items to read within ``budget`` stored bytes.

    A larger budget never has a larger bound. For the longest beginning that fits: beginnings are nested. For what is
    added at the edge, as long as the same beginning fits: one step, the best of those that fit, has more to choose
    from; and of the steps that fill the room, by their worth, one that fits at last lowers the bound by no less than
    what it displaces, which is smaller and worth no more for each byte (:func:`_filled`). When the next step fits it
    lowers the bound by no less than both: one step may not lower it by more, and those that fill the room are worth no
    more for each byte. For a single step: more room only adds to what may be taken. And so for the lower of the two.
    """
    room, fits = budget, 0
    while fits < len(steps) and steps[fits].stored_bytes <= room:
        room -= steps[fits].stored_bytes
        fits += 1
    chosen = _members(steps[:fits])
    head = sum(step.head for step in steps)
    if fits == len(steps) or fits < head:
        return chosen
    later = _unread(items, steps[fits:])
    next_drop = _drop(items, later, steps[fits])
    edge, drop = _lowest(items, later, _edge(items, steps[fits:]), room, next_drop)
    filled, drops = _filled(items, steps[fits:], room, next_drop / steps[fits].stored_bytes)
    if drops > drop:
        edge = filled
    first, rest = _members(steps[:head]), steps[head:]
    spare = budget - sum(step.stored_bytes for step in steps[:head])
    alone, _ = _lowest(items, _unread(items, rest), _large(items, rest), spare)
    chosen, other = [*chosen, *edge], [*first, *alone]
    return other if _distance_without(items, other) < _distance_without(items, chosen) else chosen


def _members(steps: Iterable[Step]) -> list[int]:
    return [number for step in steps for number in step.items]


def _unread(items: Sequence[Item], steps: Sequence[Step]) -> dict[tuple[int, int], list[int]]:
    """The items of these steps by their places."""
    places: dict[tuple[int, int], list[int]] = {}
    for step in steps:
        places.setdefault(_place(items, step.items), []).extend(step.items)
    return places


def _edge(items: Sequence[Item], steps: Sequence[Step]) -> Iterator[Step]:
    """The steps that are worth reading where none of these before them is."""
    seen: set[tuple[int, int]] = set()
    for step in steps:
        place = _place(items, step.items)
        if step.drop > 0 and (step.opens or place not in seen):
            yield step
        seen.add(place)


def _filled(items: Sequence[Item], steps: Sequence[Step], room: int, most: float) -> tuple[tuple[int, ...], float]:
    """Items of steps that fill the room, and by how much they lower the squared bound.

    In the order of what they lower it by for each byte, which is ``most`` at most; those of a place in turn, worth less
    and less, and none after one that does not fit. So more room never lowers it by less: as long as a step does not
    fit, those after it lower the bound by less than it would, and when it fits it is read.
    """
    chosen: list[int] = []
    total = 0.0
    closed: set[tuple[int, int]] = set()
    for worth, step in sorted(_chains(items, steps, most), key=lambda found: -found[0]):
        place = _place(items, step.items)
        if place in closed:
            continue
        if step.stored_bytes > room:
            closed.add(place)
            continue
        chosen += step.items
        total += worth * step.stored_bytes
        room -= step.stored_bytes
    return tuple(chosen), total


def _chains(items: Sequence[Item], steps: Sequence[Step], most: float) -> Iterator[tuple[float, Step]]:
    """The next steps of each place, with what they lower the squared bound by for each byte: not rising."""
    places: dict[tuple[int, int], list[Step]] = {}
    for step in steps:
        places.setdefault(_place(items, step.items), []).append(step)
    for chain in places.values():
        errors = [math.fsum(items[number].error for number in step.items) for step in chain]
        worth = most
        for position, (step, error) in enumerate(zip(chain, errors, strict=True)):
            found = error * (2 * math.fsum(errors[position + 1 :]) + error) / step.stored_bytes
            if not 0 < found <= worth * _SAME:
                break
            worth = min(found, worth)
            yield worth, step


def _large(items: Sequence[Item], steps: Sequence[Step]) -> Iterator[Step]:
    """What is worth no less alone than all that the sequence would read in its stead: a step, or a block whose preview
    is a step before it."""
    spent = np.cumsum([step.stored_bytes for step in steps])
    drops = np.cumsum([step.drop for step in steps])
    previews: dict[int, Step] = {}
    for step in steps:
        found = step
        if len(step.items) == 1:
            (number,) = step.items
            if items[number].preview:
                previews[number] = step
            elif number - 1 in previews and items[number].after:
                first = previews[number - 1]
                size, drop = first.stored_bytes + step.stored_bytes, first.drop + step.drop
                found = Step((*first.items, number), size, drop, step.squared, first.opens, False)
        instead = int(np.searchsorted(spent, found.stored_bytes, side="right"))
        if found.opens and found.drop > 0 and (not instead or found.drop >= drops[instead - 1]):
            yield found


def _lowest(
    items: Sequence[Item],
    unread: Mapping[tuple[int, int], list[int]],
    steps: Iterable[Step],
    room: int,
    most: float = math.inf,
) -> tuple[tuple[int, ...], float]:
    """The items of the step that lowers the bound most, of those that fit and lower it by ``most`` at most; and by how
    much."""
    best: tuple[int, ...] = ()
    largest = 0.0
    for step in steps:
        if step.stored_bytes <= room:
            drop = _drop(items, unread, step)
            if largest < drop <= most:
                best, largest = step.items, drop
    return best, largest


def _drop(items: Sequence[Item], unread: Mapping[tuple[int, int], list[int]], step: Step) -> float:
    """The drop of the squared bound when this step is read, and all else that is ``unread`` is not.

    Errors are added up anew each time: taking one off a sum would leave nothing of small ones beside large ones.
    """
    mine = math.fsum(items[number].error for number in step.items)
    there = unread[_place(items, step.items)]
    others = math.fsum(items[number].error for number in there if number not in step.items)
    return mine * (2 * others + mine)


def _distance_without(items: Sequence[Item], chosen: Sequence[int]) -> float:
    read = set(chosen)
    return distance([item for number, item in enumerate(items) if number not in read])


def within_error(items: Sequence[Item], steps: Sequence[Step], bound: float) -> list[int]:
    """The shortest beginning of the sequence whose bound is at most ``bound`` (absolute), and all that is free."""
    free = sum(not step.stored_bytes for step in steps)
    needed = next((n for n in range(free, len(steps) + 1) if _bound_after(items, steps, n) <= bound), len(steps))
    return _members(steps[:needed])


def _bound_after(items: Sequence[Item], steps: Sequence[Step], count: int) -> float:
    if count:
        return math.sqrt(steps[count - 1].squared)
    return distance(items)
