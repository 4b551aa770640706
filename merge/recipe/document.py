"""mergekit's YAML: what a recipe says, checked, and with the line of everything that can still turn out wrong.

A recipe has one or more documents, each of which is one merge. A document may have a name, and others may use it where
they would name a model. Nothing is ignored: unknown fields, and fields that cannot be honoured, are errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mergepipe.merge.recipe.fields import fields, integer, mapping, required, sequence, suggestion, text
from mergepipe.merge.recipe.nodes import MAXIMUM_BYTES, Node, Place, load, shown
from mergepipe.merge.recipe.reference import ModelReference, read_reference
from mergepipe.merge.recipe.settings import Setting, Settings, read_settings
from mergepipe.merge.recipe.tokenizer import Tokenizer, TokenizerSource, read_tokenizer, read_tokenizer_source
from mergepipe.store.canonical import as_text
from mergepipe.store.errors import BadInputError, NotFoundError

DTYPES: Final[Mapping[str, str]] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
_FIELDS: Final = (
    *("name", "merge_method", "models", "slices", "modules", "base_model", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template", "parameters"),
)
_BODIES: Final = ("models", "slices", "modules")
_EXAMPLE: Final = "Write `- model: path` lines under it."


@dataclass(frozen=True, slots=True)
class InputModel:
    """One input. ``layer_range`` is [first, end) of its layers, or None for all."""

    place: Place
    model: ModelReference
    layer_range: tuple[int, int] | None
    parameters: Settings


@dataclass(frozen=True, slots=True)
class OutputSlice:
    """Some layers of the result. ``base_model`` is set where the slice has its own."""

    place: Place
    sources: tuple[InputModel, ...]
    base_model: ModelReference | None
    parameters: Settings


@dataclass(frozen=True, slots=True)
class Document:
    """One merge. Either ``models`` or ``slices`` has something; dtypes have safetensors' names.

    ``module_parameters`` are those of the one module, where the recipe writes its models or slices as a module.
    ``places`` has the place of each field that the document sets.
    """

    place: Place
    method: str
    models: tuple[InputModel, ...] = ()
    slices: tuple[OutputSlice, ...] = ()
    name: str | None = None
    base_model: ModelReference | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: TokenizerSource | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    parameters: Settings = field(default_factory=dict)
    module_parameters: Settings = field(default_factory=dict)
    places: Mapping[str, Place] = field(default_factory=dict)

    def place_of(self, name: str) -> Place:
        """Where a field stands; the document's own place where it is not set."""
        return self.places.get(name, self.place)

    def inputs(self) -> Iterator[InputModel]:
        """Every input, in the recipe's order."""
        yield from self.models
        for output in self.slices:
            yield from output.sources

    def scopes(self) -> Iterator[Settings]:
        """All of the recipe's ``parameters``."""
        yield from (self.parameters, self.module_parameters)
        yield from (output.parameters for output in self.slices)
        yield from (source.parameters for source in self.inputs())

    def models_used(self) -> tuple[ModelReference, ...]:
        """Each model whose tensors or config the merge needs, once, in the order of first use, the base then."""
        found = dict.fromkeys(source.model for source in self.inputs())
        if self.base_model is not None:
            found[self.base_model] = None
        return tuple(found)

    def references(self) -> Iterator[ModelReference]:
        """Every model that the document names, also those that only lend a tokenizer."""
        yield from self.models_used()
        yield from (output.base_model for output in self.slices if output.base_model is not None)
        if isinstance(self.tokenizer_source, ModelReference):
            yield self.tokenizer_source
        if self.tokenizer is not None:
            yield from self.tokenizer.references()


@dataclass(frozen=True, slots=True)
class Recipe:
    """The merges, each after those whose results it uses; one without a name is the last."""

    documents: tuple[Document, ...]


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file.

    Raises:
        NotFoundError: no such file.
        BadInputError: not a recipe; the message begins with the file and the line.
    """
    where = as_text(str(path))
    try:
        if not path.is_file():
            if path.exists():
                raise BadInputError(f"{where}: not a file", hint="Name the recipe's .yml file.")
            raise NotFoundError(f"{where}: no such recipe", hint="Check the path.")
        with path.open("rb") as file:
            data = file.read(MAXIMUM_BYTES + 1)
    except (OSError, ValueError) as error:
        raise BadInputError(f"{where}: cannot be read ({error})", hint="Check the path and its permissions.") from error
    try:
        return parse_recipe(data.decode("utf-8"), where)
    except UnicodeDecodeError as error:
        place = Place(where, data.count(b"\n", 0, error.start) + 1)
        raise place.error(f"not UTF-8 ({error.reason})", "Save the recipe as UTF-8 text.") from error


def parse_recipe(text: str, where: str) -> Recipe:
    """The recipe in a text; raises BadInputError whose message begins with ``where`` and the line."""
    documents = tuple(_read_document(node) for node in load(text, where))
    if not documents:
        raise Place(where, 1).error("the recipe is empty", "Begin with `merge_method:` and `models:`.")
    return Recipe(_in_order(documents))


def _in_order(documents: tuple[Document, ...]) -> tuple[Document, ...]:
    """The documents, each after those that it uses, else as they stand; raises BadInputError for a circle."""
    named: dict[str, Document] = {}
    final: list[Document] = []
    for document in documents:
        if document.name is None:
            final.append(document)
        elif document.name in named:
            raise document.place_of("name").error(f"the name {shown(document.name)} is taken", "Give it another name.")
        else:
            named[document.name] = document
    if len(final) > 1:
        raise final[1].place.error("a second document without a name", "Give each but the last a `name:`.")
    waiting = {name: {ref.path for ref in document.references()} & named.keys() for name, document in named.items()}
    ordered: list[Document] = []
    while waiting:
        ready = [name for name, needs in waiting.items() if not needs & waiting.keys()]
        if not ready:
            stuck = named[next(iter(waiting))]
            raise stuck.place.error(
                f"the merge {shown(stuck.name)} needs its own result, by way of other documents or at once",
                "Let documents use only merges that do not use them.",
            )
        for name in ready:
            ordered.append(named[name])
            del waiting[name]
    return (*ordered, *final)


def _read_document(node: Node) -> Document:
    found = fields(node, "the recipe", _FIELDS)
    place = node.place
    for name in ("name", "dtype", "out_dtype", "chat_template"):  # empty text is as good as none
        if getattr(found.get(name), "value", None) == "":
            del found[name]
    if "tokenizer" in found and "tokenizer_source" in found:
        raise found["tokenizer_source"].place.error("both tokenizer and tokenizer_source", "Keep one of the two.")
    entries = mapping(node, "the recipe", "").entries
    models, slices, module_parameters = _read_body(found, "the recipe", place, _BODIES)
    return Document(
        place=place,
        method=text(required(found, "merge_method", "the recipe", place), "merge_method"),
        models=models,
        slices=slices,
        name=text(found["name"], "name") if "name" in found else None,
        base_model=read_reference(found["base_model"], "base_model") if "base_model" in found else None,
        dtype=_read_dtype(found.get("dtype"), "dtype"),
        out_dtype=_read_dtype(found.get("out_dtype"), "out_dtype"),
        tokenizer_source=read_tokenizer_source(found["tokenizer_source"]) if "tokenizer_source" in found else None,
        tokenizer=read_tokenizer(found["tokenizer"]) if "tokenizer" in found else None,
        chat_template=text(found["chat_template"], "chat_template") if "chat_template" in found else None,
        parameters=read_settings(found.get("parameters")),
        module_parameters=module_parameters,
        places={name: entries[name].place for name in found},
    )


_Body = tuple[tuple[InputModel, ...], tuple[OutputSlice, ...], dict[str, Setting]]


def _read_body(found: Mapping[str, Node], what: str, place: Place, bodies: tuple[str, ...]) -> _Body:
    """The models or slices, and a module's parameters."""
    given = [name for name in bodies if name in found]
    if len(given) != 1:
        has = " and ".join(given) or "none of them"
        raise place.error(f"{what} needs exactly one of {', '.join(bodies)}, and has {has}", "Keep or add one.")
    if given == ["modules"]:
        return _read_modules(found["modules"])
    items = sequence(found[given[0]], given[0], _EXAMPLE)
    if not items:
        raise found[given[0]].place.error(f"{given[0]} is empty: there is nothing to merge", _EXAMPLE)
    if given == ["models"]:
        models = tuple(_read_input(item, "a model", ("model", "parameters")) for item in items)
        _check_twice(models)
        return models, (), {}
    return (), tuple(_read_slice(item) for item in items), {}


def _read_modules(node: Node) -> _Body:
    entries = mapping(node, "modules", "Write `default:` under it, and `slices:` or `models:` under that.").entries
    if len(entries) != 1:
        place = list(entries.values())[1].place if entries else node.place
        raise place.error(
            f"modules has {len(entries)} modules, and only one is supported",
            "With `models:` instead, all of a model's tensors are merged, in every module.",
        )
    (name, entry), *_ = entries.items()
    what = f"the module {shown(name)}"
    found = fields(entry.node, what, ("models", "slices", "parameters"))
    models, slices, _ = _read_body(found, what, entry.place, ("models", "slices"))
    return models, slices, read_settings(found.get("parameters"))


def _read_input(node: Node, what: str, known: tuple[str, ...]) -> InputModel:
    found = fields(node, what, known)
    return InputModel(
        place=node.place,
        model=read_reference(required(found, "model", what, node.place), "model"),
        layer_range=_read_range(required(found, "layer_range", what, node.place)) if "layer_range" in known else None,
        parameters=read_settings(found.get("parameters")),
    )


def _read_range(node: Node) -> tuple[int, int]:
    hint = "Write [first, end]: the end itself is not taken."
    items = sequence(node, "layer_range", hint)
    if len(items) != 2:
        raise node.place.error(f"layer_range must be two numbers, not {len(items)}", hint)
    first, end = (integer(item, "a number of layer_range") for item in items)
    if end < first:
        raise node.place.error(f"layer_range goes backwards, from {shown(first)} to {shown(end)}", hint)
    return first, end


def _read_slice(node: Node) -> OutputSlice:
    found = fields(node, "a slice", ("sources", "base_model", "residual_weight", "parameters"))
    if "residual_weight" in found:
        raise found["residual_weight"].place.error(
            "residual_weight cannot be honoured", "Remove it; mergekit itself does nothing with it."
        )
    at = required(found, "sources", "a slice", node.place)
    items = sequence(at, "sources", "Write `- model: path` and `layer_range: [first, end]` lines under it.")
    if not items:
        raise at.place.error("sources is empty: there is nothing to merge", _EXAMPLE)
    sources = tuple(_read_input(item, "a source", ("model", "layer_range", "parameters")) for item in items)
    _check_twice(sources)
    return OutputSlice(
        place=node.place,
        sources=sources,
        base_model=read_reference(found["base_model"], "base_model") if "base_model" in found else None,
        parameters=read_settings(found.get("parameters")),
    )


def _check_twice(inputs: tuple[InputModel, ...]) -> None:
    seen: set[ModelReference] = set()
    for source in inputs:
        if source.model in seen:
            raise source.place.error(
                f"the model {shown(str(source.model))} stands twice", "Keep one; its weight can be the sum of both."
            )
        seen.add(source.model)


def _read_dtype(node: Node | None, what: str) -> str | None:
    if node is None:
        return None
    name = text(node, what).removeprefix("torch.")
    if name not in DTYPES:
        raise node.place.error(f"{what} {shown(name)} is none that can be written", suggestion(name, DTYPES))
    return DTYPES[name]
