"""How far a merge can be from the full one, from norms alone.

An unread block's delta counts as zero; a read block is processed exactly as in the full merge. Blocks are disjoint sets
of elements, so the squared distance of the whole model is the sum over places of the squared distance at each.

*additive* methods (the result is linear in the deltas, with fixed coefficients c): at a place the distance is at most
``sum over unread groups of |sum of their c| * norm``. Where coefficients cancel, float32 sums leave a rest: a group's
factor is at least ``2**-22`` of the sum of their magnitudes, so a bound of 0 means that nothing is missing.

*consensus* (TIES): with all weights positive and normalization, each element of the mixed delta is a weighted mean of
some of the trimmed deltas, so its magnitude is at most the largest of theirs. If nothing is read at a place the result
is the base, and the distance is at most ``scale * sqrt(sum of norm^2)`` over the experts. Places are read whole or not
at all: with a part read the bound would be larger still. Without normalization the mean becomes a sum, and the bound is
``scale * sum of |w| * norm``. It is loose: what trimming removes is still counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mergepipe.merge.facts import Place, TensorFacts
from mergepipe.merge.method import Coefficients, Method

_REST: Final = 2.0**-22


@dataclass(frozen=True, slots=True)
class Item:
    """What can be read or left out as one: groups at one place.

    ``error``: what leaving it out adds to the distance at its place. ``stored_bytes``: what reading it takes.
    """

    tensor: int
    index: int
    groups: tuple[int, ...]
    error: float
    stored_bytes: int


def items_of(number: int, facts: TensorFacts, method: Method, coefficients: Coefficients) -> list[Item]:
    """All items of one tensor."""
    found: list[Item] = []
    for place in facts.places:
        if method.error == "consensus":
            error = _consensus_error(place, coefficients)
            cost = sum(group.stored_bytes for group in place.groups)
            found.append(Item(number, place.index, tuple(range(len(place.groups))), error, cost))
            continue
        for position, group in enumerate(place.groups):
            weights = [float(coefficients.weights[expert]) for expert in group.experts]
            weight = max(abs(math.fsum(weights)), _REST * math.fsum(abs(weight) for weight in weights))
            factor = weight * abs(float(coefficients.scale) / float(coefficients.divisor))
            error = factor * group.norm if math.isfinite(group.norm) else math.inf  # zero times infinity is a NaN
            found.append(Item(number, place.index, (position,), error, group.stored_bytes))
    return found


def _consensus_error(place: Place, coefficients: Coefficients) -> float:
    if not all(math.isfinite(group.norm) for group in place.groups):
        return math.inf
    scale = abs(float(coefficients.scale))
    if coefficients.normalize and all(weight >= 0 for weight in coefficients.weights):
        return scale * math.sqrt(sum(len(group.experts) * group.norm**2 for group in place.groups))
    if coefficients.normalize:
        return math.inf  # the divisor can be anything where weights of both signs agree
    return scale * sum(
        abs(float(coefficients.weights[expert])) * group.norm for group in place.groups for expert in group.experts
    )


def distance(items: Sequence[Item]) -> float:
    """The bound for a model that is merged without these items."""
    errors: dict[tuple[int, int], float] = {}
    for item in items:
        place = (item.tensor, item.index)
        errors[place] = errors.get(place, 0.0) + item.error
    return math.sqrt(math.fsum(error * error for error in errors.values()))
