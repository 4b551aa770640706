"""What a recipe's field may hold: each reader takes a YAML value and gives a typed one, or says what is wrong there."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from mergepipe.merge.recipe.nodes import Entries, Items, Node, Place, Scalar, shown
from mergepipe.store.errors import nearest

_KINDS: Final = {Items: "a list", Entries: "a mapping"}
_LONGEST_NAME: Final = 80


def kind_of(node: Node) -> str:
    """What a value is, as a message says it."""
    if not isinstance(node, Scalar):
        return _KINDS[type(node)]
    return "nothing" if node.value is None else shown(node.value)


def is_null(node: Node | None) -> bool:
    """Whether a field is absent, or is there and empty: one and the same in a recipe."""
    return node is None or (isinstance(node, Scalar) and node.value is None)


def suggestion(wanted: str, known: Collection[str]) -> str:
    """A hint for an unknown name: the nearest, or all."""
    return nearest(wanted[:_LONGEST_NAME], known) or f"Known here: {', '.join(sorted(known)) or 'none'}."


def mapping(node: Node, what: str, hint: str) -> Entries:
    """The mapping; raises BadInputError for anything else."""
    if not isinstance(node, Entries):
        raise node.place.error(f"{what} must be a mapping, not {kind_of(node)}", hint)
    return node


def sequence(node: Node, what: str, hint: str) -> tuple[Node, ...]:
    """The items of a list; raises BadInputError for anything else."""
    if not isinstance(node, Items):
        raise node.place.error(f"{what} must be a list, not {kind_of(node)}", hint)
    return node.items


def fields(node: Node, what: str, known: Collection[str]) -> dict[str, Node]:
    """The fields that a mapping sets, null ones left out; raises BadInputError for unknown ones."""
    found = {}
    for name, entry in mapping(node, what, f"It has the fields {', '.join(sorted(known))}.").entries.items():
        if name not in known:
            raise entry.place.error(f"{what} has no field {shown(name)}", suggestion(name, known))
        if not is_null(entry.node):
            found[name] = entry.node
    return found


def required(found: dict[str, Node], name: str, what: str, place: Place) -> Node:
    """A field that must be there; raises BadInputError at ``place`` where it is not."""
    if name not in found:
        raise place.error(f"{what} lacks {name!r}", f"Add `{name}:` to it.")
    return found[name]


def text(node: Node, what: str) -> str:
    """Text that is not empty; raises BadInputError for anything else."""
    if not isinstance(node, Scalar) or not isinstance(node.value, str):
        raise node.place.error(
            f"{what} must be text, not {kind_of(node)}", "Put quotes around it if it is meant as text."
        )
    if not node.value:
        raise node.place.error(f"{what} is empty", "Fill it in, or remove the line.")
    return node.value


def boolean(node: Node, what: str) -> bool:
    """True or false; raises BadInputError for anything else."""
    if not isinstance(node, Scalar) or not isinstance(node.value, bool):
        raise node.place.error(f"{what} must be true or false, not {kind_of(node)}", "Write true or false.")
    return node.value


def integer(node: Node, what: str, minimum: int = 0) -> int:
    """A whole number of at least ``minimum``; raises BadInputError for anything else."""
    value = node.value if isinstance(node, Scalar) else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise node.place.error(
            f"{what} must be a whole number from {minimum}, not {kind_of(node)}",
            f"Write a number such as {minimum + 8}.",
        )
    return value
