"""From what a user asks for to a plan: names become commits, parameters are checked, statistics are found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mergepipe.merge.budget import Budget
from mergepipe.merge.facts import TensorFacts, gather
from mergepipe.merge.method import Method, Value
from mergepipe.merge.methods import find_method
from mergepipe.merge.plan import Input, Plan
from mergepipe.merge.planner import make_plan
from mergepipe.store.analyze import analyze
from mergepipe.store.convert import check_conversion
from mergepipe.store.errors import UsageError
from mergepipe.store.parallel import Progress
from mergepipe.store.snapshot import Snapshot
from mergepipe.store.store import Store


@dataclass(frozen=True, slots=True)
class Expert:
    """An expert as a user names it: a ref (or anything that resolves), and its parameters."""

    name: str
    parameters: Mapping[str, Value] = field(default_factory=dict)


def parse_expert(text: str) -> Expert:
    """``math``, ``math:0.6``, ``math:0.6,density=0.2``, ``math,weight=0.6``; raises UsageError."""
    head, *settings = text.split(",")
    name, colon, weight = head.partition(":")
    parameters: dict[str, Value] = {}
    if colon:
        parameters["weight"] = _number(weight, text)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"{text!r}: {setting!r} is not NAME=VALUE", hint="Write REF:WEIGHT,density=0.2")
        if key.strip() in parameters:
            raise UsageError(f"{text!r} gives {key.strip()} twice", hint="Give it once.")
        parameters[key.strip()] = parse_value(value, text)
    if not name:
        raise UsageError(f"{text!r} names no expert", hint="Write REF or REF:WEIGHT.")
    return Expert(name, parameters)


def parse_value(text: str, where: str) -> Value:
    """A number, ``true`` or ``false``; raises UsageError."""
    lowered = text.strip().lower()
    return lowered == "true" if lowered in ("true", "false") else _number(text, where)


def plan_merge(
    store: Store,
    base: str,
    experts: Sequence[Expert],
    method: str,
    *,
    parameters: Mapping[str, Value] | None = None,
    budget: Budget | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Make a plan. Where statistics are missing, the tensors concerned are read once, and the statistics kept.

    ``parameters`` are the method's, for the whole merge; one that each expert may have is the default for all.

    Raises:
        NotFoundError: a ref does not exist.
        UsageError: an unknown method or parameter, or a value out of its range.
        BadInputError: an expert does not fit the base.
        BudgetError: the budget cannot be met.
    """
    found = find_method(method)
    given = dict(parameters or {})
    shared = {name: value for name, value in given.items() if found.parameter(name).per_expert}
    own = {name: value for name, value in given.items() if name not in shared}
    settled = found.settle(own, f"--method {method}", per_expert=False)
    base_input = Input(store.resolve(base), base)
    inputs = [_input(store, expert, found, shared) for expert in experts]
    target = check_conversion(dtype).name if dtype is not None else None
    snapshots = [store.snapshot_of(item.commit) for item in inputs]
    origin = store.snapshot_of(base_input.commit)
    facts = facts_of(store, origin, snapshots, [item.name for item in inputs], found, progress)
    return make_plan(facts, base_input, inputs, found, settled, budget or Budget(), target)


def facts_of(
    store: Store,
    base: Snapshot,
    experts: Sequence[Snapshot],
    names: Sequence[str],
    method: Method,
    progress: Progress | None = None,
) -> list[TensorFacts]:
    """All that the planner needs to know. Where statistics are missing, the tensors concerned are read, and they stay.

    Raises:
        BadInputError: an expert does not fit the base.
    """
    facts, missing = gather(store, base, experts, names, method)
    if missing:
        pairs = [(base.tensors[gap.tensor], experts[gap.expert].tensors[gap.tensor]) for gap in missing]
        analyze(store, pairs, progress)
        facts, missing = gather(store, base, experts, names, method)
        assert not missing
    return facts


def _input(store: Store, expert: Expert, method: Method, shared: Mapping[str, Value]) -> Input:
    for name in expert.parameters:
        if not method.parameter(name).per_expert:
            raise UsageError(f"expert {expert.name!r}: {name} is one for the whole merge", hint=f"Use --param {name}=…")
    settled = method.settle({**shared, **expert.parameters}, f"expert {expert.name!r}", per_expert=True)
    return Input(store.resolve(expert.name), expert.name, settled)


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{where!r}: {text!r} is not a number") from None
