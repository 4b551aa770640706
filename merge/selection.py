"""Which blocks to read under a budget.

Greedy by the drop of the squared bound for each stored byte, which gives one sequence for all budgets: a budget takes
the longest beginning of it that fits. Ties are broken by the items' order, which is the model's.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mergepipe.merge.certificate import Item, distance


@dataclass(frozen=True, slots=True)
class Step:
    """One item of the sequence, and the squared bound when it and all before it are read."""

    item: int
    squared: float


def sequence(items: Sequence[Item]) -> list[Step]:
    """All items in the order in which a growing budget reads them."""
    left: dict[tuple[int, int], float] = {}
    for item in items:
        place = (item.tensor, item.index)
        left[place] = left.get(place, 0.0) + (item.error if math.isfinite(item.error) else 0.0)

    def gain(item: Item) -> float:
        """The drop of the squared bound when this item is read now."""
        if math.isinf(item.error):
            return math.inf
        return item.error * (2 * left[item.tensor, item.index] - item.error)

    heap = [(-gain(item) / max(item.stored_bytes, 1), number) for number, item in enumerate(items)]
    heapq.heapify(heap)
    order: list[int] = []
    while heap:
        claimed, number = heapq.heappop(heap)
        item = items[number]
        now = -gain(item) / max(item.stored_bytes, 1)
        if now > claimed and heap and (now, number) > heap[0]:
            heapq.heappush(heap, (now, number))  # others at its place were read since: it gains less now
            continue
        order.append(number)
        if math.isfinite(item.error):
            left[item.tensor, item.index] = max(left[item.tensor, item.index] - item.error, 0.0)
    return _with_bounds(items, order)


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
    """The items to read within ``budget`` stored bytes: the longest beginning that fits, and one more at the edge.

    What fits into the room that is left is smaller than the step that does not, and no step after it gains more for
    each byte; so the next longer beginning is always at least as good, and a larger budget never does worse.
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
    return chosen if extra is None else [*chosen, extra]


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
    unread: dict[tuple[int, int], float] = {}
    for step in steps:
        item = items[step.item]
        unread[item.tensor, item.index] = unread.get((item.tensor, item.index), 0.0) + item.error
    best, most = None, 0.0
    for step in steps:
        item = items[step.item]
        if item.stored_bytes <= room and item.error:
            gain = math.inf
            if math.isfinite(item.error):
                gain = item.error * (2 * unread[item.tensor, item.index] - item.error)
            if gain > most:
                best, most = step.item, gain
    return best
