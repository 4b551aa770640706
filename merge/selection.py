"""Which blocks to read under a budget.

Greedy by the drop of the squared bound for each stored byte, which gives one sequence for all budgets: a budget takes
the longest beginning of it that fits, and the best item at the edge; or the best item alone, where that is better. So
the squared bound drops by at least half as much as it could at best where each place is one item, and by 31% of it
otherwise (Khuller, Moss and Naor, "The budgeted maximum coverage problem", 1999), and a larger budget never does worse.
Ties are broken by the items' order, which is the model's.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mergepipe.merge.certificate import Item, distance


@dataclass(frozen=True, slots=True)
class Step:
    """One item of the sequence, and the squared bound when it and all before it are read."""

    item: int
    squared: float


def sequence(items: Sequence[Item]) -> list[Step]:
    """All items in the order in which a growing budget reads them."""
    unread = _unread(items, range(len(items)))
    heap = [(-_gain(items, unread, number) / max(item.stored_bytes, 1), number) for number, item in enumerate(items)]
    heapq.heapify(heap)
    order: list[int] = []
    while heap:
        claimed, number = heapq.heappop(heap)
        item = items[number]
        now = -_gain(items, unread, number) / max(item.stored_bytes, 1)
        if now > claimed and heap and (now, number) > heap[0]:
            heapq.heappush(heap, (now, number))  # others at its place were read since: it gains less now
            continue
        order.append(number)
        unread[item.tensor, item.index].remove(number)
    return _with_bounds(items, order)


def _unread(items: Sequence[Item], numbers: Iterable[int]) -> dict[tuple[int, int], list[int]]:
    """These items by their places."""
    places: dict[tuple[int, int], list[int]] = {}
    for number in numbers:
        places.setdefault((items[number].tensor, items[number].index), []).append(number)
    return places


def _gain(items: Sequence[Item], unread: Mapping[tuple[int, int], list[int]], number: int) -> float:
    """The drop of the squared bound when this item is read, the others of its place that are ``unread`` are not.

    Their errors are added up anew each time: taking one off a sum would leave nothing of small ones beside large ones.
    """
    item = items[number]
    if math.isinf(item.error):
        return math.inf
    others = (items[other].error for other in unread[item.tensor, item.index] if other != number)
    return item.error * (2 * math.fsum(error for error in others if math.isfinite(error)) + item.error)


def _with_bounds(items: Sequence[Item], order: list[int]) -> list[Step]:
    """The bound after each step, summed from the end, so that the last is exactly 0 and none is negative."""
    at: dict[tuple[int, int], float] = {}
    squared = 0.0
    steps: list[Step] = []
    for number in reversed(order):
        steps.append(Step(number, squared))
        item = items[number]
        place = (item.tensor, item.index)
        before = at.get(place, 0.0)
        at[place] = before + item.error
        squared += item.error * (2 * before + item.error) if item.error else 0.0
    return steps[::-1]


def within_bytes(items: Sequence[Item], steps: Sequence[Step], budget: int) -> list[int]:
    """The items to read within ``budget`` stored bytes.

    The longest beginning that fits, and one more at the edge. What fits into the room that is left is smaller than the
    step that does not, and no step after it gains more for each byte; so the next longer beginning is always at least
    as good. Or the one item that is best by itself, where small steps before it left too little room.
    """
    room = budget
    fits = 0
    for step in steps:
        if items[step.item].stored_bytes > room:
            break
        room -= items[step.item].stored_bytes
        fits += 1
    chosen = [step.item for step in steps[:fits]]
    extra = _best_single(items, steps[fits:], room)
    if extra is not None:
        chosen.append(extra)
    alone = _best_single(items, steps, budget)
    if alone is not None and _distance_without(items, [alone]) < _distance_without(items, chosen):
        return [alone]
    return chosen


def _distance_without(items: Sequence[Item], chosen: Sequence[int]) -> float:
    read = set(chosen)
    return distance([item for number, item in enumerate(items) if number not in read])


def within_error(items: Sequence[Item], steps: Sequence[Step], bound: float) -> list[int]:
    """The shortest beginning of the sequence whose bound is at most ``bound`` (absolute)."""
    needed = next((n for n in range(len(steps) + 1) if _bound_after(items, steps, n) <= bound), len(steps))
    return [step.item for step in steps[:needed]]


def _bound_after(items: Sequence[Item], steps: Sequence[Step], count: int) -> float:
    if count:
        return math.sqrt(steps[count - 1].squared)
    return distance(items)


def _best_single(items: Sequence[Item], steps: Sequence[Step], room: int) -> int | None:
    """The item that lowers the squared bound most among those that fit; the earlier one where two are equal."""
    unread = _unread(items, (step.item for step in steps))
    best, most = None, 0.0
    for step in steps:
        if items[step.item].stored_bytes <= room:
            gain = _gain(items, unread, step.item)
            if gain > most:
                best, most = step.item, gain
    return best
