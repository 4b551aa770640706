"""How a recipe names a model: ``path``, ``path@revision``, ``path+adapter``, or both, or the same as a mapping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mergepipe.merge.recipe.fields import fields, required, text
from mergepipe.merge.recipe.nodes import Node, Place, Scalar, shown

_FORM: Final = (
    "Write path, path@revision, path+lora or path@revision+lora@revision; or a mapping with `model: {path: …}`."
)


@dataclass(frozen=True, slots=True)
class ModelReference:
    """A model, with an adapter applied to it where ``lora`` is given. Paths are as the recipe has them."""

    path: str
    revision: str | None = None
    lora: str | None = None
    lora_revision: str | None = None

    def __str__(self) -> str:
        model = f"{self.path}@{self.revision}" if self.revision else self.path
        if not self.lora:
            return model
        return f"{model}+{self.lora}@{self.lora_revision}" if self.lora_revision else f"{model}+{self.lora}"


def read_reference(node: Node, what: str) -> ModelReference:
    """The model that a value names; raises BadInputError."""
    if isinstance(node, Scalar):
        return _parse(text(node, what), what, node.place)
    found = fields(node, what, ("model", "lora", "override_architecture"))
    if "override_architecture" in found:
        raise found["override_architecture"].place.error(
            "override_architecture cannot be honoured",
            "Remove it: tensors are matched by name, and the base model's config decides the architecture.",
        )
    path, revision = _read_path(required(found, "model", what, node.place), f"the model of {what}")
    if "lora" not in found:
        return ModelReference(path, revision)
    return ModelReference(path, revision, *_read_path(found["lora"], f"the lora of {what}"))


def _parse(value: str, what: str, place: Place) -> ModelReference:
    parts = value.split("+")
    if len(parts) > 2:
        raise place.error(f"{what} {shown(value)} has more than one '+'", _FORM)
    path, revision = _split(parts[0], what, place)
    if len(parts) == 1:
        return ModelReference(path, revision)
    return ModelReference(path, revision, *_split(parts[1], what, place))


def _split(value: str, what: str, place: Place) -> tuple[str, str | None]:
    path, at, revision = value.partition("@")
    if "@" in revision:
        raise place.error(f"{what} {shown(value)} has more than one '@'", _FORM)
    if not path.strip() or (at and not revision.strip()):
        raise place.error(f"{what} {shown(value)} has an empty part", _FORM)
    return path, revision or None


def _read_path(node: Node, what: str) -> tuple[str, str | None]:
    if isinstance(node, Scalar):
        return _split(text(node, what), what, node.place)
    found = fields(node, what, ("path", "revision"))
    path = text(required(found, "path", what, node.place), f"the path of {what}")
    revision = text(found["revision"], f"the revision of {what}") if "revision" in found else None
    return path, revision
