"""From a document and the models' tensor names to the result's tensors: which input tensors make each, with what.

A tensor belongs to the layer that the first number of its dotted name says, and to the stack that the name before the
number says. Slices cut the stack with the most tensors of the model that lends its config: the base, else the first.
Gradients run over ``t``, from 0 at a slice's first layer to 1 at its last, and 1 where it has one. Tensors of no layer
have ``t`` 0; embeddings come with the first slice, all else with the last. Other stacks come whole, with the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mergepipe.merge.method import Value
from mergepipe.merge.recipe.document import Document, InputModel, OutputSlice
from mergepipe.merge.recipe.fields import suggestion
from mergepipe.merge.recipe.layers import comes_first, sort_names, tensor_name, together
from mergepipe.merge.recipe.nodes import shown
from mergepipe.merge.recipe.reference import ModelReference
from mergepipe.merge.recipe.settings import Settings, resolve

MAXIMUM_TENSORS: Final = 1 << 20  # of the result: a short recipe could ask for a model's layers many thousand times
_DROPPED: Final = frozenset({"int8_mask"})  # of every method: saves memory in mergekit, changes no value


@dataclass(frozen=True, slots=True)
class Source:
    """One input of one output tensor. ``model`` is an index into :attr:`Outline.models`."""

    model: int
    tensor: str


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the result.

    ``sources`` are in the recipe's order, the base among them where it is an input; ``base`` is an index into them.
    ``parameters`` and ``own`` (one for each source) hold what the recipe sets, and nothing else. ``missing`` are those
    of the slice's models that lack the tensor.
    """

    name: str
    sources: tuple[Source, ...]
    base: int | None
    parameters: Mapping[str, Value]
    own: tuple[Mapping[str, Value], ...]
    missing: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Outline:
    """The result. ``layers`` is how many it has where that is not what the model that lends its config has."""

    models: tuple[ModelReference, ...]
    base: int | None
    tensors: tuple[OutputTensor, ...]
    layers: int | None


def outline(
    document: Document,
    tensor_names: Mapping[ModelReference, Sequence[str]],
    shared: frozenset[str],
    own: frozenset[str],
) -> Outline:
    """The output tensors: embeddings, other stacks, the layers in their order, the rest.

    Args:
        tensor_names: for each of :meth:`Document.models_used`.
        shared: the method's parameters that have one value for all inputs.
        own: the method's parameters that each input has its own value of.

    Raises:
        BadInputError: a parameter that the method has not, or not for one model; layers that a model has not; inputs
            of one slice with different numbers of layers.
    """
    check_parameters(document, shared, own)
    return _Outliner(document, tensor_names, shared, own).outline()


def check_parameters(document: Document, shared: frozenset[str], own: frozenset[str]) -> None:
    """Raise BadInputError for a parameter that the method has not, or not where the recipe sets it."""
    known = shared | own
    scopes = [document.parameters, document.module_parameters, *(output.parameters for output in document.slices)]
    for settings in scopes:
        _check_known(settings, known, document.method)
    for source in document.inputs():
        _check_known(source.parameters, known, document.method)
        for name, setting in source.parameters.items():
            if name not in own | _DROPPED:
                raise setting.place.error(
                    f"{shown(name)} has one value for all models in {shown(document.method)}, and is set for one",
                    "Move it to the `parameters` of the slice or of the whole recipe.",
                )


def _check_known(settings: Settings, known: frozenset[str], method: str) -> None:
    for name, setting in settings.items():
        if name not in known | _DROPPED:
            raise setting.place.error(
                f"the method {shown(method)} has no parameter {shown(name)}", suggestion(name, known)
            )


class _Outliner:
    """One document's outline in the making: the models, sorted, and the tensors so far."""

    def __init__(
        self,
        document: Document,
        tensor_names: Mapping[ModelReference, Sequence[str]],
        shared: frozenset[str],
        own: frozenset[str],
    ) -> None:
        self.document = document
        self.shared, self.own = sorted(shared - _DROPPED), sorted(own - _DROPPED)
        self.models = document.models_used()
        self.index = {model: index for index, model in enumerate(self.models)}
        self.sorted = {model: sort_names(tensor_names[model]) for model in self.models}
        donor = document.base_model or self.models[0]
        self.donor = self.sorted[donor]
        self.main = self.donor.main()
        self.tensors: list[OutputTensor] = []

    def outline(self) -> Outline:
        document, base, main = self.document, self.document.base_model, self.main
        slices = document.slices or (self._whole(),)
        for output in slices:
            if document.slices:
                self._check_ranges(output)
            elif main is not None:
                self._check_stack(output, main)
        self._loose(slices[0], first=True)
        for stack in together(self.sorted[source.model].stacks for source in slices[0].sources):
            if stack != main:
                self._check_stack(slices[0], stack)
                self._layers(slices[0], stack)
        layers = 0
        if main is not None:
            for output in slices:
                layers += self._layers(output, main, layers)
        self._loose(slices[-1], first=False)
        differs = bool(document.slices) and main is not None and layers != self.donor.stacks[main]
        return Outline(
            models=self.models,
            base=None if base is None else self.index[base],
            tensors=tuple(self.tensors),
            layers=layers if differs else None,
        )

    def _whole(self) -> OutputSlice:
        """``models`` as one slice of all layers, with the base at the end where it is not among them."""
        document, base = self.document, self.document.base_model
        sources = document.models
        if base is not None and all(source.model != base for source in sources):
            sources = (*sources, InputModel(document.place_of("base_model"), base, None, {}))
        return OutputSlice(document.place, sources, None, {})

    def _check_ranges(self, output: OutputSlice) -> None:
        """Raise BadInputError where a slice asks for layers that are not there, or not for equally many of each."""
        lengths = set()
        for source in output.sources:
            first, end = source.layer_range or (0, 0)
            has = 0 if self.main is None else self.sorted[source.model].stacks.get(self.main, 0)
            if end > has:
                raise source.place.error(
                    f"layer_range [{first}, {shown(end)}] is not in {shown(str(source.model))}, which has {has} layers",
                    f"The end can be {has} at most.",
                )
            lengths.add(end - first)
        if len(lengths) > 1:
            counts = " and ".join(str(length) for length in sorted(lengths))
            raise output.place.error(
                f"the sources of a slice have {counts} layers", "Give each a layer_range of the same length."
            )

    def _check_stack(self, output: OutputSlice, stack: str) -> None:
        """Raise BadInputError where inputs have different numbers of a stack's layers; an input may have none."""
        expected: int | None = None
        for source in output.sources:
            has = self.sorted[source.model].stacks.get(stack, expected)
            if expected is not None and has != expected:
                raise source.place.error(
                    f"{shown(str(source.model))} has {has} layers under {shown(stack)}, and those before it {expected}",
                    "Choose layers with `slices:`, or merge models of one shape.",
                )
            expected = has

    def _loose(self, output: OutputSlice, *, first: bool) -> None:
        for name in together(self.sorted[source.model].loose for source in output.sources):
            if comes_first(name) == first:
                self._add(output, name, [name] * len(output.sources), 0.0)

    def _layers(self, output: OutputSlice, stack: str, offset: int = 0) -> int:
        """Add a slice's layers of a stack, the first as layer ``offset``; returns how many."""
        models = [self.sorted[source.model] for source in output.sources]
        if self.document.slices and stack == self.main:
            ranges = [source.layer_range or (0, 0) for source in output.sources]
            starts, count = [first for first, _ in ranges], ranges[0][1] - ranges[0][0]
        else:
            starts, count = [0] * len(models), max(model.stacks.get(stack, 0) for model in models)
        self._check_size(output, offset + count)
        for layer in range(count):
            t = layer / (count - 1) if count > 1 else 1.0
            numbers = [start + layer for start in starts]
            rests = together(model.layers.get((stack, at), ()) for model, at in zip(models, numbers, strict=True))
            for rest in rests:
                names = [tensor_name(stack, number, rest) for number in numbers]
                self._add(output, tensor_name(stack, offset + layer, rest), names, t)
        return count

    def _check_size(self, output: OutputSlice, size: int) -> None:
        if size >= MAXIMUM_TENSORS:
            raise output.place.error(f"the result has more than {MAXIMUM_TENSORS} tensors", "Ask for fewer layers.")

    def _add(self, output: OutputSlice, name: str, names: Sequence[str], t: float) -> None:
        """Add the output tensor that is made from the tensors ``names``, one for each source of the slice."""
        document = self.document
        self._check_size(output, len(self.tensors))
        scopes = (output.parameters, document.module_parameters, document.parameters)
        base = output.base_model or document.base_model
        sources: list[Source] = []
        own: list[Mapping[str, Value]] = []
        missing: list[int] = []
        base_at = None
        for source, tensor in zip(output.sources, names, strict=True):
            index = self.index[source.model]
            if tensor not in self.sorted[source.model].names:
                missing.append(index)
                continue
            if source.model == base:
                base_at = len(sources)
            sources.append(Source(index, tensor))
            own.append(resolve(self.own, (source.parameters, *scopes), tensor, t))
        shared = resolve(self.shared, scopes, name, t)
        self.tensors.append(OutputTensor(name, tuple(sources), base_at, shared, tuple(own), tuple(missing)))
