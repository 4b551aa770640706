"""From a recipe to plans: each document's tensors get their sources and parameters, and become a complete plan."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from mergepipe.merge.assemble import head_of, in_order, jobs_from
from mergepipe.merge.budget import Budget
from mergepipe.merge.build import common_base, draft_of, plan_jobs
from mergepipe.merge.checked import CheckedPlan
from mergepipe.merge.inputs import Model, open_models
from mergepipe.merge.job import Setting
from mergepipe.merge.method import Method, Parameter
from mergepipe.merge.methods import find_method
from mergepipe.merge.plan import Input, Plan, commits_of
from mergepipe.merge.recipe import Document, ModelReference, Outline, OutputTensor
from mergepipe.merge.recipe.nodes import shown
from mergepipe.merge.recipe.outline import check_parameters, outline
from mergepipe.merge.recipe.settings import Setting as ScopedSetting
from mergepipe.merge.recipe_models import Found, align_vocabularies, find_models
from mergepipe.store.errors import BadInputError, UsageError
from mergepipe.store.parallel import Progress
from mergepipe.store.snapshot import being_read

_METHODS: Final = "`mp methods` lists the methods, `mp methods NAME` describes one."


def plan_document(
    found: Found,
    document: Document,
    budget: Budget,
    *,
    allow_missing: bool = False,
    previews: bool = True,
    progress: Progress | None = None,
) -> CheckedPlan:
    """The plan of one document of a recipe. ``previews``: whether a budget may be spent on previews.

    Models that are not in the store are ingested; vocabularies are aligned first, where the document asks for it.

    Raises:
        BadInputError: what the document asks for cannot be done; the message names the file and the line.
        BudgetError: the budget cannot be met.
        ConflictError: a commit was collected meanwhile.
    """
    method = check_document(document)
    inputs = align_vocabularies(found, document, find_models(found, document))
    base, experts, numbers = _models(found, document, method, inputs)
    try:
        with being_read(found.store.layout, commits_of((base, *experts))):
            models = open_models(found.store, (base, *experts), found.opened)
            names = {reference: list(models[numbers.of(reference)].tensors) for reference in document.models_used()}
            what = outline(document, names, *_parameter_names(method))
            assembly = _Assembly(document, method, models, numbers, what, allow_missing)
            assembly.all()
            draft = assembly.draft(base, experts)
            tensors = {name: assembly.tensors[name] for name in in_order(assembly.tensors)}
            jobs = jobs_from(models, draft.settings, tensors)
            approximate = "exact" not in document.parameters
            return plan_jobs(
                found.store, draft, models, jobs, method, budget, approximate, progress, previews=previews
            )  # fmt: skip
    except UsageError as error:
        raise document.place.error(error.message, error.hint or _METHODS) from error


def check_document(document: Document) -> Method:
    """The document's method, after all that can be said of the document before its models are known.

    Raises:
        BadInputError: an unknown method or parameter, or a value out of its range, with the file and the line.
    """
    method = _method(document)
    _refuse_unsupported(document)
    check_parameters(document, *_parameter_names(method))
    known = {parameter.name: parameter for parameter in method.parameters}
    for settings in document.scopes():
        for name, setting in settings.items():
            if name in known:
                _check_values(known[name], setting)
    return method


def _parameter_names(method: Method) -> tuple[frozenset[str], frozenset[str]]:
    """Those of the whole merge, and those that each input has its own value of."""
    own = frozenset(parameter.name for parameter in method.parameters if parameter.per_expert)
    return frozenset(parameter.name for parameter in method.parameters) - own, own


def _check_values(parameter: Parameter, setting: ScopedSetting) -> None:
    """Raises BadInputError where a value, or one of a gradient, is none that the parameter may have."""
    for rule in setting.rules:
        for value in rule.values if isinstance(rule.values, tuple) else (rule.values,):
            try:
                parameter.check(value, "")
            except UsageError as error:
                wanted = parameter.describe_range()
                wanted = "a number that float32 holds" if wanted == "any number" else wanted
                wanted = wanted if wanted[0] not in "([" else f"a number in {wanted}"
                raise setting.place.error(
                    f"{parameter.name} is {shown(value)}, and must be {'whole, ' * parameter.whole}{wanted}",
                    f"{parameter.name}: {parameter.help}.",
                ) from error


def _method(document: Document) -> Method:
    try:
        return find_method(document.method)
    except UsageError as error:
        raise document.place_of("merge_method").error(error.message, error.hint or _METHODS) from error


def _refuse_unsupported(document: Document) -> None:
    if document.chat_template is not None:
        raise document.place_of("chat_template").error(
            "chat_template cannot be honoured", "Take the line out, and set the template in the exported tokenizer."
        )


@dataclass(frozen=True, slots=True)
class _Numbers:
    """The plan's number of each model of the document."""

    numbers: Mapping[ModelReference, int]

    def of(self, reference: ModelReference) -> int:
        return self.numbers[reference]


def _models(
    found: Found, document: Document, method: Method, inputs: Mapping[ModelReference, Input]
) -> tuple[Input, list[Input], _Numbers]:
    """The plan's base, its experts, and which is which.

    A method without a base has all of the document's models as experts; they are compared with the document's base,
    or else with what they have in common.
    """
    used = document.models_used()
    named = document.base_model
    numbers: dict[ModelReference, int] = {}
    experts: list[Input] = []
    if named is not None and method.base != "unused":
        numbers[named] = 0
    for reference in used:
        if reference not in numbers:
            experts.append(inputs[reference])
            numbers[reference] = len(experts)
    base = inputs[named] if named is not None else common_base(found.store, [_whole(item) for item in experts])
    if not experts:
        raise document.place.error("the merge has no models beside its base", "Name some under `models:`.")
    return base, experts, _Numbers(numbers)


def _whole(item: Input) -> Input:
    """The model that an adapter goes onto."""
    return Input(item.onto, item.name.partition("+")[0]) if item.onto is not None else item


@dataclass
class _Assembly:
    """The settings and sources of all output tensors, in the making."""

    document: Document
    method: Method
    models: Sequence[Model]
    numbers: _Numbers
    outline: Outline
    allow_missing: bool
    settings: list[Setting] = field(default_factory=list)
    tensors: dict[str, tuple[int, tuple[str, ...] | None]] = field(default_factory=dict)
    _known: dict[str, int] = field(default_factory=dict)

    def all(self) -> None:
        for tensor in self.outline.tensors:
            if tensor.missing and not self.allow_missing:
                raise self._missing()
            self._tensor(tensor)

    def draft(self, base: Input, experts: Sequence[Input]) -> Plan:
        """The plan's head. Where no tensor has all experts, it says what some tensor does."""
        out = self.document.out_dtype or self.document.dtype
        parameters, own, based = head_of(self.settings, len(experts))
        named = [replace(item, parameters=mine) for item, mine in zip(experts, own, strict=True)]
        draft = draft_of(base, named, self.method, parameters, out, based=based)
        config = dict(draft.config)
        if self.outline.layers is not None:
            config["num_hidden_layers"] = self.outline.layers
        files = self.numbers.of(self.outline.models[self.outline.base if self.outline.base is not None else 0])
        return replace(draft, variants=tuple(self.settings), complete=True, config=config, files=files)

    def _missing(self) -> BadInputError:
        lacking = [
            f"{tensor.name} ({', '.join(str(self.outline.models[number]) for number in tensor.missing)})"
            for tensor in self.outline.tensors
            if tensor.missing
        ]
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        return self.document.place.error(
            f"tensors that not all models have: {', '.join(lacking[:3])}{more}",
            "--allow-missing merges each tensor from the models that have it.",
        )

    def _tensor(self, tensor: OutputTensor) -> None:
        base = tensor.base if self.method.base != "unused" else None
        places = [place for place in range(len(tensor.sources)) if place != base]
        experts = [self.numbers.of(self.outline.models[tensor.sources[place].model]) for place in places]
        names = [tensor.sources[place].tensor for place in places]
        based = base is not None
        least = self.method.experts[0]
        if tensor.missing and (len(experts) < least or (self.method.base == "needed" and not based)):
            self._lone(tensor)
            return
        self.method.check_inputs(len(experts), based=based)
        where = f"{tensor.name}"
        parameters = self.method.settle(tensor.parameters, where, per_expert=False)
        own = tuple(self.method.settle(tensor.own[place], where, per_expert=True) for place in places)
        reference, reference_name = self._reference(tensor, base, experts, names)
        setting = Setting(reference, based, tuple(experts), parameters, own)
        sources = (reference_name, *names)
        self._put(tensor.name, setting, sources)

    def _lone(self, tensor: OutputTensor) -> None:
        """A tensor that too few models have for the method: the base's own, or the first model's."""
        place = tensor.base if tensor.base is not None else 0
        source = tensor.sources[place]
        number = self.numbers.of(self.outline.models[source.model])
        self._put(tensor.name, Setting(number, tensor.base is not None, ()), (source.tensor,))

    def _reference(
        self, tensor: OutputTensor, base: int | None, experts: Sequence[int], names: Sequence[str]
    ) -> tuple[int, str]:
        """What a tensor's blocks are compared with: the base, or what all come from, or the first of them."""
        if base is not None:
            source = tensor.sources[base]
            return self.numbers.of(self.outline.models[source.model]), source.tensor
        first = self.models[experts[0]].tensors[names[0]]
        common = self.models[0].tensors.get(names[0])
        if len(experts) > 1 and common is not None and common.same_grid(first):
            return 0, names[0]
        return experts[0], names[0]

    def _put(self, name: str, setting: Setting, sources: tuple[str, ...]) -> None:
        key = json.dumps(
            [setting.reference, setting.based, setting.experts, setting.parameters, setting.own], sort_keys=True
        )
        if key not in self._known:
            self.settings.append(setting)
            self._known[key] = len(self.settings)
        self.tensors[name] = (self._known[key], None if set(sources) == {name} else sources)
