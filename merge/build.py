"""From what a user asks for to a plan: names become commits, parameters are checked, statistics are found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mergepipe.merge.assemble import in_order, jobs_from, jobs_of, same_shapes
from mergepipe.merge.budget import Budget
from mergepipe.merge.checked import CheckedPlan
from mergepipe.merge.facts import Facts, gather
from mergepipe.merge.hints import preview_notes
from mergepipe.merge.inputs import Model, open_models
from mergepipe.merge.job import Job, Setting
from mergepipe.merge.measure import measure_missing
from mergepipe.merge.method import Method, Value
from mergepipe.merge.methods import find_method
from mergepipe.merge.passes import kept_settle, settle_all
from mergepipe.merge.plan import Bound, Costs, Input, Plan, commits_of
from mergepipe.merge.planner import full_bytes, make_plan
from mergepipe.store.convert import check_conversion
from mergepipe.store.digest import Digest
from mergepipe.store.dtypes import DTYPES
from mergepipe.store.errors import UsageError
from mergepipe.store.parallel import Progress
from mergepipe.store.snapshot import Snapshot, being_read
from mergepipe.store.store import Store

_KINDS = {"model": "model", "adapter": "adapter", "task_vector": "task_vector"}


@dataclass(frozen=True, slots=True)
class Expert:
    """An expert as a user names it: a ref (or anything that resolves), and its parameters.

    ``kind``: ``model``, ``adapter`` or ``task_vector``; "" finds out whether it is an adapter. ``onto``: the model
    that an adapter goes onto, where that is not the base.
    """

    name: str
    parameters: Mapping[str, Value] = field(default_factory=dict)
    kind: str = ""
    onto: str = ""


def parse_expert(text: str) -> Expert:
    """``math``, ``math:0.6``, ``math:0.6,density=0.2``, ``math,weight=0.6``, ``tv:0.5,as=task_vector``."""
    head, *settings = text.split(",")
    name, colon, weight = head.partition(":")
    parameters: dict[str, Value] = {}
    special = {"as": "", "onto": ""}
    if colon:
        parameters["weight"] = _number(weight, text)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"{text!r}: {setting!r} is not NAME=VALUE", hint="Write REF:WEIGHT,density=0.2")
        if key.strip() in special:
            special[key.strip()] = value.strip()
            continue
        if key.strip() in parameters:
            raise UsageError(f"{text!r} gives {key.strip()} twice", hint="Give it once.")
        parameters[key.strip()] = parse_value(value, text)
    if not name:
        raise UsageError(f"{text!r} names no expert", hint="Write REF or REF:WEIGHT.")
    if special["as"] and special["as"] not in _KINDS:
        raise UsageError(f"{text!r}: an expert is kept as one of {', '.join(_KINDS)}")
    return Expert(name, parameters, special["as"], special["onto"])


def parse_value(text: str, where: str) -> Value:
    """A number, ``true`` or ``false``; raises UsageError."""
    lowered = text.strip().lower()
    return lowered == "true" if lowered in ("true", "false") else _number(text, where)


def plan_merge(
    store: Store,
    base: str | None,
    experts: Sequence[Expert],
    method: str,
    *,
    parameters: Mapping[str, Value] | None = None,
    budget: Budget | None = None,
    dtype: str | None = None,
    allow_missing: bool = False,
    previews: bool = True,
    progress: Progress | None = None,
    notes: list[str] | None = None,
) -> Plan:
    """Make a plan. Where statistics are missing, the tensors concerned are read once, and the statistics kept.

    ``base``: None where the method needs none; then the experts are compared with the model that all were ingested
    against, or with the first of them. ``parameters`` are the method's, for the whole merge; one that each expert may
    have is the default for all. ``previews``: whether a budget may be spent on previews. ``allow_missing``: each tensor
    is merged from the models that have it. ``notes`` gets what a user should know: vocabularies of different sizes are
    cut to the rows that all have; a budget could be spent on previews, or cannot.

    Raises:
        NotFoundError: a ref does not exist.
        UsageError: an unknown method or parameter, or a value out of its range.
        BadInputError: an expert does not fit the base.
        BudgetError: the budget cannot be met.
        ConflictError: a commit was collected meanwhile.
    """
    if not experts:
        raise UsageError("a merge needs at least one expert", hint="Add --expert REF:WEIGHT.")
    found = find_method(method)
    given = dict(parameters or {})
    shared = {name: value for name, value in given.items() if found.parameter(name).per_expert}
    own = {name: value for name, value in given.items() if name not in shared}
    settled = found.settle(own, f"--method {method}", per_expert=False)
    inputs = [_input(store, expert, found, shared) for expert in experts]
    based = base is not None and found.base != "unused"
    found.check_inputs(len(inputs), based=based)
    if base is None:
        _check_whole(inputs)
    origin = Input(store.resolve(base), base) if base is not None else common_base(store, inputs)
    target = check_conversion(dtype).name if dtype is not None else None
    with being_read(store.layout, commits_of((origin, *inputs))):
        opened = {item.commit: store.snapshot_of(item.commit) for item in (origin, *inputs)}
        origin, inputs = _with_common_rows(store, origin, inputs, opened, notes)
        draft = draft_of(origin, inputs, found, settled, target, based=based)
        models = open_models(store, draft.models, opened)
        tensors: dict[str, tuple[int, tuple[str, ...] | None]] = dict.fromkeys(models[0].tensors, (0, None))
        if allow_missing:
            draft, tensors = _without_missing(draft, models, found)
        if draft.complete:
            tensors = {name: tensors[name] for name in in_order(tensors)}
        jobs = jobs_from(models, draft.settings, tensors)
        limits = budget or Budget()
        checked = plan_jobs(
            store, draft, models, jobs, found, limits, "exact" not in given, progress, previews=previews
        )
    if notes is not None:
        notes += preview_notes(checked.facts, found, previews=previews)
    return checked.plan


def _with_common_rows(
    store: Store,
    base: Input,
    experts: Sequence[Input],
    opened: Mapping[Digest, Snapshot],
    notes: list[str] | None,
) -> tuple[Input, list[Input]]:
    """The models as they are, or, where their vocabularies have different sizes, cut to the rows that all have."""
    inputs = [base, *experts]
    whole = [number for number, item in enumerate(inputs) if item.kind == "model"]
    if same_shapes(opened[inputs[number].commit] for number in whole):
        return base, list(experts)
    from mergepipe.merge.realign import keep_common_rows

    commits = [inputs[number].commit for number in whole]
    names = [inputs[number].name for number in whole]
    realigned = keep_common_rows(store, commits, 0, names).commits
    for number, commit in zip(whole, realigned, strict=True):
        if commit != inputs[number].commit and notes is not None:
            notes.append(f"{inputs[number].name}: its vocabulary is cut to the rows that all models have")
        inputs[number] = replace(inputs[number], commit=commit)
    return inputs[0], inputs[1:]


def draft_of(
    base: Input,
    experts: Sequence[Input],
    method: Method,
    parameters: Mapping[str, Value],
    dtype: str | None,
    *,
    based: bool,
) -> Plan:
    """A plan's head, with nothing of what follows from it."""
    return Plan(
        base=base,
        experts=tuple(experts),
        method=method.name,
        method_version=method.version,
        parameters=dict(parameters),
        dtype=dtype,
        budget_bytes=None,
        tensors={},
        costs=Costs(0, 0, 0, 0, 0),
        bound=Bound(0.0, 0.0, 0.0, None),
        based=based,
        config={"torch_dtype": str(DTYPES[dtype].torch_name)} if dtype is not None else {},
    )


def plan_jobs(
    store: Store,
    draft: Plan,
    models: Sequence[Model],
    jobs: Sequence[Job],
    method: Method,
    budget: Budget,
    may_approximate: bool,
    progress: Progress | None,
    *,
    previews: bool = True,
) -> CheckedPlan:
    """The plan for these jobs. ``may_approximate``: nobody asked for exact thresholds.

    Exact thresholds need a pass over the whole tensors. A merge that reads everything has them for nothing; one under
    a budget would read everything to get them, so it cuts at the histogram's resolution, and says so in its parameters.
    """
    facts = facts_of(store, models, jobs, draft.settings, method, bounded=False, progress=progress)
    if budget.covers(full_bytes(facts)):
        return CheckedPlan(make_plan(draft, facts, method, budget), method, models, facts)
    if may_approximate:
        draft = _at_histogram_resolution(draft)
    facts = facts_of(store, models, jobs, draft.settings, method, bounded=True, progress=progress)
    return CheckedPlan(make_plan(draft, facts, method, budget, previews=previews), method, models, facts)


def facts_of(
    store: Store,
    models: Sequence[Model],
    jobs: Sequence[Job],
    settings: Sequence[Setting],
    method: Method,
    *,
    bounded: bool,
    progress: Progress | None = None,
) -> Facts:
    """All that the planner needs to know. Where statistics are missing, the tensors concerned are read once."""
    settle = kept_settle(store, method) if bounded else None
    facts = gather(store, models, jobs, settings, method, bounded=bounded, settle=settle)
    if facts.missing:
        measure_missing(store, models, facts.missing, progress)
        facts = gather(store, models, jobs, settings, method, bounded=bounded, settle=settle)
    if facts.unsettled:
        settle_all(store, models, facts.unsettled, method, progress)
        facts = gather(store, models, jobs, settings, method, bounded=bounded, settle=settle)
    assert not facts.missing
    assert not facts.unsettled
    return facts


def jobs_of_plan(store: Store, plan: Plan) -> tuple[list[Model], list[Job]]:
    """A plan's models, opened, and its jobs; raises as :func:`open_models` and :func:`jobs_of` do."""
    models = open_models(store, plan.models)
    return models, jobs_of(models, plan)


def common_base(store: Store, experts: Sequence[Input]) -> Input:
    """What experts without a base are compared with: the model that all came from, or the first of them."""
    bases = set()
    for expert in experts:
        parent = store.commit(expert.commit).parent("base")
        bases.add((parent.commit, parent.name) if parent is not None else None)
    if len({found[0] for found in bases if found is not None}) == 1 and None not in bases:
        commit, name = min((found for found in bases if found is not None), key=lambda found: found[1])
        return Input(commit, name or commit.short)
    return Input(experts[0].commit, experts[0].name)


def input_of(store: Store, name: str, kind: str = "", onto: str = "") -> Input:
    """A model by its name; an adapter is known by its files."""
    commit = store.resolve(name)
    if not kind:
        kind = "adapter" if "adapter_config.json" in store.snapshot_of(commit).files else "model"
    if onto and kind != "adapter":
        raise UsageError(f"{name!r} is no adapter, and cannot go onto {onto!r}")
    return Input(commit, name, kind=kind, onto=store.resolve(onto) if onto else None)


def _input(store: Store, expert: Expert, method: Method, shared: Mapping[str, Value]) -> Input:
    for name in expert.parameters:
        if not method.parameter(name).per_expert:
            raise UsageError(f"expert {expert.name!r}: {name} is one for the whole merge", hint=f"Use --param {name}=…")
    settled = method.settle({**shared, **expert.parameters}, f"expert {expert.name!r}", per_expert=True)
    return replace(input_of(store, expert.name, expert.kind, expert.onto), parameters=settled)


def _check_whole(experts: Sequence[Input]) -> None:
    """Raises UsageError for a delta that nothing says what it is a delta to."""
    for expert in experts:
        if expert.kind == "task_vector" or (expert.kind == "adapter" and expert.onto is None):
            hint = ", or write onto=REF with the adapter." if expert.kind == "adapter" else "."
            raise UsageError(
                f"{expert.name!r} is no whole model, and nothing says which model it goes onto",
                hint=f"Name that model with --base{hint}",
            )


def _at_histogram_resolution(plan: Plan) -> Plan:
    """The plan with ``exact`` turned off wherever its method has it."""

    def off(parameters: Mapping[str, Value]) -> dict[str, Value]:
        return {**parameters, "exact": False} if "exact" in parameters else dict(parameters)

    variants = tuple(replace(setting, parameters=off(setting.parameters)) for setting in plan.variants)
    return replace(plan, parameters=off(plan.parameters), variants=variants)


def _without_missing(
    draft: Plan, models: Sequence[Model], method: Method
) -> tuple[Plan, dict[str, tuple[int, tuple[str, ...] | None]]]:
    """A complete plan whose settings leave out the experts that lack a tensor."""
    variants: list[Setting] = []
    tensors: dict[str, tuple[int, tuple[str, ...] | None]] = {}
    for name in models[0].tensors:
        there = tuple(number for number in range(1, len(models)) if name in models[number].tensors)
        if len(there) == len(models) - 1:
            tensors[name] = (0, None)
            continue
        least = method.experts[0]
        if len(there) < least:
            there = ()
        own = tuple(draft.experts[number - 1].parameters for number in there)
        setting = Setting(0, draft.based, there, draft.parameters, own)
        known = next((1 + place for place, other in enumerate(variants) if other == setting), None)
        if known is None:
            variants.append(setting)
            known = len(variants)
        tensors[name] = (known, None)
    if not variants:
        return draft, tensors
    return replace(draft, variants=tuple(variants), complete=True), tensors


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{where!r}: {text!r} is not a number") from None
