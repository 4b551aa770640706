"""From facts to a plan: pure, deterministic, and without reading a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mergepipe.merge.budget import Budget
from mergepipe.merge.certificate import Item, distance, estimate, items_of, left_out
from mergepipe.merge.facts import Facts, TensorFacts
from mergepipe.merge.holding import fits_in_memory
from mergepipe.merge.method import Coefficients, Method
from mergepipe.merge.plan import Bound, Costs, Plan, TensorPlan
from mergepipe.merge.selection import select_within_bytes, select_within_error
from mergepipe.store.chunking import MAXIMUM_BLOCK_BYTES
from mergepipe.store.dtypes import DTYPES, DType
from mergepipe.store.errors import BudgetError, UsageError


def make_plan(draft: Plan, facts: Facts, method: Method, budget: Budget, *, previews: bool = True) -> Plan:
    """The plan of a merge. ``draft`` has its inputs, method, settings and type, and nothing of what follows from them.

    ``previews``: whether a budget may be spent on previews, where there are some and the method takes them.

    Raises:
        BudgetError: the budget cannot be met, or no bound exists without reading more.
        UsageError: blocks would become larger than blocks can be.
    """
    full = full_bytes(facts)
    limit = budget.in_bytes(full)
    draft = replace(draft, budget_bytes=limit)
    if budget.covers(full) and not facts.bounded:
        return complete(draft, facts, method, None)
    items = items_of_model(facts, method, previews=previews)
    if limit is not None and limit < facts.adapter_bytes:
        raise BudgetError(
            f"the budget is {limit} bytes, and the adapters alone, which are read whole, take {facts.adapter_bytes}",
            hint="Give a larger budget; adapters are small beside models.",
        )
    if limit is not None:
        chosen = select_within_bytes(items, limit - facts.adapter_bytes)
    else:
        assert budget.relative_error is not None
        chosen = select_within_error(items, budget.relative_error * update_bound(items))
    return complete(draft, facts, method, (items, set(chosen)))


def full_bytes(facts: Facts) -> int:
    """The expert bytes that reading everything takes."""
    return facts.adapter_bytes + sum(
        _readings(tensor) * sum(group.stored_bytes for place in tensor.places for group in place.groups)
        for tensor in facts.tensors
    )


def items_of_model(facts: Facts, method: Method, *, previews: bool = True) -> list[Item]:
    """All that can be read or left out, tensor by tensor."""
    numbered = enumerate(facts.tensors)
    return [item for number, tensor in numbered for item in items_of(number, tensor, method, previews=previews)]


def complete(draft: Plan, facts: Facts, method: Method, choice: tuple[Sequence[Item], set[int]] | None) -> Plan:
    """The plan with what follows from reading the chosen items: each tensor's part, the costs, the certificate.

    ``choice``: all items, and the numbers of those to read; None where everything is read.

    Raises:
        BudgetError: no bound exists for what is not chosen.
        UsageError: blocks would become larger than blocks can be.
    """
    if draft.dtype is not None:
        _check_block_sizes(facts.tensors, DTYPES[draft.dtype])
    full = full_bytes(facts)
    if choice is None:
        reads = {number: everything(tensor) for number, tensor in enumerate(facts.tensors) if tensor.places}
        tensors, costs = _tensor_plans(draft, facts, method, reads, {}, {})
        nothing_left = Bound(0.0, 0.0, 0.0, None)
        return replace(draft, tensors=tensors, costs=replace(costs, expert_bytes=full), bound=nothing_left)
    items, chosen = choice
    unread = left_out(items, chosen)
    bound = _bound(items, unread, facts)
    left: dict[int, list[Item]] = {}
    for item in unread:
        left.setdefault(item.tensor, []).append(item)
    exact, coarse = _read_items(items, chosen)
    reads, previews = _reads(facts.tensors, exact), _reads(facts.tensors, coarse)
    tensors, costs = _tensor_plans(draft, facts, method, reads, previews, left)
    expert_bytes = facts.adapter_bytes + sum(items[number].stored_bytes for number in chosen)
    return replace(draft, tensors=tensors, costs=replace(costs, expert_bytes=expert_bytes), bound=bound)


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


def update_bound(items: Sequence[Item]) -> float:
    """The bound on the whole update, without what has none and so has to be read."""
    return distance([item for item in left_out(items, ()) if math.isfinite(item.error)])


def _bound(items: Sequence[Item], unread: Sequence[Item], facts: Facts) -> Bound:
    absolute, update = distance(unread), update_bound(items)
    if not math.isfinite(absolute):
        culprit = next(facts.tensors[item.tensor].name for item in unread if not math.isfinite(item.error))
        raise BudgetError(
            f"no bound exists while {culprit!r} is not read whole (infinities, NaNs, weights of both signs, or a "
            "method that has none)",
            hint="Merge without a budget, or with a larger one.",
        )
    return Bound(absolute, absolute / update if update > 0 else 0.0, min(estimate(unread), absolute), update)


def everything(facts: TensorFacts) -> list[list[int]]:
    """For each expert, all blocks in which it differs from the reference."""
    reads: list[list[int]] = [[] for _ in facts.job.experts]
    for place in facts.places:
        for group in place.groups:
            for expert in group.experts:
                reads[expert].append(place.index)
    return reads


def _read_items(items: Sequence[Item], chosen: set[int]) -> tuple[list[Item], list[Item]]:
    """Of the chosen items, those whose blocks are read, and those of which the preview alone is."""
    exact, coarse = [], []
    for number in sorted(chosen):
        if not items[number].preview:
            exact.append(items[number])
        elif number + 1 not in chosen:
            coarse.append(items[number])
    return exact, coarse


def _reads(facts: Sequence[TensorFacts], chosen: Sequence[Item]) -> dict[int, list[list[int]]]:
    """For each tensor and expert, which blocks are read."""
    reads: dict[int, list[list[int]]] = {}
    places = {(number, place.index): place for number, tensor in enumerate(facts) for place in tensor.places}
    for item in chosen:
        lists = reads.setdefault(item.tensor, [[] for _ in facts[item.tensor].job.experts])
        place = places[item.tensor, item.index]
        for group in item.groups:
            for expert in place.groups[group].experts:
                lists[expert].append(item.index)
    return reads


def computed_everywhere(draft: Plan, facts: TensorFacts, method: Method) -> bool:
    """Whether blocks are computed in which no expert differs from the reference."""
    entry = facts.entry
    if not entry.element_type.has_statistics:
        return False
    if draft.dtype is not None and draft.dtype != entry.dtype:
        return True
    return bool(facts.job.experts) and not method.stays(facts.problem, facts.coefficients, differs=bool(facts.places))


def needs_passes(tensor: TensorFacts, method: Method) -> bool:
    """Whether the tensor's coefficients are not known yet, and are needed."""
    if tensor.settled or not tensor.job.experts:
        return False
    return bool(tensor.places) or not method.stays(tensor.problem, tensor.coefficients, differs=False)


def _readings(tensor: TensorFacts) -> int:
    """How often a tensor's inputs are read: again after each pass, where they cannot be held until then."""
    return 1 if tensor.settled or fits_in_memory(tensor.job) else 1 + tensor.passes


def _tensor_plans(
    draft: Plan,
    facts: Facts,
    method: Method,
    reads: Mapping[int, list[list[int]]],
    previews: Mapping[int, list[list[int]]],
    left: Mapping[int, list[Item]],
) -> tuple[dict[str, TensorPlan], Costs]:
    plans: dict[str, TensorPlan] = {}
    base_bytes = computed = referenced = 0
    for number, tensor in enumerate(facts.tensors):
        lists = reads.get(number, [[] for _ in tensor.job.experts])
        coarse = previews.get(number, [[] for _ in tensor.job.experts])
        touched = set().union(*lists, *coarse)
        blocks = len(tensor.entry.blocks)
        if computed_everywhere(draft, tensor, method):
            touched = set(range(blocks))
        before = tensor.passes if needs_passes(tensor, method) else 0  # a pass sees the whole tensor
        if before and fits_in_memory(tensor.job):
            base_bytes += sum(tensor.base_bytes)
        else:
            base_bytes += sum(tensor.base_bytes) * before + sum(tensor.base_bytes[index] for index in touched)
        computed += len(touched)
        referenced += blocks - len(touched)
        if touched or number in left or draft.complete:
            plans[tensor.name] = TensorPlan(
                setting=tensor.job.setting,
                sources=tensor.job.sources,
                reads=tuple(tuple(sorted(indices)) for indices in lists),
                previews=tuple(tuple(sorted(indices)) for indices in coarse) if any(coarse) else None,
                pinned=pinned(method, tensor.coefficients) if tensor.settled and tensor.places else {},
                bound=distance(left.get(number, [])),
            )
    return plans, Costs(0, full_bytes(facts), base_bytes, computed, referenced)


def pinned(method: Method, coefficients: Coefficients) -> dict[str, tuple[float | int, ...]]:
    """The coefficients that a plan shows."""
    return {name: tuple(coefficients[name].reshape(-1).tolist()) for name in method.pinned if name in coefficients}
