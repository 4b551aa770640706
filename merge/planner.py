"""From facts to a plan: pure, deterministic, and without reading a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mergepipe.merge.budget import Budget
from mergepipe.merge.certificate import Item, distance, items_of
from mergepipe.merge.facts import TensorFacts
from mergepipe.merge.method import Coefficients, Method, Value
from mergepipe.merge.methods import find_method
from mergepipe.merge.plan import Bound, Costs, Input, Plan, TensorPlan
from mergepipe.merge.selection import sequence, within_bytes, within_error
from mergepipe.store.chunking import MAXIMUM_BLOCK_BYTES
from mergepipe.store.dtypes import DTYPES, DType
from mergepipe.store.errors import BudgetError, UsageError

_INFINITE_BIN: Final = 0x7F80
_CANCELLED: Final = 2.0**-20  # weights that sum to less of their magnitudes are 0.1 + 0.2 - 0.3 in float32: rounding


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
    items = items_of_model(facts, method, experts, parameters, trims)
    full = sum(item.stored_bytes for item in items)
    draft = Plan(
        base=base,
        experts=tuple(experts),
        method=method.name,
        method_version=method.version,
        parameters=dict(parameters),
        dtype=dtype,
        budget_bytes=budget.in_bytes(full),
        tensors={},
        costs=Costs(0, full, 0, 0, 0),
        bound=Bound(0.0, 0.0, 0.0),
    )
    return complete(draft, facts, trims, items, _choose(items, budget, full))


def items_of_model(
    facts: Sequence[TensorFacts],
    method: Method,
    experts: Sequence[Input],
    parameters: Mapping[str, Value],
    trims: Sequence[list[tuple[int, int]]],
) -> list[Item]:
    """All that can be read or left out, tensor by tensor; raises UsageError where the parameters contradict."""
    items: list[Item] = []
    for number, tensor in enumerate(facts):
        thresholds = [bits for bits, _ in trims[number]]
        items += items_of(number, tensor, method, coefficients_of(method, experts, parameters, thresholds))
    return items


def complete(
    draft: Plan,
    facts: Sequence[TensorFacts],
    trims: Sequence[list[tuple[int, int]]],
    items: Sequence[Item],
    chosen: set[int],
) -> Plan:
    """The plan with what follows from reading the ``chosen`` items: each tensor's part, the costs, the certificate.

    Raises:
        BudgetError: no bound exists for what is not chosen.
        UsageError: blocks would become larger than blocks can be.
    """
    if draft.dtype is not None:
        _check_block_sizes(facts, DTYPES[draft.dtype])
    unread = [item for number, item in enumerate(items) if number not in chosen]
    bound = _bound(items, unread)
    if not math.isfinite(bound.absolute):
        culprit = next(facts[item.tensor].name for item in unread if not math.isfinite(item.error))
        raise BudgetError(
            f"no bound exists while {culprit!r} is not read whole (infinities, NaNs or weights of both signs)",
            hint="Merge without a budget, or with a larger one.",
        )
    reads = _reads(facts, draft.experts, [items[number] for number in sorted(chosen)])
    full = sum(item.stored_bytes for item in items)
    everywhere = draft.dtype is not None or not keeps_base(find_method(draft.method), draft.experts, draft.parameters)
    tensors, costs = _tensor_plans(facts, reads, trims, unread, full, sum_bytes(items, chosen), everywhere=everywhere)
    return replace(draft, tensors=tensors, costs=costs, bound=bound)


def _check_block_sizes(facts: Sequence[TensorFacts], dtype: DType) -> None:
    """A result is cut as its base is, so blocks of a wider type are larger; raises UsageError past the limit."""
    for tensor in facts:
        entry = tensor.entry
        if entry.blocks and entry.element_type.has_statistics:
            size = entry.block_span(0)[1] * dtype.bits // entry.element_type.bits
            if size > MAXIMUM_BLOCK_BYTES:
                raise UsageError(
                    f"as {dtype.name}, a block of {tensor.name!r} would have {size} bytes, over {MAXIMUM_BLOCK_BYTES}",
                    hint="Merge in the base's own type, and convert with `mp export --dtype`.",
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
        exact = math.fsum(float(weight) for weight in weights)
        with np.errstate(over="ignore"):
            total = np.float32(exact)
        if abs(exact) <= _CANCELLED * math.fsum(abs(float(weight)) for weight in weights):
            raise UsageError(
                "the weights sum to zero and are to be normalized", hint="Change a weight, or set normalize=false."
            )
        if not np.isfinite(total):
            raise UsageError("the weights are too large together", hint="Results are computed in float32.")
        divisor = total
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
    has the ``keep``-th largest element. NaNs count as infinities, which are as large as a threshold can be.
    """
    reaching = np.cumsum(histogram[::-1])
    place = max(int(np.searchsorted(reaching, keep)), len(histogram) - 1 - _INFINITE_BIN)
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
    return set(within_error(items, steps, budget.relative_error * _update(items)))


def _bound(items: Sequence[Item], unread: Sequence[Item]) -> Bound:
    absolute, update = distance(unread), _update(items)
    return Bound(absolute, absolute / update if update > 0 else 0.0, update)


def _update(items: Sequence[Item]) -> float:
    """The bound on the whole update, without what has none and so has to be read."""
    return distance([item for item in items if math.isfinite(item.error)])


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
