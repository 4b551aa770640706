"""How far a merge would be from the full one at each of many budgets: facts once, one sequence of steps, no plan."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mergepipe.merge.budget import Budget
from mergepipe.merge.build import facts_of, jobs_of_plan
from mergepipe.merge.certificate import Item, distance, estimate, left_out
from mergepipe.merge.facts import Facts
from mergepipe.merge.method import Method
from mergepipe.merge.methods import find_method
from mergepipe.merge.plan import Plan
from mergepipe.merge.planner import full_bytes, items_of_model, update_bound
from mergepipe.merge.selection import by_sketch, within_bytes
from mergepipe.store.store import Store

SHARES: Final = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0)
"""The budgets of a sweep, as shares of a full read."""
EVERYTHING: Final = Budget(relative_error=0.0)
"""What to ask a plan for whose facts :func:`sweep` takes: the least that has the bound 0, which there always is."""


@dataclass(frozen=True, slots=True)
class Point:
    """What a plan with this budget would read, and its certificate.

    ``absolute`` and ``estimate`` are L2 distances from the full merge, at most and likely; infinite where no bound
    exists with so few bytes. ``preview_blocks`` and ``exact_blocks``: counted for every expert that has them.
    """

    budget_bytes: int
    expert_bytes: int
    absolute: float
    estimate: float
    preview_blocks: int
    preview_bytes: int
    exact_blocks: int


@dataclass(frozen=True, slots=True)
class Sweep:
    """A curve with previews, where there are some, and one without.

    ``full_bytes``: what reading everything takes. ``raw_bytes``: the experts as whole models, uncompressed. ``update``:
    the bound on a merge that reads nothing; ``relative`` distances are shares of it. ``certain``: the least with the
    bound 0.
    """

    full_bytes: int
    raw_bytes: int
    certain: Point
    update: float
    with_previews: tuple[Point, ...]
    exact_only: tuple[Point, ...]

    @property
    def best(self) -> tuple[Point, ...]:
        """What a plan does unless it is told otherwise."""
        return self.with_previews or self.exact_only

    def relative(self, size: float) -> float | None:
        """A distance as a share of the update; None where there is no bound."""
        if not math.isfinite(size):
            return None
        return size / self.update if self.update > 0 else 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "expert_bytes_full": self.full_bytes,
            "raw_bytes": self.raw_bytes,
            "certain": self._point(self.certain),
            "update": self.update,
            "with_previews": [self._point(point) for point in self.with_previews],
            "exact_only": [self._point(point) for point in self.exact_only],
        }

    def _point(self, point: Point) -> dict[str, Any]:
        return {
            "budget_bytes": point.budget_bytes,
            "expert_bytes": point.expert_bytes,
            "share": point.expert_bytes / self.full_bytes if self.full_bytes else 0.0,
            "raw_share": point.expert_bytes / self.raw_bytes if self.raw_bytes else 0.0,
            "bound": point.absolute if math.isfinite(point.absolute) else None,
            "relative": self.relative(point.absolute),
            "likely": self.relative(point.estimate),
            "preview_blocks": point.preview_blocks,
            "preview_bytes": point.preview_bytes,
            "exact_blocks": point.exact_blocks,
        }


def curve(facts: Facts, method: Method, budgets: Iterable[int], *, previews: bool = True) -> list[Point]:
    """A point for each budget of stored bytes, but for those that are less than the adapters take.

    ``facts``: with norms. ``previews``: whether previews may be read in place of blocks.
    """
    return _points(facts, items_of_model(facts, method, previews=previews), budgets)


def _points(facts: Facts, items: Sequence[Item], budgets: Iterable[int]) -> list[Point]:
    steps = by_sketch(items)
    full = full_bytes(facts)
    found = []
    for budget in budgets:
        if budget < facts.adapter_bytes:
            continue
        if budget >= full:
            chosen = set(range(len(items)))
        else:
            chosen = set(within_bytes(items, steps, budget - facts.adapter_bytes))
        found.append(_point(facts, items, chosen, budget))
    return found


def _point(facts: Facts, items: Sequence[Item], chosen: set[int], budget: int) -> Point:
    unread = left_out(items, chosen)
    absolute = distance(unread)
    coarse = [n for n in chosen if items[n].preview and n + 1 not in chosen]
    exact = [n for n in chosen if not items[n].preview]
    return Point(
        budget_bytes=budget,
        expert_bytes=facts.adapter_bytes + sum(items[number].stored_bytes for number in chosen),
        absolute=absolute,
        estimate=min(estimate(unread), absolute) if math.isfinite(absolute) else math.inf,
        preview_blocks=sum(_experts(facts, items[number]) for number in coarse),
        preview_bytes=sum(items[number].stored_bytes for number in coarse),
        exact_blocks=sum(_experts(facts, items[number]) for number in exact),
    )


def _experts(facts: Facts, item: Item) -> int:
    """How many experts have the item's blocks."""
    places = facts.tensors[item.tensor].places
    found = bisect_left(places, item.index, key=lambda place: place.index)
    return sum(len(places[found].groups[group].experts) for group in item.groups)


def sweep(facts: Facts, method: Method, shares: Sequence[float] = SHARES, *, previews: bool = True) -> Sweep:
    """Curves over budgets that are shares of a full read, and the least budget that has the bound 0."""
    full = full_bytes(facts)
    budgets = [int(full * share) for share in shares]
    exact = items_of_model(facts, method, previews=False)
    needed = {number for number, item in enumerate(exact) if item.error > 0 or not item.stored_bytes}
    least = facts.adapter_bytes + sum(exact[number].stored_bytes for number in needed)
    items = items_of_model(facts, method) if previews else []
    coarse = any(item.preview for item in items)
    return Sweep(
        full_bytes=full,
        raw_bytes=sum(tensor.entry.nbytes * len(tensor.job.experts) for tensor in facts.tensors),
        certain=_point(facts, exact, needed, least),
        update=update_bound(exact),
        with_previews=tuple(_points(facts, items, budgets)) if coarse else (),
        exact_only=tuple(_points(facts, exact, budgets)),
    )


def facts_for_sweep(store: Store, plan: Plan) -> tuple[Facts, Method]:
    """All that is known of what a plan merges: with norms, whatever the plan itself needed."""
    method = find_method(plan.method)
    models, jobs = jobs_of_plan(store, plan)
    return facts_of(store, models, jobs, plan.settings, method, bounded=True), method
