"""A plan from a file, held against this store: what it says must be what the planner would say of the same reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergepipe.merge.assemble import head_of, jobs_of, source_layers
from mergepipe.merge.build import facts_of
from mergepipe.merge.certificate import Item
from mergepipe.merge.checked import CheckedPlan
from mergepipe.merge.facts import Facts
from mergepipe.merge.inputs import open_models
from mergepipe.merge.method import Method, Value
from mergepipe.merge.methods import find_method
from mergepipe.merge.plan import Plan, commits_of
from mergepipe.merge.planner import complete, everything, items_of_model
from mergepipe.store.dtypes import DTYPES
from mergepipe.store.errors import BadInputError, BudgetError, UsageError
from mergepipe.store.parallel import Progress
from mergepipe.store.snapshot import being_read
from mergepipe.store.store import Store

_AGAIN = "The plan was edited, or made for other objects. Make it again with `mp plan`."


def check_plan(store: Store, plan: Plan, progress: Progress | None = None) -> CheckedPlan:
    """The plan, where it holds. Statistics that this store lacks are made first, as for a new plan.

    What follows from the inputs' content must be as the plan says. Its bytes need not be: another store may keep the
    same blocks in other encodings. They are counted anew for this one, and the budget is held to that.

    Raises:
        NotFoundError: a commit is not in this store.
        BadInputError: anything in the plan is not what follows from its own commits, method and reads.
        BudgetError: its reads cost more than its budget, or leave out what no bound exists for.
        ConflictError: a commit was collected meanwhile.
    """
    try:
        method = _check_method(plan)
        _check_head(plan)
        with being_read(store.layout, commits_of(plan.models)):
            models = open_models(store, plan.models)
            bounded = plan.bound.update is not None
            jobs = jobs_of(models, plan)
            facts = facts_of(store, models, jobs, plan.settings, method, bounded=bounded, progress=progress)
        here = _check_derived(plan, facts, method)
    except UsageError as error:
        raise BadInputError(error.message, hint=error.hint or _AGAIN) from error
    return CheckedPlan(here, method, models, facts)


def _check_method(plan: Plan) -> Method:
    method = find_method(plan.method)
    if plan.method_version != method.version:
        raise BadInputError(
            f"the plan is for version {plan.method_version} of {method.name}, this is {method.version}", hint=_AGAIN
        )
    if not plan.experts:
        raise BadInputError("the plan has no experts", hint=_AGAIN)
    if plan.base.parameters or plan.base.kind != "model":
        raise BadInputError("the plan gives the base parameters, which it has not, or no whole model", hint=_AGAIN)
    if plan.variants and not plan.complete:
        raise BadInputError("the plan has variants, and does not list all tensors", hint=_AGAIN)
    for number, setting in enumerate(plan.settings):
        if number and not setting.experts:
            continue
        where = "the plan" if not number else f"variant {number} of the plan"
        if number or not plan.complete:
            method.check_inputs(len(setting.experts), based=setting.based)
        _check_parameters(setting.parameters, method, where, per_expert=False)
        for expert, own in zip(setting.experts, setting.own, strict=True):
            name = plan.models[expert].name
            _check_parameters(own, method, f"expert {name!r} of {where}", per_expert=True)
    if plan.dtype is not None and (plan.dtype not in DTYPES or not DTYPES[plan.dtype].has_statistics):
        raise BadInputError(f"the plan's dtype {plan.dtype!r} is not one to merge to", hint=_AGAIN)
    return method


def _check_head(plan: Plan) -> None:
    """What the plan's head and its ``config`` say has to follow from its tensors; raises BadInputError."""
    dtype = {"torch_dtype": DTYPES[plan.dtype].torch_name} if plan.dtype is not None else {}
    layers = {"num_hidden_layers": plan.config["num_hidden_layers"]} if "num_hidden_layers" in plan.config else {}
    if dict(plan.config) != {**dtype, **layers}:
        raise BadInputError("the plan's config is not what follows from its dtype", hint=_AGAIN)
    if layers and not (plan.complete and layers["num_hidden_layers"] == len(source_layers(plan))):
        raise BadInputError("the plan's config has another number of layers than its tensors", hint=_AGAIN)
    if plan.complete and plan.variants and all(planned.setting for planned in plan.tensors.values()):
        own = [expert.parameters for expert in plan.experts]
        if (plan.parameters, own, plan.based) != head_of(plan.variants, len(plan.experts)):
            raise BadInputError("the plan's head does not say what its variants do", hint=_AGAIN)


def _check_parameters(found: Mapping[str, Value], method: Method, where: str, *, per_expert: bool) -> None:
    """All parameters of this scope and no other, each with a value of its type; raises UsageError, BadInputError."""
    settled = method.settle(found, where, per_expert=per_expert)
    if {name: (type(value), value) for name, value in found.items()} != {
        name: (type(value), value) for name, value in settled.items()
    }:
        raise BadInputError(f"{where} does not have exactly the method's parameters: {', '.join(settled)}", hint=_AGAIN)


def _check_derived(plan: Plan, facts: Facts, method: Method) -> Plan:
    """The plan with its costs here; all but inputs, reads, budget and bytes must be what the planner makes of these."""
    if plan.bound.update is None:
        _check_reads_everything(plan, facts)
        honest = complete(plan, facts, method, None)
    else:
        items = items_of_model(facts, method)
        honest = complete(plan, facts, method, (items, _chosen(plan, facts, items)))
    if plan.budget_bytes is not None and honest.costs.expert_bytes > plan.budget_bytes:
        raise BudgetError(
            f"the plan's reads take {honest.costs.expert_bytes} bytes, more than its budget of {plan.budget_bytes}",
            hint=_AGAIN,
        )
    bytes_here = {name: getattr(honest.costs, name) for name in ("expert_bytes", "expert_bytes_full", "base_bytes")}
    here = replace(plan, costs=replace(plan.costs, **bytes_here))
    difference = _difference(honest.as_json(), here.as_json())
    if difference:
        raise BadInputError(difference, hint=_AGAIN)
    return here


def _check_reads_everything(plan: Plan, facts: Facts) -> None:
    """Raises BadInputError where a plan without a certificate leaves something out."""
    for tensor in facts.tensors:
        planned = plan.tensors.get(tensor.name)
        wanted = tuple(tuple(sorted(indices)) for indices in everything(tensor))
        if (planned.reads if planned else ((),) * len(wanted)) != wanted or (planned and planned.previews):
            raise BadInputError(f"the plan says that it reads everything, and does not in {tensor.name!r}", hint=_AGAIN)


def _chosen(plan: Plan, facts: Facts, items: Sequence[Item]) -> set[int]:
    """Numbers of the items that the plan reads; raises BadInputError where its reads are no set of items."""
    exact = _places_read(plan, facts, coarse=False)
    coarse = _places_read(plan, facts, coarse=True)
    groups = {
        (number, place.index): place.groups for number, tensor in enumerate(facts.tensors) for place in tensor.places
    }
    chosen = set()
    for number, item in enumerate(items):
        name = facts.tensors[item.tensor].name
        members = {
            (name, item.index, expert)
            for group in item.groups
            for expert in groups[item.tensor, item.index][group].experts
        }
        wanted = exact | coarse if item.preview else exact
        if members <= wanted:
            chosen.add(number)
        elif members & wanted:
            raise BadInputError(f"the plan reads a part of what belongs together in {name!r}", hint=_AGAIN)
        if item.preview:
            coarse -= members
        else:
            exact -= members
    if coarse:
        name, index, expert = min(coarse)
        raise BadInputError(
            f"the plan reads a preview of block {index} of {name!r} of expert {expert}, and this store has none that "
            "is worth it",
            hint="Make it with `mp analyze EXPERT --previews`, or make the plan again.",
        )
    if exact:
        name, index, expert = min(exact)
        raise BadInputError(
            f"the plan reads block {index} of {name!r} of expert {expert}, which is the base's own, or does not exist",
            hint=_AGAIN,
        )
    return chosen


def _places_read(plan: Plan, facts: Facts, *, coarse: bool) -> set[tuple[str, int, int]]:
    """Tensor, block and expert of all that the plan reads, or of all previews that it reads."""
    return {
        (tensor.name, index, expert)
        for tensor in facts.tensors
        if tensor.name in plan.tensors
        for expert, levels in enumerate(plan.tensors[tensor.name].levels)
        for index in levels[coarse]
    }


def _difference(found: Any, claimed: Any, path: tuple[str, ...] = ()) -> str | None:
    """The first place where two plans' JSON forms differ, as a sentence; numbers may differ by rounding."""
    if isinstance(found, dict):
        for name in sorted(found.keys() | claimed.keys()):
            if name not in claimed:
                return f"the plan does not speak of {name!r}, which differs from the base or is to be converted"
            if name not in found:
                return f"the plan speaks of {name!r}, where there is nothing to do"
            difference = _difference(found[name], claimed[name], (*path, name))
            if difference:
                return difference
        return None
    if isinstance(found, float) and math.isclose(found, claimed, rel_tol=1e-9, abs_tol=1e-300):
        return None
    return None if found == claimed else f"the plan's {' '.join(path)} is {claimed}, and follows as {found}"
