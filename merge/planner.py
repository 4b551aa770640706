"""From facts to a plan: pure, deterministic, and without reading a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.budget import Budget
from mergepipe.merge.certificate import Item, distance, items_of
from mergepipe.merge.facts import TensorFacts
from mergepipe.merge.method import Coefficients, Method, Value
from mergepipe.merge.plan import Bound, Costs, Input, Plan, TensorPlan
from mergepipe.merge.selection import sequence, within_bytes, within_error
from mergepipe.store.errors import BudgetError, UsageError


def make_plan(
    facts: Sequence[TensorFacts],
    base: Input,
    experts: Sequence[Input],
    method: Method,
    parameters: Mapping[str, Value],
    budget: Budget,
    dtype: str | None = None,
) -> Plan:
    """The plan of a merge. ``experts`` and ``parameters`` have all of the method's parameters settled.

    Raises:
        BudgetError: the budget cannot be met, or no bound exists without reading more.
        UsageError: the parameters contradict each other.
    """
    if not experts:
        raise UsageError("a merge needs at least one expert", hint="Add --expert REF:WEIGHT.")
    trims = [trim(tensor, method, experts) for tensor in facts]
    settled = [coefficients_of(method, experts, parameters, [bits for bits, _ in trimmed]) for trimmed in trims]
    items = [item for number, tensor in enumerate(facts) for item in items_of(number, tensor, method, settled[number])]
    full = sum(item.stored_bytes for item in items)
    chosen = _choose(items, budget, full)
    unread = [item for number, item in enumerate(items) if number not in chosen]
    bound = _bound(items, unread)
    if not math.isfinite(bound.absolute):
        culprit = next(facts[item.tensor].name for item in unread if math.isinf(item.error) or math.isnan(item.error))
        raise BudgetError(
            f"no bound exists while {culprit!r} is not read whole (infinities, NaNs or weights of both signs)",
            hint="Merge without a budget, or with a larger one.",
        )
    reads = _reads(facts, experts, [items[number] for number in sorted(chosen)])
    everywhere = dtype is not None or not keeps_base(method, experts, parameters)
    tensors, costs = _tensor_plans(facts, reads, trims, unread, full, sum_bytes(items, chosen), everywhere=everywhere)
    return Plan(
        base=base,
        experts=tuple(experts),
        method=method.name,
        method_version=method.version,
        parameters=dict(parameters),
        dtype=dtype,
        budget_bytes=budget.in_bytes(full),
        tensors=tensors,
        costs=costs,
        bound=bound,
    )


def coefficients_of(
    method: Method, experts: Sequence[Input], parameters: Mapping[str, Value], thresholds: Sequence[int]
) -> Coefficients:
    """What ``apply`` gets for a tensor with these thresholds; raises UsageError for weights that sum to zero."""
    weights = np.array([float(expert.parameters["weight"]) for expert in experts], np.float32)
    normalize = bool(parameters.get("normalize", False))
    divisor = np.float32(1)
    scale = np.float32(float(parameters.get("lambda", 1.0)))
    if normalize and method.error == "additive":
        total = np.float32(math.fsum(float(weight) for weight in weights))
        if total == 0:
            raise UsageError(
                "the weights sum to zero and are to be normalized", hint="Change a weight, or set normalize=false."
            )
        if method.takes == "weights":
            divisor = total
        else:
            scale = np.float32(scale / total)
    return Coefficients(weights, np.array(thresholds, np.uint32), scale, divisor, normalize)


def keeps_base(method: Method, experts: Sequence[Input], parameters: Mapping[str, Value]) -> bool:
    """Whether a block in which no expert differs from the base is the base's own block in the result."""
    if method.takes == "deltas" or parameters.get("normalize", False):
        return True
    return math.fsum(float(expert.parameters["weight"]) for expert in experts) == 1.0


def trim(tensor: TensorFacts, method: Method, experts: Sequence[Input]) -> list[tuple[int, int]]:
    """For each expert the threshold's bit pattern, and how many elements it keeps (0 and -1 where all are kept)."""
    found = []
    for expert, histogram in zip(experts, tensor.histograms, strict=True):
        density = float(expert.parameters.get("density", 1.0))
        if not method.thresholds or histogram is None or density >= 1:
            found.append((0, -1))
        else:
            found.append(threshold_of(histogram, max(int(density * tensor.entry.elements), 1)))
    return found


def threshold_of(histogram: NDArray[np.int64], keep: int) -> tuple[int, int]:
    """The magnitude (float32 bits) that at least ``keep`` elements reach, and how many reach it.

    The histogram's bins are the upper 16 bits of a float32, so the threshold is the lowest magnitude of the bin that
    has the ``keep``-th largest element.
    """
    reaching = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(reaching, keep))
    if place >= len(histogram):
        return 0, int(reaching[-1])
    return (len(histogram) - 1 - place) << 16, int(reaching[place])


def sum_bytes(items: Sequence[Item], chosen: set[int]) -> int:
    """Stored bytes of the chosen items."""
    return sum(items[number].stored_bytes for number in chosen)


def _choose(items: Sequence[Item], budget: Budget, full: int) -> set[int]:
    limit = budget.in_bytes(full)
    if limit is None and budget.relative_error is None:
        return set(range(len(items)))
    steps = sequence(items)
    if limit is not None:
        return set(within_bytes(items, steps, limit))
    assert budget.relative_error is not None
    return set(within_error(items, steps, budget.relative_error * distance(items)))


def _bound(items: Sequence[Item], unread: Sequence[Item]) -> Bound:
    absolute = distance(unread)
    if not unread:
        finite = [item for item in items if math.isfinite(item.error)]
        return Bound(0.0, 0.0, distance(finite))
    update = distance(items)
    relative = absolute / update if math.isfinite(update) and update > 0 else 0.0
    return Bound(absolute, relative, update if math.isfinite(update) else absolute)


def _reads(
    facts: Sequence[TensorFacts], experts: Sequence[Input], chosen: Sequence[Item]
) -> dict[int, list[list[int]]]:
    """For each tensor and expert, which blocks are read."""
    reads: dict[int, list[list[int]]] = {}
    places = {(number, place.index): place for number, tensor in enumerate(facts) for place in tensor.places}
    for item in chosen:
        lists = reads.setdefault(item.tensor, [[] for _ in experts])
        place = places[item.tensor, item.index]
        for group in item.groups:
            for expert in place.groups[group].experts:
                lists[expert].append(item.index)
    return reads


def _tensor_plans(
    facts: Sequence[TensorFacts],
    reads: Mapping[int, list[list[int]]],
    trims: Sequence[list[tuple[int, int]]],
    unread: Sequence[Item],
    full: int,
    expert_bytes: int,
    *,
    everywhere: bool,
) -> tuple[dict[str, TensorPlan], Costs]:
    left: dict[int, list[Item]] = {}
    for item in unread:
        left.setdefault(item.tensor, []).append(item)
    plans: dict[str, TensorPlan] = {}
    base_bytes = computed = referenced = 0
    for number, tensor in enumerate(facts):
        lists = reads.get(number)
        touched = set().union(*lists) if lists else set()
        if everywhere and tensor.entry.element_type.has_statistics:
            touched = set(range(len(tensor.entry.blocks)))
        base_bytes += sum(tensor.base_bytes[index] for index in touched)
        computed += len(touched)
        referenced += len(tensor.entry.blocks) - len(touched)
        if touched or number in left:
            plans[tensor.name] = TensorPlan(
                reads=tuple(tuple(sorted(indices)) for indices in lists or [[] for _ in trims[number]]),
                thresholds=tuple(bits for bits, _ in trims[number]),
                kept=tuple(kept for _, kept in trims[number]),
                bound=distance(left.get(number, [])),
            )
    return plans, Costs(expert_bytes, full, base_bytes, computed, referenced)
