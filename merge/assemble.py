"""From models and settings to jobs: which tensors of which models make each tensor of the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mergepipe.merge.inputs import Model
from mergepipe.merge.job import Job, Setting, mask_key
from mergepipe.merge.method import Value
from mergepipe.merge.plan import Plan
from mergepipe.merge.recipe.layers import layer_of, sort_names
from mergepipe.store.errors import BadInputError
from mergepipe.store.manifest import TensorEntry, natural_key
from mergepipe.store.snapshot import Snapshot

_SHOWN = 3


def jobs_of(models: Sequence[Model], plan: Plan) -> list[Job]:
    """All jobs of a plan: what it lists, or, where it is not complete, each tensor of the base.

    Raises:
        BadInputError: a model lacks a tensor that it should have, or has it in another shape.
    """
    if not plan.complete:
        return jobs_from(models, plan.settings, dict.fromkeys(models[0].tensors, (0, None)))
    listed = {name: (planned.setting, planned.sources) for name, planned in plan.tensors.items()}
    return jobs_from(models, plan.settings, {name: listed[name] for name in in_order(listed)})


def jobs_from(
    models: Sequence[Model],
    settings: Sequence[Setting],
    tensors: Mapping[str, tuple[int, tuple[str, ...] | None]],
) -> list[Job]:
    """One job for each name; with it the number of its setting, and its sources (see :class:`Job`).

    Raises:
        BadInputError: a model lacks a tensor that it should have, or has it in another shape.
    """
    problems: dict[int, list[str]] = {}
    jobs = []
    for name, (number, sources) in tensors.items():
        setting = settings[number]
        members = (setting.reference, *setting.experts)
        names = sources or (name,) * len(members)
        reference = models[setting.reference].tensors.get(names[0])
        if reference is None:
            problems.setdefault(setting.reference, []).append(f"{names[0]} is missing")
            continue
        experts = []
        for member, source in zip(members[1:], names[1:], strict=True):
            entry = models[member].tensors.get(source)
            problem = misfit(source, entry, reference)
            if problem or entry is None:
                problems.setdefault(member, []).append(problem or "")
            else:
                experts.append(entry)
        keys = tuple(mask_key(name, models[member].input.commit) for member in setting.experts)
        jobs.append(Job(name, number, sources, reference, tuple(experts), keys))
    if problems:
        raise _does_not_fit(models, problems)
    return jobs


def misfit(name: str, entry: TensorEntry | None, reference: TensorEntry) -> str | None:
    """Why a tensor cannot be merged with its reference's, or None."""
    if entry is None:
        return f"{name} is missing"
    if entry.shape != reference.shape:
        return f"{name} is {list(entry.shape)}, in the base {list(reference.shape)}"
    if entry.dtype != reference.dtype and not (
        entry.element_type.has_statistics and reference.element_type.has_statistics
    ):
        return f"{name} is {entry.dtype}, in the base {reference.dtype}"
    if entry.chunks != reference.chunks:
        return f"{name} is cut into other blocks (ingest it again with --base)"
    return None


def _does_not_fit(models: Sequence[Model], problems: Mapping[int, Sequence[str]]) -> BadInputError:
    number, found = next(iter(problems.items()))
    more = f" (and {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
    who = models[number].input.name
    hint = "Merge models that were trained from the base. `mp diff BASE EXPERT` lists the differences."
    if all(problem.endswith("is missing") for problem in found):
        hint = "--allow-missing merges each tensor from the models that have it. " + hint
    elif any("in the base [" in problem for problem in found):
        hint = "Vocabularies of different sizes: a recipe's `tokenizer:` matches them by token. " + hint
    what = f"expert {who!r} does not fit the base" if number else f"the base {who!r} is not what the merge is for"
    return BadInputError(f"{what}: {'; '.join(found[:_SHOWN])}{more}", hint=hint)


def same_shapes(snapshots: Iterable[Snapshot]) -> bool:
    """Whether tensors of one name have one shape in all models."""
    known: dict[str, tuple[int, ...]] = {}
    return all(
        known.setdefault(name, entry.shape) == entry.shape
        for snapshot in snapshots
        for name, entry in snapshot.tensors.items()
    )


def head_of(settings: Sequence[Setting], experts: int) -> tuple[Mapping[str, Value], list[Mapping[str, Value]], bool]:
    """What the head of a plan says whose tensors all have settings of their own: the first setting's parameters, each
    expert's where it first appears, and whether any setting has a base."""
    own: dict[int, Mapping[str, Value]] = {}
    for setting in settings:
        for number, mine in zip(setting.experts, setting.own, strict=True):
            own.setdefault(number, mine)
    fallback = next(iter(own.values()), {})
    parameters = next((setting.parameters for setting in settings if setting.experts), {})
    each = [own.get(number, fallback) for number in range(1, experts + 1)]
    return parameters, each, any(setting.based for setting in settings)


def source_layers(plan: Plan) -> list[int]:
    """For each layer of the main stack of a complete plan's result, the layer that it comes from in the reference."""
    main = sort_names(list(plan.tensors)).main()
    found: dict[int, int] = {}
    for name, planned in plan.tensors.items():
        layer = layer_of(name)
        if layer is not None and layer.stack == main:
            source = layer_of(planned.sources[0] if planned.sources else name)
            found.setdefault(layer.number, source.number if source is not None else layer.number)
    return [found[number] for number in sorted(found)]


def in_order(names: Iterable[str]) -> list[str]:
    """Tensor names in a fixed order, layers by their numbers."""
    return sorted(names, key=lambda name: tuple(natural_key(part) for part in name.split(".")))
