"""A plan from a file, held against this store: what it says must be what the planner would say of the same reads."""

from __future__ import annotations

import math

from mergepipe.merge.certificate import distance, items_of
from mergepipe.merge.facts import TensorFacts, gather
from mergepipe.merge.methods import find_method
from mergepipe.merge.plan import Input, Plan
from mergepipe.merge.planner import coefficients_of, keeps_base, trim
from mergepipe.store.dtypes import DTYPES
from mergepipe.store.errors import BadInputError, BudgetError, NotFoundError, UsageError
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.store import Store

_AGAIN = "The plan was edited, or made for other objects. Make it again with `mp plan`."


def check_plan(store: Store, plan: Plan) -> tuple[Snapshot, list[Snapshot]]:
    """The inputs' snapshots, where the plan holds.

    Raises:
        NotFoundError: a commit is not in this store.
        BadInputError: anything in the plan is not what follows from its own commits, method and reads.
        BudgetError: its reads cost more than its budget.
    """
    try:
        method = find_method(plan.method)
        method.settle(plan.parameters, "the plan", per_expert=False)
        for expert in plan.experts:
            method.settle(expert.parameters, f"expert {expert.name!r} of the plan", per_expert=True)
    except UsageError as error:
        raise BadInputError(error.message, hint=error.hint) from error
    if plan.method_version != method.version:
        raise BadInputError(
            f"the plan is for version {plan.method_version} of {method.name}, this is {method.version}", hint=_AGAIN
        )
    wanted = {parameter.name for parameter in method.parameters if parameter.per_expert}
    if not plan.experts or any(set(expert.parameters) != wanted for expert in plan.experts):
        raise BadInputError("the plan's experts do not have exactly the method's parameters", hint=_AGAIN)
    if plan.dtype is not None and (plan.dtype not in DTYPES or not DTYPES[plan.dtype].has_statistics):
        raise BadInputError(f"the plan's dtype {plan.dtype!r} is not one to merge to", hint=_AGAIN)
    base = _snapshot(store, plan.base, "base")
    experts = [_snapshot(store, item, f"expert {item.name!r}") for item in plan.experts]
    facts, missing = gather(store, base, experts, [item.name for item in plan.experts], method)
    if not missing:
        _check_derived(plan, facts)
    _check_reads(plan, base)
    return base, experts


def _snapshot(store: Store, item: Input, what: str) -> Snapshot:
    try:
        return store.snapshot_of(item.commit)
    except NotFoundError:
        raise NotFoundError(
            f"the plan's {what} is commit {item.commit.short}, which is not in this store",
            hint="Ingest it here first, or run the plan where it was made.",
        ) from None


def _check_reads(plan: Plan, base: Snapshot) -> None:
    everywhere = plan.dtype is not None or not keeps_base(find_method(plan.method), plan.experts, plan.parameters)
    for name, tensor in plan.tensors.items():
        entry = base.tensors.get(name)
        if entry is None or not entry.element_type.has_statistics:
            raise BadInputError(
                f"the plan computes tensor {name!r}, which the base has not, or not as floats", hint=_AGAIN
            )
        for indices in tensor.reads:
            if indices and indices[-1] >= len(entry.blocks):
                raise BadInputError(
                    f"the plan reads block {indices[-1]} of {name!r}, which has {len(entry.blocks)}", hint=_AGAIN
                )
    if everywhere:
        floats = {name for name, entry in base.tensors.items() if entry.element_type.has_statistics and entry.blocks}
        if not floats <= set(plan.tensors):
            raise BadInputError(f"the plan leaves out tensor {min(floats - set(plan.tensors))!r}", hint=_AGAIN)


def _check_derived(plan: Plan, facts: list[TensorFacts]) -> None:
    """Costs, thresholds and bounds must be what the plan's own reads make them."""
    method = find_method(plan.method)
    unread_all = []
    expert_bytes = 0
    for number, tensor in enumerate(facts):
        planned = plan.tensors.get(tensor.name)
        trims = trim(tensor, method, plan.experts)
        coefficients = coefficients_of(method, plan.experts, plan.parameters, [bits for bits, _ in trims])
        items = items_of(number, tensor, method, coefficients)
        groups = {place.index: place.groups for place in tensor.places}
        reads = [set(indices) for indices in planned.reads] if planned else [set() for _ in plan.experts]
        unread = []
        for item in items:
            members = [expert for group in item.groups for expert in groups[item.index][group].experts]
            read = [item.index in reads[expert] for expert in members]
            if any(read) and not all(read):
                raise BadInputError(f"the plan reads a part of what belongs together in {tensor.name!r}", hint=_AGAIN)
            if all(read):
                expert_bytes += item.stored_bytes
            else:
                unread.append(item)
        if planned is None:
            if unread:
                raise BadInputError(f"the plan does not speak of tensor {tensor.name!r}, which differs", hint=_AGAIN)
            continue
        if [bits for bits, _ in trims] != list(planned.thresholds) or [k for _, k in trims] != list(planned.kept):
            raise BadInputError(f"the plan's thresholds of {tensor.name!r} are not those of its inputs", hint=_AGAIN)
        _same(distance(unread), planned.bound, f"bound of {tensor.name!r}")
        unread_all += unread
    _same(distance(unread_all), plan.bound.absolute, "bound")
    if expert_bytes != plan.costs.expert_bytes:
        raise BadInputError(
            f"the plan says that it reads {plan.costs.expert_bytes} expert bytes; its reads take {expert_bytes}",
            hint=_AGAIN,
        )
    if plan.budget_bytes is not None and expert_bytes > plan.budget_bytes:
        raise BudgetError(
            f"the plan's reads take {expert_bytes} bytes, more than its budget of {plan.budget_bytes}", hint=_AGAIN
        )


def _same(found: float, claimed: float, what: str) -> None:
    if not math.isclose(found, claimed, rel_tol=1e-9, abs_tol=1e-300):
        raise BadInputError(f"the plan's {what} is {claimed:g}, and follows as {found:g}", hint=_AGAIN)
