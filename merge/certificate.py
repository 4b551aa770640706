"""How far a merge can be from the full one, from norms alone.

An unread block's delta counts as zero; a read block is processed exactly as in the full merge. Blocks are disjoint sets
of elements, so the squared distance of the whole model is the sum over places of the squared distance at each. What a
method's result can move by is in its factors (:attr:`mergepipe.merge.method.Method.reach`):

*linear* (the result is linear in the deltas, with fixed coefficients c): at a place the distance is at most
``sum over unread groups of |sum of their c| * norm``. Where coefficients cancel, float32 sums leave a rest: a group's
factor is at least ``2**-22`` of the sum of their magnitudes, so a bound of 0 means that nothing is missing.

*additive* (each expert's part is masked or scaled by itself): the same, with ``sum of |c|`` for a group.

*whole* (TIES and others, where experts decide together): places are read whole or not at all. If nothing is read at a
place the result is the base, and the distance is at most ``sqrt(sum of (factor * norm)^2)`` over the experts. It is
loose: what trimming removes is still counted.

A *preview* in place of a block leaves out its residual: the same factors, times the residual's norm. It is one more way
to read a group, between nothing and the block itself, so such a group is two items: the preview, and what the exact
block adds to it. The second is worth nothing without the first, and what both leave out is the whole group again.

Beside the bound stands an *estimate*: the squared length of what is missing at a place, from norms and from the inner
products of the experts' sketches, so that deltas which cancel or add up are seen. It is likely, not certain.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.facts import Place, TensorFacts
from mergepipe.merge.method import Method
from mergepipe.store.norms import SKETCH_SIZE
from mergepipe.store.previews import PreviewRow

_REST: Final = 2.0**-22
_USUAL: Final = 0.7  # of a whole place's bound; 0.50 to 0.84 over the families of bench/budget.py


@dataclass(frozen=True, slots=True)
class Item:
    """What can be read or left out as one: groups at one place.

    ``error``: what leaving it out adds to the distance at its place. ``stored_bytes``: what reading it takes.
    ``part``: the sketch of what it adds to the result, and ``size`` the length of that by the norms. ``preview``: this
    is a group's preview, and ``after``: this is what the exact block adds to the item before it. ``whole``: what is
    left out where both are, of the former.
    """

    tensor: int
    index: int
    groups: tuple[int, ...]
    error: float
    stored_bytes: int
    size: float = 0.0
    part: NDArray[np.float64] | None = None
    preview: bool = False
    after: bool = False
    whole: Item | None = None


def items_of(number: int, facts: TensorFacts, method: Method, *, previews: bool = True) -> list[Item]:
    """All items of one tensor. ``previews``: also where previews can be read in place of blocks."""
    if not facts.places:
        return []
    previews = previews and method.takes_previews(facts.problem)
    factors = method.reach(facts.problem, facts.coefficients)
    found: list[Item] = []
    for place in facts.places:
        if method.error == "whole":
            error = _whole_error(place, factors)
            cost = sum(group.stored_bytes for group in place.groups)
            found.append(Item(number, place.index, tuple(range(len(place.groups))), error, cost, _USUAL * error))
            continue
        for position, group in enumerate(place.groups):
            mine = [float(factors[expert]) for expert in group.experts]
            signed, total = math.fsum(mine), math.fsum(abs(factor) for factor in mine)
            factor = max(abs(signed), _REST * total) if method.error == "linear" else total
            part = None
            if group.sketch is not None and math.isfinite(signed):
                part = signed * group.sketch.astype(np.float64)
            error = _times(factor, group.norm)
            item = Item(number, place.index, (position,), error, group.stored_bytes, error, part)
            found += [item] if group.preview is None or not previews else _levels(item, factor, group.preview)
    return found


def _levels(item: Item, factor: float, preview: PreviewRow) -> list[Item]:
    """A group as its preview and the rest, where the preview is worth more for each byte than the block itself."""
    rest = _times(factor, preview.residual)
    if not rest < item.error < math.inf:
        return [item]
    drop = (item.error - rest) * (item.error + rest)
    if drop * item.stored_bytes <= item.error**2 * preview.stored_bytes:
        return [item]
    # Rounded up, so that both together are no less than the whole.
    first = math.nextafter(item.error - rest, math.inf)
    size = math.sqrt(drop)
    more = item.stored_bytes - preview.stored_bytes
    return [
        replace(item, error=first, stored_bytes=preview.stored_bytes, size=size, preview=True, whole=item),
        replace(item, error=rest, stored_bytes=more, size=rest, part=None, after=True),
    ]


def left_out(items: Sequence[Item], chosen: Container[int]) -> list[Item]:
    """What a merge that reads the chosen items alone leaves out; a group of which nothing is read is one item again."""
    found: list[Item] = []
    for number, item in enumerate(items):
        if number in chosen:
            continue
        if item.whole is not None:
            found.append(item.whole)
        elif not item.after or number - 1 in chosen:
            found.append(item)
    return found


def _times(factor: float, norm: float) -> float:
    """A bound that is infinite where one of them is: zero times infinity is a NaN."""
    return factor * norm if math.isfinite(norm) and math.isfinite(factor) else math.inf


def _whole_error(place: Place, factors: NDArray[np.float64]) -> float:
    if not all(math.isfinite(group.norm) for group in place.groups):
        return math.inf
    parts = [_times(float(factors[expert]), group.norm) for group in place.groups for expert in group.experts]
    return math.sqrt(math.fsum(part**2 for part in parts))


def distance(items: Sequence[Item]) -> float:
    """The bound for a model that is merged without these items."""
    errors: dict[tuple[int, int], float] = {}
    for item in items:
        place = (item.tensor, item.index)
        errors[place] = errors.get(place, 0.0) + item.error
    return math.sqrt(math.fsum(error * error for error in errors.values()))


def estimate(items: Sequence[Item]) -> float:
    """The likely distance of a model that is merged without these items, by their sketches."""
    places: dict[tuple[int, int], list[Item]] = {}
    for item in items:
        places.setdefault((item.tensor, item.index), []).append(item)
    return math.sqrt(math.fsum(squared_length(together) for together in places.values()))


def squared_length(items: Sequence[Item]) -> float:
    """The likely squared length of the sum of what these items of one place add to the result.

    Each sketch is drawn to the length that the norm says, so that a delta and its opposite leave nothing. What a
    preview leaves out has no sketch, and nothing in common with the rest.
    """
    if len(items) == 1:
        return items[0].size ** 2
    total = np.zeros(SKETCH_SIZE)
    alone = 0.0
    for item in items:
        length = float(np.linalg.norm(item.part)) if item.part is not None else 0.0
        if item.part is not None and length > 0 and math.isfinite(length) and math.isfinite(item.size):
            total += item.part * (item.size / length)
        elif item.part is None:
            alone += item.size**2
    return float(total @ total) + alone
