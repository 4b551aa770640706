"""The tokenizer that a recipe asks for: whose vocabulary, and where single tokens' embeddings come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from mergepipe.merge.recipe.fields import boolean, fields, integer, is_null, mapping, required, suggestion, text
from mergepipe.merge.recipe.nodes import Entries, Node, Scalar, shown
from mergepipe.merge.recipe.reference import ModelReference, read_reference

TokenizerSource = Literal["union", "base"] | ModelReference
"""All vocabularies together, the base model's, or that of one model."""

_KINDS: Final = ("model_token", "zero")


@dataclass(frozen=True, slots=True)
class ModelToken:
    """Another token's embedding in some model: by its text or by its row, never both."""

    model: ModelReference
    token: str | None
    token_id: int | None


@dataclass(frozen=True, slots=True)
class Token:
    """Where one token's embedding comes from where a model lacks it; with ``force``, also where it has it.

    ``source``: None leaves the choice to the usual rules.
    """

    source: ModelReference | ModelToken | Literal["zero"] | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The recipe's ``tokenizer``. ``pad_to_multiple_of`` is in rows of the embedding."""

    source: TokenizerSource = "union"
    tokens: Mapping[str, Token] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None

    def references(self) -> Iterator[ModelReference]:
        """The models that it names."""
        if isinstance(self.source, ModelReference):
            yield self.source
        for token in self.tokens.values():
            if isinstance(token.source, ModelReference):
                yield token.source
            elif isinstance(token.source, ModelToken):
                yield token.source.model


def read_tokenizer(node: Node) -> Tokenizer:
    """The ``tokenizer`` field; raises BadInputError."""
    found = fields(node, "tokenizer", ("source", "tokens", "pad_to_multiple_of"))
    tokens: dict[str, Token] = {}
    if "tokens" in found:
        entries = mapping(found["tokens"], "tokens", "Write `token: {source: …}` lines under it.").entries
        tokens = {name: _token(name, entry.node) for name, entry in entries.items()}
    pad = found.get("pad_to_multiple_of")
    return Tokenizer(
        source=read_tokenizer_source(found["source"]) if "source" in found else "union",
        tokens=tokens,
        pad_to_multiple_of=None if pad is None else integer(pad, "pad_to_multiple_of", 1),
    )


def read_tokenizer_source(node: Node) -> TokenizerSource:
    """``union``, ``base`` or a model; raises BadInputError."""
    if isinstance(node, Scalar):
        if node.value == "union":
            return "union"
        if node.value == "base":
            return "base"
    return read_reference(node, "the tokenizer's source")


def _token(name: str, node: Node) -> Token:
    what = f"the token {shown(name)}"
    found = fields(node, what, ("source", "force"))
    return Token(
        source=_embedding(found["source"], what) if "source" in found else None,
        force=boolean(found["force"], f"force of {what}") if "force" in found else False,
    )


def _embedding(node: Node, what: str) -> ModelReference | ModelToken | Literal["zero"]:
    if not isinstance(node, Entries) or "kind" not in node.entries or is_null(node.entries["kind"].node):
        return read_reference(node, f"the source of {what}")
    at = node.entries["kind"]
    kind = text(at.node, f"the kind of {what}")
    if kind == "zero":
        fields(node, f"the source of {what}", ("kind",))
        return "zero"
    if kind != "model_token":
        raise at.place.error(f"{what} has a source of the unknown kind {shown(kind)}", suggestion(kind, _KINDS))
    found = fields(node, f"the source of {what}", ("kind", "model", "token", "token_id"))
    if ("token" in found) == ("token_id" in found):
        raise node.place.error(f"the source of {what} needs one of token and token_id", "Give exactly one of the two.")
    return ModelToken(
        model=read_reference(required(found, "model", f"the source of {what}", node.place), f"the source of {what}"),
        token=text(found["token"], f"the source token of {what}") if "token" in found else None,
        token_id=integer(found["token_id"], f"token_id of {what}") if "token_id" in found else None,
    )
